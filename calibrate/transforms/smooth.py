"""Recipe word `smooth`: SmoothQuant with a fixed or searched alpha; quantizers/smooth.py and smooth_search.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.calibrate.transforms.target import Target, quantized_taps, readers, smooth_entry, told
from quantbench.quantizers.smooth_search import search_alpha
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import DEFAULT_TARGETS


def smooth(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """SmoothQuant factors of every target whose linears have quantized inputs; quantizers/smooth.py has the formula.

    options: alpha (0.5; "search": quantizers/smooth_search.py), targets (default attn_in, mlp_in, down_in).
    """
    require_known(options, "smooth", ("alpha", "targets"))
    decided = ScaleTable.merge(table)
    for tap in quantized_taps(block, options.get("targets", DEFAULT_TARGETS)):
        decided.add(_entry(Target.of(block, tap, decided), options.get("alpha", 0.5)))
    return [entry for entry in decided if entry.name not in table]


def _entry(target: Target, alpha: float | str) -> Entry:
    channels, behind = target.channels(), readers(target)
    if alpha != "search":
        why = f"SmoothQuant alpha {float(alpha):g} between the input and the weights of {behind}"
        return smooth_entry(target, channels.factors(float(alpha)), why)
    found = search_alpha(target.pair(), lambda a: channels.spread(channels.factors(a)))
    if found.alpha is None:
        why = f"no alpha lowers the output error of {behind} ({found.plain:.3g})"
        return smooth_entry(target, np.ones_like(channels.act), why)
    why = f"SmoothQuant alpha {found.alpha:g}, searched: {told(found.loss, found.plain, behind)}"
    return smooth_entry(target, channels.factors(found.alpha), why)


TRANSFORMS.add("smooth", Transform(smooth))
