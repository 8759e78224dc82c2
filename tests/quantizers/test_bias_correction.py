from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.bias_correction import corrected_bias, input_mean
from quantbench.quantizers.output_loss import round_trip
from quantbench.scales.statistics import observe
from quantbench.vocabulary import LayerPlan

F32 = np.float32
PLAN = LayerPlan("w", "int4", "channel")


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs whose mean is not zero, a weight, and the weight in 4 bits."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((200, 8)) @ rng.standard_normal((8, 64)) + 3 * rng.standard_normal(64)).astype(F32)
    w = rng.standard_normal((12, 64)).astype(F32)
    return x, w, round_trip(w, PLAN)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_equals_a_slow_version_and_restores_the_mean(seed: int) -> None:
    x, w, q = sample(seed)
    bias = np.random.default_rng(seed).standard_normal(12).astype(F32)
    corrected = corrected_bias(w, q, input_mean(observe(x)), bias)
    x64 = x.astype(np.float64)
    assert corrected == pytest.approx(bias + (x64 @ w.T - x64 @ q.T).mean(axis=0), rel=1e-4, abs=1e-4)
    assert (x64 @ q.T + corrected).mean(axis=0) == pytest.approx((x64 @ w.T + bias).mean(axis=0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_nearer_by_exactly_what_the_formula_says(seed: int) -> None:
    x, w, q = sample(seed)
    mean = input_mean(observe(x))
    error = x.astype(np.float64) @ (w - q).astype(np.float64).T
    left = np.square(error - corrected_bias(w, q, mean)).mean(axis=0)
    saved = np.square((w - q).astype(np.float64) @ mean)
    assert left == pytest.approx(np.square(error).mean(axis=0) - saved, rel=1e-4, abs=1e-5)
    assert left.sum() < 0.9 * np.square(error).sum() / len(x)


def test_the_shift_of_a_quantized_input_is_corrected_too() -> None:
    x, w, q = sample()
    x = np.abs(x)
    codes, scale = quantize_activation(x, "int8", float(np.abs(x).max() / 300))  # saturates: its mean is too small
    served = (codes.astype(F32) * scale).astype(np.float64)
    wanted = (x.astype(np.float64) @ w.T).mean(axis=0)
    bias = corrected_bias(w, q, input_mean(observe(x)), None, served.mean(axis=0))
    assert (served @ q.T + bias).mean(axis=0) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_no_error_or_no_input_needs_no_correction() -> None:
    x, w, q = sample()
    assert not corrected_bias(w, w, input_mean(observe(x))).any()
    assert not corrected_bias(w, q, np.zeros(64)).any()
    assert not corrected_bias(np.zeros_like(w), np.zeros_like(w), input_mean(observe(x))).any()


def test_one_giant_input_in_float64() -> None:
    x, w, q = sample()
    x[0, 7] = 1e4
    bias = corrected_bias(w, q, input_mean(observe(x)))
    assert bias == pytest.approx((x.astype(np.float64) @ (w - q).T).mean(axis=0), rel=1e-4, abs=1e-4)


def test_what_cannot_be_used_is_refused() -> None:
    x, w, q = sample()
    mean = input_mean(observe(x))
    with pytest.raises(CalibrationError, match=r"a weight \(12, 64\), .* do not belong together"):
        corrected_bias(w, q[:3], mean)
    with pytest.raises(CalibrationError, match=r"means \(63,\) and \(63,\) do not belong together"):
        corrected_bias(w, q, mean[1:])
    bad = w.copy()
    bad[1, 2] = np.nan
    with pytest.raises(CalibrationError, match=r"bias correction: weight: 1 of 768 values are NaN"):
        corrected_bias(bad, q, mean)
    with pytest.raises(CalibrationError, match=r"bias correction: served mean: 1 of 64 values are NaN or Inf"):
        corrected_bias(w, q, mean, None, np.where(np.arange(64) == 5, np.inf, mean))
