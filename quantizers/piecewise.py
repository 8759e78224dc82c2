"""Piecewise search, PaddleNLP's "adaptive shift-smooth": channels of like size get an alpha and a scale of their own.

One alpha must suit the few outlier channels and the many ordinary ones. Here the channels are clustered by the
logarithm of their largest |x| into k pieces (Lloyd 1982, one dimension), and piece by piece, largest first, the factors

    s[c] = scale * act[c]^alpha / weight[c]^(1 - alpha)      (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, eq. 4)

are searched while those of the other pieces stand. It starts from the best single alpha, so it is never worse. Cost:
13 + 12 k losses of quantizers/smooth_search.py. Use it for static scales where a searched alpha does not suffice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantbench.quantizers.smooth import smooth_factors
from quantbench.quantizers.smooth_search import Pair, search_alpha
from quantbench.scales.arrays import F32, I64

_LLOYD_STEPS = 100


@dataclass(frozen=True)
class Channels:
    """What is divided: largest |x| and |W| per channel of the source [S], and how its factors reach the input.

    carried(f32[S]) -> the factors as the source can hold them; spread(f32[S]) -> f32[K], one per input channel.
    """

    act: F32
    weight: F32
    carried: Callable[[F32], F32]
    spread: Callable[[F32], F32]

    def factors(self, alpha: float) -> F32:
        return self.carried(smooth_factors(self.act, self.weight, alpha))


@dataclass(frozen=True)
class PieceGrid:
    """What is tried for each piece: four alphas and three scales (evenly, and by equal ratios) between the ends."""

    pieces: int = 3
    alpha: tuple[float, float] = (0.2, 0.8)
    scale: tuple[float, float] = (1.0, 5.0)

    def candidates(self) -> list[tuple[float, float]]:
        scales = np.geomspace(*self.scale, 3) if self.scale[0] != self.scale[1] else [self.scale[0]]
        return [(float(a), float(s)) for a in np.unique(np.linspace(*self.alpha, 4)) for s in scales]


@dataclass(frozen=True)
class Pieces:
    """Factors of the source [S], the pieces' words ("12 channels: alpha 0.6 x 2.24"), the loss, and that without."""

    factors: F32
    words: tuple[str, ...]
    loss: float
    plain: float


def search_pieces(pair: Pair, channels: Channels, grid: PieceGrid) -> Pieces:
    """Never worse than search_alpha, which is where it starts. Deterministic."""
    start = search_alpha(pair, lambda alpha: channels.spread(channels.factors(alpha)))
    first = "left" if start.alpha is None else f"alpha {start.alpha:g}"
    factors = np.ones_like(channels.act) if start.alpha is None else channels.factors(start.alpha)
    best, words = start.loss, []
    labels = clusters(channels.act, grid.pieces)
    for piece in range(int(labels.max()), -1, -1):
        here, word, chosen = labels == piece, first, factors
        for alpha, scale in grid.candidates():
            tried = np.where(here, smooth_factors(channels.act, channels.weight, alpha) * np.float32(scale), factors)
            tried = channels.carried(tried.astype(np.float32))
            loss = pair.loss(channels.spread(tried))
            if loss < best:
                best, chosen, word = loss, tried, f"alpha {alpha:.2g} x {scale:.3g}"
        factors = chosen
        words.append(f"{np.count_nonzero(here)} channels: {word}")
    return Pieces(factors, tuple(words), best, start.plain)


def clusters(act: F32, pieces: int) -> I64:
    """Number of the piece of every channel [S], 0 the smallest: k-means of log2 |x|, started evenly.

    Channels that are always zero belong to piece 0. Fewer pieces where there are fewer different sizes.
    """
    alive = act > 0
    if not alive.any():
        return np.zeros(act.size, np.int64)
    size = np.log2(np.where(alive, act, act[alive].min()).astype(np.float64))
    centres = np.unique(np.linspace(size.min(), size.max(), pieces))
    for _ in range(_LLOYD_STEPS):
        labels = np.abs(size[:, None] - centres).argmin(axis=1)
        moved = np.array([size[labels == i].mean() for i in np.unique(labels)])
        if moved.shape == centres.shape and np.array_equal(moved, centres):
            break
        centres = moved
    return np.unique(np.abs(size[:, None] - centres).argmin(axis=1), return_inverse=True)[1]
