"""Quantization of activations, fused norms and SwiGLU, embeddings: codes equal the reference bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.ops.reference import ReferenceOps

SPECS = [
    ActSpec("int8"),
    ActSpec("int8", 0.031),
    ActSpec("fp8_e4m3"),
    ActSpec("fp8_e4m3", 0.0071),
    ActSpec("int8", 0.5, True),
]
ARRAYS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 75)),
    elements=st.floats(-(2.0**99), 2.0**99, width=32)
    | st.floats(-4, 4, width=32)
    | st.sampled_from([0.0, -0.0, 2.0**-126, 2.0**-149, 0.5, 1.5, 2.5]),
)


def bits(codes: Any) -> np.ndarray:
    return np.asarray(codes).view(np.uint8)


def assert_same_codes(got: Activation, want: Activation) -> None:
    assert got.format == want.format
    assert np.array_equal(got.scale, want.scale)
    assert np.array_equal(bits(got.codes), bits(want.codes))
    assert (got.values is None) == (want.values is None)


@given(ARRAYS, st.sampled_from(SPECS))
@settings(max_examples=150, deadline=None)
def test_quantize(ops: CpuOps, reference: ReferenceOps, x: np.ndarray, spec: ActSpec) -> None:
    assert_same_codes(ops.quantize(x, spec), reference.quantize(x, spec))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["zeros", "one outlier", "constant", "largest", "halves"])
def test_quantize_dull_inputs(ops: CpuOps, reference: ReferenceOps, spec: ActSpec, kind: str) -> None:
    x = np.zeros((3, 67), np.float32)
    if kind == "one outlier":
        x[1, 66] = 3537.0
    elif kind == "constant":
        x[:] = -7.25
    elif kind == "largest":
        x[:, ::2], x[:, 1::2] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    elif kind == "halves":  # exactly between two codes of scale 0.5: half goes to even
        x[:] = (np.arange(67) - 33) * 0.25
    with np.errstate(over="ignore"):  # numpy warns where the largest floats saturate
        want = reference.quantize(x, spec)
    assert_same_codes(ops.quantize(x, spec), want)


def test_every_float_rounds_to_the_e4m3_that_ml_dtypes_has(ops: CpuOps) -> None:
    edges = np.arange(0, 0x43E00000, 0x7FFF7, np.uint32).view(np.float32)  # up to 448, every exponent
    x = np.concatenate([edges, -edges, [448, -448, 2.0**-9, 2.0**-10, 3 * 2.0**-10]]).astype(np.float32)[None, :]
    got = ops.quantize(x, ActSpec("fp8_e4m3", 1.0))
    assert np.array_equal(bits(got.codes), bits(x.astype(ml_dtypes.float8_e4m3fn)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", SPECS[:4])
def test_what_is_not_finite_raises(ops: CpuOps, value: float, spec: ActSpec) -> None:
    x = np.zeros((5, 70), np.float32)
    x[3, 69] = value
    x[4, 0] = value
    with pytest.raises(CalibrationError, match="row 3 of 5 has a NaN or an infinity"):
        ops.quantize(x, spec)
    with pytest.raises(CalibrationError, match="row 3 of 5"):
        ops.add_norm(x, None, np.ones(70, np.float32), 1e-5, spec)
    with pytest.raises(CalibrationError, match="row 3 of 5"):
        ops.silu_mul(np.concatenate([np.ones_like(x), x], axis=1), spec)


def test_float_spec_passes_through(ops: CpuOps) -> None:
    x = np.ones((2, 3), np.float32)
    assert ops.quantize(x, ActSpec()).values is x


@given(
    st.integers(1, 5), st.integers(1, 90), st.booleans(), st.sampled_from([ActSpec(), *SPECS]), st.integers(0, 2**31)
)
@settings(max_examples=80, deadline=None)
def test_add_norm(ops: CpuOps, reference: ReferenceOps, t: int, d: int, add: bool, spec: ActSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, delta = (rng.standard_normal((t, d)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(d).astype(np.float32)
    mine, other = x.copy(), x.copy()
    got = ops.add_norm(mine, delta if add else None, weight, 1e-5, spec)
    want = reference.add_norm(other, delta if add else None, weight, 1e-5, spec)
    assert np.array_equal(mine, other)
    if spec.format is None or spec.keep_float:
        np.testing.assert_allclose(got.values, want.values, rtol=1e-6, atol=1e-12)
    if spec.format:
        assert_codes_almost(got, want)


@given(st.integers(1, 5), st.integers(1, 90), st.sampled_from([ActSpec(), *SPECS]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_silu_mul(ops: CpuOps, reference: ReferenceOps, t: int, width: int, spec: ActSpec, seed: int) -> None:
    gate_up = np.random.default_rng(seed).standard_normal((t, 2 * width)).astype(np.float32) * 5
    got, want = ops.silu_mul(gate_up, spec), reference.silu_mul(gate_up, spec)
    if spec.format is None or spec.keep_float:
        np.testing.assert_allclose(got.values, want.values, rtol=1e-5, atol=1e-7)
    if spec.format:
        floats = ops.silu_mul(gate_up).values
        assert_same_codes(
            got, ops.quantize(floats, ActSpec(spec.format, spec.scale, spec.keep_float))
        )  # fused = in two steps
        assert_codes_almost(got, want)


def test_silu_of_extremes(ops: CpuOps) -> None:
    gate = np.array([[-3e38, -200, -88, 0, 88, 200, 3e38]], np.float32)
    got = ops.silu_mul(np.concatenate([gate, np.ones_like(gate)], axis=1)).values
    np.testing.assert_allclose(got, np.where(gate > 0, gate, 0), rtol=1e-6, atol=1e-30 + 3e38 * 2e-38)


def assert_codes_almost(got: Activation, want: Activation) -> None:
    """Floats that differ in the last bit may fall on the other side of a rounding edge, by one code at most."""
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-5)
    a, b = (np.asarray(c.codes).astype(np.float32) for c in (got, want))
    step = 1.0 if got.format == "int8" else np.maximum(np.abs(b) / 8, 2.0**-9)
    assert np.all(np.abs(a - b) <= step)
    assert np.count_nonzero(a != b) <= 1 + a.size // 50


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_embed(ops: CpuOps, dtype: Any) -> None:
    table = np.random.default_rng(0).standard_normal((71, 37)).astype(dtype)
    ids = np.array([0, 70, 31, 32, 33, 70], np.int32)
    packed = ops.pack(LinearWeight("model.embed_tokens", table, None))
    assert np.array_equal(ops.embed(packed, ids), table[ids].astype(np.float32))


def test_embed_refuses_ids_beyond_the_table_and_quantized_tables(ops: CpuOps) -> None:
    packed = ops.pack(LinearWeight("e", np.zeros((4, 8), np.float32), None))
    for bad in (4, -1):
        with pytest.raises(ValueError, match="token id is beyond"):
            ops.embed(packed, np.array([bad], np.int32))
