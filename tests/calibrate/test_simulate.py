"""The simulation against the engine on the same checkpoint: two implementations that share only the formats."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from quantbench.calibrate.apply import apply_block
from quantbench.calibrate.choose import choose_block
from quantbench.calibrate.collect import Collect, collect_block
from quantbench.calibrate.hidden import HiddenStates
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.calibrate.simulate import CacheFormat, FakeQuantize, InputFormat, quantized_block, simulate
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.checkpoint.write import CheckpointWriter
from quantbench.infer.engine.engine import Engine
from quantbench.infer.models import linear_names
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import CachePlan, LayerPlan, VariantPlan, parse_mode

IDS = np.random.default_rng(3).integers(1, 512, 70).astype(np.int32)
MODES = ["bf16", "bf16c8", "weight_only_int8", "weight_only_int4", "a8w8", "a8w8c8", "a8w8c8_fp8", "a8w8_fp8",
         "bf16c8_dynamic", "a8w8c8_dynamic", "a8w8c8_fp8_dynamic"]  # fmt: skip


def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(tiny().write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3"))


def variant(source: ModelSource, mode_name: str, dynamic: bool = False) -> VariantPlan:
    mode = parse_mode(mode_name)
    granularity = {"int8": "channel", "int4": "group", "fp8_e4m3": "tensor"}.get(mode.weights)
    layers = {
        name: LayerPlan(name, mode.weights, granularity, 32, activations=mode.activations, dynamic=dynamic)
        for name in linear_names(source.config)
    }
    layers["lm_head"] = LayerPlan("lm_head", "bfloat16")
    return VariantPlan(f"{mode_name}-{dynamic}", mode, "bfloat16", CachePlan(mode.cache), layers)


def calibrated(source: ModelSource, plan: VariantPlan, path: Path, layers: int | None = None) -> CheckpointWriter:
    """A writer to which the first `layers` blocks were added (None: all, and finished)."""
    forward, writer = PaddleForward.of(source), CheckpointWriter(path, source, plan)
    ids = np.random.default_rng(0).integers(1, 512, (4, 64)).astype(np.int32)
    hidden = HiddenStates.start(forward.embed(ids), np.full(4, 64, np.int32))
    tables = []
    for layer in range(source.config.num_layers if layers is None else layers):
        weights = source.float_block(layer)
        seen, hidden = collect_block(forward, layer, weights, hidden, Collect(batch=2))
        table = choose_block(layer, weights, seen, plan, source.config)
        writer.add_block(layer, apply_block(layer, weights, table, plan, source.config, seen))
        tables.append(table)
    if layers is None:
        writer.finish(ScaleTable.merge(*tables))
    return writer


def decibels(signal: np.ndarray, other: np.ndarray) -> float:
    noise = float(((signal - other).astype(np.float64) ** 2).sum())
    return 10 * np.log10(float((signal.astype(np.float64) ** 2).sum()) / max(noise, 1e-30))


@pytest.mark.parametrize(("mode", "dynamic"), [*((m, False) for m in MODES), ("a8w8", True), ("a8w8_fp8", True)])
def test_simulated_is_served(model: ModelSource, tmp_path: Path, mode: str, dynamic: bool) -> None:
    calibrated(model, variant(model, mode, dynamic), tmp_path / "checkpoint")
    source = open_model(tmp_path / "checkpoint")
    simulated = simulate(source, IDS)
    served = Engine.load(source, ops="reference").trace(IDS.tolist())
    floating = simulate(model, IDS, cache="float32")
    assert set(simulated.taps) == set(served.taps)
    first = simulated.taps["model.layers.0.attn_in"], served.taps["model.layers.0.attn_in"]
    assert (first[0].codes is None) == (first[1].codes is None) == (not parse_mode(mode).activations)
    if first[0].codes is not None and first[1].codes is not None:
        different = first[0].codes.astype(np.float32) != first[1].codes.astype(np.float32)
        assert different.mean() < 1e-3  # the norms differ in their last bits
    # A last bit before a rounding may flip a code. One fp8 code is a sixteenth of its value, and attention carries the
    # difference to every later token; still they differ by far less than quantization costs.
    margin, agreement = (5, 0.8) if "fp8" in mode else (12, 0.98)
    for layer, (a, b, c) in enumerate(zip(simulated.hidden, served.hidden, floating.hidden, strict=True)):
        assert decibels(a, b) > decibels(c, a) + margin, layer
    assert (simulated.logits.argmax(-1) == served.logits.argmax(-1)).mean() > agreement


def test_a_float_model_is_what_the_engine_computes(model: ModelSource) -> None:
    served = Engine.load(model, "fp32", ops="reference").trace(IDS.tolist())
    simulated = simulate(model, IDS, cache="float32")
    np.testing.assert_allclose(simulated.logits, served.logits, rtol=1e-3, atol=1e-3)
    for name, tap in served.taps.items():
        np.testing.assert_allclose(simulated.taps[name].values, tap.values, rtol=1e-3, atol=1e-3, err_msg=name)
        assert simulated.taps[name].codes is None


def test_taps_are_left_out_where_not_asked_for(model: ModelSource) -> None:
    forward = PaddleForward.of(model)
    lean, full = simulate(model, IDS, forward=forward, taps=False), simulate(model, IDS, forward=forward)
    assert not lean.taps
    np.testing.assert_array_equal(lean.logits, full.logits)
    assert len(full.hidden) == model.config.num_layers


def test_every_block_may_start_from_another_run(model: ModelSource) -> None:
    other = [x + np.float32(0.5) for x in simulate(model, IDS).hidden]
    followed = simulate(model, IDS, followed=other)
    forward = PaddleForward.of(model)
    weights, hook = quantized_block(model, 1)
    forward.load(1, weights)
    alone = forward.run(other[0][None], np.array([len(IDS)], np.int32), hook)
    np.testing.assert_array_equal(followed.hidden[1], alone[0])
    rounded = FakeQuantize({"lm_head": InputFormat("bfloat16", None)}, CacheFormat("float32"))  # as the head is
    np.testing.assert_array_equal(followed.logits, PaddleForward.of(model).head(followed.hidden[-1], rounded))


def test_a_block_can_be_simulated_before_the_checkpoint_is_whole(model: ModelSource, tmp_path: Path) -> None:
    writer = calibrated(model, variant(model, "a8w8c8"), tmp_path / "checkpoint", layers=1)
    weights, hook = quantized_block(writer.partial_source(), 0)
    assert set(hook.inputs) == {"attn_in", "o_in", "mlp_in", "down_in"}
    assert hook.cache.format == "int8"
    float_weights = model.float_block(0)
    assert set(weights) == set(float_weights)
    for name, weight in weights.items():
        step = np.abs(float_weights[name]).max(-1, keepdims=True) / 127
        tolerance = step * 0.51 if name.endswith("proj.weight") else 0.01 * np.abs(float_weights[name]) + 1e-6
        assert (np.abs(weight - float_weights[name]) <= tolerance).all(), name


def test_static_and_dynamic_inputs() -> None:
    x = np.array([[1.0, -2.0, 0.4], [10.0, 127.0, 0.5]], np.float32)
    hook = FakeQuantize(
        {"attn_in": InputFormat("int8", 1.0), "o_in": InputFormat("int8", None)}, CacheFormat("float32")
    )
    hook.record = {}
    np.testing.assert_array_equal(hook("attn_in", x), [[1, -2, 0], [10, 127, 0]])
    dynamic = hook("o_in", x)
    assert dynamic is not None
    np.testing.assert_allclose(dynamic[0], np.round(x[0] * 63.5) / 63.5, rtol=1e-6)
    assert hook("mlp_in", x) is None
    assert hook("mlp.up_proj", x) is None
    assert list(hook.record) == ["attn_in", "o_in", "mlp_in"]
    assert hook.record["o_in"].scale is not None
    assert hook.record["o_in"].scale.shape == (2,)
    assert hook.record["attn_in"].scale is not None
    assert hook.record["attn_in"].scale.shape == (1,)


def test_bf16_weights_multiply_bf16_inputs() -> None:
    x = np.array([[1.0, 1 + 2.0**-9, -3e-3]], np.float32)
    hook = FakeQuantize({"attn_in": InputFormat("bfloat16", None)}, CacheFormat("float32"), {})
    rounded = hook("attn_in", x)
    assert rounded is not None
    np.testing.assert_array_equal(rounded, x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert hook.record is not None
    np.testing.assert_array_equal(hook.record["attn_in"].values, x)
    assert hook.record["attn_in"].codes is None


def test_k_and_v_have_scales_of_their_heads() -> None:
    cache = CacheFormat("int8", np.array([1, 2], np.float32), np.array([0.5, 0.25], np.float32))
    x = np.array([[[1.2, 300], [1.2, 300]]], np.float32)
    hook = FakeQuantize({}, cache)
    np.testing.assert_array_equal(hook("k", x), [[[1, 127], [2, 254]]])
    np.testing.assert_array_equal(hook("v", x), [[[1, 63.5], [1.25, 31.75]]])


def test_a_bf16_cache_rounds_to_bf16() -> None:
    x = np.full((1, 1, 2), 1.001, np.float32)
    rounded = FakeQuantize({}, CacheFormat("bfloat16"))("k", x)
    np.testing.assert_array_equal(rounded, x.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(FakeQuantize({}, CacheFormat("float32"))("k", x), x)


def test_linears_of_a_group_may_be_quantized_differently(model: ModelSource, tmp_path: Path) -> None:
    plan = variant(model, "a8w8")
    mixed = "model.layers.1.mlp.gate_proj"
    plan.layers[mixed] = LayerPlan(mixed, "int8", "channel", activations=None)
    calibrated(model, plan, tmp_path / "checkpoint")
    source = open_model(tmp_path / "checkpoint")
    _, hook = quantized_block(source, 1)
    assert set(hook.inputs) == {"attn_in", "o_in", "mlp.up_proj", "down_in"}
    served = Engine.load(source, ops="reference").trace(IDS.tolist())
    assert decibels(simulate(source, IDS).logits, served.logits) > 40
