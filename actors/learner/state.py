"""A learner rank's state: copied into memory between two steps, written while training goes on, and read back.

hold    all ranks together: copies in CPU memory of what this rank has; training may go on
write   each rank by itself, in a thread of its own
load    all ranks together, of any number, at any ZeRO stage
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.learner import zero_state
from actors.learner.build import LearnerSpec
from actors.zero import gathered
from grpo_ray.errors import CheckpointError
from grpo_ray.models.lora import adapter_tensors, write_adapter
from grpo_ray.models.multimodal import name_in_whole, whole_of
from grpo_ray.models.multimodal_export import write_whole
from grpo_ray.models.named_weights import buckets, named_weights
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.learner_files import HeldModel, SavedLearner, write_rank
from grpo_ray.run.manifest import FileSum

BUCKET_BYTES = 256 << 20
_STATE_BYTES = 12
"""The bytes of one parameter's fp32 master and two moments."""


@dataclass(frozen=True)
class Export:
    """The policy as a Hugging Face model, on rank 0."""

    hf: Any
    weights: dict[str, Tensor]
    adapter: dict[str, Tensor]


@dataclass(frozen=True)
class LearnerSnapshot:
    """A rank's part of a checkpoint, in CPU memory."""

    models: dict[str, HeldModel]
    random_state: dict[str, Tensor]
    export: Export | None


def hold_engine(engine: Any) -> HeldModel:
    """A copy of this rank's part of a trained model."""
    schedule = int(engine.lr_scheduler.last_epoch)
    return HeldModel(list(zero_state.fragments(engine)), zero_state.num_steps(engine), schedule)


def hold_export(engine: Any, spec: LearnerSpec) -> Export | None:
    """The model to export, gathered by all ranks together; None except on rank 0."""
    weights = gather(engine.module.hf)
    adapter = gather_adapter(engine) if spec.model.lora else {}
    return Export(engine.module.hf, weights, adapter) if dist.get_rank() == 0 else None


def hold_random_state() -> dict[str, Tensor]:
    """The random states; a generator whose state can't be kept is seeded anew, and its seed is kept."""
    seed = random.getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    state = {"torch": torch.get_rng_state(), "seed": torch.tensor([seed])}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def write(
    held: LearnerSnapshot, spec: LearnerSpec, place: CheckpointLocation, rank: int, num_ranks: int
) -> dict[str, FileSum]:
    """Write this rank's part, durable on the disk when this returns; no other rank is waited for.

    Raises:
        CheckpointError: the write failed. The caller has to remove the place.
    """
    with _writing(place):
        sums = write_rank(place, rank, num_ranks, held.models, held.random_state, _facts(spec))
        if held.export is not None:
            with place.filling("hf") as (folder, of_export):
                _write_export(held.export, spec, folder)
            sums |= of_export
    return sums


def _write_export(export: Export, spec: LearnerSpec, folder: Path) -> None:
    """Write a Hugging Face model in the model's dtype, with tokenizer; a text model as the multimodal checkpoint that it was taken
    from. Adapters are merged in, and also written by themselves (`lora/`)."""
    from grpo_ray.loop.stops import name_turn_end
    from grpo_ray.models.files.loading import load_tokenizer

    tokenizer = load_tokenizer(spec.model_path, trust_remote_code=spec.model.trust_remote_code)
    name_turn_end(export.hf, tokenizer)
    whole = whole_of(export.hf)
    if whole is None:
        export.hf.save_pretrained(folder, state_dict=export.weights)
    else:
        write_whole(whole, export.weights, spec.model_path, folder, spec.dtype)
        export.hf.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if spec.model.lora:
        write_adapter(export.adapter, spec.model.lora, spec.model_path, folder / "lora")


def check_saved(saved: SavedLearner, spec: LearnerSpec, place: CheckpointLocation) -> None:
    """Raise CheckpointError when another kind of learner saved it. Ranks, ZeRO stage and dtype may differ."""
    here = _facts(spec)
    if saved.facts != here:
        wrong = ", ".join(
            f"{k} {here[k]} instead of {saved.facts.get(k)}" for k in here if here[k] != saved.facts.get(k)
        )
        raise CheckpointError(f"{place.url} was saved by another kind of learner: this one has {wrong}; set them back")


def load_engine(engine: Any, saved: SavedLearner, model: str) -> None:
    """Restore what `hold_engine` copied: bitwise on the same ranks and stage, else up to the order of later sums.

    Raises:
        CheckpointError: the model is not in the checkpoint, or is another one.
    """
    if not saved.has(model):
        raise CheckpointError(
            f"{saved.files.place.url} holds no {model}: it was saved with another algorithm.advantage; set that back"
        )
    zero_state.restore(engine, saved.reader(model), saved.num_steps(model))
    _set_schedule(engine, saved.num_scheduled(model))


def load_random_state(saved: SavedLearner, rank: int) -> None:
    """Restore the rank's random states; a rank that the checkpoint does not have keeps the seed that it has started with."""
    state = saved.random_state(rank)
    if state is None:
        return
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    random.seed(int(state["seed"]))
    np.random.seed(int(state["seed"]))


def _set_schedule(engine: Any, num_steps: int) -> None:
    """Set the schedule to this step: the learning rate is a function of the step alone."""
    schedule = engine.lr_scheduler
    schedule.last_epoch, schedule._step_count = num_steps, num_steps + 1
    rates = [base * rate(num_steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def gather(hf: nn.Module) -> dict[str, Tensor]:
    """All weights in CPU memory of rank 0, adapters merged in, under Hugging Face names; empty on the other ranks."""
    params = {id(p) for p in hf.parameters()}
    buffers = {name_in_whole(hf, n): t for n, t in hf.state_dict(keep_vars=True).items() if id(t) not in params}
    out = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in buffers.items() if dist.get_rank() == 0}
    for bucket in buckets(named_weights(hf), BUCKET_BYTES):
        with gathered([p for w in bucket for p in w.parts]):
            if dist.get_rank() == 0:
                out |= {w.name: w.value().to("cpu", copy=True).contiguous() for w in bucket}
    return out


def gather_adapter(engine: Any) -> dict[str, Tensor]:
    """The adapters alone, in CPU memory of rank 0, under peft's names; empty on the other ranks. All ranks together."""
    tensors = adapter_tensors(engine.module.hf)
    with gathered(list(tensors.values())):
        first = dist.get_rank() == 0
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in tensors.items() if first}


def _facts(spec: LearnerSpec) -> dict[str, Any]:
    # How rollout engines get the adapters is not part of what is saved.
    return {"model.lora": spec.model.lora.model_dump(mode="json", exclude={"transfer"}) if spec.model.lora else None}


def check_room(engine: Any, spec: LearnerSpec, place: CheckpointLocation) -> None:
    """Make all ranks agree that there is room before anything is copied or written.

    Raises:
        CheckpointError: on all ranks alike.
    """
    trained = sum(torch.Size(shape).numel() for shape in zero_state.shapes(engine).values())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    copies = 1 + spec.saves_reference
    needed = trained * _STATE_BYTES + whole * copies * spec.dtype.itemsize
    folder = Path(place.url)
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
def _writing(place: CheckpointLocation) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        # The store's client may raise anything; safetensors reports a full disk as an error of its own.
        folder = Path(place.url)
        free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB free" if folder.is_dir() else "the folder is gone"
        what = (str(e) or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"can't write the checkpoint in {place.url} ({free}): {what}") from e
