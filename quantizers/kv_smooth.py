"""Smoothing of keys for a quantized cache: every channel of a KV head fills the head's one range.

q . k = sum (q s)(k / s): dividing channel c of the keys by s[c] and multiplying it in the queries leaves every score as
it was. A key's error in a score is the sum of q[c]^2 times the square of the channel's step, and the step of channel c
is s[c] * max(absmax / s) / qmax: the least s[c] that leaves the maximum at 1 is absmax[c] itself, whatever q is. So
alpha = 1 (in effect a scale per channel) is best where the text is like that of calibration; a smaller one leaves room
in channels that were small there. RoPE mixes channels i and i + d/2 of a head by the token's position, so the two
share a factor, the larger (cf. KVQuant, Hooper et al. 2024, arXiv 2401.18079, section 3.1, which quantizes before RoPE
instead). Cost: one pass over q_proj and k_proj. Use it with c8 and c8_fp8 wherever a few channels of K stand out, most
of all where k_proj has a bias (Qwen2).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantbench.errors import RecipeError
from quantbench.quantizers.smooth import repeat_heads
from quantbench.scales.arrays import F32

_LEAST, _MOST = 2.0**-16, 2.0**16  # as in smooth.py: a factor outside this says that the channel is dead
_K, _Q = "self_attn.k_proj", "self_attn.q_proj"
_K_NORM, _Q_NORM = "self_attn.k_norm.weight", "self_attn.q_norm.weight"


def key_factors(absmax: F32, kv_heads: int, alpha: float = 1.0, shared: bool = False) -> F32:
    """s[KV*d], float32, from the largest |k| after RoPE of every channel [KV*d]; their geometric mean is 1 per head.

    shared: one set of factors for all heads, as the norms of q and k need (Qwen3). A pair that is always zero keeps
    factor 1. Raises RecipeError unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"kv_smooth.alpha is {alpha}; it is between 0 (K stays as it is) and 1 (channels alike)")
    pairs = absmax.astype(np.float64).reshape(kv_heads, 2, -1).max(axis=1)  # [KV, d/2]
    if shared:
        pairs = np.broadcast_to(pairs.max(axis=0), pairs.shape)
    alive = pairs > 0
    logs = alpha * np.log2(np.where(alive, pairs, 1.0))
    mean = (logs * alive).sum(axis=1, keepdims=True) / np.maximum(alive.sum(axis=1, keepdims=True), 1)
    factors = np.where(alive, np.clip(np.exp2(logs - mean), _LEAST, _MOST), 1.0)
    return np.asarray(np.repeat(factors[:, None, :], 2, axis=1).reshape(-1), np.float32)


def powers_of_two(factors: F32) -> F32:
    """The nearest power of two of each: dividing a stored float by it and multiplying another is exact."""
    return np.asarray(np.exp2(np.rint(np.log2(factors))), np.float32)


def fold_into_keys(weights: Mapping[str, F32], factors: F32, heads: int, head_dim: int) -> dict[str, F32]:
    """The tensors of a block that change when its keys are divided by factors [KV*d], by name within the block.

    Behind norms of q and k (Qwen3) these hold the factors, which are then the same for every head.
    """
    if _K_NORM in weights:
        one = factors[:head_dim]
        return {_K_NORM: weights[_K_NORM] / one, _Q_NORM: weights[_Q_NORM] * one}
    spread = repeat_heads(factors, heads, head_dim)
    changed = {
        f"{_K}.weight": weights[f"{_K}.weight"] / factors[:, None],
        f"{_Q}.weight": weights[f"{_Q}.weight"] * spread[:, None],
    }
    if f"{_K}.bias" in weights:
        changed |= {f"{_K}.bias": weights[f"{_K}.bias"] / factors, f"{_Q}.bias": weights[f"{_Q}.bias"] * spread}
    return changed
