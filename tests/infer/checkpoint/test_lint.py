"""Every finding lint can make, on a checkpoint that has exactly that fault; and none on a good one."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from quantbench.infer.checkpoint.lint import lint_checkpoint, saturation
from quantbench.infer.checkpoint.record import RECORD
from quantbench.infer.checkpoint.source import open_model
from quantbench.quantizers.weight import QuantizedWeight

from .conftest import load_shard, save_shard, variant_of

UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


@pytest.fixture
def spoil(make_model, write_checkpoint):
    """spoil(mode, {tensor: change}, …) -> checkpoint with these tensors replaced, and no record of how they were."""

    def make(mode="a8w8", changes=(), keep_record=False, **plan):
        source = open_model(make_model())
        path = write_checkpoint(source, variant_of(mode, source, **plan))
        for file in path.glob("*.safetensors"):
            tensors = load_shard(file)
            for name in set(tensors) & set(changes):
                tensors[name] = np.ascontiguousarray(changes[name](tensors[name].copy()))
            save_shard(tensors, file)
        if not keep_record:
            (path / RECORD).unlink()
        return path

    return make


def found(path):
    return [(f.severity, f.name, f.message) for f in lint_checkpoint(path)]


@pytest.mark.parametrize(
    ("mode", "plan"),
    [
        ("a8w8c8", {}), ("a8w8", {"dynamic": True}), ("a8w8", {"granularity": "tensor"}), ("weight_only_int4", {}),
        ("weight_only_int4", {"symmetric": False}), ("a8w8_fp8", {"granularity": "block", "dynamic": True}),
        ("weight_only_int8", {}), ("bf16", {}), ("a8w8_fp8", {"granularity": "channel"}),
    ],
)  # fmt: skip
def test_a_good_checkpoint(spoil, mode, plan):
    assert found(spoil(mode, keep_record=True, **plan)) == []


def test_a_float_directory(make_model):
    def edit(tensors):
        tensors["model.norm.weight"][3] = np.nan

    assert found(make_model("good")) == []
    assert found(make_model("bad", edit=edit)) == [("error", "model.norm.weight", "1 of 64 values are NaN or infinite")]


def test_damage(spoil):
    def flip(codes):
        codes[0, 0] ^= 1
        return codes

    (finding,) = found(spoil(changes={f"{UP}.weight": flip}, keep_record=True))
    assert finding[0] == "error"
    assert f"tensor {UP}.weight: its bytes are not those that were written" in finding[2]


def test_what_cannot_be_opened(spoil, tmp_path):
    (finding,) = found(spoil(changes={f"{UP}.weight_scale": lambda s: -s}))
    assert finding[0] == "error"
    assert "128 of 128 scales are NaN, infinite, zero or negative" in finding[2]
    assert found(tmp_path / "nowhere")[0][0] == "error"


def test_untied_input_scales(spoil):
    path = spoil(changes={f"{UP}.input_scale": lambda s: s * 2})
    message = f"differs inside the fused group {GATE}, {UP}: 0.0314960629, 0.0629921257"
    assert found(path) == [("error", f"{GATE}.input_scale", message)]


def test_untied_fp8_weight_scales(spoil):
    path = spoil("a8w8_fp8", {f"{UP}.weight_scale": lambda s: s * 2}, dynamic=True)
    assert found(path)[0][:2] == ("error", f"{GATE}.weight_scale")
    assert "differs inside the fused group" in found(path)[0][2]


def test_a_group_that_is_stored_differently(spoil):
    path = spoil()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.self_attn.v_proj")
    (path / "config.json").write_text(json.dumps(config))
    file = path / "model-00002-of-00003.safetensors"
    tensors = load_shard(file)
    for part in ("weight_scale", "input_scale"):
        del tensors[f"model.layers.1.self_attn.v_proj.{part}"]
    tensors["model.layers.1.self_attn.v_proj.weight"] = np.zeros((32, 64), np.float32)
    save_shard(tensors, file)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {n: f for n, f in weight_map.items() if "v_proj." not in n or n.endswith(".weight") or "layers.0" in n}
    index.write_text(json.dumps({"weight_map": kept}))
    assert [(f[0], f[1]) for f in found(path)] == [("warning", "model.layers.1.self_attn.q_proj")]
    assert "stored differently from others of its fused group" in found(path)[0][2]


def test_dead_outputs(spoil):
    def kill(codes):
        codes[[2, 5]] = 0
        return codes

    assert found(spoil(changes={f"{UP}.weight": kill})) == [("warning", UP, "2 of 128 outputs have only zero codes")]


def test_saturation(spoil):
    (finding,) = found(spoil(changes={f"{UP}.weight": lambda codes: np.where(codes > 60, np.int8(127), codes)}))
    assert finding[:2] == ("warning", UP)
    assert "of the codes are at the end of the range; the scale may be too small" in finding[2]


@pytest.mark.parametrize(
    ("mode", "plan", "scales"),
    [
        ("a8w8", {}, 128),
        ("a8w8", {"granularity": "tensor"}, 1),
        ("a8w8_fp8", {"granularity": "block", "dynamic": True}, 1),
    ],
)
def test_scales_far_too_large(spoil, mode, plan, scales):
    def shrink(codes):
        return (codes.astype(np.float32) / 8).astype(codes.dtype)

    message = f"{scales} of {scales} scales are over 4 times larger than their codes need"
    assert ("warning", UP, message) in found(spoil(mode, {f"{UP}.weight": shrink}, **plan))


def test_saturation_counts_both_ends():
    codes = np.array([[-8, 7, 0, 1]], np.int8)
    assert saturation(QuantizedWeight("int4", "channel", codes, np.ones((1, 1), np.float32))) == 0.5


def test_nan_codes_of_fp8(spoil):
    def nan(codes):
        codes.view(np.uint8)[1, 2] = 0xFF
        return codes

    path = spoil("a8w8_fp8", {f"{UP}.weight": nan}, granularity="channel")
    assert ("error", f"{UP}.weight", "1 of 8192 values are NaN or infinite") in found(path)


def test_saturation_of_fp8():
    codes = np.array([[448, -448, 416, 0]], ml_dtypes.float8_e4m3fn)
    assert saturation(QuantizedWeight("fp8_e4m3", "channel", codes, np.ones((1, 1), np.float32))) == 0.5
