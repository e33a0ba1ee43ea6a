"""Model FLOPs against counts by hand and by torch's own counter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grpo_ray.batch.plan import MiniBatchPlan
from grpo_ray.config.model import LoraConfig, TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.models.flops import (
    FlopCounter,
    ModelShape,
    UpdatePasses,
    forward_flops,
    model_shape,
    peak_flops,
    throughput_metrics,
    train_flops,
    update_flops,
)
from grpo_ray.models.lora import inject
from grpo_ray.types import TrainBatch, TrainSample


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder, TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, seed=1))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


# Of one layer: q and o 64 x 64 (q with a bias), k and v 64 x 32 with biases, three matrices of the MLP 64 x 176, two norms.
LAYER = (64 * 64 + 64) + 64 * 64 + 2 * (64 * 32 + 32) + 3 * 64 * 176 + 2 * 64


def shape_of(model: Any) -> ModelShape:
    shape = model_shape(model)
    assert shape is not None
    return shape


def test_the_shape_of_a_tiny_model_by_hand(tiny: Any) -> None:
    vocab = tiny.config.vocab_size
    assert model_shape(tiny) == ModelShape(
        body=2 * LAYER + 64, frozen_body=0, head=64 * vocab, frozen_head=0, attention=2 * 2 * 32
    )


def test_flops_by_hand() -> None:
    shape = ModelShape(body=1000, frozen_body=0, head=300, frozen_head=0, attention=2 * 4 * 8)
    # Sequences of 10 and 5 inputs with 4 and 2 targets: 6 N n, the head for its targets, 12 L H Q n^2.
    assert train_flops(shape, [10, 5], [4, 2]) == 6 * 1000 * 15 + 6 * 300 * 6 + 12 * 64 * (100 + 25)
    assert forward_flops(shape, [10, 5], [4, 2]) * 3 == train_flops(shape, [10, 5], [4, 2])


def test_the_forward_pass_costs_what_torch_counts(tiny: Any) -> None:
    length = 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny(input_ids=torch.arange(length)[None] % 200, use_cache=False)
    # Norms and biases are in N and are no products.
    assert forward_flops(shape_of(tiny), [length], [length]) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_backward_pass_costs_what_torch_counts_with_and_without_adapters(tiny: Any) -> None:
    length = 96
    # With adapters the products of the first layer pass no gradient on, to embeddings that are not trained.
    for lora, close in ((None, 0.01), (LoraConfig(r=4, alpha=8), 0.04)):
        model = copy.deepcopy(tiny)
        if lora:
            inject(model, lora)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.arange(length)[None] % 200, use_cache=False).logits.sum().backward()
        shape = shape_of(model)
        assert (shape.frozen_body > 0) == (lora is not None)
        assert train_flops(shape, [length], [length]) == pytest.approx(counter.get_total_flops(), rel=close)


def test_an_update_counts_what_every_pass_of_it_does() -> None:
    shape = ModelShape(body=1000, frozen_body=0, head=300, frozen_head=0, attention=64)
    samples = [TrainSample(None, i, "p", i, 7, 4, 0) for i in range(4)]
    batch = TrainBatch(1, samples, 1.0)
    plan = [MiniBatchPlan((((0,),), ((1,),))), MiniBatchPlan((((2,), ()), ((), ())), idle=(3,))]
    train, forward = train_flops(shape, [10], [4]), forward_flops(shape, [10], [4])

    def flops(**changes: int) -> float:
        passes: dict[str, Any] = {"train": 1, "reference": False, "old": False, "critic": False}
        return update_flops(shape, batch, plan, UpdatePasses(**passes | changes)) / 1

    assert flops() == 3 * train, "the idle sample is not computed"
    assert flops(train=4) == 12 * train
    assert flops(reference=True) == 3 * train + 3 * forward
    assert flops(old=True) == 3 * train + forward, "of the second mini-batch alone"
    headless = ModelShape(body=1000, frozen_body=0, head=0, frozen_head=0, attention=64)
    assert flops(critic=True) == 3 * (train + train_flops(headless, [10], [4]) + forward_flops(headless, [10], [4]))


def test_an_update_counts_what_ran_of_it_in_each_part_and_nothing_of_the_update_before() -> None:
    shape = ModelShape(body=1000, frozen_body=0, head=300, frozen_head=0, attention=64)
    samples = [TrainSample(None, i, "p", i, 7, 4, 0) for i in range(4)]
    batch = TrainBatch(1, samples, 1.0)
    passes = UpdatePasses(train=1, reference=False, old=False, critic=False)
    counter = FlopCounter(shape, shared_prompts=True)
    counter.add(batch, [MiniBatchPlan((((0, 1, 2, 3),),))], passes)
    together = counter.total
    counter.restart()
    for part in ([((0, 1),), ()], [((2,),), ((3,),)]):
        counter.add(batch, [MiniBatchPlan(tuple(part))], passes)
    apart = counter.total
    assert together is not None
    assert apart is not None
    assert apart - together == 6 * 1000 * 7 * 2, "two prompts more were computed"
    uncounted = FlopCounter(None, shared_prompts=True)
    uncounted.add(batch, [MiniBatchPlan((((0,),),))], passes)
    assert uncounted.total is None


def test_an_update_counts_a_shared_prompt_once_but_for_its_attention() -> None:
    shape = ModelShape(body=1000, frozen_body=400, head=300, frozen_head=0, attention=64)
    samples = [TrainSample(None, i, "p", i, 7, 4, group) for i, group in enumerate((0, 0, 0, 1))]
    batch, passes = TrainBatch(1, samples, 1.0), UpdatePasses(train=1, reference=True, old=False, critic=False)
    together, apart = [MiniBatchPlan((((0, 1, 2, 3),),))], [MiniBatchPlan((((0, 3), (1,)), ((2,), ())))]
    whole = update_flops(shape, batch, together, passes)
    assert update_flops(shape, batch, apart, passes, shared_prompts=True) == whole
    forward, frozen = 2 * 1000 * 14, 2 * 400 * 14
    assert whole - update_flops(shape, batch, together, passes, shared_prompts=True) == 4 * forward - frozen


def test_mfu_is_told_for_known_devices_alone() -> None:
    out = throughput_metrics(989e12, 5000.0, 2.0, 2, "NVIDIA H100 80GB HBM3", "bfloat16")
    assert out == {
        "throughput/learner_tokens_per_s": 2500.0,
        "throughput/learner_tflops": pytest.approx(989 / 4),
        "throughput/mfu": pytest.approx(0.25),
    }
    for device, dtype in (("", "bfloat16"), ("NVIDIA H100 80GB HBM3", "float32"), ("Some Card 9000", "bfloat16")):
        assert "throughput/mfu" not in throughput_metrics(1e12, 5000.0, 2.0, 2, device, dtype)
    assert set(throughput_metrics(None, 1.0, 1.0, 1, "NVIDIA H200", "bfloat16")) == {"throughput/learner_tokens_per_s"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_the_names_that_cuda_tells(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
