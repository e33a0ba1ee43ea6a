"""Labels of nodes: what Ray takes, and which nodes it would choose."""

from __future__ import annotations

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from grpo_ray.labels import fits


@pytest.mark.parametrize(
    ("selector", "in_a", "in_b", "nowhere"),
    [
        ("a", True, False, False),
        ("!a", False, True, True),
        ("in(a)", True, False, False),
        ("in(a, b)", True, True, False),
        ("!in(a,c)", False, True, True),
    ],
)
def test_a_selector_chooses_nodes(selector: str, in_a: bool, in_b: bool, nowhere: bool) -> None:
    assert [fits(labels, {"zone": selector}) for labels in ({"zone": "a"}, {"zone": "b"}, {})] == [in_a, in_b, nowhere]


def test_every_entry_has_to_hold() -> None:
    assert fits({"zone": "a", "kind": "x"}, {"zone": "a", "kind": "!y"})
    assert not fits({"zone": "a", "kind": "y"}, {"zone": "a", "kind": "!y"})
    assert fits({}, {})


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"labels": {"zone": "in()"}}, "'in.*' selects no label"),
        ({"labels": {"zone": "a b"}}, "'a b' selects no label"),
        ({"labels": {"-zone": "a"}}, "'-zone' is no label's name"),
        ({"resources": {"CPU": 2}}, "CPU is no custom resource: use num_cpus"),
        ({"resources": {"engines": 0}}, "rollout.resources.engines"),
    ],
)
def test_what_ray_would_not_take_is_refused_by_the_config(rollout: dict[str, object], said: str) -> None:
    data = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x"}},
        "reward": {"functions": [{"name": "accuracy"}]},
        "rollout": rollout,
    }
    with pytest.raises(ConfigError, match=said):
        build(RunConfig, data, "test")


def test_rays_own_checks_take_what_ours_take() -> None:
    from ray._private.label_utils import validate_label_selector

    taken = {"zone": "a", "ray.io/accelerator-type": "H100", "b": "!x-1", "c": "in(a, b_c)", "d": "!in(a,b)"}
    from grpo_ray.labels import check_labels

    assert check_labels(taken) == taken
    assert validate_label_selector(taken) is None
