"""Percentages and sizes as people write them."""

from __future__ import annotations

import pytest

from quantbench.recipes.values import byte_count, fraction, observer, prefix


@pytest.mark.parametrize(
    ("text", "value"),
    [("5%", 0.05), ("0.5 %", 0.005), ("-1%", -0.01), ("1e-4", 1e-4), (" 1.2 ", 1.2), (".5", 0.5), (3, 3)],
)
def test_fractions(text: object, value: float) -> None:
    assert fraction(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"), [("1GiB", 2**30), ("1.5 KiB", 1536), ("12", 12), ("2MB", 2_000_000), ("0B", 0), (7, 7)]
)
def test_sizes(text: object, value: int) -> None:
    assert byte_count(text) == value


@pytest.mark.parametrize("text", ["", "%", "5%%", "five", "1,5"])
def test_what_is_no_fraction(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number or a percentage such as 5%, got"):
        fraction(text)


@pytest.mark.parametrize("text", ["", "GiB", "1gib", "-1GiB", "1 TiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 512MiB or 1GiB, got"):
        byte_count(text)


def test_observers_have_one_spelling() -> None:
    assert observer({"percentile": 99}) == observer("percentile=99") == "percentile=99.0"
    assert observer("paddleslim:hist") == "paddleslim:hist"


@pytest.mark.parametrize(
    ("value", "kept"), [("auto", "auto"), ("off", "off"), (False, "off"), ([1, 198], (1, 198)), ((0,), (0,))]
)
def test_prefixes(value: object, kept: object) -> None:
    assert prefix(value) == kept


@pytest.mark.parametrize("value", ["on", [], [1, -1], [True], ["1"], 7, True, {"tokens": [1]}])
def test_what_is_no_prefix(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected auto, off, or a list of token ids such as \[1, 198\], got"):
        prefix(value)
