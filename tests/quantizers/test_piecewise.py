from __future__ import annotations

import numpy as np
import pytest

from quantbench.quantizers.piecewise import Channels, PieceGrid, clusters, search_pieces
from quantbench.quantizers.smooth import smooth_factors
from quantbench.quantizers.smooth_search import Pair, search_alpha
from tests.quantizers.test_smooth_search import pair, rounded_input, rounded_weight

F32 = np.float32
GRID = PieceGrid()


def channels_of(p: Pair) -> Channels:
    columns = np.max([np.abs(w).max(axis=0) for w in p.weights], axis=0)
    return Channels(p.absmax, columns, lambda f: f, lambda f: f)


def slow(p: Pair, c: Channels, grid: PieceGrid) -> np.ndarray:
    """Piece by piece, largest first: every candidate tried, the best kept."""
    start = search_alpha(p, c.factors)
    best, factors, labels = start.loss, start.factors, clusters(c.act, grid.pieces)
    for piece in sorted(set(labels.tolist()), reverse=True):
        base = factors.copy()
        for alpha in np.linspace(*grid.alpha, 4):
            for scale in np.geomspace(*grid.scale, 3):
                tried = base.copy()
                tried[labels == piece] = (smooth_factors(c.act, c.weight, alpha) * F32(scale))[labels == piece]
                if p.loss(tried) < best:
                    best, factors = p.loss(tried), tried
    return factors


def three_sizes() -> Pair:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((120, 12)) @ rng.standard_normal((12, 36)) / 3).astype(F32)
    x[:, :4] *= 300
    x[:, 4:12] *= 12
    weights = (rng.standard_normal((20, 36)).astype(F32),)
    return Pair(x, np.abs(x).max(axis=0), weights, rounded_input, rounded_weight)


def test_equals_a_slow_version_and_beats_one_alpha() -> None:
    p = three_sizes()
    found = search_pieces(p, channels_of(p), GRID)
    assert np.array_equal(found.factors, slow(p, channels_of(p), GRID))
    assert found.loss == p.loss(found.factors) < search_alpha(p, channels_of(p).factors).loss
    assert [w.split(":")[0] for w in found.words] == ["4 channels", "8 channels", "24 channels"]


@pytest.mark.parametrize("outlier", [1.0, 60.0, 1e4])
def test_never_worse_than_one_alpha(outlier: float) -> None:
    p = pair(outlier)
    assert search_pieces(p, channels_of(p), PieceGrid(2)).loss <= search_alpha(p, channels_of(p).factors).loss


def test_clusters_are_those_of_like_size() -> None:
    act = np.array([1, 900, 1.2, 30, 28, 1000, 0, 0.9], F32)
    assert clusters(act, 3).tolist() == [0, 2, 0, 1, 1, 2, 0, 0]
    assert clusters(np.ones(5, F32), 3).tolist() == [0] * 5
    assert clusters(np.zeros(4, F32), 3).tolist() == [0] * 4
    assert clusters(np.array([1, 2], F32), 8).tolist() == [0, 1]


def test_one_scale_is_one_candidate_per_alpha() -> None:
    assert PieceGrid(1, (0.5, 0.5), (1.0, 1.0)).candidates() == [(0.5, 1.0)]
    assert len(GRID.candidates()) == 12


def test_zeros_keep_factor_one() -> None:
    p = pair()
    zeros = Pair(np.zeros_like(p.inputs), np.zeros_like(p.absmax), p.weights, rounded_input, rounded_weight)
    assert np.array_equal(search_pieces(zeros, channels_of(zeros), GRID).factors, np.ones(48, F32))
