"""Linear layers of quantized weights and a few tokens on Hopper: how kernels/digits.cu is cut, and its launch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantbench.infer.cuda import mixed
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import INT4, kind_of
from quantbench.infer.cuda.mixed import LARGE, SHARED, TILE_ROWS, Cut
from quantbench.infer.cuda.weight import DeviceWeight

WIDTHS = (2, 5, 8)  # tokens whose three digits fill one, two and three products of eight columns
MOST_TOKENS = WIDTHS[-1]
MOST_INPUTS = 32768  # in four or eight parts the digits of so many fit


def shared_bytes(cut: Cut, w: DeviceWeight) -> int:
    """Shared memory of one block: `struct Shared` in kernels/digits.cu, behind it the digits of the block's inputs."""
    ring = cut.stages * mixed.weight_bytes(cut, w.kind, mixed.group_of(w), w.zero is not None) + 32
    inputs = -(-mixed.slices_of(w, cut.depth) // cut.split) * cut.depth
    return -(-ring // 128) * 128 + inputs * -(-cut.tokens * 3 // 8) * 8


def takes(w: DeviceWeight, tokens: int) -> bool:
    """Whether the digits of a block's inputs fit a multiprocessor beside a ring."""
    return tokens <= MOST_TOKENS and w.columns <= MOST_INPUTS


def cut_for(w: DeviceWeight, tokens: int, gated: bool, multiprocessors: int) -> Cut:
    """A cut for x[tokens, K], the fastest in the layers of an 8B model on an H200: a stage is 8 KB of each 64 rows,
    blocks for every multiprocessor, and 16 warps on each."""
    width = next(n for n in WIDTHS if n >= tokens)
    even = mixed.slices_of(w, mixed.INPUTS) % 2 == 0
    depth = 256 if w.kind == INT4 and even else 128
    slices = mixed.slices_of(w, depth)
    if w.rows >= LARGE and width > WIDTHS[0]:
        return _fitting(w, Cut(width, 256, 1, depth, 16, 1, 1))
    if w.rows >= LARGE:
        return _fitting(w, Cut(width, 128, 1, 128, 16, 1, 2))
    least = 2 * TILE_ROWS if gated else TILE_ROWS
    tiles = -(-w.rows // least)
    split = mixed.split_for(tiles, slices, multiprocessors * 3 // 4, 2 * multiprocessors)
    if tiles * split <= multiprocessors:
        return _fitting(w, Cut(width, least, 4 * TILE_ROWS // least, depth, 16, split, 1))
    return _fitting(w, Cut(width, least, 1, depth, max(4, slices // split // 2), split, 2))


def _fitting(w: DeviceWeight, cut: Cut) -> Cut:
    """With fewer stages, fewer teams, one block per multiprocessor or more blocks along K, until everything fits."""
    one = replace(cut, stages=1)
    room = SHARED // cut.blocks - 2048 - shared_bytes(one, w)
    stage = mixed.weight_bytes(one, w.kind, mixed.group_of(w), w.zero is not None)
    stages = min(cut.stages, mixed.most_stages(w, cut), 1 + room // stage) // cut.teams * cut.teams
    if stages >= 2 and stages * stage_codes(cut, w) >= results_bytes(cut):
        return replace(cut, stages=stages)
    if cut.teams > 1:
        return _fitting(w, replace(cut, teams=cut.teams // 2))
    if cut.blocks > 1:
        return _fitting(w, replace(cut, blocks=1, stages=16))
    return _fitting(w, replace(cut, split=cut.split * 2, stages=16))


def stage_codes(cut: Cut, w: DeviceWeight) -> int:
    return cut.depth * cut.rows // (2 if w.kind == INT4 else 1)


def results_bytes(cut: Cut) -> int:
    """Of a block's sums, which lie where the ring was: columns of digits of each team, and their totals."""
    return (cut.teams * -(-cut.tokens * 3 // 8) * 8 + cut.tokens) * (cut.rows + 4) * 4


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
    """As `mixed.linear`, by kernels/digits.cu."""
    tokens = len(x)
    cut = cut or cut_for(w, tokens, gated, device.multiprocessors)
    kernel = device.kernel(
        "digits.cu", "linear_digits", X=kind_of(x.dtype), W=w.kind, OUT=kind_of(out.dtype), TOKENS=cut.tokens,
        ROWS=cut.rows, TEAMS=cut.teams, DEPTH=cut.depth, STAGES=cut.stages, SPLIT=cut.split, BLOCKS=cut.blocks,
        GROUP=mixed.group_of(w), ASYM=int(w.zero is not None), GATED=int(gated),
    )  # fmt: skip
    rows, columns = (w.rows // 2, cut.rows // 2) if gated else (w.rows, cut.rows)
    grid = -(-tokens // cut.tokens), -(-rows // columns), cut.split
    device.launch(
        kernel, grid, cut.rows * cut.teams * 2 + 32, x, w.codes, w.scale, w.zero, w.bias, out, np.int64(out.shape[1]),
        column, tokens, w.rows, w.columns, w.group_size, mixed.groups_of(w), mixed.slices_of(w, cut.depth), out_scale,
        written, shared=shared_bytes(cut, w),
    )  # fmt: skip
