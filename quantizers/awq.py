"""AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): grow the weights that large inputs meet before rounding them.

y = x W^T = (x / s)(W s)^T, as in SmoothQuant, but s is searched for the weights' sake: s = a^alpha, a[k] the magnitude
of input channel k, for `steps` values of alpha from 0 on, and once more divided by m^(1 - alpha), m[k] the mean of |W|
over the outputs relative to each output's largest (the weight normalisation of the authors' code). The candidate with
the least error of the outputs of *all* linears that read the input wins; alpha 0 without m is s = 1, so the result is
never worse than round-to-nearest. The error is taken through the Hessian (output_loss.py), so no activation is kept.

Cost: 2 steps round trips and products, each 2 N K^2 operations in float32, over all N outputs that share the input;
`rows` bounds the N of each linear. Use it for 4-bit weights with float inputs, before or instead of GPTQ; int8 per
channel gains little. Where the factors are folded into a norm, smooth.storable_factors makes them exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.errors import RecipeError
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.output_loss import hessian_of, row_losses
from quantbench.scales.arrays import F32, F64
from quantbench.scales.statistics import Statistics

_LEAST, _MOST = 2.0**-16, 2.0**16  # as in smooth.py: a factor outside this says the statistics are of a dead channel


@dataclass(frozen=True)
class Reader:
    """One linear that reads the scaled input: its weight [N, K] and what quantizing makes of a weight [N, K]."""

    name: str
    weight: F32
    round_trip: Callable[[F32], F32]


@dataclass(frozen=True)
class AwqGrid:
    """What is tried. steps: alpha = 0, 1/steps, ... below 1. balance: also with the weight normalisation.

    rows: about so many outputs of each reader are looked at, evenly spaced (0: all). tie: maps factors [K] to the
    nearest that can be folded, e.g. equal for all query heads that share a KV head.
    """

    steps: int = 20
    balance: bool = True
    rows: int = 512
    tie: Callable[[F32], F32] | None = None


@dataclass(frozen=True)
class AwqScale:
    """factors f32[K]: the input is divided by them, the readers' columns multiplied. Losses are over the rows seen."""

    factors: F32
    alpha: float
    balanced: bool
    loss: float
    plain_loss: float  # of factors 1


def awq_scale(
    readers: Sequence[Reader], statistics: Statistics | None, grid: AwqGrid | None = None, magnitude: F32 | None = None
) -> AwqScale:
    """The best factors for one input that stays float and all linears that read it.

    statistics: of that input, with its Hessian [K, K]. magnitude f32[K]: the paper's mean of |x| per channel; the root
    mean square, which the Hessian's diagonal holds, unless given. A channel that is zero in the input or in every
    weight keeps factor 1. Raises CalibrationError without a Hessian or for NaN or Inf, RecipeError for steps < 1.
    """
    grid = grid or AwqGrid()
    hessian = hessian_of(statistics, readers[0].name, "awq")
    for reader in readers:
        require_finite(reader.weight, f"{reader.name}.weight")
    seen = [_Seen(reader, grid.rows) for reader in readers]
    narrow = hessian.astype(np.float32)
    act = np.sqrt(np.diagonal(hessian)) if magnitude is None else magnitude.astype(np.float64)
    found = awq_search([reader.weight for reader in readers], act, grid, lambda factors: _loss(seen, factors, narrow))
    plain, loss = (_loss(seen, f, hessian) for f in (np.ones_like(found.factors), found.factors))
    if loss >= plain:  # float32 told them apart by its last digits
        return AwqScale(np.ones_like(found.factors), 0.0, False, plain, plain)
    return AwqScale(found.factors, found.alpha, found.balanced, loss, plain)


def awq_search(weights: Sequence[F32], act: F32 | F64, grid: AwqGrid, loss: Callable[[F32], float]) -> AwqScale:
    """The candidate of least `loss(factors [K])`, where something else than the weights' error counts.

    weights: [N, K] of the linears that read the input; act [K]: its channels' magnitudes. Raises RecipeError for
    steps < 1.
    """
    if grid.steps < 1:
        raise RecipeError(f"awq.steps is {grid.steps}; it is the number of alphas to try, at least 1 (the paper's: 20)")
    candidates = _candidates(act.astype(np.float64), _weight_mean(weights), grid)
    tried = [(c, loss(c[2])) for c in candidates]
    best, least = min(tried, key=lambda t: t[1])
    return AwqScale(best[2], best[0], best[1], least, tried[0][1])


class _Seen:
    """The rows of a reader that the search looks at."""

    def __init__(self, reader: Reader, rows: int) -> None:
        step = max(1, len(reader.weight) // rows) if rows else 1
        self.weight = np.ascontiguousarray(reader.weight[::step])
        self.round_trip = reader.round_trip


def _candidates(act: F64, weight: F64, grid: AwqGrid) -> Iterator[tuple[float, bool, F32]]:
    """(alpha, balanced, factors), the identity first."""
    alive = (act > 0) & (weight > 0)
    act, weight = np.where(alive, act, 1.0), np.where(alive, weight, 1.0)
    for balanced in (False, True)[: 1 + grid.balance]:
        for step in range(grid.steps):
            alpha = step / grid.steps
            raw = act**alpha / weight ** (1 - alpha) if balanced else act**alpha
            factors = np.where(alive, _centred(raw[alive], raw), 1.0).astype(np.float32)
            yield alpha, balanced, factors if grid.tie is None else grid.tie(factors)


def _centred(alive: F64, raw: F64) -> F64:
    """raw / sqrt(largest * smallest of the living): factors around 1, within 2^±16."""
    middle = np.sqrt(alive.max() * alive.min()) if alive.size else 1.0
    return np.clip(raw / middle, _LEAST, _MOST)


def _weight_mean(weights: Sequence[F32]) -> F64:
    """[K]: mean over all outputs of |W| relative to the output's largest."""
    shares = []
    for weight in weights:
        magnitude = np.abs(weight)
        largest = magnitude.max(axis=1, keepdims=True)
        shares.append(magnitude / np.where(largest > 0, largest, np.float32(1)))
    return np.asarray(np.concatenate(shares).mean(axis=0, dtype=np.float64))


def _loss(seen: Sequence[_Seen], factors: F32, hessian: F32 | F64) -> float:
    """Error of all outputs when (W s) is quantized and its input divided by s."""
    total = 0.0
    for reader in seen:
        error = reader.weight - reader.round_trip(reader.weight * factors) / factors
        total += float(row_losses(error, hessian).sum())
    return total
