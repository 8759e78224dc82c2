"""Mixed precision under a budget: one option per group, least summed loss, at most so much summed cost: bytes, or the
nanoseconds of a decode step.

The multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger 2004, ch. 11). The loss is taken as additive:
KL against the float model is quadratic in small changes of the logits, and rounding errors of different layers are
nearly independent, so that their cross terms average out; docs/mixed-precision.md has what that was worth, measured.

`front` walks the lower convex hull: the solutions of the Lagrangian, min loss + price · cost, for every price from
infinity to 0. Each is the best at its own size. `choose` takes the last of them that fits, fills what is left greedily,
and then closes the gap exactly: a dynamic program over (cost, loss) in which a partial choice survives only if no
other is at least as small and as good, and if its Lagrangian lower bound is below the best found so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantbench.errors import RecipeError

_SLACK = 1e-9  # of the best loss: bounds are sums in floating point


@dataclass(frozen=True)
class Option:
    """One way to hold a group. `loss` in nats (or any additive unit), `label` for the caller."""

    label: str
    cost: int
    loss: float


@dataclass(frozen=True)
class Selection:
    """An option for every group, with their sums."""

    cost: int
    loss: float
    labels: dict[str, str]  # group -> label of its option


@dataclass(frozen=True)
class _Step:
    """One move along a group's hull: from option `before` to the larger option `after`."""

    group: int
    before: int
    after: int
    cost: int
    gain: float

    @property
    def price(self) -> float:
        """Loss saved per unit of cost."""
        return self.gain / self.cost


Options = Mapping[str, Sequence[Option]]


def front(options: Options) -> list[Selection]:
    """The Pareto front's convex part, smallest first: costs rise, losses fall, strictly."""
    rows = list(options.values())
    chosen = [_hull(row)[0] for row in rows]
    points = [_selection(options, chosen)]
    for step in _steps(rows):
        chosen[step.group] = step.after
        points.append(_selection(options, chosen))
    return points


def choose(options: Options, budget: int, refusal: Callable[[int], str] | None = None) -> Selection:
    """The least summed loss at a cost of `budget`, exact up to 1e-9 of it; among equals the cheapest.

    Raises RecipeError where nothing fits, in the words of `refusal`, which is given the least cost there is.
    """
    rows = list(options.values())
    hulls = [_hull(row) for row in rows]
    smallest = sum(row[hull[0]].cost for row, hull in zip(rows, hulls, strict=True))
    if smallest > budget:
        raise RecipeError(refusal(smallest) if refusal else f"the budget cannot be met: the least cost is {smallest:,}")
    filled, price = _greedy(rows, budget)
    return _selection(options, _exact(rows, filled, price, budget))


def _hull(row: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull: costs rise, losses fall, ever less per unit of cost."""
    order = sorted(range(len(row)), key=lambda i: (row[i].cost, row[i].loss, i))
    hull: list[int] = []
    for i in order:
        if hull and row[i].loss >= row[hull[-1]].loss:
            continue
        while len(hull) > 1 and _price(row, hull[-2], hull[-1]) <= _price(row, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _price(row: Sequence[Option], small: int, large: int) -> float:
    return (row[small].loss - row[large].loss) / (row[large].cost - row[small].cost)


def _steps(rows: Sequence[Sequence[Option]]) -> list[_Step]:
    """Every move of every hull, the best per byte first. Moves of one group stay in their order."""
    return sorted((step for g, row in enumerate(rows) for step in _moves(g, row)), key=lambda s: -s.price)


def _moves(group: int, row: Sequence[Option]) -> Iterator[_Step]:
    hull = _hull(row)
    for a, b in pairwise(hull):
        yield _Step(group, a, b, row[b].cost - row[a].cost, row[a].loss - row[b].loss)


def _greedy(rows: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """Steps as long as they fit; then those further ones that still do. Also the price of the first that did not."""
    chosen = [_hull(row)[0] for row in rows]
    room = budget - sum(row[i].cost for row, i in zip(rows, chosen, strict=True))
    price: float | None = None
    for step in _steps(rows):
        if chosen[step.group] != step.before:
            continue
        if step.cost <= room:
            chosen[step.group] = step.after
            room -= step.cost
        elif price is None:
            price = step.price
    return chosen, price or 0.0


def _exact(rows: Sequence[Sequence[Option]], start: list[int], price: float, budget: int) -> list[int]:
    """The best choice, given a good one and a Lagrangian price. States are (cost, loss, way here), pruned."""
    best = sum(row[i].loss for row, i in zip(rows, start, strict=True))
    rest = _suffix(min(o.loss + price * o.cost for o in row) for row in rows)
    least = _suffix(float(min(o.cost for o in row)) for row in rows)
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # per group: state before, option
    for g, row in enumerate(rows):
        option = np.repeat(np.arange(len(row)), len(size))
        before = np.tile(np.arange(len(size)), len(row))
        size = size[before] + np.array([o.cost for o in row], np.int64)[option]
        loss = loss[before] + np.array([o.loss for o in row])[option]
        bound = loss + price * (size - budget) + rest[g + 1]
        kept = np.flatnonzero((size + least[g + 1] <= budget) & (bound <= best + _SLACK * abs(best)))
        kept = kept[_undominated(size[kept], loss[kept])]
        if not len(kept):
            return start
        size, loss = size[kept], loss[kept]
        history.append((before[kept], option[kept]))
    state = int(np.lexsort((size, loss))[0])
    return start if loss[state] >= best else _trace(history, state)


def _undominated(size: npt.NDArray[np.int64], loss: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Indices of states that no other undercuts in both, by size; of equal states the first."""
    order = np.lexsort((loss, size))
    lowest = np.minimum.accumulate(loss[order])
    better = np.ones(len(order), bool)
    better[1:] = loss[order][1:] < lowest[:-1]
    return np.asarray(order[better], np.int64)


def _trace(history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], state: int) -> list[int]:
    chosen: list[int] = []
    for before, option in reversed(history):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def _suffix(values: Iterator[float]) -> npt.NDArray[np.float64]:
    """Sums of what is left from each place on, f64[n + 1]."""
    each = np.array(list(values))
    return np.concatenate([np.cumsum(each[::-1])[::-1], [0.0]])


def _selection(options: Options, chosen: Sequence[int]) -> Selection:
    picked = [row[i] for row, i in zip(options.values(), chosen, strict=True)]
    labels = {group: o.label for group, o in zip(options, picked, strict=True)}
    return Selection(sum(o.cost for o in picked), sum(o.loss for o in picked), labels)
