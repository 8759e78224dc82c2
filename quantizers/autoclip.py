"""AutoClip (the weight clipping of AWQ's code; Lin et al. 2023, arXiv 2306.00978): give up a weight's extremes where
the outputs are better for it.

Every unit of the scale (an output channel, a group of its inputs, ...) tries ranges from the whole down to 1 -
max_shrink of it and keeps the one with the least error of the outputs, seen through the Hessian of the input. With
`diagonal` the error is the sum of H[k, k] (w - q)^2: inputs taken as uncorrelated. Otherwise it is d H d^T over the
unit's own inputs, exact per channel; for groups, what groups do to each other is left out, as in the paper's code.
Never worse than absmax in that error, unit by unit. The "mse" weight observer is the same search with H = 1, which
lowers the error of the weights and may raise that of the outputs.

Cost: 1 + max_shrink * steps round trips; full Hessian, 2 N K G operations more for each, G inputs of a unit. Use it
for 4-bit weights per group or channel; the authors leave q_proj and k_proj alone, whose outputs meet a softmax. It
composes with rounding to nearest and with AWQ; with GPTQ measure it: GPTQ can use the range that clipping gives up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.errors import RecipeError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.output_loss import hessian_of, round_trip
from quantbench.quantizers.weight_range import WeightRange, reduce_units, weight_range
from quantbench.scales.arrays import F32, F64
from quantbench.scales.statistics import Statistics
from quantbench.vocabulary import BLOCK_SHAPE, LayerPlan


@dataclass(frozen=True)
class ClipGrid:
    """Ranges tried: 1, 1 - 1/steps, ... not below 1 - max_shrink of the whole. diagonal: only H's diagonal is used."""

    max_shrink: float = 0.5
    steps: int = 20
    diagonal: bool = False

    def shrinks(self) -> F32:
        """Descending shares of the whole range, the first 1."""
        if not (0 <= self.max_shrink < 1 and self.steps >= 1):
            raise RecipeError(
                f"clip: max_shrink is {self.max_shrink} and steps {self.steps}; "
                "max_shrink is in [0, 1), steps at least 1 (the paper's code: 0.5 and 20)"
            )
        tried = int(self.max_shrink * self.steps + 1e-9) + 1
        return (1 - np.arange(tried) / self.steps).astype(np.float32)


def clip_range(w: F32, plan: LayerPlan, statistics: Statistics | None, grid: ClipGrid | None = None) -> WeightRange:
    """The range of every unit of w [N, K], for weight_entry(w, plan, range): any format, granularity and group size.

    statistics: of the layer's input, with its Hessian [K, K]; the plan's weight observer gives the whole range. Raises
    CalibrationError without a Hessian or for NaN or Inf, RecipeError for a grid that is none.
    """
    grid = grid or ClipGrid()
    shrinks = grid.shrinks()
    hessian = hessian_of(statistics, plan.name, "clip")
    require_finite(w, f"{plan.name}.weight")
    whole = weight_range(w, plan)
    best_loss = np.full(whole.high.shape, np.inf)
    best = np.ones(whole.high.shape, np.float32)
    for shrink in shrinks:
        tried = WeightRange(whole.low * shrink, whole.high * shrink)
        loss = unit_losses(w - round_trip(w, plan, tried), plan, hessian, grid.diagonal)
        better = loss < best_loss
        best_loss, best = np.where(better, loss, best_loss), np.where(better, shrink, best)
    return WeightRange(whole.low * best, whole.high * best)


def unit_losses(error: F32, plan: LayerPlan, hessian: F64, diagonal: bool = False) -> F64:
    """Output error of every unit of the plan's scale, shaped like the scale, from the weights' error [N, K]."""
    narrow = hessian.astype(np.float32)
    if diagonal:
        felt = error * np.diagonal(narrow)
    else:
        felt = np.empty_like(error)
        width = _width(plan, error.shape[1])
        for start in range(0, error.shape[1], width):
            span = slice(start, start + width)
            felt[:, span] = error[:, span] @ narrow[span, span]
    products = np.multiply(felt, error, dtype=np.float64)
    return np.asarray(reduce_units(np.add, products, str(plan.granularity), plan.group_size), np.float64)


def _width(plan: LayerPlan, inputs: int) -> int:
    """Inputs of one unit."""
    if plan.granularity == "group" and plan.group_size:
        return plan.group_size
    return BLOCK_SHAPE[1] if plan.granularity == "block" else inputs
