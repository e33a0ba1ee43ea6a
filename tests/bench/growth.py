"""`make bench-growth`: what forward and backward of the learner cost over sequence length, model size and group size.

    python -m tests.bench.growth [length|size|group ...]

Each row is a process of its own with one thread, and takes the same way as the learner: plan, pack, chunked log-probabilities.
What must grow is counted beside it (FLOPs as in `grpo_ray/models/flops.py`); the last column is seconds per FLOP over those of the
first row, so that a term which grows faster than it must shows up as a figure above 1.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPEATS = 3
TIMEOUT_S = 900
MIB = 2**20
PROMPT = 64


@dataclass(frozen=True)
class Row:
    length: int = 512
    """Tokens of a sample, of which the prompt has 64."""
    samples: int = 16
    hidden: int = 256
    layers: int = 4
    micro_batch_tokens: int = 8192


LENGTHS = {f"{n:,} tokens": Row(length=n, samples=8192 // n) for n in (256, 512, 1024, 2048, 4096, 8192)}
SIZES = {
    f"{hidden} wide, {layers} deep": Row(hidden=hidden, layers=layers, samples=4)
    for hidden, layers in ((128, 4), (256, 4), (384, 8), (640, 12), (768, 16))
}
GROUPS = {f"{n} samples": Row(samples=n, length=256) for n in (4, 8, 16, 32, 64, 128)}
TABLES = {
    "length": ("8,192 tokens in all, one micro-batch", LENGTHS),
    "size": ("4 samples of 512 tokens, one micro-batch", SIZES),
    "group": ("samples of 256 tokens, micro-batches of 8,192", GROUPS),
}


def measure(row: Row) -> dict[str, float]:
    import torch

    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import build_tiny_model
    from grpo_ray.models.flops import forward_flops, model_shape
    from grpo_ray.models.memory.estimate import chunk_rows
    from tests.bench.passes import packed_pass, policy

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny = TinyModelConfig(
            hidden_size=row.hidden,
            num_layers=row.layers,
            num_heads=row.hidden // 64,
            num_kv_heads=row.hidden // 64,
            context=row.length,
        )
        ours = policy(str(build_tiny_model(Path(folder), tiny)), chunk=1)
    ours.chunk = chunk_rows(ours.hf.config.vocab_size, on_gpu=False)
    shape = model_shape(ours.hf)
    assert shape is not None
    lengths = [row.length] * row.samples

    def run() -> float:
        started = time.process_time()
        packed_pass(ours, PROMPT, lengths, row.micro_batch_tokens)
        return time.process_time() - started

    packed_pass(ours, 8, [16], row.micro_batch_tokens)
    held = _peak()
    seconds = min(run() for _ in range(REPEATS))
    return {
        "params": float(sum(p.numel() for p in ours.parameters())),
        "cpu_s": seconds,
        "flops": 3 * forward_flops(shape, lengths, [n - PROMPT for n in lengths]),
        "activations_mib": (_peak() - held) / MIB,
    }


def _peak() -> float:
    """Resident bytes at the most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(TABLES[sys.argv[2]][1][sys.argv[3]])))
        return
    for name in sys.argv[1:] or TABLES:
        _print(name)


def _print(name: str) -> None:
    title, rows = TABLES[name]
    table = Table(
        "", "M parameters", "tokens", "CPU seconds", "GFLOP", "GFLOP/s", "peak MiB over the model", "KiB a token",
        "s/FLOP, first row = 1", title=title,
    )  # fmt: skip
    first = 0.0
    for label, row in rows.items():
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.growth", "--one", name, label]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise SystemExit(f"{label} failed:\n{done.stdout}{done.stderr}")
        r = json.loads(done.stdout.splitlines()[-1])
        tokens = row.length * row.samples
        first = first or r["cpu_s"] / r["flops"]
        table.add_row(
            label,
            f"{r['params'] / 1e6:.1f}",
            f"{tokens:,}",
            f"{r['cpu_s']:.2f}",
            f"{r['flops'] / 1e9:,.0f}",
            f"{r['flops'] / r['cpu_s'] / 1e9:.0f}",
            f"{r['activations_mib']:,.0f}",
            f"{r['activations_mib'] * 1024 / tokens:.0f}",
            f"{r['cpu_s'] / r['flops'] / first:.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
