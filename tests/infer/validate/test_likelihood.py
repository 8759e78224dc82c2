import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from quantbench.infer.validate.likelihood import (
    bootstrap_mean,
    divergence,
    log_softmax,
    resampled_counts,
    token_nll,
)

logits = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-1000, 1000, width=32),
)


@given(logits)
@settings(max_examples=60, deadline=None)
def test_log_softmax_is_a_distribution_and_equals_the_float64_formula(x):
    got = log_softmax(x)
    wide = x.astype(np.float64)
    exact = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    np.testing.assert_allclose(got, exact, atol=2e-4, rtol=1e-6)
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


def test_log_softmax_of_more_rows_than_one_chunk():
    x = np.random.default_rng(0).normal(size=(70, 1 << 15)).astype(np.float32)
    np.testing.assert_allclose(log_softmax(x)[-1:], log_softmax(x[-1:]))


def test_nll_of_uniform_logits_is_log_vocabulary():
    np.testing.assert_allclose(
        token_nll(np.full((5, 1000), 3.5, np.float32), [1, 2, 3, 4, 5]), np.log(1000), rtol=1e-12
    )


def test_nll_is_the_negative_log_probability_of_the_next_token():
    x = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
    logp = log_softmax(x)
    np.testing.assert_allclose(token_nll(x, [0, 3, 8, 2]), [-logp[0, 3], -logp[1, 8], -logp[2, 2]], rtol=1e-6)


def test_kl_of_two_known_distributions():
    p, q = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.3, 0.5]])
    kl, top1 = divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    assert kl[0] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert not top1[0]


@given(logits)
@settings(max_examples=40, deadline=None)
def test_identical_models_have_exactly_no_divergence(x):
    kl, top1 = divergence(log_softmax(x), log_softmax(x.copy()))
    assert not kl.any()
    assert top1.all()


@given(logits, st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_kl_is_finite_and_not_negative(x, factor):
    kl, _ = divergence(log_softmax(x), log_softmax((x * np.float32(factor)).astype(np.float32)))
    assert np.isfinite(kl).all()
    assert (kl >= 0).all()


def test_kl_tells_a_tiny_difference_from_rounding():
    rng = np.random.default_rng(2)
    x = rng.normal(scale=3, size=(8, 20000)).astype(np.float32)
    y = x + rng.normal(scale=5e-3, size=x.shape).astype(np.float32)
    lp, lq = (z.astype(np.float64) - np.logaddexp.reduce(z.astype(np.float64), axis=1, keepdims=True) for z in (x, y))
    exact = (np.exp(lp) * (lp - lq)).sum(axis=1)
    kl, _ = divergence(log_softmax(x), log_softmax(y))
    assert exact.max() < 1e-4
    np.testing.assert_allclose(kl, exact, atol=3e-7, rtol=0.02)


def test_resampled_counts_draw_as_many_units_as_there_are():
    counts = resampled_counts(7, resamples=50)
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert (resampled_counts(7, 50) == counts).all()
    assert (resampled_counts(7, 50, seed=1) != counts).any()


def test_bootstrap_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        _, interval = bootstrap_mean(rng.normal(loc=1.0, size=60), np.ones(60))
        covered += interval[0] <= 1.0 <= interval[1]
    assert 0.90 <= covered / 300 <= 0.99


def test_bootstrap_weighs_units_by_their_tokens_and_transforms_the_mean():
    value, interval = bootstrap_mean([1.0, 30.0], [10, 90], np.expm1)
    assert value == pytest.approx(np.expm1(0.31))
    assert interval == pytest.approx([np.expm1(0.1), np.expm1(30 / 90)])


def test_no_difference_is_exactly_zero_with_a_zero_interval():
    assert bootstrap_mean(np.zeros(5), np.full(5, 511), np.expm1) == (0.0, [0.0, 0.0])


def test_one_unit_has_no_interval():
    assert bootstrap_mean([2.0], [4.0]) == (0.5, None)
