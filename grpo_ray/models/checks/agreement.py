"""Whether a model's log-probabilities and their gradient, by the path on which it is trained, are those of its own forward.

    own    the class's forward of one sequence at a time, in evaluation mode, with its own attention, up to its logits
    path   packed, with shared prompts, in training mode, twice; or the plain path

The gradient is that of the embedded tokens: it passes every layer, and no parameter's gradient is touched. What rounding alone
does is measured beside it: the own forward again, of embedded tokens that are off by their last bit.

Suffixes: C completion tokens, K of them compared, N tokens of the micro-batch, n of a slice of it, T of a sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch, PackItem, pack
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.errors import kind_and_line
from grpo_ray.models.plain import own_attention
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.reward import RewardModel

_SIZES = ((6, (9, 4)), (3, (17,)), (8, (3,)))
"""The length of each prompt, and of its completions."""
_STRICT = {torch.float32: (1.0, 8.0, 2e-5), torch.bfloat16: (0.75, 3.0, 5e-3)}
"""What two right ways may differ by: the quantile of tokens that is looked at, how many times the effect of rounding it may be,
and what it may be however little rounding does. In bf16 which expert a router takes may be a matter of rounding."""
_WRONG = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model raises whose arguments or attention are not those that a path takes them for."""


@dataclass(frozen=True)
class Gap:
    """How far a path is from the model's own forward, and in `rounding` that from itself."""

    values: float
    """Nats of a log-probability, or the difference of a reward model's score."""
    gradient: float
    """The gradient's, at a token, over the mean token's length."""
    rounding: tuple[float, float] = (0.0, 0.0)
    """Both, between two own forwards that round differently."""
    error: str = ""
    """Why the path computes nothing."""

    def closes(self, dtype: torch.dtype) -> bool:
        """Whether the difference is one of rounding, in this dtype."""
        _, roundings, least = _STRICT[dtype]
        gaps = zip((self.values, self.gradient), self.rounding, strict=True)
        return not self.error and all(gap <= max(least, roundings * rounding) for gap, rounding in gaps)

    def __str__(self) -> str:
        if self.error:
            return self.error
        return f"log-probabilities are off by {self.values:.2g} nats, the gradient by {self.gradient:.1%}"


@dataclass(frozen=True)
class _Computed:
    values_K: Tensor
    gradient: Tensor
    """[N, H], or [n, H] where the micro-batch is shared."""


@dataclass(frozen=True)
class _Question:
    """What both ways compute."""

    batch: PackedBatch
    compared_C: Tensor
    """[C] bool."""
    weights_C: Tensor
    """[C] of each value in the sum whose gradient is taken."""

    @classmethod
    def to(cls, model: PolicyModel | RewardModel, device: torch.device, *, share_prompts: bool) -> _Question:
        batch = pack(_items(model.hf.config), share_prompts=share_prompts)
        # A reward model's own forward scores whole texts.
        last_C = np.append(np.diff(batch.segments) > 0, True)
        compared_C = last_C if isinstance(model, RewardModel) else np.ones_like(last_C)
        weights_C = np.random.default_rng(1).standard_normal(len(last_C))
        return cls(
            batch, torch.from_numpy(compared_C).to(device), torch.from_numpy(weights_C).to(device, torch.float32)
        )

    def of_sequence(self, number: int) -> Tensor:
        """[C] bool, the compared values of one sequence."""
        segments = torch.from_numpy(self.batch.segments).to(self.compared_C.device)
        return (segments == number) & self.compared_C


def gap_of(model: PolicyModel | RewardModel, *, share_prompts: bool, training: bool = True) -> Gap:
    """Compare the path of a model that is being trained with its own forward, on a few short sequences; all ranks together.

    Args:
        training: whether the path is in training mode; not where dropout is wanted, which nothing agrees with.
    """
    device = next(model.parameters()).device
    question = _Question.to(model, device, share_prompts=share_prompts)
    with _undisturbed(model):
        try:
            found = [_by_path(model, question, training=training) for _ in range(2)]
            own, rounded = _own(model, question), _own(model, question, _off_by_a_bit)
        except _WRONG as e:
            return Gap(torch.inf, torch.inf, error=kind_and_line(e))
    values, gradient = (max(gaps) for gaps in zip(*(_distance(each, own, model) for each in found), strict=True))
    return Gap(values, gradient, _distance(rounded, own, model))


def _items(config: Any) -> list[PackItem]:
    """Sequences of random tokens that mean nothing special."""
    text = config.get_text_config()
    special = {i for name, i in vars(text).items() if "token" in name and isinstance(i, int)}
    rng = np.random.default_rng(0)
    ids = np.setdiff1d(rng.integers(0, text.vocab_size, 512), list(special))
    prompts = [(rng.choice(ids, length), lengths) for length, lengths in _SIZES]
    return [
        PackItem(prompt, rng.choice(ids, length), np.zeros(length, np.float32), 0.0, 1.0, 0)
        for prompt, lengths in prompts
        for length in lengths
    ]


def _by_path(model: PolicyModel | RewardModel, question: _Question, *, training: bool) -> _Computed:
    batch = question.batch
    model.train(training)
    with _embedded(model.hf) as seen:
        values_C, _ = model(batch, 1.0)
    values_K = values_C[question.compared_C]
    gradient = _gradient(values_K, question.weights_C[question.compared_C], seen)
    if not model.plain:
        return _Computed(values_K.detach(), gradient[0])
    total_NH = gradient.new_zeros(len(batch.input_ids), gradient.shape[-1])
    for tokens, row in zip(batch.tokens_of_sequences, gradient, strict=True):
        total_NH[torch.from_numpy(tokens)] += row[: len(tokens)]
    return _Computed(values_K.detach(), total_NH)


def _own(
    model: PolicyModel | RewardModel, question: _Question, change: Callable[[Tensor], Tensor] | None = None
) -> _Computed:
    """The own forward; `change` is applied to the embedded tokens."""
    hf: Any = model.hf
    batch, device = question.batch, question.weights_C.device
    values, total_NH = [], None
    model.eval()
    with own_attention(hf), torch.compiler.set_stance("force_eager"):
        for number, tokens in enumerate(batch.tokens_of_sequences):
            mine_C, ids = question.of_sequence(number), batch.input_ids[tokens]
            if not isinstance(model, RewardModel):
                # It changes nothing unless the model sees what comes after a token.
                ids = np.append(ids, batch.targets[batch.segments == number][-1])
            with _embedded(hf, change) as seen:
                logits = hf(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False).logits
            values.append(_values(model, logits[0], batch, number))
            gradient_TH = _gradient(values[-1], question.weights_C[mine_C], seen)[0, : len(tokens)]
            if total_NH is None:
                total_NH = gradient_TH.new_zeros(len(batch.input_ids), gradient_TH.shape[-1])
            total_NH[torch.from_numpy(tokens)] += gradient_TH
    assert total_NH is not None
    return _Computed(torch.cat(values).detach(), total_NH)


def _values(model: PolicyModel | RewardModel, logits: Tensor, batch: PackedBatch, number: int) -> Tensor:
    """The compared values of a sequence, from its logits [T, V], or from its score [1]."""
    if isinstance(model, RewardModel):
        return logits.float()
    mine = batch.segments == number
    places = torch.from_numpy(batch.position_ids[batch.target_rows[mine]]).to(logits.device)
    targets = torch.from_numpy(batch.targets[mine]).to(logits.device)
    return logits[places].float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def _gradient(values: Tensor, weights: Tensor, seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise ValueError(f"the input embeddings are used {len(seen)} times in a forward pass, not once")
    (gradient,) = torch.autograd.grad((values * weights).sum(), seen)
    return gradient.float()


@contextmanager
def _embedded(hf: Any, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """The embedded tokens of the forward passes inside, as leaves of their graphs."""
    seen: list[Tensor] = []

    def leaf(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        value = out.detach()
        seen.append((value if change is None else change(value)).requires_grad_())
        # Some models write into it.
        return seen[-1].clone()

    handle = hf.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield seen
    finally:
        handle.remove()


def _off_by_a_bit(x: Tensor) -> Tensor:
    """Each value with its last bit up, down or as it was."""
    signs = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    return x + x * signs * torch.finfo(x.dtype).eps


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """A context that leaves modes and random numbers as they were. Activations are kept inside: what computes them again under
    ZeRO-3 has no gradient of anything but parameters."""
    training = model.training
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        model.train(training)
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _distance(got: _Computed, own: _Computed, model: PolicyModel | RewardModel) -> tuple[float, float]:
    """The difference of the values, and of the gradients at a token over the mean token's length, of nearly all tokens."""
    apart_n = (got.gradient - _rows_of(own.gradient, len(got.gradient), model.ranks)).norm(dim=-1)
    usual = own.gradient.norm(dim=-1).mean().clamp_min(1e-30)
    apart_K = (got.values_K - own.values_K).abs()
    quantile = _STRICT[next(model.parameters()).dtype][0]
    return float(apart_K.quantile(quantile)), float(apart_n.quantile(quantile) / usual)


def _rows_of(gradient_NH: Tensor, num: int, ranks: SequenceRanks) -> Tensor:
    """All rows, if there are so many; else those of this rank's slice, with zeros for its padding."""
    if num == len(gradient_NH):
        return gradient_NH
    filled = nn.functional.pad(gradient_NH, (0, 0, 0, max(0, num * ranks.size - len(gradient_NH))))
    return filled[ranks.rank * num : (ranks.rank + 1) * num]
