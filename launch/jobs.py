"""What the commands do: make or open a run's folder, run it, say what came of it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from grpo_ray.checkpoint import RunDir
from grpo_ray.checkpoint_store import is_url
from grpo_ray.config import DpoConfig, RewardModelConfig, RunConfig, SftConfig
from grpo_ray.config_files import to_yaml
from grpo_ray.errors import ConfigError, WorkerError
from grpo_ray.events import EndEvent
from grpo_ray.ledger import Ledger
from grpo_ray.records import step_to_resume
from launch.effects import check_effects
from launch.recipe import COMMANDS, SCHEMAS, kind_of, load_recipe, load_run_config, run_folder, with_own

console = Console(highlight=False, soft_wrap=True)
SIGNAL_EXITS = {"SIGINT": 130, "SIGTERM": 143, "stopped": 143, "preempted": 143}


def start_grpo(recipe: str, overrides: list[str]) -> Path:
    config = load_recipe(RunConfig, recipe, overrides)
    return _start("grpo", config, run_folder(config, recipe), overrides)


def start_sft(recipe: str, overrides: list[str]) -> Path:
    config = load_recipe(SftConfig, recipe, overrides)
    return _start("sft", config, run_folder(config, recipe), overrides)


def start_dpo(recipe: str, overrides: list[str]) -> Path:
    config = load_recipe(DpoConfig, recipe, overrides)
    return _start("dpo", config, run_folder(config, recipe), overrides)


def start_reward_model(recipe: str, overrides: list[str]) -> Path:
    config = load_recipe(RewardModelConfig, recipe, overrides)
    return _start("reward_model", config, run_folder(config, recipe), overrides)


def _start(kind: str, config: RunConfig | SftConfig, folder: Path, overrides: list[str]) -> Path:
    from launch.check import preflight

    preflight(config)
    check_effects(config, COMMANDS[kind], overrides)
    run = RunDir.create(folder).with_checkpoints(config.checkpoint.path)
    if run.steps():
        raise ConfigError(
            f"{run.store.url} holds checkpoints of another run of this name; choose another with name=..., or remove them"
        )
    try:
        write_config(run, config)
        _finish(run, _run(kind, config, run, None))
    except BaseException:
        _remove_if_nothing_happened(run)
        raise
    return folder


def start_sample(recipe: str, overrides: list[str]) -> Path:
    """New samples, or the rest of those that a run of this name has begun."""
    config = load_recipe(RunConfig, recipe, overrides)
    check_effects(config, "sample", overrides)
    folder = run_folder(config, recipe)
    if RunDir(folder).samples.is_dir():
        run = RunDir.open(folder)
        console.print(f"going on with {run.path}")
    else:
        from launch.check import preflight

        preflight(config)
        run = RunDir.create(folder)
        write_config(run, config)
        run.samples.mkdir()
    _finish_samples(run, _run("sample", config, run, None))
    return folder


def _finish_samples(run: RunDir, end: EndEvent) -> None:
    console.print(f"samples  {run.samples}")
    if end.status != "finished":
        console.print(f"go on    grpo-ray resume {run.path}")
    exit_unless_finished(end)


def resume_run(path: Path) -> None:
    run = RunDir.open(path)
    if run.samples.is_dir():
        _finish_samples(run, _run("sample", load_run_config(RunConfig, run.config), run, None))
        return
    kind = kind_of(run.config)
    config = load_run_config(SCHEMAS[kind], run.config)
    run = run.with_checkpoints(config.checkpoint.path)
    step = step_to_resume(run, lambda text: console.print(f"warning: {text}", style="yellow"))
    console.print(
        f"resuming {run.path} "
        + (
            f"after step {step}"
            if step is not None
            else "from its beginning: it has no checkpoint yet, and has recorded no step"
        )
    )
    _finish(run, _run(kind, config, run, step))


def replay_step(path: Path, step: int) -> None:
    from grpo_ray.replay import check_replayable

    run = RunDir.open(path)
    if (kind := kind_of(run.config)) != "grpo":
        raise ConfigError(
            f"{path} is a run of `grpo-ray {COMMANDS[kind]}`: it records no batches; only steps of `grpo-ray train` can be replayed"
        )
    config = load_run_config(RunConfig, run.config)
    run = run.with_checkpoints(config.checkpoint.path)
    check_replayable(run, step)
    start = f"its checkpoint of step {step - 1}" if step > 1 else "the starting model"
    console.print(f"replaying step {step} of {run.path} from {start}")
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
            RunConfig, str(run.config), with_own([f"model.path={run.exported}", "model.tiny=null"], overrides)
        )
    else:
        config = load_recipe(RunConfig, target, overrides)
    if config.data.eval is None:
        raise ConfigError(f"{target} has no data.eval to measure on; add data.eval.path=...")
    from launch.check import preflight

    preflight(config)
    check_effects(config, "eval", overrides)
    scratch = Path(config.dir) / ".eval"
    scratch.mkdir(parents=True, exist_ok=True)
    exit_unless_finished(_run("eval", config, RunDir(scratch), None))


def _run(kind: str, config: RunConfig | SftConfig, run: RunDir, resume_step: int | None) -> EndEvent:
    from launch.follow import run_and_follow

    return run_and_follow(kind, config, run.path, resume_step)


def _finish(run: RunDir, end: EndEvent) -> None:
    try:
        console.print(f"report   {make_report(run)}")
    except OSError as e:
        console.print(f"report   not written: {e}; `grpo-ray report {run.path}` writes it")
    if run.exported.is_dir():
        console.print(f"model    {run.exported}")
    elif is_url(run.store.url) and any(run.steps()):
        console.print(f"model    {run.store.place(run.steps()[-1]).path('hf')}")
    if end.status != "finished" and run.steps():
        console.print(f"go on    grpo-ray resume {run.path}")
    exit_unless_finished(end)


def make_report(run: RunDir) -> Path:
    """`report.html` of a run, with what its ledger says."""
    from grpo_ray.report import write_report

    if not run.ledger.is_file():
        return write_report(run.path)
    ledger = Ledger(run.ledger)
    try:
        return write_report(run.path, asdict(ledger.summary()))
    finally:
        ledger.close()


def exit_unless_finished(end: EndEvent) -> None:
    """Raises WorkerError for a run that failed, SystemExit with the signal's code for one that was stopped."""
    if end.status == "failed":
        raise WorkerError(end.text)
    if end.status != "finished":
        raise SystemExit(SIGNAL_EXITS.get(end.status, 1))


def write_config(run: RunDir, config: RunConfig | SftConfig) -> None:
    run.config.write_text(to_yaml(config), encoding="utf-8")


def _remove_if_nothing_happened(run: RunDir) -> None:
    """A run that ended before its first step leaves its logs and nothing else: its name is free again."""
    if run.steps() or run.metrics.exists():
        return
    for entry in run.path.iterdir():
        if entry.name == RunDir.LOGS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
