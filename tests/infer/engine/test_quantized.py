"""Engines on calibrated sources: static activation scales and an 8-bit cache, whatever wrote them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.ops import Ops
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.formats import FORMATS

RANDOM = np.random.default_rng(21)
PROMPTS = [RANDOM.integers(1, 97, n).tolist() for n in (3, 70, 41, 130, 12)]


@pytest.mark.parametrize("cache", ["int8", "fp8_e4m3"])
def test_static_scales_and_an_8_bit_cache(
    cache: str, column: str | Ops, calibrated: Callable[..., ModelSource]
) -> None:
    source, params = calibrated(cache), SamplingParams(max_tokens=30, ignore_eos=True)
    engine = Engine.load(source, ops=column, max_batch=3, chunk=50)
    apart = Engine.load(source, ops=column, prefix_reuse=False)
    assert engine.mode.name == ("a8w8c8" if cache == "int8" else "a8w8c8_fp8")
    together = [c.ids for c in engine.generate(PROMPTS, params)]
    assert together == [apart.generate([p], params)[0].ids for p in PROMPTS]
    tight = Engine.load(source, ops=column, cache_tokens=256)
    assert [c.ids for c in tight.generate(PROMPTS, params)] == together
    assert tight.scheduler.preemptions > 0


@pytest.mark.parametrize("cache", ["int8", "fp8_e4m3"])
def test_a_trace_holds_static_codes_and_those_of_the_cache(
    cache: str, column: str | Ops, calibrated: Callable[..., ModelSource]
) -> None:
    float_engine = Engine.load(open_model(str(calibrated().path)), "fp32", ops=column)
    trace = Engine.load(calibrated(cache), ops=column, chunk=60).trace(PROMPTS[3])
    float_trace = float_engine.trace(PROMPTS[3])
    for tap, scale in (("attn_in", 0.03), ("o_in", 0.05), ("down_in", 0.1)):
        seen = trace.taps[f"model.layers.1.{tap}"]
        assert seen.codes is not None
        assert np.array_equal(seen.codes, quantize_activation(seen.values, "int8", scale)[0])
        assert np.array_equal(seen.scale, np.array([scale], np.float32))
    k, exact = trace.taps["model.layers.0.k"], float_trace.taps["model.layers.0.k"]
    assert k.codes is not None
    assert k.scale is not None
    assert k.codes.shape == (130, 2, 16)
    assert k.codes.dtype.itemsize == 1
    assert np.allclose(k.scale, np.array([4, 6]) / FORMATS[cache].divisor)
    inside = np.abs(exact.values) < np.array([4, 6])[:, None]
    assert np.abs(k.values - exact.values)[inside].mean() < 0.1


def test_scales_that_were_calibrated_apart_are_each_obeyed(calibrated: Callable[..., ModelSource]) -> None:
    name = "model.layers.0.self_attn.k_proj"
    same, apart = calibrated(own_scales={name: 0.03}), calibrated(own_scales={name: 0.3})
    logits = [Engine.load(s, ops=ops).score(PROMPTS[1]) for s in (same, apart) for ops in ("reference", "cpu")]
    assert np.abs(logits[0] - logits[2]).max() > 0.01  # ten times coarser keys are seen
    assert np.linalg.norm(logits[2] - logits[3]) < 1e-2 * np.linalg.norm(logits[2])


def test_a_nan_is_reported_with_its_layer(column: str | Ops, calibrated: Callable[..., ModelSource]) -> None:
    engine = Engine.load(calibrated(damaged="model.layers.1.mlp.up_proj"), ops=column)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1: activation: .*NaN or"):
        engine.generate([[1, 2, 3]])
    assert engine.idle  # nobody is left waiting for a model that cannot run
    assert engine.runner.cache.pool.available == engine.runner.cache.pool.pages
