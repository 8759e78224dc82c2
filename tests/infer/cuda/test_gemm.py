"""Linear layers on the GPU against the numpy reference: every kernel, kind, odd sizes, few and many tokens."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import gemm, layout
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, E4M3, F32, INT4, INT8
from quantbench.infer.ops import Activation
from quantbench.quantizers.weight import QuantizedWeight

from .linears import CASES, REFERENCE, SIZES, assert_close, inputs_of, run, weight_of


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
    assert_close(run(device_bf16, a, weight), a, weight, 1e-2 if tokens > gemm.WIDE_TOKENS else 3e-5)
    assert_close(run(device_bf16, a, weight, dtype=ml_dtypes.bfloat16), a, weight, 1e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_float_weights(device: Device, dtype: Any, size: tuple[int, int, int]) -> None:
    tokens, n, k = size
    weight = LinearWeight("w", np.random.default_rng(0).standard_normal((n, k)).astype(dtype), None)
    a = inputs_of(device, weight, tokens, k)
    exact = LinearWeight("w", weight.weight.astype(np.float32), None)  # the float32 column does not round inputs
    assert_close(run(device, a, weight), a, exact, 3e-5)


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
    words = layout.pack_int4(codes).view(np.uint32)[0]
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
    shapes = layout.fields(kind, 10, 200, 100, zero=kind == INT4)
    assert shapes["codes"][0] == ((10, 128) if kind == INT4 else (10, 200))
    assert ("scale" in shapes) == (kind > 2)
    assert ("zero" in shapes) == (kind == INT4)
