"""`grpo-ray eval` with several samples of each prompt, on two sets by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.end_to_end.runs import LIMIT_S, run, write_recipe

pytestmark = [pytest.mark.timeout(2 * LIMIT_S), pytest.mark.slow]


def test_each_set_gets_its_line_with_pass_at_k_and_the_vote(tmp_path: Path) -> None:
    sets = "{path: 'reasoning_gym:chain_sum', args: {size: %d, seed: %d}}"
    overrides = [
        f"dir={tmp_path}",
        "eval={num_samples: 4, temperature: 1, threshold: 0.3}",
        f"data.eval={{few: {sets % (3, 2)}, more: {sets % (5, 4)}}}",
    ]
    # The recipe has one source, which overrides would join instead of replacing.
    recipe = write_recipe(tmp_path)
    recipe.write_text(re.sub(r"(?m)^  eval:\n(?:    .*\n)+", "", recipe.read_text()))
    code, output = run("eval", str(recipe), *overrides)
    assert code == 0, output
    figure = r"\d+\.\d% ± \d+\.\d"
    for name, num_samples in (("few", 12), ("more", 20)):
        line = (
            rf"held-out accuracy on {name} {figure} \({num_samples} samples\), "
            rf"pass@2 {figure}, pass@4 {figure}, cons@4 {figure}"
        )
        assert re.search(line, output.replace("\n", " ")), output
