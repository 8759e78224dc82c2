from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import RecipeError
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.smooth import (
    fold_into_inputs,
    fold_into_norm,
    fold_into_outputs,
    repeat_heads,
    smooth_factors,
    storable_factors,
    tie_heads,
)
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import weight_entry
from quantbench.vocabulary import LayerPlan

F32 = np.float32


def test_formula_by_hand() -> None:
    factors = smooth_factors(np.array([16, 4, 9], F32), np.array([4, 1, 1], F32), 0.5)
    assert factors == pytest.approx([2, 2, 3])
    assert smooth_factors(np.array([16], F32), np.array([4], F32), 1.0) == 16
    assert smooth_factors(np.array([16], F32), np.array([4], F32), 0.0) == pytest.approx(1 / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_equals_a_slow_version(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    x, w = np.exp(2 * rng.standard_normal((2, 12))).astype(F32)
    x[3], w[7] = 0, 0
    x[5] = 1e4  # one outlier
    slow = [
        1.0 if a == 0 or b == 0 else min(max(float(a) ** alpha / float(b) ** (1 - alpha), 2.0**-16), 2.0**16)
        for a, b in zip(x, w, strict=True)
    ]
    assert smooth_factors(x, w, alpha) == pytest.approx(slow, rel=1e-5)
    assert smooth_factors(np.zeros(12, F32), w, alpha).tolist() == [1] * 12


def test_dead_channels_keep_factor_one_and_factors_are_bounded() -> None:
    factors = smooth_factors(np.array([0, 5, 1e30], F32), np.array([1, 0, 1e-30], F32), 0.5)
    assert factors.tolist() == [1, 1, 2.0**16]


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"smooth.alpha is .*; it is between 0"):
        smooth_factors(np.ones(1, F32), np.ones(1, F32), alpha)


def test_the_float_result_does_not_change() -> None:
    rng = np.random.default_rng(0)
    norm, w1, b1, w2 = (rng.standard_normal(s).astype(F32) for s in ((8,), (6, 8), (6,), (5, 6)))
    x = rng.standard_normal((10, 8)).astype(F32)
    into_norm, into_linear = np.exp(rng.standard_normal(8)).astype(F32), np.exp(rng.standard_normal(6)).astype(F32)
    plain = ((x * norm) @ w1.T + b1) @ w2.T
    middle, bias = fold_into_outputs(fold_into_inputs(w1, into_norm), b1, into_linear)
    assert bias is not None
    folded = ((x * fold_into_norm(norm, into_norm)) @ middle.T + bias) @ fold_into_inputs(w2, into_linear).T
    assert folded == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_smoothing_beats_plain_on_a_correlated_outlier_input() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((256, 16)) @ rng.standard_normal((16, 64))).astype(F32)
    x[:, [3, 40]] *= 60
    w = rng.standard_normal((32, 64)).astype(F32)

    def error(x_: np.ndarray, w_: np.ndarray) -> float:
        codes, scale = quantize_activation(x_, "int8", float(np.abs(x_).max() / 127))
        weight = dequantize_weight(quantize_weight(w_, weight_entry(w_, LayerPlan("w", "int8", "channel"))))
        return float(np.square(codes.astype(F32) * scale @ weight.T - x @ w.T).sum())

    s = smooth_factors(np.abs(x).max(axis=0), np.abs(w).max(axis=0), 0.5)
    assert error(x / s, fold_into_inputs(w, s)) < 0.2 * error(x, w)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_storable_factors_make_the_folded_norm_exact(dtype: type) -> None:
    rng = np.random.default_rng(2)
    norm = rng.standard_normal(64).astype(dtype).astype(F32)
    norm[5] = 0
    wanted = np.exp(rng.standard_normal(64)).astype(F32)
    factors = storable_factors(norm, wanted, np.dtype(dtype))
    folded = fold_into_norm(norm, factors)
    stored = folded.astype(dtype).astype(F32)
    assert stored == pytest.approx(folded, rel=1e-6)
    assert factors[norm != 0] == pytest.approx(wanted[norm != 0], rel=2.0**-7)
    assert factors[5] == 1


def test_heads_are_tied_over_the_queries_that_share_them() -> None:
    values = np.arange(12, dtype=F32)  # 6 query heads of 2, 2 KV heads: heads 0-2 share the first
    tied = tie_heads(values, 2, 2)
    assert tied.tolist() == [4, 5, 10, 11]
    assert repeat_heads(tied, 6, 2).tolist() == [4, 5] * 3 + [10, 11] * 3
