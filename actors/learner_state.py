"""A learner rank on disk: DeepSpeed's checkpoint with random state, and the export as a Hugging Face model.

DeepSpeed's files are pickles. They are only ever read back from the run's own directory; a model from elsewhere comes
in as safetensors.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.learner_engine import LearnerSpec
from grpo_ray.errors import CheckpointError
from grpo_ray.lora import adapter_tensors, write_adapter
from grpo_ray.named_weights import buckets, named_weights

_TAG = "deepspeed"
_FACTS = "learner.json"
BUCKET_BYTES = 256 << 20
_ADAM_BYTES = 12
"""fp32 master, momentum and variance of one parameter."""


def save(engine: Any, spec: LearnerSpec, folder: Path) -> None:
    """Write this rank's part into `folder`; all ranks together.

    Raises:
        CheckpointError: no room (then on every rank, and nothing was written), or the write failed. `folder` is
            the caller's to remove.
    """
    rank = dist.get_rank()
    _check_room(engine, spec, folder)
    with writing(folder):
        torch.save(_random_state(), folder / f"random-{rank}.pt")
        if rank == 0:
            (folder / _FACTS).write_text(json.dumps(_facts(spec)))
        engine.save_checkpoint(str(folder), tag=_TAG)


def load(engine: Any, spec: LearnerSpec, folder: Path) -> None:
    """Back to the state of `save`, bitwise.

    Raises:
        CheckpointError: no checkpoint there, or of another number of ranks, ZeRO stage or dtype.
    """
    try:
        saved = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder} holds no learner checkpoint ({e})") from None
    here = _facts(spec)
    if saved != here:
        wrong = ", ".join(f"{k} {here[k]} instead of {saved.get(k)}" for k in here if here[k] != saved.get(k))
        raise CheckpointError(f"{folder} was saved by another kind of learner: this one has {wrong}; set them back")
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed can't read its part; see the learner's log")
    state = torch.load(folder / f"random-{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.seed(state["seed"])
    np.random.seed(state["seed"])


def export(engine: Any, spec: LearnerSpec, folder: Path) -> None:
    """Write the policy as a Hugging Face model in the model's dtype, with tokenizer; all ranks together, rank 0 writes.
    Adapters are merged in, and also written by themselves (`lora/`).

    Raises:
        CheckpointError: the write failed.
    """
    lora = spec.model.lora
    weights = gather(engine.module.hf)
    adapter = gather_adapter(engine) if lora else {}
    if dist.get_rank() != 0:
        return
    from grpo_ray.models import load_tokenizer

    with writing(folder):
        engine.module.hf.save_pretrained(folder, state_dict=weights)
        load_tokenizer(spec.model_path, trust_remote_code=spec.model.trust_remote_code).save_pretrained(folder)
        if lora:
            write_adapter(adapter, lora, spec.model_path, folder / "lora")


def gather(hf: nn.Module) -> dict[str, torch.Tensor]:
    """All weights in CPU memory of rank 0, adapters merged in, under Hugging Face names; empty on the other ranks."""
    params = {id(p) for p in hf.parameters()}
    buffers = {n: t for n, t in hf.state_dict(keep_vars=True).items() if id(t) not in params}
    out = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in buffers.items() if dist.get_rank() == 0}
    for bucket in buckets(named_weights(hf), BUCKET_BYTES):
        with gathered([p for w in bucket for p in w.parts]):
            if dist.get_rank() == 0:
                out |= {w.name: w.value().to("cpu", copy=True).contiguous() for w in bucket}
    return out


def gather_adapter(engine: Any) -> dict[str, torch.Tensor]:
    """The adapters alone, in CPU memory of rank 0, under peft's names; empty on the other ranks. All ranks together."""
    tensors = adapter_tensors(engine.module.hf)
    with gathered(list(tensors.values())):
        first = dist.get_rank() == 0
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in tensors.items() if first}


def gathered(params: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
    """Whole parameters inside, whatever ZeRO-3 has split; all ranks together. `writer`: the rank whose changes all take over;
    None: nobody changes anything.
    """
    sharded = [p for p in params if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)


def _facts(spec: LearnerSpec) -> dict[str, Any]:
    return {
        "learner.num_actors": dist.get_world_size(),
        "learner.zero_stage": spec.learner.zero_stage,
        "model.dtype": spec.model.dtype,
        # How samplers get the adapters is no part of what is saved.
        "model.lora": spec.model.lora.model_dump(mode="json", exclude={"transfer"}) if spec.model.lora else None,
    }


def _random_state() -> dict[str, Any]:
    seed = random.getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "seed": seed}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _check_room(engine: Any, spec: LearnerSpec, folder: Path) -> None:
    """All ranks agree before anyone writes: a rank that fails alone would leave the others waiting for it."""
    num_params = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    copies = 1 + spec.saves_reference
    needed = num_params * (copies * spec.dtype.itemsize + _ADAM_BYTES)
    free = torch.tensor([shutil.disk_usage(folder).free if folder.is_dir() else -1], dtype=torch.int64)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if free.item() < 0:
        raise CheckpointError(
            f"the folder of the checkpoint, {folder}, is not there on every learner's node; is it shared?"
        )
    if free.item() < needed:
        raise CheckpointError(
            f"a checkpoint in {folder} takes about {needed / 2**30:.2f} GiB, and {free.item() / 2**30:.2f} GiB are "
            "free; make room, or lower checkpoint.keep"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:
        # torch reports a full disk as a RuntimeError of its zip writer.
        free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB free" if folder.is_dir() else "the folder is gone"
        raise CheckpointError(f"can't write the checkpoint in {folder} ({free}): {str(e).splitlines()[0]}") from e
