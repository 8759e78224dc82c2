from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from quantbench.errors import CalibrationError
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.gptq import gptq
from quantbench.quantizers.methods import METHODS
from quantbench.quantizers.output_loss import output_loss
from quantbench.quantizers.rtn import rtn
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight, expand
from quantbench.quantizers.weight_range import weight_entry
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import Entry
from quantbench.vocabulary import LayerPlan

F32 = np.float32
PLANS = {
    "int4 channel": LayerPlan("w", "int4", "channel"),
    "int4 group 32": LayerPlan("w", "int4", "group", 32),
    "int4 group 64": LayerPlan("w", "int4", "group", 64),
    "int4 group 128": LayerPlan("w", "int4", "group", 128),
    "int4 group 64 asymmetric": LayerPlan("w", "int4", "group", 64, symmetric=False),
    "int8 channel": LayerPlan("w", "int8", "channel"),
    "int8 group 128": LayerPlan("w", "int8", "group", 128),
    "int8 channel asymmetric": LayerPlan("w", "int8", "channel", symmetric=False),
}
every = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def weight(shape: tuple[int, int] = (24, 256)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(F32)


def correlated(channels: int = 256, rank: int = 24) -> Statistics:
    """Inputs that lie near a subspace, with channels of very different size, as activations do."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1024, rank)) @ rng.standard_normal((rank, channels)) + 0.3 * rng.standard_normal(
        (1024, channels)
    )
    return observe((x * np.exp(0.5 * rng.standard_normal(channels))).astype(F32), hessian=True)


def loss(w: np.ndarray, q: QuantizedWeight, s: Statistics) -> float:
    assert s.hessian is not None
    return output_loss(w, dequantize_weight(q), s.hessian)


def slow(w: np.ndarray, entry: Entry, hessian: np.ndarray, act_order: bool) -> np.ndarray:
    """Optimal brain surgeon: one column at a time, the inverse Hessian shrunk by elimination."""
    w, h, fmt = w.astype(np.float64), hessian.copy(), FORMATS[entry.format]
    wide = [None if a is None else np.broadcast_to(expand(a, entry.granularity, w.shape, entry.group_size), w.shape)
            for a in (entry.scale, entry.zero)]  # fmt: skip
    order = np.argsort(-np.diagonal(h), kind="stable") if act_order else range(len(h))
    inverse = np.linalg.inv(h + 0.01 * np.diagonal(h).mean() * np.eye(len(h)))
    codes = np.empty(w.shape, fmt.storage)
    for i in order:
        at = [None if a is None else a[:, i] for a in wide]
        codes[:, i] = fmt.encode(w[:, i].astype(F32), *at)
        w -= np.outer((w[:, i] - fmt.decode(codes[:, i], *at)) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@every
def test_loss_is_at_most_six_tenths_of_round_to_nearest(plan: LayerPlan) -> None:
    w, s = weight(), correlated()
    entry = weight_entry(w, plan)
    assert loss(w, gptq(w, entry, s), s) <= 0.6 * loss(w, rtn(w, entry, s), s)


@every
@pytest.mark.parametrize("act_order", [True, False])
def test_equals_a_slow_version(plan: LayerPlan, act_order: bool) -> None:
    w, s = weight(), correlated()
    entry = weight_entry(w, plan)
    assert s.hessian is not None
    fast = gptq(w, entry, s, act_order=act_order).codes
    different = np.count_nonzero(fast != slow(w, entry, s.hessian, act_order))
    assert different <= 1e-3 * w.size  # a tie may fall either way, and what follows it


@pytest.mark.parametrize("channels", [1, 15, 129, 200])
def test_any_number_of_inputs(channels: int) -> None:
    w, s = weight((6, channels)), correlated(channels, rank=3)
    entry = weight_entry(w, LayerPlan("w", "int4", "channel"))
    assert s.hessian is not None
    assert np.array_equal(gptq(w, entry, s).codes, slow(w, entry, s.hessian, act_order=True))


def test_outputs_do_not_depend_on_each_other() -> None:
    w, s = weight(), correlated()
    whole = gptq(w, weight_entry(w, PLANS["int4 group 64"]), s).codes
    part = gptq(w[:7], weight_entry(w[:7], PLANS["int4 group 64"]), s).codes
    assert np.array_equal(whole[:7], part)


def test_uncorrelated_inputs_give_round_to_nearest() -> None:
    w = weight((8, 64))
    entry = weight_entry(w, LayerPlan("w", "int4", "channel"))
    identity = replace(correlated(64), hessian=np.eye(64))
    assert np.array_equal(gptq(w, entry, identity).codes, rtn(w, entry, None).codes)


def test_dead_inputs_and_a_hessian_of_zeros() -> None:
    w, s = weight((8, 64)), correlated(64)
    entry = weight_entry(w, LayerPlan("w", "int4", "channel"))
    assert s.hessian is not None
    hessian = s.hessian.copy()
    hessian[[3, 9]] = hessian[:, [3, 9]] = 0
    codes = gptq(w, entry, replace(s, hessian=hessian)).codes
    assert np.array_equal(codes[:, [3, 9]], rtn(w, entry, None).codes[:, [3, 9]])
    assert np.array_equal(gptq(w, entry, replace(s, hessian=np.zeros((64, 64)))).codes, rtn(w, entry, None).codes)


def test_fewer_tokens_than_channels_and_one_giant_input() -> None:
    w = weight()
    x = np.random.default_rng(2).standard_normal((5, 256)).astype(F32)
    x[0, 7] = 1e4
    s, entry = observe(x, hessian=True), weight_entry(w, LayerPlan("w", "int4", "group", 64))
    assert loss(w, gptq(w, entry, s), s) < loss(w, rtn(w, entry, s), s)


def test_damping_is_raised_until_it_suffices() -> None:
    w, entry = weight((4, 32)), weight_entry(weight((4, 32)), LayerPlan("w", "int8", "channel"))
    indefinite = np.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # eigenvalue -0.05: 1 % is too little, 10 % enough
    s = replace(correlated(32), hessian=indefinite)
    assert gptq(w, entry, s).codes.shape == w.shape
    with pytest.raises(
        CalibrationError, match=r"w.weight: the Hessian of its input is not positive definite even with 1%"
    ):
        gptq(w, entry, s, damping=(0.01,))


def test_zeros_stay_zeros() -> None:
    w = np.zeros((4, 64), F32)
    assert not gptq(w, weight_entry(w, LayerPlan("w", "int4", "group", 32)), correlated(64)).codes.any()


def test_what_cannot_be_used_is_refused() -> None:
    w, s = weight((4, 64)), correlated(64)
    entry = weight_entry(w, LayerPlan("w", "int8", "channel"))
    for absent in (None, replace(s, hessian=None)):
        with pytest.raises(CalibrationError, match=r"w.weight: gptq needs the Hessian of its input: collect it"):
            gptq(w, entry, absent)
    with pytest.raises(CalibrationError, match=r"w.weight: the Hessian of its input: 4096 of 4096 values are NaN"):
        gptq(w, entry, replace(s, hessian=np.full((64, 64), np.nan)))
    w[0, 0] = np.inf
    with pytest.raises(CalibrationError, match=r"w.weight: 1 of 256 values are NaN or Inf"):
        gptq(w, entry, s)


def test_it_is_registered() -> None:
    assert METHODS["gptq"].quantize is gptq
    assert METHODS["gptq"].needs_hessian


def slow_sweep(w: np.ndarray, codes: np.ndarray, entry: Entry, hessian: np.ndarray) -> np.ndarray:
    """Coordinate descent: the errors of all others gathered anew for every column."""
    fmt, codes = FORMATS[entry.format], codes.copy()
    wide = (
        None if a is None else expand(a, entry.granularity, w.shape, entry.group_size)
        for a in (entry.scale, entry.zero)
    )
    scale, zero = (None if a is None else np.broadcast_to(a, w.shape) for a in wide)
    h = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    errors = w.astype(np.float64) - fmt.decode(codes, scale, zero)
    for k in np.argsort(-np.diagonal(hessian), kind="stable"):
        others = errors @ h[:, k] - errors[:, k] * h[k, k]
        at = scale[:, k], None if zero is None else zero[:, k]
        codes[:, k] = fmt.encode((w[:, k] + others / h[k, k]).astype(F32), *at)
        errors[:, k] = w[:, k].astype(np.float64) - fmt.decode(codes[:, k], *at)
    return codes


@every
def test_a_sweep_equals_a_slow_version(plan: LayerPlan) -> None:
    w, s = weight(), correlated()
    entry = weight_entry(w, plan)
    assert s.hessian is not None
    expected = slow_sweep(w, gptq(w, entry, s).codes, entry, s.hessian)
    different = np.count_nonzero(gptq(w, entry, s, sweeps=1).codes != expected)
    assert different <= 1e-3 * w.size  # a tie may fall either way, and what follows it


@every
def test_every_sweep_lowers_the_damped_loss_until_nothing_changes(plan: LayerPlan) -> None:
    w, s = weight(), correlated()
    entry = weight_entry(w, plan)
    assert s.hessian is not None
    damped = replace(s, hessian=s.hessian + 0.01 * np.diagonal(s.hessian).mean() * np.eye(len(s.hessian)))
    losses = [loss(w, gptq(w, entry, s, sweeps=n), damped) for n in range(4)]
    assert losses[1] < losses[0]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    end = [gptq(w, entry, s, sweeps=n).codes for n in (19, 20)]
    assert np.mean(end[0] != end[1]) < 1e-2


def test_sweeps_over_dead_inputs_zeros_and_one_giant() -> None:
    w, s = weight((8, 64)), correlated(64, rank=3)
    w[2] = 0
    entry = weight_entry(w, LayerPlan("w", "int4", "channel"))
    assert s.hessian is not None
    hessian = s.hessian.copy()
    hessian[[3, 9]] = hessian[:, [3, 9]] = 0
    hessian[5] *= 1e4
    hessian[:, 5] *= 1e4
    dull = replace(s, hessian=hessian)
    codes = gptq(w, entry, dull, sweeps=2)
    assert np.array_equal(codes.codes[:, [3, 9]], rtn(w, entry, None).codes[:, [3, 9]])
    assert loss(w, codes, dull) <= loss(w, gptq(w, entry, dull), dull) * 1.05  # what sinks is the damped loss
    assert not codes.codes[2].any()
