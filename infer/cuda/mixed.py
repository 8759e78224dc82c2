"""Linear layers of quantized weights and float inputs with Hopper's own instructions: how codes are packed for them,
how kernels/mixed.cu is cut for a shape, and its launch.

A tile is 64 rows of 64 (int4) or 32 (int8) inputs, 2 KB: 16 bytes for each of the 128 threads that multiply it, in the
order in which tensor-core products of 16 rows and 16 inputs want them in registers. Thread (warp, g, t) = (i / 32,
i / 4 % 8, i % 4) holds rows 16 warp + g and + 8, of each run of 16 inputs those at 2t, 2t + 1, 2t + 8 and 2t + 9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import INT4, INT8, kind_of
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops.types import Array

TILE = 2048  # bytes
TILE_ROWS = 64
INPUTS = 128  # rows are padded to whole multiples of so many inputs
SHARED = 226 << 10  # bytes of a multiprocessor that blocks share
MOST_TOKENS = 256  # above it a weight widened once and a library's product are faster
LARGE = 16384  # rows of a weight that has blocks enough


@dataclass(frozen=True)
class Cut:
    """How one kernel is cut: `tokens` x `rows` per block, `teams` that share its stages of `depth` inputs, `stages` of
    the ring, blocks of a cluster that `split` K, and `blocks` per multiprocessor."""

    tokens: int
    rows: int
    teams: int
    depth: int
    stages: int
    split: int
    blocks: int


def packs(device: Device, kind: int, shape: tuple[int, int], group: int, zero: bool) -> bool:
    """Whether a weight of `shape` that meets float inputs is held in tiles: on Hopper, with 16-bit floats between
    operations, N in whole fours and K in whole eights, groups as the kernel takes them."""
    rows, columns = shape
    whole = rows % 4 == 0 and columns % 8 == 0
    groups = group in (0, 32, 64) or group >= columns or group % 128 == 0
    known = kind == INT4 or (kind == INT8 and not zero)
    return device.hopper and device.dtype.itemsize == 2 and known and whole and groups


def tiled(w: DeviceWeight) -> bool:
    return len(w.codes.shape) == 3


def gates(w: DeviceWeight, tokens: int) -> bool:
    """Whether SwiGLU of rows that are gate, then up, is a part of the product: both in whole tiles."""
    return tokens <= MOST_TOKENS and w.rows % (2 * TILE_ROWS) == 0


def tile_inputs(kind: int) -> int:
    return 64 if kind == INT4 else 32


def tiles_shape(kind: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Shape in bytes of the codes of a weight [rows, columns]: tiles by rows, tiles by inputs, a tile."""
    return -(-rows // TILE_ROWS), -(-columns // INPUTS) * INPUTS // tile_inputs(kind), TILE


def pack_tiles(kind: int, codes: Array) -> Array:
    """int8 codes [N, K], INT4's in -8..7, as tiles. Nibbles are code + 8; those of rows g and g + 8 share a byte."""
    rows, columns = codes.shape
    down, across, _ = shape = tiles_shape(kind, rows, columns)
    padded = np.zeros((down * TILE_ROWS, across * tile_inputs(kind)), np.int8)
    padded[:rows, :columns] = codes
    steps = tile_inputs(kind) // 16
    # row tile, warp, half of 16 rows, g, tile of inputs, step, half of 16 inputs, t, one of two
    parts = padded.reshape(down, 4, 2, 8, across, steps, 2, 4, 2)
    if kind != INT4:
        return np.ascontiguousarray(parts.transpose(0, 4, 1, 3, 7, 5, 2, 6, 8)).view(np.uint8).reshape(shape)
    nibbles = (parts + 8).astype(np.uint8)
    both = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return np.ascontiguousarray(both.transpose(0, 3, 1, 2, 6, 4, 7, 5)).reshape(shape)


def groups_of(w: DeviceWeight) -> int:
    """Scales of a row."""
    return 0 if w.scale is None else w.scale.shape[0]


def shared_bytes(cut: Cut, kind: int, group: int, zero: bool) -> int:
    """Shared memory of one block, as `struct Shared` in kernels/mixed.cu."""
    return cut.stages * (cut.depth * cut.tokens * 2 + weight_bytes(cut, kind, group, zero)) + 1024


def weight_bytes(cut: Cut, kind: int, group: int, zero: bool) -> int:
    """Of a stage's codes, scales, zero points and barriers."""
    runs = cut.depth // group if group else 1
    scales, zeros = (runs * (cut.rows * 4 if held else 16) for held in (group, group and zero))
    return cut.depth * cut.rows // (2 if kind == INT4 else 1) + scales + zeros + 16


def cut_for(w: DeviceWeight, tokens: int, gated: bool, multiprocessors: int) -> Cut:
    """A cut for x[tokens, K], the fastest in the layers of an 8B model on an H200: large weights have blocks enough, of
    small ones K is split; many tokens want tall blocks, which read them less often."""
    width = next(n for n in (16, 32, 64, 128, 256) if n >= tokens or n == 256)
    if w.rows >= LARGE:
        return _longest(w, Cut(width, 128, 1, INPUTS, 16, 1, 2 if width <= 64 else 1))
    least = 2 * TILE_ROWS if gated else TILE_ROWS
    tiles, slices = -(-w.rows // least), slices_of(w, INPUTS)
    if width <= 32:
        split = split_for(tiles, slices, 0, 2 * multiprocessors)
        return _longest(w, Cut(width, least, 1, INPUTS, 8, split, 2))
    split = split_for(tiles, slices, multiprocessors * 3 // 4, 2 * multiprocessors)
    if width == 64:
        alone = tiles * split <= multiprocessors
        return _longest(w, Cut(64, least, 2 if alone else 1, INPUTS, 16, split, 1 if alone else 2))
    if width == 128 and tiles * split <= multiprocessors:
        return _longest(w, Cut(128, least, 1, INPUTS, 16, split, 1))
    blocks = -(-w.rows // 128) * (width // 128)
    return _longest(w, Cut(128, 128, 1, INPUTS, 16, split_for(blocks, slices, 0, multiprocessors), 1))


def split_for(tiles: int, slices: int, least: int, most: int) -> int:
    """Blocks that share a row's inputs: enough that there are `least`, or, where that is 0, as many as `most` allow."""
    allowed = [n for n in (1, 2, 4, 8) if n == 1 or (tiles * n <= most and slices >= 2 * n)]
    return next((n for n in allowed if least and tiles * n >= least), allowed[-1])


def _longest(w: DeviceWeight, cut: Cut) -> Cut:
    """With the longest ring that fits, up to `cut.stages`."""
    one = shared_bytes(replace(cut, stages=1), w.kind, group_of(w), w.zero is not None)
    stages = min(cut.stages, most_stages(w, cut), (SHARED // cut.blocks - 2048) // (one - 1024))
    return replace(cut, stages=stages // cut.teams * cut.teams)


def most_stages(w: DeviceWeight, cut: Cut) -> int:
    """As many as a block has slices: more would only keep others off the multiprocessor."""
    return max(4, -(-slices_of(w, cut.depth) // cut.split // cut.teams) * cut.teams)


def slices_of(w: DeviceWeight, depth: int) -> int:
    """Of `depth` inputs each, along a row."""
    return w.codes.shape[1] * tile_inputs(w.kind) // depth


def group_of(w: DeviceWeight) -> int:
    """Inputs that share a scale, as the kernel counts them: 0 for one scale per row, 128 for its multiples."""
    return min(w.group_size, 128) if w.scale is not None and w.scale.shape[0] > 1 else 0


def linear(
    device: Device,
    x: DeviceArray,
    w: DeviceWeight,
    out: DeviceArray,
    column: int = 0,
    *,
    gated: bool = False,
    out_scale: float = 1.0,
    written: DeviceArray | None = None,
    cut: Cut | None = None,
) -> None:
    """out[:, column..] = x @ w.T as kernels/mixed.cu does it; `gated`: silu(first half) * second half, in the dtype of
    `out`, codes with the one scale `out_scale`, which is stored in `written` f32[1]."""
    tokens, group = len(x), group_of(w)
    cut = cut or cut_for(w, tokens, gated, device.multiprocessors)
    kernel = device.kernel(
        "mixed.cu", "linear_mixed", X=kind_of(x.dtype), W=w.kind, OUT=kind_of(out.dtype), TOKENS=cut.tokens,
        ROWS=cut.rows, TEAMS=cut.teams, DEPTH=cut.depth, STAGES=cut.stages, SPLIT=cut.split, BLOCKS=cut.blocks,
        GROUP=group, ASYM=int(w.zero is not None), GATED=int(gated),
    )  # fmt: skip
    x_map = device.tensor_map(x, (cut.tokens, 64))
    rows, columns = (w.rows // 2, cut.rows // 2) if gated else (w.rows, cut.rows)
    grid = -(-tokens // cut.tokens), -(-rows // columns), cut.split
    threads = cut.rows * cut.teams * 2
    threads += 128 if cut.tokens >= 128 and threads == 256 else 32  # as kProducers in the kernel
    device.launch(
        kernel, grid, threads, x_map, w.codes, w.scale, w.zero, w.bias, out, np.int64(out.shape[1]), column, tokens,
        w.rows, w.group_size, groups_of(w), slices_of(w, cut.depth), out_scale, written,
        shared=shared_bytes(cut, w.kind, group, w.zero is not None),
    )  # fmt: skip


def widened(device: Device, w: DeviceWeight) -> DeviceWeight:
    """A weight of tiles as 16-bit floats [N, K], in room of the step."""
    codes = device.empty((w.rows, w.columns), device.dtype)
    kind = kind_of(device.dtype)
    kernel = device.kernel("widen_tiles.cu", "widen_tiles", X=kind, W=w.kind, ASYM=int(w.zero is not None))
    across = w.codes.shape[1]
    device.launch(
        kernel, (-(-w.columns // INPUTS), w.codes.shape[0]), 128, w.codes, w.scale, w.zero, codes, w.rows, w.columns,
        w.group_size or w.columns, groups_of(w), across,
    )  # fmt: skip
    return DeviceWeight(kind, w.rows, w.columns, codes, bias=w.bias)
