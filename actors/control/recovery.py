"""Recovery: learner ranks that are lost during a run are restarted from the newest checkpoint; everything else lives on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from actors.cluster import CONTROLLER_LOG
from actors.control.context import RunContext
from actors.control.workers import Workers
from actors.deaths import fate, kind_of, memory_wait_s
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import CheckpointError, GrpoRayError, LostSamplesError, NoMemoryError, WorkerError
from grpo_ray.run.records import last_step

START_AGAIN_S, LONGEST_WAIT_S = 2.0, 16.0
"""The wait between two starts of the learner, at first and at most."""


async def outlive_learners(
    context: RunContext,
    config: RunConfig | SftConfig,
    workers: Workers,
    train: Callable[[], Awaitable[str]],
    start_again: Callable[[], Awaitable[None]],
) -> str:
    """Run `train`, and run it again from the newest checkpoint whenever learner ranks, or samples with their node, were lost; at
    most `learner.max_restarts` times without a new step."""
    deaths, died_at = 0, -1
    while True:
        try:
            return await train()
        except Exception as e:
            step = context.step
            deaths = deaths + 1 if step <= died_at else 1
            lost_some = workers.lost_learner is not None or isinstance(first_typed(e), LostSamplesError)
            recoverable = lost_some and context.stop_reason is None
            too_often = deaths > config.learner.max_restarts
            short = isinstance(first_typed(e), NoMemoryError)
            if recoverable and too_often and short:
                raise NoMemoryError(
                    f"{error_message(e)}\nThat was {deaths} times without a step more (learner.max_restarts). Lower that in "
                    f"{context.run.config}, and `grpo-ray resume {context.run.path}` goes on"
                ) from None
            if not recoverable or too_often:
                raise
            died_at = max(step, died_at)
            lost = error_message(e)
        await _go_back(context, step, lost)
        await asyncio.sleep(memory_wait_s(deaths) if short else 0)
        await _start_learners(context, start_again, config.deadlines.start_s)


async def _go_back(context: RunContext, step: int, lost: str) -> None:
    """Go back to the newest checkpoint, or to the beginning of a run that has none yet."""
    told: list[str] = []
    had_one = context.resume_step is not None or await asyncio.to_thread(last_step, context.run) > 0
    context.resume_step = await asyncio.to_thread(context.run.latest_valid_step, told.append)
    if context.resume_step is None and had_one:
        raise CheckpointError(
            f"{lost}\nLearners can't start again: the checkpoints of this run, in {context.run.store.url}, are not there any "
            f"more. Put them back, then `grpo-ray resume {context.run.path}` goes on; nothing that is recorded was changed"
        )
    start = "the beginning" if context.resume_step is None else f"the checkpoint of step {context.resume_step}"
    for text in (
        *told,
        f"{lost}\nStep {step + 1} can't be done with what is left; learners start again from {start}",
    ):
        context.warn(text)


async def _start_learners(context: RunContext, start_again: Callable[[], Awaitable[None]], limit_s: float) -> None:
    """Start the learner. Ranks that die while they start are restarted with a growing wait, within `limit_s`: until Ray knows that
    a node is dead, it places new ones there."""
    give_up = time.monotonic() + limit_s
    wait_s = START_AGAIN_S
    while True:
        try:
            await start_again()
            return
        except WorkerError as e:
            if context.stop_reason is not None or time.monotonic() + wait_s > give_up:
                raise
            context.warn(f"{error_message(e)}\nLearners start again in {wait_s:g} s")
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def first_typed(error: BaseException) -> BaseException:
    """The first error with a message for users, inside the groups that asyncio wraps errors in; else the first of all."""
    if isinstance(error, BaseExceptionGroup):
        return first_typed(next((e for e in error.exceptions if isinstance(e, GrpoRayError)), error.exceptions[0]))
    return error


def error_message(error: BaseException) -> str:
    """The message of an error for the user."""
    error = first_typed(error)
    if isinstance(error, GrpoRayError):
        return str(error)
    if kind_of(error) == "out of memory":
        return f"the controller failed: {fate(error, CONTROLLER_LOG)}"
    return f"{type(error).__name__}: {error} (the traceback is in logs/{CONTROLLER_LOG}.log)"
