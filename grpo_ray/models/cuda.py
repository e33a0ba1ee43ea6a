"""Whether torch can compute on this machine's GPUs, and why not."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from grpo_ray.errors import first_line

DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST = {12: 525, 13: 580}
"""CUDA's major version -> the oldest driver that runs it."""


def driver_version(path: Path = DRIVER) -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; None: it has none."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)*)\b", path.read_text())
    except OSError:
        return None
    return found and found[1]


def why_no_cuda() -> str | None:
    """Why torch can't use a GPU here, with what to do, as the sentence continues after `and`; None: it can."""
    if torch.cuda.is_available():
        return None
    build, driver = f"torch {torch.__version__}", driver_version()
    if torch.version.cuda is None:
        return (
            f"{build} is built without CUDA; install the GPU packages on this node, in a folder without .venv: "
            "GRPO_RAY_GPU=yes make"
        )
    if driver is None:
        return f"this node has no NVIDIA driver ({DRIVER} is not there); start the container with its GPUs, or install the driver"
    oldest = _OLDEST.get(int(torch.version.cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < oldest:
        return (
            f"the NVIDIA driver of this node is {driver}; {build} is built for CUDA {torch.version.cuda}, which needs driver "
            f"{oldest} or newer: update it"
        )
    return f"{build} can't use it under driver {driver}: {_error()}"


def _error() -> str:
    try:
        torch.cuda.init()
    except Exception as e:
        return first_line(e)
    return "it finds no device"
