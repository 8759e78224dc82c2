"""The ranges behind the scales: what each tap reached before and after a transform, and K and V per head."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantbench.reports.arrays import Taps
from quantbench.reports.gather import Run
from quantbench.reports.layers import transformed_taps

LINEAR_TAPS = ("attn_in", "o_in", "mlp_in", "down_in")


def tap_ranges(run: Run) -> dict[str, Any]:
    """{"float": {tap: series}, "after": {variant: {tap: series}}}; a series has lists over blocks.

    `after` holds variants that saw other inputs than the float model: from their own statistics where recorded, else
    from the channels' ranges divided by the factors of their transforms (there p999 is unknown)."""
    after = {}
    for variant in run.scales:
        if variant in run.statistics:
            after[variant] = _series(run.statistics[variant])
        elif changed := _divided(run, variant):
            after[variant] = changed
    return {"float": _series(run.statistics.get("", {})), "after": after}


def _series(taps: Taps) -> dict[str, Any]:
    return {
        tap: {
            "blocks": [block for block in sorted(taps) if tap in taps[block]],
            "absmax": [float(taps[block][tap].absmax.max()) for block in sorted(taps) if tap in taps[block]],
            "p999": [_p999(taps, block, tap) for block in sorted(taps) if tap in taps[block]],
        }
        for tap in LINEAR_TAPS
        if any(tap in block for block in taps.values())
    }


def _p999(taps: Taps, block: int, tap: str) -> float | None:
    found = taps[block][tap].p999
    return None if found is None else float(found.max())


def _divided(run: Run, variant: str) -> dict[str, Any]:
    taps = run.statistics.get("", {})
    series: dict[str, Any] = {}
    for (block, tap), entry in sorted(transformed_taps(run.scales[variant]).items()):
        seen = taps.get(block, {}).get(tap)
        if seen is None or seen.channel_absmax.size != entry.scale.size:
            continue
        one = series.setdefault(tap, {"blocks": [], "absmax": [], "p999": []})
        one["blocks"].append(block)
        one["absmax"].append(float(np.max(seen.channel_absmax / entry.scale)))
        one["p999"].append(None)
    return series


def cache_ranges(run: Run) -> dict[str, Any]:
    """{"k": [[absmax per head] per block], "v": …} of the float stream; {} where K and V were not observed."""
    taps = run.statistics.get("", {})
    found = {
        part: [[float(x) for x in taps[block][part].absmax] for block in sorted(taps) if part in taps[block]]
        for part in ("k", "v")
    }
    return {part: rows for part, rows in found.items() if rows}
