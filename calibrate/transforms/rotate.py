"""Recipe word `rotate`: quantizers/rotation.py. It comes first: the model that the blocks are read from is turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.scales.table import Entry, ScaleTable


def rotate(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """Nothing: `block` is turned already (calibrate/rotated.py), and a rotation has no factors to be found.

    options: seed (0), r2 (true).
    """
    require_known(options, "rotate", ("seed", "r2"))
    return []


TRANSFORMS.add("rotate", Transform(rotate, targets=()))
