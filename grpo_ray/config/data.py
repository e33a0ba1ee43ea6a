"""The schema of `data`: the sources of prompts, the filters on them, and the template that shows them to the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from grpo_ray.config.base import HomePath, PositiveInt, Strict


class DataSource(Strict):
    path: HomePath
    """The source: `file.jsonl`, `file.parquet`, a Hugging Face data set (name or folder), `reasoning_gym:TASK`, or
    `python:module.function`, which returns rows."""
    package: str | None = None
    """The installed package that holds the function `python:package.module.function`; see `reward.functions`."""
    name: str | None = None
    """The subset of a Hugging Face data set; for these only."""
    split: str = "train"
    """The split, or a part of one in the syntax of Hugging Face's `datasets`: `train[:50%]`, `train[100:200]`. Files and generators
    have one split, `train`."""
    args: dict[str, Any] = {}
    """Arguments of the generator; for reasoning_gym and python only."""
    columns: dict[str, str] = {}
    """Column name here -> column name in the data, with dots for nested ones: `{prompt: question, answer: metadata.answer}`."""
    limit: PositiveInt | None = None
    """The number of first rows of the split to keep."""

    @property
    def is_generator(self) -> bool:
        return self.path.startswith(("reasoning_gym:", "python:"))

    @property
    def is_file(self) -> bool:
        return not self.is_generator and self.path.endswith((".jsonl", ".ndjson", ".parquet"))

    @property
    def told(self) -> str:
        """The source with its split, where that is not the usual one."""
        return self.path + (f" {self.split}" if self.split != "train" else "")


def _one_or_named(value: Any) -> str:
    """The form that `data.eval` has. The tags are in angle brackets: `_explain` leaves them out of what a user reads."""
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
    """The template: `chat` (the tokenizer's own; `chat:NAME` if it has several), `raw` (the prompt as it is), `r1`, `r1_zero`, or
    the path of a Jinja file."""
    system: str | None = None
    """The system message of prompts that have none, under a chat template, put before strings and conversations."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. `{enable_thinking: false}`. A row's column of this name takes precedence, and a row's
    column `tools` is passed too (TRL's names; verl's apply_chat_template_kwargs)."""
    shuffle: bool = True
    max_prompt_length: PositiveInt = 512
    """The largest number of tokens of a prompt."""
    long_prompts: Literal["drop", "error"] = "drop"
    """The treatment of longer prompts: dropped and counted, or refused."""
    exclude_eval: bool = True
    """Whether training rows are dropped if their prompt is also in the evaluation set."""
    last_batch: Literal["short", "wrap", "drop"] = "short"
    """The treatment of the last rows of num_epochs, if they don't fill a batch; before them, batches span the ends of epochs.
    short: they form a smaller batch, so every row is trained exactly once per epoch. wrap: the batch is filled up from the next
    epoch, whose first rows are trained once too often. drop: they are left out. Without effect if num_steps is given."""

    @property
    def eval_sets(self) -> dict[str, DataSource]:
        """Name -> source of each evaluation set; a single one has the name ''."""
        if self.eval is None:
            return {}
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}
