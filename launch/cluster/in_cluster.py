"""The part of `submit`, `stop`, `scale` and `logs` that runs on the cluster's head: the commands of Ray jobs, `python -m launch
job ...`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from actors.addresses import read_address
from actors.cluster import CONTROLLER, NAMESPACE, controller_name, join
from actors.deaths import is_lost
from grpo_ray.config.loading import load_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError, GrpoRayError, ResourceError, WorkerError
from grpo_ray.names import check_name
from grpo_ray.plain_terminal import say
from launch.run.recipe import kind_of

END_S = 60.0
"""How long `stop --now` waits for a run to end by itself before its controller is killed."""
ANSWER_S = 60.0


def home() -> Path:
    """The folder of a cluster's runs, which all its nodes see."""
    return Path(os.environ.get("GRPO_RAY_HOME") or Path.home())


def run_recipe(recipe: Path) -> None:
    """Run a recipe that `submit` has resolved: it has a name."""
    from launch.run.jobs import start_dpo, start_grpo, start_reward_model, start_sft

    folder = home() / Path(str(load_yaml(recipe).get("dir", RunConfig.model_fields["dir"].default))).expanduser()
    start = {"grpo": start_grpo, "sft": start_sft, "dpo": start_dpo, "reward_model": start_reward_model}[
        kind_of(recipe)
    ]
    start(str(recipe), [f"dir={folder}"], shipped=True)


def resume(run: str, overrides: list[str]) -> None:
    from launch.run.jobs import resume_run

    resume_run(home() / (run if "/" in run else f"{SftConfig.model_fields['dir'].default}/{run}"), overrides)


def stop(run: str, *, now: bool) -> None:
    import ray

    controller = find_controller(run)
    try:
        ray.get(controller.stop.remote("stopped", now), timeout=ANSWER_S)
        if not now:
            say(f"{run} ends after the step under way, with a checkpoint")
            return
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            if _is_gone(run):
                break
            time.sleep(0.5)
        else:
            ray.kill(controller)
        say(f"{run} has ended; its newest checkpoint is where it can be resumed from")
    except ray.exceptions.GetTimeoutError:
        if not now:
            raise WorkerError(
                f"the controller of {run} did not answer for {ANSWER_S:g} s; `grpo-ray stop {run} --now` kills it"
            ) from None
        ray.kill(controller)
        say(f"the controller of {run} did not answer and was killed")
    except ray.exceptions.RayError as e:
        if not is_lost(e):
            raise
        say(f"{run} has ended")
    finally:
        ray.shutdown()


def scale(run: str, words: list[str]) -> None:
    import ray

    controller = find_controller(run)
    try:
        say(f"{run}: {ray.get(controller.scale.remote(words), timeout=ANSWER_S)}")
    except ray.exceptions.GetTimeoutError:
        raise WorkerError(
            f"{run} has not answered for {ANSWER_S:g} s: it waits for the cluster to grow, for deadlines.resources_s at most; "
            f"`grpo-ray logs {run}` tells what becomes of it"
        ) from None
    except ray.exceptions.RayTaskError as e:
        raise e.cause if isinstance(e.cause, GrpoRayError) else e from None
    except ray.exceptions.RayError as e:
        if not is_lost(e):
            raise
        raise ConfigError(f"{run} has ended") from None
    finally:
        ray.shutdown()


def attach(run: str) -> None:
    """Print everything that a run has reported, and what it reports until its end."""
    import ray

    from launch.run.follow import follow_events
    from launch.run.jobs import exit_unless_finished
    from launch.run.live import LiveView

    controller = find_controller(run)
    try:
        with LiveView() as view:
            exit_unless_finished(follow_events(controller, view, Path(run)))
    finally:
        ray.shutdown()


def find_controller(run: str) -> Any:
    """The controller of a run; joins the cluster around this process. Raises ConfigError when no such run is in progress on it."""
    import ray

    check_name(run, "the run's name")
    address = read_address(None)
    if address is None:
        raise ResourceError("this command runs inside a Ray job: use grpo-ray submit, logs or stop")
    join(address)
    try:
        return ray.get_actor(controller_name(run), namespace=NAMESPACE)
    except ValueError:
        raise ConfigError(no_such_run(run, live_runs())) from None


def live_runs() -> list[str]:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    names = [a["name"] for a in named if a["namespace"] == NAMESPACE and a["name"].endswith(CONTROLLER)]
    return sorted(n.removesuffix(CONTROLLER) for n in names)


def no_such_run(run: str, others: list[str]) -> str:
    return f"no run named {run} is under way on the cluster; " + (
        f"there are {', '.join(others)}" if others else "there is none at all"
    )


def _is_gone(run: str) -> bool:
    return run not in live_runs()
