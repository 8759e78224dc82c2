"""The comparison of mixed precision with what is uniform: which splits, and that it really runs, once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mixed.py"


@pytest.fixture(scope="module")
def mixed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mixed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_splits_have_as_many_blocks_as_asked(mixed: ModuleType) -> None:
    found = mixed.splits(30, 15)
    assert all(len(set(blocks)) == 15 and min(blocks) >= 0 and max(blocks) < 30 for blocks in found.values())
    assert found["ends-15"] == [*range(8), *range(23, 30)]
    assert found["spread-15"] == list(range(0, 30, 2))
    assert mixed.splits(3, 1) == {"first-1": [0], "last-1": [2], "ends-1": [0], "spread-1": [0]}


def test_it_fails_where_the_search_is_no_better_or_its_recipe_is_not_the_same_twice(mixed: ModuleType) -> None:
    def found(**changes: Any) -> dict[str, Any]:
        f = {"kl": 0.1, "best_uniform": "u", "same_bytes_twice": True, "same_figures_twice": True} | changes
        return {"uniform": {"u": {"kl": 0.2}}, "mixed": {"m": f}}

    assert not mixed.failed(found())
    assert mixed.failed(found(kl=0.2))
    assert mixed.failed(found(same_bytes_twice=False))
    assert mixed.failed(found(same_figures_twice=False))


def test_it_runs_and_goes_on_from_what_is_there(
    mixed: ModuleType, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, file = tmp_path / "work", tmp_path / "mixed.json"
    words = f"{tiny_model} --int8-blocks 1 --tokens 64 --data python:topics --samples 8 --text python:topics"
    asked = [*words.split(), "--text-tokens", "126", "--context", "64", "--work", str(work), "--json", str(file)]
    status = mixed.main(asked)
    found = json.loads(file.read_text())
    assert set(found["uniform"]) == {"int4", "int4-g32", "int8", "first-1", "last-1", "ends-1", "spread-1"}
    (search,) = found["mixed"].values()
    assert search["same_bytes_twice"]
    assert search["same_figures_twice"]
    assert search["bytes"] <= search["budget"] == found["uniform"]["first-1"]["bytes"]
    assert status == int(search["kl"] >= found["uniform"][search["best_uniform"]]["kl"])
    assert f"of {search['best_uniform']}; twice: the same" in capsys.readouterr().out
    before = (work / "uniform" / "report.json").stat().st_mtime_ns
    assert mixed.main(asked) == status
    assert (work / "uniform" / "report.json").stat().st_mtime_ns == before
    assert json.loads(file.read_text())["mixed"] == found["mixed"]
