"""One typed record per arrow of the flow. Nothing here computes.

    Prompt -> SampleRequest -> Sample -> Score -> Group -> TrainBatch -> UpdateReport -> SyncReport

Sizes: P prompts a step, G samples a group, T completion tokens of one sample, N prompt tokens, S samples of a batch.
Arrays are numpy (they travel through Ray's object store without a copy); the learner makes tensors of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def _record(cls: type[T]) -> type[T]:
    """Of which there are several for each sample: frozen to the type checker alone, since a dataclass that is frozen at run time
    takes four times as long to make."""
    return dataclass(unsafe_hash=True, slots=True)(cls)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to sample from. Made by `grpo_ray.data.prompts`."""

    id: str
    """`<data set>/<epoch>/<row>`: the same row has the same id in every run and after every resume."""
    token_ids: list[int]
    """[N]. What the engine gets; it is never made again from the text."""
    text: str
    """The templated text, for people."""
    messages: list[dict[str, Any]] | None
    """The conversation, when the row is conversational or a chat template wrapped it; None for raw text."""
    columns: dict[str, Any]
    """Every other column of the row under its (mapped) name: reward functions get them by keyword. None where this row lacks one
    that others of its data set have."""
    asked: str | list[dict[str, Any]] | None = None
    """The prompt as the row has it, text or messages, before any template; None: as `messages`, else as `text`."""


@dataclass(frozen=True)
class Truncation:
    """Which tokens a sampler leaves out, in vLLM's words; as it is, none."""

    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0

    @property
    def any(self) -> bool:
        return self != Truncation()


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, in vLLM's words. `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@_record
class SampleRequest:
    """One sample to draw. Made by the loop, consumed by a rollout actor."""

    prompt_id: str
    index: int
    """Place in its group, 0 .. G-1."""
    prompt_token_ids: list[int]
    """[N]."""
    seed: int
    """Of this one sample, derived from (run seed, prompt id, index): a rerun draws the same tokens."""
    params: SamplingParams


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Sample:
    """One completion, whole. Made by a rollout actor; travels by reference to scorers and learners."""

    prompt_id: str
    index: int
    prompt_token_ids: NDArray[np.int32]
    """[N]."""
    token_ids: NDArray[np.int32]
    """[T], the end-of-sequence token included when the model wrote it."""
    logprobs: NDArray[np.float32]
    """[T], of the sampling policy after temperature, over the tokens that top_p, top_k and min_p left: the `rollout`
    log-probabilities."""
    versions: tuple[VersionSpan, ...]
    """Covers [0, T)."""
    finish_reason: str
    """`stop` or `length`."""
    text: str
    """Decoded once, as it was written: without the token that ended the turn, with all others. For rewards and people; never
    tokenized again."""


@_record
class SampleInfo:
    """What the loop needs to know of a sample; the tokens stay behind `ref`."""

    prompt_id: str
    index: int
    num_prompt_tokens: int
    num_tokens: int
    """T."""
    min_version: int
    """The oldest policy that sampled one of its tokens."""
    finish_reason: str
    worker: str
    """The rollout actor that drew it, e.g. `rollout-0`."""
    ref: Any
    """Handle on a list[Sample] (a Ray ObjectRef in a run; the list itself in a test)."""
    row: int
    """Its place in that list."""

    def behind(self, ref: Any) -> SampleInfo:
        """The same, with the handle that its actor can't know."""
        return SampleInfo(
            self.prompt_id,
            self.index,
            self.num_prompt_tokens,
            self.num_tokens,
            self.min_version,
            self.finish_reason,
            self.worker,
            ref,
            self.row,
        )


class ScoreStatus(StrEnum):
    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    ERROR = "error"

    def __init__(self, value: str) -> None:
        self.failed = value not in ("ok", "not_applicable")
        """Did the machinery fail, rather than the model? Not a property: it is asked of every score, several times."""


@dataclass(frozen=True)
class Step:
    """Process supervision: a number for a part of a completion, from the end of the step before it."""

    end: int
    """Index of its last token, 0 .. T-1."""
    value: float
    """What it is worth; of a trained sample the advantage of its tokens."""


class LoggedMetric(NamedTuple):
    """A figure that a reward function logs beside its rewards (TRL's `log_metric`, numbers of verl's dict), over the values of one
    call."""

    name: str
    total: float
    """The sum of the finite ones."""
    num_finite: int
    num_not_finite: int


@_record
class RewardScore:
    """What one reward function said of one sample."""

    name: str
    status: ScoreStatus
    value: float
    """Before its weight; the sum over its steps. NaN unless status is `ok`."""
    detail: str = ""
    """For a failure: what happened, in one line."""
    seconds: float = 0.0
    steps: tuple[Step, ...] = ()
    """Before their weight, by their ends. None: one number for the whole completion."""
    extra: tuple[tuple[str, str | float | bool | None], ...] = ()
    """(column, value) pairs that the function logs of this sample: TRL's `log_extra`, the entries of verl's dict."""
    logged: tuple[LoggedMetric, ...] = ()
    """Of the call that scored it, at the call's first sample alone."""


@_record
class Score:
    """What a sample is worth: the weighted sum of its rewards. A failure is a status, never a zero."""

    status: ScoreStatus
    """`ok`; `not_applicable` if no reward applied; otherwise the first failure among the parts."""
    value: float
    """sum_k weight_k * value_k over the parts that apply. NaN unless status is `ok`."""
    parts: tuple[RewardScore, ...] = ()
    detail: str = ""
    steps: tuple[Step, ...] = ()
    """Weighted, of all parts together, by their ends; a part without steps is one that ends at the last token. Empty where no
    part has any."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Those of its steps, or the one of the whole."""
        return tuple(step.value for step in self.steps) if self.steps else (self.value,)


@dataclass(frozen=True)
class TrainerState:
    """How far training is, for reward functions: what TRL's `trainer_state` (transformers' TrainerState) has of it."""

    global_step: int
    """Steps done when the prompt was dispatched, 0 at first; in an evaluation, steps done."""
    max_steps: int
    """Of the whole run."""
    epoch: float
    """Passes through the data set at that step, parts of one included."""
    num_train_epochs: int
    """Passes that the run begins."""

    @classmethod
    def at(
        cls, step: int, max_steps: int, *, prompts_per_step: int, num_prompts: int, num_trained: int | None = None
    ) -> TrainerState:
        """`num_trained`: prompts of the whole run, where its last step may have fewer. None: all steps have as many."""
        whole = max_steps * prompts_per_step if num_trained is None else num_trained
        return cls(step, max_steps, min(step * prompts_per_step, whole) / num_prompts, math.ceil(whole / num_prompts))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer_state has no {name!r} here; it has {', '.join(f.name for f in fields(TrainerState))}"
        )


@_record
class ScoreRequest:
    """One sample to score. The scorer fetches the text behind `sample.ref` itself."""

    sample: SampleInfo
    prompt_text: str
    messages: list[dict[str, Any]] | None
    columns: dict[str, Any]
    step: int | None = None
    """Steps done when the prompt was dispatched; None: it is no step's, an evaluation's."""
    asked: str | list[dict[str, Any]] | None = None
    """As in `Prompt`."""
    trainer: TrainerState | None = None
    """None: nothing is trained."""

    @classmethod
    def of(
        cls, sample: SampleInfo, prompt: Prompt, step: int | None = None, trainer: TrainerState | None = None
    ) -> ScoreRequest:
        return cls(sample, prompt.text, prompt.messages, prompt.columns, step, prompt.asked, trainer)


@dataclass(slots=True)
class Group:
    """G samples of one prompt, scored. Made by the loop."""

    prompt: Prompt
    order: int
    """Dispatch order over the whole run: the batch is sorted by it, so that sums do not depend on timing."""
    dispatched_version: int
    samples: list[SampleInfo] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    part: int | None = None
    """Which of the parts that the learner was given before the batch was whole; None: it came with the batch."""
    steps: list[tuple[Step, ...]] = field(default_factory=list)
    """Of each sample, as in `TrainSample`; empty but for `algorithm.advantage: process`."""

    @property
    def min_version(self) -> int:
        return min([s.min_version for s in self.samples])


@_record
class TrainSample:
    """One sequence of a batch: where its tokens are, and what the loss needs besides."""

    ref: Any
    row: int
    prompt_id: str
    index: int
    num_prompt_tokens: int
    num_tokens: int
    advantage: float
    """Where the learner makes the advantages (`AlgorithmConfig.advantages_on_learner`): the reward, NaN without a score. With
    `algorithm.advantage: process` the mean over its tokens, for people."""
    group: int
    """Which group of the batch it belongs to."""
    loss_mask: bool = True
    """False: takes part in nothing (a failed score, a truncated sample under overlong filtering)."""
    part: int | None = None
    """As in `Group`."""
    steps: tuple[Step, ...] = ()
    """With `algorithm.advantage: process` the advantages of its tokens; 0 after the last step."""

    @property
    def advantages(self) -> tuple[float, ...]:
        """All that its tokens have, but for 0."""
        return tuple(step.value for step in self.steps) or (self.advantage,)


@dataclass(frozen=True)
class TrainBatch:
    """A whole batch, for all learner ranks; each rank takes its own micro-batches from `plan`."""

    step: int
    samples: list[TrainSample]
    """[S]."""
    temperature: float
    """Log-probabilities are of logits / temperature, as the sampler's are."""
    truncation: Truncation = Truncation()
    """And over the tokens that the sampler could draw."""


@_record
class TimeSpan:
    """What a worker did from `start` to `end`, on the clock of its host (seconds since 1970)."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@_record
class Track:
    """What one worker did since it last told; see `grpo_ray.telemetry.activity`. Idle all along, it has no spans."""

    worker: str
    """`rollout-0`."""
    spans: tuple[TimeSpan, ...]
    """In order, without overlaps."""


@dataclass(frozen=True)
class UpdateReport:
    """What the learner says of one step. Made by rank 0, already reduced over ranks."""

    step: int
    metrics: dict[str, float]
    """Names as in `grpo_ray.telemetry.catalogue`."""
    seconds: float
    tracks: tuple[Track, ...] = ()
    """One a rank, since its last report."""


@dataclass(frozen=True)
class SyncReport:
    """One transfer of weights to the samplers."""

    version: int
    seconds: float
    pause_seconds: float
    """How long generation stood still."""
    num_bytes: int
    checksum: str
    num_engines: int
    tracks: tuple[Track, ...] = ()
    """One a learner rank, since its last report."""
