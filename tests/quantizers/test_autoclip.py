from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantbench.errors import CalibrationError, RecipeError
from quantbench.quantizers.autoclip import ClipGrid, clip_range, unit_losses
from quantbench.quantizers.output_loss import output_loss, round_trip
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import weight_entry, weight_range
from quantbench.scales.statistics import Statistics, observe
from quantbench.vocabulary import LayerPlan

F32 = np.float32
PLANS = {
    "int4 channel": LayerPlan("w", "int4", "channel"),
    "int4 group 32": LayerPlan("w", "int4", "group", 32),
    "int4 group 128": LayerPlan("w", "int4", "group", 128),
    "int4 group 64 asymmetric": LayerPlan("w", "int4", "group", 64, symmetric=False),
    "int8 channel": LayerPlan("w", "int8", "channel"),
    "fp8 tensor": LayerPlan("w", "fp8_e4m3", "tensor"),
    "fp8 block": LayerPlan("w", "fp8_e4m3", "block"),
}
every = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both = pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])


def weight(shape: tuple[int, int] = (24, 256)) -> np.ndarray:
    """Heavy-tailed, as trained weights are."""
    return np.random.default_rng(0).standard_t(4, shape).astype(F32)


def correlated(channels: int = 256) -> Statistics:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 24)) @ rng.standard_normal((24, channels)) + rng.standard_normal((600, channels))
    return observe((x * np.exp(0.5 * rng.standard_normal(channels))).astype(F32), hessian=True)


def slow(w: np.ndarray, group: int, hessian: np.ndarray, diagonal: bool) -> np.ndarray:
    """Ranges [N, K/group] of symmetric int4: every group of every output on its own."""
    found = np.empty((len(w), w.shape[1] // group), F32)
    for n, g in np.ndindex(*found.shape):
        span = slice(g * group, (g + 1) * group)
        part, h = w[n, span], hessian[span, span]
        losses = []
        for step in range(11):
            high = np.abs(part).max() * F32(1 - step / 20)
            scale = high / F32(7.5)
            error = (part - np.clip(np.rint(part / scale), -8, 7) * scale).astype(np.float64)
            losses.append((error**2 @ np.diagonal(h) if diagonal else error @ h @ error, high))
        found[n, g] = min(losses)[1]
    return found


@both
@pytest.mark.parametrize("group", [32, 128, 256])
def test_equals_a_slow_version(group: int, diagonal: bool) -> None:
    w, s = weight(), correlated()
    assert s.hessian is not None
    plan = LayerPlan("w", "int4", "channel") if group == 256 else LayerPlan("w", "int4", "group", group)
    found = clip_range(w, plan, s, ClipGrid(diagonal=diagonal)).high
    expected = slow(w, group, s.hessian, diagonal)
    assert np.count_nonzero(found != expected) <= 0.01 * found.size  # two steps may be as good as each other


@both
@every
def test_never_worse_than_absmax_in_any_unit(plan: LayerPlan, diagonal: bool) -> None:
    w, s = weight((140, 256)), correlated()
    assert s.hessian is not None
    clipped = round_trip(w, plan, clip_range(w, plan, s, ClipGrid(diagonal=diagonal)))
    losses = [unit_losses(w - q, plan, s.hessian, diagonal) for q in (clipped, round_trip(w, plan))]
    assert np.all(losses[0] <= losses[1])
    assert losses[0].shape == weight_range(w, plan).high.shape


@pytest.mark.parametrize("name", ["int4 channel", "int4 group 32", "int4 group 128", "int4 group 64 asymmetric"])
def test_outputs_are_better_than_by_absmax_and_by_least_weight_error(name: str) -> None:
    w, s, plan = weight(), correlated(), PLANS[name]
    assert s.hessian is not None
    loss = {o: output_loss(w, round_trip(w, replace(plan, weight_observer=o)), s.hessian) for o in ("absmax", "mse")}
    clipped = output_loss(w, round_trip(w, plan, clip_range(w, plan, s)), s.hessian)
    assert clipped <= 0.95 * loss["absmax"]
    assert clipped <= loss["mse"]


def test_the_range_goes_into_an_entry() -> None:
    w, s, plan = weight(), correlated(), PLANS["int4 group 32"]
    chosen = clip_range(w, plan, s)
    stored = dequantize_weight(quantize_weight(w, weight_entry(w, plan, chosen, ", clipped")))
    assert np.array_equal(stored, round_trip(w, plan, chosen))


def test_no_shrink_is_absmax_and_the_last_shrink_is_tried() -> None:
    w, s, plan = weight(), correlated(), PLANS["int4 channel"]
    assert np.array_equal(clip_range(w, plan, s, ClipGrid(max_shrink=0)).high, weight_range(w, plan).high)
    assert ClipGrid(0.5, 4).shrinks().tolist() == [1, 0.75, 0.5]
    assert ClipGrid(0.3, 10).shrinks()[-1] == F32(0.7)


def test_dead_inputs_zeros_and_a_hessian_of_zeros() -> None:
    w, s, plan = weight(), correlated(), PLANS["int4 group 32"]
    assert s.hessian is not None
    dead = s.hessian.copy()
    dead[:32] = dead[:, :32] = 0
    found, whole = clip_range(w, plan, replace(s, hessian=dead)), weight_range(w, plan)
    assert np.array_equal(found.high[:, 0], whole.high[:, 0])  # nothing is heard of it: it stays whole
    assert np.any(found.high[:, 1:] < whole.high[:, 1:])
    assert np.array_equal(clip_range(w, plan, replace(s, hessian=np.zeros_like(dead))).high, whole.high)
    assert not clip_range(np.zeros_like(w), plan, s).high.any()


def test_fewer_tokens_than_channels_and_one_giant_weight() -> None:
    w, plan = weight(), PLANS["int4 channel"]
    w[3, 7] = 1e4
    s = observe(np.random.default_rng(2).standard_normal((5, 256)).astype(F32), hessian=True)
    assert s.hessian is not None
    clipped = round_trip(w, plan, clip_range(w, plan, s))
    assert output_loss(w, clipped, s.hessian) <= output_loss(w, round_trip(w, plan), s.hessian)


def test_what_cannot_be_used_is_refused() -> None:
    w, s, plan = weight(), correlated(), PLANS["int4 channel"]
    with pytest.raises(CalibrationError, match="w: clip needs the Hessian of its input: collect it"):
        clip_range(w, plan, None)
    for grid in (ClipGrid(max_shrink=1.0), ClipGrid(max_shrink=-0.1), ClipGrid(steps=0)):
        with pytest.raises(RecipeError, match=r"max_shrink is in \[0, 1\), steps at least 1"):
            clip_range(w, plan, s, grid)
    w[0, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"w.weight: 1 of 6144 values are NaN or Inf"):
        clip_range(w, plan, s)
