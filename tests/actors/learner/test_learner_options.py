"""Two real DeepSpeed ranks with every option of the optimizer off its default, parameter by parameter against a plain PyTorch loop.

The loop shares no code with the learner: groups of weight decay by their names, schedules by their formulas, PPO's losses written
out. One start of the ranks serves all ZeRO stages: each case gives them new engines.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn

from actors.learner.build import LearnerSpec, build_engine
from actors.learner.critic import Critic
from actors.learner.group import LearnerGroup, _spec
from actors.zero import gathered
from grpo_ray.errors import WorkerError
from grpo_ray.types import TrainBatch, TrainSample
from tests.actors.learner.test_learner import make_batch, make_config, plain_logprobs, plain_model, run

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(400), pytest.mark.long]

NUM_STEPS = 2
OPTIMIZER_STEPS = NUM_STEPS * 2 * 2
"""Mini-batches x iterations, of the whole run."""
WARMUP, CRITIC_WARMUP = 2, 3
OPTIONS: dict[str, Any] = {
    "learning_rate": 0.002,
    "warmup_steps": WARMUP,
    "min_lr_ratio": 0.3,
    "weight_decay": 0.4,
    "adam_betas": (0.6, 0.7),
    "adam_eps": 1e-4,
    "max_grad_norm": 0.02,
    "micro_batch_tokens": 100,
}
ALGORITHM: dict[str, Any] = {
    "preset": "ppo",
    "num_mini_batches": 2,
    "num_iterations": 2,
    "gamma": 0.98,
    "lam": 0.9,
    "std_eps": 0.05,
    "epsilon_low": 0.01,
    "epsilon_high": 0.02,
    "dual_clip_c": 1.03,
}
CRITIC: dict[str, Any] = {"learning_rate": 0.003, "warmup_steps": CRITIC_WARMUP, "value_clip_range": 0.02}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda n: min(n / WARMUP, 1.0),
    "linear": lambda n: n / WARMUP if n < WARMUP else (OPTIMIZER_STEPS - n) / (OPTIMIZER_STEPS - WARMUP),
    "cosine": lambda n: n / WARMUP if n < WARMUP else half_wave(n),
    "cosine_with_min_lr": lambda n: n / WARMUP if n < WARMUP else 0.3 + 0.7 * half_wave(n),
}


def half_wave(n: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (n - WARMUP) / (OPTIMIZER_STEPS - WARMUP)))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose config asks for dropout, with biases and norms that weight decay would move."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("options") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    torch.manual_seed(3)
    weights = load_file(folder / "model.safetensors")
    moved = {n: w + 0.2 * torch.randn_like(w) if w.ndim == 1 else w for n, w in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ranks(local_ray: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerGroup]:
    config = make_config(checkpoint, ranks=2, stage=2, deadlines={"start_s": 280})
    group = run(LearnerGroup.create(config, str(checkpoint), str(tmp_path_factory.mktemp("ranks"))), 300)
    yield group
    asyncio.run(group.close())


def on_all(group: LearnerGroup, work: Callable[[Any], Any]) -> list[Any]:
    return ray.get([a.__ray_call__.remote(work) for a in group._actors], timeout=100)


def give_engines(group: LearnerGroup, spec: LearnerSpec) -> None:
    def build(actor: Any) -> None:
        actor._engine = build_engine(spec, actor.device, actor._ranks)
        actor._critic = Critic(spec, actor.device, actor._ranks)
        actor._configure(spec)

    on_all(group, build)


def parameters(actor: Any) -> list[dict[str, Tensor]]:
    """Of policy and critic. A collective."""
    out = []
    for module in (actor._engine.module.hf, actor._critic.engine.module):
        with gathered(list(module.parameters())):
            out.append({n: p.detach().clone() for n, p in module.named_parameters()})
    return out


@dataclass
class PlainAdamW:
    """AdamW with a clip, a schedule, and weight decay for all but norms and biases."""

    module: nn.Module
    rate: float
    schedule: Callable[[int], float]
    optimizer: torch.optim.AdamW = field(init=False)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = dict(self.module.named_parameters())
        spared = {n for n in named if "norm" in n or n.endswith("bias")}
        assert len(spared) > 5
        decayed = {"params": [p for n, p in named.items() if n not in spared], "weight_decay": OPTIONS["weight_decay"]}
        self.optimizer = torch.optim.AdamW(
            [decayed, {"params": [named[n] for n in spared], "weight_decay": 0.0}],
            lr=self.rate,
            betas=OPTIONS["adam_betas"],
            eps=OPTIONS["adam_eps"],
        )

    def step(self) -> None:
        self.rates.append(self.rate * self.schedule(len(self.rates)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[-1]
        params = list(self.module.parameters())
        norm = torch.stack([p.grad.square().sum() for p in params if p.grad is not None]).sum().sqrt()
        self.norms.append(norm.item())
        for p in params:
            p.grad *= min(1.0, OPTIONS["max_grad_norm"] / (norm.item() + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainCritic(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.body = plain_model(path).model
        self.head = nn.Linear(self.body.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def of(self, sample: TrainSample) -> Tensor:
        """[T]"""
        row = sample.ref[sample.row]
        ids = torch.from_numpy(np.concatenate([row.prompt_token_ids, row.token_ids]).astype(np.int64))[None]
        hidden = self.body(ids, use_cache=False).last_hidden_state[0]
        return self.head(hidden)[sample.num_prompt_tokens - 1 : -1, 0]


def advantages_of(rewards: list[float], values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Whitened GAE, and returns."""
    advantages = []
    for reward, of_sample in zip(rewards, values, strict=True):
        column, following = torch.zeros_like(of_sample), torch.tensor(0.0)
        for t in reversed(range(len(column))):
            ahead = of_sample[t + 1] * ALGORITHM["gamma"] if t + 1 < len(column) else reward
            following = ahead - of_sample[t] + ALGORITHM["gamma"] * ALGORITHM["lam"] * following
            column[t] = following
        advantages.append(column)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    pooled = torch.cat(advantages)
    scale = pooled.std(correction=0) + ALGORITHM["std_eps"]
    return [(a - pooled.mean()) / scale for a in advantages], returns


def plain_ppo_update(
    policy: nn.Module, critic: PlainCritic, optimizers: tuple[PlainAdamW, PlainAdamW], batch: TrainBatch
) -> None:
    members = [s for s in batch.samples if s.loss_mask]
    with torch.no_grad():
        old = [plain_logprobs(policy, s.ref[s.row]) for s in members]
        before = [critic.of(s) for s in members]
    advantages, returns = advantages_of([s.reward for s in members], before)
    low, high, dual = (ALGORITHM[name] for name in ("epsilon_low", "epsilon_high", "dual_clip_c"))
    for half in ((0, 1), (2, 3)) * ALGORITHM["num_iterations"]:
        chosen = [k for k, s in enumerate(members) if s.group in half]
        num_tokens = sum(members[k].num_tokens for k in chosen)
        for k in chosen:
            ratio, a = (plain_logprobs(policy, members[k].ref[members[k].row]) - old[k]).exp(), advantages[k]
            clipped = torch.max(-ratio * a, -ratio.clamp(1 - low, 1 + high) * a)
            (torch.where(a < 0, torch.min(clipped, -dual * a), clipped).sum() / num_tokens).backward()
            values, reach = critic.of(members[k]), CRITIC["value_clip_range"]
            bounded = before[k] + (values - before[k]).clamp(-reach, reach)
            worse = torch.max((values - returns[k]).square(), (bounded - returns[k]).square())
            (0.5 * worse.sum() / num_tokens).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor], what: str) -> None:
    """Each parameter, relative to how far it has come."""
    for name, value in want.items():
        moved = (value - start[name]).norm()
        assert moved > 1e-6, name
        assert (got[name] - value).norm() < 1e-4 * moved + 1e-7, (what, name)


PASSED: dict[str, Any] = {
    "communication_data_type": "fp32",
    "zero_optimization": {"reduce_bucket_size": 3e4, "overlap_comm": False},
}
"""Options of DeepSpeed that change how it computes an update, and not the update."""


def passed_on(actor: Any) -> list[tuple[Any, ...]]:
    """The settings of PASSED as the engines of policy and critic have them."""
    engines = (actor._engine, actor._critic.engine)
    return [(e.optimizer.reduce_bucket_size, e.communication_data_type) for e in engines]


@pytest.mark.parametrize(
    ("stage", "schedule"), [(0, "constant"), (1, "linear"), (2, "cosine"), (3, "cosine_with_min_lr")]
)
def test_the_updates_are_those_of_a_plain_loop_with_every_option_off_its_default(
    stage: int, schedule: str, ranks: LearnerGroup, checkpoint: Path, tmp_path: Path
) -> None:
    learner = OPTIONS | {"lr_scheduler_type": schedule, "deepspeed": PASSED if stage else {}}
    config = make_config(checkpoint, ranks=2, stage=stage, learner=learner, algorithm=ALGORITHM, critic=CRITIC)
    give_engines(ranks, _spec(config, str(checkpoint), str(tmp_path), has_gpus=False, num_steps=NUM_STEPS))
    if stage:
        assert on_all(ranks, passed_on) == [[(30_000, torch.float32)] * 2] * 2
    policy, critic = plain_model(checkpoint), PlainCritic(checkpoint)
    starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (policy, critic)]
    optimizers = (
        PlainAdamW(policy, OPTIONS["learning_rate"], SCHEDULES[schedule]),
        PlainAdamW(critic, CRITIC["learning_rate"], lambda n: min(n / CRITIC_WARMUP, 1.0)),
    )
    batch = make_batch(group_size=2)
    plain_ppo_update(policy, critic, optimizers, batch)
    metrics = run(ranks.update(batch)).metrics
    assert metrics["lr"] == pytest.approx(optimizers[0].rates[-1], rel=1e-9), "of the last of its optimizer steps"
    assert metrics["update/num_steps"] == 4
    for name, optimizer in zip(("grad_norm", "critic/grad_norm"), optimizers, strict=True):
        assert metrics[name] == pytest.approx(float(np.mean(optimizer.norms)), rel=1e-4), name
        assert sum(norm > 1.5 * OPTIONS["max_grad_norm"] for norm in optimizer.norms) >= 2, "the clip is at work"
    of_policy, of_critic = on_all(ranks, parameters)[0]
    wanted = [{n: p.detach() for n, p in m.named_parameters()} for m in (policy, critic)]
    assert_close(of_policy, wanted[0], starts[0], "policy")
    assert len(of_critic) == len(wanted[1])
    renamed = dict(zip(wanted[1], of_critic.values(), strict=True))
    assert_close(renamed, wanted[1], starts[1], "critic")


def test_weights_are_marked_as_unsent_from_the_moment_an_update_is_asked_for(ranks: LearnerGroup) -> None:
    """An engine that restarts during the update must not be sent weights under the version before it."""

    async def begin() -> None:
        ranks.unsent = False
        batch = make_batch(group_size=2)
        update = asyncio.create_task(ranks.update(batch))
        await asyncio.sleep(0)
        assert not update.done()
        assert ranks.unsent
        # A sync that was asked for after the update sends what it made; an update after the sync makes it unsent again.
        sending = asyncio.create_task(ranks.send_weights(1))
        await asyncio.sleep(0)
        assert not ranks.unsent
        second = asyncio.create_task(ranks.update(batch))
        with pytest.raises(WorkerError, match="before it was connected"):
            await sending
        await asyncio.gather(update, second)
        assert ranks.unsent

    run(begin())
