"""What a plan must know of a model, in numbers: handed in by the caller, so that recipes need not read models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, int]  # [out, in]


@dataclass(frozen=True)
class ModelFacts:
    """One model, without its weights.

    `groups` has an entry for every linear that a mode decides by default: its fused group, for example
    "model.layers.0.qkv" for q, k and v, and a name of its own for a linear that is fused with none. A linear without
    an entry (but the head) is one that only a rule may decide.
    """

    name: str
    family: str
    dtype: str  # of the stored tensors: "float32" | "bfloat16" | "float16"
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    float_elements: int  # elements of every tensor that is not a linear's weight: embedding, norms, biases
    tied_head: bool  # the head is the embedding: it takes no bytes of its own unless a rule quantizes it
    groups: Mapping[str, str] = field(default_factory=dict)
