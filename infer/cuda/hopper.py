"""Linear layers with Hopper's own instructions: how kernels/wgmma.cu is cut for a shape, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import kind_of
from quantbench.infer.cuda.weight import DeviceWeight

SLICE = 128  # bytes of K per stage
SHARED = 226 << 10  # bytes of a multiprocessor that blocks share
TILE_TOKENS, TILE_ROWS = 128, (96, 128, 192, 224, 256)
WIDEST = 256  # tokens per block, at most
LARGE = 16384  # rows of a weight that has blocks enough
LONG = 64  # slices of a K whose ring fills more than once, whoever shares the multiprocessor


@dataclass(frozen=True)
class Cut:
    """How one kernel is cut: `tokens` x `rows` per block, `stages` of the ring, blocks of a cluster that `split` K,
    and `blocks` per multiprocessor."""

    tokens: int
    rows: int
    stages: int
    split: int
    blocks: int

    @property
    def shared(self) -> int:
        return self.stages * self._stage + 16 * self.stages + 1024

    @property
    def _stage(self) -> int:
        return (self.rows + self.tokens) * SLICE


@dataclass(frozen=True)
class Tiles:
    """How kernels/wgmma_tiles.cu is cut: tiles of 128 tokens x `rows`; two blocks `share` weights, or `split` K."""

    rows: int
    share: int = 1
    split: int = 1

    @property
    def stages(self) -> int:
        return (SHARED - self._beside - 1024) // ((self.rows + TILE_TOKENS) * SLICE + 16)

    @property
    def shared(self) -> int:
        return 1024 + self.stages * ((self.rows + TILE_TOKENS) * SLICE + 16) + self._beside

    @property
    def threads(self) -> int:
        """Two groups that multiply; one warp that copies, or a group whose registers the others need."""
        return 256 + (128 if self.rows > 224 else 32)

    @property
    def _beside(self) -> int:
        """Results on their way, scales, biases."""
        return 8 * 16 * 144 + 2 * self.rows * 8

    def count(self, tokens: int, rows: int) -> int:
        """Of clusters of tiles."""
        return -(-tokens // (TILE_TOKENS * self.share)) * -(-rows // self.rows)

    def blocks(self, tokens: int, rows: int, multiprocessors: int) -> int:
        cluster = self.share * self.split
        return min(self.count(tokens, rows), multiprocessors // cluster) * cluster

    def cycles(self, tokens: int, rows: int, slices: int, multiprocessors: int) -> float:
        """Of the last block, about: shared memory is read and filled for a slice of a tile in 3 rows + 256 cycles; to
        finish a tile takes 1500, to exchange halves 4000; sharing saves a twentieth, by drawing less power."""
        rounds = -(-self.count(tokens, rows) // (multiprocessors // (self.share * self.split)))
        tile = slices / self.split * (3 * self.rows + 256) + 1500 + 4000 * (self.split - 1)
        return rounds * tile * (0.95 if self.share > 1 else 1.0)


def takes(device: Device, w: DeviceWeight, out: DeviceArray, column: int) -> bool:
    """Whether the kernel runs here and its vector accesses are aligned: K in whole 16 bytes, N, `column` and the width
    of `out` in whole fours (eights for a gated weight)."""
    whole = w.columns * w.codes.dtype.itemsize % 16 == 0 and w.rows % 8 == 0
    return device.hopper and whole and column % 4 == 0 and out.shape[1] % 4 == 0


@cache
def tiles_for(tokens: int, rows: int, slices: int, gated: bool, multiprocessors: int) -> Tiles | None:
    """The fastest tiles for x[tokens, K] and w[rows, K], K in `slices` of 128 bytes. None where the kernel for few
    tokens is as good: up to 64 of them, and up to 256 if tiles left multiprocessors idle."""
    splits = (1,) if gated or slices < 8 else (1, 2)
    possible = [Tiles(n, 1, split) for n in TILE_ROWS for split in splits] + [Tiles(n, 2) for n in TILE_ROWS]
    best = min(possible, key=lambda tiles: tiles.cycles(tokens, rows, slices, multiprocessors))
    busy = best.blocks(tokens, rows, multiprocessors) >= 0.9 * multiprocessors
    return best if tokens > WIDEST or (tokens > 64 and busy) else None


def cut_for(tokens: int, rows: int, slices: int, multiprocessors: int) -> Cut:
    """A cut for x[tokens, K] and w[rows, K], K in `slices` of 128 bytes. What was fastest in whole decode steps on an
    H200: large weights have blocks enough; of small ones rows are halved, and K is split while all blocks fit."""
    width = next(n for n in (8, 16, 32, 64, 128, 256) if n >= tokens or n == WIDEST)
    if rows >= LARGE:
        at_once = width == 8 and rows <= 256 * multiprocessors and rows * slices * SLICE < 128 << 20
        return _longest(width, 256, 1, 1) if at_once else _longest(width, 128, 1, 2 if width < 256 else 1)
    tiles, split = -(-rows // 64), 1
    while split < 8 and 2 * tiles * split <= multiprocessors and slices >= 8 * split:
        split *= 2
    if split == 1 and width == 256:
        return _longest(128, 128, 1, 1)
    if split > 1 and slices > LONG:
        return _longest(width, 64, 2 * split, 3) if width <= 16 else _longest(width, 64, split, 1)
    return _longest(width, 64, split, 1 if width >= 128 else 2)


def _longest(tokens: int, rows: int, split: int, blocks: int) -> Cut:
    """With the longest ring that fits."""
    return Cut(tokens, rows, min(10, (SHARED // blocks - 2048) // ((rows + tokens) * SLICE)), split, blocks)


@dataclass(frozen=True)
class Product:
    """Columns column.. of `out` = x @ w.T; `gated`: silu(first half) * second half. Codes have the one scale
    `out_scale`, which is stored in `written` f32[1]."""

    x: DeviceArray
    scale: Any
    w: DeviceWeight
    out: DeviceArray
    column: int = 0
    gated: bool = False
    out_scale: float = 1.0
    written: DeviceArray | None = None

    @property
    def tokens(self) -> int:
        return len(self.x)

    @property
    def results(self) -> int:
        return self.w.rows // 2 if self.gated else self.w.rows

    @property
    def inner(self) -> int:
        """Inputs of a slice."""
        return SLICE // self.x.dtype.itemsize

    @property
    def slices(self) -> int:
        return -(-self.w.columns // self.inner)

    @property
    def in_eights(self) -> bool:
        """Whether eight neighbouring results may be stored at once, and not as float32."""
        whole = self.out.shape[1] % 8 == 0 and self.column % 8 == 0 and self.results % 8 == 0
        return whole and self.out.dtype.itemsize <= 2

    def arguments(self) -> tuple[Any, ...]:
        """What both kernels take behind the tensor maps."""
        step = 0 if self.scale is None or self.scale.size == 1 else 1
        return (
            self.scale, step, self.w.scale, self.w.bias, self.out, np.int64(self.out.shape[1]), self.column,
            self.tokens, self.w.rows, self.slices, self.out_scale, self.written,
        )  # fmt: skip


def linear(
    device: Device,
    x: DeviceArray,
    scale: Any,
    w: DeviceWeight,
    out: DeviceArray,
    column: int = 0,
    *,
    gated: bool = False,
    out_scale: float = 1.0,
    written: DeviceArray | None = None,
    cut: Cut | Tiles | None = None,
) -> None:
    """Queues one product (see Product), cut as was fastest unless `cut` says how."""
    p = Product(x, scale, w, out, column, gated, out_scale, written)
    if cut is None and p.in_eights:
        cut = tiles_for(p.tokens, w.rows, p.slices, gated, device.multiprocessors)
    cut = cut or cut_for(p.tokens, w.rows, p.slices, device.multiprocessors)
    if isinstance(cut, Tiles):
        _by_tiles(device, p, cut)
    else:
        _by_cut(device, p, cut)


def _by_cut(device: Device, p: Product, cut: Cut) -> None:
    kernel = device.kernel(
        "wgmma.cu", "linear_wgmma", ELEMENT=kind_of(p.x.dtype), OUT=kind_of(p.out.dtype), TOKENS=cut.tokens,
        ROWS=cut.rows, STAGES=cut.stages, SPLIT=cut.split, BLOCKS=cut.blocks, GATED=int(p.gated),
    )  # fmt: skip
    columns = cut.rows // 2 if p.gated else cut.rows
    w_map = device.tensor_map(p.w.codes, (columns, p.inner))
    x_map = device.tensor_map(p.x, (cut.tokens, p.inner))
    grid = -(-p.tokens // cut.tokens), -(-p.results // columns), cut.split
    device.launch(kernel, grid, cut.rows * 2 + 32, w_map, x_map, *p.arguments(), shared=cut.shared)


def _by_tiles(device: Device, p: Product, tiles: Tiles) -> None:
    kernel = device.kernel(
        "wgmma_tiles.cu", "linear_tiles", ELEMENT=kind_of(p.x.dtype), OUT=kind_of(p.out.dtype), ROWS=tiles.rows,
        STAGES=tiles.stages, SHARE=tiles.share, SPLIT=tiles.split, BIAS=int(p.w.bias is not None), GATED=int(p.gated),
    )  # fmt: skip
    w_map = device.tensor_map(p.w.codes, (tiles.rows // 2, p.inner))
    x_map = device.tensor_map(p.x, (TILE_TOKENS, p.inner))
    blocks = tiles.blocks(p.tokens, p.w.rows, device.multiprocessors)
    device.launch(kernel, blocks, tiles.threads, w_map, x_map, *p.arguments(), shared=tiles.shared)
