"""A quantized linear survives its way into a checkpoint's tensors and back, whatever its size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.infer.checkpoint.tensors import (
    cache_kinds,
    cache_tensors,
    linear_kinds,
    linear_tensors,
    quantized_weight,
)
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.vocabulary import CachePlan, LayerPlan

from .conftest import entry_of

PLANS = {
    "int8 channel": LayerPlan("x", "int8", "channel", activations="int8"),
    "int8 tensor": LayerPlan("x", "int8", "tensor", activations="int8", dynamic=True),
    "int8 only": LayerPlan("x", "int8", "channel"),
    "int4 channel": LayerPlan("x", "int4", "channel"),
    "int4 channel asymmetric": LayerPlan("x", "int4", "channel", symmetric=False),
    "int4 group": LayerPlan("x", "int4", "group", 32),
    "int4 group asymmetric": LayerPlan("x", "int4", "group", 32, symmetric=False),
    "fp8 tensor": LayerPlan("x", "fp8_e4m3", "tensor", activations="fp8_e4m3"),
    "fp8 channel": LayerPlan("x", "fp8_e4m3", "channel", activations="fp8_e4m3", dynamic=True),
    "fp8 block": LayerPlan("x", "fp8_e4m3", "block", activations="fp8_e4m3", dynamic=True),
}
MATRICES = {
    "zeros": np.zeros((9, 64), np.float32),
    "one outlier": np.eye(9, 64, dtype=np.float32) * 1e6 + np.float32(1e-3),
    "constant": np.full((9, 64), -0.25, np.float32),
    "positive": np.linspace(0, 1, 9 * 64, dtype=np.float32).reshape(9, 64),
}


def check(plan: LayerPlan, w: np.ndarray) -> None:
    weight = quantize_weight(w, entry_of(plan, w))
    scale = 0.5 if plan.activations and not plan.dynamic else None
    stored = linear_tensors(plan, weight, scale)
    kinds = linear_kinds(plan, w.shape)
    assert {name: (a.shape, a.dtype) for name, a in stored.items()} == kinds
    back = quantized_weight(plan, w.shape, stored)
    assert np.array_equal(back.codes, weight.codes)
    assert np.array_equal(dequantize_weight(back), dequantize_weight(weight))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)
def test_dull_matrices(plan, w):
    check(plan, w)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PLANS)), st.integers(1, 20), st.integers(1, 8), st.integers(0, 99))
def test_any_size(name, rows, columns, seed):
    plan = PLANS[name]
    columns = columns * 32 if plan.granularity == "group" else columns * 7
    check(plan, np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def test_the_layout_of_packed_words():
    """Code c is stored as c + 8, the first in the lowest bits; zero points go down the outputs."""
    plan = LayerPlan("x", "int4", "group", 32, symmetric=False)
    w = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    weight = quantize_weight(w, entry_of(plan, w))
    stored = linear_tensors(plan, weight)
    word = int(stored["weight_packed"].view(np.uint32)[0, 0])
    assert [((word >> (4 * i)) & 15) - 8 for i in range(8)] == weight.codes[0, :8].tolist()
    word = int(stored["weight_zero_point"].view(np.uint32)[0, 0])
    assert [((word >> (4 * i)) & 15) - 8 for i in range(8)] == weight.zero[:, 0].tolist()
    assert stored["weight_shape"].tolist() == [8, 32]


def test_cache_scales():
    found = cache_tensors(np.array([1, 2]), np.array([3, 4]))
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        f"self_attn.{name}": kind for name, kind in cache_kinds(CachePlan("int8"), 2).items()
    }
    assert found["self_attn.v_scale"].ravel().tolist() == [3, 4]
    assert cache_kinds(CachePlan("bfloat16"), 2) == {}
