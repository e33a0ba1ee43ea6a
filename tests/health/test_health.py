"""What a run says of itself when there is nothing to learn from, over the loop with plain objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_ray.errors import NoSignalError, RewardError
from grpo_ray.health.collapse import accuracy_fell, entropy_rose, entropy_vanished, gradient_exploded, reward_fell
from grpo_ray.health.tally import Moments
from grpo_ray.telemetry.events import MessageEvent, StepEvent
from grpo_ray.types import RewardScore, Score, ScoreRequest, ScoreStatus, TrainBatch, UpdateReport
from tests.loop.test_train_loop import Session, config

NAN = float("nan")
Rule = Callable[[ScoreRequest, int], float | None]


def scored(session: Session, *rules: Rule, names: Sequence[str] = ("r",)) -> Session:
    """Its scorer gives what the rules say of a request and the policy's version; None: does not apply."""
    world = session.world

    def score(request: ScoreRequest) -> Score:
        values = [rule(request, world.version) for rule in rules]
        parts = tuple(
            RewardScore(n, ScoreStatus.NOT_APPLICABLE if v is None else ScoreStatus.OK, NAN if v is None else v)
            for n, v in zip(names, values, strict=True)
        )
        given = [v for v in values if v is not None]
        return Score(ScoreStatus.OK if given else ScoreStatus.NOT_APPLICABLE, sum(given) if given else NAN, parts)

    world._score = score
    return session


def learner_of(session: Session, **figures: float) -> Session:
    """A learner whose gradient is 0 without anything to learn from, as the real one's is, and has these figures."""
    update = session.world.update

    async def told(batch: TrainBatch) -> UpdateReport:
        report = await update(batch)
        of = [s.reward if s.advantage is None else s.advantage for s in batch.samples if s.loss_mask and s.num_tokens]
        moved = any(of)
        return replace(report, metrics={**report.metrics, "grad_norm": float(moved), **figures})

    session.world.update = told
    return session


def warnings(session: Session) -> list[str]:
    return [e.text for e in session.events if isinstance(e, MessageEvent) and e.level == "warning"]


def steps_done(session: Session) -> int:
    return sum(isinstance(e, StepEvent) for e in session.events)


def by_index(request: ScoreRequest, version: int) -> float:
    return float(request.sample.index % 2)


CASES: dict[str, tuple[Rule, str, str]] = {
    "words": (lambda r, v: None, "no reward applies to any of the 12 samples", "not_applicable"),
    "zeros": (lambda r, v: 0.0, "all 12 rewards are 0, so no answer is better than another", "no_signal"),
    "solved": (lambda r, v: 1.0, "all 12 rewards are 1, every answer is right", "no_signal"),
    "the same": (lambda r, v: 0.3, "all 12 rewards are 0.3, .*See whether r can tell answers apart", "no_signal"),
    "by prompt": (
        lambda r, v: float(r.columns["answer"]),
        "all samples of a prompt have the same reward, in each of 3 groups, though prompts differ",
        "no_signal",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_without_anything_to_learn_from_says_why_at_its_first_step_and_ends_with_an_error(
    tmp_path: Path, case: str, ahead: int
) -> None:
    rule, text, reason = CASES[case]
    cfg = config("algorithm.max_steps_without_signal=3", f"algorithm.max_staleness={ahead}")
    session = learner_of(scored(Session(tmp_path, cfg), rule))
    with pytest.raises(NoSignalError, match=rf"(?s)in 3 steps in a row up to step 3: .*{text}"):
        session.go()
    told = [e for e in session.events if isinstance(e, MessageEvent | StepEvent)]
    assert isinstance(told[0], MessageEvent), "before the first step is over"
    assert len(warnings(session)) == 1, "once, not at every step"
    assert warnings(session)[0].startswith("step 1: ")
    assert steps_done(session) == 3
    assert session.run_dir.steps() == [0, 3], "saved before it ends"
    assert [row[2:] for row in session.ledger_rows if row[2] == "trained"] == [
        ("trained", step, reason) for step in (1, 2, 3) for _ in range(3)
    ]


def test_a_run_that_is_over_before_the_limit_and_learned_nothing_is_an_error_too(tmp_path: Path) -> None:
    session = scored(Session(tmp_path, config("num_steps=2")), CASES["zeros"][0])
    with pytest.raises(
        NoSignalError, match="nothing was trained in any of the 2 steps of this run: all 12 rewards are 0"
    ):
        session.go()
    again = scored(Session(tmp_path, config("num_steps=2")), CASES["zeros"][0])
    with pytest.raises(NoSignalError, match="in any of the 2 steps"):
        again.go()
    assert scored(Session(tmp_path / "one", config("num_steps=1")), CASES["zeros"][0]).go() == "finished"
    never = config("num_steps=12", "algorithm.max_steps_without_signal=0")
    forever = scored(Session(tmp_path / "never", never), CASES["zeros"][0])
    assert forever.go() == "finished"
    assert "nothing was learned in the last 12 steps: all 12 rewards are 0" in warnings(forever)[-1]


def test_the_count_of_steps_without_signal_goes_on_with_a_resumed_run_and_begins_anew_after_it_gave_up(
    tmp_path: Path,
) -> None:
    cfg = config("algorithm.max_steps_without_signal=4")
    first = scored(Session(tmp_path, cfg), CASES["zeros"][0])
    first.world.on_update = lambda step: first.loop.stop("SIGTERM") if step == 1 else None
    assert first.go() == "SIGTERM"
    second = scored(Session(tmp_path, cfg), CASES["zeros"][0])
    with pytest.raises(NoSignalError, match="4 steps in a row up to step 4"):
        second.go()
    mended = Session(tmp_path, cfg)
    assert scored(mended, by_index).go() == "finished"
    assert [row[4] for row in mended.ledger_rows] == ["no_signal"] * 12 + [None] * 9


def test_a_few_groups_without_spread_among_others_are_no_reason_to_warn(tmp_path: Path) -> None:
    """Two of three groups have none, and so has one step in five."""
    quiet = {4, 9, 14}
    cfg = config("num_steps=20")
    rule: Rule = lambda r, v: 1.0 if v in quiet or r.columns["answer"] % 3 else by_index(r, v)  # noqa: E731
    session = scored(Session(tmp_path, cfg), rule)
    assert session.go() == "finished"
    assert warnings(session) == []
    in_vain = [row for row in session.ledger_rows if row[4] == "no_signal"]
    assert {v + 1 for v in quiet} < {row[3] for row in in_vain}
    assert 30 < len(in_vain) < 60


def test_a_policy_that_broke_down_is_told_from_a_task_that_was_too_hard(tmp_path: Path) -> None:
    cfg = config("learner.learning_rate=0.03", "algorithm.max_steps_without_signal=4", "num_steps=20")
    session = scored(Session(tmp_path, cfg), lambda r, v: by_index(r, v) if v < 5 else 0.0)
    with pytest.raises(NoSignalError, match=r"4 steps in a row up to step 9: .*50.0% of the answers were right"):
        session.go()
    assert warnings(session)[0].startswith(
        "step 6: all 12 rewards are 0, where 50.0% of the answers were right in the steps"
    )
    assert "Lower learner.learning_rate (0.03)" in warnings(session)[0]


def test_rows_that_no_reward_applies_to_are_told_beside_those_whose_rewards_are_equal(tmp_path: Path) -> None:
    rule: Rule = lambda r, v: None if r.columns["answer"] % 2 else 0.0  # noqa: E731
    session = scored(Session(tmp_path, config("num_steps=2")), rule)
    with pytest.raises(NoSignalError, match=r"all \d rewards are 0, .*; \d samples have none: r returned None"):
        session.go()
    assert {row[4] for row in session.ledger_rows} == {"no_signal", "not_applicable"}


def test_truncated_completions_are_told_and_so_is_that_mask_truncated_leaves_all_of_them_out(tmp_path: Path) -> None:
    cfg = config("algorithm.mask_truncated=true", "algorithm.max_steps_without_signal=2")
    session = learner_of(scored(Session(tmp_path, cfg), by_index))
    session.world.truncate_above = 0
    with pytest.raises(
        NoSignalError, match=r"12 of 12 completions were cut .*algorithm.mask_truncated leaves those out"
    ):
        session.go()
    assert [row[4] for row in session.ledger_rows if row[2] == "trained"] == ["truncated"] * 6
    assert any(
        "(8), and algorithm.mask_truncated leaves them out of the loss; raise it" in w for w in warnings(session)
    )
    kept = scored(Session(tmp_path / "kept", config()), by_index)
    kept.world.truncate_above = 0
    assert kept.go() == "finished"
    assert len([w for w in warnings(kept) if "were cut" in w]) == 2, "once, and in place of advice"


def test_a_correction_that_leaves_every_token_out_is_named(tmp_path: Path) -> None:
    cfg = config("algorithm.importance_sampling=sequence_mask", "algorithm.max_steps_without_signal=2")
    session = learner_of(scored(Session(tmp_path, cfg), by_index), grad_norm=0.0)
    with pytest.raises(
        NoSignalError, match=r"gradient is 0 though rewards differ: algorithm.importance_sampling \(sequence_mask\)"
    ):
        session.go()
    assert {row[4] for row in session.ledger_rows if row[2] == "trained"} == {"no_gradient"}


@pytest.mark.parametrize(
    ("functions", "rules", "text"),
    [
        (
            "[{name: r}, {name: accuracy}]",
            (by_index, lambda r, v: None),
            "accuracy can't read the right answers of column answer",
        ),
        (
            "[{name: r}, {name: s, sources: [code]}]",
            (by_index, lambda r, v: None),
            "s is for the sources code, and here column source is None",
        ),
    ],
)
def test_one_of_several_functions_that_never_applies_is_told_once(
    tmp_path: Path, functions: str, rules: tuple[Rule, ...], text: str
) -> None:
    names = ("r", "accuracy" if "accuracy" in functions else "s")
    session = scored(Session(tmp_path, config(f"reward.functions={functions}")), *rules, names=names)
    assert session.go() == "finished"
    assert len(warnings(session)) == 1
    assert f"reward {names[1]} has applied to no sample up to step 5: " in warnings(session)[0]
    assert text in warnings(session)[0]


def test_a_function_that_has_not_begun_or_is_a_penalty_is_no_reason_to_warn(tmp_path: Path) -> None:
    functions = "[{name: r}, {name: s, from_step: 4}, {name: repetition_penalty}]"
    session = scored(
        Session(tmp_path, config(f"reward.functions={functions}")),
        by_index,
        lambda r, v: by_index(r, v) if v >= 4 else None,
        lambda r, v: 0.0,
        names=("r", "s", "repetition_penalty"),
    )
    assert session.go() == "finished"
    assert warnings(session) == []


def test_half_of_the_rows_without_a_reward_are_told(tmp_path: Path) -> None:
    rule: Rule = lambda r, v: by_index(r, v) if int(r.columns["answer"]) % 2 else None  # noqa: E731
    session = scored(Session(tmp_path, config()), rule)
    assert session.go() == "finished"
    assert "samples up to step 5 have no reward, e.g.: r returned None" in warnings(session)[0]


def test_dynamic_sampling_that_finds_nothing_names_the_cause(tmp_path: Path) -> None:
    cfg = config("algorithm.dynamic_sampling=true", "algorithm.max_sampling_rounds=1")
    session = scored(Session(tmp_path, cfg), lambda r, v: None)
    with pytest.raises(RewardError, match=r"two different rewards.*: no reward applies to any of the 12 samples"):
        session.go()


def test_throughput_of_sampling_is_no_rate_of_waiting(tmp_path: Path) -> None:
    """Sampling ahead, the controller waits for almost nothing."""
    session = Session(tmp_path, config("algorithm.max_staleness=3"))
    session.world.on_update = lambda step: None
    session.go()
    for event in (e for e in session.events if isinstance(e, StepEvent)):
        m = event.metrics
        assert m["throughput/rollout_tokens_per_s"] == pytest.approx(m["throughput/tokens_per_s"])


def moments(*means: Sequence[float]) -> list[Moments]:
    out = []
    for step in means:
        m = Moments()
        for value in step:
            m.add(value)
        out.append(m)
    return out


def test_a_fall_is_told_when_it_is_no_noise_and_until_it_is_made_good() -> None:
    good, bad = [0.25, 0.5, 0.0, 0.75, 0.25, 0.5, 1.0, 0.25] * 4, [0.0] * 31 + [0.25]
    fall = accuracy_fell(moments(good, bad), told=False)
    assert fall is not None
    assert (fall.level, fall.now) == (pytest.approx(sum(good) / 32), 0.25 / 32)
    assert accuracy_fell(moments(good[:8], bad[:8]), told=False) is None, "eight prompts say little"
    assert accuracy_fell(moments(good, good), told=False) is None
    half = [v / 2 for v in good]
    assert accuracy_fell(moments(good, half), told=False) is None
    assert accuracy_fell(moments(good, half), told=True) is not None, "it has not come back yet"
    costs = moments([-1.0, -1.2, -0.8] * 8, [-4.0, -4.2, -3.9] * 8)
    assert reward_fell(costs, costs, told=False) is not None
    assert reward_fell(costs[::-1], costs[::-1], told=False) is None, "it rose"


def test_entropy_and_gradients_are_measured_by_what_they_were() -> None:
    assert entropy_rose([0.4, 0.5, 0.45], 3.0, told=False) is not None
    assert entropy_rose([0.02, 0.03], 0.3, told=False) is None
    assert entropy_rose([4.0], 4.5, told=False) is None
    assert entropy_vanished([0.5, 0.4], 0.001, right=0.1)
    assert not entropy_vanished([0.5, 0.4], 0.001, right=0.98), "sure of itself, and right"
    assert gradient_exploded([0.1] * 5, 50.0, limit=1.0)
    assert not gradient_exploded([0.1] * 4, 50.0, limit=1.0)
    assert not gradient_exploded([0.001] * 9, 0.5, limit=1.0), "what is clipped anyway"
