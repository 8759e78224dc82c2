from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block, fold_block, tap_factors
from quantbench.calibrate.choose import choose_block
from quantbench.errors import RecipeError
from quantbench.infer.models import ModelConfig, block_tensors
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import LayerPlan, VariantPlan
from tests.calibrate.block import LAYER, PREFIX, variant
from tests.calibrate.conftest import draw, reference_block, tiny_config

F32 = np.float32
WORD = {"kv_smooth": {}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"family": "qwen2", "attention_bias": True}, "qwen3": {"family": "qwen3", "qk_norm": True},
}  # fmt: skip


def made(family: str) -> tuple[ModelConfig, dict[str, np.ndarray], np.ndarray]:
    config = tiny_config(num_layers=3, **FAMILIES[family])
    w = draw(block_tensors(config), np.random.default_rng(3))
    w["self_attn.k_proj.weight"][5] *= 30
    if config.qk_norm:
        w["self_attn.k_norm.weight"][5] *= 30
    if "self_attn.k_proj.bias" in w:
        w["self_attn.k_proj.bias"] = (20 * w["self_attn.k_proj.bias"]).astype(ml_dtypes.bfloat16).astype(F32)
    return config, w, np.random.default_rng(4).standard_normal((24, config.hidden_size)).astype(F32)


def look(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Statistics]:
    taps = reference_block(config, LAYER, w, x)[1]
    rows = {"k": config.num_kv_heads, "v": config.num_kv_heads}
    return {t: observe(v.reshape(len(v), -1).astype(F32), rows.get(t, 1)) for t, v in taps.items()}


def decided(family: str, plan: VariantPlan) -> tuple[ModelConfig, dict[str, np.ndarray], np.ndarray, ScaleTable]:
    config, w, x = made(family)
    return config, w, x, choose_block(LAYER, w, look(config, w, x), plan, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_block_is_unchanged_and_the_range_of_keys_follows(family: str) -> None:
    config, w, x, table = decided(family, variant("a8w8c8", WORD))
    before, taps = reference_block(config, LAYER, w, x)
    after, behind = reference_block(config, LAYER, fold_block(LAYER, w, table, config), x)
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    assert behind["k"].reshape(24, -1) == pytest.approx(
        taps["k"].reshape(24, -1) * tap_factors(LAYER, table, config)["k"], rel=1e-4, abs=1e-5
    )
    entry = table[f"{PREFIX}.self_attn.k_cache"]
    assert entry.absmax == pytest.approx(np.abs(behind["k"]).max(axis=(0, 2)), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_get_nearer_to_what_they_were(family: str) -> None:
    def loss(*words: dict[str, object]) -> float:
        config, w, x, table = decided(family, variant("a8w8c8", *words))
        folded = fold_block(LAYER, w, table, config)
        taps = reference_block(config, LAYER, folded, x)[1]
        scale = table[f"{PREFIX}.self_attn.k_cache"].scale[:, None]
        kept = np.clip(np.rint(taps["k"] / scale), -127, 127) * scale
        share = np.square(kept - taps["k"]).sum(axis=0) / np.square(taps["k"]).sum(axis=0)
        return float(share.mean())

    assert loss(WORD) < 0.5 * loss()


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_floats_get_powers_of_two_and_stay_exact(family: str) -> None:
    plan = variant("a8w8c8", WORD)
    config, w, _, table = decided(family, plan)
    factors = table[f"{PREFIX}.self_attn.k_proj.smooth"].scale
    exact = bool(np.all(np.log2(factors) == np.rint(np.log2(factors))))
    assert exact == (family != "llama")
    if family == "qwen2":
        stored = apply_block(LAYER, w, table, plan, config)[f"{PREFIX}.self_attn.k_proj.bias"]
        assert np.array_equal(stored.astype(F32) * factors, w["self_attn.k_proj.bias"])


def test_a_float_k_proj_gets_powers_of_two() -> None:
    plan = variant("a8w8c8", WORD)
    for p in "qkv":
        name = f"{PREFIX}.self_attn.{p}_proj"
        plan.layers[name] = LayerPlan(name, "bfloat16")
    factors = decided("llama", plan)[3][f"{PREFIX}.self_attn.k_proj.smooth"].scale
    assert np.array_equal(np.log2(factors), np.rint(np.log2(factors)))


def test_a_float_cache_is_left_alone() -> None:
    assert not [e for e in decided("llama", variant("a8w8", WORD))[3] if e.kind == "transform"]


def test_with_smoothing_both_are_folded_and_the_block_is_unchanged() -> None:
    everything = {"smooth": {"targets": ["attn_in", "o_in", "mlp_in", "down_in"]}}
    config, w, x, table = decided("qwen2", variant("a8w8c8", everything, WORD))
    before, after = (reference_block(config, LAYER, f, x)[0] for f in (w, fold_block(LAYER, w, table, config)))
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_unknown_options_and_bad_ones_are_told() -> None:
    config, w, x = made("llama")
    for options, message in (({"beta": 1}, "unknown kv_smooth option 'beta'"), ({"alpha": 2}, "kv_smooth.alpha is 2")):
        plan = replace(variant("a8w8c8"), transforms=({"kv_smooth": options},))
        with pytest.raises(RecipeError, match=message):
            choose_block(LAYER, w, look(config, w, x), plan, config)
