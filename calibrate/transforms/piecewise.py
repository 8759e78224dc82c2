"""Recipe word `piecewise`: factors searched for clusters of channels; quantizers/piecewise.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.calibrate.transforms.target import Target, quantized_taps, readers, smooth_entry, told
from quantbench.quantizers.piecewise import PieceGrid, search_pieces
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import DEFAULT_TARGETS


def piecewise(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """Factors searched for clusters of channels: quantizers/piecewise.py.

    options: pieces (3), alpha ([0.2, 0.8]), scale ([1, 5]), targets (default attn_in, mlp_in, down_in).
    """
    require_known(options, "piecewise", ("pieces", "alpha", "scale", "targets"))
    low, high = options.get("alpha", (0.2, 0.8))
    least, most = options.get("scale", (1.0, 5.0))
    grid = PieceGrid(int(options.get("pieces", 3)), (low, high), (least, most))
    decided = ScaleTable.merge(table)
    for tap in quantized_taps(block, options.get("targets", DEFAULT_TARGETS)):
        target = Target.of(block, tap, decided)
        channels = target.channels()
        found = search_pieces(target.pair(), channels, grid)
        why = f"piecewise ({'; '.join(found.words)}): {told(found.loss, found.plain, readers(target))}"
        decided.add(smooth_entry(target, found.factors, why))
    return [entry for entry in decided if entry.name not in table]


TRANSFORMS.add("piecewise", Transform(piecewise))
