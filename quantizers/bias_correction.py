"""Bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2): the mean that rounding adds is taken back.

E[y] moves by (Q - W) E[x] when W becomes Q: a constant per output, that a bias undoes exactly. The mean squared error
of the outputs falls by |(W - Q) E[x]|^2 per token and can only fall. Cost: N K. Use it where a layer has a bias
already, or where its input's mean is far from zero (behind SwiGLU, or an asymmetric activation); behind an RMS norm
means are near zero and there is little to gain. The bias is float, so the checkpoint's layer must be able to hold one.
"""

from __future__ import annotations

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import require_finite
from quantbench.scales.arrays import F32, F64
from quantbench.scales.statistics import Statistics

GIANT = 4.0


def tempered_mean(x: F32, values: F32) -> F64:
    """Mean of values [T, K] over tokens, float64 [K], in which the rows of giants count for less.

    Rows of x [T, K] of more than 4 times the median norm weigh as the square of that limit over their norm, as they do
    in the Hessian (calibrate/collect.py). A correction by the plain mean would serve the few attention-sink tokens,
    whose inputs are hundreds of times the others', at the cost of every other token.
    """
    norms = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1))
    limit = GIANT * float(np.median(norms))
    weights = np.square(np.minimum(1, limit / np.maximum(norms, limit))) if limit else np.ones(len(x))
    return np.asarray(weights @ values.astype(np.float64) / weights.sum())


def input_mean(statistics: Statistics) -> F64:
    """E[x] of every channel, float64 [K]."""
    return statistics.channel_sum / statistics.tokens


def corrected_bias(w: F32, approximation: F32, mean: F64, bias: F32 | None = None, served: F64 | None = None) -> F32:
    """The bias [N], float32, that gives W x + b and Q x + result the same mean.

    w [N, K]: the weight in float; approximation [N, K]: what its codes decode to; mean [K]: E[x]. served [K]: E of the
    *quantized* input where that differs: then the shift of the input is corrected, too. Raises CalibrationError for
    NaN or Inf, or shapes that do not fit.
    """
    served = mean if served is None else served
    if w.shape != approximation.shape or (w.shape[1],) != mean.shape or mean.shape != served.shape:
        raise CalibrationError(
            f"bias correction: a weight {w.shape}, its approximation {approximation.shape} and means {mean.shape} and "
            f"{served.shape} do not belong together; means have one value per input"
        )
    for name, values in (("weight", w), ("approximation", approximation), ("mean", mean), ("served mean", served)):
        require_finite(values, f"bias correction: {name}")
    wide = w.astype(np.float64)
    correction = wide @ mean - approximation.astype(np.float64) @ served
    return (correction if bias is None else bias + correction).astype(np.float32)
