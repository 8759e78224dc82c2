from __future__ import annotations

import numpy as np
import pytest

from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.smooth import smooth_factors
from quantbench.quantizers.smooth_search import TENTHS, Pair, search_alpha

F32 = np.float32
INT8 = FORMATS["int8"]


def rounded_input(x: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    codes, scale = quantize_activation(x, "int8", float(absmax.max()) / 127 or 1.0)
    return INT8.decode(codes, scale)


def rounded_weight(i: int, w: np.ndarray) -> np.ndarray:
    scale = INT8.scale_of(np.abs(w).max(axis=1, keepdims=True))
    return INT8.decode(INT8.encode(w, scale), scale)


def pair(outlier: float = 60.0, rounding: bool = True) -> Pair:
    """Correlated inputs with two outlier channels, and the two linears that read them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 12)) @ rng.standard_normal((12, 48)) / 3).astype(F32)
    x[:, [3, 20]] *= outlier
    weights = tuple(rng.standard_normal((n, 48)).astype(F32) for n in (24, 40))
    keep = (lambda x, _: x), (lambda _, w: w)
    return Pair(x, np.abs(x).max(axis=0), weights, *((rounded_input, rounded_weight) if rounding else keep))


def at(p: Pair, alpha: float) -> np.ndarray:
    return smooth_factors(p.absmax, np.max([np.abs(w).max(axis=0) for w in p.weights], axis=0), alpha)


def slow_loss(p: Pair, factors: np.ndarray) -> float:
    losses = []
    for i, w in enumerate(p.weights):
        q = rounded_weight(i, w * factors)
        step = float((p.absmax / factors).max()) / 127
        for x in p.inputs:
            y, seen = w @ x, q @ (np.clip(np.rint(x / factors / step), -127, 127) * step)
            losses.append(np.square(seen - y).sum() / np.square(y).sum())
    return float(np.mean([np.mean(losses[:200]), np.mean(losses[200:])]))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_the_loss_equals_a_slow_version(alpha: float) -> None:
    p = pair()
    assert p.loss(at(p, alpha)) == pytest.approx(slow_loss(p, at(p, alpha)), rel=1e-3)


def test_nothing_is_lost_without_rounding() -> None:
    p = pair(rounding=False)
    assert p.loss(at(p, 0.7)) < 1e-10


def test_the_search_beats_every_tenth_and_no_smoothing() -> None:
    p = pair()
    found = search_alpha(p, lambda alpha: at(p, alpha))
    assert found.alpha is not None
    assert found.loss == p.loss(found.factors) <= min(p.loss(at(p, a)) for a in TENTHS)
    assert found.loss <= 0.2 * found.plain
    assert found.plain == p.loss(np.ones(48, F32))
    assert np.array_equal(found.factors, at(p, found.alpha))


def test_where_nothing_helps_the_input_stays_as_it_is() -> None:
    p = pair()
    found = search_alpha(p, lambda alpha: np.geomspace(1, 1e6, 48).astype(F32))
    assert (found.alpha, found.loss) == (None, found.plain)
    assert np.array_equal(found.factors, np.ones(48, F32))


def test_zeros_dead_channels_and_one_giant_token() -> None:
    p = pair()
    zeros = Pair(np.zeros_like(p.inputs), np.zeros_like(p.absmax), p.weights, rounded_input, rounded_weight)
    assert search_alpha(zeros, lambda alpha: at(zeros, alpha)).loss == 0
    x = p.inputs.copy()
    x[:, 7] = 0
    x[0] *= 1e4
    giant = Pair(x, np.abs(x).max(axis=0), p.weights, rounded_input, rounded_weight)
    found = search_alpha(giant, lambda alpha: at(giant, alpha))
    assert np.isfinite(found.loss)
    assert found.loss <= found.plain
    assert found.factors[7] == 1
