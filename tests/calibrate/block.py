"""One small decoder block in plain numpy (float64), its statistics and plans: what choose and apply are tested on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantbench.infer.models import LINEARS, ModelConfig, Rope, block_tensors
from quantbench.scales.statistics import Statistics, merge, observe
from quantbench.vocabulary import DEFAULT_GRANULARITY, CachePlan, LayerPlan, VariantPlan, parse_mode

F32 = np.float32
LAYER = 2
PREFIX = f"model.layers.{LAYER}"
CONFIG = ModelConfig(
    family="qwen2", vocab_size=32, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=16, norm_eps=1e-5, rope=Rope(), max_positions=64, tie_word_embeddings=True, dtype="bfloat16",
    attention_bias=True,
)  # fmt: skip


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {n: (rng.standard_normal(s) / np.sqrt(s[-1])).astype(F32) for n, s in block_tensors(CONFIG).items()}
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        made[norm] = np.exp(rng.standard_normal(CONFIG.hidden_size)).astype("bfloat16").astype(F32)
        made[norm][[7, 30]] *= 32  # two outlier channels, as real models have
    made["mlp.up_proj.weight"][5] *= 50
    return made


def hidden(seed: int = 1, tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, CONFIG.hidden_size)).astype(F32)


def forward(x: np.ndarray, w: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The block's output and its taps (RoPE left out: no transform here touches it)."""
    c, taps = CONFIG, {}

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        return v / np.sqrt(np.square(v).mean(axis=-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]

    def linear(v: np.ndarray, name: str) -> np.ndarray:
        return v @ w[f"{name}.weight"].T.astype(np.float64) + w.get(f"{name}.bias", 0)

    x = x.astype(np.float64)
    taps["attn_in"] = a = norm(x, "input_layernorm")
    q, taps["k"], taps["v"] = (linear(a, f"self_attn.{p}_proj") for p in "qkv")
    heads, groups = c.num_heads, c.num_heads // c.num_kv_heads
    q = q.reshape(-1, heads, c.head_dim)
    k, v = (np.repeat(taps[t].reshape(-1, c.num_kv_heads, c.head_dim), groups, axis=1) for t in "kv")
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(c.head_dim)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    taps["o_in"] = np.einsum("hts,shd->thd", share / share.sum(axis=-1, keepdims=True), v).reshape(len(x), -1)
    x = x + linear(taps["o_in"], "self_attn.o_proj")
    taps["mlp_in"] = m = norm(x, "post_attention_layernorm")
    gate = linear(m, "mlp.gate_proj")
    taps["down_in"] = gate / (1 + np.exp(-gate)) * linear(m, "mlp.up_proj")
    return x + linear(taps["down_in"], "mlp.down_proj"), taps


def statistics(w: Mapping[str, np.ndarray], hessian: bool = False) -> dict[str, Statistics]:
    """Two batches merged."""
    result: dict[str, Statistics] = {}
    for seed in (1, 2):
        for tap, x in forward(hidden(seed), w)[1].items():
            rows = CONFIG.num_kv_heads if tap in ("k", "v") else 1
            seen = observe(x.astype(F32), rows, hessian and rows == 1)
            result[tap] = merge(result[tap], seen) if tap in result else seen
    return result


def variant(
    mode: str, *transforms: dict[str, Any], observer: str = "absmax", dtype: str = "bfloat16", **plan: Any
) -> VariantPlan:
    """Every linear of the block under one mode; `plan` overrides LayerPlan's fields."""
    m = parse_mode(mode)
    fields: dict[str, Any] = {"granularity": DEFAULT_GRANULARITY.get(m.weights), "activation_observer": observer}
    if m.weights == "int4":
        fields["group_size"] = 32
    layers = {
        name: LayerPlan(name, m.weights, activations=m.activations, **(fields | plan))
        for name in (f"{PREFIX}.{line.name}" for line in LINEARS)
    }
    return VariantPlan(mode, m, dtype, CachePlan(m.cache, observer=observer), layers, transforms)
