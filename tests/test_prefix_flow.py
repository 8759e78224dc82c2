"""`prefix: auto` through the command line, on a model with a planted sink: found, served, reported, redone."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Command
from sink import SINK, write_sink_model
from test_flow import files_of
from test_resume import kill_after, start

RECIPE = """\
model: {model}
modes: [a8w8, {{name: a8w8-prefix, mode: a8w8c8, prefix: auto}}]
calibration: {{data: "python:topics", samples: 8, length: 48, batch: 4}}
accuracy: {{perplexity: [{{data: "python:topics", tokens: 126, context: 64}}]}}
throughput: {{batches: [1, 2], prompt: 16, output: 4, rounds: 1}}
parity: {{tokens: 63}}
output: {output}
"""


def test_the_whole_job(quantbench: Command, tmp_path: Path) -> None:
    model, run = write_sink_model(tmp_path / "model"), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, output=run))
    done = quantbench("calibrate", recipe)
    assert done.returncode == 0, done.stderr
    parity = json.loads((run / "parity.json").read_text())["variants"]["a8w8-prefix"]
    assert parity["codes_different"] == 0
    assert parity["first_departure"] is None
    assert parity["layers"][-1]["sqnr_served_db"] > 12  # against the float model behind the same prefix
    config = json.loads((run / "checkpoint" / "a8w8-prefix" / "config.json").read_text())
    assert config["quantbench_prefix"]["token_ids"] == [SINK]
    assert "behind a prefix (auto)" in (run / "report.html").read_text()
    before = files_of(run)
    done = quantbench("calibrate", recipe, "--from", "choose")
    assert done.returncode == 0, done.stderr
    assert files_of(run) == before
    done = quantbench("lint", run / "checkpoint" / "a8w8-prefix")
    assert done.returncode == 0, done.stdout


SHIFTED = """\
model: {model}
modes: [{{name: shifted, mode: a8w8c8, transforms: [shift, smooth, kv_smooth, bias_correction]}}]
prefix: [{sink}]
calibration: {{data: "python:topics", samples: 8, length: 48, batch: 4}}
accuracy: {{perplexity: [{{data: "python:topics", tokens: 126, context: 64}}]}}
output: {output}
"""


def test_with_a_shift_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe, words = tmp_path / "recipe.yaml", "calibration.inputs=quantized"
    model = write_sink_model(tmp_path / "model", "llama")
    recipe.write_text(SHIFTED.format(model=model, sink=SINK, output=tmp_path / "run"))
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert start(recipe, undisturbed, words).wait(300) == 0
    kills = [kill_after(start(recipe, disturbed, words), disturbed, files, 0.0) for files in (3, 9)]
    assert all(kills)
    assert start(recipe, disturbed, words).wait(300) == 0
    assert files_of(disturbed) == files_of(undisturbed)
    assert (disturbed / "prefix" / str(SINK) / "prefix.json").is_file()
