"""Reading the fields that every family's config.json shares."""

from __future__ import annotations

from typing import Any

from quantbench.errors import ModelError
from quantbench.infer.models.config import ModelConfig, Rope, tokens_of

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KINDS = ("default", "linear", "dynamic", "llama3")


def rope_of(hf: dict[str, Any], max_positions: int) -> Rope:
    """Rope from `rope_theta` and `rope_scaling` (or transformers 5's `rope_parameters`). Raises on an unknown kind."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        raise ModelError(f"config.json: rope_scaling.rope_type {kind!r} is not supported. Known: {', '.join(_KINDS)}")
    return Rope(
        theta=float(hf.get("rope_theta", scaling.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_positions=int(scaling.get("original_max_position_embeddings", max_positions)),
    )


def common_config(hf: dict[str, Any], family: str, **extra: Any) -> ModelConfig:
    """A ModelConfig from the shared fields; `extra` sets what the family decides. Raises ModelError, all at once."""
    missing = [f"config.json: {key} is missing" for key in _REQUIRED if key not in hf]
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        missing.append(f"config.json: hidden_act {activation!r} is not supported for {family}; only silu is")
    if missing:
        raise ModelError(*missing)
    heads = int(hf["num_attention_heads"])
    max_positions = int(hf.get("max_position_embeddings", 2048))
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": int(hf["vocab_size"]),
        "hidden_size": int(hf["hidden_size"]),
        "intermediate_size": int(hf["intermediate_size"]),
        "num_layers": int(hf["num_hidden_layers"]),
        "num_heads": heads,
        "num_kv_heads": int(hf.get("num_key_value_heads") or heads),
        "head_dim": int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "rope": rope_of(hf, max_positions),
        "max_positions": max_positions,
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": str(hf.get("torch_dtype") or hf.get("dtype") or "float32"),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": tokens_of(hf.get("eos_token_id")),
    }
    return ModelConfig(**(fields | extra))
