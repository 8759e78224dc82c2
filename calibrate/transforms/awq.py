"""Recipe word `awq`: factors that make the weights of large inputs round better; quantizers/awq.py.

Where inputs stay float the Hessian stands for them, so that saved statistics suffice. Where they are quantized, too,
the same candidates are tried on sampled rows, with the error of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.calibrate.transforms.target import Target, readers, smooth_entry, weight_taps
from quantbench.quantizers.awq import AwqGrid, AwqScale, Reader, awq_scale, awq_search
from quantbench.quantizers.output_loss import round_trip
from quantbench.scales.arrays import F32
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, LayerPlan

ROWS = 256  # outputs of each linear that the search looks at: half the time of 512, as a rule the same factors


def awq(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """Factors of every target that quantized linears read.

    options: steps (20), balance (true), targets (all four). Raises CalibrationError where a Hessian, or rows of a
    quantized input, cannot be had.
    """
    require_known(options, "awq", ("steps", "balance", "targets"))
    decided = ScaleTable.merge(table)
    for tap in weight_taps(block, options.get("targets", SMOOTH_TARGETS)):
        target = Target.of(block, tap, decided)
        found = _search(target, int(options.get("steps", 20)), bool(options.get("balance", True)))
        decided.add(smooth_entry(target, target.carried(found.factors), _reason(found, readers(target)), "awq"))
    return [entry for entry in decided if entry.name not in table]


def _reason(found: AwqScale, behind: str) -> str:
    if found.loss >= found.plain_loss:
        return f"no AWQ factors lower the output error of {behind}"
    how = f"AWQ alpha {found.alpha:g}" + (", balanced by the weights" if found.balanced else "")
    return f"{how}: output error of {behind} {found.loss / found.plain_loss:.3g} of that without"


def _search(target: Target, steps: int, balance: bool) -> AwqScale:
    def tie(factors: F32) -> F32:
        return target.expanded(target.storable(target.carried(factors)))

    grid = AwqGrid(steps, balance, ROWS, tie)
    plans = target.quantized()
    if all(p.activations is None for p, _ in plans):
        some = [Reader(p.name, w, partial(round_trip, plan=p)) for p, w in plans]
        return awq_scale(some, target.seen, grid)
    pair = target.pair()
    return awq_search(pair.weights, np.abs(pair.inputs).mean(axis=0, dtype=np.float64), grid, pair.loss)


def _needs_hessian(plan: LayerPlan) -> bool:
    return plan.activations is None


TRANSFORMS.add("awq", Transform(awq, targets=SMOOTH_TARGETS, needs_hessian=_needs_hessian))
