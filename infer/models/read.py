"""Reading the fields that every family's config.json shares."""

from __future__ import annotations

from typing import Any

from quantbench.errors import ModelError
from quantbench.infer.models.config import ModelConfig, Rope, tokens_of

_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KINDS = ("default", "linear", "dynamic", "llama3")
_NEEDED = {  # keys of rope_scaling without which a kind would silently be another function
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_of(hf: dict[str, Any], max_positions: int) -> Rope:
    """Rope from `rope_theta` and `rope_scaling` (or transformers 5's `rope_parameters`). Raises ModelError."""
    scaling = _scaling(hf)
    problems = _rope_problems(hf, scaling)
    if problems:
        raise ModelError(*problems)
    return Rope(
        theta=float(hf.get("rope_theta", scaling.get("rope_theta", 10000.0))),
        kind=_kind(scaling),
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_positions=int(scaling.get("original_max_position_embeddings", max_positions)),
    )


def common_config(hf: dict[str, Any], family: str, **extra: Any) -> ModelConfig:
    """A ModelConfig from the shared fields; `extra` sets what the family decides. Raises ModelError, all at once."""
    problems = [*_count_problems(hf), *_rope_problems(hf, _scaling(hf))]
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"config.json: hidden_act {activation!r} is not supported for {family}; only silu is")
    problems = problems or _head_problems(hf, extra)
    if problems:
        raise ModelError(*problems)
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


def _scaling(hf: dict[str, Any]) -> dict[str, Any]:
    return hf.get("rope_scaling") or hf.get("rope_parameters") or {}


def _kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _rope_problems(hf: dict[str, Any], scaling: dict[str, Any]) -> list[str]:
    kind = _kind(scaling)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        return [f"config.json: rope_scaling.rope_type {kind!r} is not supported. Known: {known}"]
    missing = [key for key in _NEEDED.get(kind, ()) if key not in scaling]
    problems = [f"config.json: rope_scaling.{key} is missing; rope_type {kind} needs it" for key in missing]
    share = hf.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        problems.append(f"config.json: partial_rotary_factor {share} is not supported; only 1.0 is")
    return problems


def _count_problems(hf: dict[str, Any]) -> list[str]:
    problems = []
    for key in _COUNTS:
        if key not in hf:
            problems.append(f"config.json: {key} is missing")
        elif not isinstance(hf[key], int) or hf[key] < 1:
            problems.append(f"config.json: {key} is {hf[key]!r}; it must be a whole number above 0")
    return problems


def _head_problems(hf: dict[str, Any], extra: dict[str, Any]) -> list[str]:
    heads, kv = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    problems = []
    if heads % kv:
        problems.append(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv}")
    head_dim = extra.get("head_dim") or hf.get("head_dim")
    if not head_dim and hf["hidden_size"] % heads:
        problems.append(f"config.json: hidden_size {hf['hidden_size']} is no multiple of num_attention_heads {heads}")
    elif (head_dim or hf["hidden_size"] // heads) % 2:
        problems.append(f"config.json: head_dim {head_dim or hf['hidden_size'] // heads} is odd; rotation needs pairs")
    return problems
