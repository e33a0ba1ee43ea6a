"""Options of a pipeline that have no effect, beside those of its stages' runs (`config.effects`)."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_ray.config.base import Strict
from grpo_ray.config.effects import without_effect
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.datagen.filters.config import FilterConfig, MixConfig, SampledSource
from grpo_ray.pipeline.config import PipelineConfig
from grpo_ray.pipeline.kinds import EVAL, KINDS

COMMANDS = {"grpo": "train", "reward_model": "reward-model"}
"""The commands of those `Kind.run` that have another name."""
PLACE = ("name", "dir")


def pipeline_without_effect(config: PipelineConfig) -> dict[str, str]:
    """The reason why an option changes nothing, by dotted key."""
    return dict(_of_measuring(config)) | dict(_of_kinds(config)) | dict(_of_places(config))


def stage_without_effect(config: Strict, run: str | None) -> dict[str, str]:
    """The same of one stage's config.

    Args:
        run: the `Kind.run` of the stage.
    """
    if isinstance(config, RunConfig | SftConfig):
        return without_effect(config, COMMANDS.get(run or "", run or ""))
    return dict(_of_mix(config)) if isinstance(config, MixConfig) else {}


def _of_measuring(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    fields = PipelineConfig.model_fields
    if config.eval is None:
        for name in ("eval_by", "samples_shown"):
            if getattr(config, name) != fields[name].default:
                yield name, "nothing is measured without `eval`"
    for name, stage in config.stages.items():
        if stage.eval is True or stage.kind not in KINDS:
            continue
        if not KINDS[stage.kind].policy:
            yield f"stages.{name}.eval", f"a stage of kind {stage.kind} makes no model that answers prompts"
        elif config.eval is None and stage.eval:
            yield f"stages.{name}.eval", "nothing is measured without the pipeline's `eval`"


def _of_kinds(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    kinds = {stage.kind for stage in config.stages.values()} | ({"sample"} if config.eval is not None else set())
    for kind in config.common:
        if kind != "all" and kind not in kinds:
            yield f"common.{kind}", f"no stage is of kind {kind}"
    for kind in config.assume.tokens_per_s:
        if kind not in {*KINDS, EVAL}:
            yield f"assume.tokens_per_s.{kind}", f"no such kind of stage; there are {', '.join([*KINDS, EVAL])}"


def _of_places(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    for name, stage in config.stages.items():
        for key in PLACE:
            if stage.config.get(key) is not None:
                yield f"stages.{name}.config.{key}", "a pipeline puts its stages under its own dir and name"
        cluster = stage.config.get("cluster")
        for key in ("address", "num_cpus"):
            if isinstance(cluster, dict) and cluster.get(key) is not None:
                yield f"stages.{name}.config.cluster.{key}", "all stages run on the pipeline's `cluster`"


def _of_mix(config: MixConfig) -> Iterator[tuple[str, str]]:
    fields = MixConfig.model_fields
    if not config.decontaminate and config.ngram != fields["ngram"].default:
        yield "ngram", "nothing is compared without `decontaminate`"
    if not (config.samples and config.other) and config.ratio not in (None, fields["ratio"].default):
        yield "ratio", "it is between `samples` and `other`, and one of them is not given"
    for i, source in enumerate(config.samples):
        if source.keep_per_prompt is None and source.prefer != SampledSource.model_fields["prefer"].default:
            yield f"samples.{i}.prefer", "all answers of a prompt are kept (keep_per_prompt null)"
        asked = source.filter
        if asked.max_repeated is None and asked.repeat_ngram != FilterConfig.model_fields["repeat_ngram"].default:
            yield f"samples.{i}.filter.repeat_ngram", "repetition is not asked for (max_repeated null)"
