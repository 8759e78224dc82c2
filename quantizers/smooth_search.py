"""Which factors smooth best: try them on a sample of real inputs, and keep those of the least error at the output.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, section 4) fixes alpha for a model; how far outliers stand out differs
from layer to layer, and for fused linears what counts is the error of all of them. Cost: one product of the sample
with the sampled weights per candidate. Use it wherever inputs get a static scale; a dynamic one gains less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantbench.scales.arrays import F32

TENTHS = tuple(i / 10 for i in range(10))  # alpha 1 makes all channels equally large: whatever is new saturates
RoundInput = Callable[[F32, F32], F32]  # x [T, K] and the largest |x| of its channels [K] -> what quantization leaves
RoundWeight = Callable[[int, F32], F32]  # number of the linear and its W [N, K] -> what quantization leaves


@dataclass(frozen=True)
class Pair:
    """An input and the linears that read it. Float32 all over.

    inputs [T, K]: rows sampled from calibration; absmax [K]: largest |x| of every channel over all of calibration;
    weights: [N, K] of each linear (rows may be sampled too).
    """

    inputs: F32
    absmax: F32
    weights: tuple[F32, ...]
    round_input: RoundInput
    round_weight: RoundWeight

    @cached_property
    def outputs(self) -> tuple[F32, ...]:
        return tuple(self.inputs @ w.T for w in self.weights)

    def loss(self, factors: F32) -> float:
        """Mean over tokens and linears of |y - y'|^2 / |y|^2 where x is divided by factors [K] and W multiplied.

        Relative per token: a plain sum of squares would be that of the few attention-sink tokens, whose hidden
        states are hundreds of times the others'.
        """
        x = self.round_input(self.inputs / factors, self.absmax / factors)
        total = 0.0
        for i, (w, y) in enumerate(zip(self.weights, self.outputs, strict=True)):
            error = np.square(x @ self.round_weight(i, w * factors).T - y).sum(axis=1, dtype=np.float64)
            energy = np.square(y).sum(axis=1, dtype=np.float64)
            total += float(np.mean(error / np.maximum(energy, 1e-6 * energy.mean() + 1e-30)))
        return total / len(self.weights)


@dataclass(frozen=True)
class Found:
    """The best factors [K], the alpha they came from (None: no smoothing was best), the loss with and without."""

    factors: F32
    alpha: float | None
    loss: float
    plain: float


def search_alpha(pair: Pair, factors_of: Callable[[float], F32]) -> Found:
    """The best of alpha 0, 0.1 … 0.9, of the twentieths beside it, and of no smoothing at all.

    factors_of(alpha) -> f32[K]. The smaller alpha wins a tie, no smoothing wins against all. Deterministic.
    """
    nothing = np.ones_like(pair.absmax)
    plain = pair.loss(nothing)
    losses = {alpha: pair.loss(factors_of(alpha)) for alpha in TENTHS}
    near = min(losses, key=losses.__getitem__)
    for alpha in (near - 0.05, near + 0.05):
        if TENTHS[0] <= alpha <= TENTHS[-1]:
            losses[alpha] = pair.loss(factors_of(alpha))
    best = min(losses, key=losses.__getitem__)
    if losses[best] >= plain:
        return Found(nothing, None, plain, plain)
    return Found(factors_of(best), best, losses[best], plain)
