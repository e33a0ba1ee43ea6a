"""What users' environments hold: named when it is the cause, mended where that is possible."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent import futures
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

import launch.environment
from actors import addresses
from actors.addresses import Address, bypass_proxies, check_answers, read_address
from actors.folders import LONGEST_FOLDER, RAYS_PART, SOCKET_PATH, make_short, too_long, unusable
from grpo_ray.errors import ConfigError, ResourceError
from launch.environment import blamed, check_variables, prepare
from tests.strangers import IS_ROOT, NOBODY

SUSPECT = ("RAY_", "VLLM_", "TORCH", "PYTORCH", "OMP_", "HF_", "TRANSFORMERS_", "DATASETS_", "TQDM_", "PYTHON")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment as it was, afterwards; of the variables that are looked at, none but PATH's kind."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(SUSPECT) and n != "PYTHONPATH"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch.environment, "_made", None)
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield monkeypatch
    if launch.environment._made is not None:
        shutil.rmtree(launch.environment._made)
    os.environ.clear()
    os.environ.update(before)


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize(
    ("option", "variable", "where", "source"),
    [
        (None, None, None, None),
        (None, "", None, None),
        ("", " ", None, None),
        (None, "local", None, None),
        (None, "head:6379", "head:6379", "RAY_ADDRESS"),
        ("other:1", "head:6379", "other:1", "cluster.address"),
        # Ray itself takes the variable for `auto`.
        ("auto", "head:6379", "head:6379", "RAY_ADDRESS"),
        ("auto", None, "auto", "cluster.address"),
        (None, "auto", "auto", "RAY_ADDRESS"),
    ],
)
def test_an_address_is_the_options_or_the_environments_and_says_which(
    environment: pytest.MonkeyPatch, option: str | None, variable: str | None, where: str | None, source: str | None
) -> None:
    if variable is not None:
        environment.setenv("RAY_ADDRESS", variable)
    found = read_address(option)
    assert (found and found.where, found and found.source) == (where, source)


@pytest.mark.parametrize("source", ["RAY_ADDRESS", "cluster.address"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_dead_address_is_told_in_time_with_who_named_it(source: str, scheme: str) -> None:
    address = Address(f"{scheme}127.0.0.1:{closed_port()}", source)
    began = time.monotonic()
    with pytest.raises(ResourceError, match=f"{address.where} .from {source}.*is its head started"):
        check_answers(address, limit_s=0.6)
    assert time.monotonic() - began < 5


def test_what_listens_and_is_no_head_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = Address(f"127.0.0.1:{listening.getsockname()[1]}", "RAY_ADDRESS")
        with pytest.raises(ResourceError, match=r"is no head of a Ray cluster, or it hangs.*unset RAY_ADDRESS"):
            check_answers(address, limit_s=1)


class _Answers(NodeInfoGcsServiceServicer):
    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.shown: list[str] = []

    def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> CheckAliveReply:
        self.shown += [key for key, _ in context.invocation_metadata()]
        if self.code is not grpc.StatusCode.OK:
            context.abort(self.code, "no")
        return CheckAliveReply()


@pytest.mark.parametrize("code", ["OK", "UNAUTHENTICATED", "UNIMPLEMENTED"])
def test_a_head_is_known_by_its_answer_past_a_proxy_and_without_the_token(
    environment: pytest.MonkeyPatch, code: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy", "https_proxy", "ALL_PROXY"):
        environment.setenv(name, f"http://127.0.0.1:{closed_port()}")
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("RAY_AUTH_TOKEN", "0" * 64)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    answers = _Answers(grpc.StatusCode[code])
    add_NodeInfoGcsServiceServicer_to_server(answers, server)
    address = Address(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", "cluster.address")
    server.start()
    try:
        if code == "UNIMPLEMENTED":
            with pytest.raises(ResourceError, match="is no head of a Ray cluster"):
                check_answers(address)
        else:
            check_answers(address)
    finally:
        server.stop(None)
    assert answers.shown
    assert "authorization" not in answers.shown


@pytest.mark.parametrize(
    "where", ["nonsense", "head:port", "head:99999999", ":6379", "tcp://head:1", "head:6379/x", "6379", "[::1", "[]:1"]
)
def test_what_is_no_address_is_refused_at_once(where: str) -> None:
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS. is no address of a Ray cluster"):
        check_answers(Address(where, "RAY_ADDRESS"))


def raylet(address: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process that says of itself what one of Ray's says."""
    words = ["raylet", "-c", "read x", f"--gcs-address={address}"]
    return subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, cwd="/", **options)


@pytest.mark.skipif(not IS_ROOT, reason="needs root, for a second user")
def test_auto_means_a_head_of_this_user(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("RAY_TMPDIR", str(tmp_path))
    environment.setattr("actors.folders.LONGEST_FOLDER", 1000)
    theirs = raylet("10.0.0.6:6379", user=NOBODY, group=NOBODY, extra_groups=[])
    started = [theirs]
    every = psutil.process_iter
    environment.setattr(
        psutil, "process_iter", lambda names: [p for p in every(names) if p.pid in {s.pid for s in started}]
    )
    try:
        with pytest.raises(ResourceError, match=r"auto .from RAY_ADDRESS. names no Ray cluster .* none of this user's"):
            check_answers(Address("auto", "RAY_ADDRESS"))
        started.append(raylet("10.0.0.1:6379"))
        assert addresses._running_here() == ("10.0.0.1", 6379)
        started.append(raylet("[fd00::2]:6380"))
        with pytest.raises(ResourceError, match="there are several"):
            check_answers(Address("auto", "RAY_ADDRESS"))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("[fd00::2]:6380\n")
        assert addresses._running_here() == ("fd00::2", 6380)
        (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.6:6379")
        with pytest.raises(ConnectionError):
            addresses._running_here()
    finally:
        for process in started:
            process.communicate(b"", timeout=30)


def test_a_dashboard_is_no_address_to_join() -> None:
    with pytest.raises(ConfigError, match="is a dashboard, where `grpo-ray submit`"):
        check_answers(Address("http://head:8265", "RAY_ADDRESS"))


def test_hosts_are_added_to_what_no_proxy_is_for_in_both_cases_and_a_star_stays_alone() -> None:
    env = {"NO_PROXY": "a.b, c.d", "no_proxy": "e.f"}
    bypass_proxies(["10.0.0.5"], env)
    bypass_proxies(["10.0.0.5"], env)
    assert env["no_proxy"] == env["NO_PROXY"]
    assert sorted(env["no_proxy"].split(",")) == sorted(
        ["e.f", "a.b", "c.d", "localhost", "127.0.0.1", "::1", "10.0.0.5"]
    )
    star = {"no_proxy": "*"}
    bypass_proxies(["10.0.0.5"], star)
    assert star == {"no_proxy": "*", "NO_PROXY": "*"}


def test_in_the_longest_folder_that_is_taken_the_longest_of_rays_sockets_can_be_made() -> None:
    made = make_short()
    assert made is not None
    base = str(made)
    folder = base + "/" + "x" * (LONGEST_FOLDER - len(base) - 1)
    assert (len(folder), too_long(folder), too_long(folder + "x")) == (LONGEST_FOLDER, False, True)
    place = Path(folder, "r" * (RAYS_PART - len("//plasma_store")))
    place.mkdir(parents=True)
    longest = place / "plasma_store"
    assert len(str(longest)) <= SOCKET_PATH
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(longest))
    shutil.rmtree(made)


def test_a_short_folder_is_for_its_user_alone_and_has_another_name_each_time() -> None:
    made = [make_short(), make_short()]
    assert made[0] != made[1]
    for folder in made:
        assert folder is not None
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not too_long(str(folder))
        folder.rmdir()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("long", "characters, and the sockets"),
        ("missing", "does not exist"),
        ("file", "is no folder"),
        ("relative", "is no absolute path"),
        ("empty", "is no absolute path"),
        ("unwritable", "can't be written to"),
    ],
)
def test_a_folder_that_is_of_no_use_for_sockets_is_replaced_and_that_is_said(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
    reason: str,
) -> None:
    (tmp_path / ("l" * 100)).mkdir()
    (tmp_path / "file").touch()
    folder = {
        "long": str(tmp_path / ("l" * 100)),
        "missing": str(tmp_path / "missing"),
        "file": str(tmp_path / "file"),
        "relative": "tests",
        "empty": "",
        "unwritable": "/proc",
    }[kind]
    environment.setenv(name, folder)
    prepare()
    told = capsys.readouterr().err
    assert f"{name}={folder} " in told
    assert reason in told
    ours = os.environ[name]
    assert unusable(ours) is None
    assert not too_long(ours)
    if kind == "long":
        # What Ray spills is large, and no socket.
        assert os.environ[launch.environment.SPILLING] == folder


def test_a_good_environment_is_left_alone(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_short()
    assert folder is not None
    for name in ("TMPDIR", "RAY_TMPDIR", "HOME", "XDG_CACHE_HOME", "HF_HOME"):
        environment.setenv(name, str(folder))
    before = dict(os.environ)
    prepare()
    assert dict(os.environ) == before
    assert capsys.readouterr().err == ""
    folder.rmdir()


def test_a_home_that_cannot_be_written_to_is_replaced_and_what_can_be_read_there_still_counts(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    environment.setenv("HOME", str(tmp_path))
    environment.delenv("TMPDIR", raising=False)
    environment.setattr(launch.environment, "unusable", lambda f: "is read-only" if f == str(tmp_path) else unusable(f))
    prepare()
    assert f"HOME={tmp_path} is read-only" in capsys.readouterr().err
    assert unusable(os.environ["HOME"]) is None
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / ".ray" / "auth_token")
    assert os.environ["HF_HOME"] == str(tmp_path / ".cache" / "huggingface")


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "HF_HOME"])
def test_a_cache_that_cannot_be_made_is_replaced_and_one_that_can_is_not(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    environment.setenv(name, str(tmp_path / "later" / "cache"))
    prepare()
    assert os.environ[name] == str(tmp_path / "later" / "cache")
    environment.setenv(name, "/proc/none/cache")
    prepare()
    assert f"{name}=/proc/none/cache " in capsys.readouterr().err
    assert unusable(str(Path(os.environ[name]).parent)) is None


def test_warnings_are_no_errors_to_the_libraries_of_a_run(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("PYTHONWARNINGS", "ignore::DeprecationWarning")
    with warnings.catch_warnings():
        prepare()
        assert os.environ["PYTHONWARNINGS"] == "ignore::DeprecationWarning"
        environment.setenv("PYTHONWARNINGS", "default,error")
        warnings.simplefilter("error")
        prepare()
        warnings.simplefilter("ignore", append=True)
        warnings.warn("not an error", stacklevel=1)
    assert "PYTHONWARNINGS" not in os.environ
    assert "PYTHONWARNINGS=default,error would end libraries" in capsys.readouterr().err


def test_a_variable_that_ends_rays_import_without_a_word_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RAY_memory_usage_threshold", "abc")
    with pytest.raises(ConfigError, match=r"RAY_memory_usage_threshold='abc' \(.+\); unset or correct it"):
        check_variables()


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM reads them")
def test_of_several_variables_those_that_are_the_cause_are_named(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_LOGGING_LEVEL", "info")
    environment.setenv("VLLM_PORT", "abc")
    environment.setenv("VLLM_PLUGINS", "mine")
    with pytest.raises(ConfigError) as refused:
        check_variables()
    assert "VLLM_PORT='abc'" in str(refused.value)
    assert "VLLM_PLUGINS" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{", "is no JSON"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "[]", "is no JSON object"),
        ("RAY_AUTH_MODE", "yes", "is token or disabled"),
        ("RAY_AUTH_TOKEN_PATH", "/nope", "names no file that can be read: /nope"),
        ("RAY_USE_TLS", "1", "is set in the environment, and RAY_TLS_SERVER_CERT is not"),
    ],
)
def test_what_ray_reads_as_it_starts_is_refused_with_its_name(
    environment: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} .*{expected}"):
        check_variables()


def test_integers_and_secrets_cost_no_child(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("RAY_memory_monitor_refresh_ms", "0"), ("HF_TOKEN", "hf_x y"), ("OMP_NUM_THREADS", "4")):
        environment.setenv(name, value)
    environment.setattr(launch.environment, "_tried", lambda *_: pytest.fail("a child was started"))
    check_variables()


@pytest.mark.parametrize("name", ["HF_HUB_ETAG_TIMEOUT", "HF_DATASETS_IN_MEMORY_MAX_SIZE"])
def test_a_variable_of_hugging_faces_that_is_no_number_is_named(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.setenv(name, "abc")
    with pytest.raises(ConfigError, match=f"{name}='abc'"):
        check_variables()


def test_an_error_that_quotes_a_variables_value_is_told_with_its_name(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_SOMETHING", "abc")
    environment.setenv("HF_TOKEN", "abc")
    environment.setenv("UNRELATED", "abc")
    error = "rollout-0 does not start: ValueError: invalid literal for int() with base 10: 'abc'"
    assert blamed(error) == "the environment holds VLLM_SOMETHING='abc': if that is the cause, unset or correct it"
    assert blamed("VLLM_SOMETHING 'abc' is no number") is None
    assert blamed("something else") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        *("RAY_gcs_server_request_timeout_seconds=abc", "RAY_task_events_report_interval_ms="),
        *("RAY_gcs_rpc_server_reconnect_timeout_s=5s", "RAY_LOG_MONITOR_MAX_OPEN_FILES=many", "VLLM_PORT=tcp://a:1"),
        *("TORCH_DISTRIBUTED_DEBUG=abc", "PYTORCH_JIT=abc", "GOMP_CPU_AFFINITY=abc", "TQDM_MININTERVAL=abc"),
        *("HF_HUB_DOWNLOAD_TIMEOUT=10s", "VLLM_CPU_KVCACHE_SPACE=abc"),
    ],
)
def test_nonsense_that_a_library_does_not_survive_is_named(environment: pytest.MonkeyPatch, setting: str) -> None:
    name, _, value = setting.partition("=")
    environment.setenv(name, value)
    environment.setenv("RAY_memory_monitor_refresh_ms", "0")
    with pytest.raises(ConfigError, match=f"{name}="):
        check_variables()


@pytest.mark.slow
def test_nonsense_that_libraries_only_warn_of_keeps_no_run_from_starting(environment: pytest.MonkeyPatch) -> None:
    for setting in (
        *("TORCH_LOGS=abc", "TORCH_COMPILE_DEBUG=abc", "PYTORCH_CUDA_ALLOC_CONF=abc", "ATEN_CPU_CAPABILITY=abc"),
        *("TORCH_CPP_LOG_LEVEL=abc", "OMP_NUM_THREADS=abc", "OMP_WAIT_POLICY=abc", "MKL_NUM_THREADS=abc"),
        *("HF_HUB_VERBOSITY=abc", "HF_ENDPOINT=abc", "TRANSFORMERS_VERBOSITY=abc", "DATASETS_VERBOSITY=abc"),
        *("CUDA_VISIBLE_DEVICES=nonsense", "LD_PRELOAD=/nonexistent.so", "LC_ALL=xx_YY", "COLUMNS=abc", "TERM=abc"),
        *(
            "RAY_NAMESPACE=abc",
            "RAY_NONSENSE=abc",
            "RAY_event_stats=abc",
            "VLLM_NONSENSE=1",
            "NO_COLOR=1",
            "KMP_AFFINITY=abc",
        ),
    ):
        environment.setenv(*setting.split("="))
    check_variables()


@pytest.mark.parametrize("imported", ["", "import ray"])
@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_the_folder_that_took_anothers_place_is_gone_however_the_command_ends(
    tmp_path: Path, imported: str, end: str
) -> None:
    code = f"""
import os, signal, sys
{imported}
from grpo_ray import entry
from launch import cli
def run():
    from launch.environment import prepare
    prepare()
    print(os.environ["TMPDIR"])
    sys.stdout.flush()
    {end}
cli.main = run
entry.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path / "absent"), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    folder = Path(done.stdout.split()[0])
    assert folder.name.startswith("grpo-ray-"), done.stderr
    assert not folder.exists()
