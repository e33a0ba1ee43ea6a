"""What one layout of learners has saved, any other goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.learner.group import LearnerGroup
from tests.actors.learner.saved import load, save
from tests.actors.learner.test_learner import exported, fp32_masters, make_batch, make_config, run, start

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(1200), pytest.mark.long]

LAYOUTS = [(2, 3), (1, 0), (3, 2), (2, 1), (1, 3), (2, 0)]
"""(ranks, ZeRO stage): from 3 to 0 to 2 to 1 to 3 to 0, and over 1, 2 and 3 ranks."""
STEPS = 3


def far_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    apart = torch.stack([(a[n] - b[n]).double().square().sum() for n in a]).sum()
    return float((apart / torch.stack([b[n].double().square().sum() for n in b]).sum()).sqrt())


def train(group: LearnerGroup, first: int) -> list[dict[str, float]]:
    return [run(group.update(make_batch(seed=s, step=s))).metrics for s in range(first, first + STEPS)]


@pytest.mark.parametrize(
    ("settings", "layouts", "same"),
    [
        pytest.param({}, LAYOUTS[:3], ("lr", "grad_norm"), id="policy"),
        pytest.param({}, LAYOUTS, ("lr", "grad_norm"), id="policy, every stage", marks=pytest.mark.slow),
        pytest.param(
            {"model": {"lora": {"r": 4, "alpha": 8}}},
            LAYOUTS[:4],
            ("lr", "grad_norm"),
            id="adapters",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm": {"preset": "ppo", "num_mini_batches": 1}, "critic": {"learning_rate": 0.3}},
            LAYOUTS[:4],
            ("grad_norm", "critic/grad_norm", "critic/loss"),
            id="critic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm": {"beta": 0.1, "ref_refresh_steps": 2, "ref_polyak_tau": 0.5}},
            LAYOUTS[:4],
            ("grad_norm", "kl/ref"),
            id="reference",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_with_other_ranks_and_stages_as_if_they_had_never_changed(
    settings: dict[str, Any],
    layouts: list[tuple[int, int]],
    same: tuple[str, ...],
    tiny_model: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    learner = {"lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.01, "learning_rate": 0.05}

    def begin(ranks: int, stage: int) -> LearnerGroup:
        group = start(make_config(tiny_model, ranks=ranks, stage=stage, learner=learner, **settings), tmp_path)
        groups.append(group)
        return group

    unchanged = begin(1, 2)
    first = begin(*layouts[0])
    train(unchanged, 0)
    train(first, 0)
    last = first
    for number, layout in enumerate(layouts[1:], 1):
        saved = tmp_path / f"saved-{number}"
        saved.mkdir()
        run(save(last, saved))
        run(last.close())
        last = begin(*layout)
        run(load(last, saved))
        want, got = train(unchanged, number * STEPS), train(last, number * STEPS)
        for name in same:
            assert [m[name] for m in got] == pytest.approx([m[name] for m in want], rel=1e-4, abs=1e-8), (layout, name)
        apart = far_apart(
            exported(last, tmp_path / f"hf-{number}"), exported(unchanged, tmp_path / f"unchanged-{number}")
        )
        assert apart < 1e-6, layout


@pytest.mark.slow
def test_bf16_masters_go_through_every_stage_bit_by_bit(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    want: dict[str, Tensor] = {}
    saved: Path | None = None
    for ranks, stage in ((2, 2), (1, 3), (2, 1)):
        group = start(make_config(tiny_model, ranks=ranks, stage=stage, model={"dtype": "bfloat16"}), tmp_path)
        groups.append(group)
        if saved is None:
            for step in range(2):
                run(group.update(make_batch(seed=step, step=step)))
        else:
            run(load(group, saved))
        # A collective: every rank is asked at once.
        got = ray.get([a.__ray_call__.remote(fp32_masters) for a in group._actors], timeout=60)[0]
        want = want or got
        assert all(torch.equal(got[n], want[n]) for n in want), stage
        saved = tmp_path / f"saved-{stage}"
        saved.mkdir()
        run(save(group, saved))
        run(group.close())
    group = start(make_config(tiny_model, ranks=1, stage=0), tmp_path)
    groups.append(group)
    run(load(group, tmp_path / "saved-2"))
    exact = exported(group, tmp_path / "hf")
    assert all(torch.equal(exact[n], want[n]) for n in exact)
