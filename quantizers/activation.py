"""Quantization of activations [tokens, channels]: static (one calibrated scale) or dynamic (one scale per token); and
of the heads of K and V, under a dynamic scale each."""

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
    if scale is None:
        return _by_rows(x, format)
    static = np.array([scale], np.float32)
    return FORMATS[format].encode(x, static), static


def quantize_heads(x: F32, format: str) -> tuple[Array, F32]:
    """Codes and scale f32[...] of K or V [..., head_dim]: a scale per token and head.

    Raises CalibrationError for NaN or Inf in `x`.
    """
    require_finite(x, "K or V")
    return _by_rows(x, format)


def _by_rows(x: F32, format: str) -> tuple[Array, F32]:
    scale = FORMATS[format].scale_of(np.abs(x).max(axis=-1, initial=0))
    return FORMATS[format].encode(x, scale[..., None]), scale
