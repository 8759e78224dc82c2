"""Recipe word `bias_correction`: the mean of what quantizing adds to an output, taken back by a bias.

It comes last: inputs must have their scales. The table keeps the means of an input, and of what is served in its place;
apply.py, which has the codes, makes the biases of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantbench.calibrate.apply import tap_factors
from quantbench.calibrate.biases import WORD, corrected_taps
from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.calibrate.transforms.target import weight_taps
from quantbench.errors import CalibrationError
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.bias_correction import tempered_mean
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.arrays import F32
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import LayerPlan


def bias_correction(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """One entry per target: the means of its float and of its quantized rows.

    options: targets (default: every input whose linears can hold a bias). Raises CalibrationError without rows.
    """
    require_known(options, WORD, ("targets",))
    taps = weight_taps(block, corrected_taps(block.variant, block.config))
    if taps and block.sample is None:
        raise CalibrationError(
            f"{block.prefix}: {WORD} needs rows of {', '.join(taps)}, and there is no model to run: use --from collect"
        )
    rows = block.sample(taps) if block.sample else {}
    factors = tap_factors(block.layer, table, block.config)
    return [_entry(block, tap, rows[tap] * factors.get(tap, np.float32(1)), table) for tap in taps]


def _entry(block: Block, tap: str, x: F32, table: ScaleTable) -> Entry:
    plan = block.plans(tap)[0]
    served = x if plan.activations is None else _served(x, plan, table)
    return Entry(
        name=f"{block.prefix}.{tap}.{WORD}",
        kind="offset",
        format="float32",
        granularity="channel",
        scale=tempered_mean(x, served).astype(np.float32),
        zero=None,
        absmax=tempered_mean(x, x).astype(np.float32),
        group_size=None,
        observer=WORD,
        reason=f"means of {len(x)} rows of {tap} in float and as served",
        loss=None,
    )


def _served(x: F32, plan: LayerPlan, table: ScaleTable) -> F32:
    record = FORMATS[str(plan.activations)]
    scale = None if plan.dynamic else float(table[f"{plan.name}.input"].scale[0])
    codes, scales = quantize_activation(x, record.name, scale)
    return record.decode(codes, scales[:, None] if plan.dynamic else scales)


TRANSFORMS.add(WORD, Transform(bias_correction, targets=(), last=True))
