"""The schema of a stage that makes training data of samples: `kind: data` of a pipeline."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_ray.config.base import HomePath, NonNegFloat, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.data import DataSource

Share = Annotated[float, Field(ge=0, le=1)]


class FilterConfig(Strict):
    """An answer is kept when it passes all of these. None: not asked."""

    min_scores: dict[str, float] = {}
    """Reward function -> the least that it has to say, e.g. `{accuracy: 1, language_consistency: 0.95}`. An answer that it did
    not score is not kept; where it does not apply, it is not asked."""
    finished: bool = True
    """Not cut at the limit of tokens."""
    form: Literal["r1", "think"] | None = "think"
    """think: `<think>` reasoning `</think>`, then something, each tag once. r1: then `<answer>` .. `</answer>` and nothing else."""
    min_reasoning_chars: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    max_foreign_words: Share | None = 0.02
    """Of the words of the answer, those of another script than the prompt's (Chinese in an English answer). Languages that share a
    script are told apart by `min_scores: {language_consistency: 0.95}`."""
    max_repeated: Share | None = 0.4
    """Of the runs of `repeat_ngram` words, those that were there before."""
    repeat_ngram: PositiveInt = 6
    max_loop: PositiveInt | None = 4
    """How often the same line, or the same piece of text at the end, may come in a row."""
    max_paragraph_chars: PositiveInt | None = 1500
    """Without a line break, in the reasoning."""
    code_blocks: bool = False
    """May the reasoning hold ``` blocks?"""


class SampledSource(Strict):
    """Samples to choose from."""

    path: HomePath
    """The samples/ of a run of `grpo-ray sample`."""
    filter: FilterConfig = FilterConfig()
    keep_per_prompt: PositiveInt | None = 1
    prefer: Literal["first", "shortest", "random"] = "first"
    """Which of a prompt's answers that pass are kept."""
    only: dict[str, str] = {}
    """Column -> value: rows of other values are not looked at."""
    summary: str | dict[str, str] | None = None
    """The answer written anew around what `<answer>` holds, e.g. `So it is <answer>{answer}</answer>.`; by the value of the column
    `language`, where it is a mapping. None: as it was sampled."""


class MixConfig(Strict):
    """Chosen samples, and other demonstrations at a ratio."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    samples: tuple[SampledSource, ...] = ()
    other: tuple[DataSource, ...] = ()
    """Demonstrations as `grpo-ray sft` takes them: writing, role play, .. R1's non-reasoning data."""
    ratio: PositiveFloat | None = 3.0
    """Chosen samples for one row of `other` (R1: 600k : 200k); of the larger part so many are drawn. None: all of both."""
    max_rows: PositiveInt | None = None
    decontaminate: tuple[DataSource, ...] = ()
    """Rows whose prompt shares `ngram` words in a row with one of these, or holds a whole prompt of fewer, are left out; each
    Chinese character is a word (`grpo_ray.data.decontaminate`)."""
    ngram: PositiveInt = 10
    group_by: str | None = "source"
    """The column by which the composition is told."""


class JudgeConfig(Strict):
    """A model behind an OpenAI-compatible endpoint; its key is in OPENAI_API_KEY."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveFloat | None = None
    max_tokens: PositiveInt = 1024


class PairsConfig(Strict):
    """Preferences between samples of the same prompt, by a judge who sees them in both orders; see
    `grpo_ray.datagen.judged_pairs`."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    samples: HomePath
    """The samples/ of a run of `grpo-ray sample`."""
    judge: JudgeConfig
    rubric: str | None = None
    """What to compare by. None: helpfulness."""
    part: Literal["all", "reasoning", "summary"] = "all"
    """What the judge sees of an answer."""
    pairs_per_prompt: PositiveInt = 1
    rounds: PositiveInt = 2
    """Judgements in each of the two orders."""
    min_margin: NonNegFloat = 1.0
    """Least mean difference of ratings, in points of ten."""
    length_tolerance: Share = 0.05
    """Mean difference of lengths that may be left; 1: lengths are not balanced."""


class PromptsConfig(Strict):
    """Prompts of several sources in one file, each row with its source in a column: what rewards by source go by."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    sources: Annotated[dict[str, DataSource], Field(min_length=1)]
    """What the column `source` says -> where the rows are; `limit` makes the shares."""
