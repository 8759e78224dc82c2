"""GGUF files for tests, written by the gguf library from a tiny HF directory as llama.cpp's converter would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from quantbench.infer.checkpoint.source import open_model

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{part}"
    return f"{NAMES[module]}.{part}"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half next to row i of its second half."""
    half = w.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return w[order]


def write_gguf(
    path: Path,
    directory: Path,
    kind: str = "F32",
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """`kind` of the matrices (norms and biases stay F32); `fields` and `tensors` add, replace or (None) remove."""
    source = open_model(directory)
    c, hf = source.config, source.hf_config
    arch = hf["model_type"]
    writer = GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "block_count": c.num_layers, "context_length": c.max_positions, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads, "rope.freq_base": c.rope.theta, "attention.key_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
    }  # fmt: skip
    found = (
        {f"{arch}.{key}": value for key, value in values.items()} | byte_level_fields(directory) | dict(fields or {})
    )
    for key, value in found.items():
        add(writer, key, value)
    arrays: dict[str, np.ndarray | None] = {}
    for name in source.names():
        array = source.read(name).astype(np.float32)
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads}.get(name.split(".")[-2])
        if heads and arch == "llama":
            array = interleaved(array, heads)
        arrays[gguf_name(name)] = array
    for name, array in (arrays | dict(tensors or {})).items():
        if array is not None:
            store(writer, name, array, kind if array.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def store(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    qtype = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, np.ascontiguousarray(array, {"F32": np.float32, "F16": np.float16}[kind]))
        return
    writer.add_tensor(name, quantize(np.ascontiguousarray(array), qtype), raw_dtype=qtype)


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_level_fields(directory: Path) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE as GGUF metadata of kind gpt2."""
    document = json.loads((directory / "tokenizer.json").read_text())
    vocab: dict[str, int] = document["model"]["vocab"]
    special = {token["id"] for token in document["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    padding = [f"[PAD{i}]" for i in range(len(tokens), 320)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))] + [5] * len(padding),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": settings["chat_template"],
    }
