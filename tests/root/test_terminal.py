"""Text of others on a terminal: file names, columns, prompts, what models wrote, logs and errors of other machines."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from rich.text import Text

from grpo_ray.data.sources import progress
from grpo_ray.plain_terminal import CleanStream, clean, one_line
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import EndEvent, MessageEvent
from grpo_ray.terminal import PlainConsole
from launch.check.command import check_recipe
from launch.cli import _tell_error
from launch.cluster import submit
from launch.console import headed
from launch.pipeline.decontaminate import decontaminate, source_of
from launch.run.jobs import make_report, replay_step, resume_run
from launch.run.live import LiveView
from tests.cpu_time import cpu_below
from tests.recipes import RL

ROOT = Path(__file__).parents[2]
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
ATTACKS = [
    CLIPBOARD,
    "\x1b]52;c;cm0gLXJmIH4=\x1b\\",
    "\x9d52;c;cm0gLXJmIH4=\x9c",
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x1b[31m",
    "\x1bP1$q\x1b\\",
    "\x1b_Ga=T\x1b\\",
    "\x1bc",
    "\x1b(0",
    "\x07\x08\x08\x08",
    "\x0e\x0f\x0b\x0c\x7f\x00\x84\x85",
    "safe\rEVIL",
    "\u202egnp.exe\u202c",
    "\u2066x\u2069\u061c\u200e\u200f",
    "\u2028\u2029\ufeff\u200b",
    "\U000e0041\U000e0042",
    "\x1b",
    "\x1b]52;c;unfinished",
    "\x1b\x1b[2J]52;c;x\x07",
]
NEVER = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_control_character_is_left_of_a_text_and_all_else_is(attack: str) -> None:
    text = f"before\t[b]é 漢字 👩\u200d🔬[/b]\n{attack}\nafter\n"
    plain = clean(text)
    assert NEVER.search(plain) is None
    assert plain.startswith("before\t[b]é 漢字 👩\u200d🔬[/b]\n")
    assert plain.endswith("after\n")
    assert clean(plain) == plain
    assert "\n" not in one_line(text)
    for cut in range(len(attack) + 1):
        assert NEVER.search(clean(attack[:cut]) + clean(attack[cut:])) is None


def test_a_line_that_would_overwrite_another_begins_a_new_one() -> None:
    assert clean("accuracy 10%\raccuracy 99%\r\nnext") == "accuracy 10%\naccuracy 99%\nnext"


def test_long_texts_are_cleaned_in_time_that_grows_with_them() -> None:
    for piece in ("\x1b]", "\x1b[", "\x1b[0;", "\x1bP", "\x9d", "\x1b", "\r"):
        with cpu_below(10, piece):
            clean(piece * 50_000)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_console_passes_on_its_own_colours_alone(attack: str, terminal: bool) -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=60, force_terminal=terminal, color_system="standard" if terminal else None)
    table = Table(title=attack)
    table.add_column(attack)
    table.add_row(attack, Text(attack, style="link http://evil"))
    linked = Text.from_ansi(attack)
    for what in (attack, headed(attack, "bold red", attack), table, linked, Text(attack, style="link http://evil")):
        console.print(what)
    with LiveView(12, Path(f"runs/{one_line(attack)}"), console=console) as view:
        view.handle(MessageEvent("error", attack))
        view.handle(EndEvent("stopped", attack))
    text = re.sub(r"\x1b\[[0-9;?]*[mhlAKG]|\r(?=\x1b\[2K|\n|$)", "", out.getvalue()) if terminal else out.getvalue()
    text = text.replace("\r", "") if terminal else text
    assert NEVER.search(text) is None
    assert "http://evil" not in text.replace("]8;;http://evil", "")


def test_prints_logging_warnings_and_errors_of_a_process_are_clean() -> None:
    code = (
        "import logging, sys, warnings\n"
        "from grpo_ray.plain_terminal import clean_streams\n"
        "clean_streams(); clean_streams()\n"
        f"attack = {CLIPBOARD!r}\n"
        "print('printed', attack); print('printed', attack, file=sys.stderr)\n"
        "logging.basicConfig(); logging.getLogger('math_verify.grader').error('logged %s', attack)\n"
        "warnings.warn('warned ' + attack)\n"
        "sys.stdout.write('[b]bold[/b]\\n'); sys.stdout.writelines(['lines', attack])\n"
        "from rich.console import Console; Console().print('by rich', attack)\n"
        "raise ValueError('raised password=hunter2secret ' + attack)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    for text in (done.stdout.decode(), done.stderr.decode()):
        assert NEVER.search(text) is None
    assert [word in done.stderr.decode() for word in ("printed", "logged", "warned", "raised")] == [True] * 4
    assert "hunter2secret" not in done.stderr.decode().splitlines()[-1]
    assert "[b]bold[/b]" in done.stdout.decode()


def test_a_clean_stream_is_a_stream() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    stream = CleanStream(raw)
    print("a\x1b[2Jé", file=stream, end="", flush=True)
    assert raw.buffer.getvalue() == b"a\\xe9"
    assert (stream.encoding, stream.errors, stream.isatty(), stream.writable()) == (
        "ascii",
        "backslashreplace",
        False,
        True,
    )
    assert stream.buffer is raw.buffer
    logging.StreamHandler(stream)
    warnings.resetwarnings()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": f"1 + 1 {CLIPBOARD}[link=http://evil]x[/b]", "answer": f"2{CLIPBOARD}", CLIPBOARD: 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RL))
    run = RunDir(tmp_path / "run")
    for step in (1, 2):
        place = run.store.begin(step)
        with place.filling("loop") as (folder, sums):
            (folder / "loop.json").write_text("{}")
        run.store.commit(place, step, sums, keep=None)
        manifest = Path(run.place(step).url) / "manifest.json"
        content = json.loads(manifest.read_text())
        content["files"][f"hf/{CLIPBOARD}"] = {"size": 1, "sha256": "0" * 64}
        manifest.write_text(json.dumps(content))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**RL, "name": "x", "num_steps": 9}))
    (tmp_path / "run" / "messages.jsonl").write_text(json.dumps({"text": CLIPBOARD}) + "\n")
    return tmp_path


class _Strangers:
    """What another machine answers, as far as `status` and `logs` ask it."""

    address = f"http://x{CLIPBOARD}"

    def runs(self) -> list[Any]:
        from launch.cluster.dashboard import ClusterRun

        return [ClusterRun(f"x{CLIPBOARD}", f"running{CLIPBOARD}", f"job{CLIPBOARD}", message=CLIPBOARD)]

    def find(self, name: str) -> Any:
        from dataclasses import replace

        return replace(self.runs()[0], state="finished")

    def log(self, job_id: str) -> str:
        return f"last words {CLIPBOARD}[link=http://evil]x[/b]\n"

    def follow(self, job_id: str, tell: Callable[[str], None]) -> None:
        for character in self.log(job_id):
            tell(character)


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "check": lambda here: check_recipe("recipe.yaml", []),
    "check of a column": lambda here: check_recipe("recipe.yaml", [f"data.train.columns={{answer: 'x{CLIPBOARD}'}}"]),
    "resume": lambda here: resume_run(here / "run", []),
    "report": lambda here: print(make_report(RunDir(here / "run"))),
    "replay": lambda here: replay_step(here / "run", 3),
    "decontaminate": lambda here: decontaminate(
        source_of("rows.jsonl", None, None, "train"), [source_of("test.jsonl", None, None, "test")], None, None, 2, None
    ),
    "status": lambda here: submit.status(None, None),
    "status of a run": lambda here: submit.status("x", None),
    "logs": lambda here: submit.logs("x", None),
    "eval": lambda here: _tell_error(f"{here}/x{CLIPBOARD}/config.yaml: [link=http://evil]x[/b]"),
    "sample": lambda here: _bar(here),
}


def _bar(here: Path) -> None:
    with progress(f"reading x{CLIPBOARD}[/b]", 10_000) as advance:
        advance(10_000)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_pass_on_nothing_that_a_terminal_obeys(
    command: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "Cluster", lambda address: _Strangers())
    monkeypatch.setattr(sys, "stdout", CleanStream(sys.stdout))
    monkeypatch.setattr(sys, "stderr", CleanStream(sys.stderr))
    try:
        COMMANDS[command](here)
    except (Exception, SystemExit) as e:
        _tell_error(str(e))
    out, err = capsys.readouterr()
    assert NEVER.search(out + err) is None
    assert (out + err).strip() or command == "sample"


@pytest.mark.parametrize("words", [["resume", "run"]])
def test_a_command_at_a_real_terminal_sets_no_clipboard(words: list[str], here: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    said = b""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([master], [], [], 1)[0]:
            try:
                said += os.read(master, 1 << 16)
            except OSError:
                break
        elif process.poll() is not None:
            break
    process.wait(timeout=60)
    os.close(master)
    assert said.strip()
    assert b"\x1b]" not in said
    assert b"\x07" not in said
