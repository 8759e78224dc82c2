"""What differs between two scale tables, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.scales.table import Entry, ScaleTable

_WORDS = ("kind", "format", "granularity", "group_size", "observer")


@dataclass(frozen=True)
class Difference:
    """`field` is "entry" (only one table has it), a word of the entry, "shape", "zero" or "scale"."""

    name: str
    field: str
    before: str
    after: str
    relative: float | None = None  # largest |after - before| / |before| over the scales

    def __str__(self) -> str:
        change = f" (up to {self.relative:+.3%})" if self.relative is not None else ""
        return f"{self.name}: {self.field}: {self.before} -> {self.after}{change}"


def diff_tables(a: ScaleTable, b: ScaleTable) -> list[Difference]:
    """Differences from a to b, in a's order, then what only b has. Equal tables give an empty list."""
    result: list[Difference] = []
    for name in dict.fromkeys([*a.entries, *b.entries]):
        if name not in b:
            result.append(Difference(name, "entry", "present", "absent"))
        elif name not in a:
            result.append(Difference(name, "entry", "absent", "present"))
        else:
            result += _entry(a[name], b[name])
    return result


def _entry(a: Entry, b: Entry) -> list[Difference]:
    words = [(w, getattr(a, w), getattr(b, w)) for w in _WORDS]
    found = [Difference(a.name, word, str(old), str(new)) for word, old, new in words if old != new]
    if a.scale.shape != b.scale.shape:
        return [*found, Difference(a.name, "shape", str(a.scale.shape), str(b.scale.shape))]
    same_zero = a.zero is b.zero if a.zero is None or b.zero is None else np.array_equal(a.zero, b.zero)
    if not same_zero:
        found.append(Difference(a.name, "zero", _zeros(a), _zeros(b)))
    if not np.array_equal(a.scale, b.scale, equal_nan=True):
        found.append(_scales(a, b))
    return found


def _scales(a: Entry, b: Entry) -> Difference:
    """Shows the place where the ratio is farthest from 1."""
    old, new = a.scale.ravel().astype(np.float64), b.scale.ravel().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num((new - old) / np.abs(old), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    worst = int(np.argmax(np.abs(np.where(old == new, 0, relative))))
    return Difference(a.name, "scale", f"{old[worst]:.6g}", f"{new[worst]:.6g}", float(relative[worst]))


def _zeros(entry: Entry) -> str:
    return "none" if entry.zero is None else f"{entry.zero.size} zero points"
