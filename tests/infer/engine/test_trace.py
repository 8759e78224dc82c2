from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantbench.infer.engine import Engine
from quantbench.quantizers.activation import quantize_activation

IDS = np.random.default_rng(11).integers(0, 97, 90).tolist()
TAPS = {"attn_in": 64, "o_in": 64, "mlp_in": 64, "down_in": 96}


@pytest.mark.parametrize("chunk", [512, 40])
@pytest.mark.parametrize("mode", ["a8w8", "a8w8_fp8"])
def test_codes_are_those_of_the_recorded_input(mode: str, chunk: int, load: Callable[..., Engine]) -> None:
    trace = load("llama", mode, chunk=chunk).trace(IDS)
    for layer in range(2):
        for name, width in TAPS.items():
            tap = trace.taps[f"model.layers.{layer}.{name}"]
            assert tap.values.shape == (90, width)
            assert tap.codes is not None
            assert tap.scale is not None
            codes, scale = quantize_activation(tap.values, "int8" if mode == "a8w8" else "fp8_e4m3", None)
            assert np.array_equal(tap.codes.astype(np.float32), codes.astype(np.float32))
            assert np.array_equal(tap.scale, scale)
    assert trace.taps["lm_head"].codes is None


def test_a_float_trace_has_inputs_and_keys_but_no_codes(load: Callable[..., Engine]) -> None:
    trace = load("llama", "bf16").trace(IDS)
    names = {f"model.layers.{i}.{tap}" for i in range(2) for tap in [*TAPS, "k", "v"]} | {"lm_head"}
    assert trace.taps.keys() == names
    assert all(tap.codes is None and tap.scale is None for tap in trace.taps.values())
    assert trace.taps["model.layers.1.k"].values.shape == (90, 2, 16)


@pytest.mark.parametrize("mode", ["fp32", "a8w8"])
def test_tracing_changes_nothing(mode: str, load: Callable[..., Engine]) -> None:
    engine = load("qwen3", mode)
    assert np.array_equal(engine.trace(IDS).logits, engine.score(IDS))
