"""Numbers for people. One place, so that the terminal, the page and the advice print the same number the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "-"  # what a table shows where nothing was measured


def plain(value: float | None, digits: int = 3) -> str:
    """At most `digits` significant digits, thousands separated: 3537.2 -> "3,537", 9.13 -> "9.13"."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}" if decimals <= 6 else f"{value:.{digits - 1}e}"


def percent(value: float | None, sign: bool = False) -> str:
    """A share as percent: 0.0371 -> "3.71%", with `sign` "+3.71%"."""
    if value is None or not math.isfinite(value):
        return NONE
    hundred = 100 * value
    decimals = 0 if abs(hundred) >= 100 else 1 if abs(hundred) >= 10 else 2
    if 99.9 <= hundred < 100:  # never round an agreement up to the whole
        decimals, hundred = 3, min(hundred, 99.999)
    return f"{hundred:{'+' if sign else ''},.{decimals}f}%"


def interval(bounds: Sequence[float] | None, sign: bool = True) -> str:
    """A 95 % interval of shares: "[+3.0, +4.5]" in percent; empty without one."""
    if bounds is None:
        return ""
    low, high = (percent(bound, sign).removesuffix("%") for bound in bounds)
    return f"[{low}, {high}]"


def size(count: float | None) -> str:
    """Bytes in decimal units: 269_000_000 -> "269 MB"."""
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{plain(count / factor)} {unit}"
    return f"{count:.0f} B"


def times(value: float | None) -> str:
    """A ratio of speeds: "1.53x"."""
    return NONE if value is None else f"{plain(value)}x"


def decibel(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f} dB"


def join(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""
