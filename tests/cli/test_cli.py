"""The command line's own promises: quick help, one clear line per mistake, exit codes, plain output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command

HEAVY = {"paddle", "numpy", "matplotlib", "datasets", "pydantic", "tokenizers"}


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, quantbench.cli; found = {HEAVY!r} & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command(quantbench: Command) -> None:
    done = quantbench("--help", NO_COLOR="1")
    assert done.returncode == 0
    for command in (
        "calibrate",
        "plan",
        "recipes",
        "doctor",
        "eval",
        "bench",
        "generate",
        "inspect",
        "lint",
        "diff",
        "compare",
        "fetch",
    ):
        assert f" {command} " in done.stdout


def test_three_mistakes_are_three_lines_with_numbers(quantbench: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "model: demo:smollm2\nmodes: [a8w9]\ncalibration: {samples: many}\nweights:\n  granularty: channel\n"
    )
    done = quantbench("calibrate", recipe)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    for line, number in zip(lines, (2, 3, 5), strict=True):
        assert line.startswith(f"error: {recipe}:{number}: ")
    assert "Did you mean" in lines[0]
    assert "Did you mean" in lines[2]
    assert done.stdout == ""


def test_no_traceback_unless_asked(quantbench: Command) -> None:
    done = quantbench("calibrate", "no-such-recipe")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = quantbench("--debug", "calibrate", "no-such-recipe")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_recipes_are_listed_and_shown(quantbench: Command) -> None:
    listed = quantbench("recipes").stdout
    assert "demo" in listed
    assert "model: demo:smollm2" in quantbench("recipes", "show", "demo").stdout


def test_doctor_tells_what_is_here(quantbench: Command) -> None:
    found = json.loads(quantbench("doctor", "--json").stdout)
    assert found["kernels"] is True
    assert found["parts"]["paddlepaddle"]["version"]
    assert "doctor" not in quantbench("doctor").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "x", "--device", "cude"], "unknown --device 'cude'. Did you mean cuda? Known: cpu, cuda"),
        (["bench"], "nothing to measure: give a model, or --config NAME --random-weights --device cuda"),
        (["bench", "--config", "llama-3-8b"], "--config and --random-weights go together"),
        (["bench", "--random-weights"], "--config and --random-weights go together"),
        (["bench", "--config", "llama-3-8b", "--random-weights"], "--device cpu: random weights are made on a GPU"),
        (
            ["bench", "x", "--config", "llama-3-8b", "--random-weights", "--device", "cuda"],
            "x: random weights need no model; leave it out",
        ),
        (
            ["bench", "--config", "llama-3-8", "--random-weights", "--device", "cuda"],
            "unknown --config 'llama-3-8'. Did you mean llama-3-8b?",
        ),
        (["bench", "x", "--batches", "1,many"], "--batches '1,many': give positive whole numbers"),
        (["eval", "x"], "nothing to evaluate: give a text (--text FILE)"),
        (["eval", "no/such/model/here", "--text", "demo:wikipedia"], "no such model"),
        (["fetch", "demo:gpt9"], "demo:smollm2"),
    ],
)
def test_bad_arguments_say_what_is_allowed(quantbench: Command, arguments: list[str], message: str) -> None:
    done = quantbench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_generate_answers_a_file(quantbench: Command, tiny_model: Path, tmp_path: Path) -> None:
    asked, answered = tmp_path / "in.json", tmp_path / "out.json"
    asked.write_text('{"src": "The list", "tgt": ""}\n{"src": ["A ", "class"], "tgt": "x"}\n')
    done = quantbench("generate", tiny_model, "--data-file", asked, "--output-file", answered, "--max-tokens", 4)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [r["src"] for r in rows] == ["The list", "A class"]
    assert all(isinstance(r["output"], str) for r in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", ":1: not JSON"), ('{"tgt": "x"}', ":1: no 'src' text"), ("[]", ":1: no 'src' text")],
)
def test_generate_names_the_line_of_a_bad_file(
    quantbench: Command, tiny_model: Path, tmp_path: Path, line: str, message: str
) -> None:
    asked = tmp_path / "in.json"
    asked.write_text(line)
    done = quantbench("generate", tiny_model, "--data-file", asked)
    assert done.returncode == 2
    assert message in done.stderr


def test_generate_needs_its_file(quantbench: Command, tiny_model: Path) -> None:
    assert "no such file" in quantbench("generate", tiny_model, "--data-file", "absent.json").stderr
