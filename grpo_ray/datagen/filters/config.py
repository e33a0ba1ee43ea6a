"""The schema of a pipeline stage that makes training data from samples: `kind: data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_ray.config.base import HomePath, NonNegFloat, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.data import DataSource

Share = Annotated[float, Field(ge=0, le=1)]


class FilterConfig(Strict):
    """Filters of an answer, which is kept when it passes all of them. None: not checked."""

    min_scores: dict[str, float] = {}
    """The least score by reward function, e.g. `{accuracy: 1, language_consistency: 0.95}`. An answer without that score is not
    kept; a function that does not apply is not checked.
    """
    finished: bool = True
    """Whether the answer must have ended before the token limit."""
    form: Literal["r1", "think"] | None = "think"
    """The form of the answer. think: `<think>` reasoning `</think>`, then something, each tag once. r1: then `<answer>` ..
    `</answer>` and nothing else."""
    min_reasoning_chars: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    max_foreign_words: Share | None = 0.02
    """The largest fraction of the answer's words in another script than the prompt's (Chinese in an English answer). Languages
    that share a script are distinguished by `min_scores: {language_consistency: 0.95}`."""
    max_repeated: Share | None = 0.4
    """The largest fraction of runs of `repeat_ngram` words that occurred before."""
    repeat_ngram: PositiveInt = 6
    max_loop: PositiveInt | None = 4
    """The most times that the same line, or the same piece of text at the end, may occur in a row."""
    max_paragraph_chars: PositiveInt | None = 1500
    """The most characters without a line break in the reasoning."""
    code_blocks: bool = False
    """Whether the reasoning may contain ``` blocks."""


class SampledSource(Strict):
    """Samples to select from."""

    path: HomePath
    """The samples/ of a run of `grpo-ray sample`."""
    filter: FilterConfig = FilterConfig()
    keep_per_prompt: PositiveInt | None = 1
    prefer: Literal["first", "shortest", "random"] = "first"
    """The order in which a prompt's passing answers are kept."""
    only: dict[str, str] = {}
    """Column -> value: rows with other values are ignored."""
    summary: str | dict[str, str] | None = None
    """A template that rewrites the answer around the content of `<answer>`, e.g. `So it is <answer>{answer}</answer>.`; a
    mapping selects it by the value of the column `language`. None: as it was sampled."""


class MixConfig(Strict):
    """Selected samples, and other demonstrations at a ratio."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    samples: tuple[SampledSource, ...] = ()
    other: tuple[DataSource, ...] = ()
    """Demonstrations as `grpo-ray sft` takes them: writing, role play, .. R1's non-reasoning data."""
    ratio: PositiveFloat | None = 3.0
    """The number of selected samples for one row of `other` (R1: 600k : 200k); the larger part is subsampled. None: all of both."""
    max_rows: PositiveInt | None = None
    decontaminate: tuple[DataSource, ...] = ()
    """Data sets to decontaminate against: rows whose prompt shares `ngram` words in a row with one of these, or contains a whole
    shorter prompt, are left out; each Chinese character is a word (`grpo_ray.data.decontaminate`)."""
    ngram: PositiveInt = 10
    group_by: str | None = "source"
    """The column by which the composition is reported."""


class JudgeConfig(Strict):
    """A model behind an OpenAI-compatible endpoint; its key is in OPENAI_API_KEY."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveFloat | None = None
    max_tokens: PositiveInt = 1024


class PairsConfig(Strict):
    """Preference pairs of samples of the same prompt, by a judge that sees them in both orders; see
    `grpo_ray.datagen.judged_pairs`."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    samples: HomePath
    """The samples/ of a run of `grpo-ray sample`."""
    judge: JudgeConfig
    rubric: str | None = None
    """The criteria of the comparison. None: helpfulness."""
    part: Literal["all", "reasoning", "summary"] = "all"
    """The part of an answer that the judge sees."""
    pairs_per_prompt: PositiveInt = 1
    rounds: PositiveInt = 2
    """The number of judgements in each of the two orders."""
    min_margin: NonNegFloat = 1.0
    """The least mean difference of ratings, in points of ten."""
    length_tolerance: Share = 0.05
    """The mean difference of lengths that may remain; 1: lengths are not balanced."""


class PromptsConfig(Strict):
    """Prompts of several sources in one file, each row with its source in a column, by which rewards are selected."""

    name: str | None = None
    dir: HomePath = "runs"
    seed: int = 1
    sources: Annotated[dict[str, DataSource], Field(min_length=1)]
    """The value of the column `source` -> where the rows are; `limit` sets the shares."""
