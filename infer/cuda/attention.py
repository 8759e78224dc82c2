"""Causal attention over the paged cache: which kernel, and its launch."""

from __future__ import annotations

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import kind_of


def attention(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None = None
) -> DeviceArray:
    """Softmax attention of q [T, H d] (device dtype) over the pages, as stored; [T, H d]. A token sees itself and
    `window - 1` tokens before it. Rows of a sequence with context 0 become zeros."""
    return _plain(device, q, batch, cache, window)


def _plain(device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None) -> DeviceArray:
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    heads = q.shape[1] // size
    out = device.empty(q.shape, q.dtype)
    kernel = device.kernel(
        "attention_plain.cu", "attention_plain", SIZE=size, GROUP=heads // kv_heads, IO=kind_of(q.dtype),
        CACHE=kind_of(cache.k.dtype), PER_TOKEN=int(len(cache.k_scale.shape) == 3),
    )  # fmt: skip
    device.launch(
        kernel, (batch.tokens, heads), 128, q, batch.starts, batch.context, batch.tables, batch.sequences,
        batch.tables.shape[1], cache.k, cache.v, cache.k_scale, cache.v_scale, kv_heads, window or 0, out,
    )  # fmt: skip
    return out
