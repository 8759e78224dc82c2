"""Int4, 16 codes -8..7, eight to an int32 word in a checkpoint. Symmetric: scale = absmax / 7.5.

All 16 codes are used: the range ±7.5 steps is cut into 16 cells of one step, so no value is further than half a
step from its code. docs/numerics.md compares this with /7 and /8.
"""

from __future__ import annotations

import numpy as np

from quantbench.quantizers.formats.format import FORMATS, Format
from quantbench.scales.table import DIVISORS

INT4 = FORMATS.add("int4", Format("int4", 4, -8, 7.0, DIVISORS["int4"], np.dtype(np.int8), np.dtype(np.int32)))
