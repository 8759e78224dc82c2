from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError, RecipeError
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.ranges import EMA_BETA, RANGES, histogram_loss, percentile, range_of
from quantbench.scales.statistics import Statistics, merge, observe, scaled
from quantbench.vocabulary import OBSERVERS

F32 = np.float32
every = pytest.mark.parametrize("name", OBSERVERS)
both = pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])


def seen(*batches: np.ndarray, rows: int = 1) -> Statistics:
    result = observe(batches[0], rows)
    for batch in batches[1:]:
        result = merge(result, observe(batch, rows))
    return result


def normal(scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((200, 64)) * scale).astype(F32)


def real_loss(x: np.ndarray, absmax: float, format: str) -> float:
    fmt = FORMATS[format]
    scale = fmt.scale_of(np.array([absmax], F32))
    return float(np.square(fmt.decode(fmt.encode(x, scale), scale).astype(np.float64) - x).sum() / np.square(x).sum())


def test_every_recipe_word_is_an_observer() -> None:
    assert set(RANGES) == set(OBSERVERS)


@every
@pytest.mark.parametrize("levels", [127.0, 448.0])
def test_zeros_have_range_zero_and_ranges_never_exceed_absmax(name: str, levels: float) -> None:
    assert range_of(seen(np.zeros((4, 8), F32)), name, levels).tolist() == [0]
    s = seen(normal(), normal(7, seed=1), rows=4)
    absmax = range_of(s, name, levels)
    assert absmax.shape == (4,)
    assert absmax.dtype == np.float32
    assert np.all(absmax > 0)
    assert np.all(absmax <= s.absmax)
    assert np.array_equal(absmax, range_of(s, name, levels))


@every
def test_a_constant_keeps_its_size(name: str) -> None:
    absmax = range_of(seen(np.full((5, 8), -3, F32)), name, 127.0)
    assert absmax == pytest.approx([3], rel=0.01)


def test_absmax_avg_and_ema_by_hand() -> None:
    s = seen(*(np.full((2, 2), v, F32) for v in (1, 2, 6)))
    assert range_of(s, "absmax", 127) == 6
    assert range_of(s, "avg", 127) == 3
    b = EMA_BETA
    assert range_of(s, "ema", 127) == pytest.approx((b * b * 1 + b * 2 + 6) / (b * b + b + 1))


def test_percentile_leaves_out_its_share() -> None:
    x = np.abs(normal())
    kept = float(percentile(seen(x), 127, 0.99)[0])
    assert (x > kept).mean() == pytest.approx(0.01, abs=0.002)
    assert percentile(seen(x), 127, 1.0) == seen(x).absmax


@both
@settings(deadline=None)
@given(shape=st.floats(1.2, 8), seed=st.integers(0, 5))
def test_mse_is_never_worse_than_absmax_by_its_own_loss(format: str, shape: float, seed: int) -> None:
    x = np.random.default_rng(seed).standard_t(shape, (64, 64)).astype(F32)
    s, levels = seen(x), FORMATS[format].qmax
    chosen = histogram_loss(s, range_of(s, "mse", levels), levels)
    plain = histogram_loss(s, s.absmax, levels)
    assert chosen is not None
    assert plain is not None
    assert chosen <= plain


def test_mse_clips_a_heavy_tail_for_int8_and_really_gains() -> None:
    x = np.random.default_rng(0).standard_t(2.5, (512, 64)).astype(F32)
    s = seen(x)
    chosen = float(range_of(s, "mse", 127)[0])
    assert chosen < 0.9 * s.absmax[0]
    assert real_loss(x, chosen, "int8") < 0.9 * real_loss(x, float(s.absmax[0]), "int8")


def test_mse_is_within_a_percent_of_a_brute_search_over_the_values() -> None:
    x = np.random.default_rng(3).laplace(size=(256, 64)).astype(F32)
    s = seen(x)
    brute = min(real_loss(x, float(s.absmax[0]) * k / 200, "int8") for k in range(20, 201))
    assert real_loss(x, float(range_of(s, "mse", 127)[0]), "int8") <= 1.01 * brute


def test_kl_clips_a_single_outlier() -> None:
    x = normal()
    x[0, 0] = 40
    assert 2 < range_of(seen(x), "kl", 127)[0] < 20


def test_kl_equals_a_slow_version() -> None:
    x = np.random.default_rng(5).laplace(size=(128, 64)).astype(F32)
    s = seen(x)
    assert s.histogram is not None
    h, levels = s.histogram[0], 127
    used = int(np.flatnonzero(h)[-1]) + 1
    best = (np.inf, 0)
    for kept in [*range(128, used, 16), used]:
        groups: dict[float, list[int]] = {}
        for i in range(kept):
            groups.setdefault(float(np.rint((i + 0.5) / kept * levels)), []).append(i)
        q = np.zeros(kept)
        for members in groups.values():
            full = [i for i in members if h[i]]
            for i in full:
                q[i] = h[members].sum() / len(full)
        p = h[:kept].astype(float)
        p[-1] += h[kept:].sum()
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
        best = min(best, (float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)), kept))
    width = float(s.limit[0]) / 2048
    assert range_of(s, "kl", 127)[0] == pytest.approx(min(best[1] * width, float(s.absmax[0])))


@both
def test_loss_from_the_histogram_is_the_loss_of_the_values(format: str) -> None:
    x = normal()
    s = seen(x)
    loss = histogram_loss(s, s.absmax, FORMATS[format].qmax)
    assert loss == pytest.approx(real_loss(x, float(s.absmax[0]), format), rel=0.05)


def test_loss_of_zeros_is_zero_and_unknown_without_a_histogram() -> None:
    s = seen(np.zeros((2, 2), F32))
    assert histogram_loss(s, s.absmax, 127) == 0
    assert histogram_loss(replace(s, histogram=None), s.absmax, 127) is None


def test_a_live_observer_has_left_its_threshold() -> None:
    s = replace(seen(normal()), live={"paddleslim:hist": np.array([1.25], F32)})
    assert range_of(s, "paddleslim:hist", 127) == 1.25


def test_derived_statistics_are_refused_where_they_do_not_suffice() -> None:
    s = scaled(seen(normal()), np.ones(64, F32))
    assert range_of(s, "absmax", 127) == s.absmax
    for name in ("percentile", "mse", "kl"):
        with pytest.raises(CalibrationError, match="needs a histogram, and these statistics are derived"):
            range_of(s, name, 127)
    for name in ("avg", "ema"):
        with pytest.raises(CalibrationError, match="needs each batch's absmax, and these statistics are derived"):
            range_of(s, name, 127)


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown observer 'msee'\. Did you mean mse\?"):
        range_of(seen(normal()), "msee", 127)


def test_a_percentile_with_its_number() -> None:
    s = observe(np.linspace(-1, 1, 20001, dtype=np.float32).reshape(-1, 1))
    assert range_of(s, "percentile=90.0", 127) == pytest.approx([0.9], abs=1e-3)
    assert range_of(s, "percentile=100", 127) == pytest.approx([1])
    assert range_of(s, "percentile=99.99", 127) == range_of(s, "percentile", 127)
    with pytest.raises(RecipeError, match="unknown observer 'percentile=high'"):
        range_of(s, "percentile=high", 127)
