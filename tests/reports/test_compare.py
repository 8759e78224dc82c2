from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantbench.errors import CheckpointError
from quantbench.reports import compare, print_comparison, write_comparison

Change = Callable[[dict[str, Any]], None]


def another(sample: Path, tmp_path: Path, file: str | None = None, change: Change | None = None) -> Path:
    """A second run beside `sample`, one of its files changed."""
    path = Path(shutil.copytree(sample, tmp_path / "second"))
    if file is not None and change is not None:
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))
    return path


def test_two_runs_side_by_side(sample: Path, tmp_path: Path) -> None:
    joined = compare([sample, another(sample, tmp_path)])
    assert joined["differences"] == []
    assert [run["name"] for run in joined["runs"]] == ["demo", "second"]
    assert list(joined["variants"])[0::8] == ["demo/fp32", "second/fp32"]
    assert joined["run"]["baseline"] == "fp32"
    assert {f["variant"] for f in joined["findings"]} >= {"demo/a8w8", "second/a8w8"}


def set_tokens(content: dict[str, Any]) -> None:
    content["perplexity"][0]["tokens"] = 99


def set_divergence(content: dict[str, Any]) -> None:
    content["divergence"][0]["data"] = "other"


def set_questions(content: dict[str, Any]) -> None:
    content["choices"][0]["questions"] = 7


def set_baseline(content: dict[str, Any]) -> None:
    content["baseline"] = "bf16"


def set_threads(content: dict[str, Any]) -> None:
    content["machine"]["threads"] = 64


def set_prompt(content: dict[str, Any]) -> None:
    content["prompt"] = 1024


def set_ceiling(content: dict[str, Any]) -> None:
    content["ceilings"]["read_gb_per_s"] = 60.0


def set_ceiling_a_little(content: dict[str, Any]) -> None:
    content["ceilings"]["read_gb_per_s"] = 40.0


def set_model(content: dict[str, Any]) -> None:
    content["model"] = "other"


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("accuracy.json", set_tokens, "perplexities and their increases are not comparable, the perplexity text "
         "differs "
         "(demo: data demo:wikipedia-heldout, tokens 4088, context 512; second: data "
         "demo:wikipedia-heldout, tokens 99, context 512)"),
        ("accuracy.json", set_divergence, "KL and top-1 are not comparable, the divergence text differs (demo: data "
         "demo:wikipedia-heldout, tokens 4088; second: data other, tokens 4088)"),
        ("accuracy.json", set_questions, "choice accuracies are not comparable, the questions differs (demo: data "
         "questions.jsonl, questions 100; second: data questions.jsonl, questions 7)"),
        ("accuracy.json", set_baseline, "increases and speedups are against different baselines, the baseline differs "
         "(demo: fp32; second: bf16)"),
        ("throughput.json", set_threads, "speeds are not comparable, the machine differs (demo: cpu Example CPU, "
         "threads 2, isa avx512vnni; second: cpu Example CPU, threads 64, isa avx512vnni)"),
        ("throughput.json", set_prompt, "speeds are not comparable, the load differs (demo: prompt 128, output 64; "
         "second: prompt 1024, output 64)"),
        ("throughput.json", set_ceiling, "speeds were measured against different ceilings, the state of the machine "
         "differs (demo: 37.8 GB/s; second: 60 GB/s)"),
        ("throughput.json", set_ceiling_a_little, None),
        ("plan.json", set_model, "sizes, accuracy and speed are of different models, the model differs "
         "(demo: demo:smollm2; second: other)"),
    ],
)  # fmt: skip
def test_differences(sample: Path, tmp_path: Path, file: str, change: Change, text: str | None) -> None:
    joined = compare([sample, another(sample, tmp_path, file, change)])
    assert [difference["text"] for difference in joined["differences"]] == ([text] if text else [])


def test_a_run_that_measured_less_is_no_difference(sample: Path, tmp_path: Path) -> None:
    second = another(sample, tmp_path)
    (second / "throughput.json").unlink()
    assert compare([sample, second])["differences"] == []


def test_checkpoints_inside_runs(sample: Path, tmp_path: Path) -> None:
    second = another(sample, tmp_path)
    joined = compare(
        [sample / "checkpoint" / "a8w8", second / "checkpoint" / "a8w8_fp8", second / "checkpoint" / "a8w8"]
    )
    assert list(joined["variants"]) == [
        "demo/fp32", "demo/a8w8", "second/fp32", "second/a8w8", "second/a8w8_fp8",
    ]  # fmt: skip
    assert {gate["variant"] for gate in joined["gates"]} == set()


def test_a_checkpoint_and_its_whole_run(sample: Path) -> None:
    assert len(compare([sample / "checkpoint" / "a8w8", sample])["variants"]) == 8


def test_runs_of_one_name_are_told_apart_by_their_paths(sample: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(sample, tmp_path / "elsewhere" / "demo"))
    names = [run["name"] for run in compare([sample, second])["runs"]]
    assert names == [sample.as_posix(), second.as_posix()]


def test_nothing_to_compare() -> None:
    with pytest.raises(CheckpointError, match="nothing to compare; give run folders"):
        compare([])


def test_every_unreadable_run_is_named(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare([sample / "checkpoint" / "w3", tmp_path / "absent", tmp_path])
    assert len(caught.value.problems) == 3
    assert "has no variant 'w3'; it has fp32, bf16, a8w8" in caught.value.problems[0]


def test_the_table_on_a_terminal(sample: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    joined = compare([sample, another(sample, tmp_path, "throughput.json", set_threads)])
    print_comparison(joined, Console(file=stream, width=80, no_color=True))
    text = stream.getvalue()
    assert text.isascii()
    assert text.startswith("NOTE speeds are not comparable")
    assert "second/weight_only_int4" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_leaves_out_figures_that_would_mislead(sample: Path, tmp_path: Path) -> None:
    second = another(sample, tmp_path)
    same = write_comparison(compare([sample, second]), tmp_path / "same.html").read_text(encoding="utf-8")
    assert "figure-accuracy_speed" in same
    assert "figure-throughput" in same
    content = json.loads((second / "throughput.json").read_text())
    set_threads(content)
    (second / "throughput.json").write_text(json.dumps(content))
    other = write_comparison(compare([sample, second]), tmp_path / "other.html").read_text(encoding="utf-8")
    assert "figure-accuracy_speed" not in other
    assert "figure-throughput" not in other
    assert "figure-memory" in other
    assert "speeds are not comparable" in other
    assert "https://" not in other
