from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.calibrate import observe as module
from quantbench.calibrate.observe import native_ops, observe
from quantbench.errors import CalibrationError
from quantbench.scales import statistics as reference
from quantbench.scales.statistics import Statistics


@pytest.fixture
def fresh() -> Iterator[None]:
    native_ops.cache_clear()
    yield
    native_ops.cache_clear()


def assert_equal(a: Statistics, b: Statistics) -> None:
    for field in fields(Statistics):
        left, right = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_equal(left, right, err_msg=field.name)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None), field.name


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70), width=st.integers(1, 40), rows=st.integers(1, 3), power=st.integers(-60, 60),
    seed=st.integers(0, 2**32 - 1), hessian=st.booleans(),
)  # fmt: skip
def test_native_and_reference_give_the_same_bits(
    tokens: int, width: int, rows: int, power: int, seed: int, hessian: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, (tokens, width * rows)) * 2.0**power).astype(np.float32)
    assert_equal(observe(x, rows, hessian), reference.observe(x, rows, hessian))


@pytest.mark.parametrize("shape", [(1, 1), (300, 1536), (5, 600), (1000, 3)])
@pytest.mark.parametrize("value", [0.0, -3.0, 2.0**120, 2.0**-140])
def test_dull_inputs(shape: tuple[int, int], value: float) -> None:
    x = np.full(shape, value, np.float32)
    x[0, 0] = -x[0, 0]
    assert_equal(observe(x), reference.observe(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_found_and_placed(bad: float) -> None:
    x = np.ones((5, 4), np.float32)
    x[3, 2] = bad
    with pytest.raises(
        CalibrationError, match="an activation is NaN or Inf: 1 of 20 values, first at token 3 channel 2"
    ):
        observe(x)


def test_values_that_have_no_power_of_two_above_them() -> None:
    with pytest.raises(CalibrationError, match=r"too large to be calibrated \(limit 2\*\*127\)"):
        observe(np.full((2, 2), 3e38, np.float32))


def test_rows_must_divide_the_channels() -> None:
    with pytest.raises(CalibrationError, match="in 2 rows"):
        observe(np.ones((2, 3), np.float32), 2)


@pytest.mark.usefixtures("fresh")
def test_without_the_extension_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native_ops", lambda: None)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert_equal(module.observe(x), reference.observe(x))
