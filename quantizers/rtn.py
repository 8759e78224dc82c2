"""Round to nearest: every weight goes to the code nearest to it under the scale that calibration decided."""

from __future__ import annotations

from quantbench.quantizers.weight import QuantizedWeight, quantize_weight
from quantbench.scales.arrays import F32
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry


def rtn(w: F32, entry: Entry, statistics: Statistics | None) -> QuantizedWeight:
    """w [N, K] float32 -> codes. Cost: one pass. `statistics` of the input are not needed."""
    return quantize_weight(w, entry)
