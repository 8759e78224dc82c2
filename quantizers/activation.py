"""Quantization of activations [tokens, channels]: static (one calibrated scale) or dynamic (one scale per token)."""

from __future__ import annotations

import numpy as np

from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.arrays import F32, Array


def quantize_activation(x: F32, format: str, scale: float | None) -> tuple[Array, F32]:
    """Codes [T, K] and their scale: f32[1] where `scale` is given, else f32[T], absmax of each row / divisor.

    Raises CalibrationError for NaN or Inf in `x`.
    """
    require_finite(x, "activation")
    record = FORMATS[format]
    if scale is not None:
        static = np.array([scale], np.float32)
        return record.encode(x, static), static
    dynamic = record.scale_of(np.abs(x).max(axis=1, initial=0))
    return record.encode(x, dynamic[:, None]), dynamic
