"""Accuracy of the real engine, from text and questions to the dictionary that the command line prints."""

import json

import numpy as np
import pytest

from quantbench.errors import DataError
from quantbench.infer.engine import Engine
from quantbench.infer.validate.evaluate import Evaluation, bench_model, evaluate_model, label, read_windows
from quantbench.infer.validate.timing import Load
from quantbench.infer.validate.visit import EngineSpec

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def spec(model, mode=None):
    return EngineSpec(model, mode, "reference")


def test_a_model_against_its_quantized_self(tiny_model, text, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "ab", "choices": ["c", "d"], "answer": "d"}\n' * 3)
    asked = Evaluation(spec(tiny_model, "a8w8"), text, 64, 63 * 5, tmp_path / "q.jsonl", spec(tiny_model, "fp32"))
    result = evaluate_model(asked)
    fp32, a8w8 = label(asked.against), label(asked.model)
    assert result["baseline"] == fp32
    perplexity, divergence = result["perplexity"][0], result["divergence"][0]
    assert (perplexity["data"], perplexity["tokens"], perplexity["context"]) == (text, 315, 64)
    assert 100 < perplexity["variants"][fp32]["perplexity"] < 1e6
    assert -0.2 < perplexity["variants"][a8w8]["increase"] < 0.2
    assert 0 < divergence["variants"][a8w8]["kl"] < 0.2
    assert 0.8 < divergence["variants"][a8w8]["top1"] <= 1
    assert result["choices"][0]["questions"] == 3
    json.dumps(result, allow_nan=False)


def test_perplexity_is_that_of_the_engines_own_logits(tiny_model, text):
    engine = Engine.load(tiny_model, ops="reference")
    windows = read_windows(text, engine.tokenizer, 64, 100)
    total = 0.0
    for window in windows.windows:
        wide = engine.score(window.tolist()).astype(np.float64)
        logp = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
        total -= sum(logp[i, window[i + 1]] for i in range(len(window) - 1))
    result = evaluate_model(Evaluation(spec(tiny_model), text, 64, 100))
    assert result["perplexity"][0]["variants"][label(spec(tiny_model))]["nll"] == pytest.approx(total / 100, rel=1e-6)
    assert result["divergence"] == []


def test_windows_take_the_beginning_of_the_text(tiny_model, text):
    tokenizer = Engine.load(tiny_model, ops="reference").tokenizer
    every = tokenizer.encode(TEXT)
    assert np.concatenate(read_windows(text, tokenizer, 32, 31 * 3).windows).tolist() == every[:96]
    assert (
        np.concatenate(read_windows(text, tokenizer, 32, None).windows).tolist() == every[: len(every) // 32 * 32 + 16]
    )


def test_a_bench_compares_with_its_first_model(tiny_model):
    result = bench_model([spec(tiny_model, "fp32"), spec(tiny_model, "bf16")], Load(8, 3, (1,)), rounds=1)
    assert result["baseline"] == label(spec(tiny_model, "fp32"))
    assert list(result["variants"]) == [label(spec(tiny_model, mode)) for mode in ("fp32", "bf16")]


def test_every_wrong_request_is_explained(tiny_model, text, tmp_path):
    with pytest.raises(DataError, match=r"nothing to evaluate: give a text \(--text FILE\) or questions"):
        evaluate_model(Evaluation(spec(tiny_model)))
    with pytest.raises(DataError, match="would be compared with itself; give another model or mode"):
        evaluate_model(Evaluation(spec(tiny_model), text, against=spec(tiny_model)))
    with pytest.raises(DataError, match=r"none\.txt: no such file; give a UTF-8 text file or one of demo:wikipedia"):
        evaluate_model(Evaluation(spec(tiny_model), str(tmp_path / "none.txt")))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text \(byte 3\); convert it first"):
        evaluate_model(Evaluation(spec(tiny_model), str(tmp_path / "latin.txt")))
    with pytest.raises(DataError, match="nothing to measure: give at least one model"):
        bench_model([], Load())
