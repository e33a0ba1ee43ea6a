"""The sample that an update which is not finite names, and by which of its numbers it is found."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.learner.accumulation import _Computed
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.types import TrainBatch, TrainSample

LENGTHS = (3, 2, 4)


def computed(samples: list[TrainSample], loss: float = 0.0) -> _Computed:
    packed = pack(
        [PackItem(np.arange(2), np.arange(n), np.zeros(n, np.float32), 0.0, 1.0, i) for i, n in enumerate(LENGTHS)]
    )
    data = MicroBatchData.of(packed, torch.device("cpu"), samples)
    return _Computed(data, TrainBatch(1, samples, 1.0), torch.zeros(sum(LENGTHS)), torch.tensor(loss))


@pytest.fixture
def samples() -> list[TrainSample]:
    return [TrainSample([], i, "pair", i, 2, n, group=0, ref_logps=-float(n)) for i, n in enumerate(LENGTHS)]


def test_each_sequence_has_the_numbers_of_its_sample(samples: list[TrainSample]) -> None:
    given = [replace(s, reward=10.0 + i, target=20.0 + i) for i, s in enumerate(samples)]
    data = computed(given).data
    assert data.rewards_S is not None
    assert data.targets_S is not None
    assert data.ref_logps_S is not None
    assert data.rewards_S.tolist() == [10, 11, 12]
    assert data.targets_S.tolist() == [20, 21, 22]
    assert data.ref_logps_S.tolist() == [-3, -2, -4]


def test_a_batch_without_references_has_none(samples: list[TrainSample]) -> None:
    assert computed([replace(s, ref_logps=None) for s in samples]).data.ref_logps_S is None


def test_finite_numbers_are_right(samples: list[TrainSample]) -> None:
    assert not computed(samples).is_wrong


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_names_its_sample_though_the_loss_hides_it(
    samples: list[TrainSample], number: float
) -> None:
    samples[1] = replace(samples[1], ref_logps=number)
    found = computed(samples)
    assert found.is_wrong
    assert found.culprit == "log-probability that came with a token of sample pair[1]"


def test_a_target_that_is_not_finite_names_its_sample(samples: list[TrainSample]) -> None:
    samples[2] = replace(samples[2], target=math.nan)
    found = computed(samples, loss=math.nan)
    assert found.is_wrong
    assert found.culprit == "loss of sample pair[2]"
