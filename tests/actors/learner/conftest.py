"""Fixtures that more than one test file of the actors needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from actors.learner.group import LearnerGroup


@pytest.fixture
def groups() -> Iterator[list[LearnerGroup]]:
    """What a test starts and puts here is ended, whatever happens."""
    started: list[LearnerGroup] = []
    yield started
    for group in started:
        asyncio.run(group.close())
