"""Float weights to what a mode holds, at load: a cast, or round-to-nearest with plain absmax ranges.

This is the quick look at a mode. Calibrated scales, other observers and better methods live in checkpoints.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import ActSpec, Ops
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import QuantizedWeight, expand
from quantbench.vocabulary import DEFAULT_GRANULARITY, FLOAT_DTYPES, GROUP_SIZES, Mode

F32 = npt.NDArray[np.float32]
FLOATS: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def float_dtype(mode: Mode) -> np.dtype[np.generic]:
    """What tensors that a mode leaves in float are held in: bf16 where the mode quantizes the linears."""
    return np.dtype(FLOATS[mode.weights if mode.weights in FLOAT_DTYPES else "bfloat16"])


def convert(linear: LinearWeight, mode: Mode, ops: Ops | None = None) -> LinearWeight:
    """A float linear of a block as `mode` holds it; activations are quantized dynamically, per token. `ops`: an
    op table to round with, for the same codes sooner.

    Raises CalibrationError where a weight is NaN or infinite and the mode quantizes it.
    """
    assert isinstance(linear.weight, np.ndarray)
    if mode.weights in FLOAT_DTYPES:
        return cast(linear, float_dtype(mode))
    weight = round_to_nearest(linear.weight.astype(np.float32, copy=False), mode.weights, ops)
    return LinearWeight(linear.name, weight, linear.bias, mode.activations)


def cast(linear: LinearWeight, dtype: np.dtype[np.generic]) -> LinearWeight:
    """Weight in `dtype`; the bias rounded to it but kept in float32, where it is added."""
    assert isinstance(linear.weight, np.ndarray)
    bias = None if linear.bias is None else linear.bias.astype(dtype).astype(np.float32)
    return LinearWeight(linear.name, linear.weight.astype(dtype, copy=False), bias)


def round_to_nearest(w: F32, format: str, ops: Ops | None = None) -> QuantizedWeight:
    """`w` [N, K] in `format` at its default granularity, symmetric, each range its absmax."""
    granularity = DEFAULT_GRANULARITY[format]
    if ops is not None and (format, granularity) == ("int8", "channel") and (found := _by_rows(w, ops)) is not None:
        return found
    group = next((g for g in sorted(GROUP_SIZES, reverse=True) if w.shape[1] % g == 0), None)
    if granularity == "group" and group is None:
        granularity = "channel"
    if granularity != "group":
        group = None
    scale = FORMATS[format].scale_of(_absmax(w, granularity, group))
    shape = (w.shape[0], w.shape[1])
    codes = FORMATS[format].encode(w, expand(scale, granularity, shape, group))
    return QuantizedWeight(format, granularity, codes, scale, None, group)


def _by_rows(w: F32, ops: Ops) -> QuantizedWeight | None:
    """int8 per channel is what `ops` does to activations per token: rows are rows. None where one is not finite, which
    is said in the words for a weight by the way that numpy takes."""
    try:
        rows = ops.quantize(np.ascontiguousarray(w), ActSpec("int8"))
    except CalibrationError:
        return None
    assert rows.codes is not None
    assert rows.scale is not None
    return QuantizedWeight("int8", "channel", rows.codes, rows.scale[:, None])


def _absmax(w: F32, granularity: str, group: int | None) -> F32:
    rows = w.reshape(1 if granularity == "tensor" else w.shape[0], -1)
    absmax: F32 = np.abs(rows.reshape(rows.shape[0], -1, group or rows.shape[1])).max(axis=2)
    return absmax.reshape(-1) if granularity == "tensor" else absmax
