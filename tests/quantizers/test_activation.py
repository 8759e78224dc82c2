from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantbench.errors import CalibrationError
from quantbench.quantizers.activation import quantize_activation

F32 = np.float32
rows = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-1e4, 1e4, width=32)
)


def test_static_uses_the_given_scale_and_saturates() -> None:
    codes, scale = quantize_activation(np.array([[1, 2.5, -300]], F32), "int8", 1.0)
    assert codes.tolist() == [[1, 2, -127]]
    assert scale.tolist() == [1]


def test_dynamic_takes_each_token_alone() -> None:
    codes, scale = quantize_activation(np.array([[127, 1], [0, 0], [1e4, 1]], F32), "int8", None)
    assert codes.tolist() == [[127, 1], [0, 0], [127, 0]]
    assert scale.tolist() == [1, 1, pytest.approx(1e4 / 127)]


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
@settings(deadline=None)
@given(x=rows)
def test_a_token_does_not_depend_on_its_batch(format: str, x: np.ndarray) -> None:
    codes, scale = quantize_activation(x, format, None)
    alone, alone_scale = quantize_activation(x[-1:], format, None)
    assert scale[-1] == alone_scale[0]
    assert codes[-1:].tobytes() == alone.tobytes()


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_their_place(bad: float, scale: float | None) -> None:
    x = np.ones((3, 4), F32)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"activation: 1 of 12 values are NaN or Inf \(first at \(1, 2\)"):
        quantize_activation(x, "int8", scale)
