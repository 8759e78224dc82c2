"""Statistics against small exact scorers (a function from ids to logits); the real engine is in test_served.py."""

import itertools
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest

from quantbench.errors import CheckpointError, DataError
from quantbench.infer.validate.accuracy import AccuracyTasks, TokenSet, cut_windows, evaluate_accuracy
from quantbench.infer.validate.choices import load_choices
from quantbench.infer.validate.likelihood import token_nll

VOCAB = 50


class Bigram:
    """A language model that knows one table of logits [V, V]: what follows depends on the last token alone."""

    def __init__(self, table):
        self.table = table.astype(np.float32)
        self.scored = 0

    def score(self, ids):
        self.scored += 1
        return self.table[np.asarray(ids)].copy()

    def likelihood(self, ids):
        return -token_nll(self.score(ids), ids)


def bigram(seed, noise=0.0):
    table = np.random.default_rng(0).normal(scale=2, size=(VOCAB, VOCAB))
    return Bigram(table + noise * np.random.default_rng(seed).normal(size=table.shape))


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, VOCAB, size=1000).astype(np.int32)


def run(variants, tmp_path, baseline="fp32", **tasks):
    loaders = {name: (lambda engine=engine: engine) for name, engine in variants.items()}
    return evaluate_accuracy(loaders, baseline, AccuracyTasks(**tasks), tmp_path)


def test_windows_score_the_tokens_asked_for(ids):
    windows = cut_windows("text", ids, context=64, tokens=10 * 63 + 5)
    assert windows.tokens == 635
    assert [len(w) for w in windows.windows] == [64] * 10 + [6]
    assert windows.context == 64
    assert cut_windows("text", ids, 64, 63 * 8).windows[-1].tolist() == ids[448:512].tolist()
    assert cut_windows("text", ids, 64).tokens == 15 * 63 + 39


@pytest.mark.parametrize(
    ("length", "context", "tokens", "message"),
    [
        (1000, 1, None, "text: context 1 scores nothing; it must be at least 2"),
        (100, 64, 99, "text: 99 tokens to score asked for, its 100 tokens hold 98 at context 64; give a longer text"),
        (1, 64, None, "text: 0 tokens to score asked for, its 1 tokens hold 0"),
        (100, 64, 0, "text: 0 tokens to score asked for"),
    ],
)
def test_windows_that_cannot_be_cut(ids, length, context, tokens, message):
    with pytest.raises(DataError) as error:
        cut_windows("text", ids[:length], context, tokens)
    assert message in str(error.value)


def test_uniform_model_has_the_vocabulary_as_perplexity(tmp_path, ids):
    result = run({"fp32": Bigram(np.zeros((VOCAB, VOCAB)))}, tmp_path, perplexity=[cut_windows("t", ids, 128)])
    assert result["perplexity"][0]["variants"]["fp32"]["perplexity"] == pytest.approx(VOCAB, rel=1e-9)


def test_identical_models_differ_by_exactly_nothing(tmp_path, ids):
    data = cut_windows("t", ids, 128)
    result = run({"fp32": bigram(0), "twin": bigram(0)}, tmp_path, perplexity=[data], divergence=data)
    twin = result["perplexity"][0]["variants"]["twin"]
    assert (twin["increase"], twin["increase_interval"]) == (0.0, [0.0, 0.0])
    assert result["divergence"][0]["variants"] == {
        "twin": {"kl": 0.0, "kl_interval": [0.0, 0.0], "top1": 1.0, "top1_interval": [1.0, 1.0]}
    }


def test_numbers_equal_a_slow_plain_computation(tmp_path, ids):
    base, other = bigram(0), bigram(1, noise=0.3)
    data = cut_windows("t", ids, 100, 700)
    result = run({"fp32": base, "noisy": other}, tmp_path, perplexity=[data], divergence=data)
    lp = [
        m.table.astype(np.float64) - np.logaddexp.reduce(m.table.astype(np.float64), 1)[:, None] for m in (base, other)
    ]
    pairs = [(a, b) for w in data.windows for a, b in itertools.pairwise(w)]
    nll = [-np.mean([table[a, b] for a, b in pairs]) for table in lp]
    kl = np.mean([(np.exp(lp[0][a]) * (lp[0][a] - lp[1][a])).sum() for a, _ in pairs])
    agree = np.mean([lp[0][a].argmax() == lp[1][a].argmax() for a, _ in pairs])
    got, div = result["perplexity"][0]["variants"], result["divergence"][0]["variants"]["noisy"]
    assert got["fp32"]["nll"] == pytest.approx(nll[0], rel=1e-6)
    assert got["noisy"]["perplexity"] == pytest.approx(np.exp(nll[1]), rel=1e-6)
    assert got["noisy"]["increase"] == pytest.approx(np.exp(nll[1] - nll[0]) - 1, rel=1e-4)
    assert (div["kl"], div["top1"]) == (pytest.approx(kl, rel=1e-4), pytest.approx(agree))
    low, high = got["noisy"]["increase_interval"]
    assert low < got["noisy"]["increase"] < high
    assert result["perplexity"][0]["tokens"] == len(pairs) == 700
    json.dumps(result, allow_nan=False)


def test_baseline_may_stand_anywhere_and_leaves_no_file(tmp_path, ids):
    data = cut_windows("t", ids, 128)
    forth = run({"fp32": bigram(0), "q": bigram(1, 0.2)}, tmp_path / "work", divergence=data)
    back = run({"q": bigram(1, 0.2), "fp32": bigram(0)}, tmp_path / "work", divergence=data)
    assert forth == back
    assert list((tmp_path / "work").iterdir()) == []


def test_a_window_in_several_sets_is_scored_once(tmp_path, ids):
    engine, data = bigram(0), cut_windows("t", ids, 128)
    more = TokenSet("more", (*data.windows, ids[:64]))
    run({"fp32": engine}, tmp_path, perplexity=[data, more], divergence=data)
    assert engine.scored == len(data.windows) + 1


def test_one_window_gives_a_value_without_an_interval(tmp_path, ids):
    data = cut_windows("t", ids, 128, 100)
    result = run({"fp32": bigram(0), "q": bigram(1, 0.2)}, tmp_path, perplexity=[data], divergence=data)
    assert result["perplexity"][0]["variants"]["q"]["increase_interval"] is None
    assert result["divergence"][0]["variants"]["q"]["kl"] > 0


def test_progress_counts_every_window_and_question(tmp_path, ids):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "ab", "choices": ["c", "d"], "answer": 0}\n')
    choices = load_choices(path, type("Letters", (), {"encode": lambda self, text: [ord(c) % VOCAB for c in text]})())
    seen = []
    loaders = {"fp32": lambda: bigram(0), "q": lambda: bigram(1)}
    tasks = AccuracyTasks([cut_windows("t", ids, 100, 300)], None, [choices])
    evaluate_accuracy(loaders, "fp32", tasks, tmp_path, lambda *step: seen.append(step))
    assert seen == [(name, i, 5) for name in ("fp32", "q") for i in range(1, 6)]


def test_unknown_baseline_is_named(tmp_path):
    with pytest.raises(DataError, match=r"unknown baseline 'fp23'\. Did you mean fp32\?"):
        run({"fp32": bigram(0)}, tmp_path, baseline="fp23")


def test_different_vocabularies_have_no_divergence(tmp_path, ids):
    wide = Bigram(np.zeros((VOCAB, VOCAB + 1)))
    with pytest.raises(DataError, match="wide has a vocabulary of 51, the baseline of 50"):
        run({"fp32": bigram(0), "wide": wide}, tmp_path, divergence=cut_windows("t", ids, 128))


def test_logits_that_are_not_finite_name_the_variant(tmp_path, ids):
    broken = Bigram(np.full((VOCAB, VOCAB), np.nan))
    with pytest.raises(CheckpointError, match="broken: NaN or Inf among its logits"):
        run({"fp32": bigram(0), "broken": broken}, tmp_path, perplexity=[cut_windows("t", ids, 128)])


def test_a_full_disk_is_told_before_writing(tmp_path, ids, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    data = cut_windows("t", ids, 128, 127)
    with pytest.raises(DataError, match=r"the divergence of 127 tokens over 50 words needs 25400 bytes, 10 are free"):
        run({"fp32": bigram(0)}, tmp_path, divergence=data)
