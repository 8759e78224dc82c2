from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block, fold_block
from quantbench.calibrate.choose import choose_block
from quantbench.errors import CalibrationError, RecipeError
from quantbench.infer.models import LINEARS
from quantbench.scales.lint import errors, lint_table
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

LLAMA = replace(CONFIG, family="llama", attention_bias=False)
CORRECT = {"bias_correction": {}}


def made() -> dict[str, np.ndarray]:
    """Without biases; inputs of down_proj that are far from zero in the mean, as behind SwiGLU."""
    w = {name: value for name, value in weights().items() if not name.endswith(".bias")}
    w["input_layernorm.weight"][:] = 1
    return w


def rows(taps: Collection[str]) -> dict[str, np.ndarray]:
    return {tap: np.abs(forward(hidden(1, 200), made())[1][tap]).astype(np.float32) for tap in taps}


def decided(plan: VariantPlan) -> tuple[ScaleTable, dict[str, np.ndarray]]:
    w = made()
    seen = statistics(w, hessian=True)
    table = choose_block(LAYER, w, seen, plan, LLAMA, sample=rows)
    return table, apply_block(LAYER, w, table, plan, LLAMA, seen)


def biases(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = f"{PREFIX}."
    return {n.removeprefix(start).removesuffix(".bias"): b for n, b in stored.items() if n.endswith(".bias")}


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_mean_error_of_every_output_is_gone(dynamic: bool) -> None:
    """A slow version: the linear as served, row by row, against the linear in float."""
    plan = variant("a8w8", CORRECT, dynamic=dynamic, dtype="float32")
    table, stored = decided(plan)
    for line in LINEARS:
        x, w = rows([line.tap])[line.tap].astype(np.float64), made()[f"{line.name}.weight"].astype(np.float64)
        q = stored[f"{PREFIX}.{line.name}.weight"].astype(np.float64) * stored[f"{PREFIX}.{line.name}.weight_scale"]
        if dynamic:
            a = np.abs(x).max(axis=1, keepdims=True) / 127
        else:
            a = table[f"{PREFIX}.{line.name}.input"].scale.astype(np.float64)
        errors_ = np.clip(np.rint(x / a), -127, 127) * a @ q.T - x @ w.T
        left = errors_ + stored[f"{PREFIX}.{line.name}.bias"]
        assert np.abs(left.mean(axis=0)).max() < 0.02 * np.abs(errors_).max(), line.name
        assert np.square(left).mean() < np.square(errors_).mean()


def test_weights_alone_are_corrected_too_and_the_float_block_is_unchanged() -> None:
    plan = variant("weight_only_int4", CORRECT, dtype="float32")
    table, stored = decided(plan)
    assert set(biases(stored)) == {line.name for line in LINEARS}
    assert all(b.any() for b in biases(stored).values())
    assert fold_block(LAYER, made(), table, LLAMA).keys() == made().keys()
    assert errors(lint_table(table, plan)) == []


def test_only_targets_are_corrected_and_the_rest_of_their_class_is_zero() -> None:
    found = biases(decided(variant("a8w8", {"bias_correction": {"targets": ["o_in"]}}))[1])
    assert {name for name, bias in found.items() if bias.any()} == {"self_attn.o_proj"}
    assert set(found) == {f"self_attn.{p}_proj" for p in "qkvo"}


def test_a_bias_that_the_model_has_is_moved() -> None:
    w, plan = weights(), variant("a8w8", CORRECT, dtype="float32")
    w |= {f"self_attn.{p}_proj.bias": np.full(len(w[f"self_attn.{p}_proj.weight"]), 5, np.float32) for p in "qkv"}
    seen = statistics(w)
    table = choose_block(LAYER, w, seen, plan, CONFIG, sample=rows)
    stored = biases(apply_block(LAYER, w, table, plan, CONFIG, seen))
    assert set(stored) == {f"self_attn.{p}_proj" for p in "qkv"}
    assert np.all(np.abs(stored["self_attn.q_proj"] - 5) < 1)
    assert np.any(stored["self_attn.q_proj"] != 5)


def test_rows_are_needed() -> None:
    w = made()
    with pytest.raises(CalibrationError, match="bias_correction needs rows of attn_in, o_in, mlp_in, down_in"):
        choose_block(LAYER, w, statistics(w), variant("a8w8", CORRECT), LLAMA)
    with pytest.raises(RecipeError, match="unknown bias_correction option 'alpha'"):
        choose_block(LAYER, w, statistics(w), variant("a8w8", {"bias_correction": {"alpha": 1}}), LLAMA, sample=rows)
