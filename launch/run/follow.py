"""Following a run: start its controller, draw its events, pass signals on, report how it ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from actors.addresses import read_address
from actors.cluster import OnCluster, await_free, await_resources, connect, has_gpus, joins
from actors.control.colocated import check_colocated
from actors.deaths import KernelKills, fate, is_lost, killed_by_kernel, kind_of
from actors.placement_defaults import alone_options, used, with_options
from actors.runtime import log_tail
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ResourceError, WorkerError
from grpo_ray.rewards.columns import ColumnNeeds, column_needs
from grpo_ray.telemetry.events import EndEvent, PhaseEvent
from launch import interrupts
from launch.run.live import LiveView
from launch.run.placement import with_mend

POLL_S = 0.5
FREE_S = 20.0
"""How long a run waits for what ended runs still hold."""
SILENCE_S = 60.0
"""The time without an answer after which a controller is considered dead."""

KILL_S = 0.3
"""The wait from the order to kill a controller to its death, which another process carries out."""
WITHOUT_STEPS = ("eval", "sample")


def run_and_follow(kind: str, config: RunConfig | SftConfig, run_dir: Path, resume_step: int | None) -> EndEvent:
    """Join or start a cluster for one run, see `run_here`."""
    with (
        LiveView(run_dir=run_dir, began=time.monotonic(), no_steps=kind in WITHOUT_STEPS) as view,
        cluster_of(config, view),
    ):
        return run_here(kind, config, run_dir, resume_step, view)


@contextmanager
def cluster_of(config: OnCluster, view: LiveView | None = None) -> Iterator[None]:
    """The cluster, joined, or started on this machine and ended; what it is waiting for is reported."""
    tell = view.handle if view is not None else lambda _event: None
    address = read_address(config.cluster.address)
    where = f"joining {address}" if address is not None else "on this machine"
    tell(PhaseEvent("Ray", "importing it"))
    import ray

    tell(PhaseEvent("Ray", where))
    with interrupts.leaving(end=interrupts.end_descendants):
        with interrupts.kept():
            connect(config)
        try:
            yield
        finally:
            ray.shutdown()


def run_here(
    kind: str, config: RunConfig | SftConfig, run_dir: Path, resume_step: int | None, view: LiveView | None = None
) -> EndEvent:
    """Run `kind` (grpo, sft, eval, sample, replay) in a controller actor of the cluster that is joined, until it ends; its
    workers are gone then.

    On a cluster that was there before, the controller outlives this process if that is killed: the run goes on.

    Args:
        view: where the run is shown; None: a view of its own.

    Raises:
        GrpoRayError: the cluster is too small, or the controller died.
    """
    import asyncio

    import ray

    if view is None:
        with LiveView(run_dir=run_dir, no_steps=kind in WITHOUT_STEPS) as own:
            return run_here(kind, config, run_dir, resume_step, own)
    gpus = has_gpus()
    config = with_options(config, alone_options(config, kind, gpus=gpus))
    if isinstance(config, RunConfig):
        check_colocated(config, has_gpus=gpus)
    wanted = used(config, kind, gpus=gpus)
    view.handle(PhaseEvent("cluster", "waiting for what the workers ask for"))
    try:
        asyncio.run(await_resources(wanted, config.deadlines.resources_s))
    except ResourceError as e:
        raise with_mend(e, config, kind, run_dir) from None
    asyncio.run(await_free(wanted, FREE_S))
    from actors.control.controller_start import start_controller

    # Computed here, where the functions can be imported; the controller has the data.
    needs: Sequence[ColumnNeeds] = ()
    if isinstance(config, RunConfig) and kind != "replay":
        needs = column_needs(config.reward, environment=config.environment is not None)
    controller = start_controller(kind, config, run_dir, resume_step, needs=needs, detached=joins(config))
    try:
        with _signals_to(controller, view, joined=joins(config)):
            finished = controller.run.remote()
            view.handle(PhaseEvent("controller", "starting its process"))
            end = follow_events(controller, view, run_dir, config.deadlines.start_s)
            try:
                ray.get(finished, timeout=SILENCE_S)
            except ray.exceptions.RayError as e:
                # Everything is reported and written.
                if not is_lost(e):
                    raise
            return end
    finally:
        ray.kill(controller)


def follow_events(controller: Any, view: LiveView, run_dir: Path, start_s: float = SILENCE_S) -> EndEvent:
    """Draw a controller's events, from the first to the last.

    Args:
        start_s: the limit for its first answer: it imports torch before that, which a busy machine or a cold disk slows down.

    Raises:
        WorkerError: the controller died, or does not answer.
    """
    import ray

    seen, kernel, limit_s = 0, KernelKills(), start_s
    while True:
        try:
            events, seen = ray.get(controller.events.remote(seen, POLL_S), timeout=limit_s)
            limit_s = SILENCE_S
        except ray.exceptions.GetTimeoutError:
            raise WorkerError(
                f"the controller did not answer for {limit_s:g} s; `grpo-ray resume {run_dir}` goes on from its checkpoint"
            ) from None
        except ray.exceptions.RayError as e:
            if not is_lost(e):
                raise
            if kind_of(e) == "out of memory" or kernel.took_some():
                why = fate(e, "controller") if kind_of(e) == "out of memory" else killed_by_kernel("controller")
                raise WorkerError(f"the controller died: {why}\n`grpo-ray resume {run_dir}` goes on") from None
            raise WorkerError(
                f"the controller died ({e}); `grpo-ray resume {run_dir}` goes on.\n{log_tail(run_dir / 'logs' / 'controller.log')}"
            ) from None
        for event in events:
            view.handle(event)
            if isinstance(event, EndEvent):
                return event


@contextmanager
def _signals_to(controller: Any, view: LiveView, *, joined: bool) -> Iterator[None]:
    """Pass signals on. While steps run, the first SIGINT or SIGTERM asks to end after the one in progress; the second, and one at
    any other time, ends at once."""
    asked = False

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not view.in_steps:
            interrupts.end_now(number)
        asked = True
        name = signal.Signals(number).name
        controller.stop.remote(name)
        view.note(f"{name}: ending after this step, with a checkpoint (once more: end now)")

    def end() -> None:
        # What it has started is on other machines too, and ends with it.
        if joined:
            import ray

            ray.kill(controller)
            time.sleep(KILL_S)
        interrupts.end_descendants()

    with interrupts.leaving(end=end):
        old = {s: signal.signal(s, on_signal) for s in interrupts.SIGNALS}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
