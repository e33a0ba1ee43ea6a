"""`make bench-routing`: what `rollout.keep_routing` does to the mismatch of tiny mixtures of experts in bf16 and fp32.

A real engine samples; the learner's forward computes the same tokens, once with the experts of its own routers and once with those
that the engine took. Each row is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.rollout.vllm_options import rollout_env
from grpo_ray.config.rollout import RolloutConfig

KINDS = ("qwen3_moe", "mixtral", "gpt_oss")
DTYPES = ("bfloat16", "float32")
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "norm_topk_prob": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENV = dict(os.environ) | rollout_env(RolloutConfig(), on_gpu=False, backend="gloo") | {"TORCH_COMPILE_DISABLE": "1"}
PROMPTS, GROUP, PROMPT_LENGTH, MAX_TOKENS = 8, 8, 40, 64


def write_model(kind: str, folder: str, dtype: str) -> None:
    """A random model whose layers matter, rounded to this dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = set(vars(AutoConfig.for_model(kind))) | set(AutoConfig.for_model(kind).attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in known}
    sizes |= {"layer_types": ["full_attention"] * 4, "head_dim": 64} if kind == "gpt_oss" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.copy_(torch.randn_like(param) / param.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def sampled(folder: str, dtype: str, **options: Any) -> list[Any]:
    """Samples with the experts that their tokens took, of a real engine."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.rollout.sample import sample_of
    from actors.rollout.vllm_options import engine_args
    from grpo_ray.types import SampleRequest

    config = RolloutConfig(kv_cache_gb=0.05, keep_routing=True, max_num_seqs=64, **options)
    args = engine_args(config, folder, dtype, PROMPT_LENGTH + MAX_TOKENS, 1, "gloo", trust_remote_code=False)
    args.skip_tokenizer_init = True
    engine = LLMEngine.from_engine_args(args)
    engine.collective_rpc("keep_routes")
    rng = np.random.default_rng(0)
    prompts = {str(p): rng.integers(3, SIZES["vocab_size"], PROMPT_LENGTH).tolist() for p in range(PROMPTS)}
    for prompt, ids in prompts.items():
        for index in range(GROUP):
            params = SamplingParams(
                seed=GROUP * int(prompt) + index,
                max_tokens=MAX_TOKENS,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(f"{prompt}/{index}", {"prompt_token_ids": ids}, params)
    samples = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            prompt, index = output.request_id.split("-")[0].split("/")
            request = SampleRequest(prompt, int(index), prompts[prompt], 0, config.sampling_params)
            samples.append(sample_of(request, output.outputs[0], 0, "", "engine"))
    return sorted(samples, key=lambda s: (s.prompt_id, s.index))


def learned(folder: str, dtype: str, samples: Sequence[Any], *, keeps: bool, shares: bool = True) -> dict[str, float]:
    """The mismatch of the learner's forward, and the part of the experts that are none of the engine's."""
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_ray.algorithm.losses.kl import bounded_k3
    from grpo_ray.batch.pack import PackItem, pack
    from grpo_ray.models.attention import choose_attention
    from grpo_ray.models.features.routing import Routing, find_routers
    from grpo_ray.models.policy import PolicyModel

    attention = choose_attention("auto", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    policy = PolicyModel(hf, chunk=512, routing=Routing(find_routers(hf))).eval()
    routers = find_routers(hf)
    taken: dict[int, torch.Tensor] = {}
    for router in routers:
        router.module.register_forward_hook(
            lambda _m, _a, out, router=router: taken.__setitem__(router.layer, out[router.roles(out)[1]])
        )
    items = [
        PackItem(s.prompt_token_ids, s.token_ids, s.logprobs, 0.0, 1.0, n, routes=s.routes)
        for n, s in enumerate(samples)
    ]
    batch = pack(items, share_prompts=shares)
    with torch.no_grad():
        logps_C = policy(batch if keeps else replace(batch, routes=None), 1.0)[0]
    gap_C = logps_C - torch.from_numpy(batch.rollout_logprobs)
    assert batch.routes is not None
    kept = torch.from_numpy(batch.routes.astype(np.int64))
    others = [(own[..., None] != kept[:, layer, None, :]).all(-1).float().mean().item() for layer, own in taken.items()]
    return {
        "mean_abs": gap_C.abs().mean().item(),
        "max_abs": gap_C.abs().max().item(),
        "kl": bounded_k3(-gap_C).mean().item(),
        "other_experts": float(np.mean(others)),
        "tokens": float(len(gap_C)),
    }


def compared(kind: str, dtype: str) -> dict[str, dict[str, float]]:
    """The mismatch without and with kept routes."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(kind, folder, dtype)
        samples = sampled(folder, dtype)
        return {name: learned(folder, dtype, samples, keeps=name == "kept") for name in ("own", "kept")}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(compared(*sys.argv[1:])))
        return
    columns = ("model", "dtype", "routes", "mean_abs", "max_abs", "kl", "other experts")
    table = Table(*columns, title=f"{PROMPTS} x {GROUP} samples of {MAX_TOKENS} tokens, 4 layers, 4 of 16 experts")
    for kind, dtype in ((kind, dtype) for kind in KINDS for dtype in DTYPES):
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.routing", kind, dtype]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600, check=True)
        for routes, row in json.loads(done.stdout.splitlines()[-1]).items():
            figures = (f"{row[name]:.2g}" for name in ("mean_abs", "max_abs", "kl"))
            table.add_row(kind, dtype, routes, *figures, f"{row['other_experts']:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
