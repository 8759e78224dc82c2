"""Attention of prompts over the pages: the tiles that blocks take, how the kernels are cut, and their launches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache, Lengths
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, F16, kind_of
from quantbench.infer.ops.types import PAGE

SHARED = 99 << 10  # bytes that a block may take on every GPU since sm_80
WHOLE = 227 << 10  # bytes of a block that has a Hopper multiprocessor for itself
ROWS = 64  # of a portable block
TILE = 128  # rows of a tile of Hopper's kernel
LARGEST_GROUP = 64  # query heads per KV head that a tile can hold


def macros_of(q: DeviceArray, cache: DeviceCache, heads: int) -> dict[str, int | str]:
    """What every attention kernel is specialized by."""
    return {
        "SIZE": cache.k.shape[3],
        "GROUP": heads // cache.k.shape[1],
        "IO": kind_of(q.dtype),
        "CACHE": kind_of(cache.k.dtype),
        "PER_TOKEN": int(len(cache.k_scale.shape) == 3),
    }


def prefill(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None, out: DeviceArray
) -> None:
    """Attention of the sequences with more than one row into their rows of `out`; 16-bit q."""
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    if device.hopper and size in (64, 128) and q.shape[1] // size // kv_heads <= LARGEST_GROUP:
        _hopper(device, q, batch, cache, window, out)
    else:
        _portable(device, q, batch, cache, window, out)


def _hopper(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None, out: DeviceArray
) -> None:
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    group, codes = q.shape[1] // size // kv_heads, cache.k.dtype.itemsize == 1
    element = BF16 if kind_of(cache.k.dtype) == BF16 else F16
    macros = macros_of(q, cache, group * kv_heads)
    kernel = device.kernel("prefill_hopper.cu", "attention_prefill", ELEMENT=element, **macros)
    matrices = [side.view((side.shape[0] * kv_heads * PAGE, size)) for side in (cache.k, cache.v)]
    k_map, v_map = (device.tensor_map(m, (PAGE, size if codes else 64), 0 if codes else 128) for m in matrices)
    tiles = _tiles(device, batch, TILE // group)
    blocks = min(device.multiprocessors, len(tiles) * kv_heads)
    device.launch(
        kernel, blocks, 512 if codes else 384, k_map, v_map, q, tiles, len(tiles), batch.tables, batch.tables.shape[1],
        cache.k_scale, cache.v_scale, kv_heads, window or 0, out, shared=WHOLE,
    )  # fmt: skip


def _tiles(device: Device, batch: DeviceBatch, tokens: int) -> DeviceArray:
    """The batch's tiles of `tokens`, on the device: made for its first layer, kept for the others."""
    if tokens not in batch.tiles:
        assert batch.lengths is not None, "a batch with prompts tells its lengths"
        assert batch.contexts is not None
        tiles = tiles_of(batch.lengths, batch.contexts, tokens)
        held = batch.tiles[tokens] = device.empty(tiles.shape, tiles.dtype)
        device.write(held, tiles)
    return batch.tiles[tokens]


def tiles_of(lengths: Lengths, contexts: Lengths, tokens: int) -> npt.NDArray[np.int32]:
    """(sequence, row of its first token, the sequence's rows from there on, position of that token) of every tile of
    at most `tokens` tokens; those that see most keys first. Sequences of one row have none."""
    starts, long = np.cumsum(lengths) - lengths, np.flatnonzero(lengths > 1)
    counts = -(-lengths[long] // tokens)
    sequence = np.repeat(long, counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    left = lengths[sequence] - first
    tiles = np.stack([sequence, starts[sequence] + first, left, contexts[sequence] - left], axis=1).astype(np.int32)
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]


def _portable(
    device: Device, q: DeviceArray, batch: DeviceBatch, cache: DeviceCache, window: int | None, out: DeviceArray
) -> None:
    kv_heads, size, codes = cache.k.shape[1], cache.k.shape[3], cache.k.dtype.itemsize == 1
    heads, keys, row = q.shape[1] // size, 64 if size <= 128 else 32, size * 2 + 16
    fixed = ROWS * row + (2 * keys * row if codes else 0)
    stage = 2 * keys * (size if codes else row)
    stages = 2 if fixed + 2 * stage <= SHARED else 1
    kernel = device.kernel(
        "prefill.cu", "attention_prefill", KEYS=keys, STAGES=stages, **macros_of(q, cache, heads)
    )  # fmt: skip
    device.launch(
        kernel, (-(-batch.max_rows // ROWS), heads, batch.sequences), 128, q, batch.starts, batch.context, batch.tables,
        batch.tables.shape[1], cache.k, cache.v, cache.k_scale, cache.v_scale, kv_heads, window or 0, out,
        shared=fixed + stages * stage,
    )  # fmt: skip
