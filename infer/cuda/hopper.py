"""Linear layers with Hopper's own instructions: how kernels/wgmma.cu is cut for a shape, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import kind_of
from quantbench.infer.cuda.weight import DeviceWeight

SLICE = 128  # bytes of K per stage
SHARED = 226 << 10  # bytes of a multiprocessor that blocks share
WIDEST = 256  # tokens per block, at most
LARGE = 16384  # rows of a weight that has blocks enough


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


def takes(device: Device, w: DeviceWeight, out: DeviceArray, column: int) -> bool:
    """Whether the kernel runs here and its vector accesses are aligned: K in whole 16 bytes, N, `column` and the width
    of `out` in whole fours (eights for a gated weight)."""
    whole = w.columns * w.codes.dtype.itemsize % 16 == 0 and w.rows % 8 == 0
    return device.hopper and whole and column % 4 == 0 and out.shape[1] % 4 == 0


def finishes_in_registers(cut: Cut, w: DeviceWeight, out: DeviceArray, column: int, gated: bool) -> bool:
    """Whether results may leave as 16 bytes of 16-bit floats straight from the registers: K is not split, everything
    stands in whole eights."""
    whole = out.shape[1] % 8 == 0 and column % 8 == 0 and w.rows % (16 if gated else 8) == 0
    return cut.split == 1 and out.dtype.itemsize == 2 and whole


def cut_for(tokens: int, rows: int, slices: int, multiprocessors: int) -> Cut:
    """A cut for x[tokens, K] and w[rows, K], K in `slices` of 128 bytes. What was fastest on an H200, by size of the
    weight: large ones have blocks enough; of small ones rows are halved and K is split."""
    width = next(n for n in (8, 16, 32, 64, 128, 256) if n >= tokens or n == WIDEST)
    if tokens > WIDEST:
        return _longest(256, 128, 1, 1)
    if rows >= LARGE:
        return _longest(width, 128, 1, 2 if width < 256 else 1)
    tiles, split = -(-rows // 64), 2 if slices >= 4 else 1
    while split < 8 and 2 * tiles * split <= multiprocessors and slices >= 8 * split:
        split *= 2
    alone = tiles * split <= multiprocessors
    if width == 256 and not alone:
        return _longest(128, 128, 1, 1)
    return _longest(width, 64, split, 1 if width == 256 or (width == 128 and alone) else 2)


def _longest(tokens: int, rows: int, split: int, blocks: int) -> Cut:
    """With the longest ring that fits."""
    return Cut(tokens, rows, min(10, (SHARED // blocks - 2048) // ((rows + tokens) * SLICE)), split, blocks)


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
    cut: Cut | None = None,
    direct: bool | None = None,
) -> None:
    """out[:, column..] = x @ w.T as kernels/wgmma.cu does it; `gated`: silu(first half) * second half, in the dtype of
    `out`, codes with the one scale `out_scale`, which
    is stored in `written` f32[1]."""
    tokens, element = len(x), x.dtype.itemsize
    slices = -(-w.columns * element // SLICE)
    cut = cut or cut_for(tokens, w.rows, slices, device.multiprocessors)
    if direct is None:
        direct = tokens > WIDEST and finishes_in_registers(cut, w, out, column, gated)
    kernel = device.kernel(
        "wgmma.cu", "linear_wgmma", ELEMENT=kind_of(x.dtype), OUT=kind_of(out.dtype), TOKENS=cut.tokens, ROWS=cut.rows,
        STAGES=cut.stages, SPLIT=cut.split, BLOCKS=cut.blocks, GATED=int(gated), DIRECT=int(direct),
    )  # fmt: skip
    inner, half = SLICE // element, cut.rows // 2
    columns = half if gated else cut.rows
    w_map = device.tensor_map(w.codes, (8 if gated and direct else columns, inner))
    x_map = device.tensor_map(x, (cut.tokens, inner))
    grid = -(-tokens // cut.tokens), -(-(w.rows // 2 if gated else w.rows) // columns), cut.split
    step = 0 if scale is None or scale.size == 1 else 1
    device.launch(
        kernel, grid, cut.rows * 2 + 32, w_map, x_map, scale, step, w.scale, w.bias, out, np.int64(out.shape[1]),
        column, tokens, w.rows, slices, out_scale, written, shared=cut.shared,
    )  # fmt: skip
