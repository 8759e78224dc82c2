"""Observers: how much of what was seen is kept as the range. Name -> function(Statistics, levels) -> absmax f32[R].

`levels` is the largest code of the format the range is for: 127 for int8, 448 for e4m3 (which selects its own error
model). All are deterministic and work on merged statistics; all but `absmax` need what `statistics.scaled` drops.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from quantbench.errors import CalibrationError, RecipeError
from quantbench.registry import Registry
from quantbench.scales.arrays import F32, F64, I64
from quantbench.scales.error import E4M3_LEVELS, energy, squared_error
from quantbench.scales.statistics import BINS, Statistics

PERCENTILE = 0.9999
EMA_BETA = 0.98  # PaddleSlim's EMASampler
_MSE_GRID = 2.0 ** (-np.arange(0, 97) / 8)  # 1 down to 2^-12: an outlier may be 3000 times the rest

Observer = Callable[[Statistics, float], F32]
RANGES: Registry[Observer] = Registry("observer", RecipeError)


def range_of(statistics: Statistics, observer: str, levels: float) -> F32:
    """The range f32[R] by a named observer; live observers ("paddleslim:…") have left theirs in the statistics.

    "percentile=99.9" is `percentile` at 99.9 % of the values. Raises RecipeError for an unknown observer.
    """
    if observer in statistics.live:
        return statistics.live[observer]
    name, _, percent = observer.partition("=")
    if name == "percentile" and re.fullmatch(r"\d+(\.\d+)?", percent):
        return percentile(statistics, levels, float(percent) / 100)
    return RANGES[observer](statistics, levels)


def histogram_loss(s: Statistics, ranges: F32, levels: float) -> float | None:
    """Expected sum of squared errors / sum of squares of a tap under ranges f32[R]; None without a histogram."""
    if s.histogram is None:
        return None
    error = squares = 0.0
    for row in np.flatnonzero(s.absmax):
        top, kept = float(s.limit[row]), np.array([max(float(ranges[row]), 1e-30)])
        error += float(squared_error(s.histogram[row], top, kept, levels)[0])
        squares += energy(s.histogram[row], top)
    return error / squares if squares else 0.0


@RANGES.register("absmax")
def absmax(s: Statistics, levels: float) -> F32:
    """The largest |x| seen: nothing is clipped, one outlier decides the step."""
    return s.absmax.copy()


@RANGES.register("avg")
def avg(s: Statistics, levels: float) -> F32:
    """Mean over batches of each batch's absmax, in float64 (PaddleSlim's AVGObserver for batches of one sequence)."""
    return np.asarray(_sequence(s).mean(axis=0, dtype=np.float64), np.float32)


@RANGES.register("ema")
def ema(s: Statistics, levels: float) -> F32:
    """Exponential moving average of the batches' absmax with beta 0.98, divided by 1 - beta^batches.

    The division removes the start at zero (Kingma & Ba 2015, arXiv 1412.6980, section 3). PaddleSlim's EMASampler has
    the same beta, but its division lags one step behind and leaves the first value at 2 % of what was seen.
    """
    weights = EMA_BETA ** np.arange(s.batches)[::-1].astype(np.float64)
    return np.asarray(weights @ _sequence(s).astype(np.float64) / weights.sum(), np.float32)


def percentile(s: Statistics, levels: float, fraction: float = PERCENTILE) -> F32:
    """Upper edge of the histogram bin in which `fraction` of the values |x| is reached, at most absmax."""
    cumulative = np.cumsum(_histogram(s), axis=1)
    reached = cumulative >= fraction * cumulative[:, -1:]
    return _upper_edge(s, reached.argmax(axis=1))


RANGES.add("percentile", percentile)


@RANGES.register("mse")
def mse(s: Statistics, levels: float) -> F32:
    """The range of least expected squared error: 97 ranges an eighth of an octave apart, then 17 around the best.

    Error model: scales/error.py. Ties go to the larger range, so the result is never worse than absmax.
    """
    histogram = _histogram(s)
    return np.array([_least_error(histogram[r], s, r, levels) for r in range(s.rows)], np.float32)


@RANGES.register("kl")
def kl(s: Statistics, levels: float) -> F32:
    """The range whose quantized histogram diverges least from the seen one (Migacz 2017, TensorRT 8-bit inference).

    P is the histogram clipped at the range, the clipped tail in its last bin; Q spreads the count of each code evenly
    over the non-empty bins that round to it. Candidates: every 16th bin edge from bin 128 on.
    """
    histogram = _histogram(s)
    return np.array([_least_divergence(histogram[r], s, r, levels) for r in range(s.rows)], np.float32)


def _least_error(histogram: I64, s: Statistics, row: int, levels: float) -> float:
    top = float(s.absmax[row])
    if top == 0:
        return 0.0
    limit = float(s.limit[row])
    coarse = top * _MSE_GRID
    best = coarse[np.argmin(squared_error(histogram, limit, coarse, levels))]
    fine = np.minimum(best * 2.0 ** (np.arange(8, -9, -1) / 64), top)
    candidates = np.concatenate([[top, best], fine])
    return float(candidates[np.argmin(squared_error(histogram, limit, candidates, levels))])


def _least_divergence(histogram: I64, s: Statistics, row: int, levels: float) -> float:
    top = float(s.absmax[row])
    if top == 0:
        return 0.0
    width = float(s.limit[row]) / BINS
    used = int(np.flatnonzero(histogram)[-1]) + 1
    candidates = [*range(BINS // 16, used, 16), used]
    divergence = [_divergence(histogram, i, levels) for i in candidates]
    return float(min(top, candidates[int(np.argmin(divergence))] * width))


def _divergence(histogram: I64, kept: int, levels: float) -> float:
    p = histogram[:kept].astype(np.float64)
    seen = p > 0
    codes = np.unique(_codes((np.arange(kept) + 0.5) / kept, levels), return_inverse=True)[1]
    count = np.bincount(codes, weights=p)
    filled = np.bincount(codes, weights=seen)
    q = np.where(seen, count[codes] / np.maximum(filled[codes], 1), 0.0)
    p[-1] += histogram[kept:].sum()
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12) if q.sum() else np.full(kept, 1e-12)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / q[used])))


def _codes(fraction: F64, levels: float) -> F64:
    """The code (as a number) of values given as a fraction of the range."""
    scaled = fraction * levels
    if levels != E4M3_LEVELS:
        return np.rint(scaled)
    step = 2.0 ** (np.maximum(np.frexp(scaled)[1] - 1, -6) - 3.0)
    return np.asarray(np.rint(scaled / step) * step)


def _upper_edge(s: Statistics, index: I64) -> F32:
    edge = (index + 1) * (s.limit.astype(np.float64) / BINS)
    return np.minimum(edge.astype(np.float32), s.absmax)


def _histogram(s: Statistics) -> I64:
    if s.histogram is None:
        raise CalibrationError(
            "this observer needs a histogram, and these statistics are derived: observe the tap again"
        )
    return s.histogram


def _sequence(s: Statistics) -> F32:
    if not s.batches:
        raise CalibrationError(
            "this observer needs each batch's absmax, and these statistics are derived: observe again"
        )
    return s.batch_absmax
