from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from quantbench.errors import RequestError
from quantbench.infer.engine import BeamParams, Engine, SamplingParams

Load = Callable[..., Engine]


def log_probabilities(engine: Engine, prompt: list[int], ids: list[int]) -> np.ndarray:
    """log p of each of `ids` after `prompt`, by scoring."""
    logits = engine.score([*prompt, *ids])[len(prompt) - 1 : -1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits[np.arange(len(ids)), ids]


def test_one_beam_is_greedy(load: Load) -> None:
    engine = load("llama")
    greedy = engine.generate([[5, 6]], SamplingParams(max_tokens=70, ignore_eos=True))[0].ids
    (beam,) = engine.beam_search([5, 6], BeamParams(beams=1, max_tokens=70, ignore_eos=True))
    assert (beam.ids, beam.finish_reason) == (greedy, "length")
    assert beam.score == pytest.approx(log_probabilities(engine, [5, 6], greedy).mean(), abs=1e-5)


def test_as_many_beams_as_tokens_search_everything(load: Load) -> None:
    engine, prompt = load("qwen2"), list(range(1, 63))  # the second token begins a page
    first = engine.score(prompt)[-1].astype(np.float64)
    first -= np.log(np.exp(first).sum())
    best = {}
    for a in range(97):
        second = engine.score([*prompt, a])[-1].astype(np.float64)
        second -= np.log(np.exp(second).sum())
        best |= {(a, b): (first[a] + second[b]) / 2 for b in range(97)}
    expected = sorted(best, key=lambda pair: -best[pair])[:5]
    found = engine.beam_search(prompt, BeamParams(beams=97, max_tokens=2, ignore_eos=True))
    assert [tuple(beam.ids) for beam in found[:5]] == expected
    assert found[0].score == pytest.approx(best[expected[0]], abs=1e-5)


@pytest.mark.parametrize("prompt", [[3] * 60, [3] * 64, [3] * 10])
@pytest.mark.parametrize("mode", ["fp32", "fp32c8_dynamic"])  # the latter copies scales with its pages
def test_scores_are_what_scoring_says_however_beams_split(prompt: list[int], mode: str, load: Load) -> None:
    engine = load("llama", mode, chunk=50)
    pages = engine.runner.cache.pool.available
    found = engine.beam_search(prompt, BeamParams(beams=6, max_tokens=12, length_penalty=0.0, ignore_eos=True))
    assert len({tuple(b.ids) for b in found}) == 6
    for beam in found:
        assert beam.score == pytest.approx(log_probabilities(engine, prompt, beam.ids).sum(), abs=1e-4)
    assert found == sorted(found, key=lambda b: -b.score)
    assert engine.runner.cache.pool.available == pages


def test_a_stop_token_ends_a_hypothesis_and_its_length_counts(load: Load) -> None:
    engine = load("llama")
    likely = engine.beam_search([7], BeamParams(beams=4, max_tokens=6, ignore_eos=True))[0].ids[1]
    params = BeamParams(beams=4, max_tokens=20, length_penalty=0.5, stop_token_ids=(likely,))
    ended = [b for b in engine.beam_search([7], params) if b.finish_reason == "stop"]
    assert ended
    for beam in ended:
        assert beam.ids.index(likely) == len(beam.ids) - 1
        expected = log_probabilities(engine, [7], beam.ids).sum() / math.sqrt(len(beam.ids))
        assert beam.score == pytest.approx(expected, abs=1e-5)


def test_more_beams_find_no_worse_sequence(load: Load) -> None:
    engine = load("llama")
    scores = [engine.beam_search([9, 1], BeamParams(n, 8, 0.0, ignore_eos=True))[0].score for n in (1, 8)]
    assert scores[1] >= scores[0]


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RequestError) as caught:
        BeamParams(beams=0, max_tokens=0, length_penalty=math.inf)
    assert caught.value.problems == (
        "beams: 0 is below 1",
        "max_tokens: 0 is below 1",
        "length_penalty: inf is not finite; 1 is the mean log-probability",
    )


def test_a_search_without_pages_is_refused_and_leaves_none_behind(load: Load) -> None:
    engine = load("llama", cache_tokens=3 * 64)
    with pytest.raises(RequestError, match="5 beams find no free cache page; use fewer beams"):
        engine.beam_search([1, 2], BeamParams(beams=5, max_tokens=10, ignore_eos=True))
    assert engine.runner.cache.pool.available == 3
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.beam_search([])
