from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.methods import METHODS
from quantbench.quantizers.weight import dequantize_weight, expand, quantize_weight, scale_shape
from quantbench.quantizers.weight_range import weight_entry
from quantbench.vocabulary import LayerPlan

F32 = np.float32
SCHEMES = {
    "int8 tensor": LayerPlan("w", "int8", "tensor"),
    "int8 channel": LayerPlan("w", "int8", "channel"),
    "int4 channel": LayerPlan("w", "int4", "channel"),
    "int4 group 32": LayerPlan("w", "int4", "group", 32),
    "int4 group 64": LayerPlan("w", "int4", "group", 64),
    "int4 group 128": LayerPlan("w", "int4", "group", 128),
    "int4 channel asymmetric": LayerPlan("w", "int4", "channel", symmetric=False),
    "int4 group 64 asymmetric": LayerPlan("w", "int4", "group", 64, symmetric=False),
    "fp8 tensor": LayerPlan("w", "fp8_e4m3", "tensor"),
    "fp8 channel": LayerPlan("w", "fp8_e4m3", "channel"),
    "fp8 block": LayerPlan("w", "fp8_e4m3", "block"),
}
every = pytest.mark.parametrize("plan", SCHEMES.values(), ids=SCHEMES)


def slow(w: np.ndarray, plan: LayerPlan, group: int) -> np.ndarray:
    """One unit at a time, in plain Python: what quantize then dequantize must give."""
    out, fmt = np.empty_like(w), FORMATS[plan.weights]
    n, k = w.shape
    height = {"tensor": n, "block": 128}.get(str(plan.granularity), 1)
    width = {"group": group, "block": 128}.get(str(plan.granularity), k)
    for i in range(0, n, height):
        for j in range(0, k, width):
            unit = w[i : i + height, j : j + width]
            zero = None
            scale = fmt.scale_of(np.abs(unit).max().reshape(1))
            if not plan.symmetric:
                scale, zero = fmt.affine_of(unit.min().reshape(1), unit.max().reshape(1))
            out[i : i + height, j : j + width] = fmt.decode(fmt.encode(unit, scale, zero), scale, zero)
    return out


@every
@pytest.mark.parametrize("shape", [(130, 256), (3, 128), (256, 128)])
def test_equals_a_loop_over_units(plan: LayerPlan, shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(F32)
    entry = weight_entry(w, plan)
    quantized = quantize_weight(w, entry)
    assert quantized.codes.dtype == FORMATS[plan.weights].storage
    assert entry.scale.shape == scale_shape(str(plan.granularity), shape, plan.group_size)
    assert np.array_equal(dequantize_weight(quantized), slow(w, plan, plan.group_size or 0))


@every
def test_zeros_stay_zeros_without_loss(plan: LayerPlan) -> None:
    entry = weight_entry(np.zeros((8, 128), F32), plan)
    assert np.all(entry.scale == 1)
    assert entry.loss == 0
    assert not dequantize_weight(quantize_weight(np.zeros((8, 128), F32), entry)).any()


@every
def test_a_constant_is_kept_within_a_sixteenth(plan: LayerPlan) -> None:
    w = np.full((8, 128), -0.3, F32)
    assert dequantize_weight(quantize_weight(w, weight_entry(w, plan))) == pytest.approx(w, rel=1 / 14)


@every
def test_one_outlier_is_kept_and_costs_only_its_own_unit(plan: LayerPlan) -> None:
    w = np.random.default_rng(1).standard_normal((256, 256)).astype(F32)
    plain = dequantize_weight(quantize_weight(w, weight_entry(w, plan)))
    w[200, 200] = 1e4
    spiked = dequantize_weight(quantize_weight(w, weight_entry(w, plan)))
    assert spiked[200, 200] == pytest.approx(1e4, rel=1 / 14)
    same = (spiked == plain).mean()
    assert same > {"tensor": -1, "block": 0.74}.get(str(plan.granularity), 0.99)


@every
def test_doubling_the_weight_doubles_the_result(plan: LayerPlan) -> None:
    w = np.random.default_rng(2).standard_normal((8, 128)).astype(F32)
    once = dequantize_weight(quantize_weight(w, weight_entry(w, plan)))
    assert np.array_equal(dequantize_weight(quantize_weight(2 * w, weight_entry(2 * w, plan))), 2 * once)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_by_name(bad: float) -> None:
    w = np.ones((4, 128), F32)
    entry = weight_entry(w, replace(SCHEMES["int8 channel"], name="model.layers.0.mlp.up_proj"))
    w[3, 5] = bad
    with pytest.raises(CalibrationError, match=r"model.layers.0.mlp.up_proj.weight: 1 of 512 values .* \(3, 5\)"):
        quantize_weight(w, entry)
    with pytest.raises(CalibrationError, match=r"w.weight: 1 of 512 values are NaN or Inf"):
        weight_entry(w, SCHEMES["int8 channel"])


def test_a_group_that_does_not_divide_says_which_do() -> None:
    with pytest.raises(CalibrationError, match=r"group size 128 does not divide the 576 inputs .* \[32, 64\]"):
        scale_shape("group", (8, 576), 128)
    with pytest.raises(CalibrationError, match="allowed here: granularity channel"):
        scale_shape("group", (8, 100), 32)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match="unknown weight granularity 'row' with group size None; allowed: tensor"
    ):
        scale_shape("row", (8, 8), None)


def test_a_scale_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"a channel scale of a weight \(4, 8\) has shape \(4, 1\), not \(8, 1\)"
    ):
        expand(np.ones((8, 1), F32), "channel", (4, 8), None)


@settings(deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_block_scales_cover_ragged_edges(rows: int, columns: int) -> None:
    shape = scale_shape("block", (rows, columns), None)
    values = np.arange(shape[0] * shape[1], dtype=F32).reshape(shape)
    wide = expand(values, "block", (rows, columns), None)
    assert wide.shape == (rows, columns)
    assert wide[-1, -1] == values[(rows - 1) // 128, (columns - 1) // 128]


def test_the_method_rtn_is_quantize_weight() -> None:
    w = np.random.default_rng(3).standard_normal((4, 64)).astype(F32)
    entry = weight_entry(w, SCHEMES["int4 group 32"])
    method = METHODS["rtn"]
    assert not method.needs_hessian
    assert np.array_equal(method.quantize(w, entry, None).codes, quantize_weight(w, entry).codes)
