"""`grpo-ray pipeline`: the stages of a recipe one after the other, on one cluster, each freed before the next begins.

plan -> for each stage: inputs unchanged? -> run, or go on with it -> measure -> pipeline.json -> gate -> next
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grpo_ray.algorithm.users import check_users
from grpo_ray.config.base import Strict
from grpo_ray.config.loading import build, deep_merge, load_yaml, parse_overrides, to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.datagen.filters.config import MixConfig, PairsConfig, PromptsConfig
from grpo_ray.errors import CheckpointError, ConfigError, GrpoRayError, WorkerError
from grpo_ray.names import check_name
from grpo_ray.pipeline.config import PipelineConfig
from grpo_ray.pipeline.gates import figures_of, judge
from grpo_ray.pipeline.measure import measure
from grpo_ray.pipeline.plan import Plan, Stage, make_plan, typed_stages
from grpo_ray.pipeline.record import Record, StageRecord, check_unchanged
from grpo_ray.pipeline.report import write_pipeline_report
from grpo_ray.rewards.functions.files import with_absolute_files
from grpo_ray.rewards.table import resolve
from grpo_ray.run.manifest import digest_of
from grpo_ray.run.ownership import commanded
from grpo_ray.run.records import step_to_resume
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.sample_files import read_samples
from grpo_ray.telemetry.measures import accuracy_name
from grpo_ray.telemetry.tracking import read_metrics
from launch.console import headed, plain_console
from launch.interrupts import leaving
from launch.named_clusters import confirm_cluster
from launch.pipeline.stage_data import make_data
from launch.pipeline.view import print_figures, print_plan
from launch.program import runnable
from launch.run.effects import tell_idle_of_pipeline
from launch.run.foreign_code import (
    foreign_algorithm,
    foreign_environments,
    foreign_model,
    foreign_rewards,
    foreign_rows,
)
from launch.run.jobs import check_store_of, exit_unless_finished, make_report, write_config
from launch.run.left import owned
from launch.run.machine import check_machine
from launch.run.placement import settled
from launch.run.recipe import find_recipe, is_pipeline, tell_of_repeated

console = plain_console(soft_wrap=True)
RECIPE_COPY = "recipe.yaml"
TRAINING = ("loss", "reward/mean", "completions/mean_length", "pairs/", "score/", "eval/")
"""The metrics of a training stage, by their prefixes, that its gates can use."""


def load_plan(recipe: str, overrides: list[str], *, imports: bool = True, on_other_gpus: bool = False) -> Plan:
    """The plan of a recipe.

    Args:
        imports: False: the recipe's own code is not run.
        on_other_gpus: see `check_machine`.

    Raises:
        ConfigError: every problem of the recipe, and of each stage's config.
    """
    path = find_recipe(recipe)
    if not is_pipeline(path):
        raise ConfigError(f"recipe {recipe} has no stages: it is for `grpo-ray train` or another command of one run")
    tell_of_repeated(overrides)
    data = typed_stages(deep_merge(load_yaml(path), parse_overrides(overrides)))
    config = build(PipelineConfig, data, f"recipe {recipe}" + (f" with {' '.join(overrides)}" if overrides else ""))
    plan = make_plan(config, check_name(config.name or Path(recipe).stem), lambda name: load_yaml(find_recipe(name)))
    for stage in plan.stages:
        stage_config = plan.config_of(stage)
        if isinstance(stage_config, RunConfig | SftConfig):
            check_machine(stage_config, on_other_gpus=on_other_gpus)
        if isinstance(stage_config, RunConfig):
            placed = with_absolute_files(stage_config, path.parent)
            check_users(placed.algorithm, imports=imports)
            for function in placed.reward.functions:
                # A model that an earlier stage will make is not there yet.
                if not any(str(value).startswith(f"{plan.folder}/") for value in function.args.values()):
                    resolve(function, imports=imports)
    return plan


def run_pipeline(
    recipe: str,
    overrides: list[str],
    first: str | None,
    last: str | None,
    *,
    dry_run: bool,
    run_code: bool = False,
    on_other_gpus: bool = False,
) -> None:
    """Run the stages of a recipe, or plan them in a dry run.

    Args:
        run_code: in a dry run, import the recipe's own code, too.
        first: run this stage and what builds on it again.
        last: the last stage to run.
        on_other_gpus: see `check_machine`.

    Raises:
        GrpoRayError: a stage failed, it failed its gate, or one of its inputs has changed.
    """
    plan = load_plan(recipe, overrides, imports=run_code or not dry_run, on_other_gpus=on_other_gpus)
    if dry_run and not run_code:
        _tell_foreign(plan)
    tell_idle_of_pipeline(plan)
    for name in (first, last):
        if name is not None:
            plan.stage(name)
    with nullcontext() if dry_run else owned(plan.folder):
        record = Record.open(plan.folder)
        todo = _to_run(plan, record, first, last)
        print_plan(plan, record, todo)
        if dry_run:
            return
        if any(stage.spec.run for stage in todo):
            confirm_cluster(plan.config.cluster.address, overrides)
        runner = _Runner(plan, record, " ".join([recipe, *overrides]), find_recipe(recipe).parent)
        if first is not None:
            runner.start_again(plan.builds_on(first))
        (plan.folder / RECIPE_COPY).write_text(to_yaml(plan.config), encoding="utf-8")
        again = (
            f"what is done is in {plan.folder}; `{shlex.join(['grpo-ray', 'pipeline', recipe, *overrides])}` goes on"
        )
        with leaving(again):
            runner.run(todo)


def _tell_foreign(plan: Plan) -> None:
    for stage in plan.stages:
        config = plan.config_of(stage)
        if isinstance(config, RunConfig | SftConfig):
            code = (foreign_algorithm, foreign_rewards, foreign_environments, foreign_rows, foreign_model)
            for line in (line for lines in code for line in lines(config)):
                console.print(f"code     stage {stage.name}: {line}: read, not run")


def _to_run(plan: Plan, record: Record, first: str | None, last: str | None) -> list[Stage]:
    """The stages to run. Raises ConfigError where finished ones were run by another recipe."""
    again = plan.builds_on(first) if first is not None else set()
    names = [stage.name for stage in plan.stages]
    end = len(names)
    if last is not None:
        # A stage is complete with its measure.
        end = 1 + max(i for i, s in enumerate(plan.stages) if last in (s.name, s.measures))
    begun = {s.name for s in plan.stages if s.name in record.stages and s.name not in again}
    changed = [s.name for s in plan.stages if s.name in begun and record.stages[s.name].config != s.digest]
    if changed:
        raise ConfigError(
            f"stage {changed[0]} of {plan.folder} was begun with another config than this recipe has; run it and what builds on "
            f"it again with --from {changed[0]}, or choose another name with name=..."
        )
    todo = [s for s in plan.stages[:end] if s.name in again or not record.done(s.name)]
    if first is not None:
        lacking = [s.name for s in plan.stages if s in todo and names.index(s.name) < names.index(first)]
        if lacking:
            raise ConfigError(f"--from {first}: stage {lacking[0]} comes before it and is not done; leave --from out")
    return todo


def _set_aside(folder: Path) -> None:
    """Rename the folder, since a run is never overwritten: the files that a stage made before stay under another name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)


class _Runner:
    def __init__(self, plan: Plan, record: Record, command: str, recipe_folder: Path) -> None:
        self._recipe_folder = recipe_folder
        self._plan = plan
        self._record = record
        self._command = command

    def start_again(self, names: set[str]) -> None:
        """Set these stages back to not done, with what they made before set aside. First their inputs are checked."""
        for name in names:
            self._inputs(self._plan.stage(name), but=names)
        for name in names:
            if (folder := self._plan.folder_of(name)).exists():
                with commanded(folder):
                    pass
                _set_aside(folder)
            self._record.forget(name)

    def run(self, stages: list[Stage]) -> None:
        # A gate that failed still fails, unless the recipe has another one now.
        self._check_gates([s for s in self._plan.stages if self._record.done(s.name) and s not in stages])
        with _cluster(self._plan.config, needed=any(s.spec.run for s in stages)):
            for number, stage in enumerate(stages, 1):
                console.print(headed(f"\n{number}/{len(stages)} {stage.name}", "bold", f" ({stage.kind}) {stage.note}"))
                self._stage(stage)
        print_figures(self._plan, self._record)
        console.print(f"report   {self._report()}")

    def _stage(self, stage: Stage) -> None:
        plan, record = self._plan, self._record
        config = plan.config_of(stage)
        if isinstance(config, RunConfig):
            config = with_absolute_files(config, self._recipe_folder)
        inputs = self._inputs(stage)
        old = record.stages.get(stage.name)
        if old is None:
            record.put(stage.name, StageRecord(stage.kind, stage.digest, inputs=inputs))
        elif old.inputs != inputs:
            different = next(k for k in {**old.inputs, **inputs} if old.inputs.get(k) != inputs.get(k))
            raise ConfigError(
                f"stage {stage.name} was begun with another {different}; run it again with --from {stage.name}"
            )
        began = time.monotonic()
        folder = plan.folder_of(stage.name)
        try:
            details = self._work(stage, config, folder)
        except BaseException:
            if stage.name in record.stages:
                record.put(stage.name, record.add_cost(stage.name, time.monotonic() - began, _tokens(stage, folder)))
            self._report()
            raise
        metrics = self._metrics(stage, config, folder, details)
        outputs = {
            name: digest_of(path)
            for name, relative in stage.spec.outputs.items()
            if (path := folder / relative).exists()
        }
        costed = record.add_cost(stage.name, time.monotonic() - began, _tokens(stage, folder))
        record.put(stage.name, replace(costed, done=True, outputs=outputs, metrics=metrics, details=details))
        self._report()
        self._check_gates([stage])

    def _inputs(self, stage: Stage, but: Collection[str] = ()) -> dict[str, str]:
        """The inputs of a stage and their digests.

        Args:
            but: stages whose outputs are still to be made.

        Raises:
            CheckpointError: an input is not as the stage that made it left it.
        """
        out = {}
        for name, output in stage.references():
            if name in but:
                continue
            was = self._record.stages[name].outputs.get(output)
            if was is None:
                raise ConfigError(f"stage {stage.name} needs {output} of {name}, which did not leave any")
            mend = f"run that stage again with --from {name}"
            check_unchanged(self._plan.output(name, output), was, f"{output} of stage {name}", mend)
            out[f"{name}.{output}"] = was
        return out | {path: digest_of(Path(path)) for path in _files(stage.data)}

    def _work(self, stage: Stage, config: Strict, folder: Path) -> dict[str, Any]:
        if isinstance(config, MixConfig | PairsConfig | PromptsConfig):
            folder.mkdir(parents=True, exist_ok=True)
            return asdict(make_data(config, folder / stage.spec.outputs["data"]))
        assert isinstance(config, RunConfig | SftConfig)
        assert stage.spec.run is not None
        config = settled(config, stage.spec.run)
        from launch.run.follow import run_here

        with owned(folder):
            run, resume_step = _open_run(stage, config, folder)
            end = run_here(stage.spec.run, config, run.path, resume_step)
            if end.status != "finished":
                console.print(runnable(f"go on    grpo-ray pipeline {self._command}"))
            exit_unless_finished(end)
            if stage.spec.trains:
                make_report(run)
        return {}

    def _metrics(self, stage: Stage, config: Strict, folder: Path, details: dict[str, Any]) -> dict[str, float]:
        if stage.spec.run is None:
            return {key: float(value) for key, value in details.items() if isinstance(value, int)}
        if stage.spec.run == "sample":
            assert isinstance(config, RunConfig)
            return measure(
                read_samples(folder / "samples"),
                accuracy=accuracy_name(config),
                threshold=config.eval.threshold,
                by=self._plan.config.eval_by,
            )
        # The final figures of training: the last value of each metric.
        last: dict[str, float] = {}
        for line in read_metrics(folder / "metrics.jsonl"):
            last |= {key: value for key, value in line.items() if value is not None and key.startswith(TRAINING)}
        return last

    def _check_gates(self, stages: list[Stage]) -> None:
        """Raise WorkerError when a gate fails."""
        figures = figures_of(self._plan, self._record)
        for stage in stages:
            for verdict in judge(stage.gates, figures[stage.name], figures):
                name = stage.measures or stage.name
                console.print(f"gate     {name}: {verdict.text}: {'open' if verdict.passed else 'shut'}")
                if not verdict.passed:
                    raise WorkerError(
                        f"the gate of stage {name} is shut: {verdict.text}. See {self._plan.folder}/report.html; change the stage "
                        f"and run it again with --from {name}, or change the gate"
                    )

    def _report(self) -> Path:
        return write_pipeline_report(self._plan, self._record)


@contextmanager
def _cluster(config: PipelineConfig, *, needed: bool) -> Iterator[None]:
    """One cluster for all stages."""
    if not needed:
        yield
        return
    from launch.run.follow import cluster_of

    console.print("starting or joining Ray ..", style="dim")
    with cluster_of(config):
        yield


def _open_run(stage: Stage, config: RunConfig | SftConfig, folder: Path) -> tuple[RunDir, int | None]:
    """The run of a stage, new or interrupted, and the step to go on from."""
    run = RunDir(folder).with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
    if not run.config.is_file():
        from launch.run.preflight import preflight

        preflight(config)
        check_store_of(run)
        if run.steps():
            raise ConfigError(
                f"stage {stage.name} is to begin, and {run.store.url} holds checkpoints of another run of its name; give the stage "
                "another checkpoint.path, or remove them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_config(run, config)
    if not stage.spec.trains:
        return run, None
    try:
        step = step_to_resume(run, lambda text: console.print(f"warning: {text}", style="yellow"))
    except CheckpointError as e:
        raise CheckpointError(f"stage {stage.name}: {e}; --from {stage.name} runs the stage again") from None
    if step is not None:
        console.print(f"going on after step {step}")
    return run, step


def _tokens(stage: Stage, folder: Path) -> int:
    """The tokens that the stage has processed so far."""
    if stage.spec.run == "sample":
        try:
            return sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in read_samples(folder / "samples"))
        except GrpoRayError:
            return 0
    lines = read_metrics(folder / "metrics.jsonl")
    return round(sum((line.get("throughput/tokens_per_s") or 0.0) * (line.get("time/step") or 0.0) for line in lines))


def _files(node: Any) -> list[str]:
    """The paths of local files that a stage's config names."""
    if isinstance(node, dict):
        path = node.get("path")
        here = [path] if isinstance(path, str) and (path := os.path.expanduser(path)) and Path(path).is_file() else []
        return here + [path for value in node.values() for path in _files(value)]
    return [path for value in node for path in _files(value)] if isinstance(node, list) else []
