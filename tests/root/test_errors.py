"""One line of an error, whoever raised it, and what was meant by a name that there is not."""

from __future__ import annotations

import pytest

from grpo_ray.errors import first_line, kind_and_line, told
from grpo_ray.suggest import closest, did_you_mean


@pytest.mark.parametrize(
    ("error", "line", "with_kind", "library"),
    [
        (ValueError("no digits"), "no digits", "ValueError: no digits", "no digits"),
        (OSError("\n  disk gone  \nat byte 7"), "disk gone", "OSError: disk gone", "disk gone"),
        (
            RuntimeError("2 errors:\nthe first\nthe second"),
            "2 errors:",
            "RuntimeError: 2 errors:",
            "2 errors: the first",
        ),
        (TimeoutError(), "TimeoutError", "TimeoutError", "TimeoutError"),
        (KeyError("a\nb"), "'a\\nb'", "KeyError: 'a\\nb'", "'a\\nb'"),
    ],
)
def test_an_error_is_one_line_and_never_an_empty_one(error: Exception, line: str, with_kind: str, library: str) -> None:
    assert (first_line(error), kind_and_line(error), told(error)) == (line, with_kind, library)


def test_what_was_meant_is_the_name_that_is_spelt_most_alike() -> None:
    assert closest("smoek", ["chat", "smoke", "smokes"]) == "smoke"
    assert closest("r1", ["chat", "smoke"]) is None
    assert did_you_mean("smoek", ["chat", "smoke"]) == "did you mean smoke?"
    assert (
        did_you_mean("smoek", ["chat", "smoke"], show=repr, then="there are 2") == "did you mean 'smoke'? there are 2"
    )
    assert did_you_mean("smoek", ["smoke", "smokes", "chat"], count=3) == "did you mean smoke, smokes?"
    assert did_you_mean("r1", ["chat"], "there is chat") == "there is chat"
    assert did_you_mean("r1", ["chat"], then="there is chat") == "there is chat"
