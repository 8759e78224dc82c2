"""Number formats, one file each. `FORMATS[name]` is a `Format` record."""

from quantbench.quantizers.formats.format import FORMATS, Format
from quantbench.quantizers.formats.fp8_e4m3 import E4M3, FP8_E4M3
from quantbench.quantizers.formats.int4 import INT4
from quantbench.quantizers.formats.int8 import INT8

__all__ = ["E4M3", "FORMATS", "FP8_E4M3", "INT4", "INT8", "Format"]
