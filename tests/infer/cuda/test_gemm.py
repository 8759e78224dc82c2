"""Linear layers on the GPU against the numpy reference: every kernel, kind, odd sizes, few and many tokens."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import gemm
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, E4M3, F32, INT4, INT8
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.pack import parts_of
from quantbench.infer.ops.reference import ReferenceOps
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight, scale_shape

E4M3_DTYPE = ml_dtypes.float8_e4m3fn
REFERENCE = ReferenceOps()
CASES = {  # format, granularity, group size, activations, zero points
    "int8-int8": ("int8", "channel", None, "int8", False),
    "fp8-fp8": ("fp8_e4m3", "channel", None, "fp8_e4m3", False),
    "fp8-fp8-block": ("fp8_e4m3", "block", None, "fp8_e4m3", False),
    "int8-fp8": ("int8", "channel", None, "fp8_e4m3", False),
    "w8": ("int8", "channel", None, None, False),
    "w8-zero": ("int8", "channel", None, None, True),
    "w-fp8-block": ("fp8_e4m3", "block", None, None, False),
    "w4": ("int4", "channel", None, None, False),
    "w4-zero": ("int4", "channel", None, None, True),
    "w4-32": ("int4", "group", 32, None, False),
    "w4-64-zero": ("int4", "group", 64, None, True),
    "w4-128": ("int4", "group", 128, None, False),
    "w4-16": ("int4", "group", 16, None, False),
}
SIZES = [(1, 16, 128), (3, 40, 256), (8, 129, 640), (13, 200, 1536), (33, 70, 384), (4, 64, 576), (130, 260, 640)]


def weight_of(case: str, n: int, k: int, seed: int = 0, bias: bool = True) -> LinearWeight:
    format, granularity, group, activations, zero = CASES[case]
    rng = np.random.default_rng(seed + n + k)
    shape = scale_shape(granularity, (n, k), group)
    scale = rng.uniform(0.001, 0.1, shape).astype(np.float32)
    limit = {"int8": 127, "int4": 7}.get(format, 0)
    codes: Any = (
        rng.standard_normal((n, k)).astype(E4M3_DTYPE)
        if format == "fp8_e4m3"
        else rng.integers(-limit, limit + 1, (n, k)).astype(np.int8)
    )
    zeros = rng.integers(-8, 8, shape).astype(np.int32) if zero else None
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    return LinearWeight("w", QuantizedWeight(format, granularity, codes, scale, zeros, group), offset, activations)


def inputs_of(device: Device, weight: LinearWeight, tokens: int, k: int, static: bool = False) -> Activation:
    """Normal numbers, a row of zeros, one outlier; as the device holds them, quantized where the weight says so."""
    x = np.random.default_rng(tokens).standard_normal((tokens, k)).astype(np.float32)
    x[tokens // 2] = 0
    x[tokens - 1, k // 3] = 100
    x = x.astype(device.dtype).astype(np.float32)
    return REFERENCE.quantize(x, ActSpec(weight.activations, 0.05 if static else None))


def run(
    device: Device, a: Activation, weight: LinearWeight, kernel: str | None = None, dtype: Any = np.float32
) -> np.ndarray:
    """The device's result, written into the middle columns of a poisoned array; the rest must stay poison."""
    (part,) = parts_of([weight])
    packed = gemm.pack(device, part)
    out = device.empty((a.tokens, part.rows + 5), dtype)
    device.fill(out, 0xFF)
    lent = Activation(
        None if a.values is None else device.upload(a.values.astype(device.dtype)),  # type: ignore[arg-type]
        None if a.codes is None else device.upload(a.codes),  # type: ignore[arg-type]
        None if a.scale is None else device.upload(a.scale),  # type: ignore[arg-type]
        a.format,
    )
    if kernel is None:
        gemm.linear(device, lent, packed, out, 3)
    else:
        x: Any = lent.values if lent.codes is None else lent.codes
        one = gemm.Linear(
            gemm.kind_of(x.dtype),
            gemm._base(packed.kind),
            a.tokens,
            part.columns,
            gemm._group(packed),
            packed.zero is not None,
        )
        gemm.KERNELS[kernel](device, one, x, lent.scale if lent.codes is not None else None, packed, out, 3)
    got = device.fetch(out).astype(np.float32)
    assert np.all(np.isnan(got[:, :3])), "written before the first column"
    assert np.all(np.isnan(got[:, part.rows + 3 :])), "written beyond the last column"
    return got[:, 3 : part.rows + 3]


def assert_close(got: np.ndarray, a: Activation, weight: LinearWeight, close: float) -> None:
    """Within `close` of the size that the terms of each sum have together."""
    want = REFERENCE.linear(a, REFERENCE.pack([weight]))
    dense = weight.weight if isinstance(weight.weight, np.ndarray) else dequantize_weight(weight.weight)
    x = a.values if a.codes is None else a.codes.astype(np.float32) * a.scale[:, None]  # type: ignore[index]
    size = np.sqrt(np.square(x) @ np.square(dense.astype(np.float32)).T) + np.abs(want)  # type: ignore[arg-type]
    wrong = ~(np.abs(got - want) <= close * size + 1e-30)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong; tokens {np.unique(np.nonzero(wrong)[0])[:20]}, "
        f"rows {np.unique(np.nonzero(wrong)[1])[:20]}; first got {got[wrong][:4]} want {want[wrong][:4]}"
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_every_weight_in_float32(device: Device, case: str, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    k = k // 128 * 128 if case == "w4-128" else k
    weight = weight_of(case, n, k)
    a = inputs_of(device, weight, tokens, k)
    # tensor cores of sm_90 add e4m3 products with some 14 bits
    assert_close(run(device, a, weight), a, weight, 3e-3 if case == "fp8-fp8" else 3e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["w8", "w4-64-zero", "w4-128", "w-fp8-block", "w4", "w4-zero"])
def test_every_weight_with_bf16_inputs(device_bf16: Device, case: str, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    k = k // 128 * 128 if case == "w4-128" else k
    weight = weight_of(case, n, k)
    a = inputs_of(device_bf16, weight, tokens, k)
    assert_close(run(device_bf16, a, weight), a, weight, 5e-3 if tokens > gemm.WIDE_TOKENS else 3e-5)
    assert_close(run(device_bf16, a, weight, dtype=ml_dtypes.bfloat16), a, weight, 1e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_float_weights(device: Device, dtype: Any, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    weight = LinearWeight("w", np.random.default_rng(0).standard_normal((n, k)).astype(dtype), None)
    a = inputs_of(device, weight, tokens, k)
    assert_close(run(device, a, weight), a, weight, 3e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_float_weights_with_bf16_inputs(device_bf16: Device, dtype: Any, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    weight = LinearWeight("w", np.random.default_rng(0).standard_normal((n, k)).astype(dtype), None)
    a = inputs_of(device_bf16, weight, tokens, k)
    assert_close(run(device_bf16, a, weight), a, weight, 3e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (5, 7, 33), (40, 65, 101)])
def test_int8_by_int8_is_exact(device: Device, size: tuple[int, int, int], static: bool) -> None:
    tokens, n, k = size
    weight = weight_of("int8-int8", n, k)
    a = inputs_of(device, weight, tokens, k, static)
    want = REFERENCE.linear(a, REFERENCE.pack([weight]))
    np.testing.assert_array_equal(run(device, a, weight), want)


@pytest.mark.parametrize("kernel", ["stream", "tile", "plain"])
@pytest.mark.parametrize("tokens", [1, 9, 31, 64, 70])
def test_every_int8_kernel_gives_the_same_bits(device: Device, kernel: str, tokens: int) -> None:
    weight = weight_of("int8-int8", 300, 1040)
    a = inputs_of(device, weight, tokens, 1040)
    want = REFERENCE.linear(a, REFERENCE.pack([weight]))
    np.testing.assert_array_equal(run(device, a, weight, kernel), want)


@pytest.mark.parametrize("kernel", ["stream", "tile"])
def test_largest_codes_do_not_overflow(device: Device, kernel: str) -> None:
    k = 14336
    codes = np.full((32, k), -127, np.int8)
    weight = LinearWeight("w", QuantizedWeight("int8", "channel", codes, np.ones((32, 1), np.float32)), None, "int8")
    a = Activation(codes=np.full((3, k), -127, np.int8), scale=np.ones(1, np.float32), format="int8")
    np.testing.assert_array_equal(run(device, a, weight, kernel), np.full((3, 32), np.float32(k * 127 * 127)))


@pytest.mark.parametrize("kernel", ["stream", "tile", "plain"])
@pytest.mark.parametrize("tokens", [2, 33, 65])
def test_every_bf16_kernel(device_bf16: Device, kernel: str, tokens: int) -> None:
    values = np.random.default_rng(0).standard_normal((150, 528)).astype(ml_dtypes.bfloat16)
    weight = LinearWeight("w", values, np.ones(150, np.float32))
    a = inputs_of(device_bf16, weight, tokens, 528)
    assert_close(run(device_bf16, a, weight, kernel), a, weight, 3e-5)


def test_a_row_does_not_depend_on_the_others_in_float32(device: Device) -> None:
    for case in ("w4-64-zero", "w8", "fp8-fp8"):
        weight = weight_of(case, 70, 512)
        a = inputs_of(device, weight, 150, 512)
        together = run(device, a, weight)
        for row in (0, 40, 149):
            rows = slice(row, row + 1)
            one = Activation(
                None if a.values is None else a.values[rows], None if a.codes is None else a.codes[rows],
                None if a.scale is None else a.scale[rows], a.format,
            )  # fmt: skip
            np.testing.assert_array_equal(run(device, one, weight)[0], together[row])


def test_results_repeat(device_bf16: Device) -> None:
    weight = weight_of("w4-128", 4096, 4096, bias=False)
    a = inputs_of(device_bf16, weight, 4, 4096)
    first = run(device_bf16, a, weight)
    for _ in range(5):
        np.testing.assert_array_equal(run(device_bf16, a, weight), first)


def test_int4_words_hold_what_the_kernels_unpack() -> None:
    codes = (np.arange(128) % 16 - 8).astype(np.int8)[None]
    words = gemm.pack_int4(codes).view(np.uint32)[0]
    assert words.shape == (16,)
    nibbles = [(int(words[0]) >> (4 * i)) & 15 for i in range(8)]
    assert [nibbles[0], nibbles[4], nibbles[1], nibbles[5]] == [0, 1, 2, 3]  # inputs 0..3, as code + 8
    assert (int(words[4]) & 15) == 8  # word 4 holds inputs 8..15


@pytest.mark.parametrize(
    ("one", "exact", "same", "want"),
    [
        (gemm.Linear(INT8, INT8, 1, 4096, 0, False), True, False, "stream"),
        (gemm.Linear(INT8, INT8, 500, 4096, 0, False), True, True, "tile"),
        (gemm.Linear(INT8, INT8, 1, 4095, 0, False), True, False, "plain"),
        (gemm.Linear(E4M3, E4M3, 500, 4096, 128, False), False, False, "plain"),
        (gemm.Linear(F32, BF16, 500, 4096, 0, False), False, True, "stream"),
        (gemm.Linear(BF16, BF16, 500, 4096, 0, False), False, False, "tile"),
        (gemm.Linear(BF16, INT4, 64, 4096, 128, True), False, False, "stream"),
        (gemm.Linear(BF16, INT4, 500, 4096, 128, True), False, False, "widen"),
        (gemm.Linear(BF16, INT4, 1, 4096, 16, True), False, False, "plain"),
        (gemm.Linear(BF16, F32, 1, 4096, 0, False), False, False, "plain"),
    ],
)
def test_the_kernel_follows_from_kinds_and_shapes(one: gemm.Linear, exact: bool, same: bool, want: str) -> None:
    assert gemm.choose(one, exact, same) == want


@pytest.mark.parametrize("kind", range(7))
def test_fields_describe_what_pack_makes(kind: int) -> None:
    shapes = gemm.fields(kind, 10, 200, 100, zero=kind == INT4)
    assert shapes["codes"][0] == ((10, 128) if kind == INT4 else (10, 200))
    assert ("scale" in shapes) == (kind > 2)
    assert ("zero" in shapes) == (kind == INT4)
