"""Records of `grpo-ray eval`: one folder for each call, in the run that it evaluates or beside the runs.

    RUN/evals/NAME-step-000040/     again: NAME-step-000040-2
      settings.yaml                 the config, fully resolved
      figures.json                  step, model with its SHA-256; of each set: its measures with their errors, rewards by function
      answers/SET/samples-000000.parquet   every prompt with its answers and scores, as `grpo-ray sample` writes them

`figures.json` comes last: a folder without one belongs to an evaluation that did not finish.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from grpo_ray.config.loading import to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole
from grpo_ray.run.checkpoint_store import step_of_name
from grpo_ray.telemetry.measures import EvalResult, accuracy_name
from grpo_ray.telemetry.sample_figures import Figures

FOLDER = "evals"
SETTINGS, FIGURES, ANSWERS = "settings.yaml", "figures.json", "answers"


def new_record(parent: Path, name: str, config: RunConfig) -> Path:
    """Create a folder with the settings in it; its name gets a number where it is taken.

    Raises:
        ConfigError: the folder cannot be created.
    """
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            write_whole(folder / SETTINGS, to_yaml(config).encode())
        except FileExistsError:
            continue
        except OSError as e:
            raise ConfigError(
                f"the record of this evaluation can't be written to {folder} ({e.strerror}); name another place with dir=..."
            ) from None
        return folder
    raise AssertionError


def step_of(model: Path) -> int | None:
    """The step of the checkpoint that contains the model; None if it is in no checkpoint."""
    return step_of_name(model.resolve().parent.name)


def answers_folder(record: Path, set_name: str) -> Path:
    return record / ANSWERS / (set_name or "eval")


def set_figures(result: EvalResult, figures: Figures) -> dict[str, Any]:
    """The figures of one evaluation set, for `figures.json`."""
    return {
        "measures": {name: asdict(estimate) for name, estimate in result.measures.items()},
        "num_prompts": result.num_prompts,
        "num_samples": result.num_samples,
        "not_applicable": result.num_not_applicable,
        "mean_length": result.mean_length,
        "reward": asdict(figures.reward),
        "rewards": {name: asdict(worth) for name, worth in figures.functions.items()},
    }


def write_figures(
    record: Path, config: RunConfig, model_sha256: str, sets: Mapping[str, dict[str, Any]], seconds: float
) -> None:
    path = config.model.path
    told = {
        "model": path or "tiny",
        "model_sha256": model_sha256,
        "step": step_of(Path(path)) if path else None,
        "accuracy": accuracy_name(config),
        "seconds": round(seconds, 1),
        "sets": sets,
    }
    write_whole(record / FIGURES, json.dumps(told, indent=1, allow_nan=False).encode())
