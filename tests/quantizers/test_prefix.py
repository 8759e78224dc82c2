"""Ratios, spread and giants against their definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantbench.quantizers.prefix import GIANT, giants, largest, spread, token_ratios

POSITIVE = arrays(np.float32, st.integers(1, 40), elements=st.floats(2.0**-10, 2.0**10, width=32))


@given(POSITIVE)
def test_ratios_are_to_the_median_token(x: np.ndarray) -> None:
    slow = [v / sorted(x)[len(x) // 2] for v in x] if len(x) % 2 else x / np.median(x)
    np.testing.assert_allclose(token_ratios(x), slow, rtol=1e-6)
    np.testing.assert_allclose(token_ratios(x * np.float32(8)), token_ratios(x), rtol=1e-6)


def test_zeros_stand_out_nowhere() -> None:
    assert token_ratios(np.zeros(5, np.float32)).tolist() == [0] * 5
    assert token_ratios(np.array([0, 0, 0, 7], np.float32)).tolist() == [0] * 4  # a tap that is nearly always silent


def test_one_giant_among_many() -> None:
    rows = np.ones(99, np.float32)
    rows[40] = 2000
    ratios = {"a": token_ratios(rows), "b": np.ones(99, np.float32)}
    assert largest(ratios) == ("a", 2000)
    assert spread(ratios) == 1000.5
    ids = np.arange(99, dtype=np.int32)
    assert giants(ratios, ids) == [40]


def test_giants_come_by_how_often_they_are() -> None:
    tall = np.array([GIANT + 1] * 6 + [GIANT], np.float32)
    assert giants({"a": tall}, np.array([5, 3, 5, 9, 3, 1, 8], np.int32)) == [3, 5, 1, 9]
    assert giants({"a": np.ones(2, np.float32)}, np.array([1, 2], np.int32)) == []
