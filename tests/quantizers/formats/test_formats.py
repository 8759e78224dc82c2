"""Every format on dull and random inputs: the reference that all kernels are compared with must itself be right."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantbench.errors import CalibrationError, QuantbenchError
from quantbench.quantizers.formats import E4M3, FORMATS, FP8_E4M3, INT4, INT8

F32 = np.float32
finite = st.floats(-(2.0**100), 2.0**100, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=40), elements=finite)
names = pytest.mark.parametrize("name", list(FORMATS))


def test_int8_codes_by_hand() -> None:
    x = np.array([0.5, 1.5, 2.5, -2.5, 126.5, 127.49, 200, -128, -0.5], F32)
    assert INT8.encode(x, np.array([1], F32)).tolist() == [0, 2, 2, -2, 126, 127, 127, -127, 0]


def test_int4_uses_all_sixteen_codes() -> None:
    scale = INT4.scale_of(np.array([7.5], F32))
    assert scale == 1
    assert INT4.encode(np.array([7.5, -7.5, 7.4, -7.6, 100], F32), scale).tolist() == [7, -8, 7, -8, 7]


def test_int4_step_is_the_best_of_its_neighbours() -> None:
    w = np.random.default_rng(0).standard_normal((2000, 64)).astype(F32)
    absmax = np.abs(w).max(axis=1, keepdims=True)
    sevens = np.clip(np.rint(w / (absmax / F32(7))), -7, 7) * (absmax / F32(7))
    scale = INT4.scale_of(absmax)
    ours = INT4.decode(INT4.encode(w, scale), scale)
    assert np.square(ours - w).sum() < 0.95 * np.square(sevens - w).sum()
    assert np.abs(ours - w).max(axis=1) == pytest.approx(scale[:, 0] / 2, rel=0.1)


def test_fp8_cast_is_that_of_ml_dtypes_after_clipping() -> None:
    x = np.random.default_rng(1).standard_normal(100_000).astype(F32) * F32(200)
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(FP8_E4M3.encode(x, np.array([1], F32)).view(np.uint8), expected.view(np.uint8))


def test_fp8_saturates_and_never_makes_nan() -> None:
    x = np.array([448, 464, 465, 1e30, -1e30, 2.0**-10, 1e-30], F32)
    decoded = FP8_E4M3.decode(FP8_E4M3.encode(x, np.array([1], F32)), np.array([1], F32))
    assert decoded.tolist() == [448, 448, 448, 448, -448, 0, 0]


def test_every_fp8_code_survives_the_round_trip() -> None:
    codes = np.arange(256, dtype=np.uint8).view(E4M3)
    codes = codes[np.isfinite(codes.astype(F32))]
    one = np.array([1], F32)
    again = FP8_E4M3.encode(FP8_E4M3.decode(codes, one), one)
    assert np.array_equal(again.view(np.uint8), codes.view(np.uint8))


@names
def test_a_zero_range_has_scale_one(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.scale_of(np.zeros(3, F32)).tolist() == [1, 1, 1]
    assert fmt.decode(fmt.encode(np.zeros(3, F32), F32(1)), F32(1)).tolist() == [0, 0, 0]


@names
@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 1.2e-38, 3e-37])
def test_tiny_ranges_give_finite_codes(name: str, absmax: float) -> None:
    fmt = FORMATS[name]
    x = np.array([absmax, -absmax, 0], F32)
    scale = fmt.scale_of(np.array([absmax], F32))
    assert scale >= np.finfo(F32).tiny
    decoded = fmt.decode(fmt.encode(x, scale), scale)
    assert np.all(np.isfinite(decoded))
    assert np.all(np.abs(decoded) <= np.abs(x) * 1.1)


@names
def test_the_largest_range_does_not_overflow(name: str) -> None:
    fmt = FORMATS[name]
    top = np.finfo(F32).max
    scale = fmt.scale_of(np.array([top], F32))
    assert np.all(np.isfinite(fmt.encode(np.array([top, -top], F32), scale).astype(F32)))


@names
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_bad_range_is_refused(name: str, bad: float) -> None:
    with pytest.raises(CalibrationError, match=f"{name}: a range is NaN, infinite or negative"):
        FORMATS[name].scale_of(np.array([1, bad], F32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_asymmetric_range_is_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="int4: a range is NaN or infinite"):
        INT4.affine_of(np.array([-1], F32), np.array([bad], F32))


def test_an_unknown_format_names_the_known() -> None:
    with pytest.raises(QuantbenchError, match=r"unknown format 'int-4'\. Did you mean int4\?"):
        FORMATS["int-4"]


@names
@settings(deadline=None)
@given(x=arrays)
def test_round_trip_error_is_within_half_a_step(name: str, x: np.ndarray) -> None:
    fmt = FORMATS[name]
    absmax = np.abs(x).max(initial=0)
    scale = fmt.scale_of(np.array(absmax, F32))
    codes = fmt.encode(x, scale)
    error = np.abs(fmt.decode(codes, scale).astype(np.float64) - x)
    if fmt.integer:
        assert codes.min() >= fmt.qmin
        assert codes.max() <= fmt.qmax
        bound = np.full(x.shape, 0.5 * float(scale))
    else:
        bound = np.maximum(np.abs(x) / 16, float(scale) * 2.0**-10)
    if absmax == 0 or scale != 1:
        assert np.all(error <= bound * (1 + 1e-5))


@settings(deadline=None)
@given(x=arrays)
def test_asymmetric_codes_keep_zero_and_err_at_most_half_a_step(x: np.ndarray) -> None:
    scale, zero = INT4.affine_of(x.min(keepdims=True).ravel(), x.max(keepdims=True).ravel())
    assert INT4.decode(INT4.encode(np.zeros(1, F32), scale, zero), scale, zero) == 0
    error = np.abs(INT4.decode(INT4.encode(x, scale, zero), scale, zero).astype(np.float64) - x)
    if scale != 1:
        assert np.all(error <= float(scale[0]) * 1.001)


def test_asymmetric_beats_symmetric_on_one_sided_values() -> None:
    x = np.random.default_rng(2).uniform(0, 1, 1000).astype(F32)
    scale, zero = INT4.affine_of(np.array([x.min()]), np.array([x.max()]))
    one_sided = INT4.decode(INT4.encode(x, scale, zero), scale, zero)
    both = INT4.scale_of(np.array([x.max()]))
    assert np.square(one_sided - x).mean() < 0.3 * np.square(INT4.decode(INT4.encode(x, both), both) - x).mean()
