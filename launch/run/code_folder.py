"""The code of a resumed run: it may resume in any folder, so the modules of its rewards and data are also looked for where it
began."""

from __future__ import annotations

import os
import sys

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.user_code.places import add_code_folder


def use_code_of(config: RunConfig | SftConfig) -> None:
    """Use the run's code folder in this process and in those that it starts."""
    folder = config.code_dir
    if folder is None or os.path.realpath(folder) == os.getcwd():
        return
    add_code_folder(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, known), folder])
