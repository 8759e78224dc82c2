"""What a change of a weight does to the layer's output: the loss that AWQ, AutoClip and GPTQ lower.

Sum over the calibration inputs of |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T), H = sum of x x^T [K, K]: the Hessian stands
for the inputs, so none has to be kept. Rows of W are independent. Cost: 2 N K^2 operations, in the dtype of the error.
"""

from __future__ import annotations

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import expand
from quantbench.quantizers.weight_range import WeightRange, weight_range
from quantbench.scales.arrays import F32, F64
from quantbench.scales.statistics import Statistics
from quantbench.vocabulary import LayerPlan


def row_losses(error: F32 | F64, hessian: F32 | F64) -> F64:
    """d H d^T of every row d of error [N, K], float64 [N]; the product is in the wider of the two dtypes."""
    return np.asarray(np.einsum("nk,nk->n", error @ hessian, error, dtype=np.float64, casting="safe"))


def output_loss(weight: F32, approximation: F32, hessian: F64) -> float:
    """tr((W - Q) H (W - Q)^T) in float64, W and Q float32 [N, K]."""
    return float(row_losses(weight.astype(np.float64) - approximation, hessian).sum())


def round_trip(w: F32, plan: LayerPlan, chosen: WeightRange | None = None) -> F32:
    """w [N, K] rounded to nearest as `plan` says (under the range `chosen`, if given) and decoded again, float32."""
    used = chosen or weight_range(w, plan)  # which refuses a plan without a granularity, and NaN
    record, granularity, shape = FORMATS[plan.weights], str(plan.granularity), (w.shape[0], w.shape[1])
    scale, zero = (record.scale_of(used.high), None) if plan.symmetric else record.affine_of(used.low, used.high)
    scale = expand(scale, granularity, shape, plan.group_size)
    zero = None if zero is None else expand(zero, granularity, shape, plan.group_size)
    return record.decode(record.encode(w, scale, zero), scale, zero)


def hessian_of(statistics: Statistics | None, name: str, method: str) -> F64:
    """The Hessian [K, K] of a layer's input. Raises CalibrationError where it was not collected, or for NaN or Inf."""
    if statistics is None or statistics.hessian is None:
        raise CalibrationError(f"{name}: {method} needs the Hessian of its input: collect it")
    require_finite(statistics.hessian, f"{name}: the Hessian of its input")
    return statistics.hessian
