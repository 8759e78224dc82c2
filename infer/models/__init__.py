"""Model families as data: one file each. Importing this package registers them all."""

from quantbench.infer.models import llama, mistral, qwen2, qwen3
from quantbench.infer.models.config import ModelConfig, Rope
from quantbench.infer.models.family import (
    CACHE_TAPS,
    FAMILIES,
    LINEARS,
    TAPS,
    Family,
    Linear,
    biased,
    block_prefix,
    block_tensors,
    family_of,
    linear_names,
    linear_shapes,
    model_tensors,
    outer_tensors,
)

__all__ = [
    "CACHE_TAPS",
    "FAMILIES",
    "LINEARS",
    "TAPS",
    "Family",
    "Linear",
    "ModelConfig",
    "Rope",
    "biased",
    "block_prefix",
    "block_tensors",
    "family_of",
    "linear_names",
    "linear_shapes",
    "llama",
    "mistral",
    "model_tensors",
    "outer_tensors",
    "qwen2",
    "qwen3",
]
