"""Checkpoints: what is written is what was meant, whole or not at all, and the same bytes every time."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.lint import lint_checkpoint
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.checkpoint.write import CheckpointWriter
from quantbench.infer.engine.mode import stored_mode
from quantbench.quantizers.weight import quantize_weight
from quantbench.vocabulary import LayerPlan

from .conftest import block_of, table_of, variant_of
from .gguf_files import write_gguf

MODES = [
    "a8w8",
    "a8w8_fp8",
    "weight_only_int8",
    "weight_only_int4",
    "a8w8c8",
    "a8w8_fp8c8_fp8",
    "bf16c8",
    "bf16",
    "fp16",
]
CASES = {mode: (mode, {}) for mode in MODES} | {
    "dynamic": ("a8w8", {"dynamic": True}),
    "int8 tensor": ("a8w8", {"granularity": "tensor"}),
    "asymmetric": ("weight_only_int4", {"symmetric": False}),
    "int4 channel": ("weight_only_int4", {"granularity": "channel", "group_size": None}),
    "fp8 block": ("a8w8_fp8", {"granularity": "block", "dynamic": True}),
}


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize(("mode", "changes"), CASES.values(), ids=CASES)
def test_what_is_written_is_read_back(make_model, write_checkpoint, mode, changes):
    source = open_model(make_model(architectures=["Qwen2ForCausalLM"], model_type="qwen2"))  # it has biases
    variant = variant_of(mode, source, **changes)
    path = write_checkpoint(source, variant)
    back, table = open_model(path), table_of(source, variant)
    assert back.config.dtype == variant.dtype
    for name, plan in variant.layers.items():
        linear, original = back.linear(name), source.linear(name)
        assert (linear.bias is None) == (original.bias is None)
        if not plan.quantized:
            assert np.array_equal(linear.weight, original.weight.astype(linear.weight.dtype))
            continue
        expected = quantize_weight(source.float_tensor(f"{name}.weight"), table[f"{name}.weight"])
        assert np.array_equal(linear.weight.codes, expected.codes)
        assert np.array_equal(linear.weight.scale, expected.scale)
        assert linear.weight.scale.dtype == np.float32
        assert linear.activations == plan.activations
        static = plan.activations is not None and not plan.dynamic
        assert linear.input_scale == (float(table[f"{name}.input"].scale[0]) if static else None)
    assert not [f for f in lint_checkpoint(path) if f.severity == "error"]


def test_cache_scales(make_model, write_checkpoint):
    source = open_model(make_model())
    back = open_model(write_checkpoint(source, variant_of("a8w8c8", source)))
    k, v = back.cache_scales(1)
    assert k.tolist() == pytest.approx([0.01, 0.02])
    assert v.tolist() == pytest.approx([0.02, 0.04])
    assert back.quantization.cache.format == "int8"
    assert back.read("model.layers.0.self_attn.k_scale").shape == (2, 1, 1)


@pytest.mark.parametrize("mode", ["a8w8c8_dynamic", "bf16c8_fp8_dynamic"])
def test_a_dynamic_cache_stores_no_scales(make_model, write_checkpoint, mode):
    source = open_model(make_model())
    path = write_checkpoint(source, variant_of(mode, source))
    back = open_model(path)
    assert back.quantization.cache.dynamic
    assert back.cache_scales(0) is None
    assert not [name for name in back.names() if name.endswith(("k_scale", "v_scale"))]
    scheme = json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["strategy"], scheme["dynamic"], scheme["num_bits"]) == ("token", True, 8)
    assert stored_mode(back).name == mode
    assert not lint_checkpoint(path)


def test_the_tokenizer_and_generation_config_come_along(make_model, write_checkpoint):
    directory = make_model()
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    source = open_model(directory)
    path = write_checkpoint(source, variant_of("a8w8", source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (path / name).read_bytes() == (directory / name).read_bytes()
    assert open_model(path).tokenizer().eos_ids == (1, 2)
    assert {f"{name}_scales.json" for name in ("act", "weight", "cachekv")} <= {f.name for f in path.iterdir()}


def test_from_a_gguf_file(make_model, write_checkpoint, tmp_path):
    source = open_model(write_gguf(tmp_path / "m.gguf", make_model(), "Q8_0"))
    back = open_model(write_checkpoint(source, variant_of("a8w8", source)))
    assert back.tokenizer().encode("the fox") == source.tokenizer().encode("the fox")
    assert back.config == replace(source.config, dtype="bfloat16")


def test_a_quantized_head_is_untied(make_model, write_checkpoint):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    head = LayerPlan("lm_head", "int8", "channel", activations="int8")
    variant = replace(variant, layers=variant.layers | {"lm_head": head})
    back = open_model(write_checkpoint(source, variant))
    assert not back.config.tie_word_embeddings
    assert back.linear("lm_head").weight.codes.shape == (320, 64)
    assert back.linear("lm_head").input_scale is not None
    assert back.read("model.embed_tokens.weight").shape == (320, 64)


def test_sizes(make_model, write_checkpoint):
    """Int8 linears take at most 27 % of their float32 bytes, int4 of group 64 at most 16 %."""
    source = open_model(make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    for mode, share in (("a8w8", 0.27), ("weight_only_int8", 0.27), ("weight_only_int4", 0.16)):
        changes = {"group_size": 64} if mode == "weight_only_int4" else {}
        back = open_model(write_checkpoint(source, variant_of(mode, source, **changes)))
        stored = sum(back.read(name).nbytes for name in back.names() if "_proj." in name)
        full = sum(source.read(name).nbytes for name in source.names() if "_proj." in name)
        on_disk = sum(f.stat().st_size for f in back.store.files[:1])
        assert 0.1 * full < stored <= share * full
        assert on_disk <= share * full + 20_000  # the header and two norms


def writer_for(source, variant, path):
    return CheckpointWriter(path, source, variant), table_of(source, variant)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(make_model, write_checkpoint, tmp_path):
    source = open_model(make_model(num_hidden_layers=3))
    variant = variant_of("a8w8c8", source)
    whole = contents(write_checkpoint(source, variant))
    writer, table = writer_for(source, variant, tmp_path / "resumed")
    assert writer.committed_blocks() == []
    writer.add_block(1, block_of(source, variant, table, 1))
    shard = writer.partial / "checkpoint" / "model-00001-of-00004.safetensors"
    shard.write_bytes(b"half a shard, killed before its record was written")
    again, _ = writer_for(source, variant, tmp_path / "resumed")
    assert again.committed_blocks() == [1]
    for layer in (2, 0):
        again.add_block(layer, block_of(source, variant, table, layer))
    assert contents(again.finish(table)) == whole
    assert not again.partial.exists()


def test_killed_at_every_rename(make_model, write_checkpoint, tmp_path, monkeypatch):
    """Whichever rename is the last that happens, the next run ends with the same bytes."""
    source = open_model(make_model())
    variant = variant_of("weight_only_int4", source)
    whole = contents(write_checkpoint(source, variant, tmp_path / "whole"))

    class Killed(BaseException):
        pass

    real = os.replace
    for allowed in range(60):
        path, count = tmp_path / f"run{allowed}", 0

        def dying(old, new, *, allowed=allowed):
            nonlocal count
            count += 1
            if count > allowed:
                raise Killed
            real(old, new)

        monkeypatch.setattr(os, "replace", dying)
        monkeypatch.setattr("pathlib.Path.replace", lambda self, target: dying(self, target))
        try:
            write_checkpoint(source, variant, path)
            finished = True
        except Killed:
            finished = False
            assert not path.exists()
        monkeypatch.setattr(os, "replace", real)
        monkeypatch.setattr("pathlib.Path.replace", lambda self, target: real(self, target))
        writer, table = writer_for(source, variant, path)
        for layer in sorted({0, 1} - set(writer.committed_blocks())):
            writer.add_block(layer, block_of(source, variant, table, layer))
        assert contents(writer.finish(table)) == whole
        if finished:
            break
    assert finished
    assert allowed > 8


def test_what_a_kill_left_half_written_does_not_stay(make_model, tmp_path):
    source = open_model(make_model())
    path, variant = tmp_path / "checkpoint", variant_of("a8w8", source)
    writer = CheckpointWriter(path, source, variant)
    stale = writer.partial / "checkpoint" / ".model-00001-of-00003.safetensors.77.tmp"
    stale.write_bytes(b"half")
    CheckpointWriter(path, source, variant)
    assert not stale.exists()


def test_a_finished_checkpoint_is_left_alone(make_model, write_checkpoint, tmp_path):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    path = write_checkpoint(source, variant, tmp_path / "x")
    before = contents(path)
    (tmp_path / "x.partial").mkdir()
    writer, table = writer_for(source, variant, path)
    assert writer.done
    assert writer.committed_blocks() == [0, 1]
    assert writer.finish(table) == path
    assert contents(path) == before
    assert not (tmp_path / "x.partial").exists()


def test_another_plan_replaces_the_old_checkpoint(make_model, write_checkpoint, tmp_path):
    source = open_model(make_model())
    write_checkpoint(source, variant_of("a8w8", source), tmp_path / "x")
    path = write_checkpoint(source, variant_of("weight_only_int8", source), tmp_path / "x")
    assert open_model(path).quantization.layers["model.layers.0.mlp.up_proj"].activations is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "x"]


def test_blocks_of_another_plan_are_not_mixed_in(make_model, tmp_path):
    source = open_model(make_model())
    CheckpointWriter(tmp_path / "x", source, variant_of("a8w8", source))
    with pytest.raises(CheckpointError, match="begun from another model or plan"):
        CheckpointWriter(tmp_path / "x", source, variant_of("weight_only_int8", source))


def test_a_block_that_does_not_fit_the_plan(make_model, tmp_path):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    writer, table = writer_for(source, variant, tmp_path / "x")
    block = block_of(source, variant, table, 0)
    del block["mlp.up_proj.weight_scale"]
    block |= {
        "mlp.extra": np.zeros(1, np.float32),
        "mlp.down_proj.weight": np.zeros((64, 128), np.int32),
        "mlp.gate_proj.weight": np.zeros((2, 2), np.int8),
        "input_layernorm.weight": np.full(64, np.nan, np.float32),
    }
    with pytest.raises(CheckpointError) as refused:
        writer.add_block(0, block)
    assert [p.partition("model.layers.0.")[2] for p in refused.value.problems] == [
        "mlp.up_proj.weight_scale is missing",
        "mlp.extra is not part of the plan",
        "input_layernorm.weight has values that are NaN or infinite as bfloat16",
        "mlp.down_proj.weight is int32, expected int8",
        "mlp.gate_proj.weight has shape [2, 2], expected [128, 64]",
    ]
    assert writer.committed_blocks() == []


def test_an_overflow_of_float16_is_named(make_model, tmp_path):
    source = open_model(make_model(edit=lambda t: t["model.norm.weight"].__setitem__(0, 1e6)))
    variant = variant_of("fp16", source)
    writer, table = writer_for(source, variant, tmp_path / "x")
    for layer in range(2):
        writer.add_block(layer, block_of(source, variant, table, layer))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are NaN or infinite as float16"):
        writer.finish(table)


def test_a_missing_block(make_model, tmp_path):
    source = open_model(make_model())
    writer, table = writer_for(source, variant_of("a8w8", source), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"blocks \[0, 1\] were never added"):
        writer.finish(table)


def test_a_checkpoint_that_fails_lint_is_not_renamed(make_model, tmp_path):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    writer, table = writer_for(source, variant, tmp_path / "x")
    for layer in range(2):
        block = block_of(source, variant, table, layer)
        block["self_attn.k_proj.input_scale"] = block["self_attn.k_proj.input_scale"] * 2
        writer.add_block(layer, block)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.input_scale: differs inside the fused"):
        writer.finish(table)
    assert not (tmp_path / "x").exists()


def test_committed_blocks_can_be_read(make_model, tmp_path):
    source = open_model(make_model())
    variant = variant_of("a8w8c8", source)
    writer, table = writer_for(source, variant, tmp_path / "x")
    writer.add_block(1, block_of(source, variant, table, 1))
    partial = writer.partial_source()
    assert set(partial.float_block(1)) == set(source.float_block(1))
    assert partial.cache_scales(1)[0].shape == (2,)
    assert partial.linear("model.layers.1.mlp.up_proj").weight.format == "int8"
    shutil.rmtree(writer.partial)


def test_config_json(make_model, write_checkpoint):
    source = open_model(make_model(dtype="float16"))
    path = write_checkpoint(source, variant_of("a8w8", source))
    config = json.loads((path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["format"] == "int-quantized"
    rest = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
    assert rest == {k: v for k, v in source.hf_config.items() if k != "torch_dtype"}
