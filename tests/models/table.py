"""Every causal model class of Transformers, small and random: the learner's path against the class's own forward and gradient.

python -m tests.models.table [KIND ...]
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.config.model import ModelConfig
from grpo_ray.errors import ConfigError, kind_and_line
from grpo_ray.models.attention import PACKED
from grpo_ray.models.checks.agreement import gap_of
from grpo_ray.models.features.dropout import without_noise
from grpo_ray.models.features.rope import has_ropes_by_length, use_ropes_of_each_sequence
from grpo_ray.models.multimodal import is_multimodal, name_in_whole, text_part
from grpo_ray.models.plain import use_own_attention
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.trainable import skeleton
from tests.models.multimodal import multimodal_config, multimodal_model
from tests.models.small import small_config, small_model

MAX_NATS = 1e-5
MAX_GRADIENT = 1e-4
LIMIT_S = 120
MEMORY = 8 << 30
"""Some configs have parts that no option makes small."""


@dataclass(frozen=True)
class Row:
    """What became of one class."""

    way: Literal["packed", "plain", "refused", "wrong", "not made"]
    reason: str = ""
    """Why it does not pack, or is refused, or could not be made small."""
    nats: float = 0.0
    """The largest difference of a log-probability."""
    gradient: float = 0.0
    """The difference of the gradient of all parameters, relative."""


def compared(kind: str) -> Row:
    """The learner's choice for a small model of this kind, held against a plain loop over its own forward."""
    try:
        config = multimodal_config(kind) if is_multimodal(CONFIG_MAPPING[kind]()) else small_config(kind)
    except Exception as e:
        return Row("not made", kind_and_line(e))
    try:
        _, reason = skeleton(config, ModelConfig(path=kind))
        model = as_a_learner_has_it(_text_model(config, None if reason else PACKED), plain=bool(reason))
    except (ConfigError, ValueError) as e:
        return Row("refused", str(e))
    gap = gap_of(model, share_prompts=shares_prompts(model))
    if not gap.closes(torch.float32) and not reason:
        reason = f"packed, {gap}"
        use_own_attention(model.hf)
        model.plain = True
        gap = gap_of(model, share_prompts=False)
    if not gap.closes(torch.float32):
        return Row("refused", f"the plain way {gap}; {reason}")
    return _against_a_loop(model, multimodal_model(config) if is_multimodal(config) else small_model(config), reason)


def _text_model(config: Any, attention: str | None) -> nn.Module:
    if not is_multimodal(config):
        return small_model(config, attention)
    part: nn.Module = text_part(multimodal_model(config), "it", attention)
    return part


def as_a_learner_has_it(hf: nn.Module, *, plain: bool) -> PolicyModel:
    """As `actors.learner.build.load_hf` makes it, without loading."""
    use_ropes_of_each_sequence(hf)
    without_noise(hf)
    return PolicyModel(hf, chunk=16, plain=plain).train()


def shares_prompts(model: PolicyModel) -> bool:
    return not model.plain and not has_ropes_by_length(model)


def _against_a_loop(model: PolicyModel, own: nn.Module, reason: str) -> Row:
    items = make_items()
    weights_C = torch.from_numpy(np.concatenate([i.rollout_logprobs for i in items]))
    want_C = loop_logprobs(own.eval(), items)
    got_C, _ = model(pack(items, share_prompts=shares_prompts(model), padded=model.plain), 1.0)
    for logps_C in (want_C, got_C):
        (logps_C * weights_C).sum().backward()
    nats = float((got_C - want_C).detach().abs().max())
    trained = {name_in_whole(model.hf, name): param for name, param in model.hf.named_parameters()}
    gradient = _apart(trained, {name: param for name, param in own.named_parameters() if name in trained})
    # A rank with less to compute than others gets this.
    finite = bool(model(pack([]), 1.0)[0].isfinite().all())
    right = nats <= MAX_NATS and gradient <= MAX_GRADIENT and finite
    return Row(("plain" if model.plain else "packed") if right else "wrong", reason, nats, gradient)


def _apart(got: dict[str, nn.Parameter], want: dict[str, nn.Parameter]) -> float:
    """|a - b| / |b| of all gradients."""
    assert got.keys() == want.keys()
    pairs = [(got[n].grad, want[n].grad) for n in want if got[n].grad is not None or want[n].grad is not None]
    apart = [((0 if a is None else a) - (0 if b is None else b)) for a, b in pairs]
    size = torch.stack([b.double().norm() for _, b in pairs if b is not None]).norm()
    return float(torch.stack([torch.as_tensor(x).double().norm() for x in apart]).norm() / size)


def make_items() -> list[PackItem]:
    """Two samples of one prompt, and one each of two others, with random weights in place of their log-probabilities."""
    rng = np.random.default_rng(3)
    prompts = [(rng.integers(3, 96, n), lengths) for n, lengths in ((5, (12, 6)), (9, (20,)), (2, (3,)))]
    return [
        PackItem(prompt, rng.integers(3, 96, t), rng.normal(size=t).astype(np.float32), 0.0, 1.0, 0)
        for prompt, lengths in prompts
        for t in lengths
    ]


def loop_logprobs(hf: Any, items: Sequence[PackItem]) -> Tensor:
    """[C] sequence by sequence, as anybody would write it."""
    found = []
    for i in items:
        ids = torch.from_numpy(np.concatenate([i.prompt_ids, i.completion_ids]))
        logits = hf(input_ids=ids[None], use_cache=False).logits[0, len(i.prompt_ids) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, torch.from_numpy(i.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(kinds: list[str]) -> int:
    """Print the table; returns how many are wrong."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ways: Counter[str] = Counter()
    print(f"{'model_type':24} {'way':8} {'nats':>8} {'gradient':>8} {'s':>5}  why")
    for kind in kinds or dict.fromkeys(
        [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    ):
        started = time.monotonic()
        try:
            with within(LIMIT_S):
                row = compared(kind)
        except Exception as e:
            row = Row("not made", kind_and_line(e))
        ways[row.way] += 1
        seconds = time.monotonic() - started
        print(
            f"{kind:24} {row.way:8} {row.nats:8.0e} {row.gradient:8.0e} {seconds:5.1f}  {' '.join(row.reason.split())}",
            flush=True,
        )
    print(", ".join(f"{number} {way}" for way, number in ways.most_common()))
    return ways["wrong"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) and 1)
