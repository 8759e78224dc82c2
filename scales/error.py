"""Expected squared error of quantizing a tensor known only by the histogram of |x|, values uniform inside a bin.

The error of rounding to a grid integrates in closed form. For a grid of step d, the integral of the squared error from
a grid point to a point u steps further is d^3 G(u), G(u) = n/12 + f^3/3 with n = round(u), f = u - n. Beyond the
largest code c the error is (x - c)^2. Both formats are such grids: int8 a single one, e4m3 one per binade.
"""

from __future__ import annotations

import numpy as np

from quantbench.scales.arrays import F64, I64

E4M3_LEVELS = 448.0  # the `levels` that select the e4m3 grid: its largest code, as 127 is int8's
_LOWEST, _HIGHEST = -7, 8  # binades of e4m3; the lowest one stands for the subnormal numbers [0, 2**-6)


def squared_error(histogram: I64, limit: float, absmax: F64, levels: float) -> F64:
    """Sum of (x - quantized x)^2 over one row's values, for each range absmax [M] > 0. Returns f64[M].

    histogram [2048] counts |x| in bins of limit/2048. The scale is absmax/levels; `levels` is the largest code: 127
    for int8, 448 for e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), whose grid is not uniform.
    """
    bins = len(histogram)
    edges = np.arange(bins + 1) * (limit / bins)
    scale = np.asarray(absmax, np.float64)[:, None] / levels
    cumulative = scale**3 * _integral(edges[None, :] / scale, levels)
    return np.asarray(np.diff(cumulative, axis=1) @ histogram / (limit / bins))


def energy(histogram: I64, limit: float) -> float:
    """Sum of x^2 over one row's values, same assumption."""
    edges = np.arange(len(histogram) + 1) / len(histogram)
    return float(np.diff(edges**3) @ histogram) * len(histogram) / 3 * limit**2


def _integral(t: F64, levels: float) -> F64:
    """Integral from 0 to t of the squared error of rounding to the codes 0..levels, t in units of the scale."""
    inside = np.minimum(t, levels)
    rounding = _e4m3_integral(inside) if levels == E4M3_LEVELS else _steps(inside)
    return np.asarray(rounding + np.maximum(t - levels, 0) ** 3 / 3)


def _steps(u: F64) -> F64:
    """G(u) of the module docstring."""
    nearest = np.rint(u)
    return np.asarray(nearest / 12 + (u - nearest) ** 3 / 3)


def _e4m3_integral(t: F64) -> F64:
    """Each binade [2^e, 2^(e+1)) holds 8 steps of 2^(e-3); below 2^-6 there are 8 steps of 2^-9."""
    binades = np.arange(_LOWEST, _HIGHEST + 1)
    step = np.where(binades == _LOWEST, 2.0**-9, 2.0 ** (binades - 3.0))
    start = np.where(binades == _LOWEST, 0.0, 2.0**binades)
    before = np.concatenate([[0.0], np.cumsum(8 * step**3 / 12)[:-1]])
    index = np.clip(np.frexp(t)[1] - 1, _LOWEST, _HIGHEST) - _LOWEST
    index = np.where(t > 0, index, 0)
    return np.asarray(before[index] + step[index] ** 3 * _steps((t - start[index]) / step[index]))
