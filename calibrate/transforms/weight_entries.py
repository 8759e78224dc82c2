"""The weight scales of one block: one entry per quantized linear, under ranges that a function chooses.

Per-tensor FP8 scales of a fused group (q/k/v, gate/up) are tied to the largest of the group, as the runtime fuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from quantbench.calibrate.transforms.block import Block
from quantbench.infer.models import LINEARS, TAPS
from quantbench.infer.models.family import Linear
from quantbench.quantizers.weight_range import WeightRange, weight_entry
from quantbench.scales.arrays import F32
from quantbench.scales.table import Entry
from quantbench.vocabulary import LayerPlan

RangeOf = Callable[[F32, LayerPlan, str], WeightRange]  # weight [N, K], its plan, the tap it reads


def weight_entries(
    block: Block, folded: Mapping[str, F32], range_of: RangeOf, taps: Collection[str] = TAPS
) -> Iterator[Entry]:
    """An entry for every quantized linear that reads one of `taps`; `folded`: weights behind the transforms."""
    for group in fused_groups():
        plans = [
            (p, folded[f"{line.name}.weight"]) for line in group if line.tap in taps and (p := block.plan(line.name))
        ]
        tied = [p for p, _ in plans if p.weights == "fp8_e4m3" and p.granularity == "tensor"]
        ranges = {p.name: range_of(w, p, group[0].tap) for p, w in plans}
        largest = max((float(ranges[p.name].high[0]) for p in tied), default=0.0)
        for plan, w in plans:
            chosen, note = ranges[plan.name], ""
            if len(tied) > 1 and plan in tied:
                high = np.array([largest], np.float32)
                chosen, note = WeightRange(-high, high), f", the largest of {short(tied)}"
            yield weight_entry(w, plan, chosen, note)


def fused_groups() -> list[list[Linear]]:
    """The linears of a block as the runtime fuses them; those of a group read one tap."""
    labels = list(dict.fromkeys(line.fused for line in LINEARS))
    return [[line for line in LINEARS if line.fused == label] for label in labels]


def short(plans: Sequence[LayerPlan]) -> str:
    """ "q_proj, k_proj" """
    return ", ".join(p.name.split(".")[-1] for p in plans)
