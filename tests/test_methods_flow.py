"""The methods together on a tiny model through the command line: served as simulated, and resumable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from test_flow import files_of
from test_resume import kill_after, start

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.models import block_prefix
from quantbench.scales.table import ScaleTable

RECIPE = """\
model: {model}
modes:
  - {{name: all, mode: a8w8c8, transforms: [shift, smooth, kv_smooth, clip, bias_correction]}}
  - {{name: rotated, mode: a8w8, transforms: [rotate, shift, {{smooth: {{targets: [down_in]}}}}, bias_correction]}}
  - {{name: int4, mode: weight_only_int4, transforms: [{{awq: {{steps: 4}}}}, {{clip: {{steps: 8}}}}]}}
  - {{name: pieces, mode: a8w8, transforms: [{{piecewise: {{pieces: 2}}}}], method: rtn}}
  - {{name: cache, mode: bf16c8, transforms: [kv_smooth]}}
method: gptq
calibration: {{data: "python:topics", samples: 8, length: 48, batch: 4}}
weights: {{group_size: 32}}
accuracy: {{perplexity: [{{data: "python:topics", tokens: 126, context: 64}}]}}
throughput: off
parity: {{tokens: 63}}
output: {output}
"""
VARIANTS = ("all", "rotated", "int4", "pieces", "cache")


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods") / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model, output=path.parent / "run"))
    return path


@pytest.fixture(scope="module")
def finished(quantbench: Command, recipe: Path) -> Path:
    done = quantbench("calibrate", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "run"


def test_what_is_served_is_what_was_simulated(finished: Path) -> None:
    found = json.loads((finished / "parity.json").read_text())["variants"]
    assert set(found) == set(VARIANTS)
    for name, parity in found.items():
        assert parity["codes_different"] == 0, name
        assert parity["kl_served_simulated"] < 1e-4, name


def test_tables_and_checkpoints_are_sound(quantbench: Command, finished: Path) -> None:
    for name in VARIANTS:
        for part in ("scales", "checkpoint"):
            done = quantbench("lint", finished / part / name)
            assert done.returncode == 0, done.stdout
    config = open_model(finished / "checkpoint" / "all").config
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == (True, True, True)


def logits(source: ModelSource, table: ScaleTable) -> np.ndarray:
    """Of the float model, every block behind what the table says of it."""
    forward, config = PaddleForward.of(source), source.config
    ids = np.random.default_rng(0).integers(0, 512, (1, 40)).astype(np.int32)
    hidden, lengths = forward.embed(ids), np.array([40], np.int32)
    for layer in range(config.num_layers):
        forward.load(layer, fold_block(layer, source.float_block(layer), table, config))
        hidden = forward.run(hidden, lengths)
    return forward.head(hidden[0])


@pytest.mark.parametrize("variant", ["all", "int4", "pieces", "cache"])
def test_the_transforms_leave_the_float_models_logits_unchanged(finished: Path, tiny_model: Path, variant: str) -> None:
    source, table = open_model(str(tiny_model)), ScaleTable.load(finished / "scales" / variant)
    assert any(e.name.startswith(block_prefix(0)) and e.kind == "transform" for e in table)
    before, after = logits(source, ScaleTable()), logits(source, table)
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_a_killed_run_goes_on_to_the_same_bytes(recipe: Path, finished: Path, tmp_path: Path) -> None:
    disturbed, words = tmp_path / "disturbed", "method=gptq"
    assert kill_after(start(recipe, disturbed, words), disturbed, 12, 0.02)
    assert start(recipe, disturbed, words).wait(300) == 0
    assert files_of(disturbed) == files_of(finished)


def test_weights_are_decided_again_from_saved_statistics(quantbench: Command, recipe: Path, finished: Path) -> None:
    """awq, clip and gptq of weights with float inputs need the Hessians only; kv_smooth the ranges."""
    again = finished.parent / "again"
    words = [
        "--set",
        f"output={again}",
        "--set",
        "modes=[{name: int4, mode: weight_only_int4, transforms: [awq, clip]}]",
    ]
    assert quantbench("calibrate", recipe, "--set", "parity=off", *words).returncode == 0
    before = files_of(again)
    done = quantbench("calibrate", recipe, "--set", "parity=off", *words, "--from", "choose")
    assert done.returncode == 0, done.stderr
    assert files_of(again) == before
