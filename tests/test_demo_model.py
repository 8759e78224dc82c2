"""The real demo model: our forward passes agree, the published perplexity comes out, and what is exported is served.

Needs `quantbench fetch demo:smollm2 demo:wikipedia`, which `make models` does.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from quantbench.calibrate.data import eval_windows
from quantbench.calibrate.rotated import model_of
from quantbench.calibrate.simulate import simulate
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.engine import Engine
from quantbench.infer.models import LINEARS
from quantbench.infer.validate.accuracy import AccuracyTasks, TokenSet, evaluate_accuracy
from quantbench.vocabulary import CachePlan, VariantPlan, parse_mode

pytestmark = pytest.mark.model
TEXT = "demo:wikipedia-heldout"


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model("demo:smollm2")


@pytest.fixture(scope="module")
def run(quantbench: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recipe on less text, without timing."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    less = {
        "calibration.samples": "8",
        "modes": "[a8w8, a8w8c8, weight_only_int4]",
        "accuracy.perplexity[0].tokens": "511",
        "accuracy.divergence.tokens": "511",
        "parity.tokens": "511",
        "throughput": "off",
        "gates": "{parity_top1: 99.8%}",
        "output": str(folder),
    }
    done = quantbench("calibrate", "demo", *(word for k, v in less.items() for word in ("--set", f"{k}={v}")))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_paddle_and_the_runtime_compute_the_same_logits(source: ModelSource) -> None:
    window = eval_windows(TEXT, 127, 128, source.tokenizer())[0].tolist()
    served = Engine.load(source, "fp32").score(window)
    simulated = simulate(source, window, taps=False, cache="float32").logits
    assert np.abs(served - simulated).max() <= 1e-3 * np.abs(simulated).max()


def test_a_rotated_model_computes_the_same_logits(source: ModelSource) -> None:
    plan = VariantPlan("turned", parse_mode("a8w8"), "float32", CachePlan("float32"), {}, ({"rotate": {}},))
    window = eval_windows(TEXT, 31, 32, source.tokenizer())[0].tolist()
    plain, turned = (
        simulate(model, window, taps=False, cache="float32").logits for model in (source, model_of(source, plan))
    )
    assert np.abs(turned - plain).max() <= 1e-4 * np.abs(plain).max()


def test_the_published_perplexity(source: ModelSource) -> None:
    """23.68 for the float model on the first 8 windows of 512; int8 weights alone add 0.24 % in a simulation."""
    windows = TokenSet(TEXT, tuple(eval_windows(TEXT, 4088, 512, source.tokenizer())))
    engines = {mode: lambda mode=mode: Engine.load(source, mode) for mode in ("fp32", "weight_only_int8")}
    found = evaluate_accuracy(engines, "fp32", AccuracyTasks([windows]), Path("."))["perplexity"][0]["variants"]
    assert found["fp32"]["perplexity"] == pytest.approx(23.68, abs=0.01)
    assert found["weight_only_int8"]["increase"] == pytest.approx(0.0024, abs=0.004)


def test_what_is_served_is_what_was_calibrated(run: Path) -> None:
    for name, found in json.loads((run / "parity.json").read_text())["variants"].items():
        assert found["codes_different"] == found["scales_different"] == 0, name
        assert found["kl_served_simulated"] <= 1e-4, name
        assert found["first_departure"] is None, name


@pytest.mark.parametrize(("variant", "limit"), [("a8w8", 0.27), ("weight_only_int4", 0.16)])
def test_linears_are_really_packed(run: Path, variant: str, limit: float) -> None:
    checkpoint = open_model(run / "checkpoint" / variant)
    names = [n for n in checkpoint.names() if any(f".{line.name}." in n for line in LINEARS)]
    stored = sum(checkpoint.read(n).nbytes for n in names)
    floats = sum(
        4 * checkpoint.float_tensor(f"model.layers.{i}.{line.name}.weight").size for i in range(30) for line in LINEARS
    )
    assert stored <= limit * floats


def test_the_seed_tables_hold_raw_ranges(run: Path) -> None:
    """PaddleNLP's key names and absmax values, not scales; a dynamic input has no number to list."""
    folder = run / "scales" / "a8w8c8"
    weights = json.loads((folder / "weight_scales.json").read_text())
    key = "llama.layers.0.self_attn.q_proj.weight_quanter"
    absmax = np.abs(open_model("demo:smollm2").float_tensor("model.layers.0.self_attn.q_proj.weight")).max(axis=1)
    np.testing.assert_allclose(weights[key], absmax, rtol=1e-6)
    assert json.loads((folder / "act_scales.json").read_text()) == {}
    caches = json.loads((folder / "cachekv_scales.json").read_text())
    assert len(caches) == 2 * 30
    assert {len(heads) for heads in caches.values()} == {9}  # query heads, as PaddleNLP's loader expects
