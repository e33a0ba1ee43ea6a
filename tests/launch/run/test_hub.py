"""Names on the hub where there is no network: told at once, or taken from what was downloaded before."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from launch.run import hub

CLOSED = "http://127.0.0.1:1"


def config(model: str, data: str = "rows.jsonl") -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": model}, "data": {"train": {"path": data}}, "reward": {"functions": [{"name": "accuracy"}]}}
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)


def test_a_model_that_was_never_downloaded_is_refused_in_one_line_with_both_ways_out() -> None:
    with pytest.raises(ConfigError) as e:
        hub.check_hub(config("Nobody/NoSuchModel"))
    text = str(e.value)
    assert "\n" not in text
    for part in ("Nobody/NoSuchModel", CLOSED, "Connection refused", "HF_HUB_OFFLINE=1", "local folder"):
        assert part in text


def test_a_model_that_was_downloaded_is_used_without_asking_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(hub, "is_cached", lambda model: model == "Some/Model")
    told = hub.check_hub(config("Some/Model"))
    assert told is not None
    assert "HF_HUB_OFFLINE=1 from here on" in told
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")


def test_a_data_set_of_the_hub_is_looked_for_in_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = hub.check_hub(config(str(tmp_path), "openai/gsm8k"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert told is not None
    assert told.endswith("is used for openai/gsm8k")


def test_folders_files_and_generators_need_no_hub(tmp_path: Path) -> None:
    for data in ("rows.jsonl", "reasoning_gym:chain_sum", "python:a.b", str(tmp_path)):
        assert hub.check_hub(config(str(tmp_path), data)) is None


def test_a_hub_that_answers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.check_hub(config("Some/Model")) is None


def test_behind_a_proxy_the_proxy_is_what_has_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable("https://nowhere.invalid") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert "127.0.0.1:1" in str(hub.unreachable("https://nowhere.invalid"))
