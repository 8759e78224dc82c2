from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantbench.errors import RecipeError
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import WeightRange, reduce_units, relative_loss, weight_entry, weight_range
from quantbench.vocabulary import LayerPlan

F32 = np.float32
PLANS = [
    LayerPlan("w", "int8", "tensor"),
    LayerPlan("w", "int8", "channel"),
    LayerPlan("w", "int4", "channel"),
    LayerPlan("w", "int4", "group", 32),
    LayerPlan("w", "int4", "group", 32, symmetric=False),
    LayerPlan("w", "fp8_e4m3", "tensor"),
    LayerPlan("w", "fp8_e4m3", "block"),
]
every = pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.weights}-{p.granularity}-{p.symmetric}")


def heavy_tailed(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, shape).astype(F32)


@every
def test_mse_is_never_worse_than_absmax_in_any_unit(plan: LayerPlan) -> None:
    w = heavy_tailed((140, 256))
    error = {}
    for observer in ("absmax", "mse"):
        entry = weight_entry(w, replace(plan, weight_observer=observer))
        square = np.square(dequantize_weight(quantize_weight(w, entry)).astype(np.float64) - w)
        error[observer] = reduce_units(np.add, square, str(plan.granularity), plan.group_size)
    assert np.all(error["mse"] <= error["absmax"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_equals_a_slow_version(symmetric: bool) -> None:
    w = heavy_tailed((3, 64))
    plan = LayerPlan("w", "int4", "group", 32, symmetric=symmetric, weight_observer="mse")
    found = weight_range(w, plan)
    for row, group in np.ndindex(3, 2):
        x = w[row, 32 * group : 32 * group + 32]
        tried = []
        for shrink in np.linspace(1, 0.5, 21).astype(F32):
            high = max(x.max(), 0) * shrink if not symmetric else np.abs(x).max() * shrink
            low = min(x.min(), 0) * shrink if not symmetric else -high
            scale = high / F32(7.5) if symmetric else (high - low) / F32(15)
            zero = 0 if symmetric else np.rint(-8 - low / scale)
            codes = np.clip(np.rint(x / scale) + zero, -8, 7)
            tried.append((float(np.square((codes - zero) * scale - x).sum()), high))
        assert found.high[row, group] == pytest.approx(min(tried, key=lambda pair: pair[0])[1], rel=1e-6)


def test_mse_clips_heavy_tails_of_int4() -> None:
    w = heavy_tailed((32, 512))
    plain = weight_entry(w, LayerPlan("w", "int4", "channel"))
    searched = weight_entry(w, LayerPlan("w", "int4", "channel", weight_observer="mse"))
    assert plain.loss is not None
    assert searched.loss is not None
    assert searched.loss < 0.8 * plain.loss


def test_the_entry_says_what_was_done_and_what_it_costs() -> None:
    w = heavy_tailed((4, 64))
    entry = weight_entry(w, LayerPlan("model.layers.0.mlp.up_proj", "int8", "channel"), note=", and why")
    assert (entry.name, entry.kind, entry.format) == ("model.layers.0.mlp.up_proj.weight", "weight", "int8")
    assert entry.reason == "absmax of 4 channels, and why"
    assert entry.loss == relative_loss(w, dequantize_weight(quantize_weight(w, entry)))
    assert np.array_equal(entry.absmax[:, 0], np.abs(w).max(axis=1))


def test_a_given_range_is_used_as_it_is() -> None:
    high = np.array([254], F32)
    entry = weight_entry(np.ones((2, 2), F32), LayerPlan("w", "int8", "tensor"), WeightRange(-high, high))
    assert entry.scale == 2
    assert entry.loss == 1  # 1/2 rounds half to even: everything is lost


def test_relative_loss_of_zeros_is_zero() -> None:
    assert relative_loss(np.zeros(3, F32), np.zeros(3, F32)) == 0
    assert relative_loss(np.array([3, 4], F32), np.array([3, 3], F32)) == pytest.approx(1 / 25)


@every
@pytest.mark.parametrize("observer", ["absmax", "mse"])
def test_zeros_a_dead_row_and_one_giant(plan: LayerPlan, observer: str) -> None:
    plan, w = replace(plan, weight_observer=observer), heavy_tailed((140, 256))
    w[5] = 0
    w[:, 9] = 0
    for x in (np.zeros_like(w), w, np.where(np.indices(w.shape).sum(axis=0) == 30, F32(1e4), w)):
        entry = weight_entry(x, plan)
        assert np.isfinite(entry.scale).all()
        assert (entry.scale > 0).all()
        back = dequantize_weight(quantize_weight(x, entry))
        assert relative_loss(x, back) <= 0.1
        assert not back[5, :9].any()
        assert np.abs(back).max() == pytest.approx(np.abs(x).max(), rel=0.51 if observer == "mse" else 0.07)


def test_an_unknown_observer_and_an_absent_granularity_are_refused() -> None:
    with pytest.raises(RecipeError, match="w: unknown weight observer 'mean'"):
        weight_range(np.ones((2, 2), F32), LayerPlan("w", "int8", "channel", weight_observer="mean"))
    with pytest.raises(RecipeError, match="w: a quantized weight needs a granularity"):
        weight_range(np.ones((2, 2), F32), LayerPlan("w", "int8"))
