"""PaddleSlim 2.6 as an oracle: ours agrees with its Smooth, Shift and GPTQ, or is better by their own loss.

AWQSearch is in test_awq.py. Smooth computes in float16, which the CPU cannot, and GPTQ assigns to an empty index where
no input is dead: both are patched here, in memory, and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from quantbench.calibrate.paddle_device import import_paddle
from quantbench.calibrate.paddleslim import live_observer
from quantbench.quantizers.gptq import gptq
from quantbench.quantizers.output_loss import output_loss
from quantbench.quantizers.shift import fold_shift, head_shift
from quantbench.quantizers.smooth import fold_into_inputs, smooth_factors
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import weight_entry
from quantbench.scales.statistics import observe
from quantbench.vocabulary import LayerPlan

F32 = np.float32
CHANNELS, OUTPUTS = 64, 48


@pytest.fixture(scope="module")
def paddle() -> ModuleType:
    live_observer("paddleslim:absmax", 1)  # imports PaddleSlim without its warnings and its logging
    return import_paddle()


def rows(seed: int = 1, shape: tuple[int, ...] = (2, 100, CHANNELS)) -> np.ndarray:
    """Correlated inputs with means and channels of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape[:-1], 8)) @ np.random.default_rng(0).standard_normal((8, shape[-1]))
    x += rng.standard_normal(shape)
    spread = np.random.default_rng(7)
    return ((x + 2 * spread.standard_normal(shape[-1])) * np.exp(spread.standard_normal(shape[-1]))).astype(F32)


def weight() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((OUTPUTS, CHANNELS)).astype(F32)


class Pair:
    """A norm and one linear in Paddle, as PaddleSlim finds them by their names."""

    def __init__(self, paddle: ModuleType) -> None:
        self.norm = paddle.nn.LayerNorm(CHANNELS)
        self.linear = paddle.nn.Linear(CHANNELS, OUTPUTS)
        self.linear.weight.set_value(np.ascontiguousarray(weight().T))
        self.norm.weight.set_value(np.exp(np.random.default_rng(5).standard_normal(CHANNELS)).astype(F32))
        self.norm.bias.set_value(np.random.default_rng(6).standard_normal(CHANNELS).astype(F32))
        self.model = paddle.nn.Sequential(self.norm, self.linear)
        self._paddle = paddle

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with self._paddle.no_grad():
            return np.asarray(self.model(self._paddle.to_tensor(x)).numpy())

    def between(self, x: np.ndarray) -> np.ndarray:
        """What the linear reads."""
        with self._paddle.no_grad():
            return np.asarray(self.norm(self._paddle.to_tensor(x)).numpy())


@contextlib.contextmanager
def in_float32(paddle: ModuleType) -> Iterator[None]:
    """Casts to float16 give float32."""
    cast = paddle.Tensor.cast
    paddle.Tensor.cast = lambda tensor, dtype: cast(tensor, "float32" if dtype == "float16" else dtype)
    try:
        yield
    finally:
        paddle.Tensor.cast = cast


def walked(walker: Any, pair: Pair, batches: list[np.ndarray]) -> Any:
    """PaddleSlim's way: once to learn the layers, then every batch, then the weights are changed."""
    with contextlib.redirect_stdout(io.StringIO()):
        pair(batches[0])
        for x in batches:
            pair(x)
            walker.step += 1
        walker.update_weight()
    return walker


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_smoothing_factors_are_those_of_its_smooth(paddle: ModuleType, alpha: float) -> None:
    from paddleslim.quant.advanced import Smooth

    pair, batches = Pair(paddle), [rows(1), rows(2)]
    before, act = pair(batches[0]), np.max([np.abs(pair.between(x)).max(axis=(0, 1)) for x in batches], axis=0)
    with in_float32(paddle):
        found = walked(Smooth(pair.model, {}, alpha=alpha), pair, batches)
    (theirs,) = found.smooth_scale_dict.values()
    ours = smooth_factors(act, np.abs(weight()).max(axis=0), alpha)
    np.testing.assert_allclose(ours, theirs.numpy().ravel(), rtol=1e-5)
    np.testing.assert_allclose(pair.linear.weight.numpy().T, fold_into_inputs(weight(), ours), rtol=1e-5)
    np.testing.assert_allclose(pair(batches[0]), before, atol=1e-3)


def test_the_shift_and_its_biases_are_those_of_its_shift(paddle: ModuleType) -> None:
    """Of one batch: over several it averages each new middle with the mean of all before. Its norm stands where v_proj
    is for us, its linear where o_proj is, and every head has values of its own."""
    from paddleslim.quant.advanced import Shift

    pair, x = Pair(paddle), rows()
    before, seen = pair(x), pair.between(x).reshape(-1, CHANNELS)
    old = {"self_attn.v_proj.bias": pair.norm.bias.numpy(), "self_attn.o_proj.bias": pair.linear.bias.numpy()}
    found = walked(Shift(pair.model, {}), pair, [x])
    (theirs,) = found.zero_point_dict.values()
    ours = head_shift(seen, 4, CHANNELS // 4, midrange=True)
    np.testing.assert_allclose(ours, theirs.numpy().ravel(), rtol=1e-5, atol=1e-6)
    biases = fold_shift({"self_attn.o_proj.weight": weight()} | old, ours, 4, CHANNELS // 4)
    np.testing.assert_allclose(biases["self_attn.v_proj.bias"], pair.norm.bias.numpy(), atol=1e-5)
    np.testing.assert_allclose(biases["self_attn.o_proj.bias"], pair.linear.bias.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pair(x), before, atol=1e-3)


def its_gptq(paddle: ModuleType, x: np.ndarray, bits: int, act_order: bool) -> np.ndarray:
    """Weight [N, K] as PaddleSlim's GPTQ leaves it."""
    from paddleslim.quant.advanced import GPTQ

    linear = paddle.nn.Linear(x.shape[1], OUTPUTS)
    linear.weight.set_value(np.ascontiguousarray(weight()[:, : x.shape[1]].T))
    with paddle.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        method = GPTQ(linear, quant_bits=bits)
        method(paddle.to_tensor(x))
        method.fasterquant(actorder=act_order)
    return np.ascontiguousarray(linear.weight.numpy().T)


@contextlib.contextmanager
def without_dead_columns(paddle: ModuleType) -> Iterator[None]:
    """Its assignment to the diagonal of dead columns, which fails for an empty index, becomes one that does nothing."""
    where, assign = paddle.where, paddle.Tensor.__setitem__
    nothing = object()

    def found(condition: Any, *values: Any) -> Any:
        return where(condition, *values) if values or bool(condition.any()) else nothing

    def set_unless_nothing(tensor: Any, index: Any, value: Any) -> None:
        if not (isinstance(index, tuple) and nothing in [i for i in index if not isinstance(i, paddle.Tensor)]):
            assign(tensor, index, value)

    paddle.where, paddle.Tensor.__setitem__ = found, set_unless_nothing
    try:
        yield
    finally:
        paddle.where, paddle.Tensor.__setitem__ = where, assign


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_at_least_as_good_as_its_gptq(paddle: ModuleType, bits: int, act_order: bool) -> None:
    x, w = rows(shape=(300, CHANNELS)), weight()
    with without_dead_columns(paddle):
        theirs = its_gptq(paddle, x, bits, act_order)
    seen = observe(x, hessian=True)
    assert seen.hessian is not None
    own = weight_entry(w, LayerPlan("w", f"int{bits}", "channel"))
    shared = replace(own, scale=own.absmax / F32(2 ** (bits - 1) - 1))  # its scale, also for int4
    ours, with_its_scale = (dequantize_weight(gptq(w, e, seen, act_order, damping=(0.01,))) for e in (own, shared))
    rounded = dequantize_weight(quantize_weight(w, shared))
    loss, nearest = (output_loss(w, q, seen.hessian) for q in (theirs, rounded))
    assert loss < 0.8 * nearest  # the oracle itself works
    assert output_loss(w, with_its_scale, seen.hessian) <= 1.05 * loss
    assert output_loss(w, ours, seen.hessian) <= 1.05 * loss
    # One algorithm, in float32 there and in float64 here: a few codes near a half differ, and what follows from them.
    assert np.mean(np.abs(with_its_scale - theirs) < 1e-3 * shared.scale) > 0.9
