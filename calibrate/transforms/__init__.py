"""The recipe's transforms, decided for one block: one file per recipe word, each adds its entries to the scale table.

Mathematics is in quantizers/; here is which input belongs to which linears, and what a search tries on. Every
transform sees the block behind those before it. apply.py folds what is decided. Importing this registers them all.
"""

from quantbench.calibrate.transforms import awq, bias_correction, clip, kv_smooth, piecewise, rotate, shift, smooth
from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Reobserve, Sample, Transform, hessian_taps

__all__ = [
    "TRANSFORMS",
    "Block",
    "Reobserve",
    "Sample",
    "Transform",
    "awq",
    "bias_correction",
    "clip",
    "hessian_taps",
    "kv_smooth",
    "piecewise",
    "rotate",
    "shift",
    "smooth",
]
