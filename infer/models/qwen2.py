"""Qwen2 and Qwen2.5: bias on q, k and v; sliding window only when the config switches it on."""

from __future__ import annotations

from typing import Any

from quantbench.infer.models.config import ModelConfig
from quantbench.infer.models.family import FAMILIES, Family
from quantbench.infer.models.read import common_config


def windows(hf: dict[str, Any]) -> dict[str, Any]:
    """Layers from `max_window_layers` on use the window, where `use_sliding_window` is set."""
    if not hf.get("use_sliding_window"):
        return {}
    layers, first = int(hf["num_hidden_layers"]), int(hf.get("max_window_layers", 0))
    kinds = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return {
        "sliding_window": int(hf["sliding_window"]),
        "windowed_layers": tuple(kind == "sliding_attention" for kind in kinds),
    }


def read_config(hf: dict[str, Any]) -> ModelConfig:
    return common_config(hf, "qwen2", attention_bias=True, **windows(hf))


QWEN2 = FAMILIES.add("qwen2", Family("qwen2", ("Qwen2ForCausalLM",), read_config, gguf_arch="qwen2"))
