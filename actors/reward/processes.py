"""The scoring processes of one reward worker, behind the interface of one."""

from __future__ import annotations

from collections.abc import Sequence

from actors.reward.process import ScoringProcess
from grpo_ray.config.reward import RewardConfig
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.types import RewardScore


class ScoringProcesses:
    """One process for the built-in rewards that need nothing of the host, without network and HOME, and one for all other
    functions."""

    def __init__(
        self, config: RewardConfig, start_timeout_s: float = 120.0, *, with_environments: bool = False
    ) -> None:
        self._at: dict[int, tuple[ScoringProcess, int]] = {}
        """Index of a function -> its process, and its index there."""
        self._processes: list[ScoringProcess] = []
        for needs_host in (False, True):
            indices = [i for i, function in enumerate(config.functions) if function.needs_host is needs_host]
            if indices:
                part = config.model_copy(update={"functions": tuple(config.functions[i] for i in indices)})
                process = ScoringProcess(part, start_timeout_s, with_environments=with_environments)
                self._processes.append(process)
                self._at |= {index: (process, at) for at, index in enumerate(indices)}

    def start(self) -> None:
        """Start both; raises RewardError, naming the function that can't be imported."""
        for process in self._processes:
            process.start()

    def takes_whole(self, function: int) -> bool:
        """See `ScoringProcess`."""
        process, at = self._at[function]
        return process.takes_whole(at)

    def run(self, calls: Sequence[tuple[int, ScoreInputs]]) -> list[list[RewardScore]]:
        """See `ScoringProcess`; one process after the other."""
        results: dict[int, list[RewardScore]] = {}
        for process in self._processes:
            own = [i for i, (function, _) in enumerate(calls) if self._at[function][0] is process]
            found = process.run([(self._at[calls[i][0]][1], calls[i][1]) for i in own])
            results |= dict(zip(own, found, strict=True))
        return [results[i] for i in range(len(calls))]

    def stop(self) -> None:
        """See `ScoringProcess`."""
        for process in self._processes:
            process.stop()

    def kill(self) -> None:
        """See `ScoringProcess`."""
        for process in self._processes:
            process.kill()
