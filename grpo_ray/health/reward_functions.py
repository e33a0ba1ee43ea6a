"""Checks that each reward function scores samples and distinguishes them, reported once, when enough samples are there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.health.applicable import why_not_applicable
from grpo_ray.health.tally import FunctionTally, Tally
from grpo_ray.telemetry.events import MessageEvent

FEW = 32
"""The number of samples below which a fraction is not significant."""
SETTLED = 5
"""The number of steps after which a reward function without any score is reported."""
UNSCORED = 0.25
PENALTIES = ("repetition_penalty", "soft_overlong")
"""Rewards whose best value is 0."""


class RewardFunctions:
    """The checks of one run's reward functions."""

    def __init__(self, functions: Sequence[RewardFunctionConfig]) -> None:
        self._config = functions
        self._functions: dict[str, FunctionTally] = {}
        self._steps_of: dict[str, int] = {}
        self._scored = [0, 0]
        """The numbers of samples with a reward, and of all samples, since the run began or was resumed."""
        self._settled: set[str] = set()
        """The reward functions that were reported, or found in order."""

    def after_step(self, step: int, tally: Tally) -> list[MessageEvent]:
        self._scored[0] += tally.of_samples.count
        self._scored[1] += tally.samples
        due = []
        for function in self._config:
            name = function.title
            if step <= function.from_step or (of := tally.functions.get(name)) is None:
                continue
            total = self._functions.setdefault(name, FunctionTally())
            total.values.join(of.values)
            total.not_applicable += of.not_applicable
            total.columns = of.columns if total.columns is None else total.columns
            self._steps_of[name] = self._steps_of.get(name, 0) + 1
            if self._steps_of[name] >= SETTLED and name not in self._settled:
                due.append(name)
        return self._say(step, due)

    def at_the_end(self, step: int) -> list[MessageEvent]:
        """Reports that a run was too short to make before."""
        late = [n for n, steps in self._steps_of.items() if n not in self._settled and steps > 1]
        return self._say(step, late)

    def _say(self, step: int, names: Sequence[str]) -> list[MessageEvent]:
        out = []
        functions = {f.title: f for f in self._config}
        for name in names:
            of = self._functions[name]
            if of.values.count + of.not_applicable < FEW:
                continue
            self._settled.add(name)
            if len(functions) > 1 and not of.values.count and of.columns is not None:
                why = why_not_applicable(functions[name], of.columns, step - 1)
                out.append(MessageEvent("warning", f"reward {name} has applied to no sample up to step {step}: {why}"))
            elif (
                len(functions) > 1
                and of.values.flat
                and of.values.highest == 0
                and functions[name].name not in PENALTIES
            ):
                out.append(
                    MessageEvent(
                        "info",
                        f"reward {name} has been 0 for every sample up to step {step}: does the model ever do what it asks?",
                    )
                )
        scored, every = self._scored
        if names and "scores" not in self._settled and 0 < scored < (1 - UNSCORED) * every:
            self._settled.add("scores")
            first = next(
                (f for f in functions.values() if (t := self._functions.get(f.title)) and t.columns is not None), None
            )
            why = ""
            if first is not None and (columns := self._functions[first.title].columns) is not None:
                why = f", e.g.: {why_not_applicable(first, columns, step - 1)}"
            out.append(
                MessageEvent("warning", f"{every - scored} of {every} samples up to step {step} have no reward{why}")
            )
        return out
