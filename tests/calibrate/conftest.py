"""Tiny random decoders of every family as arrays, and an independent numpy forward of one block in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.infer.models import ModelConfig, Rope, block_tensors, outer_tensors

Arrays = dict[str, np.ndarray]


@dataclass
class Decoder:
    """Random weights for `config`, drawn when asked for."""

    config: ModelConfig
    seed: int = 0
    outer: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = outer_tensors(self.config) | {"lm_head.weight": (self.config.vocab_size, self.config.hidden_size)}
        self.outer = draw(shapes, np.random.default_rng(self.seed))
        if self.config.tie_word_embeddings:
            self.outer["lm_head.weight"] = self.outer["model.embed_tokens.weight"]

    def block(self, layer: int) -> Arrays:
        return draw(block_tensors(self.config), np.random.default_rng((self.seed, layer)))

    def forward(self, **options: Any) -> PaddleForward:
        return PaddleForward(self.config, self.outer.__getitem__, **options)


def draw(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> Arrays:
    return {
        name: (
            1 + 0.2 * rng.standard_normal(shape) if "norm" in name else rng.standard_normal(shape) * shape[-1] ** -0.5
        ).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2,
        "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope": Rope(), "max_positions": 512,
        "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    return ModelConfig(**(values | changes))


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(tiny_config())


def reference_block(c: ModelConfig, layer: int, w: Arrays, x: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """One sample x [L, D] through a block in float64, one query at a time: slow and plain. Also the taps."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    x, length, taps = x.astype(np.float64), len(x), {}

    def norm(h: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + c.norm_eps) * weight

    def linear(h: np.ndarray, name: str) -> np.ndarray:
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rope(h: np.ndarray) -> np.ndarray:
        angle = np.arange(length)[:, None] * c.rope.inverse_frequencies(c.head_dim, length).astype(np.float64)
        rotated = (h[..., : c.head_dim // 2] + 1j * h[..., c.head_dim // 2 :]) * np.exp(1j * angle)[:, None, :]
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    taps["attn_in"] = norm(x, w["input_layernorm.weight"])
    q = linear(taps["attn_in"], "self_attn.q_proj").reshape(length, c.num_heads, c.head_dim)
    k = linear(taps["attn_in"], "self_attn.k_proj").reshape(length, c.num_kv_heads, c.head_dim)
    taps["v"] = linear(taps["attn_in"], "self_attn.v_proj").reshape(length, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
    q, taps["k"] = rope(q), rope(k)
    o = np.zeros((length, c.num_heads, c.head_dim))
    window = c.window_of(layer) or length
    for i in range(length):
        first = max(0, i - window + 1)
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            scores = taps["k"][first : i + 1, kv] @ q[i, head] / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max())
            o[i, head] = weights / weights.sum() @ taps["v"][first : i + 1, kv]
    taps["o_in"] = o.reshape(length, -1)
    x = x + linear(taps["o_in"], "self_attn.o_proj")
    taps["mlp_in"] = norm(x, w["post_attention_layernorm.weight"])
    gate, up = linear(taps["mlp_in"], "mlp.gate_proj"), linear(taps["mlp_in"], "mlp.up_proj")
    taps["down_in"] = gate / (1 + np.exp(-gate)) * up
    return x + linear(taps["down_in"], "mlp.down_proj"), taps
