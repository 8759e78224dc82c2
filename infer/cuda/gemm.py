"""Linear layers on the device: which kernel multiplies a weight (layout.py: how it lies there), and the launch.

    stream   few tokens: weights straight from memory into tensor-core registers; every kind
    tile     many tokens, inputs and weights of one kind (int8, e4m3, bf16)
    wgmma    the same on Hopper, few and many tokens (hopper.py)
    digits   quantized weights and a few tokens of 16-bit inputs on Hopper (digits.py)
    mixed    the same, up to some hundred tokens (mixed.py)
    blas     cuBLASLt, where it is installed: 16-bit floats, many tokens
    widen    quantized weights and many float inputs: the weight as 16-bit floats first, then blas, wgmma or tile
    plain    everything else: any kinds, any shape, slow

`choose` decides from kinds and shapes alone; tests force each kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.infer.cuda import blas, digits, hopper, mixed, rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, CODES, DTYPES, E4M3, F16, F32, INT4, INT8, kind_of
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops.pack import INT8_DOT
from quantbench.infer.ops.types import Activation, ActSpec

HELD_BYTES = 72 << 10  # of inputs that a streaming block keeps in shared memory
STREAM_TOKENS = 32  # above it the weights are no longer what takes the time
TILE_ROWS, TILE_STAGES, SLICE = 128, 3, 128  # as in kernels/tile.cu
WIDE_TOKENS = 64  # above it a quantized weight with float inputs is widened to bf16 first


@dataclass(frozen=True)
class Linear:
    """One linear to run: kinds of inputs and weights (INT8 for INT8_DOT), and its sizes."""

    x: int
    w: int
    tokens: int
    columns: int
    group: int  # inputs per weight scale; 0: one scale per row, or none
    zero: bool


def linear(device: Device, a: Activation, w: DeviceWeight, out: DeviceArray, column: int = 0) -> None:
    """Columns column.. of out[T, ...] = a @ w.T + bias. int8 codes times int8 weights accumulate exactly."""
    codes = a.codes is not None and (a.values is None or w.activations is not None)
    x: Any = a.codes if codes else a.values
    one = _linear(kind_of(x.dtype), len(x), w)
    name = "blas" if _in_library(device, x, w, out) else kernel_for(device, one, w, out, column)
    KERNELS[name](device, one, x, a.scale if codes else None, w, out, column)


def linear_swiglu(device: Device, a: Activation, w: DeviceWeight, spec: ActSpec) -> Activation:
    """silu(gate) * up of the rows of w (gate, then up), quantized as `spec` says. For what `fuses_swiglu` allows."""
    codes = a.codes is not None
    x: Any = a.codes if codes else a.values
    one, scale = _linear(kind_of(x.dtype), len(x), w), a.scale if codes else None
    static = spec.format is not None and spec.scale is not None
    dtype = DTYPES[CODES[spec.format]] if static and spec.format else device.dtype
    out = device.empty((one.tokens, w.rows // 2), dtype)
    out_scale = float(spec.scale) if spec.scale is not None else 1.0
    written = device.empty((1,), DTYPES[F32]) if static else None
    name = kernel_for(device, one, w, out, 0)
    if name in ("digits", "mixed"):
        product = digits.linear if name == "digits" else mixed.linear
        product(device, x, w, out, gated=True, out_scale=out_scale, written=written)
    elif name == "wgmma":
        hopper.linear(device, x, scale, w, out, gated=True, out_scale=out_scale, written=written)
    else:
        _stream(device, one, x, scale, w, out, 0, gated=True, out_scale=out_scale, written=written)
    if not static:
        return rows.quantize(device, out, spec)
    return Activation(None, out, written, spec.format)  # type: ignore[arg-type]


def fuses_swiglu(device: Device, w: DeviceWeight, tokens: int, spec: ActSpec) -> bool:
    """Whether `linear_swiglu` takes this weight: 16-bit floats between operations; few tokens, or a Hopper GPU."""
    x = kind_of(device.dtype) if w.activations is None else CODES[w.activations]
    if device.dtype == np.float32 or spec.keep_float or w.rows % 16:
        return False
    if mixed.tiled(w):
        return mixed.gates(w, tokens)
    one = _linear(x, tokens, w)
    if _only_plain(one, w.kind == INT8_DOT):
        return False
    return tokens <= STREAM_TOKENS or (device.hopper and one.w == x)


def kernel_for(device: Device, one: Linear, w: DeviceWeight, out: DeviceArray, column: int) -> str:
    """`choose`, and on Hopper its own kernels where they take the shape."""
    if device.exact and not (one.x == INT8 and w.kind == INT8_DOT):
        return "plain"
    if mixed.tiled(w):
        return "digits" if digits.takes(w, one.tokens) else "mixed" if one.tokens <= mixed.MOST_TOKENS else "widen"
    same = device.dtype == np.float32
    name = choose(one, w.kind == INT8_DOT, same)
    alike = one.x == one.w and not (same and one.x != INT8)
    if name in ("stream", "tile") and alike and hopper.takes(device, w, out, column):
        return "wgmma"
    return name


def choose(one: Linear, exact: bool, same: bool) -> str:
    """Name of the kernel for `one`. `exact`: int8 weights made for int8 inputs. `same`: a row's result may not depend
    on how many rows there are, so floats are always summed in the order of one kernel."""
    if _only_plain(one, exact):
        return "plain"
    if one.tokens <= STREAM_TOKENS or (same and one.x != INT8):
        return "stream"
    if one.w == one.x or one.w == BF16:
        return "tile"
    return "widen" if one.tokens > WIDE_TOKENS and one.x == BF16 else "stream"


def _only_plain(one: Linear, exact: bool) -> bool:
    """Whether no tensor-core kernel takes these kinds and shapes."""
    if one.columns % 16:
        return True
    if one.x in (INT8, E4M3):
        return one.x != one.w or one.group > 0 or one.zero or (one.x == INT8 and not exact)
    if one.w in (F32, F16, BF16):
        return one.w != (F16 if one.x == F16 else BF16)
    if one.w != INT4:
        return one.zero or one.group % 64 > 0
    return one.group not in (0, 32, 64) and one.group % 128 > 0


def _stream(
    device: Device,
    one: Linear,
    x: DeviceArray,
    scale: Any,
    w: DeviceWeight,
    out: DeviceArray,
    column: int,
    *,
    gated: bool = False,
    out_scale: float = 1.0,
    written: DeviceArray | None = None,
) -> None:
    tiles = next(n for n in (1, 2, 4, 8) if n * 8 >= one.tokens or n == 8)
    inputs = min(8 * tiles, one.tokens) * (one.columns * x.dtype.itemsize + 64)
    held = inputs <= HELD_BYTES
    shared = 5152 * tiles + (inputs if held else 0)  # 5120 for partial sums and 32 for scales per 8 tokens
    kernel = device.kernel(
        "stream.cu", "linear_stream", HELD=int(held), X=one.x, W=one.w, OUT=kind_of(out.dtype), TILES=tiles,
        GROUP=one.group, ASYM=int(one.zero), GATED=int(gated),
    )  # fmt: skip
    grid = min(-(-w.rows // 16), 2 * device.multiprocessors), -(-one.tokens // (8 * tiles))
    device.launch(
        kernel, grid, 256, x, scale, _step(scale), w.codes, w.scale, w.zero, w.bias, out, np.int64(out.shape[1]),
        column, one.tokens, w.rows, w.columns, np.int64(w.codes.nbytes // w.rows), out_scale, written, shared=shared,
    )  # fmt: skip


def _tile(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    wrap = one.x == F32
    if wrap:
        x = rows.split_bf16(device, x)
    kind = BF16 if wrap else one.x
    tokens = 64 if kind == E4M3 or one.tokens <= 64 else 128
    kernel = device.kernel(
        "tile.cu", "linear_tile", ELEMENT=kind, OUT=kind_of(out.dtype), TOKENS=tokens, WRAP=int(wrap)
    )
    shared = max(TILE_STAGES * (TILE_ROWS + tokens) * SLICE, tokens * (TILE_ROWS + 4) * 4)
    device.launch(
        kernel, (-(-one.tokens // tokens), -(-w.rows // TILE_ROWS)), 256, x, scale, _step(scale), w.codes, w.scale,
        w.bias, out, np.int64(out.shape[1]), column, one.tokens, w.rows, w.columns, shared=shared,
    )  # fmt: skip


def _plain(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    exact = w.kind == INT8_DOT and one.x == INT8
    kernel = device.kernel(
        "plain.cu",
        "linear_plain",
        X=one.x,
        W=one.w,
        OUT=kind_of(out.dtype),
        ASYM=int(one.zero),
        EXACT=int(exact),
        DOUBLE=int(device.exact),
    )
    device.launch(
        kernel, (-(-w.rows // 64), -(-one.tokens // 64)), 256, x, scale, _step(scale), w.codes, w.scale, w.zero, w.bias,
        out, np.int64(out.shape[1]), column, one.tokens, w.rows, w.columns, np.int64(w.codes.nbytes // w.rows),
        w.group_size or w.columns,
    )  # fmt: skip


def _widen(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    wide = mixed.widened(device, w) if mixed.tiled(w) else widened(device, w)
    one = _linear(one.x, one.tokens, wide)
    name = "blas" if _in_library(device, x, wide, out) else kernel_for(device, one, wide, out, column)
    KERNELS[name](device, one, x, None, wide, out, column)


def widened(device: Device, w: DeviceWeight) -> DeviceWeight:
    """A quantized weight as bf16 [N, K], in room of the step."""
    codes = device.empty((w.rows, w.columns), np.dtype(ml_dtypes.bfloat16))
    kernel = device.kernel(
        "plain.cu", "widen_weight", X=BF16, W=_base(w.kind), OUT=BF16, ASYM=int(w.zero is not None), EXACT=0
    )
    device.launch(
        kernel, (-(-w.columns // 2048), w.rows), 256, w.codes, w.scale, w.zero, codes, w.rows, w.columns,
        np.int64(w.codes.nbytes // w.rows), w.group_size or w.columns,
    )  # fmt: skip
    return DeviceWeight(BF16, w.rows, w.columns, codes, bias=w.bias)


def _blas(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    library = blas.open_blas(device)
    assert library is not None  # blas.wins
    library.matmul(x, w.codes, out)


def _wgmma(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    hopper.linear(device, x, scale, w, out, column)


def _digits(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    digits.linear(device, x, w, out, column)


def _mixed(
    device: Device, one: Linear, x: DeviceArray, scale: Any, w: DeviceWeight, out: DeviceArray, column: int
) -> None:
    mixed.linear(device, x, w, out, column)


KERNELS = {
    "blas": _blas, "wgmma": _wgmma, "digits": _digits, "mixed": _mixed, "stream": _stream, "tile": _tile,
    "plain": _plain, "widen": _widen,
}  # fmt: skip


def _in_library(device: Device, x: DeviceArray, w: DeviceWeight, out: DeviceArray) -> bool:
    whole = w.bias is None and w.rows == out.shape[1] and device.dtype != np.float32
    return whole and blas.wins(device, x, w.codes, out)


def _linear(x: int, tokens: int, w: DeviceWeight) -> Linear:
    return Linear(x, _base(w.kind), tokens, w.columns, _group(w), w.zero is not None)


def _base(kind: int) -> int:
    return INT8 if kind == INT8_DOT else kind


def _group(w: DeviceWeight) -> int:
    return w.group_size if w.scale is not None and w.scale.shape[0] > 1 else 0


def _step(scale: Any) -> int:
    return 0 if scale is None or scale.size == 1 else 1
