"""The estimate against the errors of real inputs, and on a run's own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantbench.calibrate.sensitivity import estimate_block, groups_of, quantized_groups, second_moments
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.models import LINEARS
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight
from quantbench.scales import statistics as stats
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import ScaleTable

RNG = np.random.default_rng(5)


def inputs_like(s: Statistics, tokens: int = 4000) -> np.ndarray:
    """Correlated inputs with as many channels as `s`, some much larger than others."""
    mix = RNG.standard_normal((s.channels, s.channels)) * np.exp(RNG.standard_normal(s.channels))
    return (RNG.standard_normal((tokens, s.channels)) @ mix + 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def opened(tiny_run: Path, tiny_model: Path) -> tuple[ModelSource, Path]:
    return open_model(tiny_model), tiny_run


def of_run(opened: tuple[ModelSource, Path], variant: str, layer: int = 0) -> tuple[ModelSource, ScaleTable, dict]:
    run = opened[1]
    seen = stats.load(run / "statistics" / f"block_{layer:05d}.safetensors")
    return open_model(run / "checkpoint" / variant), ScaleTable.load(run / "scales" / variant), seen


def test_groups_hold_every_linear_once_in_order() -> None:
    groups = groups_of(2)
    assert [g.fused for g in groups] == ["qkv", "o", "gate_up", "down"] * 2 + ["lm_head"]
    names = [name for g in groups for name in g.linears]
    assert len(names) == len(set(names)) == 2 * len(LINEARS) + 1
    assert groups[0].linears == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")


def test_with_a_hessian_the_estimate_is_the_relative_error_of_the_outputs(opened: tuple[ModelSource, Path]) -> None:
    source = opened[0]
    checkpoint, table, seen = of_run(opened, "weight_only_int4")
    inputs = {tap: inputs_like(s) for tap, s in seen.items() if tap in {line.tap for line in LINEARS}}
    observed = {tap: observe(x, hessian=True) for tap, x in inputs.items()}
    found = estimate_block(0, source, checkpoint, table, observed)
    for group in groups_of(1)[:4]:
        x = inputs[next(line.tap for line in LINEARS if line.fused == group.fused)].astype(np.float64)
        noise = signal = 0.0
        for name in group.linears:
            w, stored = source.float_tensor(f"{name}.weight"), checkpoint.linear(name).weight
            assert isinstance(stored, QuantizedWeight)
            noise += np.square(x @ (w - dequantize_weight(stored)).T).sum()
            signal += np.square(x @ w.T).sum()
        assert found[group.name] == pytest.approx(noise / signal, rel=1e-3)


def test_second_moments_are_exact_with_a_hessian_and_keep_the_energy_without() -> None:
    x = inputs_like(observe(RNG.standard_normal((8, 12)).astype(np.float32)))
    exact = np.square(x, dtype=np.float64).mean(axis=0)
    np.testing.assert_allclose(second_moments(observe(x, hessian=True)), exact, rtol=1e-4)
    guessed = second_moments(observe(x))
    assert guessed.sum() == pytest.approx(exact.sum(), rel=1e-3)
    assert np.abs(np.log(guessed / exact)).max() < np.log(2)


def test_second_moments_of_zeros_and_of_derived_statistics_are_finite() -> None:
    assert not second_moments(observe(np.zeros((4, 3), np.float32))).any()
    derived = stats.scaled(observe(np.ones((4, 3), np.float32)), np.array([1, 2, 3], np.float32))
    assert (np.diff(second_moments(derived)) > 0).all()


@pytest.mark.parametrize("variant", ["a8w8", "a8w8-dynamic", "a8w8_fp8c8_fp8"])
def test_quantized_inputs_cost_more_than_the_same_weights_alone(opened: tuple[ModelSource, Path], variant: str) -> None:
    """The inputs' share is added, whatever decides their scale, and is of the size that eight bits allow."""
    checkpoint, table, seen = of_run(opened, variant)
    found = estimate_block(0, opened[0], checkpoint, table, seen)
    assert set(found) == {g.name for g in quantized_groups(checkpoint) if g.layer == 0}
    assert all(1e-6 < loss < 0.02 for loss in found.values())


def test_four_bits_cost_more_than_eight_in_every_group(opened: tuple[ModelSource, Path]) -> None:
    few, many = (estimate_block(1, opened[0], *of_run(opened, v, 1)) for v in ("weight_only_int4", "weight_only_int8"))
    assert set(few) == set(many)
    assert all(few[name] > 50 * many[name] for name in few)
