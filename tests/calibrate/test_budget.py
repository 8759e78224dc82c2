"""The choice under a budget against trying everything, and the front against what a front must be."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.calibrate.budget import Option, Options, Selection, choose, front
from quantbench.errors import RecipeError

OPTION = st.tuples(st.integers(-20, 60), st.floats(0, 4, allow_subnormal=False))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def options_of(groups: list[list[tuple[int, float]]]) -> Options:
    return {f"g{i}": [Option(str(j), *o) for j, o in enumerate(row)] for i, row in enumerate(groups)}


def brute_force(options: Options, budget: int) -> float | None:
    """The least loss of all combinations that fit."""
    sums = [(sum(o.cost for o in c), sum(o.loss for o in c)) for c in product(*options.values())]
    return min((loss for size, loss in sums if size <= budget), default=None)


def consistent(options: Options, s: Selection) -> bool:
    picked = [next(o for o in row if o.label == s.labels[g]) for g, row in options.items()]
    return s.cost == sum(o.cost for o in picked) and s.loss == pytest.approx(sum(o.loss for o in picked))


@settings(max_examples=400, deadline=None)
@given(GROUPS, st.integers(0, 300))
def test_the_choice_is_that_of_trying_everything(groups: list[list[tuple[int, float]]], budget: int) -> None:
    options = options_of(groups)
    best = brute_force(options, budget)
    if best is None:
        with pytest.raises(RecipeError, match="cannot be met"):
            choose(options, budget)
        return
    found = choose(options, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert consistent(options, found)


@settings(max_examples=300, deadline=None)
@given(GROUPS)
def test_the_front_rises_in_cost_falls_in_loss_and_is_the_best_at_each_size(
    groups: list[list[tuple[int, float]]],
) -> None:
    options = options_of(groups)
    points = front(options)
    for smaller, larger in pairwise(points):
        assert smaller.cost < larger.cost
        assert smaller.loss >= larger.loss
    for point in points:
        assert consistent(options, point)
        assert point.loss == pytest.approx(brute_force(options, point.cost), rel=1e-6, abs=1e-9)
    assert points[-1].loss == pytest.approx(sum(min(o.loss for o in row) for row in options.values()))


def test_the_gap_that_greed_leaves_is_closed() -> None:
    """Per byte the first step is the best, and leaves room for nothing; two others fill the budget and gain more."""
    options = options_of([[(1, 6.0), (7, 0.0)], [(1, 5.0), (6, 0.0)], [(1, 4.0), (6, 0.0)]])
    assert choose(options, 13).labels == {"g0": "0", "g1": "1", "g2": "1"}


def test_an_option_that_is_larger_and_worse_is_never_taken() -> None:
    options = options_of([[(1, 2.0), (5, 3.0), (9, 1.0)]])
    assert [p.labels["g0"] for p in front(options)] == ["0", "2"]
    assert choose(options, 8).labels == {"g0": "0"}


def test_of_equal_losses_the_smallest_is_taken() -> None:
    assert choose(options_of([[(9, 1.0), (2, 1.0)], [(3, 0.0)]]), 100).cost == 5


def test_a_budget_below_the_least_cost_is_refused_in_the_words_of_who_asks() -> None:
    options = options_of([[(100, 1.0)], [(50, 1.0), (70, 0.5)]])
    with pytest.raises(RecipeError, match=r"^the budget cannot be met: the least cost is 150$"):
        choose(options, 120)
    with pytest.raises(RecipeError, match=r"^150 apples$"):
        choose(options, 120, "{} apples".format)
