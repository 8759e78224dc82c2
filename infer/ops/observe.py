"""What calibration records of an activation, by the native kernels: the same numbers as scales.statistics.observe.

Without a limit the array is read twice: once for the range, once for everything else. With the limit of an earlier
batch that still covers this one, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantbench.errors import CalibrationError
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.ops.types import Floats
from quantbench.scales.statistics import BINS, limit_of


@dataclass(frozen=True)
class Observed:
    """R rows of C / R channels each. `histogram` counts |x| in bins of limit / 2048; `limit` covers every |x|."""

    channel_absmax: Floats  # [C]
    channel_sum: npt.NDArray[np.float64]  # [C], summed in token order
    minimum: Floats  # [R]
    maximum: Floats  # [R]
    histogram: npt.NDArray[np.int64]  # [R, 2048]
    limit: Floats  # [R], powers of two, 0 where every value is 0


def observe(ops: CpuOps, x: Floats, rows: int = 1, limit: Floats | None = None) -> Observed:
    """Statistics of x f32[T, C]. A given `limit` f32[rows] must cover |x|.

    Raises CalibrationError for NaN or infinity, for channels that `rows` does not divide, and for a limit too small.
    """
    tokens, channels = x.shape
    if tokens == 0 or rows < 1 or channels % rows:
        raise CalibrationError(
            f"cannot observe {tokens} tokens of {channels} channels in {rows} rows; rows must divide"
        )
    if limit is None:
        absmax = np.empty(rows, np.float32)
        ops.kernels.absmax(x, rows, absmax)
        limit = limit_of(_finite(absmax))
    seen = Observed(
        np.zeros(channels, np.float32),
        np.zeros(channels, np.float64),
        np.full(rows, np.inf, np.float32),
        np.full(rows, -np.inf, np.float32),
        np.zeros((rows, BINS), np.int64),
        limit,
    )
    bad = ops.kernels.observe(
        x, rows, limit, seen.channel_absmax, seen.channel_sum, seen.minimum, seen.maximum, seen.histogram
    )
    if bad >= 0:
        raise CalibrationError(f"activation: token {bad} has a NaN or an infinity; check the model's weights and dtype")
    absmax = seen.channel_absmax.reshape(rows, -1).max(axis=1)
    small = np.flatnonzero(absmax > limit)
    if small.size:
        row = int(small[0])
        raise CalibrationError(
            f"row {row}: |x| reaches {absmax[row]:g}, above the limit {limit[row]:g} of its histogram"
        )
    return seen


def _finite(absmax: Floats) -> Floats:
    if not np.all(np.isfinite(absmax)):
        raise CalibrationError("activation: it holds a NaN or an infinity; check the model's weights and dtype")
    return absmax
