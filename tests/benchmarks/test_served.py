"""The results command: which entries there are, that one really runs, and that the page is what the results say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from quantbench.recipes.bundled import Preset, list_presets, preset_path
from quantbench.recipes.load import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "served.py"


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


made, page = imported("served_entries"), imported("served_page")
served = imported("served")


def record(model: str, name: str, increase: float, **changes: Any) -> dict[str, Any]:
    interval = [increase - 0.01, increase + 0.01]
    machine = {"cpu": "one", "threads": 2, "isa": "avx2", "memory_bytes": 2**33, "python": "3.11"}
    return {
        "model": model, "name": name, "mode": "a8w8, static", "method": "smooth", "rtn": f"{model}/rtn",
        "words": {"calibration": {"samples": 32, "length": 256}}, "title": model.title(), "family": "llama",
        "baseline_perplexity": 20.0, "perplexity": 20 * (1 + increase), "nll": 3.0, "increase": increase,
        "increase_interval": interval, "kl": increase / 3, "top1": 0.9, "bytes": 160_000_000,
        "linear_bytes": 106_000_000, "calibration_s": 20.5, "calibration_peak_rss_bytes": 9 * 10**8,
        "date": "2026-11-22", "machine": machine, "versions": {"quantbench": "1"},
    } | changes  # fmt: skip


def results(*records: dict[str, Any]) -> dict[str, Any]:
    text = {"data": "demo:wikipedia-heldout", "tokens": 4088, "context": 512}
    return {
        "entries": {f"{r['model']}/{r['name']}": r for r in records},
        "text": text,
        "calibration": made.CALIBRATION,
    }


def test_every_mode_begins_with_its_plain_counterpart_and_every_entry_is_a_recipe() -> None:
    entries = made.entries("small", "llama")
    assert len({e.key for e in entries}) == len(entries)
    plain = {e.key for e in entries if e.method == made.RTN}
    for before, entry in zip([None, *entries], entries, strict=False):
        assert entry.rtn in plain
        assert (entry.key == entry.rtn) == (entry.method == made.RTN)
        assert before is None or entry.key in plain or before.rtn == entry.rtn
        recipe = load_recipe(made.text_of(entry.words, "demo:smollm2", "runs/x"))
        assert [v.name for v in recipe.modes] == ["served"]
        assert recipe.throughput is None
        assert recipe.parity is None
    modes = {e.mode for e in entries}
    assert {"a8w8, dynamic", "a8w8, static", "weight_only_int4, groups of 64", "weight_only_int8"} <= modes


def test_a_counterpart_keeps_the_mode_and_nothing_of_the_method() -> None:
    words = {
        "modes": [{"name": "served", "mode": "a8w8", "method": {"gptq": {}}, "activations": {"observer": "mse"}}],
        "prefix": "auto",
        "weights": {"granularity": "channel", "observer": "mse"},
        "activations": {"dynamic": True},
        "transforms": [{"smooth": {"alpha": 0.5, "targets": ["attn_in", "mlp_in"]}}],
        "calibration": {"inputs": "quantized", "samples": 99},
        "rules": [{"match": "*", "mode": "float"}],
    }
    assert made.method_of(words) == (
        "prefix auto + smooth (alpha 0.5, targets attn_in-mlp_in) + weight ranges mse + activation ranges mse + gptq + "
        "inputs of the quantized blocks + 1 rules"
    )
    assert made.counterpart(words) == {
        "modes": [{"name": "served", "mode": "a8w8", "activations": {}}],
        "weights": {"granularity": "channel"},
        "activations": {"dynamic": True},
        "calibration": made.CALIBRATION,
    }


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ({"modes": [{"mode": "a8w8c8"}], "activations": {"dynamic": True}}, "a8w8c8, dynamic"),
        ({"modes": [{"mode": "a8w8_fp8"}], "weights": {"granularity": "channel"}}, "a8w8_fp8, static, channel"),
        (
            {"modes": [{"mode": "weight_only_int4"}], "weights": {"group_size": 32, "symmetric": False}},
            "weight_only_int4, groups of 32, asymmetric",
        ),
        (
            {"modes": [{"mode": "weight_only_int4"}], "weights": {"granularity": "channel"}},
            "weight_only_int4, channels",
        ),
    ],
)
def test_a_mode_is_told_with_what_tells_it_apart(words: dict[str, Any], mode: str) -> None:
    assert made.mode_of(words) == mode


def test_presets_of_other_families_and_comparisons_are_no_entries(tmp_path: Path) -> None:
    assert made.single(Preset("demo", preset_path("demo"), "")) is None
    path = tmp_path / "one.yaml"
    path.write_text("modes: [bf16, a8w8]\ncalibration: {data: mine.txt}\n")
    assert made.single(Preset("one", path, "")) is None
    path.write_text("modes: [bf16, a8w8]\ncalibration: {data: demo:wikipedia}\ngates: {kl: 1}\nmodel: m\n")
    words = {"modes": [{"name": "served", "mode": "a8w8"}], "calibration": {"data": "demo:wikipedia"}}
    assert made.single(Preset("one", path, "")) == words


def test_families_of_presets_are_read_from_their_comments() -> None:
    known = {"llama", "qwen2", "qwen3", "mistral"}
    assert all(set(p.families) <= known for p in list_presets())


def test_the_page_ranks_methods_behind_rounding_to_nearest() -> None:
    plain = record("small", "rtn", 1.6, method=made.RTN)
    found = results(
        record("small", "worse", 0.4, words={"calibration": {"samples": 64}}),
        record("small", "better", 0.03),
        plain,
        record("large", "rtn", -0.01, method=made.RTN),
        record("large", "better", 0.03),
    )
    found["peers"] = [{"tool": "another 1.0", "increase": "+9 %"}]
    text = page.page_of(found)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    small = lines[2:5]
    assert small[0].startswith("| **a8w8, static**: round to nearest |  | 52.00 | +160.00% (+159.0% to +161.0%) |  |")
    assert small[1].startswith("| smooth; 64 x 256 tokens | `worse` | 28.00 | +40.00%")
    assert "| 75% |" in small[1]
    assert small[2].startswith("| smooth | `better` | 20.60 | +3.00% (+2.0% to +4.0%) | 98% | 0.0100 | 90.0% | 160.0 |")
    assert small[2].endswith("| 106.0 | 20 | 0.90 |")
    assert lines[8].startswith("| smooth | `better` | 20.60 | +3.00% (+2.0% to +4.0%) |  |")  # nothing was lost there
    assert "Measured 2026-11-22 on one, 2 threads, avx2, 8 GiB, Python 3.11, quantbench 1." in text
    assert text.rstrip().endswith("| another 1.0 | +9 % |")


def test_presets_are_told_with_what_their_counterpart_lost() -> None:
    found = results(record("small", "rtn", 1.6, method=made.RTN), record("small", "better", 0.03))
    reached = page.reached_of(found)
    assert list(reached) == ["better"]
    assert reached["better"][0]["rtn_increase"] == 1.6


def test_entries_are_replaced_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    served.record(path, {"m/a": {"increase": 1}, "m/b": {"increase": 2}})
    content = json.loads(path.read_text()) | {"peers": [{"tool": "x"}]}
    path.write_text(json.dumps(content))
    served.record(path, {"m/b": {"increase": 3}})
    again = json.loads(path.read_text())
    assert again["entries"] == {"m/a": {"increase": 1}, "m/b": {"increase": 3}}
    assert again["peers"] == content["peers"]


def test_an_entry_runs_from_calibration_to_a_record(tiny_model: Path, tmp_path: Path) -> None:
    words = {
        "modes": [{"name": "served", "mode": "a8w8"}],
        "calibration": {"data": "python:topics", "samples": 4, "length": 32},
        "activations": {"dynamic": True},
    }
    entry = made.Entry("tiny", "one", "a8w8, dynamic", made.RTN, "tiny/one", words)
    folder = tmp_path / "tiny" / "one"
    took = served.calibrate(entry, str(tiny_model), folder, 1)
    assert 0.5 < took["seconds"] < 300
    assert 5e7 < took["peak_rss_bytes"] < 2e9
    assert not (folder / "statistics").exists()  # with Hessians they are several times the checkpoint
    before = (folder / "recipe.lock.yaml").stat().st_mtime_ns
    assert served.calibrate(entry, str(tiny_model), folder, 1) == took  # not calibrated again
    assert (folder / "recipe.lock.yaml").stat().st_mtime_ns == before
    checkpoints = {entry.key: str(folder / "checkpoint" / "served")}
    answer = served.child_serves(str(tiny_model), checkpoints, 1, served.Text("python:topics", 126, 64))
    made_of = served.served(answer, entry, "llama", took)
    assert made_of["kl"] > 0
    assert made_of["linear_bytes"] < made_of["bytes"]
    assert made_of["perplexity"] == pytest.approx(made_of["baseline_perplexity"] * (1 + made_of["increase"]))
    assert yaml.safe_load(folder.with_suffix(".yaml").read_text())["modes"] == words["modes"]


def test_an_entry_that_fails_is_told_and_leaves_no_time_behind(tiny_model: Path, tmp_path: Path) -> None:
    words = {"modes": [{"name": "served", "mode": "a8w8"}], "calibration": {"data": "nowhere.txt"}}
    entry = made.Entry("tiny", "bad", "a8w8, static", made.RTN, "tiny/bad", words)
    with pytest.raises(served.ChildError, match=r"^failed: .*served\.py --calibrate .*bad\.yaml"):
        served.calibrate(entry, str(tiny_model), tmp_path / "bad", 1)
    assert not (tmp_path / "bad.json").exists()


def test_an_unknown_entry_is_told(tiny_model: Path) -> None:
    command = [sys.executable, str(SCRIPT), "list", "--model", f"tiny={tiny_model}", "--only", "tiny/w8a8"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1
    assert done.stderr.strip() == "no such entry: tiny/w8a8. `list` names them all"


def test_the_committed_pages_are_what_the_committed_results_say() -> None:
    found = json.loads(served.RESULTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page_of(found), "run: python benchmarks/served.py page"
    assert json.loads(page.REACHED.read_text(encoding="utf-8")) == page.reached_of(found)
