"""A learner rank on a CUDA device: the same step as on the CPU, and attention kernels that agree."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import is_flash_attn_2_available

from grpo_ray.batch.pack import pack
from grpo_ray.models.attention import FLASH, PACKED, attention_kwargs, choose_attention, packed_attention
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.varlen import has_kernel
from tests.actors.learner.test_learner import exported, make_batch, make_config, moved_apart, plain_step, run
from tests.batch.test_batching import random_items

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def policy_with(path: Path, attention: str, dtype: torch.dtype) -> PolicyModel:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    return PolicyModel(hf.to("cuda"), chunk=16).eval()


@torch.no_grad()
def test_packed_attention_on_the_gpu_equals_the_cpu(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    name = choose_attention("sdpa", torch.device("cuda"))
    on_cpu = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=name)
    want, _ = PolicyModel(on_cpu, chunk=16).eval()(pack(random_items()), 1.0)
    got, _ = policy_with(tiny_model, name, torch.float32)(pack(random_items()), 1.0)
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flash_attention_equals_packed_attention(tiny_model: Path) -> None:
    if not is_flash_attn_2_available():
        pytest.skip("needs flash-attn 2")
    batch = pack(random_items())
    flash, _ = policy_with(tiny_model, FLASH, torch.bfloat16)(batch, 1.0)
    packed, _ = policy_with(tiny_model, choose_attention("sdpa", torch.device("cuda")), torch.bfloat16)(batch, 1.0)
    assert (flash - packed).abs().mean() < 0.02


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("shared", [False, True])
def test_one_kernel_for_all_sequences_equals_one_attention_per_length(window: int | None, shared: bool) -> None:
    """Output and gradients, against the same in fp32, for which there is one attention per length."""
    torch.manual_seed(0)
    lengths = [300, 77, 513, 40, 2]
    sequences: list[tuple[int, ...]] = [(0, 1), (0, 2), (3,), (0,), (0, 4)] if shared else [(k,) for k in range(5)]
    layout = attention_kwargs(lengths, sequences, PACKED, torch.device("cuda"))["packed_layout"]
    halves = [torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    upstream = torch.randn(1, sum(lengths), 8, 64, device="cuda")
    assert has_kernel(halves[0], 0.0)
    results = []
    for inputs in (halves, [x.float() for x in halves]):
        q, k, v = (x.requires_grad_() for x in inputs)
        out, _ = packed_attention(nn.Module(), q, k, v, None, packed_layout=layout, sliding_window=window)
        results.append([out, *torch.autograd.grad(out, [q, k, v], upstream.to(out.dtype))])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() < 0.01 * want.norm()


def test_new_lengths_cost_no_plan() -> None:
    """cuDNN's attention plans each shape anew, 25 ms and more of the host; flash attention takes any."""
    choose_attention("sdpa", torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()

    def seconds(lengths: list[int]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for length in lengths:
            kwargs = attention_kwargs([length, length + 1], [(0,), (1,)], PACKED, torch.device("cuda"))
            q = torch.randn(1, 8, 2 * length + 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            packed_attention(nn.Module(), q, q, q, None, **kwargs)[0].sum().backward()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(lengths)

    seconds([50, 51])
    assert seconds(list(range(100, 164))) < 0.01


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_step_on_a_gpu_equals_plain_pytorch(stage: int, tiny_model: Path, tmp_path: Path) -> None:
    from actors.learner.group import LearnerGroup

    config = make_config(tiny_model, ranks=1, stage=stage)
    group = run(LearnerGroup.create(config, str(tiny_model), str(tmp_path), has_gpus=True))
    try:
        batch = make_batch()
        _, want_norm, want_mismatch = plain_step(tiny_model, batch)
        metrics = run(group.update(batch)).metrics
        assert metrics["grad_norm"] == pytest.approx(want_norm, rel=1e-3)
        assert metrics["mismatch/mean_abs"] == pytest.approx(want_mismatch, rel=1e-3)
    finally:
        run(group.close())


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)])
def test_a_learner_frees_the_gpu_and_takes_it_back_without_a_bit_changed(
    dtype: str, stage: int, tiny_model: Path, tmp_path: Path
) -> None:
    import ray

    from actors.learner.group import LearnerGroup

    config, results = make_config(tiny_model, ranks=1, stage=stage, model={"dtype": dtype}), []
    for turns in (0, 2):
        group = run(LearnerGroup.create(config, str(tiny_model), str(tmp_path), has_gpus=True))
        try:
            run(group.update(make_batch(seed=0)))
            held = ray.get(group._actors[0].__ray_call__.remote(lambda _: torch.cuda.memory_allocated()))
            for _ in range(turns):
                run(group.offload(keep_weights=True))
                run(group.offload(keep_weights=False))
                left = ray.get(group._actors[0].__ray_call__.remote(lambda _: torch.cuda.memory_allocated()))
                assert left < 0.05 * held
                run(group.reload())
            run(group.update(make_batch(seed=1, step=1)))
            results.append(exported(group, tmp_path / f"hf-{turns}"))
        finally:
            run(group.close())
    want, got = results
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("attention", "dtype", "rel"), [("sdpa", "float32", 1e-3), (FLASH, "bfloat16", 3e-2)])
@pytest.mark.parametrize("stage", [1, 3])
def test_two_gpus_share_a_micro_batch_and_step_as_one_does(
    stage: int, attention: str, dtype: str, rel: float, tiny_model: Path, tmp_path: Path
) -> None:
    from actors.learner.group import LearnerGroup

    if attention == FLASH and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn 2")
    model, batch, results = {"attention": attention, "dtype": dtype}, make_batch(), []
    for size in (1, 2):
        learner = {"sequence_parallel_size": size}
        config = make_config(tiny_model, ranks=size, stage=stage, model=model, learner=learner)
        group = run(LearnerGroup.create(config, str(tiny_model), str(tmp_path), has_gpus=True))
        try:
            metrics = run(group.update(batch)).metrics
            results.append((metrics, exported(group, tmp_path / f"hf-{size}")))
        finally:
            run(group.close())
    (want, want_weights), (got, weights) = results
    for name in ("grad_norm", "mismatch/mean_abs", "entropy"):
        assert got[name] == pytest.approx(want[name], rel=rel), name
    assert moved_apart(weights, want_weights, load_file(tiny_model / "model.safetensors")) < rel
