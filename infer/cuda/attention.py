"""Causal attention over the paged cache: which kernels, how the pages are split over blocks, and the launches.

plain     float32 between operations: arithmetic in float32, any head size
decode    bfloat16, sequences with one new token: pages split over blocks, then combined
prefill   bfloat16, sequences with more (prefill.py)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.infer.cuda import prefill, rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import DTYPES, F32
from quantbench.infer.ops.types import FLOAT, PAGE, Activation, ActSpec

RING = 56 << 10  # bytes for the stages of a decoding block: several blocks share a multiprocessor
MULTIPROCESSOR = 227 << 10  # bytes of shared memory that the blocks of a multiprocessor have together (Hopper)
SPLITS = 64  # at most


@dataclass(frozen=True)
class Turn:
    """What a decoding kernel needs to turn q and k itself."""

    rope: rows.Rope
    norms: tuple[DeviceArray, DeviceArray] | None
    eps: float


def attention(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None = None
) -> DeviceArray:
    """Softmax attention of q [T, H d] (device dtype) over the pages, as stored; [T, H d]. A token sees itself and
    `window - 1` tokens before it. Rows of a sequence with context 0 become zeros."""
    out = device.empty(q.shape, q.dtype)
    if not on_tensor_cores(device, cache):
        _plain(device, q, batch, cache, window, out)
        return out
    if not batch.decode:
        prefill.prefill(device, q, batch, cache, window, out)
    if batch.decode or batch.lengths is None or 1 in batch.lengths:
        _decode(device, q, batch, cache, window, out)
    return out


def decode_attention(
    device: Device,
    qkv: DeviceArray,
    batch: DeviceBatch,
    rope: rows.Rope,
    norms: tuple[DeviceArray, DeviceArray] | None,
    eps: float,
    cache: DeviceCache,
    window: int | None,
    spec: ActSpec,
) -> Activation:
    """Everything between the qkv and the o projection of a decode step (one row per sequence): norms and RoPE, K and V
    into pages, attention, quantized as `spec` says. For what `fuses_decode` allows."""
    turn = Turn(rope, norms, eps)
    heads = qkv.shape[1] // cache.k.shape[3] - 2 * cache.k.shape[1]
    if _splits(device, batch, cache, heads) > 1:
        return _decode(device, qkv, batch, cache, window, None, spec, turn)
    out = device.empty((batch.tokens, heads * cache.k.shape[3]), device.dtype)
    _decode(device, qkv, batch, cache, window, out, FLOAT, turn)
    return rows.quantize(device, out, spec)


def fuses_decode(device: Device, batch: DeviceBatch, cache: DeviceCache) -> bool:
    """Whether `decode_attention` takes this step."""
    return batch.decode and on_tensor_cores(device, cache)


def on_tensor_cores(device: Device, cache: DeviceCache) -> bool:
    """Whether decode and prefill kernels take this cache: 16-bit activations, heads of whole 16s, no float32 pages."""
    return device.dtype != np.float32 and cache.k.dtype != np.float32 and cache.k.shape[3] % 16 == 0


def _plain(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None, out: DeviceArray
) -> None:
    heads = q.shape[1] // cache.k.shape[3]
    macros = prefill.macros_of(q, cache, heads) | {"DOUBLE": int(device.exact)}
    kernel = device.kernel("attention_plain.cu", "attention_plain", **macros)
    device.launch(
        kernel, (batch.tokens, heads), 128, q, batch.starts, batch.context, batch.tables,
        batch.sequences, batch.tables.shape[1], cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k.shape[1],
        window or 0, out,
    )  # fmt: skip


def _decode(
    device: Device,
    q: DeviceArray,
    batch: DeviceBatch,
    cache: DeviceCache,
    window: int | None,
    out: DeviceArray | None,
    spec: ActSpec = FLOAT,
    turn: Turn | None = None,
) -> Activation:
    """Sequences of one row. Splits are joined into `out`, or into what `spec` asks for. With `turn`, q is qkv."""
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    heads = q.shape[1] // size - (2 * kv_heads if turn else 0)
    splits = _splits(device, batch, cache, heads)
    stages, shared = _ring(cache, heads // kv_heads)
    shape = batch.sequences, splits, heads
    sums = parts = None
    if splits > 1:
        sums, parts = device.empty((*shape, size), DTYPES[F32]), device.empty((*shape, 2), DTYPES[F32])
    (cosines, sines), norms, eps = (turn.rope, turn.norms, turn.eps) if turn else ((None, None), None, 0.0)
    q_norm, k_norm = norms or (None, None)
    macros = prefill.macros_of(q, cache, heads)
    kernel = device.kernel(
        "decode.cu",
        "attention_decode",
        STAGES=stages,
        FUSED=int(turn is not None),
        NORMS=int(norms is not None),
        **macros,
    )
    device.launch(
        kernel, (splits, kv_heads, batch.sequences), 128, q, cosines, sines, q_norm, k_norm, np.float64(eps),
        batch.starts, batch.context, batch.tables, batch.tables.shape[1], cache.k, cache.v, cache.k_scale,
        cache.v_scale, window or 0, out, sums, parts, shared=shared,
    )  # fmt: skip
    if sums is None or parts is None:
        return Activation(out)  # type: ignore[arg-type]
    return rows.combine(device, rows.Splits(sums, parts), batch, window, spec, out)


def _splits(device: Device, batch: DeviceBatch, cache: DeviceCache, heads: int) -> int:
    """Splits of each sequence's pages over blocks."""
    kv_heads = cache.k.shape[1]
    _, shared = _ring(cache, heads // kv_heads)
    slots = device.multiprocessors * min(4, MULTIPROCESSOR // (shared + 1024))
    return splits_for(-(-batch.max_context // PAGE), batch.sequences * kv_heads, slots)


def splits_for(pages: int, blocks: int, slots: int) -> int:
    """The splits that finish first: rounds of `blocks` times splits over the `slots` of the GPU, each as long as its
    pages and about one and a half more for starting and joining."""
    return min(range(1, min(pages, SPLITS) + 1), key=lambda n: -(-blocks * n // slots) * (-(-pages // n) + 1.5))


def _ring(cache: DeviceCache, group: int) -> tuple[int, int]:
    """Stages of a decoding warp's ring, and the block's bytes of shared memory (kernels/decode.cu)."""
    size, per_token = cache.k.shape[3], len(cache.k_scale.shape) == 3
    stage = 4 * (2 * 16 * (size * cache.k.dtype.itemsize + 16) + (128 if per_token else 0))
    stages = max(1, min(4, RING // stage))
    exchange = 4 * (-(-group // 8) * 8) * ((size + 4) * 4 + 8)
    return stages, max(stages * stage + group * size * 2, exchange)
