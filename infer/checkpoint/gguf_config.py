"""A HF `config.json` from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantbench.errors import ModelError
from quantbench.infer.models import Family, Rope

if TYPE_CHECKING:
    from quantbench.infer.checkpoint.gguf_file import GgufTensor

_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "context_length",
)
# Llama 3.1 and 3.2 differ in the factor only; the file stores the resulting divisors, not the four numbers.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999997e-07 -> 1e-06, as the model's author wrote it."""
    return float(str(np.float32(value)))


def hf_config_of(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor], family: Family
) -> dict[str, Any]:
    """HF's keys for a GGUF file, without tie_word_embeddings. Raises ModelError, all problems at once."""
    arch = str(family.gguf_arch)
    missing = [f"{path}: metadata {arch}.{key} is missing" for key in _REQUIRED if f"{arch}.{key}" not in fields]
    if "token_embd.weight" not in tensors:
        missing.append(f"{path}: tensor token_embd.weight is missing")
    if missing:
        raise ModelError(*missing)

    def value(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    heads = _one(path, "attention.head_count", value("attention.head_count"))
    if value("attention.sliding_window"):
        raise ModelError(
            f"{path}: {arch} with attention.sliding_window is not supported from GGUF. Use the HF directory"
        )
    head_dim = int(value("attention.key_length", value("embedding_length") // heads))
    found: dict[str, Any] = {
        "architectures": list(family.architectures[:1]),
        "model_type": family.name,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": int(value("embedding_length")),
        "intermediate_size": _one(path, "feed_forward_length", value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": _one(path, "attention.head_count_kv", value("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(value("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "torch_dtype": _dtype({tensor.kind.name for tensor in tensors.values()}),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(fields),
    }
    if family.name == "llama":
        found |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    scaling = _rope_scaling(path, value, tensors, Rope(theta=found["rope_theta"]), head_dim)
    return found | ({"rope_scaling": scaling} if scaling else {})


def _one(path: Path, key: str, value: Any) -> int:
    """Some architectures give a list, one number per layer; only the same number everywhere is supported."""
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1:
        raise ModelError(f"{path}: {key} differs between layers ({sorted(numbers)}); only equal layers are supported")
    return int(numbers.pop())


def _dtype(kinds: set[str]) -> str:
    """What stays float is kept as the file keeps it; beside quantized tensors bfloat16 loses nothing that matters."""
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _end_tokens(fields: Mapping[str, Any]) -> int | list[int] | None:
    """End of text, and end of turn where the file names one (Llama 3 Instruct)."""
    ends = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return found if len(found) > 1 else (found[0] if found else None)


def _rope_scaling(
    path: Path, value: Any, tensors: Mapping[str, GgufTensor], plain: Rope, head_dim: int
) -> dict[str, Any] | None:
    kind = value("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(value("rope.scaling.factor", 1.0))}
    if kind not in ("none", ""):
        raise ModelError(
            f"{path}: rope.scaling.type {kind!r} is not supported. Known: none, linear, llama3's rope_freqs"
        )
    if "rope_freqs.weight" not in tensors:
        return None
    divisors = tensors["rope_freqs.weight"].read().ravel()
    factor = shortest(float(divisors.max()))
    rope = Rope(plain.theta, "llama3", factor, 1.0, 4.0, 8192)
    expected = plain.inverse_frequencies(head_dim, 0) / rope.inverse_frequencies(head_dim, 0)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ModelError(f"{path}: rope_freqs.weight is not llama3's rule (low 1, high 4, original 8192 positions)")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
