"""The closed-form error model against quantizing real numbers."""

from __future__ import annotations

import numpy as np
import pytest

from quantbench.quantizers.formats import FORMATS
from quantbench.scales.error import energy, squared_error
from quantbench.scales.statistics import observe

F32 = np.float32


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.2])
def test_expected_error_is_that_of_the_values(name: str, kept: float) -> None:
    x = np.random.default_rng(0).standard_normal((500, 400)).astype(F32)
    s, fmt = observe(x), FORMATS[name]
    assert s.histogram is not None
    absmax = s.absmax * F32(kept)
    scale = fmt.scale_of(absmax)
    real = np.square(fmt.decode(fmt.encode(x, scale), scale).astype(np.float64) - x).sum()
    expected = squared_error(s.histogram[0], float(s.limit[0]), absmax.astype(np.float64), fmt.qmax)
    assert expected[0] == pytest.approx(real, rel=0.02)


def test_energy_is_the_sum_of_squares() -> None:
    x = np.random.default_rng(0).standard_normal((500, 400)).astype(F32)
    s = observe(x)
    assert s.histogram is not None
    assert energy(s.histogram[0], float(s.limit[0])) == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-3)


def test_values_on_grid_points_of_e4m3_cost_what_their_bin_costs() -> None:
    """Integral over one binade by brute force."""
    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * 600
    fmt = FORMATS["fp8_e4m3"]
    one = np.array([1], F32)
    brute = np.square(fmt.decode(fmt.encode(t.astype(F32), one), one).astype(np.float64) - t).mean()
    histogram = np.array([1], np.int64)
    assert squared_error(histogram, 600.0, np.array([448.0]), 448.0)[0] == pytest.approx(brute, rel=1e-3)
