from __future__ import annotations

import pytest

from actors.control.notices import Notice, handle_preemption


class Loop:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self, reason: str) -> None:
        self.asked.append(f"stop: {reason}")

    def checkpoint_soon(self) -> None:
        self.asked.append("checkpoint")


@pytest.mark.parametrize(
    ("own", "seconds", "asked", "told"),
    [
        (
            True,
            30.0,
            "stop: preempted",
            "is taken away in 30 s, and this run with it: it ends after the step under way",
        ),
        (False, 30.0, "checkpoint", "is taken away in 30 s: a checkpoint after the step under way"),
        (False, None, "checkpoint", "is taken away soon: a checkpoint"),
    ],
)
def test_a_run_ends_when_its_own_node_goes_and_saves_when_another_one_does(
    own: bool, seconds: float | None, asked: str, told: str
) -> None:
    loop = Loop()
    text = handle_preemption(Notice("0123456789abcdef", own, seconds), loop)
    assert loop.asked == [asked]
    assert text.startswith(f"node 0123456789ab {told}")
