"""The reward by a trained reward model's score of a text."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.data.templates import Template, make_template
from grpo_ray.data.tokenized import answer_ids, tokenize
from grpo_ray.errors import ConfigError, DataError, RewardError, first_line
from grpo_ray.rewards.functions.function import Completions, Conversation, text_of

SERVER_S = 60.0
"""The deadline for one batch, its retries included."""
_Forward = Callable[[list[NDArray[np.int32]]], list[float]]


def reward_model(
    prompts: Completions,
    completions: Completions,
    path: str,
    url: str | None = None,
    batch_tokens: int = 8192,
    num_threads: int = 1,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> list[float | RewardError]:
    """The score of prompt and completion by a sequence classifier with one label, `grpo-ray reward-model`'s or another.

    A conversation gets the chat template of the model's own tokenizer, as in its training; a text is taken as it is. The model is
    loaded once in each scoring process, on its GPU if Ray gave it one (`workers.num_gpus`), else on CPUs: use `workers` of its own,
    which call it with many samples at once. `batch_tokens` are those of one forward pass, padding included; `num_threads` is for
    CPUs.

    With `url` vLLM computes it: `vllm serve PATH --runner pooling` on any machine; only its tokenizer is read here.

    Range: that of the model's training; if that was on pairs, only differences are meaningful. A text beyond the model's context
    fails alone.

    Raises:
        RewardError: the model can't be loaded, has more than one label, or its server does not answer.
    """
    model = _load(path, url, num_threads, dtype, trust_remote_code)
    return model.scores(prompts, completions, batch_tokens)


def check_reward_model(args: dict[str, Any]) -> None:
    """Check what is known without loading the model."""
    path = args.get("path")
    if not isinstance(path, str):
        raise RewardError(
            "reward 'reward_model' needs args: {path: FOLDER}, the hf/ of a run of `grpo-ray reward-model`"
        )
    folder = Path(path)
    if (path.startswith((".", "/", "~")) or path.count("/") != 1) and not (folder / "config.json").is_file():
        raise RewardError(
            f"reward 'reward_model': {path} holds no model (no config.json); train it first, or mend args.path"
        )


def load_reward_model(args: dict[str, Any]) -> None:
    given = {"url": None, "num_threads": 1, "dtype": "float32", "trust_remote_code": False} | args
    _load(given["path"], given["url"], given["num_threads"], given["dtype"], given["trust_remote_code"])


class _Scorer:
    """The path from texts to token ids to scores, with a `forward` for batches of texts."""

    def __init__(self, path: str, forward: _Forward, trust_remote_code: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer

        with _told(path):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if config.num_labels != 1:
            raise RewardError(f"reward 'reward_model': {path} has {config.num_labels} labels, expected 1, a score")
        self._forward = forward
        self._context = int(config.get_text_config().max_position_embeddings)
        self._templates: dict[str, Template] = {}

    def scores(self, prompts: Completions, completions: Completions, batch_tokens: int) -> list[float | RewardError]:
        texts = [self._ids(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        out: list[float | RewardError] = [
            RewardError(f"the text has {len(ids)} tokens, the reward model's context is {self._context}")
            for ids in texts
        ]
        fitting = sorted((i for i, ids in enumerate(texts) if len(ids) <= self._context), key=lambda i: len(texts[i]))
        while fitting:
            # The longest come first: what exceeds the memory shows at once.
            count = max(1, batch_tokens // len(texts[fitting[-1]]))
            fitting, some = fitting[:-count], fitting[-count:]
            for i, score in zip(some, self._forward([texts[i] for i in some]), strict=True):
                out[i] = score
        return out

    def _ids(self, prompt: str | Conversation, completion: str) -> NDArray[np.int32]:
        """The token ids, as in training."""
        name = "raw" if isinstance(prompt, str) else "chat"
        try:
            if name not in self._templates:
                self._templates[name] = make_template(name, self._tokenizer)
            template = self._templates[name]
            rendered = template(prompt, {})
            (ids,) = tokenize(self._tokenizer, [rendered])
            answer = answer_ids(self._tokenizer, template, rendered, ids, completion, sampled=True)
            return np.concatenate([ids, answer])
        except (DataError, ConfigError) as e:
            raise RewardError(f"reward 'reward_model': {e}") from None


class _Here:
    """The model in this process."""

    def __init__(self, path: str, num_threads: int, dtype: str, trust_remote_code: bool) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from grpo_ray.models.attention import use_attention_without_plans
        from grpo_ray.models.cuda import driver_version, why_no_cuda
        from grpo_ray.models.features.rope import has_ropes_by_length
        from grpo_ray.models.files.checkpoint_tensors import read_model

        torch.set_num_threads(num_threads)
        reason = why_no_cuda()
        # A variable may be left over where there is no driver.
        if reason is not None and os.environ.get("CUDA_VISIBLE_DEVICES") and driver_version() is not None:
            raise RewardError(
                f"reward 'reward_model': its process was given a GPU, and {reason}; or set workers.num_gpus to 0"
            )
        self._device = torch.device("cpu" if reason is not None else "cuda")
        use_attention_without_plans()
        with _told(path):
            self._model, _ = read_model(
                AutoModelForSequenceClassification,
                path,
                reward_model=False,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )
        self._model.to(self._device).eval()
        self._pad: int | None = self._model.config.get_text_config().pad_token_id
        self._alone = self._pad is None or has_ropes_by_length(self._model)
        """Whether each text is a batch of its own: it can't be padded, or its positions would be those of the longest."""

    def __call__(self, texts: list[NDArray[np.int32]]) -> list[float]:
        if self._alone and len(texts) > 1:
            return [score for text in texts for score in self([text])]
        import torch

        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self._pad or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


class _Served:
    """The model behind vLLM's `/classify`. Retries and their back-off are those of OpenAI's client."""

    def __init__(self, url: str) -> None:
        from grpo_ray.rewards.endpoints.http_client import make_client

        self._url = url
        self._client = make_client(url, timeout_s=SERVER_S, retries=4)
        self._loop = asyncio.Runner()

    def __call__(self, texts: list[NDArray[np.int32]]) -> list[float]:
        import openai

        try:
            return self._loop.run(self._ask(texts))
        except (openai.OpenAIError, KeyError, TypeError, ValueError, IndexError, OverflowError, TimeoutError) as e:
            raise RewardError(
                f"reward 'reward_model': {self._url}/classify does not score ({type(e).__name__}: {str(e)[:120]}); does it run "
                "`vllm serve PATH --runner pooling`?"
            ) from None

    async def _ask(self, texts: list[NDArray[np.int32]]) -> list[float]:
        from grpo_ray.rewards.endpoints.http_client import post_json

        # Raw scores: vLLM would make probabilities of them.
        body = {"input": [text.tolist() for text in texts], "use_activation": False}
        async with asyncio.timeout(SERVER_S):
            answer = await post_json(self._client, "/classify", body)
        scores = [float(row["probs"][0]) for row in sorted(answer["data"], key=lambda row: row["index"])]
        if len(scores) != len(texts):
            raise ValueError(f"{len(scores)} scores of {len(texts)} texts")
        return scores


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError) as e:
        raise RewardError(f"reward 'reward_model': {path} can't be loaded: {first_line(e)}") from None


@lru_cache(maxsize=4)
def _load(path: str, url: str | None, num_threads: int, dtype: str, trust_remote_code: bool) -> _Scorer:
    forward = _Here(path, num_threads, dtype, trust_remote_code) if url is None else _Served(url)
    return _Scorer(path, forward, trust_remote_code)
