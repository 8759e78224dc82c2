"""Noise per linear and stage: against what rounding really does to real rows of one block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantbench.calibrate.choose import choose_block
from quantbench.calibrate.diagnosis import FILE, STORED, Diagnosis, Noise, merge_files
from quantbench.calibrate.transforms import Block
from quantbench.infer.models import LINEARS
from quantbench.quantizers.methods import METHODS
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.block import CONFIG, LAYER, PREFIX, forward, hidden, statistics, variant, weights

F32 = np.float32
SMOOTH = {"smooth": {"alpha": 0.8, "targets": ["attn_in", "mlp_in", "down_in"]}}
UP, DOWN = f"{PREFIX}.mlp.up_proj", f"{PREFIX}.mlp.down_proj"


def diagnosed(
    plan: VariantPlan, seen: dict[str, Statistics] | None = None
) -> tuple[dict[str, list[Noise]], ScaleTable, Diagnosis]:
    w, found = weights(), Diagnosis()
    table = choose_block(LAYER, w, seen or statistics(w), plan, CONFIG, diagnosis=found)
    return found.layers, table, found


def rows() -> dict[str, np.ndarray]:
    """The rows that `statistics` has seen."""
    taps = [forward(hidden(seed), weights())[1] for seed in (1, 2)]
    return {tap: np.concatenate([x[tap] for x in taps]).astype(F32) for tap in taps[0]}


def relative(noise: np.ndarray, signal: np.ndarray) -> float:
    return float(np.square(noise, dtype=np.float64).sum() / np.square(signal, dtype=np.float64).sum())


def with_hessians(w: dict[str, np.ndarray]) -> dict[str, Statistics]:
    seen = statistics(w)
    return {t: replace(s, hessian=observe(rows()[t], 1, True).hessian) if s.rows == 1 else s for t, s in seen.items()}


def test_every_linear_has_every_stage() -> None:
    layers, _, _ = diagnosed(variant("a8w8", SMOOTH))
    assert set(layers) == {f"{PREFIX}.{line.name}" for line in LINEARS}
    assert all([n.after for n in stages] == ["", "smooth"] for stages in layers.values())
    plain, _, _ = diagnosed(variant("a8w8"))
    assert all([n.after for n in stages] == [""] for stages in plain.values())
    assert diagnosed(variant("bf16"))[0] == {}


def test_a_rotated_block_begins_behind_its_rotation() -> None:
    layers, _, _ = diagnosed(variant("a8w8", {"rotate": {}}, SMOOTH))
    assert all([n.after for n in stages] == ["rotate", "smooth"] for stages in layers.values())


@pytest.mark.parametrize("mode", ["a8w8", "a8w8_fp8"])
def test_losses_are_what_rounding_does_to_real_rows(mode: str) -> None:
    layers, table, _ = diagnosed(variant(mode), with_hessians(weights()))
    x, w = rows(), weights()
    for line in LINEARS:
        name, some = f"{PREFIX}.{line.name}", w[f"{line.name}.weight"]
        back = dequantize_weight(quantize_weight(some, table[f"{name}.weight"]))
        step = max(1, len(some) // 32)
        noise = layers[name][0]
        assert noise.weight == pytest.approx(relative((some - back)[::step], some[::step]), rel=1e-4)
        real = relative(x[line.tap] @ (some - back)[::step].T, x[line.tap] @ some[::step].T)
        assert noise.input is not None
        assert noise.output - noise.input == pytest.approx(real, rel=1e-3)
        assert noise.input == table[f"{name}.input"].loss


def test_dynamic_inputs_are_estimated() -> None:
    layers, _, _ = diagnosed(variant("a8w8", dynamic=True))
    x = rows()["mlp_in"]
    scale = np.abs(x).max(axis=1, keepdims=True) / F32(127)
    real = relative(np.rint(x / scale) * scale - x, x)
    noise = layers[UP][0]
    assert noise.input == pytest.approx(real, rel=1)
    assert noise.steps is None
    assert noise.input_beyond is None


def test_smoothing_gives_steps_to_ordinary_channels() -> None:
    """Outlier channels leave few steps to the others: energies hardly see it, steps do, and smoothing mends it."""
    layers, table, _ = diagnosed(variant("a8w8", SMOOTH))
    before, after = layers[UP]
    x = rows()["mlp_in"]
    scale = np.abs(x).max() / 127
    rms = np.sqrt(np.square(x, dtype=np.float64).mean(axis=0))
    assert before.steps == pytest.approx(np.median(rms) / scale, rel=0.25)  # moments from ranges and one histogram
    assert before.steps is not None
    assert after.steps is not None
    assert after.steps > 2 * before.steps
    factors = table[f"{PREFIX}.post_attention_layernorm.smooth"].scale
    assert after.input == pytest.approx(
        relative(np.rint(x / factors / (s := table[f"{UP}.input"].scale[0])) * s - x / factors, x / factors), rel=0.5
    )


def test_what_a_method_stores_is_a_stage_of_its_own() -> None:
    plan = variant("weight_only_int4")
    plan = replace(plan, layers={n: replace(p, method="gptq") for n, p in plan.layers.items()})
    w = weights()
    seen = with_hessians(w)
    layers, table, found = diagnosed(plan, seen)
    taps = {f"{PREFIX}.{line.name}": line for line in LINEARS}

    def stored(name: str) -> object:
        line = taps[name]
        return METHODS["gptq"].quantize(w[f"{line.name}.weight"], table[f"{name}.weight"], seen[line.tap])

    found.stored(Block(LAYER, w, seen, plan, CONFIG), table, stored)
    plain, gptq = layers[DOWN]
    assert (plain.after, gptq.after) == ("", STORED)
    assert gptq.output < plain.output
    assert gptq.weight > plain.weight  # what the outputs gain the weights pay
    assert plain.input is None


@pytest.mark.parametrize("observer", ["absmax", "percentile", "mse"])
def test_what_lies_beyond_the_range_is_counted(observer: str) -> None:
    layers, table, _ = diagnosed(variant("a8w8", observer=observer))
    scale = table[f"{UP}.input"].scale[0]
    real = float((np.abs(rows()["mlp_in"]) > scale * 127).mean())
    assert layers[UP][0].input_beyond == pytest.approx(real, abs=5e-4)


def test_clipped_weights_are_counted() -> None:
    plan = variant("weight_only_int4")
    narrow = replace(plan, layers={n: replace(p, weight_observer="mse") for n, p in plan.layers.items()})
    assert diagnosed(plan)[0][UP][0].weight_beyond == 0
    layers, table, _ = diagnosed(narrow)
    entry, w = table[f"{UP}.weight"], weights()["mlp.up_proj.weight"]
    limit = np.repeat(entry.scale, entry.group_size or w.shape[1], axis=1) * 7
    step = max(1, len(w) // 32)
    assert layers[UP][0].weight_beyond == pytest.approx(float((np.abs(w) > limit * 1.08)[::step].mean()), abs=0.02)
    assert layers[UP][0].weight_beyond > 0


def test_statistics_that_a_transform_replaces_are_seen_anew() -> None:
    """As a shift does: what lies behind it was observed again."""
    w, found, plan = weights(), Diagnosis(), variant("a8w8")
    seen = statistics(w)
    found("", Block(LAYER, w, seen, plan, CONFIG), ScaleTable())
    doubled = {tap: observe(x * F32(2), CONFIG.num_kv_heads if tap in "kv" else 1) for tap, x in rows().items()}
    found("shift", Block(LAYER, w, doubled, plan, CONFIG), ScaleTable())
    for before, after in found.layers.values():
        assert after.steps == pytest.approx(before.steps, rel=0.02)  # of scales that have doubled too
        assert after.input == pytest.approx(before.input, rel=0.1)


def test_zeros_are_no_noise() -> None:
    w = {n: np.zeros_like(v) for n, v in weights().items()}
    found = Diagnosis()
    choose_block(LAYER, w, statistics(w), variant("a8w8"), CONFIG, diagnosis=found)
    assert all(n.weight == 0 and np.isfinite(n.output) for stages in found.layers.values() for n in stages)


def test_files_of_blocks_become_one(tmp_path: Path) -> None:
    _, _, found = diagnosed(variant("a8w8", SMOOTH))
    found.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    merge_files([tmp_path / "a", tmp_path / "b"], tmp_path)
    layers = json.loads((tmp_path / FILE).read_text())["layers"]
    assert [Noise(**stage) for stage in layers[UP]] == found.layers[UP]
    (tmp_path / FILE).unlink()
    merge_files([tmp_path / "b"], tmp_path)
    assert not (tmp_path / FILE).exists()
