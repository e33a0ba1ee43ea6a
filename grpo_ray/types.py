"""One typed record per arrow of the flow. Nothing here computes.

    Prompt -> SampleRequest -> Sample -> Score -> Group -> TrainBatch -> UpdateReport -> SyncReport

Suffixes of array names, one letter a dimension (`logits_CV` is [C, V]); lower case (`values_c`) is the slice of one rank:

    P prompts, or preference pairs   G samples of a group    S samples or sequences   B completions, padded
    N tokens, of a micro-batch       T of one completion     C completion tokens of a micro-batch, or rows of a chunk
    V vocabulary   H hidden size     I, O in and out features of a layer              1 kept for broadcasting

Steps have numbers from 1: step n turns policy version n - 1 into version n, and its batch, metrics, files and the checkpoint after
it have the number n. The last step done is also the number of steps done and the present policy version; 0: none.

The losses see completion tokens alone and call them N; in this file N is prompt tokens. Shapes in annotations have these letters,
`Float[Tensor, "C V"]` (jaxtyping), and the tests check them. Arrays are numpy, which Ray's object store shares without a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.scores import LoggedMetric as LoggedMetric
from grpo_ray.scores import RewardScore as RewardScore
from grpo_ray.scores import Score as Score
from grpo_ray.scores import ScoreStatus as ScoreStatus
from grpo_ray.scores import Step as Step
from grpo_ray.scores import TrainerState as TrainerState
from grpo_ray.scores import record


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to sample from. Made by `grpo_ray.data.prompts`.

    Example: Prompt(id="train/0/17", token_ids=[51, 7], text="3 + 4 =", messages=None, columns={"answer": "7"})
    """

    id: str
    """`<data set>/<epoch>/<row>`: the same row has the same id in every run and after every resume."""
    token_ids: list[int]
    """[N] token ids as the rollout engine gets them; they are never made again from the text."""
    text: str
    """The templated text, human-readable."""
    messages: list[dict[str, Any]] | None
    """The conversation, when the row is conversational or a chat template wrapped it; None for raw text."""
    columns: dict[str, Any]
    """Every other column of the row by its (mapped) name, for reward functions; None where only other rows have it."""
    asked: str | list[dict[str, Any]] | None = None
    """The prompt as the row has it, text or messages, before any template; None: equal to `messages`, else to `text`."""


@dataclass(frozen=True)
class Truncation:
    """Truncation of the sampling distribution, in vLLM's words; the default truncates nothing."""

    top_p: float = 1.0
    top_k: int = 0
    """The number of likeliest tokens that are kept; 0 keeps all."""
    min_p: float = 0.0

    @property
    def any(self) -> bool:
        return self != Truncation()


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters in vLLM's words; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@record
class EpisodeStart:
    """What an episode begins with, besides the tokens of its prompt."""

    prompt: Prompt
    seed: int
    """The seed of the environment's reset, the same for all samples of a group."""
    step: int | None = None
    """The last step done when the prompt was dispatched; None in an evaluation."""
    trainer: TrainerState | None = None


@record
class SampleRequest:
    """Request for one sample. Made by the loop, consumed by a rollout engine."""

    prompt_id: str
    index: int
    """The sample's place in its group, 0 .. G-1."""
    prompt_token_ids: list[int]
    """[N] token ids."""
    seed: int
    """The seed of this one sample, derived from (run seed, prompt id, index): a rerun samples the same tokens."""
    params: SamplingParams
    episode: EpisodeStart | None = None
    """What an environment's episode begins with; None: one turn, without an environment."""


@dataclass(frozen=True)
class VersionSpan:
    """The policy version that sampled tokens [start, end) of a completion."""

    version: int
    start: int
    end: int


TRUNCATED = frozenset({"length", "context_overflow"})
"""The finish reasons of a completion that had no room for more tokens."""


@dataclass(frozen=True)
class Episode:
    """What only a sample of several turns has."""

    messages: tuple[dict[str, Any], ...]
    """The conversation after the prompt: the model's turns, and what the environment answered."""
    scores: tuple[RewardScore, ...]
    """Rewards that were computed beside the environment: its own, and those of functions that name `environments`."""
    failure: RewardScore | None = None
    """Why there are none."""


@record
class EpisodeFigures:
    """Figures of one episode, for metrics."""

    num_turns: int
    calls: tuple[tuple[str, int], ...]
    """(tool, number of calls) pairs."""
    num_errors: int
    seconds: float
    """The time that the episode waited for its environment."""
    failures: tuple[str, ...]
    """The `ScoreStatus` of each attempt whose environment failed; the last attempt may have succeeded."""


@dataclass(frozen=True)
class Sample:
    """One whole completion: a single answer, or an episode of several turns with the environment's texts between them. Made by a
    rollout engine; travels by reference to reward workers and learner ranks.

    Example: Sample("train/0/17", 2, array([51, 7]), array([9, 2]), array([-0.1, -0.3]), (VersionSpan(4, 0, 2),), "stop", "7")
    """

    prompt_id: str
    index: int
    prompt_token_ids: NDArray[np.int32]
    """[N] token ids."""
    token_ids: NDArray[np.int32]
    """[T] token ids, the end-of-sequence token included when the model wrote it."""
    logprobs: NDArray[np.float32]
    """[T] rollout_logps, of the sampling policy after temperature, over the tokens that top_p, top_k and min_p left; 0 at the
    environment's tokens, and unused there."""
    versions: tuple[VersionSpan, ...]
    """Spans in order, without overlaps, of the tokens that a policy sampled. The rest of [0, T) is the environment's: inputs, never
    targets."""
    finish_reason: str
    """The reason why sampling ended: `stop` or `length`; of an episode also `max_turns`, `max_tool_calls`, `environment_done`,
    `parse_error`, `context_overflow` or `environment_failed`."""
    text: str
    """The completion, decoded once without the token that ended the turn, for rewards and people; it is never tokenized again."""
    routes: NDArray[np.integer] | None = None
    """[N + T - 1, L, k] the experts that each token but the last took in each layer; None unless `rollout.keep_routing`."""
    episode: Episode | None = None
    """What an environment's episode adds; None: one turn."""

    @property
    def num_sampled(self) -> int:
        """The number of completion tokens that a policy sampled."""
        return sum([span.end - span.start for span in self.versions])

    @property
    def min_version(self) -> int | None:
        """The oldest policy version that sampled one of its tokens; None: none was sampled."""
        return min([span.version for span in self.versions], default=None)


@record
class SampleInfo:
    """What the loop needs to know of a sample; the tokens stay behind `ref`."""

    prompt_id: str
    index: int
    num_prompt_tokens: int
    num_tokens: int
    """The number of completion tokens, T: what memory is planned by."""
    min_version: int | None
    """The oldest policy version that sampled one of its tokens; None: none was sampled."""
    finish_reason: str
    worker: str
    """The rollout engine that sampled it, e.g. `rollout-0`."""
    ref: Any
    """A handle on a list[Sample] (a Ray ObjectRef in a run; the list itself in a test)."""
    row: int
    """The sample's index in that list."""
    num_environment_tokens: int = 0
    """The number of completion tokens that are the environment's."""
    episode: EpisodeFigures | None = None
    """Figures of an environment's episode; None: one turn."""

    @property
    def num_sampled(self) -> int:
        """The number of completion tokens that a policy sampled: what means are taken over."""
        return self.num_tokens - self.num_environment_tokens


@record
class ScoreRequest:
    """Request to score one sample. The reward worker fetches the text behind `sample.ref` itself."""

    sample: SampleInfo
    prompt_text: str
    messages: list[dict[str, Any]] | None
    columns: dict[str, Any]
    step: int | None = None
    """The last step done when the prompt was dispatched; None in an evaluation."""
    asked: str | list[dict[str, Any]] | None = None
    """The prompt before any template, as in `Prompt`."""
    trainer: TrainerState | None = None
    """Progress of training; None: nothing is trained."""

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
    """The dispatch order over the whole run: batches are sorted by it, so that sums do not depend on timing."""
    dispatched_version: int
    samples: list[SampleInfo] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    part: int | None = None
    """The number of the partial batch that held the group; None: it came with the batch."""
    steps: list[tuple[Step, ...]] = field(default_factory=list)
    """The step advantages of each sample, as in `TrainSample`; empty but for `algorithm.advantage: process`."""

    @property
    def min_version(self) -> int:
        """The oldest policy version that sampled one of its tokens; the one that it was dispatched under if none was sampled."""
        return min([s.min_version for s in self.samples if s.min_version is not None], default=self.dispatched_version)


@record
class TrainSample:
    """One sequence of a batch: where its tokens are, and what else the loss needs.

    Example: TrainSample(ref, 2, "train/0/17", index=2, num_prompt_tokens=2, num_tokens=2, group=0, reward=1.0, advantage=0.7)
    """

    ref: Any
    row: int
    prompt_id: str
    index: int
    num_prompt_tokens: int
    num_tokens: int
    group: int
    """The index of its group in the batch."""
    loss_mask: bool = True
    """Whether the sample is trained on; False for a failed score, or a truncated sample under overlong filtering."""
    reward: float = math.nan
    """Its score, NaN without one."""
    advantage: float | None = 0.0
    """Its advantage; with `algorithm.advantage: process` the mean over its tokens, for display. None: the learner computes it from
    the rewards (`AlgorithmConfig.advantages_on_learner`)."""
    part: int | None = None
    """The number of its partial batch, as in `Group`."""
    steps: tuple[Step, ...] = ()
    """The advantages of its tokens with `algorithm.advantage: process`; 0 after the last step."""
    target: float = 0.0
    """For a reward model: the margin by which the chosen answer of the pair should be better, or the label."""
    ref_logps: float | None = None
    """For DPO: ref_logps summed over the completion."""
    num_environment_tokens: int = 0
    """The number of completion tokens that are the environment's, as in `SampleInfo`."""

    @property
    def num_sampled(self) -> int:
        """The number of completion tokens that a policy sampled: what the loss is a mean over."""
        return self.num_tokens - self.num_environment_tokens

    @property
    def advantages(self) -> tuple[float | None, ...]:
        """All advantages that its tokens have, except 0."""
        return tuple(step.value for step in self.steps) or (self.advantage,)


@dataclass(frozen=True)
class TrainBatch:
    """A whole batch, for all learner ranks; each rank takes its own micro-batches from `plan`."""

    step: int
    """The number of the step that trains it."""
    samples: list[TrainSample]
    """[S] samples."""
    temperature: float
    """The rollout engine's temperature: log-probabilities are of logits / temperature."""
    truncation: Truncation = Truncation()
    """The rollout engine's truncation: log-probabilities are over the tokens that it could sample."""

    @property
    def version(self) -> int:
        """The policy version that the step starts with."""
        return self.step - 1


@record
class TimeSpan:
    """What a worker did from `start` to `end`, on the clock of its host (seconds since 1970)."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@record
class Track:
    """What one worker did since its last report; see `grpo_ray.telemetry.activity`. Without spans it was idle all along."""

    worker: str
    """The name of the worker, e.g. `rollout-0`."""
    spans: tuple[TimeSpan, ...]
    """Spans in order, without overlaps."""


@dataclass(frozen=True)
class UpdateReport:
    """The learner's report of one step. Made by rank 0, already reduced over ranks."""

    step: int
    metrics: dict[str, float]
    """Metrics by the names in `grpo_ray.telemetry.catalogue`."""
    seconds: float
    tracks: tuple[Track, ...] = ()
    """One track for each rank, since its last report."""


@dataclass(frozen=True)
class SyncReport:
    """Report of one weight sync."""

    version: int
    seconds: float
    pause_seconds: float
    """The time for which generation was paused."""
    num_bytes: int
    checksum: str
    num_engines: int
    tracks: tuple[Track, ...] = ()
    """One track for each learner rank, since its last report."""
