"""A rotated model computes what the model computes, is written untied, and sees its own statistics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.calibrate.rotated import RotatedSource, Turn, first_hidden, model_of, require_rotatable, rotation_table
from quantbench.calibrate.simulate import simulate
from quantbench.errors import CalibrationError, RecipeError
from quantbench.infer.checkpoint.lint import lint_checkpoint
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.engine import Engine
from quantbench.scales.lint import lint_table
from quantbench.scales.statistics import load
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import LayerPlan
from tests.calibrate.job import plan, run
from tests.tiny import write_tiny_model

ROTATE: dict[str, Any] = {"rotate": {"seed": 3, "r2": True}}
IDS = np.random.default_rng(1).integers(0, 512, 40).tolist()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 48, "tie_word_embeddings": False},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    root = tmp_path_factory.mktemp("models")
    return {f: open_model(str(write_tiny_model(root / f, f, **words))) for f, words in FAMILIES.items()}


@pytest.fixture(scope="module")
def source(sources: dict[str, ModelSource]) -> ModelSource:
    return sources["llama"]


@pytest.mark.parametrize("r2", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_models_logits_do_not_change(sources: dict[str, ModelSource], family: str, r2: bool) -> None:
    source = sources[family]
    turned = model_of(source, plan(source, "v", "a8w8", {"rotate": {"r2": r2}}))
    assert isinstance(turned, RotatedSource)
    before, after = (simulate(m, IDS, cache="float32").logits for m in (source, turned))
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    block = turned.float_block(1)
    assert (block["input_layernorm.weight"] == 1).all()
    assert not np.allclose(block["self_attn.q_proj.weight"], source.float_block(1)["self_attn.q_proj.weight"])
    assert np.array_equal(block["self_attn.q_proj.weight"], turned.linear("model.layers.1.self_attn.q_proj").weight)
    assert set(turned.names()) == {*source.names(), "lm_head.weight"}
    assert turned.sha256() == source.sha256()


def test_a_variant_without_the_word_is_made_from_the_model_itself(source: ModelSource) -> None:
    assert model_of(source, plan(source, "v", "a8w8", {"smooth": {"alpha": 0.5}})) is source
    hidden = np.ones((1, 2, 64), np.float32)
    assert first_hidden(source, hidden) is hidden
    assert len(list(rotation_table(source))) == 0


def test_hidden_states_start_where_the_turned_embedding_puts_them(source: ModelSource) -> None:
    turned = model_of(source, plan(source, "v", "a8w8", ROTATE))
    embedded = source.float_tensor("model.embed_tokens.weight")[IDS][None]
    expected = turned.read("model.embed_tokens.weight")[IDS][None]
    np.testing.assert_allclose(first_hidden(turned, embedded), expected, rtol=1e-6, atol=1e-6)


def test_the_checkpoint_is_untied_linted_and_served_as_simulated(source: ModelSource, tmp_path: Path) -> None:
    variant = plan(source, "turned", "a8w8c8", ROTATE, {"smooth": {"alpha": 0.4}}, dynamic=True, method="gptq")
    job = run(tmp_path, source, dataclasses.replace(variant, dtype="float32"))
    path = tmp_path / "checkpoint" / "turned"
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    checkpoint = open_model(str(path))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint.names())
    turned = model_of(source, variant)
    assert np.array_equal(checkpoint.read("lm_head.weight"), turned.read("lm_head.weight"))
    assert (checkpoint.read("model.norm.weight") == 1).all()
    assert lint_checkpoint(path) == []
    served = Engine.load(checkpoint).trace(IDS)
    followed = simulate(checkpoint, IDS, followed=served.hidden)
    assert np.abs(served.logits - followed.logits).max() < 1e-4
    plain = simulate(source, IDS, cache="float32").logits
    assert np.abs(served.logits - plain).max() < 0.1 * np.abs(plain).max()
    table = ScaleTable.load(job.folder / "scales" / "turned")
    entry = table["model.rotate"]
    assert entry.reason == "residual stream turned by Sylvester 64, every head's values by Sylvester 16, seed 3"
    assert float(entry.scale[0]) == pytest.approx(64**-0.5)
    assert lint_table(table, variant) == []


def test_a_quantized_head_holds_the_turned_weight(source: ModelSource, tmp_path: Path) -> None:
    variant = plan(source, "head", "weight_only_int8", ROTATE)
    head = LayerPlan("lm_head", "int8", "channel")
    run(tmp_path, source, dataclasses.replace(variant, layers=variant.layers | {"lm_head": head}))
    checkpoint = open_model(str(tmp_path / "checkpoint" / "head"))
    expected = model_of(source, variant).float_tensor("lm_head.weight")
    assert np.abs(checkpoint.float_tensor("lm_head.weight") - expected).max() < np.abs(expected).max() / 127


def test_equal_turns_share_a_stream_and_others_have_their_own(source: ModelSource, tmp_path: Path) -> None:
    other: dict[str, Any] = {"rotate": {"seed": 4, "r2": True}}
    words = {"plain": (), "a": (ROTATE,), "b": (ROTATE, {"smooth": {"alpha": 0.5}}), "c": (other,)}
    run(tmp_path, source, *(plan(source, name, "a8w8c8", *ts) for name, ts in words.items()))
    seen = {name: load(tmp_path / "statistics" / name / "block_00001.safetensors") for name in ("a", "b", "c")}
    seen["plain"] = load(tmp_path / "statistics" / "block_00001.safetensors")
    assert (tmp_path / "statistics" / "b").is_symlink()
    assert np.array_equal(seen["a"]["v"].absmax, seen["b"]["v"].absmax)
    for one, two in (("a", "plain"), ("a", "c"), ("c", "plain")):
        assert not np.array_equal(seen[one]["v"].absmax, seen[two]["v"].absmax)
        assert not np.array_equal(seen[one]["attn_in"].channel_sum, seen[two]["attn_in"].channel_sum)
    scales = [ScaleTable.load(tmp_path / "scales" / name)["model.layers.1.self_attn.v_cache"] for name in words]
    assert [float(s.absmax[0]) for s in scales] == [float(seen[n]["v"].absmax[0]) for n in words]


def test_decided_again_from_the_statistics_of_the_turned_model(source: ModelSource, tmp_path: Path) -> None:
    variant = plan(source, "again", "a8w8", ROTATE, method="gptq")
    run(tmp_path / "one", source, variant)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "statistics").rename(tmp_path / "two" / "statistics")
    run(tmp_path / "two", source, variant, reuse_statistics=True)
    one, two = (open_model(str(tmp_path / f / "checkpoint" / "again")) for f in ("one", "two"))
    name = "model.layers.2.mlp.down_proj"
    assert one.linear(name).weight.codes.tobytes() == two.linear(name).weight.codes.tobytes()  # type: ignore[union-attr]


def test_quantized_inputs_walk_the_turned_model(source: ModelSource, tmp_path: Path) -> None:
    variant = plan(source, "own", "weight_only_int4", ROTATE, method="gptq")
    run(tmp_path, source, variant, quantized_inputs=True)
    turned = model_of(source, variant)
    first, last = (load(tmp_path / "statistics" / "own" / f"block_0000{i}.safetensors")["attn_in"] for i in (0, 2))
    assert first.hessian is not None
    assert last.hessian is not None
    float_run = run(tmp_path / "float", source, variant)
    seen = load(float_run.folder / "statistics" / "own" / "block_00000.safetensors")["attn_in"]
    np.testing.assert_array_equal(seen.channel_sum, first.channel_sum)
    seen = load(float_run.folder / "statistics" / "own" / "block_00002.safetensors")["attn_in"]
    assert not np.array_equal(seen.channel_sum, last.channel_sum)
    assert turned.config.tie_word_embeddings is False


def test_sizes_without_a_matrix_are_refused_before_anything_is_read(source: ModelSource) -> None:
    variants = [plan(source, "v", "a8w8", ROTATE), plan(source, "w", "a8w8", {"rotate": {"r2": False}})]
    config = dataclasses.replace(source.config, hidden_size=100, head_dim=6)
    with pytest.raises(RecipeError) as caught:
        require_rotatable(config, variants)
    assert len(caught.value.problems) == 3
    wanted = ("v: hidden_size 100: rotation: no matrix for 100 channels", "v: head_dim 6: rotation", "w: hidden_size")
    for problem, start in zip(caught.value.problems, wanted, strict=True):
        assert problem.startswith(start)
    assert caught.value.problems[1].endswith("or keep R1 alone, with rotate: {r2: false}")
    require_rotatable(source.config, variants)


def test_a_damaged_embedding_is_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "bad")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = np.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    bad = open_model(str(path))
    with pytest.raises(CalibrationError, match=r"^model\.embed_tokens\.weight: .* NaN or Inf .first at \(7, 3\)"):
        model_of(bad, plan(bad, "v", "a8w8", ROTATE)).read("model.embed_tokens.weight")


def test_turns_are_compared_by_their_words(source: ModelSource) -> None:
    assert Turn.of(plan(source, "v", "a8w8", {"rotate": {}})) == Turn.of(plan(source, "w", "a8w8", {"rotate": None}))
    assert Turn.of(plan(source, "v", "a8w8", ROTATE)) == Turn(3)
