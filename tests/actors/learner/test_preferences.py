"""Real DeepSpeed ranks learn from pairs: against plain Transformers and PyTorch, and what they export is plain Transformers'.

Adam's eps is 1, as in test_learner.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.learner.group import LearnerGroup
from grpo_ray.config.loading import build
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.data.preferences import Pair, pair_batch
from grpo_ray.loop.supervised import load_task
from tests.actors.learner.saved import export, load, save

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.long]

T = TypeVar("T")
LR, BETA = 0.5, 0.3


def run(work: Awaitable[T], seconds: float = 150.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(bounded())


def make_config(schema: type[SftConfig], path: Path, **more: Any) -> Any:
    return build(
        schema,
        {
            "num_steps": 10,
            "max_length": 50,
            "model": {"path": str(path), "dtype": "float32"},
            "data": {"train": {"path": "unused"}},
            "learner": {
                "num_actors": 2,
                "zero_stage": 2,
                "learning_rate": LR,
                "adam_eps": 1.0,
                "max_grad_norm": 1e6,
                "micro_batch_tokens": 130,
                "logprob_chunk_tokens": 64,
                "num_threads": 1,
            },
            "deadlines": {"start_s": 120, "update_s": 60, "save_s": 60},
            **more,
        },
        "test",
    )


def make_pairs(num: int, eos: int, labelled: bool = False) -> list[Pair]:
    rng = np.random.default_rng(3)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(8, 200, int(rng.integers(low, high))).tolist()

    return [
        Pair(f"p/0/{i}", i, ids(2, 8), tuple([*ids(1, 30), eos] for _ in range(2 - labelled)), 0.1 * i)
        for i in range(num)
    ]


def plain_logprob(model: Any, pair: Pair, answer: list[int]) -> Tensor:
    text = torch.tensor([*pair.prompt_ids, *answer])
    logps = model(text[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, text[1:, None])[-len(answer) :].sum()


def plain_steps(model: Any, loss_of: Any, num: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1.0, weight_decay=0.0)
    out = []
    for _ in range(num):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        out.append((loss.item(), norm.item()))
        optimizer.step()
    return out


def test_dpo_over_two_ranks_is_the_plain_loop(tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]) -> None:
    pairs = make_pairs(5, eos=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        references = [[plain_logprob(model, p, a).item() for a in p.answers] for p in pairs]

    def loss_of(model: Any) -> Tensor:
        gaps = [
            [plain_logprob(model, p, a) - r for a, r in zip(p.answers, ref, strict=True)]
            for p, ref in zip(pairs, references, strict=True)
        ]
        return torch.stack([-logsigmoid(BETA * (chosen - rejected)) for chosen, rejected in gaps]).mean()

    want = plain_steps(model, loss_of, 3)
    group = run(
        LearnerGroup.create(make_config(DpoConfig, tiny_model, dpo={"beta": BETA}), str(tiny_model), str(tmp_path))
    )
    groups.append(group)
    told = run(group.values(pair_batch(1, pairs)))
    assert told == pytest.approx([x for r in references for x in r], rel=1e-5)
    both = dict(enumerate(zip(told[::2], told[1::2], strict=True)))
    for step, (loss, norm) in enumerate(want):
        metrics = run(group.update(pair_batch(step + 1, pairs, both))).metrics
        assert metrics["loss/dpo"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert want[0][0] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["pairs/accuracy"] == 1.0


def scored(path: Path, pairs: list[Pair]) -> Tensor:
    """By plain Transformers, padded, all texts at once."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    assert model.config.num_labels == 1
    texts = [[*p.prompt_ids, *a] for p in pairs for a in p.answers]
    longest = max(map(len, texts))
    pad = model.config.pad_token_id
    ids = torch.tensor([t + [pad] * (longest - len(t)) for t in texts])
    with torch.no_grad():
        return model(ids, attention_mask=(ids != pad).long()).logits[:, 0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_reward_model_is_the_plain_loop_and_exports_what_transformers_loads(
    stage: int, tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    pairs = make_pairs(5, eos=1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)

    def loss_of(model: Any) -> Tensor:
        gaps = []
        for p in pairs:
            chosen, rejected = (model(torch.tensor([[*p.prompt_ids, *a]])).logits[0, 0] for a in p.answers)
            gaps.append(-logsigmoid(chosen - rejected - p.target))
        return torch.stack(gaps).mean()

    want = plain_steps(model, loss_of, 4)
    config = make_config(RewardModelConfig, tiny_model, reward_model={"use_margin": True})
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"zero_stage": stage})})
    group = run(LearnerGroup.create(config, str(tiny_model), str(tmp_path)))
    groups.append(group)
    assert run(group.values(pair_batch(1, pairs, read_last=True))) == [0.0] * 10
    for step, (loss, norm) in enumerate(want):
        metrics = run(group.update(pair_batch(step + 1, pairs, read_last=True))).metrics
        assert metrics["loss/reward_model"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    values = run(group.values(pair_batch(1, pairs, read_last=True)))
    assert max(values) - min(values) > 1e-3
    place = tmp_path / "saved"
    place.mkdir()
    run(save(group, place))
    run(export(group, tmp_path / "exported"))
    torch.testing.assert_close(scored(tmp_path / "exported", pairs), torch.tensor(values), rtol=1e-4, atol=1e-5)
    run(group.update(pair_batch(5, pairs, read_last=True)))
    run(load(group, place))
    assert run(group.values(pair_batch(1, pairs, read_last=True))) == pytest.approx(values, abs=1e-6)


def test_pairs_that_differ_by_a_word_are_learnt(tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]) -> None:
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}, please", "rejected": f"{i}, now"} for i in range(32)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        RewardModelConfig,
        tiny_model,
        data={"train": {"path": str(file)}, "template": "chat"},
        learner={"learning_rate": 3e-3, "micro_batch_tokens": 2000, "num_threads": 1, "zero_stage": 1},
    )
    task: Any = load_task(config, AutoTokenizer.from_pretrained(tiny_model))
    group = run(LearnerGroup.create(config, str(tiny_model), str(tmp_path)))
    groups.append(group)
    pairs = list(task.dataset)
    metrics = [run(group.update(task.batch(step, pairs[:24]))).metrics for step in range(10)]
    assert metrics[0]["loss/reward_model"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics[-1]["pairs/accuracy"] == 1.0
    held_out = run(group.values(task.batch(0, pairs[24:])))
    assert all(chosen > rejected for chosen, rejected in zip(held_out[::2], held_out[1::2], strict=True))
