"""Rounded checkpoints load as what they are called; their footprint and both their caches can be measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as where a script of it runs

import footprint
import quantized_cache
from rounded import rounded

from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.engine import Engine


@pytest.mark.parametrize("mode", ["a8w8+head", "a8w8c8+head", "a8w8c8_dynamic+head", "bf16", "weight_only_int4"])
def test_a_rounded_checkpoint(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    engine = Engine.load(rounded(open_model(tiny_model), mode, tmp_path))
    assert engine.mode.name == mode.removesuffix("+head")
    assert engine.source.quantization is None or ("lm_head" in engine.source.quantization.layers) == ("+head" in mode)
    assert len(engine.generate([[1, 2, 3]])[0].ids)


def test_a_footprint_counts_the_whole_process(tiny_model: Path, tmp_path: Path) -> None:
    found = footprint.visit(rounded(open_model(tiny_model), "a8w8", tmp_path), 1)
    assert all(value > 0 for value in found.values())
    assert found["cache_mb"] < found["peak_rss_mb"] < footprint.limit_mb(found)


def test_what_is_above_the_limit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"import_s": 0.1, "load_s": 0.2, "first_step_s": 0.01, "checkpoint_mb": 10.0, "cache_mb": 5.0}
    footprint.show({"thin": [one | {"peak_rss_mb": 165.0}], "fat": [one | {"peak_rss_mb": 166.0}]})
    thin, fat = capsys.readouterr().out.splitlines()[-2:]
    assert "within" in thin
    assert "ABOVE" in fat


@pytest.mark.parametrize(("mode", "cache"), [("a8w8c8", "int8"), ("a8w8c8_dynamic", "int8_dynamic")])
def test_caches_are_compared_step_by_step(mode: str, cache: str, tiny_model: Path, tmp_path: Path) -> None:
    first, other = (Engine.load(rounded(open_model(tiny_model), m, tmp_path)) for m in ("a8w8", mode))
    pairs = quantized_cache.compare((first, other), batch=2, context=70, steps=4)
    assert pairs.cache == cache
    assert len(pairs.float_cache) == len(pairs.quantized) == 4
    low, high = pairs.quartiles
    assert 0 < low <= high
    assert first.idle
    assert other.idle
