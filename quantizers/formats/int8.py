"""Symmetric int8: 255 codes, -128 unused so that negation is exact and the range is the same on both sides."""

from __future__ import annotations

import numpy as np

from quantbench.quantizers.formats.format import FORMATS, Format
from quantbench.scales.table import DIVISORS

INT8 = FORMATS.add("int8", Format("int8", 8, -127, 127.0, DIVISORS["int8"], np.dtype(np.int8), np.dtype(np.int8)))
