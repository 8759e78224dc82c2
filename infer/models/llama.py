"""Llama 1 to 3.2 (and models that share its architecture, such as SmolLM2)."""

from __future__ import annotations

from typing import Any

from quantbench.infer.models.config import ModelConfig
from quantbench.infer.models.family import ATTENTION, FAMILIES, MLP, Family
from quantbench.infer.models.read import common_config


def read_config(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return common_config(hf, "llama", attention_bias=bias, output_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


LLAMA = FAMILIES.add(
    "llama",
    Family(
        "llama",
        ("LlamaForCausalLM",),
        read_config,
        gguf_arch="llama",
        gguf_interleaved_rope=True,
        bias_switches=(("attention_bias", ATTENTION), ("mlp_bias", MLP)),
    ),
)
