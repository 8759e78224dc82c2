"""Linears to run, their inputs, and the comparison with the reference: shared by the tests of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import gemm, layout
from quantbench.infer.cuda.device import Device
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.pack import parts_of
from quantbench.infer.ops.reference import ReferenceOps
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight, scale_shape

E4M3_DTYPE = ml_dtypes.float8_e4m3fn
REFERENCE = ReferenceOps()
CASES = {  # format, granularity, group size, activations, zero points
    "int8-int8": ("int8", "channel", None, "int8", False),
    "fp8-fp8": ("fp8_e4m3", "channel", None, "fp8_e4m3", False),
    "fp8-fp8-block": ("fp8_e4m3", "block", None, "fp8_e4m3", False),
    "int8-fp8": ("int8", "channel", None, "fp8_e4m3", False),
    "w8": ("int8", "channel", None, None, False),
    "w8-zero": ("int8", "channel", None, None, True),
    "w-fp8-block": ("fp8_e4m3", "block", None, None, False),
    "w4": ("int4", "channel", None, None, False),
    "w4-zero": ("int4", "channel", None, None, True),
    "w4-32": ("int4", "group", 32, None, False),
    "w4-64-zero": ("int4", "group", 64, None, True),
    "w4-128": ("int4", "group", 128, None, False),
    "w4-16": ("int4", "group", 16, None, False),
}
SIZES = [(1, 16, 128), (3, 40, 256), (8, 129, 640), (13, 200, 1536), (33, 70, 384), (4, 64, 576), (130, 260, 640)]


def weight_of(case: str, n: int, k: int, seed: int = 0, bias: bool = True) -> LinearWeight:
    format, granularity, group, activations, zero = CASES[case]
    rng = np.random.default_rng(seed + n + k)
    shape = scale_shape(granularity, (n, k), group)
    scale = rng.uniform(0.001, 0.1, shape).astype(np.float32)
    limit = {"int8": 127, "int4": 7}.get(format, 0)
    codes: Any = (
        rng.standard_normal((n, k)).astype(E4M3_DTYPE)
        if format == "fp8_e4m3"
        else rng.integers(-limit, limit + 1, (n, k)).astype(np.int8)
    )
    zeros = rng.integers(-8, 8, shape).astype(np.int32) if zero else None
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    return LinearWeight("w", QuantizedWeight(format, granularity, codes, scale, zeros, group), offset, activations)


def inputs_of(device: Device, weight: LinearWeight, tokens: int, k: int, static: bool = False) -> Activation:
    """Normal numbers, a row of zeros, one outlier; as the device holds them, quantized where the weight says so."""
    x = np.random.default_rng(tokens).standard_normal((tokens, k)).astype(np.float32)
    x[tokens // 2] = 0
    x[tokens - 1, k // 3] = 100
    x = x.astype(device.dtype).astype(np.float32)
    return REFERENCE.quantize(x, ActSpec(weight.activations, 0.05 if static else None))


def run(
    device: Device, a: Activation, weight: LinearWeight, kernel: str | None = None, dtype: Any = np.float32
) -> np.ndarray:
    """The device's result, written into the middle columns of a poisoned array; the rest must stay poison."""
    (part,) = parts_of([weight])
    packed = layout.pack(device, part)
    out = device.empty((a.tokens, part.rows + 5), dtype)
    device.fill(out, 0xFF)
    lent = Activation(
        None if a.values is None else device.upload(a.values.astype(device.dtype)),  # type: ignore[arg-type]
        None if a.codes is None else device.upload(a.codes),  # type: ignore[arg-type]
        None if a.scale is None else device.upload(a.scale),  # type: ignore[arg-type]
        a.format,
    )
    if kernel is None:
        gemm.linear(device, lent, packed, out, 3)
    else:
        x: Any = lent.values if lent.codes is None else lent.codes
        one = gemm.Linear(
            gemm.kind_of(x.dtype),
            gemm._base(packed.kind),
            a.tokens,
            part.columns,
            gemm._group(packed),
            packed.zero is not None,
        )
        gemm.KERNELS[kernel](device, one, x, lent.scale if lent.codes is not None else None, packed, out, 3)
    got = device.fetch(out).astype(np.float32)
    assert np.all(np.isnan(got[:, :3])), "written before the first column"
    assert np.all(np.isnan(got[:, part.rows + 3 :])), "written beyond the last column"
    return got[:, 3 : part.rows + 3]


def assert_close(got: np.ndarray, a: Activation, weight: LinearWeight, close: float) -> None:
    """Within `close` of the size that the terms of each sum have together."""
    want = REFERENCE.linear(a, REFERENCE.pack([weight]))
    dense = weight.weight if isinstance(weight.weight, np.ndarray) else dequantize_weight(weight.weight)
    x = a.values if a.codes is None else a.codes.astype(np.float32) * a.scale[:, None]  # type: ignore[index]
    size = np.sqrt(np.square(x) @ np.square(dense.astype(np.float32)).T) + np.abs(want)  # type: ignore[arg-type]
    wrong = ~(np.abs(got - want) <= close * size + 1e-30)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong; tokens {np.unique(np.nonzero(wrong)[0])[:20]}, "
        f"rows {np.unique(np.nonzero(wrong)[1])[:20]}; first got {got[wrong][:4]} want {want[wrong][:4]}"
    )
