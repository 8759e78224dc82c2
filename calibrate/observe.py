"""Statistics of one batch by the native kernels: the numbers of scales.statistics.observe bit for bit, only faster.

Where the extension is not built (a bare checkout) the numpy reference gives the same numbers.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from quantbench.calibrate.forward import Float
from quantbench.errors import CalibrationError, DependencyError
from quantbench.infer.ops.cpu import CpuOps, load_kernels
from quantbench.infer.ops.observe import observe as observe_natively
from quantbench.scales import statistics as reference
from quantbench.scales.statistics import Statistics


@cache
def native_ops() -> CpuOps | None:
    """The native op table, or None where it is not built. Raises DependencyError for a wrong QUANTBENCH_ISA."""
    try:
        load_kernels()
    except DependencyError:
        return None
    return CpuOps()


def observe(x: Float, rows: int = 1, hessian: bool = False) -> Statistics:
    """As scales.statistics.observe, for x f32[T, C], C-contiguous. Raises CalibrationError as it does."""
    ops = native_ops()
    if ops is None or not _regular(x, rows):
        return reference.observe(x, rows, hessian)
    try:
        with np.errstate(over="ignore"):  # an infinite limit is handled below
            seen = observe_natively(ops, x, rows)
    except CalibrationError:
        return reference.observe(x, rows, hessian)  # which says where the NaN is
    if not np.isfinite(seen.limit).all():
        return reference.observe(x, rows, hessian)  # which says that it is too large
    absmax = seen.channel_absmax.reshape(rows, -1).max(axis=1)
    return Statistics(
        tokens=len(x),
        minimum=seen.minimum,
        maximum=seen.maximum,
        absmax=absmax,
        batch_absmax=absmax[None, :].copy(),
        histogram=seen.histogram,
        limit=seen.limit,
        channel_absmax=seen.channel_absmax,
        channel_sum=seen.channel_sum,
        hessian=reference.outer_product(x, absmax).astype(np.float64) if hessian else None,
    )


def _regular(x: Float, rows: int) -> bool:
    return x.ndim == 2 and x.size > 0 and x.shape[1] % rows == 0
