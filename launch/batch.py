"""The command of a job that its scheduler, or the job itself, may restart: `python -m launch.batch train RECIPE ...`.

The first start runs the command as typed, and later ones `resume` the run once it exists. Other commands continue by themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.run.recipe import COMMANDS, SCHEMAS, load_recipe, run_folder

KINDS = {command: kind for kind, command in COMMANDS.items()}
NAMED = (*KINDS, "sample", "pipeline")
"""The commands whose runs have a name; a name made from the time would differ at every start."""


def command_of(words: list[str], job: str) -> list[str]:
    """The words to give to `grpo-ray` this time.

    Args:
        words: the command as typed.
        job: the name for a run without one.

    Raises:
        ConfigError: the recipe is wrong.
    """
    if len(words) < 2 or words[0] not in NAMED:
        return words
    command, recipe, *overrides = words
    if not any(word.startswith("name=") and word != "name=" for word in overrides) and not _has_name(recipe):
        overrides = [*overrides, f"name={job}"]
    if command in KINDS:
        folder = run_folder(load_recipe(SCHEMAS[KINDS[command]], recipe, [w for w in overrides if "=" in w]), recipe)
        if (folder / "config.yaml").is_file():
            return ["resume", str(folder)]
    return [command, recipe, *overrides]


def _has_name(recipe: str) -> bool:
    from grpo_ray.config.loading import load_yaml
    from launch.run.recipe import find_recipe

    return load_yaml(find_recipe(recipe)).get("name") is not None


def main() -> None:
    from launch.cli import main as grpo_ray

    words = sys.argv[1:]
    job = f"{Path(words[1]).stem}-{os.environ.get('SLURM_JOB_ID', 'job')}" if len(words) > 1 else ""
    sys.argv[1:] = command_of(words, job)
    grpo_ray()


if __name__ == "__main__":
    main()
