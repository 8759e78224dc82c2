"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input column at a time and let the others make up for it.

Minimises tr((W - Q) H (W - Q)^T), H = sum of x x^T over the calibration inputs: the squared error of the layer's
output. Codes are chosen under scales that are already decided (groups keep their places whatever the order), so the
result is stored like round-to-nearest's. Cost: K^3 for the factor of H^-1 and N K^2 for the updates, in float64. Use it
for 4-bit weights, and wherever inputs are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import QuantizedWeight, expand
from quantbench.scales.arrays import F32, F64, I32, I64, Array
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry

DAMPING = (0.01, 0.1, 1.0)  # shares of H's mean diagonal; the next is tried where H is not positive definite
BLOCK = 128  # columns whose updates of later columns are gathered into one matrix product


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of every weight, transposed [K, N] (a column is contiguous), in the order of rounding."""

    entry: Entry
    scale: F32
    zero: I32 | None

    def encode(self, column: int, values: F64) -> Array:
        zero = None if self.zero is None else self.zero[column]
        return FORMATS[self.entry.format].encode(values.astype(np.float32), self.scale[column], zero)

    def decode(self, column: int, codes: Array) -> F32:
        zero = None if self.zero is None else self.zero[column]
        return FORMATS[self.entry.format].decode(codes, self.scale[column], zero)


def gptq(
    w: F32, entry: Entry, statistics: Statistics | None, act_order: bool = True, damping: tuple[float, ...] = DAMPING
) -> QuantizedWeight:
    """w [N, K] float32 -> codes under the entry's scale. `statistics.hessian` f64[K, K] of the layer's input.

    act_order: columns of large inputs first, when most others are left to make up for them. Raises CalibrationError
    without a Hessian, for NaN or Inf, or where no damping makes the Hessian positive definite.
    """
    require_finite(w, entry.name)
    if statistics is None or statistics.hessian is None:
        raise CalibrationError(f"{entry.name}: gptq needs the Hessian of its input: collect it")
    require_finite(statistics.hessian, f"{entry.name}: the Hessian of its input")
    diagonal = np.diagonal(statistics.hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    factor = _inverse_factor(statistics.hessian[np.ix_(order, order)], entry.name, damping)
    codes = np.empty(w.shape, FORMATS[entry.format].storage)
    transposed = np.ascontiguousarray(w.T[order], np.float64)
    codes[:, order] = _round_columns(transposed, factor, _grid(entry, w.shape, order)).T
    return QuantizedWeight(entry.format, entry.granularity, codes, entry.scale, entry.zero, entry.group_size)


def _round_columns(w: F64, factor: F64, grid: _Grid) -> Array:
    """The loop of the paper's algorithm 1 on w [K, N], which is consumed. Returns codes [K, N]."""
    columns: list[Array] = []
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = np.empty((stop - start, w.shape[1]))
        for i in range(start, stop):
            columns.append(grid.encode(i, w[i]))
            errors[i - start] = (w[i] - grid.decode(i, columns[-1])) / factor[i, i]
            w[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return np.stack(columns)


def _inverse_factor(hessian: F64, name: str, damping: tuple[float, ...]) -> F64:
    """Upper U with U^T U = (H + damping)^-1. An input that is always zero gets 1 on the diagonal."""
    diagonal = np.diagonal(hessian).copy()
    diagonal[diagonal == 0] = 1.0
    for share in damping:
        damped = hessian.copy()
        np.fill_diagonal(damped, diagonal + share * diagonal.mean())
        try:
            np.linalg.cholesky(damped)
            return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
        except np.linalg.LinAlgError:
            continue
    raise CalibrationError(
        f"{name}: the Hessian of its input is not positive definite even with {damping[-1]:.0%} damping; "
        "calibrate with more tokens, or use method rtn for this layer"
    )


def _grid(entry: Entry, shape: tuple[int, ...], order: I64) -> _Grid:
    matrix = (shape[0], shape[1])

    def ordered(values: Array) -> Array:
        wide = np.broadcast_to(expand(values, entry.granularity, matrix, entry.group_size), matrix)
        return np.ascontiguousarray(wide.T[order])

    return _Grid(entry, ordered(entry.scale), None if entry.zero is None else ordered(entry.zero))
