"""What `check` needs to know of a model, without torch, which takes 3 s and 220 MB, and the layers of Transformers' models, which
take as much again.

A process of its own finds out whether the learner can train the model, while this one reads the data. A tiny model is fully known
without Transformers, whose import takes 2 s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from grpo_ray.config.model import ModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import RewardModelConfig, SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.files.loading import eos_ids, load_config, load_tokenizer, model_name
from grpo_ray.models.files.tiny import tiny_config, tiny_shape
from grpo_ray.models.files.tiny_tokenizer import TinyTokenizer
from grpo_ray.models.memory.estimate import known_facts
from grpo_ray.plain_terminal import say


class ModelFiles:
    """The contents of a model's files, each read on first use."""

    def __init__(self, config: ModelConfig) -> None:
        """Find the files. Raises ConfigError: the folder does not exist or holds no model."""
        self._config = config
        self.name = model_name(config) if config.tiny is None else "tiny"

    @cached_property
    def config(self) -> Any:
        if self._config.tiny is not None:
            return SimpleNamespace(**tiny_shape(self._config.tiny))
        return load_config(self.name, trust_remote_code=self._config.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        if self._config.tiny is not None:
            return TinyTokenizer(self._config.tiny)
        return load_tokenizer(self.name, trust_remote_code=self._config.trust_remote_code)

    @property
    def eos_ids(self) -> list[int]:
        if self._config.tiny is not None:
            return [self.tokenizer.eos_token_id]
        return eos_ids(self.name, self.tokenizer, trust_remote_code=self._config.trust_remote_code)


_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_CHILD = "import sys; sys.path[:] = {path!r}; from launch.check.model import answer; answer()"
QUESTION_S = 600.0
"""The time limit for code and config of a model that has to be downloaded from the hub."""


def keep_torch_out() -> None:
    """Make Transformers read configs and tokenizers in this process, and create no models. It does nothing where Transformers or
    torch is already imported."""
    if not {"torch", "transformers"}.isdisjoint(sys.modules):
        return
    find_spec, quiet = importlib.util.find_spec, os.environ.get(_QUIET)

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "torch" else find_spec(name, package)

    importlib.util.find_spec, os.environ[_QUIET] = find, "1"
    try:
        import transformers

        # The result is cached.
        transformers.utils.is_torch_available()
    finally:
        importlib.util.find_spec = find_spec
        del os.environ[_QUIET]
        os.environ |= {} if quiet is None else {_QUIET: quiet}


class LearnersModel(NamedTuple):
    """What the learner would hold."""

    num_params: int
    plain: str
    """Why it goes the plain way; "" where it packs."""
    whole: str = ""
    """The class of the multimodal model whose text model it is; "" where it is a language model."""


@contextmanager
def learners_model(config: RunConfig | SftConfig, *, on_gpu: bool) -> Iterator[Callable[[], LearnersModel]]:
    """Inspect the model in the background. The yielded function waits for the result.

    Raises:
        ConfigError: the learner would refuse the model.
    """
    known = known_facts(config.model)
    if known is not None and _is_ours(config):
        yield lambda: LearnersModel(known.num_params, "")
        return
    question = {
        "model": config.model.model_dump(mode="json"),
        "reward_model": isinstance(config, RewardModelConfig),
        "slices": config.learner.sequence_parallel_size,
        "on_gpu": on_gpu,
        "forward": config.learner.forward,
        "routers": _of_routers(config),
    }
    if "torch" in sys.modules:
        yield lambda: _looked_at(question)
        return
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(question))
            child.stdin.close()
            child.stdin = None
            yield lambda: _told(child)
        finally:
            child.kill()


def _is_ours(config: RunConfig | SftConfig) -> bool:
    """Whether the model is a usual tiny model, which tests show to be trainable."""
    plain = config.model.tiny is not None and config.model.lora is None and config.model.attention == "auto"
    usual = config.learner.sequence_parallel_size == 1 and config.learner.forward != "plain"
    return plain and usual and not any(_of_routers(config).values()) and not isinstance(config, RewardModelConfig)


def _of_routers(config: RunConfig | SftConfig) -> dict[str, bool]:
    """What is asked of the model's routers, if it has any."""
    keeps = isinstance(config, RunConfig) and config.rollout.keep_routing
    return {"loss": config.learner.router_aux_loss_coef > 0, "keeps": keeps}


def _told(child: subprocess.Popen[str]) -> LearnersModel:
    try:
        out, _ = child.communicate(timeout=QUESTION_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"the process that looks at the model was not done in {QUESTION_S:g} s: is the hub slow? Download the model, and name "
            "its folder"
        ) from None
    lines = out.splitlines()
    if child.returncode or not lines:
        raise ConfigError(
            f"the process that looks at the model has died (exit code {child.returncode}): is there memory for it?"
        )
    said = json.loads(lines[-1])
    if "refused" in said:
        raise ConfigError(said["refused"])
    return LearnersModel(**said)


def answer() -> None:
    """Run the child: a question on stdin, the answer in the last line of stdout."""
    question = json.loads(sys.stdin.read())
    try:
        said: dict[str, Any] = _looked_at(question)._asdict()
    except ConfigError as e:
        said = {"refused": str(e)}
    say(f"\n{json.dumps(said)}")


def _looked_at(question: dict[str, Any]) -> LearnersModel:
    """Raises ConfigError: the learner would refuse the model."""
    from grpo_ray.models.checks.routers import check_routers
    from grpo_ray.models.multimodal import whole_of
    from grpo_ray.models.trainable import check_adapters, skeleton

    config = ModelConfig.model_validate(question["model"])
    hf, plain = skeleton(
        ModelFiles(config).config if config.tiny is None else tiny_config(config.tiny),
        config,
        reward_model=question["reward_model"],
        slices=question["slices"],
        on_gpu=question["on_gpu"],
        forward=question["forward"],
    )
    check_routers(hf, **question["routers"])
    size = sum(p.numel() for p in hf.parameters())
    check_adapters(hf, config)
    whole = whole_of(hf)
    return LearnersModel(size, plain, whole.cls.__name__ if whole else "")
