"""`make bench-loading`: host memory while learners load a model under ZeRO-3, each rank all of it, and shard by shard.

    python -m tests.bench.loading [--ranks 4] [--stored bfloat16] [--dtype bfloat16]

Real ranks over gloo on CPUs. Memory is the sum of the ranks' proportional shares (PSS) beyond what they have after their imports,
every 50 ms: what they own themselves, and beside it pages of the model's files, which the kernel takes back whenever it likes. On
CPUs the partitions, once the model, lie in the same memory; on GPUs they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20
TIMEOUT_S = 900
WAYS = {"shards": "shard by shard", "whole": "all of it on each rank"}
SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "num_layers": 24,
    "num_heads": 14,
    "num_kv_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
}
"""Qwen2.5-0.5B's: 494 million parameters, 0.92 GiB in bf16."""


@dataclass(frozen=True)
class Memory:
    """Bytes of all ranks together."""

    own: int
    files: int


@dataclass(frozen=True)
class Measured:
    model: int
    """The bytes of the model's files."""
    loading: Memory
    """The peak until each rank has its part of the model."""
    built: Memory
    """The peak until DeepSpeed has its masters too."""
    seconds: float
    digest: str
    """A checksum of the masters of all ranks."""


def make_model(folder: Path, stored: str, **shape: Any) -> Path:
    """A model of random weights in Hugging Face's layout, its tensors in the dtype `stored`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import make_tokenizer, tiny_shape

    tiny = TinyModelConfig(**shape)
    torch.manual_seed(1)
    dtype = getattr(torch, stored)
    config = Qwen2Config(**tiny_shape(tiny), tie_word_embeddings=True, dtype=dtype)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    state = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).mul_(0.02).to(dtype)
        for i, (n, p) in enumerate(model.named_parameters())
    }
    model.save_pretrained(folder, state_dict=state)
    make_tokenizer(tiny).save_pretrained(folder)
    return folder


def measure(folder: Path, way: str, *, ranks: int, dtype: str, stage: int = 3) -> Measured:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as meeting:
        command = [sys.executable, "-m", "tests.bench.loading", "--rank-of", str(folder), "--way", way]
        command += ["--dtype", dtype, "--stage", str(stage), "--meeting", meeting]
        children = [
            subprocess.Popen(
                command, env=env | {"RANK": str(r)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for r in range(ranks)
        ]
        try:
            return _watch(children, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
        finally:
            for child in children:
                child.kill()
                child.wait()


def _watch(children: list[subprocess.Popen[str]], model: int) -> Measured:
    _all_say(children, "ready")
    pids = [child.pid for child in children]
    base, samples, done = _memory(pids), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            samples.append(_memory(pids))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        started = time.monotonic()
        _go_on(children)
        _all_say(children, "loaded")
        seconds = time.monotonic() - started
        # They wait, so that this is seen however busy the machine is.
        samples.append(_memory(pids))
        number = len(samples)
        _go_on(children)
        digests = _all_say(children, "built")
    finally:
        done.set()
        thread.join()

    def peak(found: list[Memory]) -> Memory:
        largest = max(found, key=lambda m: m.own)
        return Memory(largest.own - base.own, max(m.files for m in found) - base.files)

    return Measured(model, peak(samples[:number]), peak(samples), seconds, "-".join(digests))


def _go_on(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()


def _all_say(children: list[subprocess.Popen[str]], word: str) -> list[str]:
    """What follows the word in the line of each child that begins with it."""
    found = []
    for child in children:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(word):
                found.append(line.removeprefix(word).strip())
                break
        else:
            raise RuntimeError(f"a rank ended before it was {word}")
    return found


def _memory(pids: list[int]) -> Memory:
    own = files = 0
    for pid in pids:
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        own += sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) << 10
        files += int(fields["Pss_File"].split()[0]) << 10
    return Memory(own, files)


def be_rank(folder: str, way: str, dtype: str, stage: int, meeting: str) -> None:
    """One rank: it loads when it is told to."""
    import hashlib

    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from actors.learner import build, zero_state
    from actors.learner.group import _spec
    from grpo_ray.batch.sequence import Alone
    from tests.recipes import run_config

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{meeting}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = run_config(
        f"model={{path: {folder}, tiny: null, dtype: {dtype}}}",
        f"learner={{num_actors: {ranks}, zero_stage: {stage}}}",
        "prompts_per_step=8",
    )
    spec = _spec(config, folder, folder, has_gpus=False, num_steps=1)
    load = build.load_hf

    def told(*args: Any, **kwargs: Any) -> Any:
        hf = load(*args, **kwargs)
        dist.barrier()
        print("loaded", flush=True)
        sys.stdin.readline()
        return hf

    build.load_hf = told
    if way == "whole":
        build.can_shard = lambda spec: False
        build.stored_dtype = lambda path: torch.float32
    print("ready", flush=True)
    sys.stdin.readline()
    engine = build.build_engine(spec, torch.device("cpu"), Alone())
    masters = hashlib.sha256()
    for piece in zero_state._pieces(engine, share=True):
        masters.update(piece.name.encode())
        masters.update(piece.of(piece.flat).numpy().tobytes())
    for name, buffer in engine.module.named_buffers():
        masters.update(name.encode() + str(buffer.dtype).encode() + buffer.float().numpy().tobytes())
    print("built", masters.hexdigest()[:16], flush=True)
    # Measured until nobody is left to say that it is built.
    sys.stdin.readline()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stored", default="bfloat16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--rank-of")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--meeting")
    options = parser.parse_args()
    if options.rank_of:
        be_rank(options.rank_of, options.way, options.dtype, options.stage, options.meeting)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", options.stored, **SHAPE)
        found = {}
        for way in WAYS:
            found[way] = measure(model, way, ranks=options.ranks, dtype=options.dtype)
            print(way, json.dumps(asdict(found[way])), flush=True)
    table = Table(title=f"ZeRO-3, {options.ranks} ranks, {options.stored} in the files, {options.dtype} computed in")
    for column in (
        "",
        "times the model",
        "loading: own",
        "with file pages",
        "built: own",
        "with file pages",
        "seconds",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for way, m in found.items():
        cells = [f"{n / MIB:,.0f} MiB" for p in (m.loading, m.built) for n in (p.own, p.own + p.files)]
        table.add_row(WAYS[way], f"{m.loading.own / m.model:.2f}", *cells, f"{m.seconds:.1f}")
    size = next(iter(found.values())).model
    Console(width=140).print(table, f"the model's files: {size / MIB:,.0f} MiB; masters and buffers are ", end="")
    print("the same bit for bit" if len({m.digest for m in found.values()}) == 1 else "DIFFERENT")


if __name__ == "__main__":
    main()
