"""The layout for the GPU's attention kernel, and the keys gathered for it: by a kernel of the same semantics on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.models import attention, policy, varlen
from grpo_ray.models.attention import FLASH, PACKED, PackedLayout, choose_attention, packed_attention
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.varlen import Repeats, VarlenLayout, has_kernel, repeated, varlen_attention
from tests.batch.test_batching import LAID_OUT

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
LENGTHS = [5, 3, 8, 4, 2]
SHARED = [(0, 1), (0, 2), (3,), (0,), (0, 4)]


def varlen_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as flash-attention defines it: the last query of a sequence sees its last key."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    out = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q, k, v = query[a:b], key[c:d].repeat_interleave(groups, 1), value[c:d].repeat_interleave(groups, 1)
        assert len(q) <= max_q
        assert len(k) <= max_k
        shift = len(k) - len(q)
        back = torch.arange(len(q))[:, None] + shift - torch.arange(len(k))[None]
        may = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~may, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries of each call."""
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[0]))
        return varlen_on_cpu(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", called)
    monkeypatch.setattr(attention, "has_kernel", lambda query, dropout: dropout == 0.0)
    return calls


def test_the_kernel_is_told_where_each_sequence_has_its_queries_and_its_keys() -> None:
    layout = VarlenLayout.of([2, 4, 1, 4, 3], [(0, 1), (0, 2), (0,), (0, 3), (4,)], CPU)
    assert layout.cu_queries.tolist() == [0, 6, 7, 11, 14]
    assert layout.cu_keys.tolist() == [0, 6, 9, 15, 18]
    assert (layout.max_queries, layout.max_keys) == (6, 6)
    assert layout.repeats is not None
    assert layout.repeats.token_M.tolist() == [*range(6), 0, 1, 6, 0, 1, *range(7, 11), *range(11, 14)]
    assert layout.repeats.count_N.tolist() == [3, 3, *[1] * 12]


def test_whole_sequences_are_their_own_keys() -> None:
    layout = VarlenLayout.of([3, 5, 5], [(0,), (1,), (2,)], CPU)
    assert layout.repeats is None
    assert layout.cu_queries.tolist() == layout.cu_keys.tolist() == [0, 3, 8, 13]
    assert (layout.max_queries, layout.max_keys) == (5, 5)


@pytest.mark.parametrize("sequences", [[(1, 0)], [(0,), (1, 0)], [(1,), (0,)], [(0,), (2,), (1,)]])
def test_parts_out_of_order_are_refused(sequences: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="are not the next of the row"):
        VarlenLayout.of([2, 3, 4], sequences, CPU)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("sequences", [SHARED, [(k,) for k in range(5)]], ids=["shared", "whole"])
@pytest.mark.usefixtures("kernel_on_cpu")
def test_output_and_gradients_are_those_of_one_attention_per_length(
    window: int | None, sequences: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    upstream = torch.randn(1, sum(LENGTHS), 4, 8, dtype=torch.float64)
    layout = PackedLayout.of(LENGTHS, sequences)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window}
    results = []
    for one in (layout, replace(layout, varlen=VarlenLayout.of(LENGTHS, sequences, CPU))):
        out, _ = packed_attention(nn.Module(), q, k, v, None, packed_layout=one, **options)
        results.append([out, *torch.autograd.grad(out, [q, k, v], upstream)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@LAID_OUT
def test_log_probabilities_and_gradients_of_a_model_are_those_of_one_attention_per_length(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel_on_cpu: list[int],
    items: list[PackItem],
    options: dict[str, bool],
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float64, attn_implementation=choose_attention("sdpa", CPU)
    )
    model, batch = PolicyModel(hf, chunk=16), pack(items, **options)

    def computed() -> tuple[Tensor, Tensor]:
        logp_C, _ = model(batch, 1.0)
        model.zero_grad()
        (logp_C * torch.linspace(-1, 1, len(logp_C))).sum().backward()
        return logp_C.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want, want_gradient = computed()
    assert kernel_on_cpu == []

    def with_layout(lengths: list[int], sequences: list[tuple[int, ...]], *_: Any) -> dict[str, Any]:
        layout = PackedLayout.of(lengths, sequences)
        return {"packed_layout": replace(layout, varlen=VarlenLayout.of(lengths, sequences, CPU))}

    monkeypatch.setattr(policy, "attention_kwargs", with_layout)
    got, gradient = computed()
    # Once a layer, and each token is a query once.
    assert kernel_on_cpu == [len(batch.input_ids)] * hf.config.num_hidden_layers
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert (gradient - want_gradient).norm() <= 1e-6 * want_gradient.norm()


def test_the_gradient_of_a_token_with_many_rows_is_the_rounded_exact_sum() -> None:
    """In bfloat16, 256 + 1 is 256: added up there, 64 ones are lost."""
    tokens = torch.tensor([1, 0, *[1] * 64, 2])
    x_N = torch.zeros(3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(67, 2, 8, dtype=torch.bfloat16)
    upstream[0] = 256
    out = repeated(x_N, Repeats.of(tokens, 3, CPU))
    assert out.shape == (67, 2, 8)
    out.backward(upstream)
    assert x_N.grad is not None
    assert x_N.grad[:, 0, 0].tolist() == [1.0, 320.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "size", "dropout"), [(torch.float32, 64, 0.0), (torch.bfloat16, 64, 0.0), (torch.bfloat16, 64, 0.1)]
)
def test_nothing_on_a_cpu_goes_to_the_gpus_kernel(dtype: torch.dtype, size: int, dropout: float) -> None:
    assert not has_kernel(torch.zeros(1, 4, 3, size, dtype=dtype), dropout)


@pytest.mark.parametrize(
    ("dtype", "size", "dropout", "capability", "taken"),
    [
        (torch.bfloat16, 128, 0.0, (9, 0), True),
        (torch.bfloat16, 256, 0.0, (8, 0), True),
        (torch.float32, 128, 0.0, (9, 0), False),
        (torch.bfloat16, 100, 0.0, (9, 0), False),
        (torch.bfloat16, 264, 0.0, (9, 0), False),
        (torch.bfloat16, 128, 0.1, (9, 0), False),
        (torch.float16, 128, 0.0, (7, 5), False),
    ],
)
def test_the_kernel_takes_half_precision_heads_of_its_sizes_on_ampere_and_later(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    dropout: float,
    capability: tuple[int, int],
    taken: bool,
) -> None:
    class Query:
        is_cuda, device, shape = True, CUDA, (1, 4, 3, size)

    Query.dtype = dtype  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_kernel(Query(), dropout) is taken  # type: ignore[arg-type]


def test_torchs_own_function_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is for GPUs; up to there it runs on meta tensors."""
    layout = VarlenLayout.of(LENGTHS, SHARED, CPU)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    given: dict[str, Any] = {}
    real = varlen.varlen_attn

    def to_meta(*args: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        on_meta: list[Any] = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        return real(*on_meta, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", to_meta)
    assert varlen_attention(q, k, v, layout, None, 4).shape == q.shape
    assert given == {"scale": None, "window_size": (3, 0), "enable_gqa": True}
    varlen_attention(q, k, v, layout, None, None)
    assert given["window_size"] == (-1, 0)


def put_flash_attn_4(folder: Path) -> None:
    """What flash-attn-4 installs: a namespace of the name of flash-attn 2."""
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    (folder / "flash_attn" / "cute" / "__init__.py").write_text("")


def test_flash_attention_4_alone_is_no_flash_attention_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_flash_attn_4(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_attention("auto", CUDA, torch.bfloat16) == PACKED
    with pytest.raises(ValueError, match="needs a GPU and the flash-attn package, version 2"):
        choose_attention(FLASH, CUDA, torch.bfloat16)


def test_flash_attention_2_is_taken_on_gpus_and_never_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", CUDA, torch.bfloat16) == FLASH
    assert choose_attention(FLASH, CUDA, torch.bfloat16) == FLASH
    assert choose_attention("sdpa", CUDA, torch.bfloat16) == PACKED
    assert choose_attention("auto", CPU, torch.bfloat16) == PACKED
    assert choose_attention("auto", CUDA, torch.float32) == PACKED
    with pytest.raises(ValueError, match="has no float32"):
        choose_attention(FLASH, CUDA, torch.float32)
