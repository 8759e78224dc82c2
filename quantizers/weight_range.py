"""How a weight's scale is decided: a range per tensor, channel, group or block, by absmax or by least error.

The search tries 21 ranges from 1.00 down to 0.50 of the extremes, for every unit on its own, and keeps the one with the
least squared error of round-to-nearest (Choukroun et al. 2019, arXiv 1902.06822, section 4). Never worse than absmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quantbench.errors import RecipeError, unknown
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import dequantize_weight, expand, quantize_weight, scale_shape
from quantbench.scales.arrays import F32, I32
from quantbench.scales.table import Entry
from quantbench.vocabulary import BLOCK_SHAPE, WEIGHT_OBSERVERS, LayerPlan

_SHRINK = np.linspace(1.0, 0.5, 21, dtype=np.float32)


@dataclass(frozen=True)
class WeightRange:
    """[low, high] of every unit, float32, shaped like the scale. Symmetric ranges have low = -high."""

    low: F32
    high: F32

    @property
    def absmax(self) -> F32:
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))


def weight_range(w: F32, plan: LayerPlan) -> WeightRange:
    """The range of w [N, K] by plan.weight_observer ("absmax" or "mse"). Raises CalibrationError for NaN or Inf."""
    require_finite(w, f"{plan.name}.weight")
    if plan.weight_observer not in WEIGHT_OBSERVERS:
        raise RecipeError(f"{plan.name}: " + unknown("weight observer", plan.weight_observer, WEIGHT_OBSERVERS))
    full = _extremes(w, plan)
    return full if plan.weight_observer == "absmax" else _least_error(w, plan, full)


def weight_entry(w: F32, plan: LayerPlan, chosen: WeightRange | None = None, note: str = "") -> Entry:
    """The table's entry for plan.name's weight: scale and zero of the range (searched unless given) and its loss."""
    used = chosen or weight_range(w, plan)
    scale, zero = _scale_of(used, plan)
    units = "tensor" if plan.granularity == "tensor" else f"{used.high.size} {plan.granularity}s"
    how = "absmax of" if plan.weight_observer == "absmax" else "least squared error for"
    entry = Entry(
        name=f"{plan.name}.weight",
        kind="weight",
        format=plan.weights,
        granularity=_granularity(plan),
        scale=scale,
        zero=zero,
        absmax=used.absmax,
        group_size=plan.group_size,
        observer=plan.weight_observer,
        reason=f"{how} {units}{note}",
        loss=None,
    )
    return _with_loss(w, entry)


def reduce_units(ufunc: np.ufunc, values: F32, granularity: str, group_size: int | None) -> F32:
    """`ufunc` (np.maximum, np.add, …) over every unit of values [N, K]; the result is shaped like the scale."""
    shape = (values.shape[0], values.shape[1])
    expected = scale_shape(granularity, shape, group_size)
    if granularity == "block":
        rows = ufunc.reduceat(values, np.arange(0, shape[0], BLOCK_SHAPE[0]), axis=0)
        return np.asarray(ufunc.reduceat(rows, np.arange(0, shape[1], BLOCK_SHAPE[1]), axis=1))
    if granularity == "tensor":
        return np.asarray(ufunc.reduce(values, axis=None)).reshape(1)
    return np.asarray(ufunc.reduce(values.reshape(shape[0], expected[1], -1), axis=2))


def relative_loss(original: F32, approximation: F32) -> float:
    """Sum of squared errors / sum of squares, summed in float64; 0 for a tensor of zeros that stays zero."""
    squares = _sum_of_squares(original)
    return _sum_of_squares(original - approximation) / squares if squares else 0.0


def _sum_of_squares(values: F32) -> float:
    flat = values.ravel()  # einsum casts piece by piece: no float64 copy of a large weight
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64, casting="safe"))


def _granularity(plan: LayerPlan) -> str:
    if plan.granularity is None:
        raise RecipeError(f"{plan.name}: a quantized weight needs a granularity: tensor, channel, group or block")
    return plan.granularity


def _extremes(w: F32, plan: LayerPlan) -> WeightRange:
    granularity = _granularity(plan)
    low = reduce_units(np.minimum, w, granularity, plan.group_size)
    high = reduce_units(np.maximum, w, granularity, plan.group_size)
    if not plan.symmetric:
        return WeightRange(low, high)
    absmax = np.maximum(np.abs(low), np.abs(high))
    return WeightRange(-absmax, absmax)


def _scale_of(used: WeightRange, plan: LayerPlan) -> tuple[F32, I32 | None]:
    record = FORMATS[plan.weights]
    if plan.symmetric:
        return record.scale_of(used.high), None
    return record.affine_of(used.low, used.high)


def _least_error(w: F32, plan: LayerPlan, full: WeightRange) -> WeightRange:
    granularity, group_size = _granularity(plan), plan.group_size
    record, shape = FORMATS[plan.weights], (w.shape[0], w.shape[1])
    best_error = np.full(full.high.shape, np.inf)
    best_shrink = np.ones(full.high.shape, np.float32)
    for shrink in _SHRINK:
        scale, zero = _scale_of(WeightRange(full.low * shrink, full.high * shrink), plan)
        scale = expand(scale, granularity, shape, group_size)
        zero = None if zero is None else expand(zero, granularity, shape, group_size)
        error = np.square(record.decode(record.encode(w, scale, zero), scale, zero) - w, dtype=np.float64)
        total = reduce_units(np.add, error, granularity, group_size)
        better = total < best_error
        best_error, best_shrink = np.where(better, total, best_error), np.where(better, shrink, best_shrink)
    return WeightRange(full.low * best_shrink, full.high * best_shrink)


def _with_loss(w: F32, entry: Entry) -> Entry:

    return replace(entry, loss=relative_loss(w, dequantize_weight(quantize_weight(w, entry))))
