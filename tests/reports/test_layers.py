from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.reports.gather import Run, read_run
from quantbench.reports.layers import block_of, layer_facts, tap_of
from quantbench.reports.stages import sqnr_db
from quantbench.scales.statistics import observe, save


@pytest.fixture(scope="module")
def run(sample: Path) -> Run:
    return read_run(sample)


@given(st.floats(1e-19, 10))
def test_sqnr_is_ten_times_the_logarithm(loss: float) -> None:
    assert sqnr_db(loss) == pytest.approx(-10 * math.log10(loss))


@pytest.mark.parametrize(("loss", "db"), [(0, 200.0), (1e-30, 200.0), (None, None), (math.nan, None), (-1, None)])
def test_sqnr_of_the_dull_inputs(loss: float | None, db: float | None) -> None:
    assert sqnr_db(loss) == db


@pytest.mark.parametrize(
    ("name", "block", "tap"),
    [("model.layers.11.mlp.down_proj", 11, "down_in"), ("model.layers.0.self_attn.v_proj", 0, "attn_in"),
     ("lm_head", None, None), ("transformer.h.3.mlp.up_proj", 3, "mlp_in")],
)  # fmt: skip
def test_names(name: str, block: int | None, tap: str | None) -> None:
    assert (block_of(name), tap_of(name)) == (block, tap)


def test_the_outlier_of_a_static_range(run: Run) -> None:
    facts = {layer.name: layer for layer in layer_facts(run, "a8w8")}
    bad, good = facts["model.layers.11.mlp.down_proj"], facts["model.layers.10.mlp.down_proj"]
    assert bad.input_absmax == 3537
    assert bad.levels is not None
    assert bad.levels == pytest.approx(127 * bad.input_p999 / 3537)
    assert good.levels is not None
    assert bad.levels < 2 < 50 < good.levels
    assert bad.over_channels is not None
    assert bad.over_channels > 100
    assert bad.over_layers is not None
    assert bad.over_layers > 50
    assert bad.worst_db is not None
    assert good.worst_db is not None
    assert bad.worst_db < good.worst_db


def test_a_dynamic_input_has_no_levels(run: Run) -> None:
    facts = layer_facts(run, "a8w8_dynamic")
    assert all(layer.dynamic and layer.levels is None and layer.typical_sqnr_db is None for layer in facts)
    assert facts[0].activations == "int8"


def test_a_float_input_only_has_a_weight(run: Run) -> None:
    layer = layer_facts(run, "weight_only_int4")[0]
    assert (layer.activations, layer.input_sqnr_db, layer.weights) == (None, None, "int4")
    assert layer.worst_db == layer.weight_sqnr_db


def test_layers_come_in_the_order_of_the_plan(run: Run) -> None:
    assert run.plan is not None
    planned = list(run.plan.variants["a8w8"].layers)
    assert [layer.name for layer in layer_facts(run, "a8w8")] == planned[:-1]  # lm_head stays float


def test_ranges_before_a_transform_say_nothing_about_what_comes_after(run: Run) -> None:
    smoothed = {layer.name: layer for layer in layer_facts(run, "a8w8c8")}["model.layers.3.self_attn.q_proj"]
    assert (smoothed.input_p999, smoothed.over_channels, smoothed.levels) == (None, None, None)


def test_a_variant_with_its_own_statistics_is_judged_by_them(scratch: Path) -> None:
    x = np.full((64, 48), 7, np.float32)
    for variant in ("a8w8_dynamic", "a8w8c8"):
        save(scratch / "statistics" / variant / "block_00003.safetensors", {"attn_in": observe(x)})
    run = read_run(scratch)
    name = "model.layers.3.self_attn.q_proj"
    plain, smoothed = (
        next(layer for layer in layer_facts(run, variant) if layer.name == name)
        for variant in ("a8w8_dynamic", "a8w8c8")
    )
    assert plain.input_absmax == 7
    assert run.taps("a8w8")[11]["down_in"].absmax[0] == 3537
    assert (smoothed.input_p999, smoothed.smoothed) == (None, True)  # its own are of what comes before the factors


@given(st.floats(0.01, 100), st.floats(1, 1e4))
def test_levels_shrink_as_the_outlier_grows(usual: float, factor: float) -> None:
    from quantbench.reports.layers import UNIFORM_NOISE_DB, _typical

    levels = 127 / factor
    typical = _typical(levels)
    assert typical is not None
    assert typical >= 0
    assert typical <= 20 * math.log10(127) + UNIFORM_NOISE_DB + 1e-9
    assert _typical(0.0) == 0.0
    assert _typical(None) is None
