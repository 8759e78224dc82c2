"""FP8 E4M3 (finite variant, ±448, no infinity): Micikevicius et al. 2022, arXiv 2209.05433, table 1.

The cast rounds to nearest even; values are clipped first, because the bare cast turns what is above 464 into NaN.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from quantbench.quantizers.formats.format import FORMATS, Format
from quantbench.scales.table import DIVISORS

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_E4M3 = FORMATS.add("fp8_e4m3", Format("fp8_e4m3", 8, -448, 448.0, DIVISORS["fp8_e4m3"], E4M3, E4M3))
