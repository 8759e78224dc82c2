"""Reading quantized directories, ours and other people's, that keep to compressed-tensors' layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.check import FLOATS, shown, tensor_problems
from quantbench.infer.checkpoint.scheme import parse_config
from quantbench.infer.checkpoint.shard import Array, TensorStore
from quantbench.infer.checkpoint.source import EMBEDDING, F32, LinearWeight, ModelSource, Quantization
from quantbench.infer.checkpoint.tensors import Kinds, cache_kinds, linear_kinds, quantized_weight
from quantbench.infer.models import ModelConfig, block_prefix, linear_names, linear_shapes, model_tensors
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight
from quantbench.vocabulary import LayerPlan

_SCALES = ("weight_scale", "input_scale", "k_scale", "v_scale")


def open_quantized(source: ModelSource) -> ModelSource:
    """Completes an opened directory whose config.json has a `quantization_config`. Raises CheckpointError listing
    unsupported keys, missing, extra and misshapen tensors, and scales that are NaN, infinite, zero or negative.
    """
    config, store = source.config, source.store
    layers, cache = parse_config(source.hf_config["quantization_config"], linear_names(config))
    if "lm_head" in layers and config.tie_word_embeddings and "lm_head.weight_scale" not in store.names():
        del layers["lm_head"]  # "Linear" also matches a head that shares the embedding's float matrix
    quantization = Quantization(layers, cache)
    kinds = expected_kinds(config, quantization)
    shapes = {name: shape for name, (shape, _) in kinds.items()}
    problems = tensor_problems(store, shapes, _allowed(kinds), config.tie_word_embeddings)
    problems += scale_problems(store)
    if problems:
        raise CheckpointError(*shown(source.path, problems))
    return replace(source, quantization=quantization, config=replace(config, dtype=store.dtype(EMBEDDING).name))


def expected_kinds(config: ModelConfig, quantization: Quantization) -> Kinds:
    """Every tensor of a checkpoint: full name -> shape and dtype (floats are given as float32)."""
    kinds: Kinds = {name: (shape, np.dtype(np.float32)) for name, shape in model_tensors(config).items()}
    for name, plan in quantization.layers.items():
        kinds.pop(f"{name}.weight", None)
        kinds |= {f"{name}.{part}": kind for part, kind in linear_kinds(plan, linear_shape(name, config)).items()}
    for layer in range(config.num_layers) if quantization.cache else ():
        assert quantization.cache is not None
        scales = cache_kinds(quantization.cache, config.num_kv_heads)
        kinds |= {f"{block_prefix(layer)}.self_attn.{part}": kind for part, kind in scales.items()}
    return kinds


def linear_shape(name: str, config: ModelConfig) -> tuple[int, int]:
    """[N, K] of a linear by full name."""
    if name == "lm_head":
        return config.vocab_size, config.hidden_size
    return linear_shapes(config)[name.split(".", 3)[3]]


def _allowed(kinds: Kinds) -> dict[str, frozenset[np.dtype[Any]]]:
    """Scales and floats may be of any float dtype (others store them in the model's); codes are what they are."""
    return {name: FLOATS if dtype in FLOATS else frozenset({dtype}) for name, (_, dtype) in kinds.items()}


def scale_problems(store: TensorStore) -> list[str]:
    """One line per scale tensor with a value that is NaN, infinite, zero or negative."""
    problems = []
    for name in store.names():
        if name.endswith(_SCALES):
            scale = np.asarray(store.read(name), np.float32)
            bad = ~(np.isfinite(scale) & (scale > 0))
            if bad.any():
                problems.append(
                    f"tensor {name}: {int(bad.sum())} of {scale.size} scales are NaN, infinite, zero or negative "
                    f"(first: {float(scale[bad][0])} at {np.argwhere(bad)[0].tolist()})"
                )
    return problems


def read_linear(source: ModelSource, name: str, bias: F32 | None) -> LinearWeight:
    """One quantized linear by full name."""
    assert source.quantization is not None
    plan = source.quantization.layers[name]
    shape = linear_shape(name, source.config)
    parts = linear_kinds(plan, shape)
    stored = {part: source.store.read(f"{name}.{part}") for part in parts}
    scale = _input_scale(plan, stored)
    return LinearWeight(name, quantized_weight(plan, shape, stored), bias, plan.activations, scale)


def float_weight(linear: LinearWeight) -> F32:
    """The float32 matrix [N, K] that a quantized linear stands for."""
    assert isinstance(linear.weight, QuantizedWeight)
    return dequantize_weight(linear.weight)


def _input_scale(plan: LayerPlan, stored: Mapping[str, Array]) -> float | None:
    if plan.activations is None or plan.dynamic:
        return None
    return float(np.asarray(stored["input_scale"], np.float32).reshape(-1)[0])
