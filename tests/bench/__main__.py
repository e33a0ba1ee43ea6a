"""`make bench`: the tables of the README. Each row is a process of its own; compare rows of one run, machines differ."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.passes import packed_pass, padded_pass, policy

REPEATS = 3
PROMPT_LENGTH = 8
TOKENS, VOCAB, HIDDEN = 4096, 151_936, 896
"""Of the log-probabilities: Qwen2.5-0.5B's."""


def packed_step() -> dict[str, float]:
    """Forward and backward of 256 samples of 16 to 100 tokens, packed as the learner does."""
    model, lengths = _policy(), _lengths()
    return _timed(lambda: packed_pass(model, PROMPT_LENGTH, lengths))


def padded_step() -> dict[str, float]:
    """The same samples as padded rows of Transformers, 64 a micro-batch, with a log-softmax over all logits."""
    from transformers import AutoModelForCausalLM

    with _tiny() as path:
        model = AutoModelForCausalLM.from_pretrained(path).train()
    lengths = _lengths()
    return _timed(lambda: padded_pass(model, PROMPT_LENGTH, lengths))


def prompts_apart() -> dict[str, float]:
    """Forward and backward of 8 groups of 8 samples, prompts of 200 tokens and completions of 16 to 100: each sample by itself."""
    return _long_prompts(group_size=1)


def prompts_shared() -> dict[str, float]:
    """The same samples; a group's prompt is computed once, as the learner does."""
    return _long_prompts(group_size=8)


def _long_prompts(group_size: int) -> dict[str, float]:
    model, lengths = _policy(), [200 + n for n in _lengths()[:64]]
    return _timed(lambda: packed_pass(model, 200, lengths, group_size=group_size))


def chunked_logprobs() -> dict[str, float]:
    """Log-probabilities and their gradient, 4,096 tokens, vocabulary 151,936, hidden 896, as the learner does it."""
    from grpo_ray.models.memory.estimate import chunk_rows

    return _logprob_memory(chunk_rows(VOCAB, on_gpu=False))


def plain_logprobs() -> dict[str, float]:
    """The same with all logits at once."""
    return _logprob_memory(TOKENS)


def _logprob_memory(chunk: int) -> dict[str, float]:
    """`x_bound`: peak over what has to be there anyway, hidden states, head and the head's gradient."""
    import torch

    from grpo_ray.models.logprobs import chunked_logprobs as compute

    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN) / 30)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    compute(hidden, weight, None, targets, temperature=1.0, chunk=chunk)[0].sum().backward()
    seconds = time.process_time() - started
    held = 4 * (TOKENS + VOCAB) * HIDDEN / 2**20
    peak = held + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"cpu_s": seconds, "peak_mib": peak, "x_bound": peak / (held + 4 * VOCAB * HIDDEN / 2**20)}


def _policy() -> Any:
    with _tiny() as path:
        return policy(path, chunk=1024)


@contextmanager
def _tiny() -> Iterator[str]:
    """The folder of a model of 2.3 M parameters."""
    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        yield str(build_tiny_model(Path(folder), TinyModelConfig(num_layers=3, context=300)))


def _lengths() -> list[int]:
    import numpy as np

    return np.random.default_rng(1).integers(16, 100, 256).tolist()


def _timed(step: Callable[[], None]) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    step()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return {"cpu_s": min(times)}


CASES = {
    f.__name__: f for f in (padded_step, packed_step, prompts_apart, prompts_shared, plain_logprobs, chunked_logprobs)
}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(CASES[sys.argv[1]]()))
        return
    table = Table("case", "CPU seconds", "peak MiB", "x bound", title=f"best of {REPEATS}, one thread, fp32")
    for name in CASES:
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        memory = (f"{result['peak_mib']:,.0f}", f"{result['x_bound']:.2f}") if "peak_mib" in result else ("", "")
        table.add_row(name, f"{result['cpu_s']:.2f}", *memory)
    Console().print(table)


if __name__ == "__main__":
    main()
