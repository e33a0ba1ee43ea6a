"""`submit`, `status`, `logs`, `scale` and `stop`: runs on a cluster, seen from outside."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from grpo_ray.config.loading import check_secrets, parse_overrides
from grpo_ray.config.scaling import SCALED, parse_counts
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError, WorkerError
from grpo_ray.names import check_name
from grpo_ray.plain_terminal import clean
from grpo_ray.telemetry.metrics import duration
from launch import interrupts
from launch.cluster.dashboard import COMMAND_S, STOPPED_EXITS, Cluster, ClusterRun
from launch.cluster.package import stage, told
from launch.cluster.shipped import named_by
from launch.console import plain_console
from launch.run.placement import open_yaml
from launch.run.recipe import SCHEMAS, SHIPPED, find_recipe, kind_of, load_recipe, run_folder

LAST_LINES = 5
"""The number of a run's last lines in its status."""
console = plain_console(soft_wrap=True)


def submit(
    recipe: str,
    overrides: list[str],
    address: str | None,
    exclude: list[str],
    include: Sequence[str] = (),
    *,
    wait: bool,
    resume: bool,
) -> None:
    if resume:
        # Are they overrides without secrets, which the job's command would show? The cluster checks whether the run takes them.
        check_secrets(parse_overrides(overrides), f"submit --resume {recipe}")
    config = None if resume else _resolve(recipe, overrides)
    name = check_name(Path(recipe).name if config is None else str(config.name))
    cluster = Cluster(address)
    if any(run.name == name and run.is_live for run in cluster.runs()):
        raise ConfigError(
            f"a run named {name} is under way on this cluster: `grpo-ray logs {name}` shows it; or choose another with name=..."
        )
    with interrupts.scratch_folder() as scratch:
        named = [*([] if config is None else named_by(config, Path.cwd()))]
        found = stage(Path.cwd(), scratch, exclude, named=named, include=include)
        for line in told(found):
            console.print(line)
        if config is not None:
            (scratch / SHIPPED).write_text(open_yaml(config), encoding="utf-8")
        words = ["resume", recipe, *overrides] if config is None else ["run", SHIPPED]
        again = f" --address {cluster.address}" if address else ""
        with interrupts.leaving(f"{name} may have been submitted: grpo-ray status {name}{again} says whether it was"):
            job = cluster.submit(name, words, str(scratch))
    console.print(
        f"submitted {name} as job {job} ({found.size / 1e6:.1f} MB of this folder); see it again: grpo-ray logs {name}{again}"
    )
    if wait:
        _follow(cluster, ClusterRun(name, "waiting", job), again)


def _resolve(recipe: str, overrides: list[str]) -> RunConfig | SftConfig:
    """The resolved config. Everything wrong with the recipe by itself is reported here, before anything is shipped."""
    config = load_recipe(SCHEMAS[kind_of(find_recipe(recipe), overrides)], recipe, overrides, keep_home=True)
    on_cluster = config.cluster.model_copy(update={"address": None, "num_cpus": None})
    return config.model_copy(update={"name": run_folder(config, recipe).name, "cluster": on_cluster})


def status(run: str | None, address: str | None) -> None:
    cluster = Cluster(address)
    if run is None:
        runs = cluster.runs()
        if not runs:
            console.print(f"no runs on {cluster.address}")
        else:
            console.print(_table(runs))
        return
    found = cluster.find(run)
    console.print(_table([found]))
    if found.job_id is not None:
        lines = cluster.log(found.job_id).splitlines()
        console.print("\n".join(lines[-LAST_LINES:]))


def logs(run: str, address: str | None) -> None:
    cluster = Cluster(address)
    _follow(cluster, cluster.find(run), f" --address {cluster.address}" if address else "")


def stop(run: str, address: str | None, *, now: bool) -> None:
    cluster = Cluster(address)
    found = cluster.find(run)
    if not found.is_live:
        raise ConfigError(f"{run} is not under way: it is {found.state}")
    with interrupts.leaving(f"{run} may have been told to stop: grpo-ray status {run} says what becomes of it"):
        cluster.command(["stop", run, *(["--now"] if now else [])], found, _tell, COMMAND_S)


def scale(run: str, words: list[str], address: str | None) -> None:
    parse_counts(words)
    cluster = Cluster(address)
    found = cluster.find(run)
    if not found.is_live:
        raise ConfigError(f"{run} is not under way: it is {found.state}")
    with interrupts.leaving(f"{run} may have been told to scale: grpo-ray status {run} says how many workers it has"):
        cluster.command(["scale", run, *words], found, _tell, COMMAND_S)


def _follow(cluster: Cluster, run: ClusterRun, again: str) -> None:
    """Follow a run to its end. Raises WorkerError for one that failed, SystemExit with a signal's code for one that was stopped."""
    try:
        with interrupts.as_exceptions():
            if run.job_id is not None:
                cluster.follow(run.job_id, _tell)
            now = cluster.find(run.name)
            if now.state == "running alone" or now.job_id is None:
                cluster.command(["attach", run.name], now, _tell)
                return
    except KeyboardInterrupt:
        console.print(
            f"\n{run.name} goes on without this window: grpo-ray logs {run.name}{again} shows it, grpo-ray stop {run.name}{again} "
            "ends it"
        )
        raise SystemExit(130) from None
    if now.state == "stopped":
        raise SystemExit(now.exit_code if now.exit_code in STOPPED_EXITS else STOPPED_EXITS[-1])
    if now.state != "finished":
        raise WorkerError(
            f"{run.name} {now.state} on the cluster: {now.message.strip().splitlines()[0] if now.message else '?'}"
        )


def _tell(text: str) -> None:
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def _table(runs: list[ClusterRun]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "started", "took", *SCALED, "job"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started)) if run.started else "-"
        took = duration((run.ended or time.time()) - run.started) if run.started else "-"
        workers = (str(run.workers.get(role, "-")) for role in SCALED)
        table.add_row(run.name, run.state, started, took, *workers, run.job_id or "-")
    return table
