from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantbench.errors import CalibrationError
from quantbench.scales.statistics import BINS, Statistics, limit_of, load, merge, observe, rebin, save, scaled

F32 = np.float32
EXACT = ("tokens", "minimum", "maximum", "absmax", "histogram", "limit", "channel_absmax")
values = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, 1.0, -2.0, 0.5, 3537.0, 2.0**-120, -(2.0**100), 1e-45, 2.0**126]),
)


def batches(tokens: int = 12, channels: int = 6) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.tuples(st.integers(1, tokens), st.just(channels)), elements=values)


def assert_same(a: Statistics, b: Statistics, fields: tuple[str, ...] = EXACT) -> None:
    for name in fields:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=200, deadline=None)
@given(x=batches(), cuts=st.lists(st.integers(1, 11), max_size=4), rows=st.sampled_from([1, 2, 3]))
def test_any_split_merges_to_the_one_pass_result(x: np.ndarray, cuts: list[int], rows: int) -> None:
    parts = [p for p in np.split(x, sorted(c for c in set(cuts) if c < len(x))) if len(p)]
    whole, merged = observe(x, rows, hessian=True), observe(parts[0], rows, hessian=True)
    for part in parts[1:]:
        merged = merge(merged, observe(part, rows, hessian=True))
    assert_same(merged, whole)
    assert merged.batches == len(parts)
    assert np.array_equal(merged.batch_absmax.max(axis=0), whole.absmax)
    magnitude = np.abs(x).sum(axis=0, dtype=np.float64)
    assert np.all(np.abs(merged.channel_sum - whole.channel_sum) <= 1e-12 * magnitude)


@settings(deadline=None)
@given(a=batches(), b=batches(), c=batches())
def test_merging_is_associative_bit_for_bit(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    one, two, three = observe(a, 2), observe(b, 2), observe(c, 2)
    left, right = merge(merge(one, two), three), merge(one, merge(two, three))
    assert_same(left, right, (*EXACT, "batch_absmax"))


@settings(deadline=None)
@given(x=batches())
def test_histogram_counts_every_value_where_it_belongs(x: np.ndarray) -> None:
    s = observe(x, 2)
    assert s.histogram is not None
    assert s.histogram.sum() == x.size
    for row, part in enumerate(np.abs(x.reshape(len(x), 2, 3)).transpose(1, 0, 2)):
        if s.limit[row]:
            expected, _ = np.histogram(part.astype(np.float64), BINS, (0, float(s.limit[row])))
            assert np.array_equal(s.histogram[row], expected)


def test_values_on_the_limit_survive_rebinning() -> None:
    """A value equal to a power of two must not sit in the last bin: after doubling it would be one bin too low."""
    assert_same(
        merge(observe(np.array([[1.0]], F32)), observe(np.array([[1.5]], F32))), observe(np.array([[1], [1.5]], F32))
    )


def test_limits() -> None:
    assert limit_of(np.array([0, 1, 0.99, 3, 1e-45], F32)).tolist() == [0, 2, 1, 4, 2.0**-100]


def test_rebin_by_many_octaves_puts_everything_in_bin_zero() -> None:
    histogram = np.ones((1, BINS), np.int64)
    wide = rebin(histogram, np.array([2.0**-100], F32), np.array([2.0**100], F32))
    assert wide[0, 0] == BINS
    assert wide.sum() == BINS


def test_all_zeros_then_data() -> None:
    zeros, data = np.zeros((3, 4), F32), np.full((2, 4), 7, F32)
    assert_same(merge(observe(zeros), observe(data)), observe(np.concatenate([zeros, data])))
    assert observe(zeros).limit == 0


def test_constant_and_outlier() -> None:
    x = np.full((10, 8), -2, F32)
    x[4, 3] = 1e4
    s = observe(x)
    assert (s.minimum[0], s.maximum[0], s.absmax[0]) == (-2, 1e4, 1e4)
    assert s.channel_absmax.tolist() == [2, 2, 2, 1e4, 2, 2, 2, 2]
    assert s.channel_sum.tolist() == [-20, -20, -20, 1e4 - 18, -20, -20, -20, -20]


def test_three_axes_are_heads() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(F32)
    s = observe(x, 3)
    assert np.array_equal(s.absmax, np.abs(x).max(axis=(0, 2)))
    assert_same(s, observe(x.reshape(5, 12), 3))


def test_hessian_is_the_sum_of_outer_products() -> None:
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(F32)
    s = merge(observe(x[:9], hessian=True), observe(x[9:], hessian=True))
    assert s.hessian == pytest.approx(sum(np.outer(r, r) for r in x.astype(np.float64)), rel=1e-5)
    assert merge(observe(x, hessian=True), observe(x)).hessian is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = np.ones((3, 4), F32)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or Inf: 1 of 12 values, first at token 2 channel 1"):
        observe(x)


def test_giant_values_are_refused() -> None:
    with pytest.raises(CalibrationError, match="too large to be calibrated"):
        observe(np.array([[2.0**127]], F32))


@pytest.mark.parametrize(("shape", "rows"), [((0, 4), 1), ((2, 4), 3)])
def test_empty_and_indivisible_batches_are_refused(shape: tuple[int, int], rows: int) -> None:
    with pytest.raises(CalibrationError, match="no values, or not divisible"):
        observe(np.ones(shape, F32), rows)


def test_other_taps_do_not_merge() -> None:
    with pytest.raises(CalibrationError, match="1 rows x 4 channels with 1 x 6: they are not of the same tap"):
        merge(observe(np.ones((1, 4), F32)), observe(np.ones((1, 6), F32)))


def test_live_thresholds_must_be_equal() -> None:
    a = replace(observe(np.ones((1, 4), F32)), live={"paddleslim:hist": np.array([1], F32)})
    assert merge(a, a).live == a.live
    other = replace(a, live={"paddleslim:hist": np.array([2], F32)})
    for b in (other, replace(a, live={})):
        with pytest.raises(CalibrationError, match="'paddleslim:hist' sees the data itself"):
            merge(a, b)


@settings(deadline=None)
@given(x=batches(), factor=hnp.arrays(np.float32, 6, elements=st.floats(0.125, 8, width=32)))
def test_scaled_derives_exactly_what_it_keeps(x: np.ndarray, factor: np.ndarray) -> None:
    x = np.clip(x, -1e30, 1e30)
    derived, seen = scaled(observe(x, 2, hessian=True), factor), observe(x * factor, 2, hessian=True)
    assert_same(derived, seen, ("tokens", "absmax", "channel_absmax", "limit"))
    assert derived.histogram is None
    assert derived.batches == 0


def test_scaled_hessian_and_sums_follow() -> None:
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(F32)
    factor = np.array([1, 2, 0.5, 3], F32)
    derived, seen = scaled(observe(x, hessian=True), factor), observe(x * factor, hessian=True)
    assert derived.hessian == pytest.approx(seen.hessian, rel=1e-4)
    assert derived.channel_sum == pytest.approx(seen.channel_sum)


def test_scaled_refuses_the_wrong_number_of_factors() -> None:
    with pytest.raises(CalibrationError, match=r"factors have shape \(3,\), the statistics have 4 channels"):
        scaled(observe(np.ones((1, 4), F32)), np.ones(3, F32))


def test_saved_statistics_come_back_and_the_bytes_repeat(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20, 6)).astype(F32)
    live = replace(observe(x, hessian=True), live={"paddleslim:hist": np.array([1.5], F32)})
    taps = {"v": observe(x, 3), "attn_in": live, "o_in": scaled(observe(x), np.ones(6, F32))}
    save(tmp_path / "a" / "block.safetensors", taps)
    again = load(tmp_path / "a" / "block.safetensors")
    assert list(again) == list(taps)
    for tap, s in taps.items():
        assert_same(s, again[tap], (*EXACT, "batch_absmax", "channel_sum", "hessian"))
        assert s.live.keys() == again[tap].live.keys()
    save(tmp_path / "b.safetensors", again)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a" / "block.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "block.safetensors"
    save(path, {"v": observe(np.ones((2, 4), F32))})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CalibrationError, match=r"block.safetensors: statistics cannot be read .*collect this block again"
    ):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="collect this block again"):
        load(tmp_path / "none.safetensors")
