"""The commands on the runs of a cluster, and what they start there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import Address, ClusterRun, Overrides


def submit(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe's name or a .yaml file; with --resume the name of a run there"),
    ],
    overrides: Overrides = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Follow the run to its end; Ctrl-C then leaves it running")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run on the cluster from its newest checkpoint")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Files or folders not to ship, * allowed")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Files or folders to ship that git does not track and the recipe does not name"
        ),
    ] = None,
) -> None:
    """Train on a running Ray cluster: ships what git tracks of this folder and what the recipe names, starts the run there and
    follows it. The run outlives this terminal."""
    from launch.cluster.submit import submit as run

    run(recipe, overrides or [], address, exclude or [], include or [], wait=wait, resume=resume)


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run, with the last it said")] = None,
    address: Address = None,
) -> None:
    """The runs of a cluster."""
    from launch.cluster.submit import status as show

    show(run, address)


def logs(run: ClusterRun, address: Address = None) -> None:
    """Follow a run on a cluster, from its beginning to its end. Ctrl-C leaves it running."""
    from launch.cluster.submit import logs as show

    show(run, address)


def stop(
    run: ClusterRun,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="At once, from the checkpoint that there is")] = False,
) -> None:
    """End a run on a cluster after the step under way, with a checkpoint that `submit --resume` goes on from."""
    from launch.cluster.submit import stop as end

    end(run, address, now=now)


def scale(
    run: ClusterRun,
    workers: Annotated[
        list[str],
        typer.Argument(
            metavar="ROLE=NUMBER...", help="rollout=N, reward=N, environment=N, learner=N, or several of them"
        ),
    ],
    address: Address = None,
) -> None:
    """Change the number of a run's workers while it goes on. Reward workers come and go at once; samplers join with the next
    weights and leave when they have finished what they sample; learners change after the step under way."""
    from launch.cluster.submit import scale as change

    change(run, workers, address)


job = typer.Typer(hidden=True, help="What runs inside the cluster; `submit`, `logs`, `stop` and `scale` start it.")


@job.command(name="run")
def job_run(recipe: Path) -> None:
    from launch.cluster.in_cluster import run_recipe

    run_recipe(recipe)


@job.command(name="resume")
def job_resume(run: str, overrides: Overrides = None) -> None:
    from launch.cluster.in_cluster import resume

    resume(run, overrides or [])


@job.command(name="stop")
def job_stop(run: str, now: Annotated[bool, typer.Option("--now")] = False) -> None:
    from launch.cluster.in_cluster import stop

    stop(run, now=now)


@job.command(name="scale")
def job_scale(run: str, workers: list[str]) -> None:
    from launch.cluster.in_cluster import scale

    scale(run, workers)


@job.command(name="attach")
def job_attach(run: str) -> None:
    from launch.cluster.in_cluster import attach

    attach(run)
