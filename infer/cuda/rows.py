"""Launchers of the operations on rows: norms, quantization, SwiGLU, RoPE with cache write, embedding, gathering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import CODES, DTYPES, F32, kind_of
from quantbench.infer.cuda.sample import argmax, logprobs, sample
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops.types import FLOAT, Activation, ActSpec

__all__ = [
    "add_norm",
    "argmax",
    "combine",
    "embed",
    "gather",
    "logprobs",
    "quantize",
    "rope_write",
    "sample",
    "silu_mul",
    "split_bf16",
]

Rope = tuple[DeviceArray, DeviceArray]
BLOCK = 512  # threads, at most, for one row
ROPE = 128  # threads for the heads of one token


def embed(device: Device, table: DeviceWeight, ids: DeviceArray) -> DeviceArray:
    """Rows `ids` i32[T] of a float table, as f32[T, D]."""
    out = device.empty((len(ids), table.columns), DTYPES[F32])
    kernel = device.kernel("copy.cu", "embed", TABLE=table.kind)
    device.launch(kernel, len(ids), min(1024, -(-table.columns // 32) * 32), table.codes, ids, out, table.columns)
    return out


def gather(device: Device, x: DeviceArray, rows: DeviceArray) -> DeviceArray:
    """Rows `rows` i32[R] of x[T, D] of 2 or 4 bytes each."""
    out = device.empty((len(rows), x.shape[1]), x.dtype)
    device.launch(device.kernel("copy.cu", "gather"), len(rows), 256, x, rows, out, x.shape[1] * x.dtype.itemsize)
    return out


def add_norm(
    device: Device, x: DeviceArray, delta: DeviceArray | None, weight: DeviceArray, eps: float, spec: ActSpec = FLOAT
) -> Activation:
    """x f32[T, D] += delta (device dtype) in place; RMS norm of x times weight f32[D]; quantized as `spec` says."""
    tokens, width = x.shape
    a, arguments = _output(device, tokens, width, spec)
    kernel = device.kernel("rows.cu", "add_norm", **_macros(device, width, spec))
    device.launch(kernel, tokens, _threads(width), x, delta, weight, np.float64(eps), a.values, *arguments, device.bad)
    return a


def quantize(device: Device, x: DeviceArray, spec: ActSpec) -> Activation:
    """x (device dtype) [T, K] as `spec` says; a row of zeros has scale 1; `device.bad` becomes 1 for NaN or inf."""
    if spec.format is None:
        return Activation(values=x)  # type: ignore[arg-type]
    tokens, width = x.shape
    spec_alone = ActSpec(spec.format, spec.scale)
    a, arguments = _output(device, tokens, width, spec_alone)
    parts = _parts(device, tokens, width, spec)
    kernel = device.kernel("rows.cu", "quantize", **_macros(device, width, spec_alone, parts))
    device.launch(kernel, tokens * parts, _threads(width // parts), x, *arguments, device.bad)
    a.values = x if spec.keep_float else None  # type: ignore[assignment]
    return a


def silu_mul(device: Device, gate_up: DeviceArray, spec: ActSpec = FLOAT) -> Activation:
    """silu(first half) * second half of gate_up (device dtype) [T, 2I], quantized as `spec` says."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    a, arguments = _output(device, tokens, width, spec)
    parts = _parts(device, tokens, width, spec)
    macros = _macros(device, width, spec, parts) | {"DOUBLE": int(device.exact)}
    kernel = device.kernel("rows.cu", "silu_mul", **macros)
    device.launch(kernel, tokens * parts, _threads(width // parts), gate_up, a.values, *arguments, device.bad)
    return a


def rope_write(
    device: Device,
    qkv: DeviceArray,
    batch: DeviceBatch,
    rope: Rope,
    norms: tuple[DeviceArray, DeviceArray] | None,
    eps: float,
    cache: DeviceCache,
) -> DeviceArray:
    """RMS norm of q's and k's heads (where `norms`), RoPE, K and V into pages; the rotated q [T, H d] (device dtype).

    Scales of an int8 or e4m3 cache are f32[kv_heads], given, or f32[pages, kv_heads, 64], written here.
    """
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q = device.empty((batch.tokens, heads * size), device.dtype)
    kernel = device.kernel(
        "rope.cu", "rope_write", SIZE=size, HEADS=heads, KV_HEADS=kv_heads, IO=kind_of(device.dtype),
        CACHE=kind_of(cache.k.dtype), NORMS=int(norms is not None), PER_TOKEN=int(len(cache.k_scale.shape) == 3),
    )  # fmt: skip
    q_norm, k_norm = norms or (None, None)
    device.launch(
        kernel, batch.tokens, ROPE, qkv, batch.positions, batch.slots, *rope, q_norm, k_norm, np.float64(eps),
        cache.k, cache.v, cache.k_scale, cache.v_scale, q,
    )  # fmt: skip
    return q


@dataclass(frozen=True)
class Splits:
    """What the blocks of decoding attention leave: sums f32[S, splits, H, d], (maximum, total) f32[S, splits, H, 2]."""

    sums: DeviceArray
    parts: DeviceArray


def combine(
    device: Device, splits: Splits, batch: DeviceBatch, window: int | None, spec: ActSpec, out: DeviceArray | None
) -> Activation:
    """Joins splits, into the rows of `out` that are alone in their sequence where given (floats), else into what `spec`
    asks for."""
    sequences, count, heads, size = splits.sums.shape
    parts = parts_of_row(heads * size)
    agree = spec.format is not None and spec.scale is None and parts > 1
    if spec.keep_float or (agree and (parts not in (2, 4, 8) or not device.hopper)):
        joined = combine(device, splits, batch, window, FLOAT, out)
        return quantize(device, cast(DeviceArray, joined.values), spec)
    a, arguments = _output(device, sequences, heads * size, spec, out)
    macros = {k: v for k, v in _macros(device, heads * size, spec).items() if k in ("IO", "FORMAT", "STATIC")}
    threads = -(-(heads * size // parts) // 32) * 32
    kernel = device.kernel("combine.cu", "combine", HEADS=heads, SIZE=size, PARTS=parts, THREADS=threads, **macros)
    device.launch(
        kernel, (parts, sequences), threads, splits.sums, splits.parts, batch.starts, batch.context, window or 0, count,
        a.values, *arguments, device.bad,
    )  # fmt: skip
    return a


def parts_of_row(width: int) -> int:
    """Blocks that share a row of `width` columns (a multiple of 16): the fewest with at most 512 each, in fours."""
    return next(n for n in range(1, width) if width % (4 * n) == 0 and width // n <= 512)


def split_bf16(device: Device, x: DeviceArray) -> DeviceArray:
    """f32[T, K] as bf16[T, 2K]: each row rounded, then what the rounding left."""
    out = device.empty((x.shape[0], 2 * x.shape[1]), DTYPES[1])
    device.launch(device.kernel("copy.cu", "split_bf16"), x.shape[0], 256, x, out, x.shape[1])
    return out


def _vector(width: int) -> int:
    return 8 if width % 8 == 0 else 4 if width % 4 == 0 else 1


def _threads(width: int) -> int:
    """Threads of a row's block: whole warps, at most BLOCK, evenly loaded."""
    vectors = width // _vector(width)
    rounds = -(-vectors // BLOCK)
    each = -(-vectors // rounds)
    return -(-each // 32) * 32


def _parts(device: Device, tokens: int, width: int, spec: ActSpec) -> int:
    """Blocks per row: several, as a cluster, where there are too few wide rows to keep the GPU busy."""
    dynamic = spec.format is not None and spec.scale is None
    few = tokens * 8 <= 2 * device.multiprocessors and width >= 4096 and width % 64 == 0
    return 8 if device.hopper and dynamic and few else 1


def _macros(device: Device, width: int, spec: ActSpec, parts: int = 1) -> dict[str, int | str]:
    format = 0 if spec.format is None else CODES[spec.format]
    return {
        "WIDTH": width,
        "PARTS": parts,
        "THREADS": _threads(width // parts),
        "IO": kind_of(device.dtype),
        "FORMAT": format,
        "STATIC": int(spec.scale is not None),
        "KEEP": int(spec.keep_float and format != 0),
    }


def _output(
    device: Device, tokens: int, width: int, spec: ActSpec, values: DeviceArray | None = None
) -> tuple[Activation, tuple[Any, ...]]:
    """Arrays for what an operation hands on, and the arguments that kernels take for codes and scales."""
    if values is None and (spec.format is None or spec.keep_float):
        values = device.empty((tokens, width), device.dtype)
    if spec.format is None:
        return Activation(values), (None, None, 0.0)  # type: ignore[arg-type]
    codes = device.empty((tokens, width), DTYPES[CODES[spec.format]])
    scale = device.empty((1 if spec.scale is not None else tokens,), DTYPES[F32])
    given = 0.0 if spec.scale is None else float(spec.scale)
    return Activation(values, codes, scale, spec.format), (codes, scale, given)  # type: ignore[arg-type]
