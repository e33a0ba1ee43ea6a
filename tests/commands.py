"""Commands in processes of their own, forked from one that has imported torch and Ray already: seconds less for each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

IMPORTED = [
    "torch",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "ray",
    "pyarrow.parquet",
    "pydantic",
    "rich.table",
]
"""What commands use and users wrote; our own modules are imported by each command, in its own environment."""
LIMIT_S = 600


def run_command(folder: Path, *args: str, env: dict[str, str]) -> CompletedProcess[str]:
    """What `grpo-ray ARGS` does, called in `folder` with this environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        process = context.Process(target=_command, args=(str(folder), args, env, str(out), str(err)))
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def _command(folder: str, args: tuple[str, ...], env: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["grpo-ray", *args]
    sys.path.insert(0, folder)
    from launch.cli import main

    main()
