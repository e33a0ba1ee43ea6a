"""GPUs by name, and their memory.

8xh100   ->  eight GPUs, 79.6 GiB each
80GB     ->  as many as a run asks for, of any GPU that is sold as one of 80 GB
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from grpo_ray.errors import ConfigError
from grpo_ray.suggest import did_you_mean

GIB = 1 << 30
_MIB = {
    "a10": 23_028,
    "a100": 81_920,
    "a100-40gb": 40_960,
    "a30": 24_576,
    "a40": 46_068,
    "a6000": 49_140,
    "b200": 183_359,
    "b300": 275_040,
    "gh200": 97_871,
    "h100": 81_559,
    "h100-nvl": 95_830,
    "h20": 97_871,
    "h200": 143_771,
    "l4": 23_034,
    "l40": 46_068,
    "l40s": 46_068,
    "rtx-3090": 24_576,
    "rtx-4090": 24_564,
    "rtx-5090": 32_607,
    "rtx-6000-ada": 49_140,
    "rtx-pro-6000": 97_887,
    "t4": 15_360,
    "v100": 16_160,
    "v100-32gb": 32_510,
}
"""Name -> MiB, as nvidia-smi reports."""
_ALIASES = {
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
    "a100-80gb": "a100",
    "h100-80gb": "h100",
    "v100-16gb": "v100",
}
_WITHOUT_BF16 = {"t4", "v100", "v100-32gb"}
"""GPUs before Ampere."""
_SOLD = 0.99
"""The part of the memory by which a GPU is sold that programs can have."""
_NUMBER = re.compile(r"(\d+)\s*x\s*(.+)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""

    @property
    def has_bf16(self) -> bool:
        return self.name not in _WITHOUT_BF16


def parse_gpus(text: str) -> tuple[int | None, Gpu]:
    """The number of GPUs, None where it is not given, and their kind. Raises ConfigError: there is none of that name."""
    number: int | None = None
    name = text.strip()
    if (found := _NUMBER.fullmatch(name)) is not None:
        number, name = int(found[1]), found[2].strip()
    if number == 0:
        raise ConfigError(f"--gpu {text}: there have to be some; write 8xh100, or leave the number out")
    return number, _gpu(name)


def _gpu(name: str) -> Gpu:
    if (size := _SIZE.fullmatch(name)) is not None and float(size[1]) > 0:
        part = 1.0 if size[2].lower() == "gib" else _SOLD
        return Gpu(name, int(float(size[1]) * part * GIB))
    known = named_gpu(name)
    if known is None:
        names = sorted({*_MIB, *_ALIASES})
        hint = did_you_mean(_plain(name), names, then=f"known are {', '.join(names)}")
        raise ConfigError(f"--gpu {name}: no GPU of that name is known; {hint}; or give its memory, --gpu 80GB")
    return known


def named_gpu(name: str) -> Gpu | None:
    """The GPU of a name as people, NVIDIA's drivers or Ray's nodes have it (`H100`, `NVIDIA L4`, `A100-80G`)."""
    words = _plain(name)
    words = _ALIASES.get(words, words)
    return Gpu(words, _MIB[words] << 20) if words in _MIB else None


def smallest(names: Iterable[str]) -> Gpu | None:
    """The GPU with the least memory of several kinds; None where one is not known."""
    found = [named_gpu(name) for name in names]
    known = [gpu for gpu in found if gpu is not None]
    return min(known, key=lambda gpu: gpu.memory) if known and len(known) == len(found) else None


def _plain(name: str) -> str:
    words = re.split(r"[\s_-]+", name.lower())
    words = [re.sub(r"^(\d+)g$", r"\1gb", word) for word in words]
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "sxm", "sxm4", "sxm5", "hbm3"))
