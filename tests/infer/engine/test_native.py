"""The native step against the layer loop in Python: the same bits, whatever the model, the mode or the batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.engine import Engine
from quantbench.infer.engine.forward import Layer, Model, Projection, Rows, batch_of
from quantbench.infer.engine.native import NativeModel
from quantbench.infer.ops import Ops, load_ops
from quantbench.infer.ops.cpu import CpuOps, available_isas

MODES = ("fp32", "bf16", "fp16", "weight_only_int8", "weight_only_int4", "a8w8", "a8w8_fp8",
         "bf16c8_dynamic", "a8w8c8_fp8_dynamic")  # fmt: skip
FAMILIES = (
    "llama", "llama_untied_biased", "llama_odd", "llama_wide_heads", "qwen2", "qwen2_windowed", "qwen3", "mistral",
)  # fmt: skip
RANDOM = np.random.default_rng(3)
PROMPTS = [RANDOM.integers(1, 97, n).tolist() for n in (1, 30, 70, 5)]
MIXED: dict[str, tuple[str, str | None]] = {  # q, k, v: activation specs of their own; gate, up: one spec, two formats
    "self_attn.q_proj": ("int8", "int8"),
    "self_attn.k_proj": ("float32", None),
    "self_attn.v_proj": ("fp8_e4m3", "fp8_e4m3"),
    "self_attn.o_proj": ("int4", None),
    "mlp.gate_proj": ("fp8_e4m3", "int8"),
    "mlp.up_proj": ("int8", "int8"),
    "mlp.down_proj": ("int8", "fp8_e4m3"),
}


class Watched:
    """An op table that is not the native one by type, so that the runner takes the loop in Python."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


def steps(engine: Engine) -> list[np.ndarray]:
    """Logits of prompts in two chunks, then of two decode steps and a prompt beside them; and all pages."""
    run, pages = engine.runner.compute, [engine.runner.cache.pool.allocate(2) or [] for _ in PROMPTS]
    first = [Rows(p[:-2] or p, 0, own) for p, own in zip(PROMPTS, pages, strict=True)]
    found = [
        run(first, []),
        run([Rows(p[-2:], max(len(p) - 2, 0), o) for p, o in zip(PROMPTS, pages, strict=True)], [3, 1]),
    ]
    for turn in range(2):
        rows = [Rows([7 * turn + n], len(p) + turn, own) for n, (p, own) in enumerate(zip(PROMPTS, pages, strict=True))]
        rows[0] = Rows([3, 4, 5], 20 * turn, pages[0])
        found.append(run(rows, [0, 1, 2, 3] if turn else [2]))
    found += [array.view(np.uint8) for layer in engine.runner.cache.layers for array in layer.arrays]
    return found


def check_equal(load: Callable[[], Engine]) -> None:
    native, plain = load(), load()
    plain.runner.ops = cast(Ops, Watched(plain.runner.ops))
    for ours, theirs in zip(steps(native), steps(plain), strict=True):
        assert np.array_equal(ours, theirs)
    ids = PROMPTS[2]
    assert np.array_equal(native.score(ids), plain.score(ids))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_every_instruction_set(mode: str, isa: str, model_path: Callable[[str], Path]) -> None:
    path = str(model_path("llama"))
    check_equal(lambda: Engine.load(path, mode, ops=load_ops("cpu", isa=isa), chunk=50, cache_tokens=1024))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "weight_only_int4", "a8w8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, mode: str, model_path: Callable[[str], Path]) -> None:
    path = str(model_path(family))
    check_equal(lambda: Engine.load(path, mode, chunk=50, cache_tokens=1024))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("cache", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("formats", [{}, MIXED], ids=["static", "mixed"])
def test_static_scales_mixed_formats_and_an_8_bit_cache(
    formats: dict[str, tuple[str, str | None]], cache: str, isa: str, calibrated: Callable[..., ModelSource]
) -> None:
    source = calibrated(cache, own_formats=formats)
    check_equal(lambda: Engine.load(source, ops=load_ops("cpu", isa=isa), chunk=50, cache_tokens=1024))


def test_a_model_that_is_put_in_place_of_another_is_the_one_that_runs(model_path: Callable[[str], Path]) -> None:
    engine, other = (Engine.load(str(model_path("llama")), mode) for mode in ("bf16", "a8w8"))
    before = engine.score([1, 2, 3])
    engine.runner.model = other.runner.model
    assert np.array_equal(engine.score([1, 2, 3]), other.score([1, 2, 3]))
    assert not np.array_equal(engine.score([1, 2, 3]), before)


def test_a_native_model_keeps_what_it_refers_to(model_path: Callable[[str], Path]) -> None:
    engine = Engine.load(str(model_path("llama")), "a8w8")
    runner = engine.runner
    native = NativeModel(cast(CpuOps, runner.ops), runner.model, runner.cache.layers)
    batch, rope, rows = batch_of([Rows([1, 2, 3], 0, [0])]), runner._rope, np.array([2])
    expected = native.logits(batch, rope, rows)
    del engine, runner
    gc.collect()
    assert expected is not None
    assert np.array_equal(native.logits(batch, rope, rows), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [97]}, "a token id is beyond the table"),
        ({"positions": [512]}, "a position is beyond the RoPE table"),
        ({"slots": [-1]}, "a slot is beyond the cache"),
        ({"tables": [[999]]}, "a page is beyond the cache"),
        ({"positions": [0, 1]}, "one position and slot per row"),
        ({"context": [65]}, "more tokens than its table has pages"),
    ],
)
def test_a_batch_that_reaches_beyond_the_model_is_refused(
    change: dict[str, Any], message: str, model_path: Callable[[str], Path]
) -> None:
    runner = Engine.load(str(model_path("llama")), "a8w8", cache_tokens=512).runner
    native = NativeModel(cast(CpuOps, runner.ops), runner.model, runner.cache.layers)
    batch = batch_of([Rows([1], 0, [0])])
    for name, value in change.items():
        setattr(batch, name, np.array(value, getattr(batch, name).dtype))
    with pytest.raises(ValueError, match=message):
        native.logits(batch, runner._rope, np.array([0]))


def test_the_native_step_knows_every_field_of_a_model() -> None:
    """A field that is added to the Python loop must be added to kernels/step.cpp too, or turn it off: see native.py."""
    known = {
        Layer: {"attn_norm", "qkv", "qk_norms", "window", "o", "mlp_norm", "gate_up", "down"},
        Model: {"config", "embedding", "layers", "norm", "head"},
        Projection: {"spec", "packed", "part_specs"},
    }
    for kind, names in known.items():
        assert {f.name for f in fields(kind)} == names
