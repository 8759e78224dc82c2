from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantbench.errors import CalibrationError
from quantbench.quantizers.output_loss import hessian_of, output_loss, round_trip, row_losses
from quantbench.quantizers.rtn import rtn
from quantbench.quantizers.weight import dequantize_weight
from quantbench.quantizers.weight_range import WeightRange, weight_entry
from quantbench.scales.statistics import observe
from quantbench.vocabulary import LayerPlan

F32 = np.float32
PLAN = LayerPlan("w", "int4", "group", 32)
PLANS = [
    PLAN,
    LayerPlan("w", "int4", "group", 32, symmetric=False, weight_observer="mse"),
    LayerPlan("w", "int8", "channel"),
    LayerPlan("w", "fp8_e4m3", "block"),
]


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, w, q = (rng.standard_normal(shape).astype(F32) for shape in ((50, 64), (8, 64), (8, 64)))
    return x, w, q


def test_it_is_the_squared_error_of_the_outputs() -> None:
    x, w, q = sample()
    hessian = observe(x, hessian=True).hessian
    assert hessian is not None
    squares = np.square(x.astype(np.float64) @ (w - q).T.astype(np.float64))
    assert output_loss(w, q, hessian) == pytest.approx(squares.sum(), rel=1e-6)
    assert row_losses(w - q, hessian.astype(F32)) == pytest.approx(squares.sum(axis=0), rel=1e-5)
    assert output_loss(w, w, hessian) == 0


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.weights}-{p.granularity}-{p.symmetric}")
def test_a_round_trip_is_what_rtn_stores(plan: LayerPlan) -> None:
    _, w, _ = sample()
    assert np.array_equal(round_trip(w, plan), dequantize_weight(rtn(w, weight_entry(w, plan), None)))


def test_a_round_trip_keeps_to_a_given_range() -> None:
    _, w, _ = sample()
    half = np.full((8, 2), 0.5, F32)
    assert np.abs(round_trip(w, PLAN, WeightRange(-half, half))).max() == pytest.approx(0.5 * 8 / 7.5)


def test_a_hessian_that_cannot_be_used_is_refused() -> None:
    s = observe(sample()[0], hessian=True)
    assert hessian_of(s, "w", "awq") is s.hessian
    for absent in (None, replace(s, hessian=None)):
        with pytest.raises(CalibrationError, match="w: awq needs the Hessian of its input: collect it"):
            hessian_of(absent, "w", "awq")
    with pytest.raises(CalibrationError, match="w: the Hessian of its input: 1 of 1 values are NaN"):
        hessian_of(replace(s, hessian=np.full((1, 1), np.nan)), "w", "awq")
