"""Families that vLLM samples on CPUs: two steps of `grpo-ray train` on a small random model of each, and its export loaded again.

python -m tests.models.train_table [--lock FILE] [KIND ...]     FILE: held while a family is trained, where others want the machine
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from actors.rollout.cpu_limits import check_cpu_limits
from grpo_ray.config.model import ModelConfig, TinyModelConfig
from grpo_ray.errors import ConfigError, kind_and_line
from grpo_ray.models.files.tiny import make_tokenizer
from grpo_ray.models.multimodal import is_multimodal
from tests.end_to_end.runs import RECIPE, end_all, launch, metrics, train
from tests.models.multimodal import multimodal_config, multimodal_model
from tests.models.small import small_config, small_model

MAX_MISMATCH = {"float32": 1e-5, "bfloat16": 2e-2}
MAX_NATS = 1e-3
"""Between vLLM and Transformers, of the exported model, with different kernels."""
LIMIT_S = 300
MIB = 2**20
_TOKENIZER = TinyModelConfig(context=256)
_PROMPT = [30 + 7 * k % 200 for k in range(24)]
_WAY = re.compile(r"goes the plain way")
ROLES = {"engine": r"VLLM::EngineCore|RolloutActor", "learner": r"LearnerActor"}

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 64),
    "vocab_size": 320,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "sliding_window": 64,
    "rotary_dim": 16,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 64}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss")},
    **{
        kind: {} for kind in ("gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "granitemoe", "olmo", "olmo2")
    },
    **{kind: {} for kind in ("olmo3", "olmoe", "phi", "phi3", "phimoe", "smollm3", "stablelm", "cohere", "cohere2")},
    **{kind: {} for kind in ("starcoder2", "nemotron", "arcee", "seed_oss", "exaone4", "gpt_neox", "gpt2", "opt")},
    "gemma4_text": {"global_head_dim": 32, "vocab_size_per_layer_input": 320},
    "gemma4": {"global_head_dim": 32, "vocab_size_per_layer_input": 320},
    "deepseek_v3": _LATENT | {"num_key_value_heads": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 256},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 64},
    "qwen3_next": {},
    "lfm2": {},
}
"""What a family needs beside or in place of `SIZES`."""


@dataclass
class Row:
    """What became of one family."""

    kind: str
    way: str = ""
    mismatch: dict[str, float] = field(default_factory=dict)
    """dtype -> nats, the mean over the tokens that were sampled after the sync."""
    loads: dict[str, str] = field(default_factory=dict)
    """Transformers and vllm -> "yes", or why not."""
    seconds: float = 0.0
    peak: dict[str, int] = field(default_factory=dict)
    """engine and learner -> bytes."""
    troubles: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        gaps = [f"{self.mismatch[d]:9.1e}" if d in self.mismatch else f"{'-':>9}" for d in MAX_MISMATCH]
        loads = [f"{self.loads.get(by, '-'):12.12}" for by in ("Transformers", "vLLM")]
        peaks = [f"{self.peak.get(role, 0) / MIB:7.0f}" for role in ROLES]
        return " ".join(
            [f"{self.kind:18}", f"{self.way:7}", *gaps, *loads, f"{self.seconds:5.0f}", *peaks, *self.troubles]
        )


HEAD = (
    f"{'family':18} {'way':7} {'float32':>9} {'bfloat16':>9} {'Transformers':12} {'vLLM':12} {'s':>5} "
    f"{'engine':>7} {'learner':>7} MiB"
)


def write_model(kind: str, folder: Path) -> Path:
    """A small random model of this kind, whose sizes vLLM's kernels on CPUs take, with the tokenizer of tiny models."""
    own = FAMILIES.get(kind, {})
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        model: Any = multimodal_model(multimodal_config(kind, SIZES, **own))
    else:
        model = small_model(small_config(kind, SIZES, **own))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    make_tokenizer(_TOKENIZER).save_pretrained(folder)
    return folder


def trained(kind: str, folder: Path, dtypes: Sequence[str] = tuple(MAX_MISMATCH)) -> Row:
    """Train a model of this kind in the precisions of these that an engine on CPUs has for it."""
    row, started = Row(kind), time.monotonic()
    model = write_model(kind, folder / "model")
    for dtype in dtypes:
        why = _refused_on_cpus(model, dtype)
        if why:
            row.troubles.append(f"({dtype}: {why})")
            continue
        run_dir = _train(model, folder, dtype, row)
        if run_dir is None:
            continue
        if not row.mismatch[dtype] < MAX_MISMATCH[dtype]:
            row.troubles.append(f"{dtype}: mismatch {row.mismatch[dtype]:.1e}")
        if not row.loads:
            row.loads = loaded(run_dir / "hf", model, dtype)
            row.troubles += [f"{by}: {why}" for by, why in row.loads.items() if why != "yes"]
    row.seconds = time.monotonic() - started
    return row


def _refused_on_cpus(model: Path, dtype: str) -> str:
    try:
        check_cpu_limits(AutoConfig.from_pretrained(model), ModelConfig(path=str(model), dtype=dtype))  # type: ignore[arg-type]
    except ConfigError as e:
        return str(e)
    return ""


def _train(model: Path, folder: Path, dtype: str, row: Row) -> Path | None:
    """Two steps; None where they fail."""
    recipe = RECIPE | {"model": {"path": str(model), "dtype": dtype}, "num_steps": 2}
    recipe["data"] = {k: v for k, v in RECIPE["data"].items() if k != "eval"}
    recipe.pop("eval")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    args, run_dir = train(path, dtype, "cluster.num_cpus=2", "rollout.kv_cache_gb=0.1", "rollout.max_num_seqs=16")
    with open(folder / f"{dtype}.log", "w") as log:
        process = launch(*args, output=log)
        with _peaks(process.pid, row.peak):
            try:
                code = process.wait(LIMIT_S)
            except Exception:
                code = -1
    end_all()
    said = (folder / f"{dtype}.log").read_text()
    row.way = "plain" if _WAY.search(said) else "packed"
    if code:
        row.troubles.append(f"{dtype}: exit code {code}: {' '.join(said.split())[-400:]}")
        return None
    row.mismatch[dtype] = metrics(run_dir)[-1]["mismatch/mean_abs"]
    return run_dir


@contextlib.contextmanager
def _peaks(pid: int, peak: dict[str, int]) -> Iterator[None]:
    """Inside, the largest resident sizes of the roles' processes below this one are noted."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(0.5):
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        title, rss = " ".join(process.cmdline()), process.memory_info().rss
                        for role, words in ROLES.items():
                            if re.search(words, title):
                                peak[role] = max(peak.get(role, 0), rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def loaded(export: Path, source: Path, dtype: str) -> dict[str, str]:
    """Whether Transformers and vLLM load an export, which is no longer its source, and agree about it."""
    found = {}
    whole = is_multimodal(AutoConfig.from_pretrained(export))
    auto: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    try:
        hf, info = auto.from_pretrained(export, dtype=getattr(torch, dtype), output_loading_info=True)
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        own = auto.from_pretrained(source, dtype=getattr(torch, dtype))
        same = all(torch.equal(a, b) for a, b in zip(hf.parameters(), own.parameters(), strict=True))
        found["Transformers"] = f"tensors {lost[:3]}" if lost else "it is untrained" if same else "yes"
    except Exception as e:
        return {"Transformers": kind_and_line(e), "vLLM": "-"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine"])
    queue: Any = context.Queue()
    process = context.Process(target=_sampled, args=(str(export), dtype, queue))
    process.start()
    try:
        answer = queue.get(timeout=LIMIT_S)
    except Exception:
        answer = "it gave no answer"
    process.join(20)
    process.kill()
    if isinstance(answer, str):
        return found | {"vLLM": answer}
    tokens, logps = answer
    ids = torch.tensor([_PROMPT + tokens])
    own_logps = hf.eval()(input_ids=ids, use_cache=False).logits[0, len(_PROMPT) - 1 : -1].float().log_softmax(-1)
    gap = max(abs(float(row[t]) - x) for row, t, x in zip(own_logps, tokens, logps, strict=True))
    most = MAX_NATS if dtype == "float32" else 0.2
    return found | {"vLLM": "yes" if gap < most else f"off by {gap:.1e} nats"}


def _sampled(export: str, dtype: str, queue: Any) -> None:
    """Run in a process of its own: what vLLM samples of the export."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    try:
        from vllm import LLM, SamplingParams

        llm = LLM(
            export,
            language_model_only=is_multimodal(AutoConfig.from_pretrained(export)),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=128,
            kv_cache_memory_bytes=64 << 20,
            enable_chunked_prefill=False,
            max_num_batched_tokens=2048,
            skip_tokenizer_init=True,
        )
        (out,) = llm.generate(
            {"prompt_token_ids": _PROMPT}, SamplingParams(max_tokens=8, logprobs=0, temperature=0, detokenize=False)
        )
        tokens = list(out.outputs[0].token_ids)
        queue.put((tokens, [x[t].logprob for t, x in zip(tokens, out.outputs[0].logprobs, strict=True)]))
    except BaseException as e:
        queue.put(kind_and_line(e))


@contextlib.contextmanager
def _held(lock: str | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Print the table; returns how many families are in trouble."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock")
    parser.add_argument("kinds", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    print(HEAD)
    for kind in given.kinds or FAMILIES:
        with _held(given.lock), tempfile.TemporaryDirectory(prefix="families-") as folder:
            try:
                rows.append(trained(kind, Path(folder)))
            except Exception as e:
                rows.append(Row(kind, troubles=[kind_and_line(e)]))
        print(rows[-1], flush=True)
    whole = [row for row in rows if row.mismatch and not [t for t in row.troubles if not t.startswith("(")]]
    print(f"{len(whole)} of {len(rows)} families are trained, and their exports load")
    return len(rows) - len(whole)


if __name__ == "__main__":
    sys.exit(main() and 1)
