from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.runs import end_all


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    end_all()
