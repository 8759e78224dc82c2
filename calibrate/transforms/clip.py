"""Recipe word `clip`: weight ranges by the error of the outputs; quantizers/autoclip.py.

It decides the weights' entries themselves, behind every transform before it; choose.py leaves what is decided alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantbench.calibrate.apply import fold_block, transformed
from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.calibrate.transforms.weight_entries import weight_entries
from quantbench.quantizers.autoclip import ClipGrid, clip_range
from quantbench.quantizers.weight_range import WeightRange
from quantbench.scales.arrays import F32
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, LayerPlan


def clip(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """The weight entries of every quantized linear that reads one of the targets.

    options: max_shrink (0.5), steps (20), hessian ("full", or "diagonal"), targets (all four). Raises CalibrationError
    where a target's Hessian was not collected.
    """
    require_known(options, "clip", ("max_shrink", "steps", "hessian", "targets"))
    grid = ClipGrid(
        float(options.get("max_shrink", 0.5)), int(options.get("steps", 20)), options.get("hessian") == "diagonal"
    )
    seen = transformed(block.layer, block.statistics, table, block.config)

    def range_of(w: F32, plan: LayerPlan, tap: str) -> WeightRange:
        return clip_range(w, plan, block.tap(seen, tap), grid)

    folded = fold_block(block.layer, block.weights, table, block.config)
    targets = options.get("targets", SMOOTH_TARGETS)
    return [_told(entry, grid) for entry in weight_entries(block, folded, range_of, targets)]


def _told(entry: Entry, grid: ClipGrid) -> Entry:
    units = entry.reason.removeprefix("absmax of ").removeprefix("least squared error for ")
    error = "by the Hessian's diagonal" if grid.diagonal else "by the Hessian"
    return replace(entry, observer="clip", reason=f"clip, least output error {error} for {units}")


TRANSFORMS.add("clip", Transform(clip, targets=SMOOTH_TARGETS, needs_hessian=lambda _: True))
