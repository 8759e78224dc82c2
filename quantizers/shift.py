"""Shift (cf. Outlier Suppression+, Wei et al. 2023, arXiv 2304.09145, section 4.1): a channel's middle moved to zero.

x W^T = (x - s) W^T + s W^T: what reads the input sees it centred, and a bias gives back the constant. The subtraction
costs nothing only where what produces x can carry it. In a pre-norm decoder of RMS norms and SwiGLU that is one place:
o_proj's input. Every head's output is a mean of values, with weights that add up to 1, so that values moved by s move
it by s: v_proj's bias carries -s, shared by the query heads of a KV head, and o_proj's bias carries W s. An RMS norm
has no bias, and a constant does not pass SwiGLU's product. The V cache holds the centred values, too.

s is the mean of a channel (the least square error for dynamic and wide ranges) or the middle of its range (the least
range). Cost: one pass over o_proj. Use it where the inputs of o_proj, or V, have means far from zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantbench.quantizers.bias_correction import tempered_mean
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.smooth import repeat_heads
from quantbench.scales.arrays import F32

_V, _O = "self_attn.v_proj", "self_attn.o_proj"


def head_shift(x: F32, kv_heads: int, head_dim: int, midrange: bool = False) -> F32:
    """s[KV*d], float32, from rows x [T, H*d] of o_proj's input: one value for all query heads of a KV head.

    The mean over tokens and heads, in which the rows of giants count for less (tempered_mean); or the middle between
    the smallest and the largest value. Raises CalibrationError for NaN or Inf.
    """
    require_finite(x, "shift: the rows of o_in")
    if midrange:
        low, high = (f(x, axis=0).reshape(kv_heads, -1, head_dim) for f in (np.min, np.max))
        return np.asarray((low.min(axis=1) + high.max(axis=1)) / 2, np.float32).reshape(-1)
    mean = tempered_mean(x, x).reshape(kv_heads, -1, head_dim).mean(axis=1)
    return np.asarray(mean, np.float32).reshape(-1)


def fold_shift(weights: Mapping[str, F32], shift: F32, heads: int, head_dim: int) -> dict[str, F32]:
    """The biases of a block's v_proj [KV*d] and o_proj [D] when its values move down by shift [KV*d]."""
    spread = repeat_heads(shift, heads, head_dim).astype(np.float64)
    given_back = (weights[f"{_O}.weight"].astype(np.float64) @ spread).astype(np.float32)
    nothing = {_V: np.zeros_like(shift), _O: np.zeros_like(given_back)}
    old = {name: weights.get(f"{name}.bias", zeros) for name, zeros in nothing.items()}
    return {f"{_V}.bias": old[_V] - shift, f"{_O}.bias": old[_O] + given_back}
