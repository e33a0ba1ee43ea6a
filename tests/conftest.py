"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if find_spec("torch") is None:
    pytest_plugins = ["tests.without_torch"]
else:
    from tests.shapes import check_shapes

    check_shapes()

STATUS = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test, or the code that it calls, sets in the environment or adds to the search path is gone after it."""
    before, path = dict(os.environ), list(sys.path)
    yield
    sys.path[:] = path
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 0.3 M parameters (fp32, tied embeddings, context 256) with a character tokenizer."""
    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import build_tiny_model

    config = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, context=256, seed=7)
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", config)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray cluster on this machine, counting 8 CPUs, for one test module."""
    import ray

    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 << 20,
        configure_logging=True,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Everything is told and ended. Threads that Ray left here, of twenty clusters, are not; one ran into what an orderly exit had
    taken apart, and a run in which all tests had passed ended in a segmentation fault."""
    started_ray = "ray" in sys.modules and "MUTANT_UNDER_TEST" not in os.environ
    if started_ray and (status := config.stash.get(STATUS, None)) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
