from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight, open_model
from quantbench.infer.engine.convert import round_to_nearest
from quantbench.infer.engine.forward import project
from quantbench.infer.engine.weights import load_model, pack_group
from quantbench.infer.ops import ActSpec, load_ops
from quantbench.quantizers.weight import QuantizedWeight
from quantbench.vocabulary import parse_mode

OPS = load_ops("reference")


def linear(rows: int, format: str | None, activations: str | None = None, scale: float | None = None) -> LinearWeight:
    w = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
    return LinearWeight(f"w{rows}", round_to_nearest(w, format) if format else w, None, activations, scale)


@pytest.mark.parametrize(
    ("linears", "spec", "packed"),
    [
        ([linear(3, "int8", "int8"), linear(4, "int8", "int8")], ActSpec("int8"), 1),
        ([linear(3, "int8", "int8", 0.5), linear(4, "int8", "int8", 0.5)], ActSpec("int8", 0.5), 1),
        ([linear(3, "int8", "int8", 0.5), linear(4, "int8", "int8", 0.25)], ActSpec(), 2),
        ([linear(3, "int8", "int8"), linear(4, None)], ActSpec(), 2),
        ([linear(3, "int8"), linear(4, "int4")], ActSpec(), 2),
        ([linear(3, None), linear(4, None)], ActSpec(), 1),
    ],
    ids=["dynamic", "static", "own_scales", "one_float", "formats", "float"],
)
def test_linears_are_fused_where_they_are_alike(linears: list[LinearWeight], spec: ActSpec, packed: int) -> None:
    group = pack_group(OPS, linears)
    assert (group.spec, len(group.packed)) == (spec, packed)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    apart = []
    for one in linears:
        own = ActSpec(one.activations, one.input_scale)
        apart.append(OPS.linear(OPS.quantize(x, own), OPS.pack(one)))
    assert np.array_equal(project(OPS, OPS.quantize(x, group.spec), group), np.concatenate(apart, axis=1))


def test_blocks_that_end_inside_a_weight_are_not_stacked() -> None:
    def blocked(rows: int, name: str) -> LinearWeight:
        scale = np.ones((-(-rows // 128), 1), np.float32)
        return LinearWeight(name, QuantizedWeight("fp8_e4m3", "block", np.zeros((rows, 64), np.int8), scale), None)

    assert len(pack_group(OPS, [blocked(100, "a"), blocked(100, "b")]).packed) == 2
    assert len(pack_group(OPS, [blocked(128, "a"), blocked(128, "b")]).packed) == 1


def test_a_tied_head_is_the_embedding_itself(model_path: Callable[[str], Path]) -> None:
    tied = load_model(open_model(str(model_path("llama"))), OPS, parse_mode("bf16"))
    untied = load_model(open_model(str(model_path("mistral"))), OPS, None)
    assert tied.head.packed == (tied.embedding,)
    assert untied.head.packed[0] is not untied.embedding


def test_norms_are_rounded_in_float_modes_only(model_path: Callable[[str], Path]) -> None:
    source = open_model(str(model_path("qwen3")))
    stored = source.read("model.norm.weight")
    assert np.array_equal(load_model(source, OPS, parse_mode("a8w8")).norm, stored)
    rounded = load_model(source, OPS, parse_mode("bf16"))
    assert not np.array_equal(rounded.norm, stored)
    assert np.allclose(rounded.norm, stored, rtol=2**-8)
    assert rounded.layers[0].qk_norms is not None
