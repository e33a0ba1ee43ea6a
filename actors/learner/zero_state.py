"""What a DeepSpeed engine trains, element by element, under any ZeRO stage: fp32 masters and Adam's two moments.

    stage 0     every rank has all of it, in torch's optimizer
    stage 1, 2  each group of parameters is one flat vector, of which a rank has an even part
    stage 3     of each parameter a rank has an even part; the parts are in flat vectors of sub-groups

Each is treated here as pieces: elements of a parameter at some offset of a tensor that the optimizer has state for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ray.errors import CheckpointError
from grpo_ray.run.fragments import Fragment, FragmentReader, even_part

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    name: str
    start: int
    """The offset of the piece in the flattened parameter."""
    numel: int
    flat: Any
    """The tensor that the optimizer treats as its parameter."""
    offset: int
    """The offset of the piece in it."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def shapes(engine: Any) -> dict[str, list[int]]:
    """Name -> shape of every parameter that is trained."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in _trained(engine)}


def num_steps(engine: Any) -> int:
    """The number of steps of the optimizer."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state), default=0)


@torch.no_grad()
def fragments(engine: Any) -> Iterator[Fragment]:
    """Copies in CPU memory of what this rank holds; at stage 0, where all hold everything, of its share."""
    state = engine.basic_optimizer.state
    for piece in _pieces(engine, share=True):
        values = {MASTER: piece.of(piece.flat)}
        for kind in MOMENTS:
            # Adam has no state before its first step.
            moment = state[piece.flat].get(kind) if piece.flat in state else None
            values[kind] = torch.zeros(piece.numel) if moment is None else piece.of(moment)
        yield Fragment(piece.name, piece.start, {k: v.to("cpu", torch.float32, copy=True) for k, v in values.items()})


@torch.no_grad()
def restore(engine: Any, saved: FragmentReader, num_steps: int) -> None:
    """Restore what `fragments` gave, of whatever ranks and stage; all ranks together.

    Raises:
        CheckpointError: the parameters are not those trained here.
    """
    for name, shape in shapes(engine).items():
        want = torch.Size(shape).numel()
        if (numel := saved.numel(name)) != want:
            raise CheckpointError(
                f"{name} has {want} elements here and {numel} in the checkpoint: it is of another model"
            )
    pieces = _pieces(engine, share=False)
    for flat in {id(p.flat): p.flat for p in pieces}.values():
        _prepare(engine.basic_optimizer.state[flat], flat, num_steps)
    for piece in pieces:
        state = engine.basic_optimizer.state[piece.flat]
        for kind, tensor in ((MASTER, piece.flat), *((kind, state[kind]) for kind in MOMENTS)):
            piece.of(tensor).copy_(saved.read(piece.name, kind, piece.start, piece.numel))
    _spread_masters(engine)


@torch.no_grad()
def set_masters(engine: Any, values: dict[str, Tensor]) -> None:
    """Set the fp32 masters of this rank's pieces at ZeRO-3. What the model computes with stays as it is.

    Args:
        values: name -> all values of the rank's piece of it.
    """
    if values:
        for piece in _pieces(engine, share=False):
            if piece.name in values:
                piece.of(piece.flat).copy_(values[piece.name])


def _prepare(state: dict[str, Any], flat: Any, num_steps: int) -> None:
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(flat.detach())
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    state["step"].fill_(num_steps)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _pieces(engine: Any, *, share: bool) -> list[_Piece]:
    """The pieces of this rank. `share`: of what all ranks have, only its even part."""
    optimizer, out = engine.optimizer, []
    pieces_of = _pieces_of(optimizer, share=share)
    for name, param in _trained(engine):
        piece = pieces_of(name, param)
        if piece is not None and piece.numel > 0:
            out.append(piece)
    return out


def _pieces_of(optimizer: Any, *, share: bool) -> Callable[[str, Any], _Piece | None]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return lambda name, param: _at_stage_3(optimizer, name, param)
    # DeepSpeed has two optimizers for stages 1 and 2.
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or getattr(
        optimizer, "fp32_groups_flat_partition", None
    )
    if flats:
        return lambda name, param: _at_stage_2(flats, name, param)
    return lambda name, param: _at_stage_0(name, param, share=share)


def _at_stage_3(optimizer: Any, name: str, param: Any) -> _Piece:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
    start = dist.get_rank() * size
    # The last partition is padded.
    return _Piece(name, start, min(size, param.ds_numel - start), optimizer.fp32_partitioned_groups_flat[group], offset)


def _at_stage_2(flats: list[Any], name: str, param: Any) -> _Piece | None:
    mapping = param._hp_mapping
    if mapping is None:
        return None
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Piece(name, source.start, source.numel, flats[mapping.param_group_index], target.start)


def _at_stage_0(name: str, param: Any, *, share: bool) -> _Piece:
    start, numel = even_part(param.numel(), dist.get_rank(), dist.get_world_size()) if share else (0, param.numel())
    return _Piece(name, start, numel, param, start)


def _spread_masters(engine: Any) -> None:
    """Copy the masters to the weights that the model computes with, on all ranks, as after a step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
