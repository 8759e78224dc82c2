"""Searches and Hessian methods in the block loop: each stream sees its own inputs; what is decided is carried out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
