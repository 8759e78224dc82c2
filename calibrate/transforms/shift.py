"""Recipe word `shift`: o_proj's input moved to the middle of its channels; quantizers/shift.py.

What was seen of o_in and v says little of what lies behind a shift, so both are observed again before anything else is
decided; every later word, and the methods of apply.py, then work on what is seen there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from quantbench.calibrate.apply import STORAGE, tap_shifts
from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.errors import CalibrationError
from quantbench.quantizers.shift import head_shift
from quantbench.scales.arrays import F32
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry, ScaleTable

SHIFT_TARGETS = ("o_in",)


def shift(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """One entry: what v_proj's output moves down by. Values that the variant's dtype holds, so that it holds the bias.

    options: by ("mean", or "midrange"), targets (o_in, the one input that can be moved). Raises CalibrationError
    without rows, or without a second look at the data.
    """
    require_known(options, "shift", ("by", "targets"))
    if block.sample is None or block.look is None:
        raise CalibrationError(
            f"{block.prefix}: shift needs rows of o_in and a second look behind it, and there is no model to run: "
            "use --from collect"
        )
    rows, by = block.sample(SHIFT_TARGETS)["o_in"], str(options.get("by", "mean"))
    found = head_shift(rows, block.config.num_kv_heads, block.config.head_dim, by == "midrange")
    stored = found.astype(STORAGE[block.variant.dtype]).astype(found.dtype)
    entry = Entry(
        name=f"{block.prefix}.self_attn.v_proj.shift",
        kind="offset",
        format="float32",
        granularity="channel",
        scale=stored,
        zero=None,
        absmax=abs(stored),
        group_size=None,
        observer="shift",
        reason=f"{by} of {len(rows)} rows of o_in, over the query heads of each KV head",
        loss=None,
    )
    return [entry]


def behind_shift(block: Block, table: ScaleTable) -> Block:
    """The block with the statistics and rows of what its shift moves as they are behind it; without one, the block."""
    shifts = tap_shifts(block.layer, table, block.config)
    if not shifts or block.look is None or block.sample is None:
        return block
    sample = block.sample

    def moved(taps: Collection[str]) -> dict[str, F32]:
        return {tap: x - shifts[tap] if tap in shifts else x for tap, x in sample(taps).items()}

    seen: dict[str, Statistics] = block.look({}, shifts)
    return replace(block, statistics={**block.statistics, **seen}, sample=moved)


TRANSFORMS.add("shift", Transform(shift, targets=SHIFT_TARGETS))
