"""The native observer records what scales.statistics.observe does, number for number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.ops.observe import observe
from quantbench.scales import statistics


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 90), st.floats(0.001, 1000), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_same_numbers(ops: CpuOps, t: int, rows: int, width: int, size: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((t, rows * width)) * size).astype(np.float32)
    assert_same(ops, x, rows)


@pytest.mark.parametrize("kind", ["zeros", "one outlier", "constant", "power of two"])
def test_dull_inputs(ops: CpuOps, kind: str) -> None:
    x = np.zeros((9, 70), np.float32)
    if kind == "one outlier":
        x[8, 69] = -3537
    elif kind in ("constant", "power of two"):
        x[:] = -2.5 if kind == "constant" else 4
    assert_same(ops, x, 2)


def assert_same(ops: CpuOps, x: np.ndarray, rows: int) -> None:
    got, want = observe(ops, x, rows), statistics.observe(x, rows)
    for name in ("channel_absmax", "channel_sum", "minimum", "maximum", "histogram", "limit"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name


def test_a_given_limit(ops: CpuOps) -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
    seen = observe(ops, x, 1, np.array([8], np.float32))
    assert seen.limit[0] == 8
    assert seen.histogram.sum() == 64
    assert seen.histogram[0, 256] == 2  # |x| = 1
    with pytest.raises(CalibrationError, match=r"row 0: \|x\| reaches 1, above the limit 0.5"):
        observe(ops, x, 1, np.array([0.5], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_raises(ops: CpuOps, value: float) -> None:
    x = np.zeros((5, 70), np.float32)
    x[3, 68] = value
    with pytest.raises(CalibrationError, match="holds a NaN or an infinity"):
        observe(ops, x, 2)
    with pytest.raises(CalibrationError, match="token 3 has a NaN or an infinity"):
        observe(ops, x, 2, np.ones(2, np.float32))


def test_rows_must_divide(ops: CpuOps) -> None:
    with pytest.raises(CalibrationError, match="rows must divide"):
        observe(ops, np.zeros((2, 7), np.float32), 2)
