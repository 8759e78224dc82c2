"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input column at a time and let the others make up for it.

Minimises tr((W - Q) H (W - Q)^T), H = sum of x x^T over the calibration inputs: the squared error of the layer's
output. Codes are chosen under scales that are already decided (groups keep their places whatever the order), so the
result is stored like round-to-nearest's. Use it for 4-bit weights, and wherever inputs are correlated.

The paper's algorithm 1 moves the error of a column onto the later ones through the inverse of H. The same codes follow
without an inverse (Chee et al. 2023, arXiv 2307.13304, theorem 6): with H = U D U^T, U unit upper triangular, column k
is rounded at w_k + sum over j < k of (w_j - q_j) U[j, k], w being the *original* weights. So one Cholesky factor does:
K^3/3 operations for it and N K^2 for the sums, one matrix product per block of 128 columns, in float64. A layer of 1536
inputs and 576 outputs takes 0.1 s.

A column is never looked at again, although those behind it were rounded otherwise than hoped. `sweeps` do that (cyclic
coordinate descent, Behdin et al. 2023, arXiv 2309.01885, section 3): with all others as they are, the best code of
column k is the one nearest to w_k + sum over j != k of (w_j - q_j) H[j, k] / H[k, k]. No step can raise the loss; a
sweep takes 2 N K^2 operations. Four of them take 2 to 4 % off the error on other text at 4 bits (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.output_loss import hessian_of
from quantbench.quantizers.weight import QuantizedWeight, expand
from quantbench.scales.arrays import F32, F64, I32, I64, Array
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry

DAMPING = (0.01, 0.1, 1.0)  # shares of H's mean diagonal; the next is tried where H is not positive definite
BLOCK = 128  # columns whose earlier errors are gathered by one matrix product
PANEL = 16  # columns of a block that are gathered together: the single columns' products stay in the first cache


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of every weight, transposed [K, N] (a column is contiguous), in the order of rounding."""

    entry: Entry
    scale: F32
    zero: I32 | None

    def round(self, column: int, values: F64) -> tuple[Array, F32]:
        """Codes of one column and what they decode to."""
        record = FORMATS[self.entry.format]
        zero = None if self.zero is None else self.zero[column]
        codes = record.encode(values.astype(np.float32), self.scale[column], zero)
        return codes, record.decode(codes, self.scale[column], zero)


def gptq(
    w: F32,
    entry: Entry,
    statistics: Statistics | None,
    act_order: bool = True,
    damping: tuple[float, ...] = DAMPING,
    sweeps: int = 0,
) -> QuantizedWeight:
    """w [N, K] float32 -> codes under the entry's scale. `statistics.hessian` f64[K, K] of the layer's input.

    act_order: columns of large inputs first, when most others are left to make up for them. sweeps: how often every
    column is decided again, in the same order. Raises CalibrationError without a Hessian, for NaN or Inf, or where no
    damping makes the Hessian positive definite.
    """
    require_finite(w, entry.name)
    hessian = hessian_of(statistics, entry.name, "gptq")
    diagonal = np.diagonal(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    damped = hessian[np.ix_(order, order)]
    feedback = _feedback(damped, entry.name, damping)
    codes = np.empty(w.shape, FORMATS[entry.format].storage)
    transposed, grid = np.ascontiguousarray(w.T[order], np.float64), _grid(entry, w.shape, order)
    rounded, errors = _round_columns(transposed, feedback, grid)
    if sweeps:
        coupling = damped / np.diagonal(damped)[:, None]
        np.fill_diagonal(coupling, 0.0)
        for _ in range(sweeps):
            _sweep(transposed, coupling, grid, rounded, errors)
    codes[:, order] = rounded.T
    return QuantizedWeight(entry.format, entry.granularity, codes, entry.scale, entry.zero, entry.group_size)


def _round_columns(w: F64, feedback: F64, grid: _Grid) -> tuple[Array, F64]:
    """Codes of w [K, N], and the errors w - q. feedback[k, j] is the share of column j's error that column k, a later
    one, makes up for."""
    codes = np.empty(w.shape, FORMATS[grid.entry.format].storage)
    errors = np.empty_like(w)  # w - q of the columns that are done
    for block in range(0, len(w), BLOCK):
        end = min(block + BLOCK, len(w))
        wanted = w[block:end] + feedback[block:end, :block] @ errors[:block]
        for panel in range(block, end, PANEL):
            stop = min(panel + PANEL, end)
            wanted[panel - block : stop - block] += feedback[panel:stop, block:panel] @ errors[block:panel]
            for k in range(panel, stop):
                target = wanted[k - block] + feedback[k, panel:k] @ errors[panel:k]
                codes[k], decoded = grid.round(k, target)
                np.subtract(w[k], decoded, out=errors[k])
    return codes, errors


def _sweep(w: F64, coupling: F64, grid: _Grid, codes: Array, errors: F64) -> None:
    """Decide every column again, the others as they are by then; `codes` and `errors` [K, N] are changed in place."""
    for block in range(0, len(w), BLOCK):
        end = min(block + BLOCK, len(w))
        wanted = w[block:end] + coupling[block:end] @ errors
        changed = np.empty((end - block, w.shape[1]))  # what this sweep has added to the block's errors
        for k in range(block, end):
            target = wanted[k - block] + coupling[k, block:k] @ changed[: k - block]
            codes[k], decoded = grid.round(k, target)
            np.subtract(w[k] - decoded, errors[k], out=changed[k - block])
            errors[k] += changed[k - block]


def _feedback(hessian: F64, name: str, damping: tuple[float, ...]) -> F64:
    """U^T of the damped H = U D U^T, unit lower triangular. An input that is always zero gets 1 on the diagonal.

    The damping is added to `hessian` itself: of a wide layer it is larger than everything else, and needed no more.
    """
    diagonal = np.diagonal(hessian).copy()
    diagonal[diagonal == 0] = 1.0
    for share in damping:
        np.fill_diagonal(hessian, diagonal + share * diagonal.mean())
        try:
            lower = np.linalg.cholesky(hessian[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        lower /= np.diagonal(lower)
        # Reversed in both directions, the lower factor of the reversed matrix is the upper factor of the matrix.
        return np.ascontiguousarray(lower[::-1, ::-1].T)
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
