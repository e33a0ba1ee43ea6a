"""The work of the commands: create or open a run's folder, run it, report the result."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from grpo_ray.config.loading import to_yaml
from grpo_ray.config.places import with_places
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import CheckpointError, ConfigError, WorkerError
from grpo_ray.names import run_name
from grpo_ray.object_store import check_store
from grpo_ray.run.ended import Ended, finished, read_ended
from grpo_ray.run.eval_record import FOLDER, new_record, step_of
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.records import step_to_resume
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import EndEvent
from launch.console import plain_console
from launch.interrupts import leaving
from launch.named_clusters import confirm_cluster
from launch.program import runnable
from launch.run.code_folder import use_code_of
from launch.run.effects import check_effects, tell_of_hub
from launch.run.foreign_code import check_code
from launch.run.left import left_of, left_of_samples, owned, remove_if_nothing_happened
from launch.run.placement import settled
from launch.run.preflight import preflight
from launch.run.recipe import COMMANDS, SCHEMAS, kind_of, load_recipe, load_run_config, run_folder, with_own
from launch.run.resumed import about_schedule, changed_config, check_changes, check_length, record_changes

console = plain_console(soft_wrap=True)
SIGNAL_EXITS = {"SIGINT": 130, "SIGTERM": 143, "stopped": 143, "preempted": 143}
ASKED_S = 5.0
"""The time limit for a store that may hold nothing beyond the run's folder."""


def start_grpo(recipe: str, overrides: list[str], *, shipped: bool = False) -> Path:
    """Start a run of `grpo-ray train`; returns its folder.

    Args:
        shipped: the current folder is a copy that a cluster made for this run, so nothing is recorded by its path.
    """
    return _start("grpo", recipe, overrides, shipped)


def start_sft(recipe: str, overrides: list[str], *, shipped: bool = False) -> Path:
    return _start("sft", recipe, overrides, shipped)


def start_dpo(recipe: str, overrides: list[str], *, shipped: bool = False) -> Path:
    return _start("dpo", recipe, overrides, shipped)


def start_reward_model(recipe: str, overrides: list[str], *, shipped: bool = False) -> Path:
    return _start("reward_model", recipe, overrides, shipped)


def _start(kind: str, recipe: str, overrides: list[str], shipped: bool) -> Path:
    config = load_recipe(SCHEMAS[kind], recipe, overrides)
    folder = run_folder(config, recipe)
    confirm_cluster(config.cluster.address, overrides)
    command = shlex.join(["grpo-ray", COMMANDS[kind], recipe, *overrides])
    run = RunDir(folder).with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
    with owned(folder):
        made = RunDir.create(folder)
        preflight(config)
        check_effects(config, COMMANDS[kind], overrides)
        check_store_of(run)
        config = settled(config, kind)
        with leaving(lambda: left_of(run, command), lambda: remove_if_nothing_happened(run)):
            if run.steps():
                raise ConfigError(
                    f"{run.store.url} holds checkpoints of another run of this name; choose another with name=..., or remove them"
                )
            try:
                write_config(made, config, shipped=shipped)
                _finish(run, _run(kind, config, run, None))
            except BaseException:
                remove_if_nothing_happened(run)
                raise
    return folder


def start_sample(recipe: str, overrides: list[str]) -> Path:
    """Start new samples, or the rest of those that a run of this name has begun."""
    config = load_recipe(RunConfig, recipe, overrides)
    confirm_cluster(config.cluster.address, overrides)
    check_effects(config, "sample", overrides)
    folder = run_folder(config, recipe)
    command = shlex.join(["grpo-ray", "sample", recipe, *overrides])
    with owned(folder):
        if RunDir(folder).samples.is_dir():
            run = RunDir.open(folder)
            console.print(f"going on with {run.path}")
        else:
            preflight(config, trains=False)
            config = settled(config, "sample")
            run = RunDir.create(folder)
            write_config(run, config)
            run.samples.mkdir()
        with leaving(lambda: left_of_samples(run, command)):
            _finish_samples(run, _run("sample", config, run, None))
    return folder


def _finish_samples(run: RunDir, end: EndEvent) -> None:
    console.print(f"samples  {run.samples}")
    if end.status != "finished":
        console.print(runnable(f"go on    grpo-ray resume {run.path}"))
    exit_unless_finished(end)


def resume_run(path: Path, overrides: Sequence[str] = ()) -> None:
    """Resume a run from its newest checkpoint.

    Args:
        overrides: options that change from here on, see `launch.run.resumed`.
    """
    run = RunDir.open(path)
    with owned(path):
        _resume(run, overrides)


def _resume(run: RunDir, overrides: Sequence[str]) -> None:
    if run.samples.is_dir():
        if overrides:
            raise ConfigError(f"{overrides[0]}: samples are made as they were begun; leave the overrides out")
        of_samples = load_run_config(RunConfig, run.config)
        use_code_of(of_samples)
        check_code(of_samples, trains=False)
        with leaving(lambda: left_of_samples(run, f"grpo-ray resume {run.path}")):
            _finish_samples(run, _run("sample", of_samples, run, None))
        return
    kind = kind_of(run.config)
    old = load_run_config(SCHEMAS[kind], run.config)
    config, changes = changed_config(SCHEMAS[kind], run, list(overrides)) if overrides else (old, {})
    use_code_of(config)
    check_code(config)
    run = run.with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
    if changes:
        check_changes(config, kind, changes)
        check_length(run, config, run.newest_step())
    asked = replace(run, patience_s=min(run.patience_s, ASKED_S))
    if (ended := finished(asked, config)) is not None:
        _tell_finished(asked, ended)
        return
    confirm_cluster(config.cluster.address, overrides)
    tell_of_hub(config)
    step = step_to_resume(run, lambda text: console.print(f"warning: {text}", style="yellow"))
    if changes:
        record_changes(run, config, changes, step or 0)
    for text in (
        *(f"{key}: {was} -> {now}" for key, (was, now) in changes.items()),
        about_schedule(old, config, step or 0),
    ):
        if text is not None:
            console.print(text, markup=False)
    console.print(
        f"resuming {run.path} "
        + (
            f"after step {step}"
            if step is not None
            else "from its beginning: it has no checkpoint yet, and has recorded no step"
        )
    )
    with leaving(lambda: left_of(run, f"grpo-ray resume {run.path}")):
        _finish(run, _run(kind, config, run, step))


def _tell_finished(run: RunDir, ended: Ended) -> None:
    """Report a finished run; raises WorkerError for one that had failed: it has no step left to do, but is not a success."""
    console.print(f"finished {run.path} has done all of its {ended.total_steps} steps")
    _tell_model(run)
    longer = "num_steps" if ended.length[0] is not None else "num_epochs"
    console.print(runnable(f"go on    grpo-ray resume {run.path} {longer}=N trains it longer"))
    if ended.status == "failed":
        raise WorkerError(ended.text)


def replay_step(path: Path, step: int) -> None:
    from grpo_ray.run.replay import check_replayable

    run = RunDir.open(path)
    if (kind := kind_of(run.config)) != "grpo":
        raise ConfigError(
            f"{path} is a run of `grpo-ray {COMMANDS[kind]}`: it records no batches; only steps of `grpo-ray train` can be replayed"
        )
    config = load_run_config(RunConfig, run.config)
    use_code_of(config)
    run = run.with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
    check_replayable(run, step)
    start = f"its checkpoint of step {step - 1}" if step > 1 else "the starting model"
    console.print(f"replaying step {step} of {run.path} from {start}")
    with leaving(f"nothing of {run.path} is changed; the same command replays step {step} again"):
        exit_unless_finished(_run("replay", config, run, step - 1))


def evaluate_target(target: str, overrides: list[str]) -> None:
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        run = RunDir.open(folder)
        if (kind := kind_of(run.config)) != "grpo":
            raise ConfigError(
                f"{target} is a run of `grpo-ray {COMMANDS[kind]}`: it has no rewards to measure by; evaluate its "
                f"model with a recipe: grpo-ray eval RECIPE model.path={target}/hf"
            )
        if not run.exported.is_dir():
            raise ConfigError(
                f"{target} has no exported model here (hf/ comes with its first checkpoint, or lies with it in checkpoint.path; "
                "evaluate a copy of that with model.path=)"
            )
        config = load_recipe(
            RunConfig, str(run.config), with_own([f"model.path={run.exported.resolve()}", "model.tiny=null"], overrides)
        )
    else:
        config = load_recipe(RunConfig, target, overrides)
    if config.data.eval is None:
        raise ConfigError(f"{target} has no data.eval to measure on; add data.eval.path=...")
    confirm_cluster(config.cluster.address, overrides)
    preflight(config, trains=False)
    check_effects(config, "eval", overrides)
    config = settled(config, "eval")
    record = new_record(*_record_place(folder, config, overrides), config)
    with leaving(f"nothing was measured to its end; what there is lies in {record}; the same command begins again"):
        end = _run("eval", config, RunDir(record), None)
    console.print(f"record   {record}")
    exit_unless_finished(end)


def _record_place(target: Path, config: RunConfig, overrides: list[str]) -> tuple[Path, str]:
    """The folder and the name of the record of an evaluation: with the step, where a checkpoint is evaluated."""
    run = target if (target / "config.yaml").is_file() else None
    moved = any(item.partition("=")[0].strip() == "dir" for item in overrides)
    parent = Path(config.dir) if run is None or moved else run
    model = Path(config.model.path) if config.model.path else None
    step = step_of(model) if model else None
    title = run_name(target.resolve()) if run is not None else re.sub(r"[^A-Za-z0-9_.-]", "-", target.stem)
    return parent / FOLDER, title if step is None else f"{title}-step-{step:06d}"


def _run(kind: str, config: RunConfig | SftConfig, run: RunDir, resume_step: int | None) -> EndEvent:
    confirm_cluster(config.cluster.address)
    from launch.run.follow import run_and_follow

    return run_and_follow(kind, config, run.path, resume_step)


def _finish(run: RunDir, end: EndEvent) -> None:
    if end.status != "finished" and not run.metrics.exists() and not run.has_some():
        exit_unless_finished(end)
    try:
        console.print(f"report   {make_report(run)}")
    except OSError as e:
        console.print(runnable(f"report   not written: {e}; `grpo-ray report {run.path}` writes it"))
    if end.status == "finished" or not run.store.is_remote:
        _tell_model(run)
    ended = read_ended(run.path)
    if end.status != "finished" and run.has_some() and (ended is None or ended.step < ended.total_steps):
        console.print(runnable(f"go on    grpo-ray resume {run.path}"))
    exit_unless_finished(end)


def _tell_model(run: RunDir) -> None:
    if run.exported.is_dir():
        console.print(f"model    {run.exported}")
    elif run.store.is_remote:
        _print_remote_model(run)


def check_store_of(run: RunDir) -> None:
    """As `check_store`; it does nothing where checkpoints are in a folder."""
    if run.store.is_remote:
        check_store(run.store.url, run.patience_s)


def _print_remote_model(run: RunDir) -> None:
    try:
        steps = run.store.steps()
    except CheckpointError as e:
        console.print(f"model    in {run.store.url}; {e}")
        return
    if steps:
        console.print(f"model    {run.store.place(steps[-1]).path('hf')}")


def make_report(run: RunDir) -> Path:
    """The path of a run's `report.html`, written from its ledger."""
    from grpo_ray.report.page import write_report

    if not run.ledger.is_file():
        return write_report(run.path)
    ledger = Ledger(run.ledger)
    try:
        return write_report(run.path, asdict(ledger.summary()))
    finally:
        ledger.close()


def exit_unless_finished(end: EndEvent) -> None:
    """Raise WorkerError for a run that failed, SystemExit with the signal's code for one that was stopped."""
    if end.status == "failed":
        raise WorkerError(end.text)
    if end.status != "finished":
        raise SystemExit(SIGNAL_EXITS.get(end.status, 1))


def write_config(run: RunDir, config: RunConfig | SftConfig, *, shipped: bool = False) -> None:
    run.config.write_text(to_yaml(config if shipped else with_places(config, Path.cwd())), encoding="utf-8")
