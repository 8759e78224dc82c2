"""The commands sensitivity and search on a tiny run: what they print, refuse and write, and that it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from quantbench.calibrate.sensitivity import groups_of
from quantbench.infer.checkpoint.source import open_model
from quantbench.quantizers.weight import QuantizedWeight

WEIGHT_ONLY = ["weight_only_int4", "weight_only_int8", "bf16"]


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run in a folder of its own, to leave sensitivity.json in: elsewhere than its recipe says."""
    folder = tmp_path_factory.mktemp("search") / "run"
    shutil.copytree(tiny_run, folder)
    return folder


def test_sensitivity_prints_a_ranking(quantbench: Command, run: Path) -> None:
    done = quantbench("sensitivity", run, "--modes", "weight_only_int4,a8w8", "--measure", "--tokens", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loss"] == "kl"
    for variant in ("weight_only_int4", "a8w8"):
        rows = [r for r in found["groups"] if r["variant"] == variant]
        assert [r["rank"] for r in rows] == list(range(1, 13))
        assert [r["loss"] for r in rows] == sorted((r["loss"] for r in rows), reverse=True)
        assert all(r["bytes_saved"] > 0 for r in rows)
    shown = quantbench("sensitivity", run, "--modes", "weight_only_int4", "--top", 3)
    assert "an estimate: relative squared error" in shown.stdout
    assert len(shown.stdout.strip().splitlines()) == 2 + 3


def assert_made_of_its_candidates(path: Path, run: Path, labels: dict[str, str]) -> None:
    """Every linear of the mixed checkpoint is, code by code, that of the variant it was chosen from."""
    mixed = open_model(path)
    candidates = {name: open_model(run / "checkpoint" / name) for name in WEIGHT_ONLY}
    for group in groups_of(mixed.config.num_layers):
        for name in group.linears:
            made, wanted = mixed.linear(name).weight, candidates[labels[group.name]].linear(name).weight
            if isinstance(wanted, QuantizedWeight):
                assert isinstance(made, QuantizedWeight)
                assert made.format == wanted.format
                np.testing.assert_array_equal(made.codes, wanted.codes)
                np.testing.assert_array_equal(made.scale, wanted.scale)
            else:
                np.testing.assert_array_equal(made, wanted)


def test_search_writes_a_recipe_that_calibrate_runs(quantbench: Command, run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    asked = ["search", run, "--modes", ",".join(WEIGHT_ONLY), "--tokens", 64, "-o", recipe]
    done = quantbench(*asked, "--budget-ratio", 0.55, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"]["bytes"] <= found["budget"]
    assert (losses := [point["loss"] for point in found["front"]]) == sorted(losses, reverse=True)
    off = [f"--set={stage}=off" for stage in ("parity", "throughput", "accuracy.divergence")]
    for out in ("out", "again"):
        done = quantbench("calibrate", recipe, *off, f"--set=output={tmp_path / out}")
        assert done.returncode == 0, done.stderr
    scores, again = (json.loads((tmp_path / out / "accuracy.json").read_text()) for out in ("out", "again"))
    assert scores["perplexity"] == again["perplexity"]  # the recipe re-runs to the same numbers
    planned = json.loads((tmp_path / "out" / "plan.json").read_text())["forecast"]["checkpoint_bytes"]["mixed"]
    assert planned == found["chosen"]["bytes"]
    assert_made_of_its_candidates(tmp_path / "out" / "checkpoint" / "mixed", run, found["chosen"]["groups"])
    refused = quantbench(*asked, "--budget-ratio", 0.55)
    assert refused.returncode == 2
    assert f"{recipe} exists already: --overwrite replaces it" in refused.stderr
    shown = quantbench(*asked, "--budget-ratio", 0.55, "--overwrite", "--estimate")
    assert shown.returncode == 0, shown.stderr
    assert "* marks the choice" in shown.stdout
    assert "summed estimate" in recipe.read_text()


def test_an_impossible_budget_is_one_clear_line(quantbench: Command, run: Path, tmp_path: Path) -> None:
    done = quantbench("search", run, "--budget-bytes", 1000, "--estimate", "-o", tmp_path / "no.yaml")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the budget of 1,000 bytes cannot be met: the smallest choice takes" in errors[0]
    assert not (tmp_path / "no.yaml").exists()


def test_a_speed_budget_is_kept_by_what_was_timed(quantbench: Command, run: Path, tmp_path: Path) -> None:
    asked = ["search", run, "--estimate", "--batch", 2, "--prompt", 8, "--threads", 1, "-o"]
    done = quantbench(*asked, tmp_path / "fast.yaml", "--budget-tokens-per-s", 5, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["chosen"]["groups"].values()) == {"bf16"}  # so slow a budget costs no accuracy
    assert found["chosen"]["tokens_per_s"] > 5
    assert found["chosen"]["measured_tokens_per_s"] > 5
    speeds = [point["tokens_per_s"] for point in found["front"]]
    assert speeds == sorted(speeds, reverse=True)
    assert "for a budget of 5 tokens/s at batch 2." in (tmp_path / "fast.yaml").read_text()
    refused = quantbench(*asked, tmp_path / "no.yaml", "--budget-tokens-per-s", 1e9)
    assert refused.returncode == 2
    assert "the budget of 1e+09 tokens/s cannot be met: the fastest choice makes" in refused.stderr
    assert not (tmp_path / "no.yaml").exists()
