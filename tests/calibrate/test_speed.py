"""Mixtures that are timed are the mixtures that would be served; what was timed becomes costs and tokens/s."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from quantbench.calibrate.budget import choose, front
from quantbench.calibrate.sensitivity import groups_of
from quantbench.calibrate.speed import ROUNDS, Pace, StepTimes
from quantbench.errors import RecipeError, RequestError
from quantbench.infer.engine import Engine
from quantbench.infer.engine.forward import Model
from quantbench.infer.validate.timing import Load
from quantbench.mixture import Mixture, open_mixture
from quantbench.pace import Speed, TimedMixture, open_pace, timed
from quantbench.reports.progress import PlainProgress

NAMES = ["bf16", "weight_only_int4", "weight_only_int8"]
IDS = list(range(5, 45))
ASKED = Speed(1000.0, batch=2, prompt=8, threads=1)


@pytest.fixture(scope="module")
def mixture(tiny_run: Path) -> Mixture:
    return open_mixture(tiny_run, NAMES)


@pytest.fixture(scope="module")
def pace(tiny_run: Path, mixture: Mixture) -> Pace:
    return open_pace(tiny_run, mixture, ASKED)


@pytest.fixture(scope="module")
def quiet() -> PlainProgress:
    return PlainProgress(io.StringIO())


def logits(pace: Pace, labels: dict[str, str], run: Path) -> np.ndarray:
    engine = Engine.load(run / "checkpoint" / pace.base, threads=1)
    engine.runner.model = pace.mixed(labels)
    return engine.score(IDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_of_one_candidate_computes_what_its_checkpoint_does(pace: Pace, tiny_run: Path, name: str) -> None:
    whole = logits(pace, {g.name: name for g in groups_of(3)}, tiny_run)
    np.testing.assert_array_equal(whole, Engine.load(tiny_run / "checkpoint" / name, threads=1).score(IDS))


def test_only_the_groups_that_are_named_change(pace: Pace, tiny_run: Path) -> None:
    labels = {"model.layers.1.down": "weight_only_int4"}
    plain, one = pace.mixed({}), pace.mixed(labels)
    assert one.layers[0] == plain.layers[0]
    assert one.layers[1].down is not plain.layers[1].down
    assert one.layers[1].qkv is plain.layers[1].qkv
    assert one.head is plain.head
    assert (logits(pace, {}, tiny_run) != logits(pace, labels, tiny_run)).any()


def test_every_kind_is_timed_beside_the_base(pace: Pace, mixture: Mixture, quiet: PlainProgress) -> None:
    found = timed(pace, mixture, ASKED, quiet)
    assert set(found.times.extra_s) == {"qkv", "o", "gate_up", "down", "lm_head"}
    assert all(set(of) == set(NAMES) and of["bf16"] == 0 for of in found.times.extra_s.values())
    assert found.times.extra_s["lm_head"] == dict.fromkeys(NAMES, 0.0)  # float in all of them
    assert found.times.base_s > 0
    assert pace.visits() == ROUNDS * (1 + 5 * 2)


class Clock:
    """Stands in for the visits of a pace: a step costs what its groups do, times how slow the machine is just then."""

    def __init__(self, pace: Pace, costs: dict[str, float]) -> None:
        self.pace, self.costs, self.visits = pace, costs, 0
        self.base = pace.mixed({})

    def visit(self, model: Model) -> float:
        self.visits += 1
        changed = [
            self.costs[kind]
            for mine, plain in zip(model.layers, self.base.layers, strict=True)
            for kind in ("qkv", "o", "gate_up", "down")
            if getattr(mine, kind) is not getattr(plain, kind)
        ]
        slow = 1 + 0.5 * (self.visits // 2)  # a neighbour takes more of the machine every two visits
        return (100.0 + sum(changed)) * slow


def test_a_machine_that_gets_slower_does_not_change_what_a_group_costs(
    pace: Pace, mixture: Mixture, quiet: PlainProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"qkv": -4.0, "o": -1.0, "gate_up": -8.0, "down": 2.0}
    clock = Clock(pace, costs)
    monkeypatch.setattr(pace, "_visit", clock.visit)
    monkeypatch.setattr("quantbench.calibrate.speed.ROUNDS", 20)
    found = timed(pace, mixture, ASKED, quiet).times
    for kind, cost in costs.items():
        assert found.extra_s[kind]["weight_only_int4"] == pytest.approx(cost * found.base_s / 100, rel=0.35)
    clock.visits = 0
    labels = {"model.layers.0.qkv": "weight_only_int4", "model.layers.2.gate_up": "weight_only_int8"}
    step = pace.step_of(labels, 100.0)
    assert step.least <= step.median <= step.most
    assert step.median == pytest.approx(88.0, rel=0.02)


def timed_by_hand(mixture: Mixture, **changes: float) -> TimedMixture:
    extra = {kind: {"bf16": 0.0, "weight_only_int4": -4e-6, "weight_only_int8": -2e-6} for kind in ("qkv", "o", "down")}
    extra |= {"gate_up": {"bf16": 0.0, "weight_only_int4": -8e-6, "weight_only_int8": 3e-6}}
    extra |= {"lm_head": dict.fromkeys(NAMES, 0.0)}
    asked = Speed(**({"tokens_per_s": 1e4, "batch": 1} | changes))
    return TimedMixture(mixture, StepTimes("bf16", 100e-6, extra), asked)


def test_costs_are_nanoseconds_and_choices_keep_the_speed(mixture: Mixture) -> None:
    costs = timed_by_hand(mixture)
    groups = {g.name: g for g in mixture.groups}
    assert costs.cost("weight_only_int8", groups["model.layers.0.gate_up"]) == 3000
    assert costs.cost("weight_only_int4", groups["model.layers.2.down"]) == -4000
    assert costs.cost("weight_only_int4", groups["lm_head"]) == 0
    blocks = [n for n in groups if n != "lm_head"]
    losses = {"weight_only_int4": dict.fromkeys(blocks, 1.0), "weight_only_int8": dict.fromkeys(blocks, 0.1)}
    options = costs.options(losses)
    for wanted in (1.05e4, 1.2e4, 1.5e4, 2.4e4):
        asked = timed_by_hand(mixture, tokens_per_s=wanted)
        chosen = choose(options, asked.asked.budget_ns - asked.fixed_ns, asked.refusal)
        assert asked.tokens_per_s(chosen) >= wanted * (1 - 1e-6)
        assert "weight_only_int8" not in {chosen.labels[f"model.layers.{i}.gate_up"] for i in range(3)}  # slower, worse
    speeds = [costs.tokens_per_s(p) for p in front(options)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] == pytest.approx(1e4)


def test_a_speed_that_no_choice_makes_is_refused(mixture: Mixture) -> None:
    asked = timed_by_hand(mixture, tokens_per_s=1e5)
    options = asked.options({})
    with pytest.raises(RecipeError) as raised:
        choose(options, asked.asked.budget_ns - asked.fixed_ns, asked.refusal)
    assert raised.value.problems == (
        "the budget of 100000 tokens/s cannot be met: the fastest choice makes 2.5e+04 at batch 1. Lower the budget, "
        "or allow a faster mode",
    )


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan")])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(RequestError, match=r"--budget-tokens-per-s .*: give a speed above 0"):
        _ = Speed(speed).budget_ns


def test_quantized_inputs_are_candidates_where_time_counts(tiny_run: Path) -> None:
    """Those of another transform list or a c8 cache cannot be; with `inputs` a8w8 joins where the lists agree."""
    plain = set(open_mixture(tiny_run).variants)
    assert plain == {"bf16", "weight_only_int8", "weight_only_int4"}
    assert set(open_mixture(tiny_run, inputs=True).variants) == plain | {"a8w8", "a8w8-dynamic"}


def test_a_load_is_one_batch() -> None:
    assert ASKED.load == Load(8, 24, (2,))
