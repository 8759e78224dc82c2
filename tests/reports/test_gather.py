from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantbench.errors import CheckpointError
from quantbench.reports.gather import read_run
from quantbench.reports.report import build_report

FILES = ("plan.json", "accuracy.json", "throughput.json", "parity.json")


def test_a_complete_run(sample: Path) -> None:
    run = read_run(sample)
    assert run.missing == ()
    assert run.variants[:2] == ["fp32", "bf16"]
    assert len(run.variants) == 8
    assert run.taps("a8w8")[11]["down_in"].absmax[0] == 3537
    assert len(run.gates) == 12


@pytest.mark.parametrize("name", FILES)
def test_a_stage_that_was_switched_off(scratch: Path, name: str) -> None:
    (scratch / name).unlink()
    run = read_run(scratch)
    assert run.missing == (name,)
    assert build_report(run)["missing"] == [name]


@pytest.mark.parametrize("name", ["scales", "statistics", "checkpoint", "gates.json", "recipe.lock.yaml"])
def test_folders_that_are_absent(scratch: Path, name: str) -> None:
    path = scratch / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = (f"{name}/",) if name in ("scales", "statistics") else ()
    assert read_run(scratch).missing == expected


def test_only_the_plan(scratch: Path) -> None:
    for path in list(scratch.iterdir()):
        if path.name != "plan.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = build_report(read_run(scratch))
    assert report["missing"] == ["accuracy.json", "throughput.json", "parity.json", "scales/", "statistics/"]
    assert report["verdict"]["best"] is None
    assert report["variants"]["a8w8"]["meaning"]["weights"] == "INT8 weights per output channel"


def test_every_damaged_file_is_named_at_once(scratch: Path) -> None:
    (scratch / "accuracy.json").write_text("{")
    (scratch / "plan.json").write_bytes(b"\xff\xfe\x00")
    (scratch / "recipe.lock.yaml").write_text("a: [")
    (scratch / "scales" / "a8w8" / "scales.json").write_text("[]")
    (scratch / "checkpoint" / "a8w8" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        read_run(scratch)
    said = caught.value.problems
    assert len(said) == 5
    for name in ("accuracy.json", "plan.json", "recipe.lock.yaml", "scales/a8w8/scales.json", "a8w8/model.safetensors"):
        assert any(name in problem for problem in said), name


def test_a_wrong_value_is_named_with_its_place(scratch: Path) -> None:
    path = scratch / "accuracy.json"
    content = json.loads(path.read_text())
    del content["perplexity"][0]["variants"]["a8w8"]["nll"]
    content["divergence"][0]["tokens"] = "many"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_run(scratch)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "perplexity.0.variants.a8w8.nll",
        "divergence.0.tokens",
    ]
    assert all("--from validate" in problem for problem in caught.value.problems)


def test_a_recipe_that_is_no_mapping(scratch: Path) -> None:
    (scratch / "recipe.lock.yaml").write_text("- a")
    with pytest.raises(CheckpointError, match=r"recipe\.lock\.yaml: holds a list, not a mapping; run the recipe again"):
        read_run(scratch)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give a run folder"):
        read_run(tmp_path / "absent")


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run folder: it holds none of recipe\.lock\.yaml, plan\.json"):
        read_run(tmp_path)


def test_unknown_keys_are_left_to_their_writer(scratch: Path) -> None:
    path = scratch / "throughput.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ceilings_spread": {"read_gb_per_s": {"median": 1}}}))
    assert read_run(scratch).throughput is not None
