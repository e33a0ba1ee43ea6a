"""Programs of others that run in ours end: a model's chat template, or a file with one, that loops without end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.data import templates
from grpo_ray.data.templates import make_template
from grpo_ray.errors import DataError
from grpo_ray.models.files.loading import load_tokenizer
from grpo_ray.time_limit import WATCH, TooLongError, within_thread_s

LOOPS = [
    "{% set r = range(99999) | list %}" + "{% for a in r %}" * 4 + "{% endfor %}" * 4,
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for a in range(9) %}{{ f(n + 1) if n < 90 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 0.2)


@pytest.mark.parametrize("text", LOOPS)
@pytest.mark.parametrize("kind", ["tokenizer", "file"])
@pytest.mark.usefixtures("limit")
def test_a_template_that_does_not_end_is_ended_and_named(
    kind: str, text: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(text)
    tokenizer: Any = load_tokenizer(str(tiny_model), trust_remote_code=False)
    tokenizer.chat_template = text
    name = "chat" if kind == "tokenizer" else str(tmp_path / "t.jinja")
    where = str(tiny_model) if kind == "tokenizer" else "t.jinja"
    with pytest.raises(DataError, match=rf"{where}.* takes more than .* processor time for one prompt.*data\.template"):
        make_template(name, tokenizer)("hi", {})


@pytest.mark.parametrize(
    "text", ["{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"]
)
def test_a_file_that_no_template_can_be_made_of_is_named(text: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(DataError, match=r"t\.jinja"):
        make_template(str(tmp_path / "t.jinja"), load_tokenizer(str(tiny_model), trust_remote_code=False))


def spin(_n: int = 0) -> None:
    while True:
        pass


def test_a_late_call_is_ended_in_any_thread_and_others_go_on() -> None:
    with pytest.raises(TooLongError):
        within_thread_s(0.05, spin)
    with ThreadPoolExecutor(3) as pool:
        late = pool.submit(within_thread_s, 0.05, spin)
        in_time = [pool.submit(within_thread_s, 60, lambda n=n: sum(range(n))) for n in (10, 100_000)]
        assert [f.result(60) for f in in_time] == [45, 4999950000]
        assert isinstance(late.exception(60), TooLongError)


def test_what_a_call_returns_and_raises_is_its_own_and_nothing_comes_later() -> None:
    assert within_thread_s(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        within_thread_s(60, lambda: dict[str, int]()["a"])
    for _ in range(20):
        with contextlib.suppress(TooLongError):
            within_thread_s(0.001, lambda: sum(range(2_000_000)))
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass


def test_what_handles_the_end_of_a_call_is_not_ended_in_its_turn() -> None:
    def spend(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    ended: list[str] = []

    def late() -> None:
        try:
            spin()
        except BaseException:
            spend(0.4)
            ended.append("handled")
            raise

    with pytest.raises(TooLongError):
        within_thread_s(0.05, late)
    assert ended == ["handled"]


def test_a_fork_has_a_watch_of_its_own_and_the_watch_ends_when_there_is_nothing_to_see() -> None:
    with pytest.raises(TooLongError):
        within_thread_s(0.05, spin)
    child = os.fork()
    if child == 0:
        try:
            within_thread_s(0.05, spin)
        except TooLongError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    give_up = time.monotonic() + 60
    while any(thread.name == WATCH for thread in threading.enumerate()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
