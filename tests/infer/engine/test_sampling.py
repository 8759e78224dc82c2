from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.errors import RequestError
from quantbench.infer.engine.sampling import Sampler, SamplingParams, distribution, draw, penalize


def random_logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("max_tokens", 0, "max_tokens: 0 is below 1"),
        ("min_tokens", -1, "min_tokens: -1 is not between 0 and max_tokens (256)"),
        ("min_tokens", 300, "min_tokens: 300 is not between 0 and max_tokens (256)"),
        ("temperature", -0.1, "temperature: -0.1 is not a finite number >= 0"),
        ("temperature", math.nan, "temperature: nan is not a finite number >= 0"),
        ("top_k", -1, "top_k: -1 is negative; 0 keeps every token"),
        ("top_p", 0.0, "top_p: 0.0 is not in (0, 1]"),
        ("top_p", 1.5, "top_p: 1.5 is not in (0, 1]"),
        ("repetition_penalty", 0.0, "repetition_penalty: 0.0 is not a finite number > 0"),
        ("seed", -1, "seed: -1 is not between 0 and 2**63 - 1"),
        ("stop", ("",), "stop: an empty string would end every text at once"),
    ],
)
def test_a_bad_value_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert says in str(caught.value)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=0, top_p=2.0, stop=("x",), detokenize=False)
    assert [p.split(":")[0] for p in caught.value.problems] == ["max_tokens", "top_p", "stop"]
    assert "use stop_token_ids" in caught.value.problems[2]


@given(st.integers(0, 2**32), st.floats(0.05, 5), st.integers(0, 60), st.floats(0.01, 1))
def test_candidates_equal_a_slow_version(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(seed)
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    ids, probabilities = distribution(logits, p)
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: -scaled[i])[: top_k or None]
    mass = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    reached = np.cumsum(mass) / sum(mass)
    fewest, most = (int(np.searchsorted(reached, top_p * slack)) + 1 for slack in (1 - 1e-6, 1 + 1e-6))  # float32
    assert set(order[:fewest]) <= set(ids.tolist()) <= set(order if top_p == 1 else order[:most])
    assert probabilities.sum() == pytest.approx(1)
    if probabilities[-1] > 1e-30:  # below, float32 weights are subnormal and coarse
        expected = math.exp(scaled[ids[0]] - scaled[ids[-1]])
        assert probabilities[0] / probabilities[-1] == pytest.approx(expected, rel=1e-4)


def test_a_wide_nucleus_goes_beyond_the_short_head() -> None:
    ids, _ = distribution(np.zeros(1000, np.float32), SamplingParams(temperature=1, top_p=0.9))
    assert len(ids) == pytest.approx(900, abs=1)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.3], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3), frozenset())
    counts = np.bincount([sampler.choose(logits, [0], i) for i in range(4000)], minlength=3)
    assert np.abs(counts / 4000 - [0.5, 0.2, 0.3]).max() < 0.03  # four standard deviations


def test_a_draw_never_leaves_the_candidates() -> None:
    assert draw(np.array([0.25, 0.75]), 0.0) == 0
    assert draw(np.array([0.25, 0.75]), 0.25) == 1
    assert draw(np.array([0.25, 0.75]), np.nextafter(1, 0)) == 1


def test_the_seed_decides_and_nothing_else() -> None:
    logits = random_logits(0)

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), frozenset())
        return [sampler.choose(logits, [], i) for i in range(30)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_a_token_that_is_asked_for_again_is_drawn_again_alike() -> None:
    logits = random_logits(0)
    sampler = Sampler(SamplingParams(temperature=2.0, seed=5), frozenset())
    first = [sampler.choose(logits, [], i) for i in range(20)]
    assert [sampler.choose(logits, [], i) for i in reversed(range(20))] == first[::-1]


def test_greedy_takes_the_first_of_equal_logits() -> None:
    sampler = Sampler(SamplingParams(), frozenset())
    assert sampler.choose(np.array([1, 5, 5, 2], np.float32), [], 0) == 1


def test_stop_ids_are_not_chosen_before_min_tokens() -> None:
    logits = np.array([9, 1, 2], np.float32)
    sampler = Sampler(SamplingParams(min_tokens=2), frozenset([0]))
    assert [sampler.choose(logits, [1], n) for n in range(3)] == [2, 2, 0]
    assert logits.tolist() == [9, 1, 2]


def test_the_repetition_penalty_lowers_seen_tokens_whatever_their_sign() -> None:
    logits = np.array([3.0, -1.0, 2.0], np.float32)
    penalize(logits, [0, 1, 0], 2.0)
    assert logits.tolist() == [1.5, -2.0, 2.0]
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), frozenset())
    assert sampler.choose(np.array([3.0, -1.0, 2.0], np.float32), [0], 0) == 2


def test_logits_without_a_finite_maximum_are_refused() -> None:
    with pytest.raises(RequestError, match="no finite maximum"):
        distribution(np.array([np.nan, 1], np.float32), SamplingParams(temperature=1.0))
