"""Ray's token goes to clusters that the user named, and to none that a recipe or a run's folder names."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from actors import named_clusters
from actors.addresses import Address
from actors.cluster import connect
from actors.named_clusters import is_named, named_file
from grpo_ray.config.loading import build, deep_merge
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from launch.check.command import check_recipe
from launch.named_clusters import confirm_cluster
from launch.pipeline.stages import run_pipeline
from launch.run.jobs import evaluate_target, resume_run, start_grpo, start_sample
from tests.recipes import RL
from tests.strangers import shared_folder

TOKEN = "7" * 64


class Stranger(NodeInfoGcsServiceServicer, grpc.GenericRpcHandler):
    """A head that takes everybody in, and keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> CheckAliveReply:
        return CheckAliveReply()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        self.shown += [f"{key}: {value}" for key, value in handler_call_details.invocation_metadata]


@pytest.fixture
def stranger() -> Iterator[tuple[str, Stranger]]:
    head = Stranger()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((head,))
    add_NodeInfoGcsServiceServicer_to_server(head, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address, head
    server.stop(None)


@pytest.fixture(autouse=True)
def own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (
        ("XDG_CONFIG_HOME", f"{tmp_path}/config"),
        ("RAY_AUTH_MODE", "token"),
        ("RAY_AUTH_TOKEN", TOKEN),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(named_clusters, "_noted", set())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config/grpo-ray/clusters"


def recipe(address: str, folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    data = deep_merge(
        RL,
        {
            "cluster": {"address": address},
            "data": {
                "template": "raw",
                "exclude_eval": False,
                "train": {"path": f"{folder}/rows.jsonl"},
                "eval": {"path": f"{folder}/rows.jsonl"},
            },
            "reward": {"functions": [{"name": "exact_match"}]},
        },
    )
    (folder / "r.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "r.yaml")


def pipeline(address: str, folder: Path) -> str:
    stage = {
        "kind": "train",
        "config": {
            k: v for k, v in yaml.safe_load(Path(recipe(address, folder)).read_text()).items() if k != "cluster"
        },
    }
    (folder / "p.yaml").write_text(yaml.safe_dump({"cluster": {"address": address}, "stages": {"a": stage}}))
    return str(folder / "p.yaml")


def run_folder(address: str, folder: Path) -> Path:
    file = Path(recipe(address, folder))
    (folder / "run/hf").mkdir(parents=True)
    file.rename(folder / "run/config.yaml")
    return folder / "run"


COMMANDS = {
    "train": lambda address, folder: start_grpo(recipe(address, folder), []),
    "sample": lambda address, folder: start_sample(recipe(address, folder), []),
    "eval": lambda address, folder: evaluate_target(recipe(address, folder), []),
    "eval of a run": lambda address, folder: evaluate_target(str(run_folder(address, folder)), []),
    "resume": lambda address, folder: resume_run(run_folder(address, folder), []),
    "pipeline": lambda address, folder: run_pipeline(pipeline(address, folder), [], None, None, dry_run=False),
    "connect": lambda address, folder: connect(
        build(RunConfig, deep_merge(RL, {"cluster": {"address": address}}), "r")
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_the_token_to_a_cluster_that_a_file_names(
    command: str, stranger: tuple[str, Stranger], tmp_path: Path
) -> None:
    address, head = stranger
    with pytest.raises(
        ConfigError, match=rf"{address} is named by the recipe or the run's folder, not by you.*RAY_ADDRESS"
    ):
        COMMANDS[command](address, tmp_path)
    assert TOKEN not in str(head.shown)


def test_check_joins_no_cluster_that_the_recipe_names_and_says_so(
    stranger: tuple[str, Stranger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, head = stranger
    check_recipe(recipe(address, tmp_path), [])
    told = " ".join(capsys.readouterr().out.split())
    assert f"{address} (from cluster.address) is named by the recipe, not by you, so it was not joined" in told
    assert head.shown
    assert TOKEN not in str(head.shown)


@pytest.mark.parametrize("overrides", [["cluster.address={}"], ["cluster={{address: '{}'}}"]])
def test_an_address_that_is_typed_is_noted_for_this_user_alone(
    overrides: list[str], stranger: tuple[str, Stranger], own_list: Path
) -> None:
    address, _ = stranger
    assert not is_named(Address(address, "cluster.address"))
    confirm_cluster(address, [item.format(address) for item in overrides])
    assert is_named(Address(address, "cluster.address"))
    assert own_list == named_file()
    assert own_list.read_text() == f"{address}\n"
    assert stat.S_IMODE(own_list.stat().st_mode) == 0o600
    assert stat.S_IMODE(own_list.parent.stat().st_mode) == 0o700
    confirm_cluster(address, [])


def test_the_environment_names_a_cluster_and_other_addresses_are_not_named_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert is_named(Address("head:6379", "cluster.address"))
    assert not is_named(Address("other:6379", "cluster.address"))
    assert not is_named(Address("head:63790", "cluster.address"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_an_address_of_a_recipe_is_asked_about_once(
    answer: str, stranger: tuple[str, Stranger], monkeypatch: pytest.MonkeyPatch, own_list: Path
) -> None:
    address, _ = stranger
    asked = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    monkeypatch.setattr("sys.stderr", asked)
    if answer == "y":
        confirm_cluster(address)
        confirm_cluster(address)
        assert own_list.read_text() == f"{address}\n"
    else:
        with pytest.raises(ConfigError, match="not by you"):
            confirm_cluster(address)
        assert not own_list.exists()
    assert asked.getvalue().count("Ray's token") == 1


def test_a_list_that_others_can_write_to_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_folder() as folder:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
        (folder / "grpo-ray").mkdir(mode=0o755)
        named_file().write_text("head:6379\n")
        address = Address("head:6379", "cluster.address")
        assert is_named(address)
        named_file().chmod(0o666)
        assert not is_named(address)
        named_file().chmod(0o644)
        named_file().parent.chmod(0o777)
        assert not is_named(address)


@pytest.mark.parametrize(
    "where", ["mine:1\nevil:6379", "mine:6379@evil:6379", "mine:6379#@evil:1", "m\u0456ne:6379", "evil:6379 mine:6379"]
)
def test_an_address_that_reads_as_another_is_none(where: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a Ray cluster"):
        confirm_cluster(where)
