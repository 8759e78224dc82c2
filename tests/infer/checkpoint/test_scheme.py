"""quantization_config: what a plan writes is what reading gives back, and what is not served is refused by its key."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.scheme import layout_of, parse_config, quantization_config
from quantbench.infer.checkpoint.source import open_model
from quantbench.vocabulary import MODES, LayerPlan

from .conftest import variant_of

WORDS = ("name", "weights", "granularity", "group_size", "symmetric", "activations", "dynamic")


def words(plans):
    return {name: [getattr(plan, word) for word in WORDS] for name, plan in plans.items() if plan.quantized}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_round_trip(make_model, mode, dynamic):
    source = open_model(make_model())
    variant = variant_of(mode, source, dynamic=dynamic and MODES[mode].activations is not None)
    config = quantization_config(variant)
    if not MODES[mode].quantized:
        assert config is None
        return
    layers, cache = parse_config(json.loads(json.dumps(config)), variant.layers)
    assert words(layers) == words(variant.layers)
    assert (cache.format if cache else None) == (variant.cache.format if variant.cache.quantized else None)


def test_mixed_schemes_name_their_linears(make_model):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    packed = variant_of("weight_only_int4", source, symmetric=False).layers
    mixed = {n: packed[n] if "down_proj" in n else p for n, p in variant.layers.items()}
    mixed["model.layers.0.self_attn.o_proj"] = LayerPlan("model.layers.0.self_attn.o_proj", "bfloat16")
    variant = replace(variant, layers=mixed)
    config = quantization_config(variant)
    assert config["format"] == "mixed-precision"
    assert [g["format"] for g in config["config_groups"].values()] == ["int-quantized", "pack-quantized"]
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    assert words(parse_config(config, mixed)[0]) == words(mixed)


def test_layouts():
    assert layout_of(LayerPlan("x", "int8", activations="int8")) == "int-quantized"
    assert layout_of(LayerPlan("x", "int8")) == layout_of(LayerPlan("x", "int4")) == "pack-quantized"
    assert layout_of(LayerPlan("x", "fp8_e4m3")) == "float-quantized"


@pytest.fixture
def config(make_model):
    return quantization_config(variant_of("a8w8c8", open_model(make_model())))


LINEARS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]


def test_targets_and_ignore_by_name_pattern_and_class(config):
    group = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = copy.deepcopy(group) | {"targets": ["re:.*layers.1.*"]}
    config["config_groups"]["group_1"]["weights"]["strategy"] = "tensor"
    layers, _ = parse_config(config, LINEARS)
    assert {n: p.granularity for n, p in layers.items()} == {LINEARS[0]: "channel", LINEARS[1]: "tensor"}
    config["ignore"] = ["re:.*layers.0.*"]
    assert set(parse_config(config, LINEARS)[0]) == set(LINEARS[1:])


def edited(config, path, value):
    changed = copy.deepcopy(config)
    *outer, last = path.split("/")
    place = changed
    for key in outer:
        place = place[key]
    place[last] = value
    return changed


GROUP = "config_groups/group_0"
REFUSED = [
    ("quant_method", "gptq", "quant_method: 'gptq' is not supported; only compressed-tensors is"),
    ("sparsity_config", {"format": "sparse-24"}, "sparsity_config: not supported; it must be empty"),
    ("transform_config", {"x": {}}, "transform_config: not supported; it must be empty"),
    (
        "kv_cache_scheme/strategy",
        "token",
        "kv_cache_scheme.strategy: 'token' with dynamic False is not supported; allowed: tensor, attn_head with",
    ),
    ("kv_cache_scheme/dynamic", True, "kv_cache_scheme.strategy: 'attn_head' with dynamic True is not supported"),
    ("kv_cache_scheme/symmetric", False, "kv_cache_scheme.symmetric: false is not supported; keys and values have"),
    ("kv_cache_scheme/num_bits", 4, "kv_cache_scheme.num_bits: 4 is not supported; allowed: 8"),
    (f"{GROUP}/format", "nvfp4-pack-quantized", "format: 'nvfp4-pack-quantized' is not supported; allowed: int-quant"),
    (f"{GROUP}/weights", None, "group_0.weights: absent; only groups that quantize weights are supported"),
    (f"{GROUP}/output_activations", {"num_bits": 8}, "output_activations: not supported; it must be null"),
    (f"{GROUP}/weights/color", 1, "weights.color: unknown key. Known: num_bits"),
    (f"{GROUP}/weights/num_bits", 3, "weights: 3 int is not supported; allowed: 4 int, 8 float, 8 int"),
    (f"{GROUP}/weights/strategy", "token", "weights.strategy: 'token' is not supported; allowed: tensor, channel"),
    (f"{GROUP}/weights/dynamic", True, "weights.dynamic: weights have static scales; it must be false"),
    (f"{GROUP}/weights/actorder", "group", "weights.actorder: 'group' is not supported; allowed: null, static, weight"),
    (f"{GROUP}/weights/strategy", "block", "weights.block_structure: None is not supported; allowed: [128, 128]"),
    (f"{GROUP}/weights/strategy", "group", "weights.group_size: None is not a number of inputs"),
    (f"{GROUP}/weights/symmetric", False, "weights.symmetric: false is supported only where the input stays float"),
    (
        f"{GROUP}/input_activations/type",
        "float",
        "input_activations: fp8_e4m3 inputs of int8 weights are not supported",
    ),
    (f"{GROUP}/input_activations/symmetric", False, "input_activations.symmetric: false is not supported"),
    (f"{GROUP}/input_activations/strategy", "group", "input_activations.strategy: 'group' with dynamic False is not"),
    (f"{GROUP}/input_activations/dynamic", "local", "input_activations.strategy: 'tensor' with dynamic local is not"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p}={v}" for p, v, _ in REFUSED])
def test_what_is_refused(config, path, value, message):
    with pytest.raises(CheckpointError) as refused:
        parse_config(edited(config, path, value), LINEARS)
    assert any(p.startswith("quantization_config.") and message in p for p in refused.value.problems)


def test_everything_is_refused_at_once(config):
    config = edited(edited(config, "quant_method", "awq"), f"{GROUP}/weights/num_bits", 3)
    with pytest.raises(CheckpointError) as refused:
        parse_config(edited(config, "kv_cache_scheme/dynamic", True), LINEARS)
    assert len(refused.value.problems) == 3
