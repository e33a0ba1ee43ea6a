"""No recipe, record, report or message holds a key, a token or a password."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.config.loading import build, deep_merge
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError, JudgeError
from grpo_ray.rewards.endpoints.judge_client import Judge, JudgeOptions
from grpo_ray.secrets import hide_secrets, is_secret_name, secret_values
from launch.cli import _tell_error
from launch.cluster.submit import submit
from launch.pipeline.stages import load_plan
from launch.run.jobs import resume_run
from launch.run.recipe import load_recipe
from tests.cpu_time import cpu_below
from tests.recipes import RL

RANDOM = "Zx7qPm2vKw9sTb4nRd6hYj8c"
FORMS = [
    f"sk-{RANDOM}",
    f"sk-proj-{RANDOM}",
    f"sk-ant-api03-{RANDOM}",
    f"ghp_{RANDOM}",
    f"github_pat_{RANDOM}",
    f"glpat-{RANDOM}",
    f"hf_{RANDOM}",
    f"xoxb-123456789012-{RANDOM}",
    "AKIAIOSFODNN7EXAMPLE",
    f"AIza{RANDOM}{RANDOM}",
    f"nvapi-{RANDOM}",
    *(f"{form}{RANDOM}" for form in ("sk_live_", "whsec_", "hvs.", "ya29.", "xai-", "Bearer ", "Basic ")),
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{RANDOM}",
    "-----BEGIN RSA PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA==\n-----END OPENSSH PRIVATE KEY-----",
    f"https://user:{RANDOM}@judge/v1",
    f"s3://KEY:{RANDOM}@bucket/runs",
    f"simplecache::s3://KEY:{RANDOM}@bucket",
    f"https://{RANDOM}@host/v1",
    f"https://user:a/b{RANDOM}@host/v1",
    f"https://host/v1?token={RANDOM}",
    f"https://host/v1?x=1&api-key={RANDOM}",
    f"https://account.blob.core.windows.net/c?sv=2024&sig={RANDOM}",
    f"https://s3.host/b/o?X-Amz-Signature={RANDOM}",
    f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={RANDOM}==",
    f"Authorization: Bearer sk-{RANDOM}",
]
NAMES = [
    *(
        "OPENAI_KEY",
        "OPENAI_API_KEY",
        "GITHUB_PAT",
        "DB_PASS",
        "PGPASSWORD",
        "MYSQL_PWD",
        "WANDB_KEY",
        "AWS_SECRET_ACCESS_KEY",
    ),
    *(
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_KEY",
        "HF_TOKEN",
        "HUGGINGFACEHUB_API_TOKEN",
        "SLACK_BOT_TOKEN",
    ),
    *(
        "DB_PASSPHRASE",
        "AWS_ACCESS_KEY_ID",
        "SSH_PRIVATE_KEY",
        "SESSION_COOKIE",
        "VAULT_SECRET",
        "BEARER",
        "dbPassword",
        "apiKey",
    ),
]
HARMLESS_NAMES = [
    *(
        "PWD",
        "OLDPWD",
        "MAX_TOKENS",
        "EOS_TOKEN",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "MONKEY_PATCHES",
        "PATH",
        "SSH_AUTH_SOCK",
    ),
    *("COMPASS", "BYPASSES", "SAMPLES_PER_KEYWORD", "AUTHORS", "GPG_KEY", "RAY_AUTH_MODE"),
]
HARMLESS: list[dict[str, Any]] = [
    {"columns": {"secret": "hidden_word", "key": "answer_key"}},
    {"args": {"base_url": "http://host:8000/v1/a@b", "key": "answer", "answer_key": "final_answer"}},
    {"args": {"url": "https://host/v1?task=algebra&monkey=12345678", "eos_token": "<|im_end|>", "stop_token": "###"}},
    {"args": {"pad_token": "endoftext", "max_tokens": 4096, "token": None, "password": "", "auth": True}},
    {
        "args": {
            "path": "s3://bucket/runs/sk-learn",
            "remote": "ssh://git@host/repository",
            "hdfs": "hdfs://user@host/data",
        }
    },
    {
        "args": {
            "auth": "none",
            "credentials": "default",
            "lake": "abfss://a-container-of-a-long-name@account.dfs.host/x",
        }
    },
    {"args": {"api_key": "${MY_API_KEY}", "url": "https://user:${PASS}@host"}},
    {"name": "risk-averse-experiment-number-17", "text": "the task-specific-reward-function-of-mine"},
    {"env": {"HF_TOKEN": "${HF_TOKEN}", "LD_LIBRARY_PATH": "/usr/lib"}},
    {"model": "a/b", "sha": "0" * 64, "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e"},
]


HELD: list[tuple[str, dict[str, Any]]] = [
    ("api_keys.0", {"api_keys": [RANDOM]}),
    ("api_keys.1", {"api_keys": ["${FIRST}", "hunter2"]}),
    ("tokens.0", {"tokens": [RANDOM]}),
    ("passwords.a.b", {"passwords": {"a": {"b": "hunter2"}}}),
    ("credentials.x", {"credentials": {"user": "alice", "x": RANDOM}}),
    ("credentials.key", {"credentials": {"user": "alice", "key": "hunter-correcthorse"}}),
    ("credentials.0.x", {"credentials": [{"user": "alice", "x": RANDOM}]}),
    ("credentials.0.1", {"credentials": [["alice", RANDOM]]}),
    ("secret.openai", {"secret": {"openai": RANDOM}}),
    *(
        (name, {name: RANDOM})
        for name in ("api_key_1", "token2", "apiKey2", "password_prod", "SECRET_B", "hf_token_old")
    ),
    ("api_keys_2.0", {"api_keys_2": [RANDOM]}),
    ("db_password2", {"db_password2": "hunter"}),
    ("headers.0.value", {"headers": [{"name": "X-Api-Key", "value": RANDOM}]}),
    ("headers.Authorization", {"headers": {"Authorization": f"Token {RANDOM}"}}),
    ("command.1", {"command": ["--api-key", RANDOM]}),
    ("command.0", {"command": [f"--api-key={RANDOM}"]}),
    ("token", {"token": "abcd1234efgh"}),
    ("access_token", {"access_token": "hunter"}),
    ("database", {"database": f"host=db port=5432 user=me password={RANDOM}"}),
    ("database", {"database": f"Driver={{SQL Server}}; Server=db,1433;UID=me;PWD={RANDOM}"}),
    ("pwd", {"pwd": "hunter2zz"}),
]
"""Options that hold a secret below a telling name, and where."""
MORE_HARMLESS: list[dict[str, Any]] = [
    {"target_token": "Paris", "target_tokens": ["Paris", "London"], "reward_key": "score", "pad_token": "<pad>"},
    {"reward_key": "score_of_the_second_model_v2", "answer_key": "final-answer-2", "token1": "yes", "token": "Paris"},
    {"tokens": ["Yes", "No", "<|im_end|>"], "num_tokens": [1024, 2048], "pass_1": 12345678, "pass@10": "pass@10"},
    {"secret": "the word that nobody may say is Paris", "passwords": ["in plain words, not one of them"]},
    {"api_keys": ["${A}", "${B}"], "credentials": {"user": "alice.of.wonderland", "password": "${PASSWORD}"}},
    {"auth": {"type": "bearer", "url": "https://host/oauth/v2", "scope": "read_write"}, "credentials": ["default"]},
    {"credentials": {"path": "/run/secrets/gcp.json", "env": "GOOGLE_APPLICATION_CREDENTIALS"}},
    {"columns": {"api_keys": "what_it_is_called", "tokens": "tokens_of_it"}, "secret_words": ["banana42", "cherry43"]},
    {"headers": [{"name": "Content-Type", "value": "application/json"}], "command": ["--max-tokens", "4096"]},
    {
        "settings": "port=5432 mode=fast;max_tokens=4096",
        "note": "Say password=hunter22 and nothing else, as the story does.",
    },
    {"rubric": "Score 1 where the password: hunter2 and the api_key = abc12345 of the story are named."},
]


def recipe(**reward: Any) -> dict[str, Any]:
    return deep_merge(RL, {"reward": {"functions": [{"name": "my.judge", **reward}]}})


def told(data: dict[str, Any], secret: str = RANDOM) -> str:
    with pytest.raises(ConfigError) as error:
        build(RunConfig, data, f"recipe r with reward.functions=[{{args: {{password: {secret}}}}}]")
    assert secret not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", FORMS)
def test_no_option_holds_a_key_of_a_known_form(text: str) -> None:
    for args in ({"x": text}, {"deep": [{"er": ["a", text]}]}, {text: 1}, {"about": f"use {text} for it"}):
        assert "holds what looks like a secret" in told(recipe(args=args))
    for data in (
        {"checkpoint": {"path": text}},
        {"name": text},
        {"tracking": {"project": text}},
        {"cluster": {"address": text}},
        {"data": {"train": {"path": text}}},
        {"unknown_section": {"x": text}},
    ):
        assert "secret" in told(deep_merge(RL, data))
    assert "env.X looks like a secret" in told(deep_merge(RL, {"rollout": {"env": {"X": text}}}))
    assert RANDOM not in hide_secrets(f"GET {text}: refused", {})
    assert "AKIAIO" not in hide_secrets(f"GET {text}: refused", {})


@pytest.mark.parametrize("name", NAMES)
def test_no_option_of_a_secrets_name_holds_a_value(name: str) -> None:
    assert is_secret_name(name)
    assert secret_values({name: RANDOM, "RAY_AUTH_TOKEN_PATH": "/none"}) == [RANDOM]
    assert name in told(recipe(args={name: RANDOM}))
    assert name in told(
        recipe(args={"client": {name.lower() if "_" in name else name: RANDOM}})
    ) or name.lower() in told(recipe(args={"client": {name.lower(): RANDOM}}))
    assert f"env.{name} looks like a secret" in told(deep_merge(RL, {"reward": {"env": {name: RANDOM}}}))
    assert RANDOM not in hide_secrets(f"called with {name}={RANDOM} and {{'{name}': '{RANDOM}'}}", {})


def test_no_env_holds_a_connection_string_with_a_password() -> None:
    for text in (f"host=db user=me password={RANDOM}", f"Server=db;UID=me;PWD={RANDOM};"):
        assert "env.DATABASE looks like a secret" in told(deep_merge(RL, {"reward": {"env": {"DATABASE": text}}}))


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("GOOGLE_APPLICATION_CREDENTIALS", "/secrets/gcp.json"), ("NETRC", "/home/me/.netrc"), ("HF_TOKEN", "")),
        *(("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("REQUIRE_AUTH", "false"), ("SSH_PRIVATE_KEY", "~/.ssh/my_rsa")),
    ],
)
def test_a_switch_or_the_path_of_a_file_is_no_secret_whatever_its_variable_is_called(name: str, value: str) -> None:
    config = build(RunConfig, deep_merge(RL, {"rollout": {"env": {name: value}}}), "recipe")
    assert config.rollout.env == {name: value}


@pytest.mark.parametrize("args", HARMLESS)
def test_options_that_only_sound_like_secrets_are_taken(args: dict[str, Any]) -> None:
    build(RunConfig, recipe(args=args), "recipe")
    build(RunConfig, recipe(args={"deep": [args]}), "recipe")


@pytest.mark.parametrize(("key", "args"), HELD)
def test_lists_mappings_and_numbered_names_hold_none_either(key: str, args: dict[str, Any]) -> None:
    secret = (
        RANDOM if RANDOM in str(args) else "hunter" if "hunter" in str(args) else str(next(iter(args.values())))[-12:]
    )
    assert f"args.{key}" in told(recipe(args=args), secret)
    assert f"args.in.0.{key}" in told(recipe(args={"in": [args]}), secret)


@pytest.mark.parametrize("args", MORE_HARMLESS)
def test_words_below_telling_names_and_prose_are_taken(args: dict[str, Any]) -> None:
    build(RunConfig, recipe(args=args), "recipe")
    build(RunConfig, recipe(args={"deep": [args]}), "recipe")


def test_a_message_repeats_no_secret_of_a_numbered_name() -> None:
    for name in ("api_key_1", "token2", "apiKey2", "password_prod"):
        assert RANDOM not in hide_secrets(f"called with {name}={RANDOM}", {})
        assert secret_values({name: RANDOM, "RAY_AUTH_TOKEN_PATH": "/none"}) == [RANDOM]
    assert hide_secrets("pass_1=0.7531 target_token: Paris, tokens=12345678", {}) == (
        "pass_1=0.7531 target_token: Paris, tokens=12345678"
    )


def test_an_override_holds_no_secret_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RL))
    for item in (
        f"reward.functions=[{{name: my.judge, args: {{api_key: {RANDOM}}}}}]",
        f'reward.functions=[{{"name": "my.judge", "args": {{"password": "{RANDOM}"}}}}]',
        f"checkpoint.path=s3://KEY:{RANDOM}@bucket",
        f"data.train.args.db_pass={RANDOM}",
    ):
        with pytest.raises(ConfigError, match="looks like a secret") as error:
            load_recipe(RunConfig, str(tmp_path / "r.yaml"), [item])
        assert RANDOM not in str(error.value)
        with pytest.raises(ConfigError, match="looks like a secret"):
            submit("run", [item], "http://127.0.0.1:1", [], wait=False, resume=True)


def test_stages_and_run_folders_hold_none_either(tmp_path: Path) -> None:
    data = recipe(args={"api_key": RANDOM})
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": {"zero": {"kind": "train", "config": data}}}))
    with pytest.raises(ConfigError, match=r"stages\.zero.*args\.api_key"):
        load_plan(str(tmp_path / "stages.yaml"), [])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="looks like a secret"):
        resume_run(tmp_path, [])


def test_a_judges_error_tells_where_it_is_without_its_password() -> None:
    options = JudgeOptions("m", f"http://user:{RANDOM}@127.0.0.1:1/v1?api_key={RANDOM}", retries=0, deadline_s=20)
    with pytest.raises(JudgeError) as error:
        asyncio.run(Judge(options).ask([{"role": "user", "content": "hi"}]))
    assert "127.0.0.1:1" in str(error.value)
    assert RANDOM not in str(error.value)


def test_an_error_on_the_terminal_repeats_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    _tell_error(f"override 'args.password={RANDOM}' at https://u:{RANDOM}@h: no\nsk-{RANDOM}")
    err = capsys.readouterr().err
    assert RANDOM not in re.sub(r"\s", "", err)
    assert "override" in err


def test_long_texts_are_looked_through_in_time_that_grows_with_them() -> None:
    for piece in ("a", "eyJ", "://", "a:", "sk-", "password=", "?a=", "-----BEGIN ", "x://a:"):
        with cpu_below(10, piece):
            hide_secrets(piece * (100_000 // len(piece)), {})
