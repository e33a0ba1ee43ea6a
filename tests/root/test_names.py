"""Names and secrets: what may be written where others read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_ray.config.loading import build
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.errors import ConfigError
from grpo_ray.names import check_name, run_name
from grpo_ray.secrets import HIDDEN, hide_secrets, is_secret_name, resolve, secret_values


@pytest.mark.parametrize("name", ["smoke", "smoke-20261124.1", "A_b", "7"])
def test_a_plain_name_is_taken_as_it_is(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".eval", "-x", "a b", "a/b", "a;b", "$(x)", "a\nb", "a\n", "ä", "x" * 101, "a'b", "a%2fb"]
)
def test_a_name_that_means_something_to_a_shell_a_path_or_a_url_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        check_name(name)


@given(st.text(max_size=20))
def test_a_name_that_is_taken_is_one_word_everywhere(name: str) -> None:
    import shlex
    from urllib.parse import quote

    try:
        check_name(name)
    except ConfigError:
        return
    assert shlex.quote(name) == quote(name, safe="") == Path(name).name == name


def test_the_scratch_folder_of_an_evaluation_has_a_name_too() -> None:
    assert run_name(Path("runs/.eval")) == "eval"


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        ("HF_TOKEN", True),
        ("RAY_AUTH_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("DB_PASSWORD", True),
        ("OPENAI_API_KEY", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("OMP_NUM_THREADS", False),
        ("RAY_AUTH_MODE", False),
        ("MAX_TOKENS", False),
    ],
)
def test_secrets_are_known_by_their_names(variable: str, secret: bool) -> None:
    assert is_secret_name(variable) is secret


def test_a_recipe_names_a_secret_and_does_not_hold_it() -> None:
    with pytest.raises(ConfigError, match=r"env\.HF_TOKEN looks like a secret.*HF_TOKEN: \$\{HF_TOKEN\}"):
        build(RolloutConfig, {"env": {"HF_TOKEN": "hf_abcdefgh"}}, "recipe")
    config = build(RolloutConfig, {"env": {"HF_TOKEN": "${HF_TOKEN}", "X": "1"}}, "recipe")
    assert resolve(config.env, {"HF_TOKEN": "hf_abcdefgh"}) == {"HF_TOKEN": "hf_abcdefgh", "X": "1"}
    assert resolve(config.env, {}) == {"HF_TOKEN": "", "X": "1"}
    assert RewardConfig.model_fields["env"].annotation == dict[str, str]


def test_what_is_told_has_the_secrets_of_the_node_and_rays_token_taken_out(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    env = {
        "HF_TOKEN": "hf_abcdefgh",
        "LONG_TOKEN": "hf_abcdefghij",
        "A_SECRET": "true",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    assert secret_values(env) == ["0123456789abcdef", "hf_abcdefghij", "hf_abcdefgh"]
    text = "GET https://x/?t=hf_abcdefghij: 403, Bearer 0123456789abcdef is not hf_abcdefgh, that is true"
    assert hide_secrets(text, env) == f"GET https://x/?t={HIDDEN}: 403, Bearer {HIDDEN} is not {HIDDEN}, that is true"
