"""Linear layers of every weight format against the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CheckpointError, DependencyError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.ops.reference import ReferenceOps
from quantbench.quantizers.weight import QuantizedWeight, scale_shape

E4M3 = ml_dtypes.float8_e4m3fn
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)
QUANTIZED = [
    ("int8", "channel", None, None), ("int8", "tensor", None, None),
    ("int8", "channel", None, "int8"), ("int8", "tensor", None, "int8"), ("int8", "channel", None, "fp8_e4m3"),
    ("int4", "channel", None, None),
    ("int4", "group", 32, None), ("int4", "group", 64, None), ("int4", "group", 128, None), ("int4", "group", 12, None),
    ("int4", "group", 64, "int8"), ("int8", "group", 32, None), ("fp8_e4m3", "channel", None, None),
    ("fp8_e4m3", "tensor", None, "fp8_e4m3"), ("fp8_e4m3", "channel", None, "fp8_e4m3"),
    ("fp8_e4m3", "block", None, "fp8_e4m3"), ("fp8_e4m3", "block", None, None),
]  # fmt: skip
SHAPES = st.tuples(st.sampled_from([1, 2, 3, 5, 8, 12, 13, 29]), st.integers(1, 140), st.integers(1, 530))


def float_weight(rng: np.random.Generator, n: int, k: int, dtype: Any, bias: bool = True) -> LinearWeight:
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    return LinearWeight("w", rng.standard_normal((n, k)).astype(dtype), offset)


def quantized_weight(rng: np.random.Generator, n: int, k: int, case: Any, zero: bool = False) -> LinearWeight:
    format, granularity, group, activations = case
    shape = scale_shape(granularity, (n, k), group)
    scale = rng.uniform(0.001, 0.1, shape).astype(np.float32)
    limit = {"int8": 127, "int4": 7}.get(format, 0)
    codes = (
        rng.standard_normal((n, k)).astype(E4M3)
        if format == "fp8_e4m3"
        else rng.integers(-limit, limit + 1, (n, k)).astype(np.int8)
    )
    zeros = rng.integers(-8, 8, shape).astype(np.int32) if zero else None
    return LinearWeight("w", QuantizedWeight(format, granularity, codes, scale, zeros, group), None, activations)


def assert_close(got: np.ndarray, want: np.ndarray, a: Activation, k: int) -> None:
    """1e-5 of the size that the terms of a sum have together."""
    assert got.shape == want.shape
    assert np.all(np.isfinite(got))
    size = np.abs(want).max(initial=0) + np.sqrt(k) * 1e-1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * size)


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_float_weights(
    ops: CpuOps, reference: ReferenceOps, shape: tuple[int, int, int], dtype: Any, seed: int
) -> None:
    t, n, k = shape
    rng = np.random.default_rng(seed)
    w = float_weight(rng, n, k, dtype, bias=bool(seed % 2))
    a = Activation(rng.standard_normal((t, k)).astype(np.float32))
    assert_close(ops.linear(a, ops.pack(w)), reference.linear(a, reference.pack(w)), a, k)


@given(SHAPES, st.sampled_from(QUANTIZED), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_quantized_weights(
    ops: CpuOps, reference: ReferenceOps, shape: tuple[int, int, int], case: Any, static: bool, zero: bool, seed: int
) -> None:
    t, n, k = shape
    k = -(-k // case[2]) * case[2] if case[2] else k
    rng = np.random.default_rng(seed)
    w = quantized_weight(rng, n, k, case, zero and case[0].startswith("int") and case[3] is None)
    a = ops.quantize(rng.standard_normal((t, k)).astype(np.float32), ActSpec(case[3], 0.02 if static else None))
    got, want = ops.linear(a, ops.pack(w)), reference.linear(a, reference.pack(w))
    if case[0] == case[3] == "int8":
        assert np.array_equal(got, want)  # the same int32 sums, and the same float32 steps after them
    else:
        assert_close(got, want, a, k)


@pytest.mark.parametrize("codes", ["zeros", "largest", "smallest", "one outlier", "constant"])
@pytest.mark.parametrize("t", [1, 2, 7, 12, 40])
def test_extreme_int8_codes_accumulate_exactly(ops: CpuOps, codes: str, t: int) -> None:
    k, n = 4867, 37  # no multiple of 4 or 32
    fill = {"zeros": 0, "largest": 127, "smallest": -127, "one outlier": 0, "constant": 3}[codes]
    a = np.full((t, k), fill, np.int8)
    w = np.full((n, k), 127 if codes != "constant" else -128, np.int8)  # files of others may hold -128
    if codes == "one outlier":
        a[:, 4865] = 127
    ones = np.ones((n, 1), np.float32)
    packed = ops.pack(LinearWeight("w", QuantizedWeight("int8", "channel", w, ones), None, "int8"))
    got = ops.linear(Activation(None, a, np.ones(1, np.float32), "int8"), packed)
    assert np.array_equal(got, (a.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_extremes(ops: CpuOps, dtype: Any) -> None:
    w = np.zeros((33, 65), dtype)
    w[0, 64], w[32, 0], w[5, 7] = 1, -1, np.ldexp(1.0, -20)  # 2^-20 is subnormal in f16
    x = np.zeros((3, 65), np.float32)
    x[0, 64], x[1, 0], x[2, 7] = 3e38, -3e38, 1
    y = ops.linear(Activation(x), ops.pack(LinearWeight("w", w, None)))
    want = np.zeros((3, 33), np.float32)
    large = np.float32(3e38).astype(dtype if dtype == ml_dtypes.bfloat16 else np.float32)  # bf16 multiplies bf16
    want[0, 0], want[1, 32], want[2, 5] = large, large, 2.0**-20
    assert np.array_equal(y, want)


def test_every_e4m3_code_is_decoded_exactly(ops: CpuOps) -> None:
    bits = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    codes = np.ascontiguousarray(bits.view(E4M3)[:, None])
    w = LinearWeight("w", QuantizedWeight("fp8_e4m3", "tensor", codes, np.ones(1, np.float32)), None, "fp8_e4m3")
    a = Activation(None, codes, np.ones(1, np.float32), "fp8_e4m3")
    exact = codes.astype(np.float32)
    assert np.array_equal(ops.linear(a, ops.pack(w)), exact @ exact.T)


@pytest.mark.parametrize("k", [1, 7, 8, 9, 31])
def test_every_int4_code_at_every_input(ops: CpuOps, k: int) -> None:
    codes = np.array([[(n + i) % 16 - 8 for i in range(k)] for n in range(35)], np.int8)
    w = LinearWeight("w", QuantizedWeight("int4", "channel", codes, np.ones((35, 1), np.float32)), None)
    assert np.array_equal(ops.linear(Activation(np.eye(k, dtype=np.float32)), ops.pack(w)), codes.T.astype(np.float32))


def test_float_inputs_of_int4_weights_keep_more_than_16_bits(ops: CpuOps) -> None:
    """What splitting a float into two bf16 may cost, against what rounding it to one would: 2^-17 and 2^-9."""
    x = np.random.default_rng(3).uniform(1, 2, (40, 64)).astype(np.float32)
    codes = np.eye(64, dtype=np.int8)
    w = LinearWeight("w", QuantizedWeight("int4", "group", codes, np.ones((64, 2), np.float32), None, 32), None)
    assert np.abs(ops.linear(Activation(x), ops.pack(w)) / x - 1).max() <= 2.0**-16.9


def test_no_tokens(ops: CpuOps) -> None:
    packed = ops.pack(float_weight(np.random.default_rng(0), 40, 8, np.float32))
    assert ops.linear(Activation(np.empty((0, 8), np.float32)), packed).shape == (0, 40)


@pytest.mark.parametrize("t", [1, 15])
def test_fused_groups_equal_their_members(ops: CpuOps, reference: ReferenceOps, t: int) -> None:
    """Rows that are no multiple of a panel, biases on some, and a member of another format in between."""
    rng = np.random.default_rng(1)
    eight = [quantized_weight(rng, n, 96, ("int8", "channel", None, "int8")) for n in (37, 5, 64)]
    biased = LinearWeight("b", eight[1].weight, rng.standard_normal(5).astype(np.float32), "int8")
    group = [eight[0], biased, float_weight(rng, 7, 96, np.float32), eight[2]]
    a = ops.quantize(rng.standard_normal((t, 96)).astype(np.float32), ActSpec("int8", None, keep_float=True))
    packed = ops.pack(group)
    assert packed.shape == (113, 96)
    assert len(packed.parts) == 3  # the first two are one native weight
    got = ops.linear(a, packed)
    assert np.array_equal(got, np.concatenate([ops.linear(a, ops.pack(w)) for w in group], axis=1))
    assert_close(got, reference.linear(a, reference.pack(group)), a, 96)


@pytest.mark.parametrize("case", [QUANTIZED[0], QUANTIZED[6]], ids=lambda case: f"{case[0]}-{case[1]}")
def test_weights_below_each_other_are_packed_from_where_they_lie(ops: CpuOps, case: Any) -> None:
    """Weights of one kind end inside a panel of 32 channels, and int4 pairs channels of two of them in one byte."""
    rng = np.random.default_rng(2)
    group = [quantized_weight(rng, n, 128, case) for n in (37, 5, 19, 40)]
    a = Activation(rng.standard_normal((3, 128)).astype(np.float32))
    packed = ops.pack(group)
    assert len(packed.parts) == 1
    apart = [ops.linear(a, ops.pack(w)) for w in group]
    assert np.array_equal(ops.linear(a, packed), np.concatenate(apart, axis=1))


def test_packing_reports_every_problem(ops: CpuOps) -> None:
    odd = LinearWeight("a", np.zeros((2, 4), np.float64), None)
    bad = LinearWeight(
        "b", QuantizedWeight("int8", "tensor", np.zeros((2, 4), np.int8), np.array([np.nan], np.float32)), None
    )
    unknown = LinearWeight(
        "c", QuantizedWeight("int3", "tensor", np.zeros((2, 5), np.int8), np.ones(1, np.float32)), None
    )
    codes = np.full((2, 4), 0x7F, np.uint8).view(E4M3)
    nan = LinearWeight("d", QuantizedWeight("fp8_e4m3", "tensor", codes, np.ones(1, np.float32)), None)
    with pytest.raises(CheckpointError) as error:
        ops.pack([odd, bad, unknown, nan])
    problems = error.value.problems
    assert problems[0] == "a: weight dtype float64 cannot be run; allowed: float32, bfloat16, float16"
    assert problems[1].startswith("b: its weight scale holds a NaN")
    assert problems[2] == "c: weight format 'int3' cannot be run; allowed: int8, int4, fp8_e4m3"
    assert problems[3].startswith("d: its e4m3 weight holds NaN codes")
    assert problems[4] == "a, b, c, d: fused linears have different numbers of inputs"


def test_weights_of_another_backend_are_refused(ops: CpuOps, reference: ReferenceOps) -> None:
    w = float_weight(np.random.default_rng(0), 4, 4, np.float32)
    a = Activation(np.zeros((1, 4), np.float32))
    with pytest.raises(DependencyError, match="w: packed by another backend"):
        ops.linear(a, reference.pack(w))
    with pytest.raises(DependencyError, match="w: packed by another backend"):
        reference.linear(a, ops.pack(w))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 5), np.float32), "values must be"),
        (np.zeros((2, 8), np.float32)[:, ::2], "incompatible"),
        (np.zeros((2, 4)), "incompatible"),
    ],
)
def test_wrong_arrays_are_refused(ops: CpuOps, values: np.ndarray, message: str) -> None:
    packed = ops.pack(float_weight(np.random.default_rng(0), 4, 4, np.float32))
    with pytest.raises((ValueError, TypeError), match=message):
        ops.linear(Activation(values), packed)


def test_int8_weights_take_no_e4m3_codes(ops: CpuOps) -> None:
    packed = ops.pack(quantized_weight(np.random.default_rng(0), 4, 4, ("int8", "channel", None, "int8")))
    codes = Activation(None, np.zeros((1, 4), E4M3), np.ones(1, np.float32), "fp8_e4m3")
    with pytest.raises(ValueError, match="needs int8 codes or floats"):
        ops.linear(codes, packed)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([0.0, 1e3, 1e30]))
def test_floats_beside_int8_weights_are_as_good_as_float32(ops: CpuOps, shape: Any, seed: int, outlier: float) -> None:
    """Three digits hold an input to 2^-23 of the row's largest; the sums are exact, so nothing else is lost."""
    t, n, k = shape
    rng = np.random.default_rng(seed)
    weight = quantized_weight(rng, n, k, ("int8", "channel", None, None))
    x = rng.standard_normal((t, k)).astype(np.float32)
    x[0, 0] += np.float32(outlier)
    got = ops.linear(Activation(x), ops.pack(weight))
    w = weight.weight.codes.astype(np.float64) * weight.weight.scale
    want, largest = x.astype(np.float64) @ w.T, np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    bound = largest * np.abs(w).sum(axis=1) * 2.0**-23 + np.abs(want) * 2.0**-22 + largest * np.abs(w).max() * 2.0**-21
    assert np.all(np.abs(got - want) <= bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_apart(ops: CpuOps, bad: float) -> None:
    packed = ops.pack(quantized_weight(np.random.default_rng(0), 40, 37, ("int8", "channel", None, None)))
    x = np.random.default_rng(1).standard_normal((5, 37)).astype(np.float32)
    x[2, 36] = bad
    got = ops.linear(Activation(x), packed)
    assert np.isnan(got[2]).all()
    assert np.isfinite(np.delete(got, 2, axis=0)).all()


def test_rows_of_zeros_and_of_almost_nothing_beside_int8_weights(ops: CpuOps) -> None:
    packed = ops.pack(quantized_weight(np.random.default_rng(0), 40, 37, ("int8", "channel", None, None)))
    x = np.zeros((2, 37), np.float32)
    x[1] = 1e-41
    assert not ops.linear(Activation(x), packed).any()
