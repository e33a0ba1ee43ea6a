"""A loss and an advantage of a recipe's own: as good as built in, and refused before a run where they are not."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_ray.algorithm.train_batch import set_advantages
from grpo_ray.algorithm.users import check_users, has_sequence_ratio
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.loading import to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from grpo_ray.rewards.functions.files import with_shipped_files
from grpo_ray.types import Group
from launch.check.command import check_recipe
from launch.run.foreign_code import check_code
from launch.run.preflight import preflight
from launch.run.recipe import load_recipe, load_run_config
from tests.algorithm.test_train_batch import group
from tests.naive_losses import make_batch
from tests.packed import gradient, run
from tests.recipes import RL, run_config
from tests.shapes import unchecked

MINE = """
import torch
from grpo_ray.algorithm.declare import policy_loss
from grpo_ray.algorithm.losses.policy import TokenLosses


def grpo(inputs, options):
    ratio = (inputs.logps_N - inputs.old_logps_N).clamp(-20.0, 20.0).exp()
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    bounded, a = ratio.clamp(low, high), inputs.advantages_N
    return TokenLosses(
        -torch.minimum(ratio * a, bounded * a), ratio.detach(), (ratio < low) & (a < 0), (ratio > high) & (a > 0)
    )


@policy_loss(average="token_mean")
def dapo(inputs, options):
    return grpo(inputs, options)


@policy_loss(ratio="sequence")
def whole(inputs, options):
    return grpo(inputs, options)


def detached(inputs, options):
    out = grpo(inputs, options)
    return TokenLosses(out.loss_N.detach(), out.ratio_N, out.clip_low_N, out.clip_high_N)


def one_number(inputs, options):
    out = grpo(inputs, options)
    return TokenLosses(out.loss_N.mean(), out.ratio_N, out.clip_low_N, out.clip_high_N)


def tensor(inputs, options): return grpo(inputs, options).loss_N


def one(inputs): ...


def three(inputs, options, strength): ...


def named_only(inputs, options, *, strength): ...


def spare(inputs, options, strength=2): return grpo(inputs, options)


async def later(inputs, options): ...


class Loss:
    def __init__(self, inputs, options): ...


def standardised(rewards):
    variance = rewards.centred_PG.square().sum(dim=1, keepdim=True) / (rewards.num_P1 - rewards.ddof).clamp(min=1)
    return rewards.centred_PG / (variance.sqrt() + rewards.eps)


def by_rank(rewards, scale): ...


def infinite(rewards): return rewards.raw_PG / 0


def flat(rewards): return rewards.raw_PG.flatten()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 40)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def of(here: Path, **values: Any) -> AlgorithmConfig:
    named: dict[str, Any] = {k: f"{here}/mine.py:{v}" if k in ("loss", "advantage") else v for k, v in values.items()}
    return AlgorithmConfig(**named)


@pytest.mark.parametrize("built_in", ["grpo", "dapo"])
@pytest.mark.parametrize("split", [None, [[0, 1, 2], [3]]])
def test_a_loss_of_ones_own_has_the_bits_of_the_built_in_gradient_and_its_metrics(
    built_in: str, split: Any, here: Path
) -> None:
    b = make_batch(3)
    split = split and [split[0], [*range(3, len(b.lengths))]]
    extra: dict[str, Any] = {"importance_sampling": "token_truncate", "beta": 0.1, "entropy_coef": 0.01}
    (want, metrics), (got, own) = (
        run(AlgorithmConfig(loss=built_in, **extra), b, split),
        run(of(here, loss=built_in, **extra), b, split),
    )
    assert torch.equal(gradient(got, b), gradient(want, b))
    assert gradient(want, b).norm() > 0
    assert own == metrics


def advantages(config: AlgorithmConfig) -> list[list[float]]:
    rewards = [[1.0, 0.0, 0.3, float("nan")], [0.1, 0.1, 0.1, 0.1], [0.0, 0.7, 0.7, 0.2]]
    groups: list[Group] = [group(row, ["stop"] * 4) for row in rewards]
    set_advantages(groups, config)
    return [g.advantages for g in groups]


def test_an_advantage_of_ones_own_has_the_bits_of_the_built_in(here: Path) -> None:
    got = advantages(of(here, advantage="standardised"))
    assert got == advantages(AlgorithmConfig())
    assert got[0][0] > 0
    assert got[0][3] == 0


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("loss", "one", r"can't be called with \(inputs, options\)"),
        ("loss", "three", r"strength"),
        ("loss", "named_only", r"strength"),
        ("loss", "later", r"coroutine"),
        ("loss", "Loss", r"class"),
        ("loss", "gprpo", r"did you mean 'grpo'"),
        ("advantage", "by_rank", r"can't be called with \(rewards\).*launch/guide/extend.md"),
    ],
)
@pytest.mark.parametrize("imports", [False, True])
def test_what_does_not_fit_the_contract_is_refused_with_file_and_line(
    option: str, name: str, expected: str, imports: bool, here: Path
) -> None:
    defined = [n for n, line in enumerate(MINE.splitlines(), 1) if re.search(rf"(def|class) {name}\b", line)]
    where = rf"mine\.py, line {defined[0]}\) .*" if defined else ""
    with pytest.raises(ConfigError, match=rf"algorithm\.{option} .*{where}{expected}"):
        check_users(of(here, **{option: name}), imports=imports)


@pytest.mark.parametrize("imports", [False, True])
def test_a_parameter_with_a_default_may_stand_behind_the_contracts(imports: bool, here: Path) -> None:
    check_users(of(here, loss="spare", advantage="standardised"), imports=imports)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("detached", "loss_N has no gradient"),
        ("one_number", r"loss_N is \[\]; expected a tensor of shape \[\d+\]"),
        ("tensor", "gave a Tensor; a loss is a function"),
    ],
)
def test_what_a_loss_gives_is_looked_at(name: str, expected: str, here: Path) -> None:
    with unchecked(), pytest.raises(ConfigError, match=expected):
        run(of(here, loss=name), make_batch(0))


@pytest.mark.parametrize(
    ("name", "expected"), [("infinite", "NaN or infinity"), ("flat", r"\[12\]; expected .*\[3, 4\]")]
)
def test_what_an_advantage_gives_is_looked_at(name: str, expected: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        advantages(of(here, advantage=name))


@pytest.mark.parametrize("imports", [False, True])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"importance_sampling": "token_mask"}, "sequence_truncate or sequence_mask"),
        ({"max_staleness": 1}, "sequence_truncate or sequence_mask"),
    ],
)
def test_a_ratio_of_the_sequence_takes_no_options_by_the_token(
    values: dict[str, Any], expected: str, imports: bool, here: Path
) -> None:
    check_users(of(here, loss="grpo", **values), imports=imports)
    with pytest.raises(ConfigError, match=expected):
        check_users(of(here, loss="whole", **values), imports=imports)
    check_users(of(here, loss="whole", **values | {"importance_sampling": "sequence_mask"}), imports=imports)


@pytest.mark.parametrize("imports", [False, True])
def test_a_ratio_of_the_sequence_takes_no_advantages_by_the_token(imports: bool, here: Path) -> None:
    config = replace_advantage(of(here, loss="whole"), "process")
    with pytest.raises(ConfigError, match="gives every token its own advantage"):
        check_users(config, imports=imports)
    check_users(replace_advantage(of(here, loss="grpo"), "process"), imports=imports)


def replace_advantage(config: AlgorithmConfig, kind: str) -> AlgorithmConfig:
    return AlgorithmConfig(loss=config.loss, advantage=kind)


def test_the_ratio_is_that_which_the_loss_declares(here: Path) -> None:
    assert [has_sequence_ratio(of(here, loss=name)) for name in ("grpo", "dapo", "whole")] == [False, False, True]
    assert [has_sequence_ratio(AlgorithmConfig(loss=name)) for name in ("grpo", "gspo")] == [False, True]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm.loss=gprpo",
            "algorithm.loss 'gprpo' is not known; did you mean grpo.* built in are .*file.py:function",
        ),
        ("algorithm.advantage=rlo", "did you mean rloo"),
        ("algorithm.loss=zzz", "built in are grpo, .*A function of yours is named package.module.function"),
        ("algorithm.package=trl", "algorithm.package 'trl' .*take it out"),
        ("algorithm.loss=none.py:f", "algorithm.loss 'none.py:f': there is no file none.py in"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_name_that_there_is_not_is_told_with_how_to_name_ones_own(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe(RunConfig, "recipe.yaml", [override])


@pytest.mark.parametrize("name", ["subprocess.run", "torch.load", "grpo_ray.algorithm.losses.grpo.clipped_token_ratio"])
@pytest.mark.parametrize("option", ["loss", "advantage"])
@pytest.mark.usefixtures("here")
def test_functions_of_python_of_libraries_and_of_grpo_ray_are_refused(option: str, name: str) -> None:
    for package in (None, name.partition(".")[0]):
        with pytest.raises(ConfigError, match=rf"algorithm\.{option} '{name}'"):
            check_users(AlgorithmConfig.model_validate({option: name, "package": package}), imports=True)


def test_a_run_keeps_the_file_of_its_loss_and_reads_it_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["algorithm.loss=mine.py:dapo", "algorithm.advantage=mine.standardised", "algorithm.epsilon_high=0.3"]
    config = load_recipe(RunConfig, "recipe.yaml", overrides)
    assert config.algorithm.loss == f"{here}/mine.py:dapo"
    (here / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir("/")
    again = load_run_config(RunConfig, here / "config.yaml")
    assert again == config
    assert (
        run(again.algorithm, make_batch(1))[1] == run(AlgorithmConfig(loss="dapo", epsilon_high=0.3), make_batch(1))[1]
    )


def test_a_submitted_loss_is_named_by_its_place_in_what_is_shipped(here: Path) -> None:
    config = load_recipe(RunConfig, "recipe.yaml", [f"algorithm.loss={here}/mine.py:dapo"])
    assert with_shipped_files(config, here, here).algorithm.loss == "mine.py:dapo"
    with pytest.raises(ConfigError, match=r"algorithm.loss .* is outside of"):
        with_shipped_files(config, here, here / "elsewhere")


def test_check_names_a_loss_and_an_advantage_and_imports_them_only_when_told_to(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "noisy.py").write_text("open('IMPORTED', 'w')\ndef loss(x, o): ...\ndef advantage(r): ...\n")
    overrides = ["algorithm.loss=noisy.py:loss", "algorithm.advantage=noisy.advantage"]
    check_recipe("recipe.yaml", overrides)
    out = "".join(capsys.readouterr().out.split())
    assert not (here / "IMPORTED").exists()
    assert f"algorithm.loss:lossof{here}/noisy.py:read,notrun" in out
    assert f"algorithm.advantage:advantageof{here}/noisy.py:read,notrun" in out
    check_recipe("recipe.yaml", overrides, run_code=True)
    assert (here / "IMPORTED").exists()
    with pytest.raises(ConfigError, match=r"line 2\) can't be called with \(rewards\)"):
        check_recipe("recipe.yaml", ["algorithm.advantage=noisy.loss"])


def test_what_is_not_trained_needs_no_loss_and_what_is_resumed_needs_one_that_fits(here: Path) -> None:
    config = run_config(f"algorithm.loss={here}/mine.py:grpo")
    preflight(config)
    check_code(config)
    source = (here / "mine.py").read_text()
    (here / "mine.py").write_text(source.replace("def grpo(", "def grpo(needed, more, "))
    with pytest.raises(ConfigError, match=r"mine\.py, line \d+\) can't be called with \(inputs, options\)"):
        check_code(config)
    (here / "mine.py").unlink()
    for refuse in (preflight, check_code):
        with pytest.raises(ConfigError, match=r"algorithm\.loss"):
            refuse(config)
        refuse(config, trains=False)
