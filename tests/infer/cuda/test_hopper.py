"""Warpgroup products on Hopper, and SwiGLU in the epilogues, against the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.cuda import gemm, hopper
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
    packed = gemm.pack(device, parts_of([weight])[0])
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
    packed = gemm.pack(device_bf16, parts_of([weight])[0])
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


@pytest.mark.parametrize("cut", [hopper.Cut(256, 128, 4, 1, 1), hopper.Cut(128, 256, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(300, 400, 528), (257, 656, 1040)])
def test_results_finished_in_registers(
    device_bf16: Device, cut: hopper.Cut, gated: bool, size: tuple[int, int, int]
) -> None:
    """They equal those that go through shared memory, bit for bit."""
    if not device_bf16.hopper:
        pytest.skip("runs on a Hopper GPU, without QUANTBENCH_CUDA_PORTABLE")
    tokens, n, k = size
    for case in ("int8-int8", "fp8-fp8"):
        weight = weight_of(case, n, k)
        packed = gemm.pack(device_bf16, parts_of([weight])[0])
        a = inputs_of(device_bf16, weight, tokens, k)
        assert a.scale is not None
        x, scale = device_bf16.upload(a.codes), device_bf16.upload(a.scale)  # type: ignore[arg-type]
        got = []
        for direct in (False, True):
            out = device_bf16.empty((tokens, (n // 2 if gated else n) + 16), device_bf16.dtype)
            device_bf16.fill(out, 0xFF)
            hopper.linear(device_bf16, x, scale, packed, out, 8, gated=gated, cut=cut, direct=direct)
            got.append(device_bf16.fetch(out).view(np.uint16))
        np.testing.assert_array_equal(got[0], got[1])
        assert np.all(got[1][:, :8] == 0xFFFF)
        assert np.all(got[1][:, -8:] == 0xFFFF)
        assert not np.all(got[1][:, 8:-8] == 0xFFFF, axis=0).any()


def test_the_cut_follows_from_the_shape() -> None:
    for tokens in (1, 9, 33, 100, 129, 5000):
        for rows, slices in ((4096, 32), (28672, 32), (4096, 112), (128, 1)):
            cut = hopper.cut_for(tokens, rows, slices, 132)
            assert cut.tokens >= min(tokens, 128)
            assert cut.shared * cut.blocks <= hopper.SHARED
            assert cut.stages >= 2
            assert cut.split <= max(1, slices)
            assert cut.stages * (cut.rows + cut.tokens) * hopper.SLICE >= cut.tokens * (cut.rows + 4) * 4
