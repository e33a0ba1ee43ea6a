"""A checkpoint loaded shard by shard under ZeRO-3: no rank ever holds all of the model.

    every rank   a skeleton: parameters of the right shape without memory
    rank 0       reads the files, in the dtype that they are in
    fill         parameter by parameter: DeepSpeed's partition of it is allocated, rank 0 scatters its values

So a node's host memory is that of the model once and its largest weight, however many ranks it has; each parameter is released
there once it is scattered. Values that the compute dtype rounds are kept by each rank for its own partition, for the fp32 masters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo_ray.errors import ConfigError
from grpo_ray.models.files.checkpoint_tensors import headers, weight_files

CHUNK = 4 << 20
"""The number of elements of each rank's partition that are scattered at once."""
_EXACT = "grpo_exact_piece"
_STORED = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Skeleton:
    """A model whose parameters have no memory yet, with the reader of its values on rank 0; all ranks together.

    Args:
        make: builds the model, here on torch's meta device.
        read: reads the whole model, in a dtype; called on rank 0 alone.
        stored: the dtype to read in, see `stored_dtype`.
    """

    def __init__(self, make: Callable[[], Any], read: Callable[[torch.dtype], Any], stored: torch.dtype) -> None:
        with torch.device("meta"):
            self.hf: Any = make()
        _hollow(self.hf)
        self._params = dict(self.hf.named_parameters())
        self._whole: Any = None
        fits = not _has_plain_tensors(self.hf)
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                whole, stored = _read(read, stored)
                fits = fits and _shapes(whole) == _shapes(self.hf)
                self._whole, self.hf.generation_config = whole, getattr(whole, "generation_config", None)
            # The other ranks wait for its answer.
            except Exception as e:
                error = e
        told = torch.tensor([fits, _STORED.index(stored), error is not None])
        dist.broadcast(told, 0)
        if told[2]:
            raise error or ConfigError("the learner's first rank can't load the model: see its error")
        self.fits = bool(told[0])
        """Whether the model read is made of the parameters and buffers of the skeleton; on all ranks alike."""
        self._stored = _STORED[int(told[1])]

    @torch.no_grad()
    def fill(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Give every parameter its partition, and every buffer its values.

        Args:
            config: DeepSpeed's settings.
            dtype: the compute dtype, which the partitions have.
            device: the device of whole parameters and of buffers.
        """
        import deepspeed

        # Given a module, here an empty one, it puts linear layers in place that do not keep gathered weights.
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
        held = {} if self._whole is None else dict(self._whole.named_parameters())
        for name, param in self._params.items():
            # Never touched as a whole: on CPUs its pages are not even allocated.
            param.data = torch.empty(param.shape, dtype=dtype, device=device)
            init._convert_to_deepspeed_param(param)
            param.partition()
            source = held.pop(name).data if held else None
            self._fill(param, source, device)
            if self._whole is not None:
                _release(self._whole, name)
        self._fill_buffers(device)
        self._whole = None

    def _fill_buffers(self, device: torch.device) -> None:
        found = {} if self._whole is None else dict(self._whole.named_buffers(remove_duplicate=False))
        for name, buffer in list(self.hf.named_buffers(remove_duplicate=False)):
            value = torch.empty(buffer.shape, dtype=buffer.dtype)
            if found:
                value.copy_(found[name])
            dist.broadcast(_bytes(value.reshape(-1)), 0)
            owner, _, last = name.rpartition(".")
            self.hf.get_submodule(owner)._buffers[last] = value.to(device)

    def _fill(self, param: Any, source: Tensor | None, device: torch.device) -> None:
        size = param.ds_tensor.ds_numel
        rounds = param.ds_tensor.dtype not in (self._stored, torch.float32) and param.requires_grad
        exact = torch.zeros(min(size, _own(param)), dtype=self._stored) if rounds else None
        for start in range(0, size, CHUNK):
            end = min(start + CHUNK, size)
            part = _scatter(source, size, start, end, self._stored, device)
            param.ds_tensor[start:end].copy_(part)
            if exact is not None and start < exact.numel():
                exact[start:end].copy_(part[: exact.numel() - start])
        if exact is not None:
            setattr(param, _EXACT, exact)


def _read(read: Callable[[torch.dtype], Any], stored: torch.dtype) -> tuple[Any, torch.dtype]:
    """The whole model in this dtype, or in the one that is returned, where its buffers would be rounded."""
    whole = read(stored)
    return (whole, stored) if exact_buffers(whole) else (read(torch.float32), torch.float32)


def exact_pieces(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the unrounded values of this rank's partition; they are handed over, not kept."""
    return {name: param.__dict__.pop(_EXACT) for name, param in model.named_parameters() if _EXACT in param.__dict__}


def own_piece(param: Any, whole: Tensor) -> Tensor:
    """Of all values of a parameter, those of this rank's partition. DeepSpeed's own way to set a master at ZeRO-3 takes only
    parameters that the ranks divide evenly."""
    start = dist.get_rank() * int(param.ds_tensor.ds_numel)
    return whole.reshape(-1)[start : start + _own(param)]


def stored_dtype(path: str) -> torch.dtype:
    """The dtype of all tensors of a checkpoint, to read it in without rounding; fp32 where they differ or are not known."""
    try:
        kinds = {kind for file in weight_files(path) for _, _, kind in headers(file)}
    except (OSError, SafetensorError):
        return torch.float32
    return _NAMES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _hollow(model: nn.Module) -> None:
    """Replace every parameter by one of zeros in fp32 that has a shape and takes no memory; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                empty = torch.zeros((), dtype=torch.float32).expand(param.shape)
                made[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
            module._parameters[name] = made[id(param)]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _has_plain_tensors(model: nn.Module) -> bool:
    """Whether a module keeps tensors beside its parameters and buffers, which then have no values."""
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def exact_buffers(model: nn.Module) -> bool:
    """Whether no buffer was made in less than fp32 because the model was."""
    return all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())


def _own(param: Any) -> int:
    """The number of elements of this rank's partition that are the parameter's, not padding."""
    size = int(param.ds_tensor.ds_numel)
    return max(0, min(size, int(param.ds_numel) - dist.get_rank() * size))


def _scatter(
    source: Tensor | None, size: int, start: int, end: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Elements `start` to `end` of this rank's partition; rank 0 has the whole parameter, whose partitions have `size` elements."""
    part = torch.empty(end - start, dtype=dtype, device=device)
    parts = None
    if source is not None:
        flat = source.reshape(-1)
        parts = [_bytes(_cut(flat, r * size + start, end - start, device)) for r in range(dist.get_world_size())]
    dist.scatter(_bytes(part), parts, src=0)
    return part


def _cut(flat: Tensor, start: int, num: int, device: torch.device) -> Tensor:
    """So many elements from `start`, with zeros after the end."""
    found = flat[start : start + num].to(device)
    if len(found) == num:
        return found
    return torch.cat([found, found.new_zeros(num - len(found))])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _release(model: nn.Module, name: str) -> None:
    owner, _, last = name.rpartition(".")
    param = model.get_submodule(owner)._parameters[last]
    assert param is not None
    param.data = param.data.new_empty(0)
