from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantbench.errors import RequestError
from quantbench.infer.checkpoint.source import ModelSource, Quantization, open_model
from quantbench.infer.engine.mode import resolve_mode, stored_mode
from quantbench.vocabulary import CachePlan, LayerPlan


@pytest.fixture
def source(model_path: Callable[[str], Path]) -> ModelSource:
    return open_model(str(model_path("llama")))


def quantized(source: ModelSource, weights: str, activations: str | None, cache: str | None = None) -> ModelSource:
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]
    layers = {name: LayerPlan(name, weights, "channel", activations=activations) for name in names}
    odd = LayerPlan("model.layers.1.mlp.up_proj", "fp8_e4m3", "tensor")
    plan = Quantization(layers | {odd.name: odd}, CachePlan(cache) if cache else None)
    return replace(source, quantization=plan)


@pytest.mark.parametrize(
    ("weights", "activations", "cache", "name"),
    [
        ("int8", "int8", None, "a8w8"),
        ("int8", "int8", "int8", "a8w8c8"),
        ("int8", "int8", "int8_dynamic", "a8w8c8_dynamic"),
        ("int8", None, None, "weight_only_int8"),
        ("int4", None, "fp8_e4m3", "weight_only_int4c8_fp8"),
        ("fp8_e4m3", "fp8_e4m3", "fp8_e4m3", "a8w8_fp8c8_fp8"),
        ("int4", "int8", None, "int4-int8-bfloat16"),
    ],
)
def test_a_checkpoint_is_called_after_most_of_its_linears(
    weights: str, activations: str | None, cache: str | None, name: str, source: ModelSource
) -> None:
    stored = quantized(source, weights, activations, cache)
    assert stored_mode(stored).name == name
    assert resolve_mode(stored, None) == (stored_mode(stored), False)
    assert resolve_mode(stored, name) == (stored_mode(stored), False)


def test_a_checkpoint_whose_cache_alone_is_quantized(source: ModelSource) -> None:
    only_cache = replace(source, quantization=Quantization({}, CachePlan("int8")))
    assert stored_mode(only_cache).name == "fp32c8"


@pytest.mark.parametrize(("model", "name"), [("llama", "fp32"), ("llama_bfloat16", "bf16"), ("llama_float16", "fp16")])
def test_a_float_source_runs_as_stored_or_converted(model: str, name: str, model_path: Callable[[str], Path]) -> None:
    source = open_model(model_path(model))
    assert resolve_mode(source, None)[0].name == name
    assert not resolve_mode(source, None)[1]
    mode, converts = resolve_mode(source, "a8w8")
    assert (mode.name, converts) == ("a8w8", True)


def test_an_unknown_mode_is_refused_with_the_nearest(source: ModelSource) -> None:
    with pytest.raises(RequestError, match=r"unknown mode 'a8w9'. Did you mean a8w8\? Known: a8w8"):
        resolve_mode(source, "a8w9")


def test_a_quantized_cache_needs_calibrated_scales(source: ModelSource) -> None:
    refused = "in int8 with calibrated scales, which a float model does not have; run .*, or take 'a8w8c8_dynamic'"
    with pytest.raises(RequestError, match=refused):
        resolve_mode(source, "a8w8c8")
    assert resolve_mode(source, "a8w8c8_dynamic")[0].cache == "int8_dynamic"


def test_a_checkpoint_has_one_mode(source: ModelSource) -> None:
    with pytest.raises(RequestError, match="mode 'bf16' asked of a checkpoint that is stored as 'a8w8'; leave"):
        resolve_mode(quantized(source, "int8", "int8"), "bf16")
