"""Trackers of metrics. `metrics.jsonl` is always written, since the report reads it; others are optional.

A tracker other than that one never ends a run: its first failure is reported, and the run goes on without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from grpo_ray import json_text
from grpo_ray.config.common import TrackingConfig
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole

MAX_STEP = 1 << 40
"""The bound of step numbers; larger ones come from no run."""
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A destination of metrics: JSONL, TensorBoard, W&B, MLflow."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line and a step: `{"step": 3, "time": 1700000000.0, "reward/mean": 0.5, ...}`.

    Two records of one step (training, then its evaluation) become one line. Not-a-number becomes null.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the file. `resume_step`: drop the lines after it, which `records.set_aside` has kept. None: cut off a torn last line
        and keep everything else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(path, resume_step)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.seek(0, os.SEEK_END)
        self._last: dict[str, Any] = {}
        self._last_start = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        new = {"step": step, "time": time.time(), **{k: _finite(v) for k, v in metrics.items()}}
        if self._last.get("step") == step:
            # Padded to the length of what it replaces, so that nothing of the old line is left behind it.
            self._last = {**self._last, **new, "time": self._last["time"]}
            line = _line(self._last).ljust(self._file.tell() - self._last_start - 1)
            self._file.seek(self._last_start)
        else:
            self._last, self._last_start = new, self._file.tell()
            line = _line(new)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, one a step, in order of steps. A torn line is skipped; without a file there are no lines."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        record = _parse(line)
        if record is not None:
            by_step[record["step"]] = {**by_step.get(record["step"], {}), **record}
    return [by_step[step] for step in sorted(by_step)]


def truncate_after(path: Path, step: int | None) -> None:
    """Drop torn lines and those of steps after `step` (None: of no step); the others stay as they are. All or nothing."""
    if not path.exists():
        return
    old = path.read_bytes()
    new = b"".join(line for n, line in _whole_lines(old) if step is None or n <= step)
    if new == old:
        return
    write_whole(path, new)


def lines_after(path: Path, step: int) -> list[bytes]:
    """The lines that `truncate_after` drops and that are not torn."""
    return [line for n, line in _whole_lines(path.read_bytes()) if n > step] if path.exists() else []


def _whole_lines(data: bytes) -> list[tuple[int, bytes]]:
    """Each complete line with its step, and the position of its end."""
    lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    return [(record["step"], line) for line in lines if (record := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json_text.read(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and _is_step(record.get("step")) and _are_figures(record) else None


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_STEP


def _are_figures(record: dict[str, Any]) -> bool:
    """Whether the values are numbers that a float can hold, or null: what `JsonlTracker` writes."""
    return all(value is None or (isinstance(value, int | float) and abs(value) < math.inf) for value in record.values())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False)


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


class TensorBoardTracker:
    """Event files under `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A W&B run with the id kept in the run directory, so that a resumed run continues the same curves.

    W&B takes no step back: after a resume the steps since the checkpoint appear twice over the axis `step`.
    """

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        wandb = _package("wandb")
        id_file = run_dir / "wandb-run-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project, name=run_dir.name, id=id_file.read_text(), resume="allow", dir=str(run_dir), config=config
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run on the server at MLFLOW_TRACKING_URI, in the experiment `project`; its id is in the run folder."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        _package("mlflow")
        tracking = importlib.import_module("mlflow.tracking")
        self._param = importlib.import_module("mlflow.entities").Param
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._client = tracking.MlflowClient()
        id_file = run_dir / "mlflow-run-id"
        if id_file.exists():
            self._run_id = id_file.read_text()
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._run_id = self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        params = [self._param(k, str(v)[:MLFLOW_VALUE_LIMIT]) for k, v in _flat(config).items()]
        for start in range(0, len(params), MLFLOW_PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + MLFLOW_PARAMS_A_CALL])
        id_file.write_text(self._run_id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow refuses a name with an `@`: pass@8.
        figures = [
            self._metric(k.replace("@", "_at_"), float(v), now, step) for k, v in metrics.items() if math.isfinite(v)
        ]
        self._client.log_batch(self._run_id, metrics=figures)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


MLFLOW_PARAMS_A_CALL = 100
MLFLOW_VALUE_LIMIT = 500


class BestEffortTracker:
    """A tracker whose failures are reported once and otherwise ignored: external metrics are not worth a run."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """Create the tracker. Raises ConfigError when its package is missing, which is known before anything has run."""
        self._name = name
        self._told = False
        self._inner: Tracker | None = None
        self._try(lambda: setattr(self, "_inner", make()))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        inner = self._inner
        if inner is not None:
            self._try(lambda: inner.log(step, metrics))

    def close(self) -> None:
        inner = self._inner
        if inner is not None:
            self._try(inner.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except ConfigError:
            raise
        except Exception as e:
            if not self._told:
                log.warning("tracking to %s failed, the run goes on: %s: %s", self._name, type(e).__name__, e)
            self._told = True


def make_trackers(
    config: TrackingConfig, run_dir: Path, resume_step: int | None, config_dict: dict[str, Any]
) -> list[Tracker]:
    """Every tracker that the config asks for; `metrics.jsonl` is the first.

    Args:
        resume_step: continue after this step, dropping later ones. None: a fresh run.
        config_dict: the resolved config, for trackers that show it.

    Raises:
        ConfigError: the package of a requested tracker is not installed.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl", resume_step)]
    if config.tensorboard:
        trackers.append(
            BestEffortTracker("TensorBoard", lambda: TensorBoardTracker(run_dir / "tensorboard", resume_step))
        )
    if config.wandb:
        trackers.append(BestEffortTracker("W&B", lambda: WandbTracker(config.project, run_dir, config_dict)))
    if config.mlflow:
        trackers.append(BestEffortTracker("MLflow", lambda: MlflowTracker(config.project, run_dir, config_dict)))
    return trackers


def check_packages(config: TrackingConfig) -> None:
    """Check the packages. Raises ConfigError if that of a requested tracker is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise _lacking(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise _lacking(name) from None


def _lacking(name: str) -> ConfigError:
    return ConfigError(
        f"tracking.{name} is true, but the package {name} is not installed; "
        f"pip install grpo-ray[{name}], or set tracking.{name} to false"
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
