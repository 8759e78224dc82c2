"""Warpgroup products on Hopper, and SwiGLU in the epilogues, against the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import gemm, hopper, layout
from quantbench.infer.cuda.device import Device
from quantbench.infer.ops import Activation, ActSpec
from quantbench.infer.ops.pack import parts_of

from .linears import REFERENCE, assert_close, inputs_of, weight_of

HOPPER_CUTS = [
    hopper.Cut(8, 64, 8, 2, 2), hopper.Cut(16, 128, 6, 8, 2), hopper.Cut(32, 128, 4, 4, 2),
    hopper.Cut(64, 128, 4, 1, 2), hopper.Cut(128, 128, 3, 2, 2), hopper.Cut(256, 128, 4, 1, 1),
    hopper.Cut(64, 256, 3, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("cut", HOPPER_CUTS, ids=str)
@pytest.mark.parametrize("size", [(7, 264, 1040), (70, 128, 2048), (300, 400, 528)])
def test_warpgroup_products(device: Device, cut: hopper.Cut, size: tuple[int, int, int]) -> None:
    if not device.hopper:
        pytest.skip("runs on a Hopper GPU, without QUANTBENCH_CUDA_PORTABLE")
    tokens, n, k = size
    for case in ("int8-int8", "fp8-fp8", "bf16"):
        weight = weight_of(case, n, k) if case != "bf16" else LinearWeight(
            "w", np.random.default_rng(0).standard_normal((n, k)).astype(ml_dtypes.bfloat16), np.ones(n, np.float32)
        )  # fmt: skip
        a = inputs_of(device, weight, tokens, k)
        if case == "bf16":
            assert a.values is not None
            a = Activation(a.values.astype(ml_dtypes.bfloat16).astype(np.float32))
        got = on_hopper(device, a, weight, cut)
        if case == "int8-int8":
            np.testing.assert_array_equal(got, REFERENCE.linear(a, REFERENCE.pack([weight])))
        else:
            assert_close(got, a, weight, 5e-3 if case == "fp8-fp8" else 3e-5)
            np.testing.assert_array_equal(on_hopper(device, a, weight, cut), got)


def on_hopper(device: Device, a: Activation, weight: LinearWeight, cut: hopper.Cut) -> np.ndarray:
    packed = layout.pack(device, parts_of([weight])[0])
    out = device.empty((a.tokens, packed.rows + 8), np.float32)
    device.fill(out, 0xFF)
    x: Any = a.codes if a.codes is not None else a.values.astype(ml_dtypes.bfloat16)  # type: ignore[union-attr]
    scale = None if a.scale is None else device.upload(a.scale)
    hopper.linear(device, device.upload(x), scale, packed, out, 4, cut=cut)
    got = device.fetch(out)
    assert np.all(np.isnan(got[:, :4]))
    assert np.all(np.isnan(got[:, packed.rows + 4 :]))
    return got[:, 4 : packed.rows + 4]


@pytest.mark.parametrize("tokens", [1, 5, 20, 60, 300])
@pytest.mark.parametrize("case", ["int8-int8", "fp8-fp8", "w4-64-zero", "bf16"])
@pytest.mark.parametrize("spec", [ActSpec(), ActSpec("int8", 0.5), ActSpec("fp8_e4m3", 0.01), ActSpec("int8")], ids=str)
def test_swiglu_in_the_epilogue(device_bf16: Device, case: str, tokens: int, spec: ActSpec) -> None:
    """Against the same product in float32 followed by the reference: gates and ups are not rounded in between."""
    weight = weight_of(case, 208, 640) if case != "bf16" else LinearWeight(
        "w", np.random.default_rng(0).standard_normal((208, 640)).astype(ml_dtypes.bfloat16), None
    )  # fmt: skip
    packed = layout.pack(device_bf16, parts_of([weight])[0])
    if not gemm.fuses_swiglu(device_bf16, packed, tokens, spec):
        pytest.skip("runs on a Hopper GPU, for the cases that gemm.fuses_swiglu names")
    a = inputs_of(device_bf16, weight, tokens, 640)
    lent = Activation(
        None if a.values is None else device_bf16.upload(a.values.astype(ml_dtypes.bfloat16)),  # type: ignore[arg-type]
        None if a.codes is None else device_bf16.upload(a.codes),  # type: ignore[arg-type]
        None if a.scale is None else device_bf16.upload(a.scale),  # type: ignore[arg-type]
        a.format,
    )
    got = gemm.linear_swiglu(device_bf16, lent, packed, spec)
    want = REFERENCE.silu_mul(REFERENCE.linear(a, REFERENCE.pack([weight])), ActSpec())
    assert want.values is not None
    held: Any = got.values if got.codes is None else got.codes
    values = device_bf16.fetch(held).astype(np.float32)
    steps = np.abs(want.values) * 2**-7
    if got.codes is not None:
        scale = device_bf16.fetch(got.scale).reshape(-1, 1)  # type: ignore[arg-type]
        assert spec.scale is None or scale == np.float32(spec.scale)
        values, steps = values * scale, steps * 16 + scale * 1.01
        want.values = np.clip(want.values, *(b * scale for b in ((-127, 127) if got.format == "int8" else (-448, 448))))
    assert np.all(np.abs(values - want.values) <= steps + 1e-2 * np.abs(want.values).max(axis=1, keepdims=True))


TILES = [*map(hopper.Tiles, (96, 224, 256)), hopper.Tiles(224, share=2), hopper.Tiles(256, share=2)]
SPLIT_TILES = [hopper.Tiles(rows, split=2) for rows in (96, 128, 192)]
WIDE_SIZES = [(257, 656, 1040), (300, 2064, 256), (1000, 400, 528)]


@pytest.mark.parametrize("tiles", [*TILES, *SPLIT_TILES], ids=str)
@pytest.mark.parametrize("size", WIDE_SIZES)
@pytest.mark.parametrize("case", ["int8-int8", "fp8-fp8", "bf16"])
def test_tiles(device_bf16: Device, tiles: hopper.Tiles, size: tuple[int, int, int], case: str) -> None:
    """int8 sums are exact and finished as the CPU does; the others differ from it by sums of another order."""
    a, weight = many_tokens(device_bf16, case, size, bias=case != "fp8-fp8")
    got = narrow(device_bf16, a, weight, tiles)
    if case == "int8-int8":
        want = REFERENCE.linear(a, REFERENCE.pack([weight])).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    else:
        assert_close(got.astype(np.float32), a, weight, 1e-2)
        np.testing.assert_array_equal(narrow(device_bf16, a, weight, tiles).view(np.uint16), got.view(np.uint16))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("size", WIDE_SIZES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn], ids=str)
def test_tiles_of_gates_and_ups(
    device_bf16: Device, tiles: hopper.Tiles, size: tuple[int, int, int], dtype: Any
) -> None:
    """The kernel for few tokens gives the same bits."""
    a, weight = many_tokens(device_bf16, "int8-int8", size, bias=dtype == np.int8)
    few = narrow(device_bf16, a, weight, hopper.Cut(256, 128, 4, 1, 1), gated=True, dtype=dtype)
    many = narrow(device_bf16, a, weight, tiles, gated=True, dtype=dtype)
    np.testing.assert_array_equal(many.view(np.uint8), few.view(np.uint8))


def many_tokens(device: Device, case: str, size: tuple[int, int, int], bias: bool) -> tuple[Activation, LinearWeight]:
    if not device.hopper:
        pytest.skip("runs on a Hopper GPU, without QUANTBENCH_CUDA_PORTABLE")
    tokens, n, k = size
    if case != "bf16":
        weight = weight_of(case, n, k, bias=bias)
        return inputs_of(device, weight, tokens, k), weight
    rng = np.random.default_rng(0)
    offset = np.ones(n, np.float32) if bias else None
    weight = LinearWeight("w", rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16), offset)
    return Activation(rng.standard_normal((tokens, k)).astype(ml_dtypes.bfloat16).astype(np.float32)), weight


def narrow(
    device: Device,
    a: Activation,
    weight: LinearWeight,
    cut: hopper.Cut | hopper.Tiles,
    gated: bool = False,
    dtype: Any = ml_dtypes.bfloat16,
) -> np.ndarray:
    """The result in `dtype`, written into the middle columns of a poisoned array; the rest must stay poison."""
    packed = layout.pack(device, parts_of([weight])[0])
    width = packed.rows // 2 if gated else packed.rows
    out = device.empty((a.tokens, width + 16), np.dtype(dtype))
    device.fill(out, 0xFF)
    x: Any = a.codes if a.codes is not None else a.values.astype(ml_dtypes.bfloat16)  # type: ignore[union-attr]
    scale = None if a.scale is None else device.upload(a.scale)
    hopper.linear(device, device.upload(x), scale, packed, out, 8, gated=gated, out_scale=0.37, cut=cut)
    got = device.fetch(out)
    beside = np.concatenate([got[:, :8], got[:, -8:]], axis=1)
    assert np.all(np.ascontiguousarray(beside).view(np.uint8) == 0xFF)
    return np.ascontiguousarray(got[:, 8:-8])


def test_tiles_fit_a_multiprocessor_and_leave_few_idle() -> None:
    for tokens in (1, 64, 65, 129, 257, 1000, 8192):
        for rows, slices, gated in ((4096, 32, False), (28672, 32, True), (4096, 112, False), (272, 4, True)):
            tiles = hopper.tiles_for(tokens, rows, slices, gated, 132)
            assert (tiles is None) == (tokens <= 64) or tokens <= 256
            if tiles is not None:
                assert tiles.shared <= hopper.SHARED
                assert tiles.split == 1 or not gated
                assert 1 <= tiles.blocks(tokens, rows, 132) <= 132
    assert hopper.tiles_for(8192, 28672, 32, True, 132) == hopper.Tiles(256, share=2)


def test_the_cut_follows_from_the_shape() -> None:
    for tokens in (1, 9, 33, 100, 129, 5000):
        for rows, slices in ((4096, 32), (28672, 32), (4096, 112), (128, 1)):
            cut = hopper.cut_for(tokens, rows, slices, 132)
            assert cut.tokens >= min(tokens, 128)
            assert cut.shared * cut.blocks <= hopper.SHARED
            assert cut.stages >= 2
            assert cut.split <= max(1, slices)
            assert cut.stages * (cut.rows + cut.tokens) * hopper.SLICE >= cut.tokens * (cut.rows + 4) * 4
