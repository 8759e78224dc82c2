"""NaN and Inf are found in every float type, and named."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import count_not_finite, require_finite


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@given(x=npst.arrays(np.float64, st.integers(0, 20), elements=st.floats(width=64)))
def test_what_is_not_finite_is_counted_in_every_float_type(dtype: type, x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        stored = x.astype(dtype)
    assert count_not_finite(stored) == sum(not np.isfinite(float(v)) for v in stored)


def test_every_pattern_of_two_bytes() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    assert count_not_finite(bits.view(np.float16)) == 2 * 1024  # exponent 31: Inf and 1023 NaN, of both signs
    assert count_not_finite(bits.view(ml_dtypes.bfloat16)) == 2 * 128


def test_the_first_bad_value_is_named() -> None:
    x = np.zeros((2, 3), np.float32)
    x[1, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"w: 1 of 6 values are NaN or Inf \(first at \(1, 0\): nan\)"):
        require_finite(x, "w")
