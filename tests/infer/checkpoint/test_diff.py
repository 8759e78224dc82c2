"""Differences between models."""

from __future__ import annotations

from quantbench.infer.checkpoint.diff import diff_checkpoints
from quantbench.infer.checkpoint.source import open_model

from .conftest import variant_of


def test_the_same(make_model, write_checkpoint, tmp_path):
    source = open_model(make_model())
    variant = variant_of("a8w8", source)
    one, two = (write_checkpoint(source, variant, tmp_path / name) for name in ("one", "two"))
    assert diff_checkpoints(one, two) == []


def test_values(make_model):
    def edit(tensors):
        tensors["model.norm.weight"][:2] *= 2

    (difference,) = diff_checkpoints(make_model("one"), make_model("two", edit=edit))
    assert (difference.name, difference.field) == ("model.norm.weight", "values")
    assert (difference.before, difference.after) == ("64 values", "2 of them changed")
    assert 0 < difference.relative <= 1


def test_shape_dtype_and_presence(make_model):
    one = make_model("one")
    two = make_model("two", dtype="bfloat16", vocab_size=300, tie_word_embeddings=False)
    found = {(d.name, d.field): (d.before, d.after) for d in diff_checkpoints(one, two)}
    assert found["lm_head.weight", "entry"] == ("absent", "present")
    assert found["model.embed_tokens.weight", "shape"] == ("[320, 64]", "[300, 64]")
    assert found["model.norm.weight", "dtype"] == ("float32", "bfloat16")


def test_plans_and_cache(make_model, write_checkpoint):
    source = open_model(make_model())
    one = write_checkpoint(source, variant_of("a8w8", source))
    two = write_checkpoint(source, variant_of("weight_only_int4c8", source))
    found = {(d.name, d.field): (d.before, d.after) for d in diff_checkpoints(one, two)}
    up = "model.layers.0.mlp.up_proj"
    assert found[up, "weights"] == ("int8", "int4")
    assert found[up, "activations"] == ("int8", "None")
    assert found[up, "group_size"] == ("None", "32")
    assert found["kv_cache", "format"] == ("float", "int8")
    assert found[f"{up}.weight", "entry"] == ("present", "absent")
