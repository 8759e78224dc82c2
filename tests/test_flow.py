"""The whole job on a tiny model through the command line: what lies in the run folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Command

VARIANTS = [
    "bf16", "a8w8", "a8w8-dynamic", "a8w8c8", "a8w8_fp8c8_fp8", "a8w8c8_dynamic", "weight_only_int8",
    "weight_only_int4",
]  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of the checkpoints and scale tables, by relative path."""
    found = [p for part in ("checkpoint", "scales") for p in (folder / part).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found)}


@pytest.fixture
def run_copy(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe and its finished run folder, to spoil."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    words = yaml.safe_load(tiny_recipe.read_text()) | {"output": str(folder)}
    lock = yaml.safe_load((folder / "recipe.lock.yaml").read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(words))
    assert lock["model"] == words["model"]
    return recipe, folder


def test_every_stage_leaves_its_files(tiny_run: Path) -> None:
    names = {p.name for p in tiny_run.iterdir()}
    wanted = {"recipe.lock.yaml", "plan.json", "statistics", "scales", "checkpoint", "accuracy.json", "parity.json"}
    assert wanted | {"throughput.json", "gates.json", "report.json", "report.html"} <= names
    assert "work" not in names
    assert sorted(p.name for p in (tiny_run / "checkpoint").iterdir()) == sorted(VARIANTS)
    assert len(list((tiny_run / "statistics").iterdir())) == 3


def test_the_report_has_every_variant_side_by_side(tiny_run: Path) -> None:
    accuracy = json.loads((tiny_run / "accuracy.json").read_text())
    assert set(accuracy["perplexity"][0]["variants"]) == {"fp32", *VARIANTS}
    throughput = json.loads((tiny_run / "throughput.json").read_text())
    assert set(throughput["variants"]) == {"fp32", *VARIANTS}
    report = json.loads((tiny_run / "report.json").read_text())
    assert report["passed"] is True


def test_what_is_served_is_what_was_simulated(tiny_run: Path) -> None:
    for name, found in json.loads((tiny_run / "parity.json").read_text())["variants"].items():
        assert found["codes_different"] == 0, name
        assert found["kl_served_simulated"] < 1e-4, name
        assert found["first_departure"] is None, name


def test_a_folder_that_holds_a_run_is_not_touched(quantbench: Command, tiny_recipe: Path, tiny_run: Path) -> None:
    before = (tiny_run / "report.json").stat().st_mtime_ns
    done = quantbench("calibrate", tiny_recipe)
    assert done.returncode == 2
    assert "holds a run already: --resume continues it" in done.stderr
    assert (tiny_run / "report.json").stat().st_mtime_ns == before


def test_resume_refuses_another_recipe(quantbench: Command, tiny_recipe: Path, tiny_run: Path) -> None:
    done = quantbench("calibrate", tiny_recipe, "--resume", "--set", "calibration.seed=5")
    assert done.returncode == 2
    assert "calibration was" in done.stderr


def test_a_lock_reproduces_the_same_bytes(quantbench: Command, tiny_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    switches = ["--set", "throughput=off", "--set", "parity=off", "--set", f"output={again}"]
    done = quantbench("calibrate", tiny_run / "recipe.lock.yaml", *switches)
    assert done.returncode == 0, done.stderr
    assert files_of(again) == files_of(tiny_run)


def test_choose_again_from_saved_statistics(quantbench: Command, run_copy: tuple[Path, Path]) -> None:
    recipe, folder = run_copy
    before = files_of(folder)
    done = quantbench("calibrate", recipe, "--overwrite", "--set", "throughput=off", "--set", "parity=off")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "checkpoint")
    done = quantbench("calibrate", recipe, "--from", "choose", "--set", "throughput=off", "--set", "parity=off")
    assert done.returncode == 0, done.stderr
    assert files_of(folder) == before


def test_an_unknown_stage_names_the_known_ones(quantbench: Command, tiny_recipe: Path) -> None:
    done = quantbench("calibrate", tiny_recipe, "--from", "chose")
    assert done.returncode == 2
    assert "Did you mean choose?" in done.stderr


def test_a_failed_gate_is_exit_code_1(quantbench: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    done = quantbench(
        "calibrate", tiny_recipe, "--json",
        "--set", "gates.checkpoint_ratio=1%", "--set", f"output={tmp_path / 'run'}",
        "--set", "modes=[a8w8]", "--set", "throughput=off", "--set", "parity=off",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["passed"] is False


def test_every_table_and_checkpoint_of_a_run_is_sound(quantbench: Command, tiny_run: Path) -> None:
    for name in ("a8w8", "a8w8c8", "weight_only_int4"):
        for part in ("scales", "checkpoint"):
            done = quantbench("lint", tiny_run / part / name)
            assert done.returncode == 0, done.stdout


def test_lint_knows_what_the_plan_of_a_run_needs(quantbench: Command, run_copy: tuple[Path, Path]) -> None:
    _, folder = run_copy
    plan = json.loads((folder / "plan.json").read_text())
    plan["variants"]["bf16"] = plan["variants"]["a8w8"]
    (folder / "plan.json").write_text(json.dumps(plan))
    done = quantbench("lint", folder / "scales" / "bf16")
    assert done.returncode == 1
    assert "model.layers.0.self_attn.q_proj.weight" in done.stdout


def test_tables_and_checkpoints_are_compared(quantbench: Command, tiny_run: Path) -> None:
    for part in ("scales", "checkpoint"):
        assert quantbench("diff", tiny_run / part / "a8w8", tiny_run / part / "a8w8").stdout == "no difference\n"
        done = quantbench("diff", tiny_run / part / "a8w8", tiny_run / part / "weight_only_int8")
        assert done.returncode == 1
        assert "model.layers.0" in done.stdout


def test_inspect_shows_reasons_and_formats(quantbench: Command, tiny_run: Path) -> None:
    assert "absmax" in quantbench("inspect", tiny_run / "scales" / "a8w8").stdout
    rows = json.loads(quantbench("inspect", tiny_run / "checkpoint" / "a8w8", "--json").stdout)
    assert any(row["stored"].startswith("int8") for row in rows)


def test_runs_stand_side_by_side(quantbench: Command, tiny_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    done = quantbench("compare", tiny_run, tiny_run / "checkpoint" / "a8w8", "--html", page)
    assert done.returncode == 0, done.stderr
    assert "a8w8" in done.stdout
    assert page.read_text().startswith("<!doctype html>") or page.read_text().startswith("<!DOCTYPE html>")


def test_plan_reads_no_weights_and_writes_nothing(quantbench: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "planned"
    done = quantbench("plan", tiny_recipe, "--json", "--set", f"output={out}")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["variants"]["a8w8"]["layers"]["model.layers.0.self_attn.q_proj"]["weights"] == "int8"
    assert not out.exists()
