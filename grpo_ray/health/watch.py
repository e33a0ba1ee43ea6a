"""Health watch: after every step, whether there is anything to learn from, reported with cause and fix. Pure.

scored groups -> Tally ---+
why a group moves nothing +-> Health.after_step -> MessageEvent: each once, when it appears
metrics of the update ----+
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import NoSignalError
from grpo_ray.health.causes import MOST, after_a_fall, why_no_signal
from grpo_ray.health.collapse import accuracy_fell, entropy_rose, entropy_vanished, gradient_exploded, reward_fell
from grpo_ray.health.reward_functions import FEW, RewardFunctions
from grpo_ray.health.tally import Tally
from grpo_ray.telemetry.events import MessageEvent
from grpo_ray.telemetry.measures import Estimate, EvalResult, accuracy_name

REMEMBERED = 24
"""The number of previous steps that a step is compared with."""
UNLIKELY = 1e-3
"""The probability by chance below which a step without signal, after others that had one, is reported."""
MOST_STILL = 0.75
"""What is reported of MOST of the completions is reported again only if it held for less than this fraction in between."""


class Health:
    """The health of one run. Call `tally` before a step, `after_step` after it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.steps_with_signal = 0
        self.steps_without_signal = 0
        """The number of steps without signal in a row, up to the last step."""
        self._cause_name = self._cause = ""
        """The cause of the steps without signal: a name, and the description from the first step with this cause."""
        self._active: dict[str, str] = {}
        """Problems as of the last step: their names, and the message when they appeared."""
        self._tallies: deque[Tally] = deque(maxlen=REMEMBERED)
        self._metrics: deque[Mapping[str, float]] = deque(maxlen=REMEMBERED)
        self._with_signal: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        """The numbers of groups with signal, and of all groups, for steps that had one."""
        self._idle_groups = 0
        self._functions = RewardFunctions(config.reward.functions)
        self._accuracies: dict[str, Estimate] = {}
        """The best accuracy so far by evaluation set."""
        self._unmeasured: frozenset[str] = frozenset()
        """The evaluation sets that were reported to have no accuracy."""

    # State that survives a restart

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_with_signal": self.steps_with_signal,
            # A run that is resumed after it gave up has been changed, or gets the message once more.
            "steps_without_signal": 0 if self.gave_up else self.steps_without_signal,
        }

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Restore the state; None from a checkpoint without one, whose run is assumed to have been healthy."""
        self.steps_with_signal = state["steps_with_signal"] if state else 1
        self.steps_without_signal = state["steps_without_signal"] if state else 0

    # After a step

    def tally(self) -> Tally:
        """An empty tally for the next step."""
        return Tally(accuracy_name(self.config), self.config.eval.threshold)

    def after_step(
        self, step: int, tally: Tally, num_groups: int, untrained: Mapping[str, str], metrics: Mapping[str, float]
    ) -> list[MessageEvent]:
        """Messages about new problems.

        Args:
            step: the step; the first is 1.
            tally: the tally of its groups, including those that dynamic sampling dropped.
            num_groups: the number of groups in its batch.
            untrained: the result of `why_untrained`.
            metrics: the metrics of the update.
        """
        signal = len(untrained) < num_groups
        found: dict[str, str] = {}
        if signal:
            self.steps_with_signal += 1
            self.steps_without_signal = self._idle_groups = 0
            self._cause_name = ""
            self._with_signal.append((num_groups - len(untrained), num_groups))
        else:
            self.steps_without_signal += 1
            self._idle_groups += num_groups
            before = list(self._tallies)[: len(self._tallies) + 1 - self.steps_without_signal]
            name, cause = why_no_signal(self.config, step, tally, untrained, before)
            if name != self._cause_name:
                self._cause_name, self._cause = name, cause
            if self._no_accident() or self._idle_is_told:
                found[f"signal/{name}"] = f"step {step}: {cause}"
        found |= self._truncation(step, tally) | self._collapse(step, tally, metrics)
        new = [name for name in found if name not in self._active]
        if any(name.startswith("signal/") for name in new):
            # The collapse check reports the same fall.
            new = [name for name in new if name not in ("accuracy", "reward")]
        notices = [MessageEvent("warning", found[name]) for name in new]
        self._active = {name: self._active.get(name, text) for name, text in found.items()}
        self._tallies.append(tally)
        self._metrics.append(metrics)
        return notices + self._functions.after_step(step, tally)

    def after_eval(self, step: int, name: str, result: EvalResult) -> list[MessageEvent]:
        """Messages about new problems; `name` is the evaluation set's where there are several."""
        now, warning = result.accuracy, result.warning
        if now is None or warning is not None:
            told, self._unmeasured = name in self._unmeasured, self._unmeasured | {name}
            on = f" of {name}" if name else ""
            return [] if told else [MessageEvent("warning", f"step {step}, evaluation{on}: {warning}")]
        best = self._accuracies.get(name)
        if best is None or now.mean >= best.mean:
            self._accuracies[name] = now
            return []
        count = max(1, result.num_measured // result.num_samples)
        middle = (best.mean + now.mean) / 2
        least = (middle * (1 - middle) / count) ** 0.5
        error = (max(best.standard_error, least) ** 2 + max(now.standard_error, least) ** 2) ** 0.5
        fell = now.mean <= best.mean / 3 and best.mean - now.mean >= max(0.1, 4 * error)
        if not fell:
            return []
        # This is the level from now on, so the fall is reported once.
        self._accuracies[name] = now
        on = f" on {name}" if name else ""
        return [
            MessageEvent(
                "warning",
                f"step {step}: held-out accuracy{on} fell from {best.mean:.1%} to {now.mean:.1%}: {after_a_fall(self.config)}",
            )
        ]

    def at_the_end(self, step: int) -> list[MessageEvent]:
        """Messages that a run was too short to give before."""
        if self.steps_with_signal == 0:
            return []
        return self._functions.at_the_end(step)

    # How the run may end

    @property
    def gave_up(self) -> bool:
        limit = self.config.algorithm.max_steps_without_signal
        return 0 < limit <= self.steps_without_signal

    @property
    def problem(self) -> str | None:
        """The current problem, which comes before any advice on speed."""
        if self._idle_is_told:
            count = self.steps_without_signal
            return f"nothing was learned in the last {'step' if count == 1 else f'{count} steps'}: {self._cause}"
        return next(iter(self._active.values()), None)

    def check(self, step: int, *, finished: bool) -> None:
        """Check whether the run may go on, or end as a success.

        Raises:
            NoSignalError: there was nothing to learn from in too many steps in a row, or, of a finished run of more than one step,
                in all of them.
        """
        cause = f": {self._cause}" if self._cause else ""
        if self.gave_up:
            raise NoSignalError(
                f"there was nothing to learn from in {_steps(self.steps_without_signal)} up to step {step}{cause}. Everything is "
                "saved; change what is named, or set algorithm.max_steps_without_signal (0: go on for ever)"
            )
        never = self.steps_with_signal == 0 and step > 1 and self.config.algorithm.max_steps_without_signal > 0
        if finished and never:
            raise NoSignalError(f"nothing was trained in any of the {step} steps of this run{cause}")

    def why_all_dropped(self, step: int, tally: Tally) -> str:
        """The reason why dynamic sampling dropped all groups of a step."""
        return why_no_signal(self.config, step, tally, {}, self._tallies)[1]

    # Descriptions

    @property
    def _idle_is_told(self) -> bool:
        return any(name.startswith("signal/") for name in self._active)

    def _no_accident(self) -> bool:
        """Whether so many groups without signal are not explained by chance, or there has never been one with signal."""
        some, every = (sum(column) for column in zip(*self._with_signal, strict=True)) if self._with_signal else (0, 0)
        # Counted as if there had been one more of each kind: a few groups that all had signal prove little.
        return not some or (1 - (some + 1) / (every + 2)) ** self._idle_groups < UNLIKELY

    def _truncation(self, step: int, tally: Tally) -> dict[str, str]:
        limit, rate = self.config.rollout.max_completion_length, self._rate
        found = {}
        if limit > 1 and self._most(tally.cut, tally.samples, "truncated"):
            before = [t.cut / t.samples for t in self._tallies if t.samples]
            usual = sum(before) / len(before) if before else 1.0
            mend = (
                f"before, {usual:.0%} were. The policy no longer ends its answers: if rewards fall too, {rate}"
                if usual < 0.5
                else "raise it, or see whether the model ends its answers at all under this data.template (rollout.stop)"
            )
            what = f"{tally.cut} of {tally.samples} completions were cut at rollout.max_completion_length ({limit})"
            masked = (
                ", and algorithm.mask_truncated leaves them out of the loss"
                if self.config.algorithm.mask_truncated
                else ""
            )
            found["truncated"] = f"step {step}: {what}{masked}; {mend}"
        if self._most(tally.empty, tally.samples, "empty"):
            found["empty"] = (
                f"step {step}: {tally.empty} of {tally.samples} completions are empty: the policy ends its answers at once. See "
                f"whether the prompt leaves it something to say (data.template, rollout.stop); if it did answer before, {rate}"
            )
        return found

    @property
    def _rate(self) -> str:
        return f"lower learner.learning_rate ({self.config.learner.learning_rate:g})"

    def _most(self, part: int, whole: int, name: str) -> bool:
        if not whole:
            return False
        least = MOST_STILL if name in self._active else MOST
        return part == whole or (part >= least * whole and (whole >= FEW or name in self._active))

    def _collapse(self, step: int, tally: Tally, metrics: Mapping[str, float]) -> dict[str, str]:
        if any(f.from_step and f.from_step == step - 1 for f in self.config.reward.functions):
            # The reward differs from here on, so earlier values are no measure of it.
            self._tallies.clear()
        every = [*self._tallies, tally]
        found = {}
        if fall := accuracy_fell([t.right for t in every], told="accuracy" in self._active):
            found["accuracy"] = (
                f"step {step}: {tally.accuracy} is right for {fall.now:.1%} of the samples, and was for {fall.level:.1%}: "
                f"{after_a_fall(self.config)}"
            )
        elif fall := reward_fell(
            [t.of_groups for t in every], [t.of_samples for t in every], told="reward" in self._active
        ):
            found["reward"] = (
                f"step {step}: the mean reward fell from {fall.level:.3g} to {fall.now:.3g}: {after_a_fall(self.config)}"
            )
        return found | self._of_entropy(step, tally, metrics) | self._of_gradient(step, metrics)

    def _of_entropy(self, step: int, tally: Tally, metrics: Mapping[str, float]) -> dict[str, str]:
        now = metrics.get("entropy")
        before = [m["entropy"] for m in self._metrics if "entropy" in m]
        if now is None:
            return {}
        if fall := entropy_rose(before, now, told="entropy" in self._active):
            or_else = " or algorithm.entropy_coef" if self.config.algorithm.entropy_coef else ""
            what = f"the policy's entropy rose from {fall.level:.2f} to {fall.now:.2f} nats a token: it is turning into noise"
            return {"entropy": f"step {step}: {what}; {self._rate}{or_else}"}
        if entropy_vanished(before, now, tally.right.mean if tally.right.count else None):
            what = f"the policy's entropy fell to {now:.4f} nats a token while most answers are wrong: it tries nothing else"
            return {
                "no entropy": f"step {step}: {what}; {self._rate}, or use algorithm.epsilon_high, entropy_coef or beta"
            }
        return {}

    def _of_gradient(self, step: int, metrics: Mapping[str, float]) -> dict[str, str]:
        now, before = metrics.get("grad_norm", 0.0), [m.get("grad_norm", 0.0) for m in self._metrics]
        if not gradient_exploded(before, now, max(self.config.learner.max_grad_norm, 1.0)):
            return {}
        what = f"the gradient norm is {now:.3g}, over a hundred times as large as before"
        return {"gradient": f"step {step}: {what}; if rewards fall, {self._rate}"}


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps in a row"
