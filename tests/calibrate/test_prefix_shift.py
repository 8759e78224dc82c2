"""A shift behind a prefix moves the prefix's values too: in the float model, in ranges, in service."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.calibrate.apply import fold_block, tap_shifts
from quantbench.calibrate.prefix import FOLDER, folded, load_prefix
from quantbench.calibrate.simulate import simulate
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.engine import Engine
from quantbench.infer.models import block_prefix
from quantbench.infer.validate.parity import Parity
from quantbench.scales.statistics import load
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.job import plan, run
from tests.sink import SINK, write_sink_model

TEXT = np.random.default_rng(1).integers(1, 512, 40).astype(np.int32)
WORDS = (
    {"shift": {"by": "midrange"}},
    {"smooth": {"alpha": 0.7, "targets": ["attn_in", "o_in", "mlp_in", "down_in"]}},
    {"kv_smooth": {}},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(write_sink_model(tmp_path_factory.mktemp("sink") / "model", "llama"))


def shifted(source: ModelSource, name: str, *more: dict[str, object]) -> VariantPlan:
    return replace(plan(source, name, "a8w8c8", WORDS[0], *more), prefix=(SINK,))


@pytest.fixture(scope="module")
def finished(model: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants: every word, and the shift alone."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, model, shifted(model, "all", *WORDS[1:]), shifted(model, "shift"))
    return folder


def found(folder: Path, model: ModelSource) -> Prefix:
    kept = load_prefix(folder / FOLDER / str(SINK), model.config)
    assert kept is not None
    return kept


def folded_model(model: ModelSource, table: ScaleTable, folder: Path) -> ModelSource:
    """The float model with all that `table` says of its blocks folded in, as a directory of its own."""
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(model.config.num_layers):
        made = fold_block(layer, model.float_block(layer), table, model.config)
        tensors |= {f"{block_prefix(layer)}.{name}": np.ascontiguousarray(x, np.float32) for name, x in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(folder)


@pytest.mark.parametrize("variant", ["all", "shift"])
def test_the_float_models_logits_are_unchanged(
    variant: str, model: ModelSource, finished: Path, tmp_path: Path
) -> None:
    table, prefix = ScaleTable.load(finished / "scales" / variant), found(finished, model)
    made, moved = folded_model(model, table, tmp_path / "folded"), folded(prefix, table, model.config)
    assert moved is not None
    before = Engine.load(model, "fp32", ops="reference", prefix=prefix).score(TEXT)
    after = Engine.load(made, "fp32", ops="reference", prefix=moved).score(TEXT)
    limit = 1e-4 * np.abs(before).max()
    assert np.abs(after - before).max() <= limit
    unmoved = Engine.load(made, "fp32", ops="reference", prefix=prefix).score(TEXT)
    assert np.abs(unmoved - before).max() > 10 * limit  # values that stay where they were are seen


def test_ranges_of_values_hold_the_prefix_as_it_is_behind_the_shift(model: ModelSource, finished: Path) -> None:
    table, prefix = ScaleTable.load(finished / "scales" / "shift"), found(finished, model)
    own = False
    for layer in range(model.config.num_layers):
        moved = prefix.v[layer] - tap_shifts(layer, table, model.config)["v"].reshape(-1, 1, model.config.head_dim)
        reach = table[f"{block_prefix(layer)}.self_attn.v_cache"].absmax
        assert np.all(reach >= np.abs(moved).max(axis=(1, 2)) * (1 - 1e-6))
        own |= bool(np.isclose(reach, np.abs(moved).max(axis=(1, 2)), rtol=1e-5).any())
    assert own  # somewhere it is the sink's own value that decides


def test_inputs_are_those_of_the_text_and_the_caches_those_of_the_prefix_too(finished: Path) -> None:
    seen = load(finished / "statistics" / "shift" / "block_00000.safetensors")
    assert seen["o_in"].tokens == 6 * 24
    assert seen["v"].tokens == 6 * 24 + 1


def test_what_is_served_is_what_was_simulated(model: ModelSource, finished: Path) -> None:
    checkpoint = open_model(finished / "checkpoint" / "all")
    engine, judged, prefix = Engine.load(checkpoint), Parity(), found(finished, model)
    served = engine.trace(TEXT)
    followed, free = simulate(checkpoint, TEXT, followed=served.hidden), simulate(checkpoint, TEXT, taps=False)
    judged.add(Engine.load(model, "fp32", prefix=prefix).trace(TEXT), followed, served, free.logits)
    result = judged.result()
    assert result["codes_different"] == 0
    assert result["first_departure"] is None
    assert result["kl_served_simulated"] < 1e-4
    assert result["layers"][-1]["sqnr_served_db"] > 15


def test_the_same_bytes_again_whatever_stands_beside_it(model: ModelSource, finished: Path, tmp_path: Path) -> None:
    run(tmp_path, model, shifted(model, "all", *WORDS[1:]))
    for file in (finished / "checkpoint" / "all").iterdir():
        assert file.read_bytes() == (tmp_path / "checkpoint" / "all" / file.name).read_bytes(), file.name
