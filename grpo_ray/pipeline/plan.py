"""Plans: the stages of a pipeline's recipe in order, each with a config that lacks only the values of its references.

PipelineConfig -> [Stage] -> config_of(stage) -> RunConfig, SftConfig, MixConfig
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.config.base import Strict
from grpo_ray.config.loading import build, deep_merge
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.typed import with_types
from grpo_ray.errors import ConfigError
from grpo_ray.pipeline.config import GateConfig, PipelineConfig, StageConfig
from grpo_ray.pipeline.kinds import EVAL, KINDS, Kind
from grpo_ray.suggest import did_you_mean

REFERENCE = re.compile(r"\$\{stages\.([^.}]+)\.([^.}]+)\}")
SEED = "${seed}"
Data = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    name: str
    kind: str
    """The kind, of KINDS or `eval`."""
    data: Data
    """Its config, with references as they were written."""
    needs: tuple[str, ...]
    """The names of the stages that it needs, in the order of the plan."""
    gates: tuple[GateConfig, ...] = ()
    note: str = ""
    measures: str | None = None
    """The stage whose model an `eval` stage measures."""

    @property
    def spec(self) -> Kind:
        return KINDS["sample" if self.kind == EVAL else self.kind]

    @property
    def digest(self) -> str:
        """The digest of its config as it is written in the recipe."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True, default=str).encode()).hexdigest()

    def references(self) -> list[tuple[str, str]]:
        """The distinct references as (stage, output)."""
        return list(dict.fromkeys(found for text in _texts(self.data) for found in REFERENCE.findall(text)))


@dataclass(frozen=True)
class Plan:
    config: PipelineConfig
    name: str
    stages: tuple[Stage, ...]
    """The stages, each after those that it needs."""

    @property
    def folder(self) -> Path:
        return Path(self.config.dir) / self.name

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises ConfigError if there is none."""
        found = next((s for s in self.stages if s.name == name), None)
        if found is None:
            raise ConfigError(f"there is no stage {name!r}; {_meant(name, [s.name for s in self.stages])}")
        return found

    def folder_of(self, name: str) -> Path:
        """The run folder of a stage. Its name includes the pipeline's: on a cluster, runs of all pipelines have theirs side by
        side."""
        return self.folder / f"{self.name}.{name}"

    def output(self, stage: str, output: str) -> Path:
        return self.folder_of(stage) / self.stage(stage).spec.outputs[output]

    def config_of(self, stage: Stage) -> Strict:
        """The validated config. Raises ConfigError with every problem, one a line."""
        folder = self.folder_of(stage.name)
        data = _resolve(stage.data, lambda name, output: str(self.output(name, output)), self.config.seed)
        place = {"dir": str(folder.parent), "name": folder.name}
        return build(stage.spec.schema, data | place, f"stage {stage.name}")

    def builds_on(self, name: str) -> set[str]:
        """The stage itself and all that need it, directly or not."""
        out = {self.stage(name).name}
        for stage in self.stages:
            if out & set(stage.needs):
                out.add(stage.name)
        return out


def typed_stages(data: Data) -> Data:
    """Type the configs of the stages by the schemas of their kinds. A config that fits none of these stays as it is: the stage's
    own validation names it.
    """
    out = dict(data)
    common, stages = data.get("common"), data.get("stages")
    if isinstance(common, dict):
        out["common"] = {kind: _typed(kind, config) for kind, config in common.items()}
    if isinstance(data.get("eval"), dict):
        out["eval"] = _typed("sample", data["eval"])
    if isinstance(stages, dict):
        out["stages"] = {
            name: _typed_stage(stage) if isinstance(stage, dict) else stage for name, stage in stages.items()
        }
    return out


def _typed_stage(stage: Data) -> Data:
    kinds = {"config": stage.get("kind"), "eval": "sample"}
    return stage | {key: _typed(kind, stage[key]) for key, kind in kinds.items() if isinstance(stage.get(key), dict)}


def _typed(kind: Any, config: Any) -> Any:
    return with_types(KINDS[str(kind)].schema if str(kind) in KINDS else RunConfig, config, {})


def make_plan(config: PipelineConfig, name: str, load_recipe: Callable[[str], Data]) -> Plan:
    """Make the plan.

    Args:
        name: the name of the pipeline where its config has none.
        load_recipe: returns the content of a recipe by its name.

    Raises:
        ConfigError: a stage names something that does not exist, or stages need each other in a circle.
    """
    for kind in config.common:
        if kind != "all" and kind not in KINDS:
            raise ConfigError(f"common.{kind}: no kind of stage; {_meant(kind, ['all', *KINDS])}")
    stages: dict[str, Stage] = {}
    for stage_name, given in config.stages.items():
        if given.kind not in KINDS:
            raise ConfigError(f"stages.{stage_name}.kind is {given.kind!r}; {_meant(given.kind, list(KINDS))}")
        recipe = load_recipe(given.recipe) if given.recipe else {}
        data = deep_merge(deep_merge(_common(config, given.kind), recipe), given.config)
        measured = _is_measured(given, config)
        gates = () if measured else given.gate
        stages[stage_name] = Stage(stage_name, given.kind, data, given.needs, gates, given.note)
        if measured:
            data = _common(config, "sample")
            own = given.eval if isinstance(given.eval, dict) else {}
            for over in (config.eval or {}, own, {"model": {"path": f"${{stages.{stage_name}.model}}"}}):
                data = deep_merge(data, over)
            held_out = f"{stage_name}-{EVAL}"
            stages[held_out] = Stage(held_out, EVAL, data, (), given.gate, measures=stage_name)
    for stage in stages.values():
        _check_references(stage, stages)
    ordered = _in_order({s.name: _with_needs(s, config) for s in stages.values()})
    return Plan(config, config.name or name, tuple(ordered))


def _common(config: PipelineConfig, kind: str) -> Data:
    seed: Data = {"seed": config.seed}
    if KINDS[kind].run is None:
        return deep_merge(seed, config.common.get(kind, {}))
    seed["cluster"] = config.cluster.model_dump(mode="json")
    every = config.common.get("all", {})
    return deep_merge(deep_merge(seed, every), config.common.get(kind, {}))


def _check_references(stage: Stage, stages: Mapping[str, Stage]) -> None:
    for name, output in stage.references():
        if name not in stages:
            raise ConfigError(
                f"stage {stage.name} names ${{stages.{name}.{output}}}, and there is no such stage; {_meant(name, stages)}"
            )
        outputs = stages[name].spec.outputs
        if output not in outputs:
            raise ConfigError(
                f"stage {stage.name} names ${{stages.{name}.{output}}}, and a stage of kind {stages[name].kind} leaves "
                f"{', '.join(outputs)}"
            )
    for name in (*stage.needs, *(g.not_below for g in stage.gates if g.not_below)):
        if name not in stages:
            raise ConfigError(f"stage {stage.name} needs {name!r}, and there is no such stage; {_meant(name, stages)}")


def _with_needs(stage: Stage, config: PipelineConfig) -> Stage:
    """The stage with all that it needs. A comparison with another stage needs that one's measurement."""
    needs = [name for name, _ in stage.references()] + list(stage.needs)
    for gate in stage.gates:
        if gate.not_below is not None:
            needs.append(_measured_as(gate.not_below, config))
    return Stage(
        stage.name, stage.kind, stage.data, tuple(dict.fromkeys(needs)), stage.gates, stage.note, stage.measures
    )


def _measured_as(name: str, config: PipelineConfig) -> str:
    """The stage that has the metrics of this one."""
    given = config.stages.get(name)
    return f"{name}-{EVAL}" if given is not None and _is_measured(given, config) else name


def _is_measured(given: StageConfig, config: PipelineConfig) -> bool:
    return config.eval is not None and given.eval is not False and KINDS[given.kind].policy


def _in_order(stages: dict[str, Stage]) -> list[Stage]:
    """The stages as in the recipe, except for those that need a later one. A stage that measures a model directly follows the
    stage that made it, since its gate is checked there."""
    waiting = dict(stages)
    out: list[Stage] = []
    done: set[str] = set()
    while waiting:
        ready = [s for s in waiting.values() if set(s.needs) <= done]
        if not ready:
            raise ConfigError(f"these stages need each other in a circle: {', '.join(waiting)}")
        stage = next((s for s in ready if s.measures), ready[0])
        out.append(waiting.pop(stage.name))
        done.add(stage.name)
    return out


def _resolve(node: Any, path: Callable[[str, str], str], seed: int) -> Any:
    if isinstance(node, dict):
        return {k: _resolve(v, path, seed) for k, v in node.items()}
    if isinstance(node, list):
        return [_resolve(v, path, seed) for v in node]
    if node == SEED:
        return seed
    if isinstance(node, str):
        return REFERENCE.sub(lambda found: path(found[1], found[2]), node)
    return node


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)


def _meant(name: str, known: Any) -> str:
    return did_you_mean(name, known, f"there are {', '.join(known)}")
