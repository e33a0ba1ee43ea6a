"""The figures of a run as metrics of Ray, which every node serves to Prometheus; launch/grafana/ shows them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from grpo_ray.telemetry.catalogue import matches, star
from grpo_ray.telemetry.prometheus import COUNTS, DISTRIBUTIONS, LABELS, STEPS, exported

REFRESH_S = 5.0
"""The period at which gauges are set again, since Ray drops a gauge that is not."""


class RayMetrics:
    """A tracker. Gauges hold the newest step; `live` is polled."""

    def __init__(self, run: str, live: Callable[[], Mapping[str, float]]) -> None:
        """It needs a running event loop."""
        self._run = run
        self._live = live
        self._newest: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._counters = {c: Counter(c.name, c.help, tag_keys=LABELS) for c in (*COUNTS, STEPS)}
        self._histograms = {
            d: Histogram(d.name, d.help, boundaries=list(d.boundaries), tag_keys=LABELS) for d in DISTRIBUTIONS
        }
        self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    def log(self, _step: int, metrics: dict[str, float]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._newest |= finite
        for name, value in finite.items():
            self._set(name, value)
            for count in COUNTS:
                if value > 0 and matches(name, count.metric):
                    self._counters[count].inc(value, self._labels(star(name, count.metric)))
            for distribution, histogram in self._histograms.items():
                if name == distribution.metric:
                    histogram.observe(value, self._labels())
        if STEPS.metric in finite:
            self._counters[STEPS].inc(1, self._labels())

    def close(self) -> None:
        self._refreshing.cancel()

    async def _refresh(self) -> None:
        while True:
            for name, value in {**self._newest, **self._live()}.items():
                self._set(name, value)
            await asyncio.sleep(REFRESH_S)

    def _set(self, metric: str, value: float) -> None:
        what = exported(metric)
        gauge = self._gauges.get(what.name)
        if gauge is None:
            gauge = self._gauges[what.name] = Gauge(what.name, what.help, tag_keys=LABELS)
        gauge.set(value, self._labels(what.of))

    def _labels(self, of: str = "") -> dict[str, str]:
        return {"run": self._run, "of": of}
