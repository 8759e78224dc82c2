"""Writes a model as GGUF for the peers that read it: matrices in Q8_0, BF16 or F32, the rest in F32.

    python benchmarks/peers/to_gguf.py MODEL OUT.gguf [Q8_0]

MODEL is a float model of the Llama family with a byte-level BPE tokenizer (SmolLM2, say). The vocabulary is written so
that the file loads; the benchmarks feed token ids.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from quantbench.infer.checkpoint.source import ModelSource, open_model

FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "BF16": LlamaFileType.MOSTLY_BF16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{part}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}.{part}"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: row i of a head's first half next to row i of its second half."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def add_config(writer: GGUFWriter, source: ModelSource) -> None:
    c = source.config
    writer.add_name(source.name)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)


def add_tokenizer(writer: GGUFWriter, source: ModelSource) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source.tokenizer().save(Path(directory))
        document = json.loads((Path(directory) / "tokenizer.json").read_text("utf-8"))
    vocab: dict[str, int] = document["model"]["vocab"]
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = {index: token for token, index in (vocab | special).items()}
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(source.config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(listed)
    writer.add_token_types([3 if token in special else 1 for token in listed])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]])
    writer.add_bos_token_id(source.config.bos_token_id or 0)
    writer.add_eos_token_id(source.config.eos_token_ids[0])


def convert(model: str, path: Path, kind: str) -> None:
    source = open_model(model)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_config(writer, source)
    add_tokenizer(writer, source)
    heads = {"q_proj": source.config.num_heads, "k_proj": source.config.num_kv_heads}
    for name in source.names():
        w = source.read(name).astype(np.float32)
        part = name.split(".")[-2]
        if part in heads:
            w = interleaved(w, heads[part])
        if w.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), w)
        else:
            qtype = GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(w), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else "Q8_0")
