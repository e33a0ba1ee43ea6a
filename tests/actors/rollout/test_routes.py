"""The experts that tokens take in an engine: recorded, cut to what is new of each request, and carried to its sample."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.v1.engine import EngineCoreOutput

from actors.rollout.routes import Recorder, Routes
from actors.rollout.sample import sample_of
from actors.rollout.scheduler import _Bundle
from grpo_ray.errors import WorkerError
from grpo_ray.types import Sample, SampleRequest, SamplingParams
from tests.bench.routing import ENV


def scheduled(new: dict[str, tuple[int, int]], cached: dict[str, tuple[int, int]]) -> Any:
    """What the scheduler says of a step: for each request the tokens computed before it, and in it."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=start) for name, (start, _) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[start for start, _ in cached.values()]
        ),
        num_scheduled_tokens={name: num for name, (_, num) in (new | cached).items()},
    )


def rows(*numbers: int) -> Any:
    return np.array(numbers, np.uint8).reshape(-1, 1, 1)


def test_a_recorder_keeps_the_layers_of_a_step_together_and_steps_apart() -> None:
    recorder = Recorder(num_layers=3, num_experts=4, top_k=2)
    for first in (0, 2):
        for layer in (1, 2):
            recorder.record(layer, torch.tensor([[first, layer]] * (first + 1), dtype=torch.int32))
    for first in (0, 2):
        step = recorder.take()
        assert step.dtype == np.uint8
        assert step.tolist() == [[[0, 0], [first, 1], [first, 2]]] * (first + 1)
    assert Recorder(1, 257, 1)._dtype == np.uint16


def test_a_request_that_is_computed_again_keeps_the_experts_of_the_first_time() -> None:
    routes = Routes()
    routes.add(rows(1, 2, 3, 11, 12), ["a", "b"], scheduled({"a": (0, 3), "b": (0, 2)}, {}))
    routes.add(rows(13, 4), ["b", "a"], scheduled({}, {"a": (3, 1), "b": (2, 1)}))
    # After a pause "a" begins anew, with all of its tokens and one more.
    routes.add(rows(91, 92, 93, 94, 5, 14), ["a", "b"], scheduled({}, {"a": (0, 5), "b": (3, 1)}))
    taken = routes.take("a")
    assert taken is not None
    assert taken.flatten().tolist() == [1, 2, 3, 4, 5]
    assert routes.take("a") is None
    routes.add(rows(6), ["a"], scheduled({}, {"a": (5, 1)}))
    later, other = routes.take("a"), routes.take("b")
    assert later is not None
    assert other is not None
    assert (later.flatten().tolist(), other.flatten().tolist()) == ([6], [11, 12, 13, 14])
    routes.forget("a")
    assert "a" not in routes._known


def test_outputs_that_wait_are_sent_with_the_experts_of_all_of_them() -> None:
    bundle = _Bundle(0)
    for number in (1, 2):
        bundle.add(EngineCoreOutput("r", [number], routed_experts=rows(number, number)))
    sent = bundle.take()
    assert sent.routed_experts is not None
    assert sent.routed_experts.flatten().tolist() == [1, 1, 2, 2]
    bundle.add(EngineCoreOutput("r", [3]))
    assert bundle.take().routed_experts is None


def sampled(routes: Any) -> Sample:
    """A sample of three and two tokens, with the experts that vLLM told."""
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=2)
    logprobs = FlatLogprobs([0, 1], [1, 2], [7, 8], [-0.5, -0.5], [1, 1], [None, None])
    completion = CompletionOutput(0, "", [7, 8], None, logprobs, routed_experts=routes, finish_reason="stop")
    return sample_of(SampleRequest("p", 0, [1, 2, 3], 0, params), completion, 0, "", "rollout-0")


def test_a_sample_has_the_experts_of_every_token_but_the_last() -> None:
    found = sampled(rows(1, 2, 3, 4, 5)).routes
    assert found is not None
    assert found.flatten().tolist() == [1, 2, 3, 4]
    assert sampled(None).routes is None
    with pytest.raises(WorkerError, match="rollout-0: vLLM told the experts of 3 tokens of 4"):
        sampled(rows(1, 2, 3))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_experts_of_a_real_engine_take_the_mismatch_in_bf16_down() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.routing", "qwen3_moe", "bfloat16"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=280, check=True)
    own, kept = json.loads(done.stdout.splitlines()[-1]).values()
    assert own["other_experts"] > 0.002
    assert kept["other_experts"] == 0
    assert kept["mean_abs"] < own["mean_abs"] / 2
    assert kept["max_abs"] < own["max_abs"] / 5
    assert kept["kl"] < own["kl"] / 10
