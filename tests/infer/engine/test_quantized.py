"""Engines on calibrated sources: static activation scales and an 8-bit cache, whatever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.source import EMBEDDING, LinearWeight, ModelSource, Quantization, open_model
from quantbench.infer.engine import Engine, SamplingParams
from quantbench.infer.engine.convert import round_to_nearest
from quantbench.infer.models import linear_names
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.formats import FORMATS
from quantbench.vocabulary import CachePlan, LayerPlan

RANDOM = np.random.default_rng(21)
PROMPTS = [RANDOM.integers(1, 97, n).tolist() for n in (3, 70, 41, 130, 12)]
INPUT_SCALES = {"self_attn.q_proj": 0.03, "self_attn.k_proj": 0.03, "self_attn.v_proj": 0.03, "self_attn.o_proj": 0.05,
                "mlp.gate_proj": 0.03, "mlp.up_proj": 0.03, "mlp.down_proj": 0.1}  # fmt: skip


@dataclass
class Calibrated(ModelSource):
    """A float source served as if it had been calibrated: int8 weights, static scales, a cache with scales per head."""

    own_scales: dict[str, float] = field(default_factory=dict)  # of linears that were calibrated apart
    damaged: str = ""

    def linear(self, name: str) -> LinearWeight:
        if name == "lm_head":
            return LinearWeight(name, self.read(EMBEDDING), None)
        weight = self.read(f"{name}.weight")
        if name == self.damaged:
            return LinearWeight(name, np.full_like(weight, np.nan), None)
        scale = self.own_scales.get(name, INPUT_SCALES[name.split(".", 3)[3]])
        return LinearWeight(name, round_to_nearest(weight, "int8"), None, "int8", scale)

    def cache_scales(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        divisor = (
            FORMATS[self.quantization.cache.format].divisor if self.quantization and self.quantization.cache else 1
        )
        return tuple(np.array([4 + layer, 6], np.float32) / np.float32(divisor) for _ in "kv")


@pytest.fixture
def calibrated(model_path: Callable[[str], Path]) -> Callable[..., Calibrated]:
    def source_of(cache: str = "int8", **changes: object) -> Calibrated:
        source = open_model(str(model_path("llama")))
        layers = {name: LayerPlan(name, "int8", "channel", activations="int8") for name in linear_names(source.config)}
        own = {f.name: getattr(source, f.name) for f in fields(ModelSource)}
        return Calibrated(**(own | {"quantization": Quantization(layers, CachePlan(cache))} | changes))

    return source_of


@pytest.mark.parametrize("ops", ["reference", "cpu"])
@pytest.mark.parametrize("cache", ["int8", "fp8_e4m3"])
def test_static_scales_and_an_8_bit_cache(cache: str, ops: str, calibrated: Callable[..., Calibrated]) -> None:
    source, params = calibrated(cache), SamplingParams(max_tokens=30, ignore_eos=True)
    engine = Engine.load(source, ops=ops, max_batch=3, chunk=50)
    apart = Engine.load(source, ops=ops, prefix_reuse=False)
    assert engine.mode.name == ("a8w8c8" if cache == "int8" else "a8w8c8_fp8")
    together = [c.ids for c in engine.generate(PROMPTS, params)]
    assert together == [apart.generate([p], params)[0].ids for p in PROMPTS]
    tight = Engine.load(source, ops=ops, cache_tokens=256)
    assert [c.ids for c in tight.generate(PROMPTS, params)] == together
    assert tight.scheduler.preemptions > 0


@pytest.mark.parametrize("ops", ["reference", "cpu"])
@pytest.mark.parametrize("cache", ["int8", "fp8_e4m3"])
def test_a_trace_holds_static_codes_and_those_of_the_cache(
    cache: str, ops: str, calibrated: Callable[..., Calibrated]
) -> None:
    float_engine = Engine.load(open_model(str(calibrated().path)), "fp32", ops=ops)
    trace = Engine.load(calibrated(cache), ops=ops, chunk=60).trace(PROMPTS[3])
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


def test_scales_that_were_calibrated_apart_are_each_obeyed(calibrated: Callable[..., Calibrated]) -> None:
    name = "model.layers.0.self_attn.k_proj"
    same, apart = calibrated(own_scales={name: 0.03}), calibrated(own_scales={name: 0.3})
    logits = [Engine.load(s, ops=ops).score(PROMPTS[1]) for s in (same, apart) for ops in ("reference", "cpu")]
    assert np.abs(logits[0] - logits[2]).max() > 0.01  # ten times coarser keys are seen
    assert np.linalg.norm(logits[2] - logits[3]) < 1e-2 * np.linalg.norm(logits[2])


@pytest.mark.parametrize("ops", ["reference", "cpu"])
def test_a_nan_is_reported_with_its_layer(ops: str, calibrated: Callable[..., Calibrated]) -> None:
    engine = Engine.load(calibrated(damaged="model.layers.1.mlp.up_proj"), ops=ops)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1: activation: .*NaN or"):
        engine.generate([[1, 2, 3]])
    assert engine.idle  # nobody is left waiting for a model that cannot run
    assert engine.runner.cache.pool.available == engine.runner.cache.pool.pages
