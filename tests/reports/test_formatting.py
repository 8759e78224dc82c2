from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.reports import formatting


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(3537.2, 3, "3,537"), (514.0, 3, "514"), (9.13, 2, "9.1"), (0.0004, 2, "0.00040"), (0, 3, "0"),
     (1e-9, 2, "1.0e-09"),
     (None, 3, "-"), (math.nan, 3, "-"), (math.inf, 3, "-"), (-24.5, 3, "-24.5")],
)  # fmt: skip
def test_plain(value: float | None, digits: int, text: str) -> None:
    assert formatting.plain(value, digits) == text


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [(0.0371, True, "+3.71%"), (1.504, True, "+150%"), (-0.022, True, "-2.20%"), (0.409, False, "40.9%"),
     (1.0, False, "100%"), (None, False, "-"), (math.nan, True, "-")],
)  # fmt: skip
def test_percent(value: float | None, sign: bool, text: str) -> None:
    assert formatting.percent(value, sign) == text


@given(st.floats(0.9, 1, exclude_max=True))
def test_percent_never_rounds_up_to_the_whole(share: float) -> None:
    assert float(formatting.percent(share).removesuffix("%")) < 100


@given(st.floats(1e-6, 1e12))
def test_plain_keeps_the_value_to_its_digits(value: float) -> None:
    assert float(formatting.plain(value, 4).replace(",", "")) == pytest.approx(value, rel=6e-4)


@pytest.mark.parametrize(
    ("count", "text"), [(269_000_000, "269 MB"), (1.5e9, "1.50 GB"), (2048, "2.05 kB"), (12, "12 B"), (None, "-")]
)
def test_size(count: float | None, text: str) -> None:
    assert formatting.size(count) == text


def test_interval_times_decibel_join() -> None:
    assert formatting.interval([0.03, 0.045]) == "[+3.00, +4.50]"
    assert formatting.interval([0.94, 0.96], sign=False) == "[94.0, 96.0]"
    assert formatting.interval(None) == ""
    assert (formatting.times(1.531), formatting.times(None)) == ("1.53x", "-")
    assert (formatting.decibel(31.26), formatting.decibel(None)) == ("31.3 dB", "-")
    assert [formatting.join(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
