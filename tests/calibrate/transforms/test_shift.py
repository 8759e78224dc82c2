from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block, fold_block
from quantbench.calibrate.choose import choose_block
from quantbench.errors import CalibrationError, RecipeError
from quantbench.scales.lint import errors, lint_table
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

LLAMA = replace(CONFIG, family="llama", attention_bias=False)
SHIFT = {"shift": {}}
BATCHES = (1, 2)


def made() -> dict[str, np.ndarray]:
    """Values whose channels lie far from zero: every token's hidden state has one large channel of one sign."""
    w = {name: value for name, value in weights().items() if not name.endswith(".bias")}
    w["self_attn.v_proj.weight"][:, 7] = np.random.default_rng(0).standard_normal(32)
    return w


def inputs(seed: int) -> np.ndarray:
    x = hidden(seed)
    x[:, 7] = 3
    return x


def look(factors: Mapping[str, np.ndarray], shifts: Mapping[str, np.ndarray]) -> dict[str, Statistics]:
    taps = [forward(inputs(seed), made())[1] for seed in BATCHES]
    found = {}
    for tap in {**factors, **shifts}:
        x = (np.concatenate([t[tap] for t in taps]) - shifts.get(tap, 0)) * factors.get(tap, 1)
        found[tap] = observe(x.astype(np.float32), CONFIG.num_kv_heads if tap in "kv" else 1, tap not in "kv")
    return found


def rows(taps: Collection[str]) -> dict[str, np.ndarray]:
    return {tap: forward(inputs(1), made())[1][tap].astype(np.float32) for tap in taps}


def decided(plan: VariantPlan) -> tuple[ScaleTable, dict[str, Statistics]]:
    seen = look(dict.fromkeys(("attn_in", "o_in", "mlp_in", "down_in", "k", "v"), np.float32(1)), {})
    return choose_block(LAYER, made(), seen, plan, LLAMA, look, rows), seen


def folded(table: ScaleTable) -> dict[str, np.ndarray]:
    return fold_block(LAYER, made(), table, LLAMA)


@pytest.mark.parametrize("by", ["mean", "midrange"])
def test_the_float_block_is_unchanged_and_ranges_shrink(by: str) -> None:
    plan = variant("a8w8c8", {"shift": {"by": by}})
    table, _ = decided(plan)
    plain, _ = decided(variant("a8w8c8"))
    x = inputs(5)
    before, after = forward(x, made())[0], forward(x, folded(table))[0]
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    for name in ("self_attn.o_proj.input", "self_attn.v_cache"):
        assert np.all(table[f"{PREFIX}.{name}"].absmax < 0.8 * plain[f"{PREFIX}.{name}"].absmax)
    assert errors(lint_table(table, plan)) == []


def test_ranges_and_hessians_are_of_what_lies_behind_the_shift() -> None:
    plan = variant("a8w8", SHIFT, {"smooth": {"targets": ["o_in"]}})
    table, seen = decided(plan)
    taps = [forward(inputs(seed), folded(table))[1]["o_in"] for seed in BATCHES]
    assert table[f"{PREFIX}.self_attn.o_proj.input"].absmax == pytest.approx(
        [max(np.abs(x).max() for x in taps)], rel=1e-4
    )
    behind = np.concatenate(
        [forward(inputs(s), folded(decided(variant("a8w8", SHIFT))[0]))[1]["o_in"] for s in BATCHES]
    )
    assert seen["o_in"].hessian == pytest.approx(behind.T @ behind, rel=1e-3, abs=1e-2)


def test_quantized_outputs_are_nearer() -> None:
    def loss(*words: dict[str, object]) -> float:
        table, _ = decided(variant("a8w8", *words))
        w = folded(table)
        x, weight = forward(inputs(1), w)[1]["o_in"], w["self_attn.o_proj.weight"]
        a, s = table[f"{PREFIX}.self_attn.o_proj.input"].scale[0], table[f"{PREFIX}.self_attn.o_proj.weight"].scale
        served = np.clip(np.rint(x / a), -127, 127) * a @ (np.rint(weight / s) * s).T
        return float(np.square(served - x @ weight.T).sum())

    assert loss(SHIFT) < 0.6 * loss()


def test_what_is_stored_has_the_biases_of_its_class() -> None:
    plan = variant("a8w8", SHIFT)
    table, seen = decided(plan)
    stored = apply_block(LAYER, made(), table, plan, LLAMA, seen)
    found = {n.removeprefix(f"{PREFIX}.self_attn."): b for n, b in stored.items() if n.endswith(".bias")}
    assert set(found) == {f"{p}_proj.bias" for p in "qkvo"}
    assert not found["q_proj.bias"].any()
    assert np.array_equal(found["v_proj.bias"].astype(np.float32), -table[f"{PREFIX}.self_attn.v_proj.shift"].scale)


def test_it_needs_the_model() -> None:
    w = made()
    with pytest.raises(CalibrationError, match="shift needs rows of o_in and a second look behind it"):
        choose_block(LAYER, w, statistics(w), variant("a8w8", SHIFT), LLAMA)
    with pytest.raises(RecipeError, match="unknown shift option 'sampler'"):
        decided(variant("a8w8", {"shift": {"sampler": "ema"}}))
