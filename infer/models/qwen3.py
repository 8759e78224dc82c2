"""Qwen3 (dense): RMS norm of each q and k head before RoPE, an explicit head_dim, no q/k/v bias by default."""

from __future__ import annotations

from typing import Any

from quantbench.infer.models.config import ModelConfig
from quantbench.infer.models.family import ATTENTION, FAMILIES, Family
from quantbench.infer.models.qwen2 import windows
from quantbench.infer.models.read import common_config


def read_config(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    head_dim = int(hf.get("head_dim", 128))
    return common_config(
        hf, "qwen3", attention_bias=bias, output_bias=bias, qk_norm=True, head_dim=head_dim, **windows(hf)
    )


QWEN3 = FAMILIES.add(
    "qwen3",
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        read_config,
        gguf_arch="qwen3",
        bias_switches=(("attention_bias", ATTENTION),),
    ),
)
