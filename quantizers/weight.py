"""A quantized weight and the two directions between it and float32. `expand` says what a scale covers.

Layouts of `scale` for a weight [N, K]: tensor [1]; channel [N, 1]; group [N, K/group_size] (a group is
`group_size` neighbouring inputs of one output); block [ceil(N/128), ceil(K/128)], the last blocks may be ragged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.arrays import F32, I32, Array
from quantbench.scales.table import Entry
from quantbench.vocabulary import BLOCK_SHAPE


@dataclass(frozen=True)
class QuantizedWeight:
    """codes [N, K], int8 (also for int4) or float8_e4m3fn; scale float32; zero int32 shaped like scale, or None."""

    format: str
    granularity: str
    codes: Array
    scale: F32
    zero: I32 | None = None
    group_size: int | None = None


def scale_shape(granularity: str, shape: tuple[int, int], group_size: int | None) -> tuple[int, ...]:
    """Shape of the scale of a weight [N, K]. Raises CalibrationError where the groups do not divide K."""
    rows, columns = shape
    if granularity == "tensor":
        return (1,)
    if granularity == "channel":
        return (rows, 1)
    if granularity == "group" and group_size:
        if columns % group_size:
            raise CalibrationError(
                f"group size {group_size} does not divide the {columns} inputs of the weight; "
                f"allowed here: {[g for g in (32, 64, 128) if columns % g == 0] or 'granularity channel'}"
            )
        return (rows, columns // group_size)
    if granularity == "block":
        return (-(-rows // BLOCK_SHAPE[0]), -(-columns // BLOCK_SHAPE[1]))
    raise CalibrationError(f"unknown weight granularity {granularity!r} with group size {group_size}; "
                           "allowed: tensor, channel, group with a size, block")  # fmt: skip


def expand(values: Array, granularity: str, shape: tuple[int, int], group_size: int | None) -> Array:
    """`values` (a scale or zero point) broadcastable to the weight. Raises CalibrationError on a wrong shape."""
    expected = scale_shape(granularity, shape, group_size)
    if values.shape != expected:
        raise CalibrationError(f"a {granularity} scale of a weight {shape} has shape {expected}, not {values.shape}")
    if granularity == "group" and group_size:
        return np.repeat(values, group_size, axis=1)
    if granularity == "block":
        tall = np.repeat(values, BLOCK_SHAPE[0], axis=0)[: shape[0]]
        return np.repeat(tall, BLOCK_SHAPE[1], axis=1)[:, : shape[1]]
    return values


def quantize_weight(w: F32, entry: Entry) -> QuantizedWeight:
    """Round-to-nearest of `w` [N, K] under the entry's scale. Raises CalibrationError for NaN, Inf or a wrong shape."""
    require_finite(w, entry.name)
    shape = (w.shape[0], w.shape[1])
    scale = expand(entry.scale, entry.granularity, shape, entry.group_size)
    zero = None if entry.zero is None else expand(entry.zero, entry.granularity, shape, entry.group_size)
    codes = FORMATS[entry.format].encode(w, scale, zero)
    return QuantizedWeight(entry.format, entry.granularity, codes, entry.scale, entry.zero, entry.group_size)


def dequantize_weight(q: QuantizedWeight) -> F32:
    """float32 [N, K]: (codes - zero) * scale."""
    shape = (q.codes.shape[0], q.codes.shape[1])
    scale = expand(q.scale, q.granularity, shape, q.group_size)
    zero = None if q.zero is None else expand(q.zero, q.granularity, shape, q.group_size)
    return FORMATS[q.format].decode(q.codes, scale, zero)
