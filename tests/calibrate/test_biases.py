"""Biases that a model did not have: where they can be held, what is written, and what the runtime makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantbench.calibrate.biases import correctable, held_biases, require_biases, wanted_biases
from quantbench.calibrate.simulate import simulate
from quantbench.errors import RecipeError
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.engine import Engine
from quantbench.infer.models import ModelConfig
from quantbench.vocabulary import VariantPlan
from tests.calibrate.block import CONFIG, variant
from tests.calibrate.job import plan, run
from tests.tiny import write_tiny_model

LLAMA = replace(CONFIG, family="llama", attention_bias=False)
MISTRAL, QWEN3 = (replace(LLAMA, family=name) for name in ("mistral", "qwen3"))
QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def word(*targets: str) -> VariantPlan:
    return variant("a8w8", {"bias_correction": {"targets": list(targets)} if targets else {}})


@pytest.mark.parametrize(
    ("config", "taps"),
    [
        (LLAMA, ("attn_in", "o_in", "mlp_in", "down_in")),
        (CONFIG, ("attn_in",)),
        (QWEN3, ("attn_in", "o_in")),
        (MISTRAL, ()),
    ],
    ids=["llama", "qwen2", "qwen3", "mistral"],
)
def test_what_a_family_can_hold(config: ModelConfig, taps: tuple[str, ...]) -> None:
    assert correctable(config) == taps


def test_a_switch_gives_its_whole_class_biases() -> None:
    assert held_biases(LLAMA, variant("a8w8")) == frozenset()
    assert wanted_biases(word("o_in"), LLAMA) == {"self_attn.o_proj"}
    assert held_biases(LLAMA, word("o_in")) == {*QKV, "self_attn.o_proj"}
    assert held_biases(LLAMA, word("down_in")) == MLP
    assert held_biases(CONFIG, word()) == QKV


def test_what_cannot_be_held_is_refused_for_all_variants_at_once() -> None:
    wrong = replace(word("attn_in", "o_in", "down_in"), name="one")
    with pytest.raises(RecipeError) as caught:
        require_biases(CONFIG, [wrong, word()])
    assert caught.value.problems == (
        "one: bias_correction: o_proj, down_proj of a qwen2 model cannot hold a bias in the checkpoint's format; "
        "use targets: [attn_in]",
    )
    with pytest.raises(RecipeError, match=r"A mistral model cannot hold a bias in .* leave it out for this model"):
        require_biases(MISTRAL, [word()])
    require_biases(LLAMA, [word(), word("o_in")])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_runtime_serves_what_was_corrected(family: str, tmp_path: Path) -> None:
    source = open_model(str(write_tiny_model(tmp_path / "model", family)))
    correct = ({"bias_correction": {}},)
    run(tmp_path / "run", source, plan(source, "plain", "a8w8"), plan(source, "corrected", "a8w8", *correct))
    held = open_model(tmp_path / "run" / "checkpoint" / "corrected")
    assert held.config.mlp_bias == held.config.output_bias == (family == "llama")
    assert held.config.attention_bias
    assert held.hf_config.get("mlp_bias", False) == (family == "llama")
    ids = list(range(40, 90))
    served, simulated = Engine.load(held).score(ids), simulate(held, ids, taps=False).logits
    assert simulated is not None
    assert served == pytest.approx(simulated, abs=2e-3 * float(np.abs(simulated).max()))
    plain = Engine.load(open_model(tmp_path / "run" / "checkpoint" / "plain")).score(ids)
    assert not np.array_equal(served, plain)
    bias = held.linear("model.layers.1.self_attn.v_proj").bias
    assert bias is not None
    assert bias.any()


def test_a_shift_takes_two_biases_and_their_class() -> None:
    shift = variant("a8w8", {"shift": {}})
    assert held_biases(LLAMA, shift) == {*QKV, "self_attn.o_proj"}
    with pytest.raises(RecipeError, match="moving o_in takes biases of v_proj and o_proj, and o_proj of a qwen2"):
        require_biases(CONFIG, [shift])
    require_biases(QWEN3, [shift])
