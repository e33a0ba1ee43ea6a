"""Forward and backward passes of one packed micro-batch: tokens/s, MFU and peak memory, by attention, checkpointing, chunk and
compilation."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch

from grpo_ray.batch.pack import PackedBatch, PackItem, pack
from grpo_ray.config.model import ModelConfig
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.compiled import compile_layers
from grpo_ray.models.flops import model_shape, peak_flops, train_flops
from grpo_ray.models.memory.estimate import chunk_rows
from grpo_ray.models.policy import PolicyModel
from tests.gpu.kit.figures import DEVICE, ON_GPU, model_folder, note, noting, seconds_of

TOKENS = 16384 if ON_GPU else 600
LENGTHS = (100, 1500) if ON_GPU else (10, 100)
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"attention": name} for name in get_args(ModelConfig.model_fields["attention"].annotation)),
    {"cudnn": False},
    {"checkpointing": True},
    *({"chunk": rows} for rows in (441, 2048, 4096)),
    {"compiled": True},
)


def micro_batch(seed: int) -> PackedBatch:
    """Sequences of random lengths, so many that they fill a micro-batch."""
    rng = np.random.default_rng(seed)
    items: list[PackItem] = []
    left = TOKENS
    while left > LENGTHS[1]:
        length = int(rng.integers(*LENGTHS))
        ids = rng.integers(8, 90, length).astype(np.int32)
        items.append(PackItem(ids[:4], ids[4:], np.zeros(length - 4, np.float32), 1.0, 1.0, len(items)))
        left -= length
    return pack(items)


def load(
    attention: str = "auto", checkpointing: bool = False, compiled: bool = False, chunk: int | None = None
) -> PolicyModel:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if ON_GPU else torch.float32
    name = choose_attention(attention, DEVICE)
    hf = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype, attn_implementation=name).to(DEVICE).train()
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(hf)
    return PolicyModel(hf, chunk=chunk or chunk_rows(hf.config.vocab_size, on_gpu=ON_GPU))


def measure(options: dict[str, Any]) -> dict[str, float]:
    options = dict(options)
    if ON_GPU:
        torch.backends.cuda.enable_cudnn_sdp(options.pop("cudnn", True))
        torch.cuda.reset_peak_memory_stats()
    options.pop("cudnn", None)
    model = load(**options)
    # Lengths that were not seen before, as in training.
    batches = iter([micro_batch(seed) for seed in range(8)])
    first: PackedBatch = micro_batch(0)

    def step() -> None:
        logps_C, entropy_C = model(next(batches, first), 1.0)
        (logps_C.sum() + 0 * entropy_C.sum()).backward()
        model.zero_grad()

    seconds = seconds_of(step, times=5)
    shape, peak = model_shape(model.hf), peak_flops(torch.cuda.get_device_name() if ON_GPU else "")
    lengths = [LENGTHS[1] // 2] * (TOKENS // (LENGTHS[1] // 2))
    figures = {"seconds": seconds, "tokens_per_s": TOKENS / seconds}
    if shape is not None and peak is not None:
        figures["mfu"] = train_flops(shape, lengths, lengths) / seconds / peak
    if ON_GPU:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def main() -> None:
    note("device", name=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__)
    for variant in VARIANTS if ON_GPU else VARIANTS[:2]:
        with noting("learner", variant=variant) as found:
            found |= measure(variant)
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
