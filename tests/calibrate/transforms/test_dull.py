"""Every word on weights and inputs that leave nothing to decide: finite, positive, and the same float block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block, fold_block
from quantbench.calibrate.choose import choose_block
from quantbench.scales.lint import errors, lint_table
from quantbench.scales.statistics import Statistics, observe
from tests.calibrate.block import CONFIG, LAYER, forward, hidden, variant, weights

LLAMA = replace(CONFIG, family="llama", attention_bias=False)
TARGETS = ["attn_in", "o_in", "mlp_in", "down_in"]
WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "shift": ("a8w8", {"shift": {"by": "midrange"}}),
    "smooth": ("a8w8", {"smooth": {"alpha": "search", "targets": TARGETS}}),
    "piecewise": ("a8w8", {"piecewise": {"targets": TARGETS, "pieces": 2}}),
    "awq": ("weight_only_int4", {"awq": {"steps": 4}}),
    "awq of quantized inputs": ("a8w8", {"awq": {"steps": 4}}),
    "kv_smooth": ("a8w8c8", {"kv_smooth": {}}),
    "clip": ("weight_only_int4", {"clip": {"steps": 4}}),
    "bias_correction": ("a8w8", {"bias_correction": {}}),
}
Weights = dict[str, np.ndarray]


def zeros(w: Weights) -> int:
    for name in w:
        if name.endswith("_proj.weight"):
            w[name][:] = 0
    return 40


def dead_channels(w: Weights) -> int:
    w["input_layernorm.weight"][3] = 0
    w["post_attention_layernorm.weight"][5] = 0
    w["self_attn.v_proj.weight"][4] = 0
    w["self_attn.k_proj.weight"][6] = 0
    w["mlp.up_proj.weight"][7] = 0
    return 40


def outlier(w: Weights) -> int:
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        w[f"{name}.weight"][1, 2] = 1e4
    w["mlp.up_proj.weight"][9] *= 1e4
    return 40


def two_tokens(w: Weights) -> int:
    """Hessians of rank 2."""
    return 2


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("damage", [zeros, dead_channels, outlier, two_tokens])
def test_dull_blocks(damage: Callable[[Weights], int], word: str) -> None:
    w = {name: value for name, value in weights().items() if not name.endswith(".bias")}
    x = hidden(1, damage(w))
    before, taps = forward(x, w)

    def look(factors: Mapping[str, np.ndarray], shifts: Mapping[str, np.ndarray]) -> dict[str, Statistics]:
        seen = {t: ((taps[t] - shifts.get(t, 0)) * factors.get(t, 1)).astype(np.float32) for t in {**factors, **shifts}}
        return {t: observe(v, CONFIG.num_kv_heads if t in "kv" else 1, hessian=t not in "kv") for t, v in seen.items()}

    def rows(wanted: Collection[str]) -> dict[str, np.ndarray]:
        return {tap: taps[tap].astype(np.float32) for tap in wanted}

    mode, transform = WORDS[word]
    plan, seen = variant(mode, transform, method="gptq", dtype="float32"), look(dict.fromkeys(taps, np.float32(1)), {})
    table = choose_block(LAYER, w, seen, plan, LLAMA, look, rows)
    assert errors(lint_table(table, plan)) == []
    after = forward(x, fold_block(LAYER, w, table, LLAMA))[0]
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    stored = apply_block(LAYER, w, table, plan, LLAMA, seen)
    assert all(np.isfinite(v.astype(np.float32)).all() for v in stored.values())
