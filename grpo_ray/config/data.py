"""The schema of `data`: where prompts come from, what becomes of them, and how they are shown to the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from grpo_ray.config.base import HomePath, PositiveInt, Strict


class DataSource(Strict):
    path: HomePath
    """`file.jsonl`, `file.parquet`, a Hugging Face data set (name or folder), `reasoning_gym:TASK`, or
    `python:module.function` that returns rows."""
    package: str | None = None
    """The installed package whose function `python:package.module.function` is; see `reward.functions`."""
    name: str | None = None
    """Subset; of Hugging Face data sets alone."""
    split: str = "train"
    """Also a part of one, in the words of Hugging Face's `datasets`: `train[:50%]`, `train[100:200]`. Files and generators have one
    split, `train`."""
    args: dict[str, Any] = {}
    """Passed to the generator; of reasoning_gym and python alone."""
    columns: dict[str, str] = {}
    """Name here -> name in the data, dots for nested ones: `{prompt: question, answer: metadata.answer}`."""
    limit: PositiveInt | None = None
    """Only the first rows, of the split."""

    @property
    def is_generator(self) -> bool:
        return self.path.startswith(("reasoning_gym:", "python:"))

    @property
    def is_file(self) -> bool:
        return not self.is_generator and self.path.endswith((".jsonl", ".ndjson", ".parquet"))


def _one_or_named(value: Any) -> str:
    """Which form `data.eval` has. The tags are in angle brackets: `_explain` leaves them out of what a user reads."""
    named = (
        isinstance(value, dict)
        and "path" not in value
        and any(isinstance(v, dict | DataSource) for v in value.values())
    )
    return "<named>" if named else "<one>"


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
EvalSources = Annotated[
    Annotated[DataSource, Tag("<one>")] | Annotated[dict[SetName, DataSource], Tag("<named>")],
    Discriminator(_one_or_named),
]


class DataConfig(Strict):
    train: DataSource
    eval: EvalSources | None = None
    """One source (`eval/accuracy`), or several by name (`eval/NAME/accuracy`): `{math: {path: ..}, aime: {path: ..}}`."""
    template: HomePath = "chat"
    """`chat` (the tokenizer's own; `chat:NAME` where it has several), `raw` (the prompt as it is), `r1`, `r1_zero`, or the path of
    a Jinja file."""
    system: str | None = None
    """System message of prompts that have none, under a chat template: put before strings, and before conversations that begin
    without one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. `{enable_thinking: false}`. A row's column of this name comes before it, and a row's
    column `tools` is shown too (TRL's names; verl's apply_chat_template_kwargs)."""
    shuffle: bool = True
    max_prompt_length: PositiveInt = 512
    """Tokens."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What becomes of longer ones: dropped and counted, or refused."""
    exclude_eval: bool = True
    """Drop training rows whose prompt is also in the evaluation set."""
    last_batch: Literal["short", "wrap", "drop"] = "short"
    """What becomes of the last rows of num_epochs, when they don't fill a batch; batches run over the ends of the epochs before.
    short: they are a smaller batch, so every row is trained exactly once an epoch. wrap: it is filled up from the epoch after,
    whose first rows are trained once too often. drop: they are left out. Without effect where num_steps is given."""

    @property
    def eval_sets(self) -> dict[str, DataSource]:
        """Name -> source; a single one has the name ''."""
        if self.eval is None:
            return {}
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}
