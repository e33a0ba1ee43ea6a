"""Real DeepSpeed ranks under a real Ray, against plain Transformers and PyTorch.

Adam's eps is set to 1 here: the step is then nearly proportional to the gradient, so that equal gradients can be told
from equal signs of gradients.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.learner.build import deepspeed_config
from actors.learner.group import LearnerGroup
from grpo_ray.batch.truncation import keep_mask
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.loading import build
from grpo_ray.config.model import ModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import CheckpointError, ConfigError, DeadlineError, NonFiniteError, WorkerError
from grpo_ray.types import Sample, TrainBatch, TrainSample, Truncation, VersionSpan
from tests.actors.learner.saved import export, load, save

pytestmark = pytest.mark.usefixtures("local_ray")

T = TypeVar("T")
MAX_COMPLETION = 40
LR = 0.5
TEMPERATURE = 0.8


def run(work: Awaitable[T], seconds: float = 150.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(bounded())


def make_config(path: Path, /, *, ranks: int, stage: int, **overrides: dict[str, Any]) -> RunConfig:
    learner = {
        "num_actors": ranks,
        "zero_stage": stage,
        "learning_rate": LR,
        "adam_eps": 1.0,
        "max_grad_norm": 1e6,
        "micro_batch_tokens": 150,
        "logprob_chunk_tokens": 64,
        "num_threads": 1,
    }
    return build(
        RunConfig,
        {
            "num_steps": 10,
            "model": {"path": str(path), "dtype": "float32", **overrides.get("model", {})},
            "data": {"train": {"path": "unused"}, "max_prompt_length": 10},
            "rollout": {"max_completion_length": MAX_COMPLETION, "temperature": TEMPERATURE},
            "reward": {"functions": [{"name": "accuracy"}]},
            "learner": learner | overrides.get("learner", {}),
            "algorithm": overrides.get("algorithm", {}),
            "critic": overrides.get("critic", {}),
            "deadlines": {"start_s": 120, "update_s": 60, "save_s": 60} | overrides.get("deadlines", {}),
        },
        "test",
    )


def start(config: RunConfig | SftConfig, run_dir: Path) -> LearnerGroup:
    assert config.model.path is not None
    return run(LearnerGroup.create(config, config.model.path, str(run_dir)))


def make_batch(num_groups: int = 4, group_size: int = 3, seed: int = 0, step: int = 0) -> TrainBatch:
    """Groups of samples of very different length, whose rewards are their advantages; the last one is masked out.

    `step`: the last step done.
    """
    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for g in range(num_groups):
        prompt = rng.integers(8, 200, int(rng.integers(2, 9))).astype(np.int32)
        for i in range(group_size):
            length = int(rng.integers(1, MAX_COMPLETION))
            name = f"test/0/{g}"
            ids = rng.integers(8, 200, length).astype(np.int32)
            rows.append(
                Sample(
                    name,
                    i,
                    prompt,
                    ids,
                    rng.normal(-5.0, 0.1, length).astype(np.float32),
                    (VersionSpan(0, 0, length),),
                    "stop",
                    "",
                )
            )
            last = (g, i) == (num_groups - 1, group_size - 1)
            advantage = 1e3 if last else float(rng.standard_normal())
            samples.append(
                TrainSample(rows, len(rows) - 1, name, i, len(prompt), length, g, not last, advantage, advantage)
            )
    return TrainBatch(step + 1, samples, TEMPERATURE)


def plain_logits(model: Any, sample: Sample, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """[T, V] and the tokens that were drawn from them."""
    ids = torch.from_numpy(np.concatenate([sample.prompt_token_ids, sample.token_ids]).astype(np.int64))
    n = len(sample.prompt_token_ids)
    return model(ids[None], use_cache=False).logits[0].float()[n - 1 : -1] / temperature, ids[n:]


def plain_logprobs(model: Any, sample: Sample, temperature: float = TEMPERATURE, mask: Tensor | None = None) -> Tensor:
    """`mask`: [T, V], the tokens that could be drawn."""
    logits, drawn = plain_logits(model, sample, temperature)
    kept = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return kept.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]


def plain_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def plain_step(path: Path, batch: TrainBatch) -> tuple[dict[str, Tensor], float, float]:
    """One GRPO step, sequence by sequence: the weights after it, the gradient norm, the mean |rollout - old|."""
    model = plain_model(path)
    optimizer = torch.optim.AdamW(model.parameters(), LR, eps=1.0, weight_decay=0.0)
    members = [s for s in batch.samples if s.loss_mask]
    gaps = []
    for s in members:
        logp = plain_logprobs(model, s.ref[s.row])
        gaps.append((logp.detach() - torch.from_numpy(s.ref[s.row].logprobs)).abs())
        ratio = (logp - logp.detach()).exp()
        (-(ratio * (s.advantage or 0.0)).mean() / len(members)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, norm.item(), torch.cat(gaps).mean().item()


def exported(group: LearnerGroup, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    run(export(group, folder))
    return load_file(folder / "model.safetensors")


def moved_apart(a: dict[str, Tensor], b: dict[str, Tensor], origin: dict[str, Tensor]) -> float:
    """|a - b| relative to how far a has come from the origin, over all parameters."""
    assert a.keys() == b.keys() == origin.keys()
    apart = torch.stack([(a[n] - b[n]).double().square().sum() for n in a]).sum()
    moved = torch.stack([(a[n] - origin[n]).double().square().sum() for n in a]).sum()
    assert moved > 0
    return float((apart / moved).sqrt())


def assert_one_step_equals_plain_pytorch(
    config: RunConfig, model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> LearnerGroup:
    batch = make_batch()
    want, want_norm, want_mismatch = plain_step(model, batch)
    group = start(config, tmp_path)
    groups.append(group)
    report = run(group.update(batch))
    assert report.metrics["grad_norm"] == pytest.approx(want_norm, rel=1e-5)
    assert report.metrics["mismatch/mean_abs"] == pytest.approx(want_mismatch, rel=1e-5)
    assert report.metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    trained = [s for s in batch.samples if s.loss_mask]
    assert report.metrics["tokens/trained"] == sum(s.num_tokens for s in trained)
    assert report.metrics["tokens/processed"] == sum(s.num_prompt_tokens + s.num_tokens - 1 for s in trained)
    got = exported(group, tmp_path / "hf")
    assert moved_apart(got, want, load_file(model / "model.safetensors")) < 1e-5
    return group


def test_a_group_s_prompt_is_computed_once_and_the_step_is_that_of_plain_pytorch(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    """The last sample of a group is masked out, and one is all that some ranks have of a group."""
    group = assert_one_step_equals_plain_pytorch(
        make_config(tiny_model, ranks=2, stage=2), tiny_model, tmp_path, groups
    )
    ray.get([a.__ray_call__.remote(watch) for a in group._actors], timeout=60)
    batch = make_batch(seed=1)
    metrics = run(group.update(batch)).metrics
    seen = ray.get([a.__ray_call__.remote(lambda a: sum(a.seen)) for a in group._actors], timeout=60)
    trained = [s for s in batch.samples if s.loss_mask]
    alone = sum(s.num_prompt_tokens + s.num_tokens - 1 for s in trained)
    assert metrics["tokens/processed"] == alone
    assert metrics["tokens/shared"] == alone - sum(seen) > 0
    assert metrics["update/imbalance"] == pytest.approx(2 * max(seen) / sum(seen))


def watch(actor: Any) -> None:
    """Note how many tokens each pass of the body gets."""
    actor.seen = []
    actor._engine.module.hf.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: actor.seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )


def test_two_ranks_under_zero_3_with_tied_embeddings_step_like_plain_pytorch_and_resume_bitwise(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    config = make_config(tiny_model, ranks=2, stage=3, learner={"lr_scheduler_type": "linear"})
    group = assert_one_step_equals_plain_pytorch(config, tiny_model, tmp_path, groups)

    saved = tmp_path / "learner"
    saved.mkdir()
    run(save(group, saved))
    first = [run(group.update(make_batch(seed=s, step=s))).metrics for s in (1, 2)]
    after = exported(group, tmp_path / "after")
    run(load(group, saved))
    again = [run(group.update(make_batch(seed=s, step=s))).metrics for s in (1, 2)]
    assert [m["grad_norm"] for m in again] == [m["grad_norm"] for m in first]
    assert [m["lr"] for m in again] == [m["lr"] for m in first] == pytest.approx([LR * 0.9, LR * 0.8])
    resumed = exported(group, tmp_path / "resumed")
    assert all(torch.equal(after[n], resumed[n]) for n in after)


def test_one_rank_under_zero_0_steps_like_plain_pytorch_and_exports_what_it_computes_with(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    config = make_config(tiny_model, ranks=1, stage=0, learner={"micro_batch_tokens": 60})
    group = assert_one_step_equals_plain_pytorch(config, tiny_model, tmp_path, groups)

    # The exported model says what the learner says: no mismatch when its own log-probabilities come back as the
    # sampler's.
    model, batch = plain_model(tmp_path / "hf"), make_batch(seed=5)
    with torch.no_grad():
        for sample in batch.samples[0].ref:
            sample.logprobs[:] = plain_logprobs(model, sample).numpy()
    metrics = run(group.update(batch)).metrics
    assert metrics["mismatch/max_abs"] < 2e-5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        p.name for p in (tmp_path / "hf").iterdir()
    }

    # A sample that breaks the loss is named, nothing is stepped, and the learner goes on.
    before = exported(group, tmp_path / "before")
    batch.samples[0].ref[4].logprobs[:] = 0
    bad = batch.samples[4]
    broken = TrainBatch(10, [s if s is not bad else replace(bad, advantage=float("nan")) for s in batch.samples], 1.0)
    with pytest.raises(NonFiniteError, match=rf"step 10: the loss of sample {bad.prompt_id}\[{bad.index}\]"):
        run(group.update(broken))
    reported = batch.samples[0].ref[4].logprobs
    for value in (-np.inf, np.nan):
        reported[0] = value
        with pytest.raises(
            NonFiniteError, match=rf"log-probability that came with a token of sample {bad.prompt_id}\[{bad.index}"
        ):
            run(group.update(batch))
    reported[0] = 0
    after = exported(group, tmp_path / "after")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert run(group.update(batch)).metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "truncation", [pytest.param(Truncation(), marks=pytest.mark.slow), Truncation(0.9, 30, 0.01)], ids=["all", "cut"]
)
@pytest.mark.long
def test_several_updates_per_batch_keep_the_old_log_probabilities_and_sets_of_tokens(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup], truncation: Truncation
) -> None:
    algorithm = {"num_iterations": 2, "num_mini_batches": 2, "beta": 0.04, "loss": "dapo"}
    config = make_config(tiny_model, ranks=2, stage=2, algorithm=algorithm, learner={"learning_rate": 0.3})
    group = start(config, tmp_path)
    groups.append(group)
    batch = replace(make_batch(), truncation=truncation)
    got = run(group.update(batch)).metrics
    want = plain_updates(tiny_model, batch, lr=0.3, beta=0.04)
    assert got["update/num_steps"] == 4
    assert abs(want["ratio/mean"] - 1) > 1e-3
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    # Nothing waits for a dead rank: the error names it, and later calls say so at once.
    pids = ray.get([a.__ray_call__.remote(lambda _: os.getpid()) for a in group._actors], timeout=30)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="learner-1 died during update"):
        run(group.update(batch), 30)
    with pytest.raises(WorkerError, match="learner-1 died"):
        run(group.update(batch), 5)


def test_adapters_step_like_plain_peft_with_the_bare_model_as_reference(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    import peft

    lora = {"r": 4, "alpha": 8}
    config = make_config(
        tiny_model, ranks=2, stage=3, model={"lora": lora}, algorithm={"beta": 0.04}, learner={"max_grad_norm": 1e6}
    )
    group = start(config, tmp_path)
    groups.append(group)
    first = exported(group, tmp_path / "first")
    origin = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(first[n], origin[n]) for n in origin), "B starts at zero"
    model = peft.PeftModel.from_pretrained(plain_model(tiny_model), tmp_path / "first" / "lora", is_trainable=True)

    batch = make_batch()
    members = [s for s in batch.samples if s.loss_mask]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, eps=1.0, weight_decay=0.0)
    norms, kls = [], []
    for _ in range(2):
        optimizer.zero_grad()
        tokens = []
        for s in members:
            logp = plain_logprobs(model, s.ref[s.row])
            with torch.no_grad(), model.disable_adapter():
                d = plain_logprobs(model, s.ref[s.row])
            d = logp - d
            kl = (-d).exp() + d - 1
            tokens.append(kl.detach())
            (((-(logp - logp.detach()).exp() * (s.advantage or 0.0)) + 0.04 * kl).mean() / len(members)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6).item())
        kls.append(torch.cat(tokens).mean().item())
        optimizer.step()
    got = [run(group.update(batch)).metrics for _ in range(2)]
    assert [m["grad_norm"] for m in got] == pytest.approx(norms, rel=1e-4)
    assert kls[1] > 1e-6
    assert [m["kl/ref"] for m in got] == pytest.approx(kls, rel=1e-3, abs=1e-9)
    merged = dict(model.merge_and_unload().named_parameters())
    assert moved_apart(exported(group, tmp_path / "after"), {n: p.detach() for n, p in merged.items()}, origin) < 1e-4


@pytest.mark.parametrize("beta", [0.0, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.long
def test_ppo_trains_policy_and_critic_like_plain_pytorch_and_resumes(
    beta: float, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    """beta: of a KL in the reward."""
    algorithm = {"preset": "ppo", "num_mini_batches": 1, "gamma": 0.98, "lam": 0.9, "beta": beta}
    algorithm |= {"kl_in": "reward"} if beta else {}
    config = make_config(tiny_model, ranks=2, stage=2, algorithm=algorithm, critic={"learning_rate": 0.3})
    group = start(config, tmp_path)
    groups.append(group)
    batch = make_batch()
    want = plain_ppo(tiny_model, batch, updates=3, beta=beta)
    got = [run(group.update(batch)).metrics for _ in range(2)]
    (tmp_path / "saved").mkdir()
    run(save(group, tmp_path / "saved"))
    got.append(run(group.update(batch)).metrics)
    for one, plain in zip(got, want, strict=True):
        for name, value in plain.items():
            assert one[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    if beta:
        assert abs(want[2]["reward/kl_penalty"]) > 0.01
        assert "loss/kl" not in got[2]
    else:
        assert want[2]["critic/loss"] < want[0]["critic/loss"]
    run(load(group, tmp_path / "saved"))
    again = run(group.update(batch)).metrics
    assert all(again[name] == got[2][name] for name in want[2])


def plain_ppo(path: Path, batch: TrainBatch, *, updates: int, beta: float) -> list[dict[str, float]]:
    """Policy and critic, sequence by sequence: GAE with an outcome reward less beta KL at every token, whitened, clipped values
    (range 0.5)."""
    model, reference, body = plain_model(path), plain_model(path), plain_model(path).model
    head = torch.nn.Linear(body.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    critic = [*body.parameters(), *head.parameters()]
    optimizers = [torch.optim.AdamW(model.parameters(), LR, eps=1.0, weight_decay=0.0)]
    optimizers.append(torch.optim.AdamW(critic, 0.3, eps=1.0, weight_decay=0.0))
    members = [s for s in batch.samples if s.loss_mask]
    tokens = sum(s.num_tokens for s in members)

    def values_of(s: TrainSample) -> Tensor:
        sample = s.ref[s.row]
        ids = torch.from_numpy(np.concatenate([sample.prompt_token_ids, sample.token_ids]).astype(np.int64))[None]
        return head(body(ids, use_cache=False).last_hidden_state[0])[s.num_prompt_tokens - 1 : -1, 0]

    out = []
    for _ in range(updates):
        with torch.no_grad():
            old_values = [values_of(s) for s in members]
            kls = [plain_logprobs(model, s.ref[s.row]) - plain_logprobs(reference, s.ref[s.row]) for s in members]
        advantages, returns = [], []
        for s, values, kl in zip(members, old_values, kls, strict=True):
            column = torch.zeros_like(values)
            following = torch.tensor(0.0)
            for t in reversed(range(len(values))):
                last = t == len(values) - 1
                delta = (s.reward if last else 0.98 * values[t + 1]) - values[t] - beta * kl[t]
                following = delta + 0.98 * 0.9 * following
                column[t] = following
            advantages.append(column)
            returns.append(column + values)
        pooled = torch.cat(advantages)
        advantages = [(a - pooled.mean()) / (pooled.std(correction=0) + 1e-4) for a in advantages]
        value_loss = 0.0
        for s, a, ret, old in zip(members, advantages, returns, old_values, strict=True):
            logp = plain_logprobs(model, s.ref[s.row])
            (-((logp - logp.detach()).exp() * a).sum() / tokens).backward()
            values = values_of(s)
            bounded = old + (values - old).clamp(-0.5, 0.5)
            loss = 0.5 * torch.max((values - ret).square(), (bounded - ret).square()).sum() / tokens
            loss.backward()
            value_loss += loss.item()
        norms = [torch.nn.utils.clip_grad_norm_(p, 1e6).item() for p in (model.parameters(), critic)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        out.append({"grad_norm": norms[0], "critic/grad_norm": norms[1], "critic/loss": value_loss})
        if beta:
            penalties = [beta * kl.sum().item() for kl in kls]
            out[-1] |= {"reward/kl_penalty": float(np.mean(penalties)), "kl/ref": torch.cat(kls).mean().item()}
    return out


def plain_updates(path: Path, batch: TrainBatch, *, lr: float, beta: float) -> dict[str, float]:
    """Two passes in two mini-batches with the loss of DAPO and the KL of GRPO, in plain PyTorch."""
    model, reference = plain_model(path), plain_model(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr, eps=1.0, weight_decay=0.0)
    members = [s for s in batch.samples if s.loss_mask]
    with torch.no_grad():
        masks = [keep_mask(*plain_logits(model, s.ref[s.row]), batch.truncation) for s in members]
        old = [plain_logprobs(model, s.ref[s.row], mask=m) for s, m in zip(members, masks, strict=True)]
        ref = [plain_logprobs(reference, s.ref[s.row], mask=m) for s, m in zip(members, masks, strict=True)]
    ratios, kls, norms, losses = [], [], [], []
    for _ in range(2):
        for half in ((0, 1), (2, 3)):
            chosen = [k for k, s in enumerate(members) if s.group in half]
            tokens = sum(members[k].num_tokens for k in chosen)
            optimizer.zero_grad()
            step_loss = 0.0
            for k in chosen:
                s = members[k]
                theta = plain_logprobs(model, s.ref[s.row], mask=masks[k])
                ratio = (theta - old[k]).exp()
                policy = (
                    -torch.min(ratio * (s.advantage or 0.0), ratio.clamp(0.8, 1.2) * (s.advantage or 0.0)).sum()
                    / tokens
                )
                kl = (ref[k] - theta).exp() - (ref[k] - theta) - 1
                (policy + beta * kl.sum() / tokens).backward()
                ratios.append(ratio.detach())
                kls.append(kl.detach())
                step_loss += policy.item()
            losses.append(step_loss)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6).item())
            optimizer.step()
    return {
        "ratio/mean": torch.cat(ratios).mean().item(),
        "kl/ref": torch.cat(kls).mean().item(),
        "grad_norm": float(np.mean(norms)),
        "loss/policy": float(np.mean(losses)),
    }


@pytest.mark.long
def test_sft_in_bf16_descends_from_the_plain_cross_entropy_and_a_full_disk_is_told(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    config = build(
        SftConfig,
        {
            "num_steps": 10,
            "examples_per_step": 12,
            "max_length": 60,
            "model": {"path": str(tiny_model), "dtype": "bfloat16"},
            "data": {"train": {"path": "unused"}},
            "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 100, "num_threads": 1, "weight_decay": 0.01},
            "deadlines": {"start_s": 120, "update_s": 60, "save_s": 60},
        },
        "test",
    )
    group = start(config, tmp_path)
    groups.append(group)
    batch = make_batch()
    batch = TrainBatch(1, batch.samples, 1.0)
    model = plain_model(tiny_model)
    with torch.no_grad():
        logps = torch.cat([plain_logprobs(model, s.ref[s.row], 1.0) for s in batch.samples if s.loss_mask])
    losses = [run(group.update(batch)).metrics["loss/sft"] for _ in range(6)]
    assert losses[0] == pytest.approx(-logps.mean().item(), abs=5e-3)
    assert losses[5] < losses[0] - 0.1

    held = ray.get(group._actors[0].__ray_call__.remote(what_is_held), timeout=60)
    assert held["reference"] is None
    assert held["inv_freq"] == "torch.float32"

    (pid,) = ray.get([a.__ray_call__.remote(lambda _: os.getpid()) for a in group._actors], timeout=30)
    saved = tmp_path / "full"
    saved.mkdir()
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, limits[1]))
    with pytest.raises(CheckpointError, match=r"can't write the checkpoint in .*full .*GiB free"):
        run(save(group, saved))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert run(group.update(batch)).metrics["grad_norm"] > 0, "a rank that can't write goes on training"
    whole = tmp_path / "whole"
    whole.mkdir()
    run(save(group, whole))
    with pytest.raises(CheckpointError, match="holds no learner checkpoint"):
        run(load(group, tmp_path))
    state = whole / "learner" / "rank-0" / "state.json"
    state.write_text(state.read_text().replace('"model.lora": null', '"model.lora": {"r": 4}'))
    with pytest.raises(CheckpointError, match=r"model\.lora None instead of \{'r': 4\}"):
        run(load(group, whole))


def what_is_held(actor: Any) -> dict[str, Any]:
    buffers = dict(actor._engine.module.hf.named_buffers())
    return {
        "reference": actor._reference,
        "inv_freq": str(next(b for n, b in buffers.items() if "inv_freq" in n).dtype),
    }


def fp32_masters(actor: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).clone() for n, p in actor._engine.module.hf.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_bf16_masters_hold_the_fp32_checkpoint_exactly(
    ranks: int, stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    group = start(make_config(tiny_model, ranks=ranks, stage=stage, model={"dtype": "bfloat16"}), tmp_path)
    groups.append(group)
    masters = ray.get([a.__ray_call__.remote(fp32_masters) for a in group._actors], timeout=60)[0]
    want = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(masters[n], want[n]) for n in want)


@pytest.mark.slow
def test_samples_without_signal_cost_no_pass_and_leave_the_gradient_as_it_is(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    batch = make_batch()
    flat = [replace(s, advantage=0.0) if s.group < 2 else s for s in batch.samples]
    nothing = [replace(s, advantage=0.0) for s in batch.samples]
    norms, trained = [], []
    for skip in (True, False):
        config = make_config(tiny_model, ranks=2, stage=1, learner={"skip_no_signal": skip, "learning_rate": 1e-30})
        group = start(config, tmp_path)
        groups.append(group)
        got = [run(group.update(TrainBatch(1, s, TEMPERATURE))).metrics for s in (flat, nothing)]
        norms.append(got[0]["grad_norm"])
        trained.append([m["tokens/trained"] for m in got])
        assert got[1]["grad_norm"] == 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    members = [s for s in batch.samples if s.loss_mask]
    assert trained[1] == [sum(s.num_tokens for s in members)] * 2
    assert trained[0] == [sum(s.num_tokens for s in members if s.group >= 2), 0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_resume_bitwise(stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]) -> None:
    """In a new process, too: the second group has never seen the first one's weights."""
    config = make_config(tiny_model, ranks=2, stage=stage, model={"dtype": "bfloat16"})
    saved = tmp_path / "learner"
    saved.mkdir()
    results = []
    for restored in (False, True):
        group = start(config, tmp_path)
        groups.append(group)
        if restored:
            run(load(group, saved))
        else:
            run(group.update(make_batch()))
            run(save(group, saved))
        run(group.update(make_batch(seed=1, step=1)))
        results.append(exported(group, tmp_path / f"hf-{restored}"))
        run(group.close())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_stays_while_the_policy_moves(
    stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    config = make_config(tiny_model, ranks=2, stage=stage, algorithm={"beta": 0.1}, learner={"learning_rate": 0.3})
    group = start(config, tmp_path)
    groups.append(group)
    kls = [run(group.update(make_batch(step=s))).metrics["kl/ref"] for s in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[1] > 1e-4
    assert kls[2] > kls[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_reference_follows_the_policy_and_is_resumed(
    stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    algorithm = {"beta": 0.1, "ref_refresh_steps": 2}
    config = make_config(tiny_model, ranks=2, stage=stage, algorithm=algorithm, learner={"learning_rate": 0.3})
    group = start(config, tmp_path)
    groups.append(group)
    kls = [run(group.update(make_batch(step=s))).metrics["kl/ref"] for s in range(3)]
    # Steps 0 and 1 are measured against the start; after step 1 the reference is the policy.
    assert kls[1] > 1e-4
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[2] == pytest.approx(0.0, abs=1e-6)
    saved = tmp_path / "learner"
    saved.mkdir()
    run(save(group, saved))
    first = [run(group.update(make_batch(step=s))).metrics["kl/ref"] for s in (3, 4)]
    run(load(group, saved))
    assert [run(group.update(make_batch(step=s))).metrics["kl/ref"] for s in (3, 4)] == first
    assert first[0] > 1e-4
    run(group.close())

    fresh = start(config, tmp_path)
    groups.append(fresh)
    run(load(fresh, saved))
    assert run(fresh.update(make_batch(step=3))).metrics["kl/ref"] == pytest.approx(first[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_polyak_reference_is_the_mean_of_start_and_policy(
    stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    algorithm = {"beta": 0.1, "ref_refresh_steps": 1, "ref_polyak_tau": 0.25}
    config = make_config(tiny_model, ranks=2, stage=stage, algorithm=algorithm, learner={"learning_rate": 0.3})
    group = start(config, tmp_path)
    groups.append(group)
    run(group.update(make_batch(step=0)))
    moved, batch = exported(group, tmp_path / "moved"), make_batch(step=1)
    policy, reference = plain_model(tmp_path / "moved"), plain_model(tiny_model)
    with torch.no_grad():
        for name, param in reference.named_parameters():
            param.lerp_(moved[name], 0.25)
        members = [s for s in batch.samples if s.loss_mask]
        d = torch.cat([plain_logprobs(policy, s.ref[s.row]) - plain_logprobs(reference, s.ref[s.row]) for s in members])
    want = ((-d).exp() + d - 1).mean().item()
    assert want > 1e-4
    assert run(group.update(batch)).metrics["kl/ref"] == pytest.approx(want, rel=1e-3)


ALGORITHMS = [
    {"preset": "r1", "ref_refresh_steps": 1},
    {"preset": "dapo", "num_mini_batches": 2},
    {"preset": "gspo", "num_mini_batches": 2, "geometric_mask": [0.01, 1000.0]},
    {"preset": "cispo", "num_iterations": 2},
    {"preset": "sapo", "entropy_coef": 0.01},
    {"preset": "gmpo", "num_mini_batches": 2},
    {"preset": "icepop", "num_mini_batches": 2, "importance_sampling_clip_min": 0.0},
    {"preset": "v3_2", "num_mini_batches": 2},
    {"preset": "rloo", "beta": 0.5, "kl_in": "reward", "num_mini_batches": 2},
    {"preset": "ppo", "beta": 0.5, "kl_in": "reward"},
    {"preset": "lite_ppo", "beta": 0.5, "kl_in": "reward", "kl_estimator": "k3", "num_iterations": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a["preset"])
def test_every_objective_is_the_same_for_any_ranks_and_micro_batches(
    algorithm: dict[str, Any], tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    results = []
    for ranks, stage, budget in ((1, 1, 1000), (2, 3, 60)):
        config = make_config(
            tiny_model, ranks=ranks, stage=stage, algorithm=algorithm, learner={"micro_batch_tokens": budget}
        )
        group = start(config, tmp_path)
        groups.append(group)
        metrics = [run(group.update(make_batch(step=s, seed=s))).metrics for s in range(2)]
        results.append((metrics, exported(group, tmp_path / f"hf-{ranks}")))
        run(group.close())
    (one, first), (two, second) = results
    assert moved_apart(first, second, load_file(tiny_model / "model.safetensors")) < 1e-3
    for a, b in zip(one, two, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["loss/policy"] == pytest.approx(a["loss/policy"], rel=1e-3, abs=1e-5)
        assert {n for n in a if n.startswith("correction/")} == {n for n in b if n.startswith("correction/")}


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_at_the_deadline(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    group = start(make_config(tiny_model, ranks=2, stage=2, deadlines={"update_s": 8}), tmp_path)
    groups.append(group)
    pids = ray.get([a.__ray_call__.remote(lambda _: os.getpid()) for a in group._actors], timeout=30)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(DeadlineError, match=r"learner-1 did not finish update within 8 s.*deadlines.update_s"):
        run(group.update(make_batch()), 30)
    with pytest.raises(WorkerError, match="did not finish update in time"):
        run(group.update(make_batch()), 5)


def test_settings_of_deepspeed_follow_the_config() -> None:
    bf16, fp32 = ModelConfig(path="x"), ModelConfig(path="x", dtype="float32")
    cpu = torch.device("cpu")
    config = deepspeed_config(bf16, LearnerConfig(zero_stage=3, offload_optimizer=True, max_grad_norm=0.5), cpu)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_clipping"] == 0.5
    assert config["managed_gradient_accumulation"] is False
    assert "bf16" not in deepspeed_config(fp32, LearnerConfig(zero_stage=0), cpu)


@pytest.mark.parametrize(("stage", "expected"), [(0, False), (1, False), (2, True), (3, True)])
def test_gradients_are_reduced_beside_computation_on_gpus_where_deepspeed_allows_it(
    stage: Literal[0, 1, 2, 3], expected: bool
) -> None:
    fp32, learner = ModelConfig(path="x", dtype="float32"), LearnerConfig(zero_stage=stage)
    of = {d: deepspeed_config(fp32, learner, torch.device(d)) for d in ("cuda", "cpu")}
    assert of["cuda"]["zero_optimization"]["overlap_comm"] is expected
    assert of["cpu"]["zero_optimization"]["overlap_comm"] is False


@pytest.mark.slow
def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    config = make_config(tmp_path / "nothing", ranks=1, stage=2)
    with pytest.raises(ConfigError, match=r"model.path .*nothing can't be loaded"):
        start(config, tmp_path)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=() if s == 1 else pytest.mark.slow) for s in (0, 1, 2, 3)])
@pytest.mark.long
def test_states_that_went_to_the_host_and_back_change_no_bit_of_the_next_steps(
    stage: int, tiny_model: Path, tmp_path: Path
) -> None:
    group = start(make_config(tiny_model, ranks=1, stage=stage), tmp_path)
    try:
        run(group.update(make_batch(seed=0, step=0)))
        (tmp_path / "before").mkdir()
        run(save(group, tmp_path / "before"))
        run(group.update(make_batch(seed=1, step=1)))
        want = exported(group, tmp_path / "want")
        run(load(group, tmp_path / "before"))
        run(group.offload(keep_weights=True))
        run(group.offload(keep_weights=False))
        run(group.reload())
        run(group.update(make_batch(seed=1, step=1)))
        got = exported(group, tmp_path / "got")
        assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        run(group.close())
