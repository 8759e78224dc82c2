"""Searches and Hessian methods in the block loop: each stream sees its own inputs; what is decided is carried out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.calibrate.job import BlockJob, checkpoint_path
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.scales.statistics import load
from quantbench.scales.table import ScaleTable
from tests.calibrate.job import plan, run
from tests.tiny import write_tiny_model

SEARCH = ({"smooth": {"alpha": "search"}},)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))


def weight(job: BlockJob, variant: str, name: str) -> np.ndarray:
    return open_model(checkpoint_path(job.folder, variant)).float_tensor(name)


def test_gptq_takes_the_hessians_of_its_own_stream(source: ModelSource, tmp_path: Path) -> None:
    variants = [plan(source, name, "weight_only_int4", method=name) for name in ("rtn", "gptq")]
    job = run(tmp_path, source, *variants, quantized_inputs=True)
    seen = {v: load(tmp_path / "statistics" / v / "block_00002.safetensors") for v in ("rtn", "gptq")}
    assert seen["rtn"]["attn_in"].hessian is None
    hessian = seen["gptq"]["down_in"].hessian
    assert hessian is not None
    assert not np.array_equal(seen["rtn"]["attn_in"].channel_sum, seen["gptq"]["attn_in"].channel_sum)
    name = "model.layers.2.mlp.down_proj.weight"
    errors = {v: weight(job, v, name).astype(np.float64) - source.float_tensor(name) for v in seen}
    losses = {v: float(np.einsum("nk,kl,nl->", e, hessian, e)) for v, e in errors.items()}
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_a_search_runs_in_the_loop_and_needs_the_model(source: ModelSource, tmp_path: Path) -> None:
    variant = plan(source, "searched", "a8w8", *SEARCH)
    run(tmp_path, source, variant)
    table = ScaleTable.load(tmp_path / "scales" / "searched")
    reasons = [e.reason for e in table if e.kind == "transform"]
    assert len(reasons) == 3 * source.config.num_layers
    assert all("output error of" in reason for reason in reasons)
    with pytest.raises(
        CalibrationError, match=r"a search tries its candidates on rows of attn_in, and there is no model"
    ):
        run(tmp_path, source, plan(source, "again", "a8w8", *SEARCH), reuse_statistics=True)


def test_what_stops_a_block_from_being_settled_stops_the_run_and_the_blocks_before_stay(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"] *= 1e6  # the next block's forward is finite all the same
    save_file(weights, model / "model.safetensors")
    variant = replace(plan(open_model(model), "half", "a8w8"), dtype="float16")
    with pytest.raises(CalibrationError, match=r"layers\.1\.input_layernorm\.weight: values up to .* overflow float16"):
        run(tmp_path / "run", open_model(model), variant)
    assert [p.name for p in (tmp_path / "run" / "work" / "hidden").iterdir()] == ["hidden_00001.f32"]
    assert {p.name for p in (tmp_path / "run" / "statistics").iterdir()} == {
        "block_00000.safetensors",
        "block_00001.safetensors",
    }
