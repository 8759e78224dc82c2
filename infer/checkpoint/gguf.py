"""GGUF files: tensors dequantized one at a time, names and configuration as HF's.

Two things differ from HF beyond names. llama.cpp keeps the rows of q and k of some families pairwise interleaved for
its rotary kernel; they are put back into HF's half-split order. And a tied model may store its one embedding twice at
two qualities (`token_embd`, `output`); it is read as tied, from the better copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantbench.errors import ModelError, unknown
from quantbench.infer.checkpoint.check import shown, tensor_problems
from quantbench.infer.checkpoint.gguf_config import hf_config_of
from quantbench.infer.checkpoint.gguf_file import GgufTensor, read_header
from quantbench.infer.checkpoint.gguf_tokenizer import tokenizer_files
from quantbench.infer.checkpoint.shard import Array
from quantbench.infer.checkpoint.source import EMBEDDING, ModelSource
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.models import FAMILIES, Family, ModelConfig, family_of, model_tensors

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
# Not weights: llama3's rotary factors (gguf_config turns them back into rope_scaling).
_DERIVED = frozenset({"rope_freqs.weight"})
_SAME_MATRIX = 0.999  # cosine above which token_embd and output are two qualities of one matrix
_SAMPLED_ROWS = 1024


class GgufStore:
    """A GGUF file under HF's tensor names, every tensor float32."""

    def __init__(self, path: Path, tensors: dict[str, GgufTensor], interleaved: dict[str, int]) -> None:
        self.files = [path]
        self._tensors = tensors
        self._interleaved = interleaved  # name -> heads whose rows must be put back into half-split order

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self, name: str) -> Array:
        values = self._tensors[name].read()
        return half_split(values, self._interleaved[name]) if name in self._interleaved else values

    def stored_type(self, name: str) -> str:
        """The GGUF type the tensor is stored in, e.g. "Q4_K"."""
        return str(self._tensors[name].kind.name)

    def stored_bytes(self, name: str) -> int:
        return self._tensors[name].nbytes


def half_split(w: Array, heads: int) -> Array:
    """Rows of each head from (0, d/2, 1, d/2+1, …) to (0, 1, …, d-1): [heads*d, …] -> the same shape."""
    pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def open_gguf(path: Path, name: str | None = None) -> ModelSource:
    """Opens a GGUF file. Raises ModelError listing unknown architectures, tensor types, missing and extra tensors."""
    fields, tensors = _read(path)
    family = _family(fields, path)
    tied = _tie(tensors)
    hf_config = hf_config_of(path, fields, tensors, family) | {"tie_word_embeddings": tied}
    config = family_of(hf_config).read_config(hf_config)
    store = _renamed(path, tensors, config, family)
    problems = tensor_problems(store, model_tensors(config), {}, tied)
    if problems:
        raise ModelError(*shown(path, problems))
    files = None

    def load_tokenizer() -> Tokenizer:
        nonlocal files
        files = files or tokenizer_files(path, fields)
        return Tokenizer(files, config.bos_token_id, config.eos_token_ids)

    return ModelSource(name or path.stem, path, config, hf_config, store, load_tokenizer)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        fields, tensors = read_header(path)
    except (ValueError, OverflowError) as reason:  # UnicodeDecodeError is a ValueError
        raise ModelError(f"{path}: not a GGUF file, or truncated ({reason}). Copy it again") from None
    unsupported = sorted({tensor.kind.name for tensor in tensors.values()} - set(TYPES))
    if unsupported:
        raise ModelError(f"{path}: tensor types {', '.join(unsupported)} are not supported. Known: {', '.join(TYPES)}")
    return fields, tensors


def _family(fields: dict[str, Any], path: Path) -> Family:
    known = {FAMILIES[f].gguf_arch: FAMILIES[f] for f in FAMILIES if FAMILIES[f].gguf_arch}
    architecture = fields.get("general.architecture")
    if architecture not in known:
        raise ModelError(f"{path}: " + unknown("GGUF architecture", str(architecture), map(str, known)))
    return known[architecture]


def _tie(tensors: dict[str, GgufTensor]) -> bool:
    """Whether head and embedding are one matrix; keeps only the better copy where they are."""
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None
    if head.shape != embedding.shape or _cosine(head, embedding) <= _SAME_MATRIX:
        return False
    if head.nbytes >= embedding.nbytes:
        tensors["token_embd.weight"] = head
    del tensors["output.weight"]
    return True


def _cosine(a: GgufTensor, b: GgufTensor) -> float:
    rows = slice(None, None, max(1, a.shape[0] // _SAMPLED_ROWS))
    x, y = a.read(rows).astype(np.float64).ravel(), b.read(rows).astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0


def _renamed(path: Path, tensors: dict[str, GgufTensor], config: ModelConfig, family: Family) -> GgufStore:
    hf_names = {gguf: hf for hf, gguf in _OUTER_NAMES.items()} | {"token_embd.weight": EMBEDDING}
    for layer in range(config.num_layers):
        for hf, gguf in _BLOCK_NAMES.items():
            for part in ("weight", "bias"):
                hf_names[f"blk.{layer}.{gguf}.{part}"] = f"model.layers.{layer}.{hf}.{part}"
    # A name that is not in the list keeps its own and is reported as no part of the architecture.
    found = {hf_names.get(name, name): tensor for name, tensor in tensors.items() if name not in _DERIVED}
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    interleaved = {
        n: h for n in found for part, h in heads.items() if f".{part}." in n and family.gguf_interleaved_rope
    }
    return GgufStore(path, found, interleaved)
