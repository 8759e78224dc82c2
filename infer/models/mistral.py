"""Mistral: Llama's block with a sliding attention window in every layer (null in the config: full attention)."""

from __future__ import annotations

from typing import Any

from quantbench.infer.models.config import ModelConfig
from quantbench.infer.models.family import FAMILIES, Family
from quantbench.infer.models.read import common_config


def read_config(hf: dict[str, Any]) -> ModelConfig:
    window = hf.get("sliding_window", 4096)
    return common_config(hf, "mistral", sliding_window=None if window is None else int(window))


MISTRAL = FAMILIES.add("mistral", Family("mistral", ("MistralForCausalLM",), read_config))
