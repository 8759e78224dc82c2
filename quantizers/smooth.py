"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move the outliers of an activation into the weights behind it.

y = x W^T = (x / s)(W s)^T: dividing input channel c by s[c] and multiplying column c of every linear behind it by s[c]
leaves the float model unchanged. The division costs nothing when it is folded into what produces x: a norm's weight,
or the output rows of v_proj (attention only mixes tokens) and up_proj (SwiGLU is linear in it). Cost: one pass over
the weights. Use it when inputs are quantized and some channels are much larger than the rest.
"""

from __future__ import annotations

import numpy as np

from quantbench.errors import RecipeError
from quantbench.scales.arrays import F32

_LEAST, _MOST = 2.0**-16, 2.0**16  # a factor outside this says the statistics are of a dead channel


def smooth_factors(act_absmax: F32, weight_absmax: F32, alpha: float) -> F32:
    """s[K] = act^alpha / weight^(1 - alpha), eq. 4, float64 inside, float32 out, within 2^±16.

    act_absmax [K]: largest |x| per channel; weight_absmax [K]: largest |W| per column over *all* linears that read the
    channel. A channel that is zero in either keeps factor 1. Raises RecipeError unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(
            f"smooth.alpha is {alpha}; it is between 0 (all of the range stays in x) and 1 (all moves to W)"
        )
    act, weight = act_absmax.astype(np.float64), weight_absmax.astype(np.float64)
    alive = (act > 0) & (weight > 0)
    act, weight = np.where(alive, act, 1.0), np.where(alive, weight, 1.0)
    factors = np.clip(act**alpha / weight ** (1 - alpha), _LEAST, _MOST)
    return np.where(alive, factors, 1.0).astype(np.float32)


def storable_factors(norm: F32, factors: F32, dtype: np.dtype[np.generic]) -> F32:
    """The factors nearest to `factors` for which norm / factors is exact in the dtype that the norm is stored in.

    Otherwise rounding norm / s to bfloat16 would add an error of up to 2^-9 that the columns W s do not undo.
    """
    stored = (norm / factors).astype(dtype).astype(np.float32)
    safe = np.where(stored != 0, stored, np.float32(1))
    return np.where(stored != 0, norm / safe, np.float32(1)).astype(np.float32)


def fold_into_norm(norm: F32, factors: F32) -> F32:
    """The norm's weight [C] whose output is divided by factors [C]."""
    return norm / factors


def fold_into_outputs(weight: F32, bias: F32 | None, factors: F32) -> tuple[F32, F32 | None]:
    """Weight [N, K] and bias [N] of a linear whose output channel n is divided by factors[n]."""
    return weight / factors[:, None], None if bias is None else bias / factors


def fold_into_inputs(weight: F32, factors: F32) -> F32:
    """Weight [N, K] of a linear whose input channel k has been divided by factors[k]."""
    return weight * factors


def tie_heads(values: F32, kv_heads: int, head_dim: int) -> F32:
    """[H*d] -> [KV*d]: the largest over the query heads that share a KV head (head h reads KV head h // (H/KV))."""
    return np.asarray(values.reshape(kv_heads, -1, head_dim).max(axis=1)).reshape(-1)


def repeat_heads(values: F32, heads: int, head_dim: int) -> F32:
    """[KV*d] -> [H*d]: each KV head's values for every query head that reads it."""
    by_head = values.reshape(-1, head_dim)
    return np.repeat(by_head, heads // len(by_head), axis=0).reshape(-1)
