"""The scheduler with a model that only counts: who runs when, and that no page and no request is ever lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.errors import RequestError
from quantbench.infer.engine.cache import PagePool, pages_for
from quantbench.infer.engine.sampling import Sampler, SamplingParams
from quantbench.infer.engine.scheduler import Chunk, Running, Scheduler


def sequence(number: int, prompt: list[int], generate: int) -> Running:
    sampler = Sampler(SamplingParams(), frozenset())
    return Running(number, list(prompt), len(prompt), len(prompt) + generate, sampler)


def step(scheduler: Scheduler) -> list[Chunk]:
    """One step of a model whose every token is 1."""
    work = scheduler.schedule()
    for chunk in work:
        s = chunk.sequence
        assert chunk.start == s.computed
        assert len(s.pages) >= pages_for(chunk.start + chunk.count)
        assert len(set(s.pages)) == len(s.pages)
    scheduler.commit(work)
    for chunk in work:
        if chunk.sequence.computed == len(chunk.sequence.tokens):
            chunk.sequence.tokens.append(1)
            if len(chunk.sequence.tokens) == chunk.sequence.limit:
                scheduler.finish(chunk.sequence)
    return work


def sizes(work: list[Chunk]) -> dict[int, int]:
    return {chunk.sequence.number: chunk.count for chunk in work}


def test_decoding_goes_first_and_prompts_fill_the_step() -> None:
    scheduler = Scheduler(PagePool(20), max_batch=4, chunk=100, prefix_reuse=False)
    scheduler.add(sequence(1, [0] * 10, 5))
    scheduler.add(sequence(2, [0] * 150, 5))
    assert sizes(step(scheduler)) == {1: 10, 2: 90}
    scheduler.add(sequence(3, [0] * 70, 5))
    assert sizes(step(scheduler)) == {1: 1, 2: 60, 3: 39}
    assert sizes(step(scheduler)) == {1: 1, 2: 1, 3: 31}
    assert sizes(step(scheduler)) == {1: 1, 2: 1, 3: 1}


def test_no_more_than_max_batch_run() -> None:
    scheduler = Scheduler(PagePool(20), max_batch=2, chunk=100, prefix_reuse=False)
    for number in range(4):
        scheduler.add(sequence(number, [0] * 3, 2))
    assert sizes(step(scheduler)) == {0: 3, 1: 3}
    assert sizes(step(scheduler)) == {0: 1, 1: 1}
    assert sizes(step(scheduler)) == {2: 3, 3: 3}


def test_the_last_to_arrive_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(PagePool(2), max_batch=3, chunk=100, prefix_reuse=False)
    for number, length in enumerate((63, 40)):
        scheduler.add(sequence(number, [0] * length, 30))
    assert sizes(step(scheduler)) == {0: 63, 1: 37}
    scheduler.add(sequence(2, [0] * 5, 1))
    assert sizes(step(scheduler)) == {0: 1, 1: 3}
    assert sizes(step(scheduler)) == {0: 1}  # its 65th token takes the page of request 1
    assert scheduler.preemptions == 1
    assert [s.number for s in scheduler.waiting] == [1, 2]
    while scheduler.running:
        work = step(scheduler)
    assert sizes(work) == {0: 1}
    assert sizes(step(scheduler)) == {1: 41, 2: 5}  # the token it had generated is kept


def test_equal_prefixes_share_pages_once_they_are_full() -> None:
    pool = PagePool(10)
    scheduler = Scheduler(pool, max_batch=4, chunk=1000, prefix_reuse=True)
    scheduler.add(sequence(1, [7] * 200, 5))
    step(scheduler)
    scheduler.add(sequence(2, [7] * 192 + [8], 5))
    scheduler.add(sequence(3, [8] + [7] * 199, 5))
    assert sizes(step(scheduler)) == {1: 1, 2: 1, 3: 200}
    assert scheduler.running[1].pages[:3] == scheduler.running[0].pages[:3]
    assert scheduler.running[1].reused == 192
    assert pool.available == 10 - 4 - 1 - 4


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 60), st.integers(1, 3)), min_size=1, max_size=8),
    st.integers(4, 9),
    st.integers(1, 4),
    st.integers(1, 200),
    st.booleans(),
)
def test_every_request_finishes_and_every_page_returns(
    requests: list[tuple[int, int, int]], pages: int, max_batch: int, chunk: int, reuse: bool
) -> None:
    pool = PagePool(pages)
    scheduler = Scheduler(pool, max_batch, chunk, reuse)
    everyone = [sequence(n, [kind] * length, more) for n, (length, more, kind) in enumerate(requests)]
    for one in everyone:
        scheduler.add(one)
    steps = 0
    while scheduler.running or scheduler.waiting:
        work = step(scheduler)
        assert work, "nothing runs although somebody waits"
        assert len({c.sequence.number for c in work}) == len(work) <= max_batch
        steps += 1
        assert steps < 20_000
    assert [len(s.tokens) for s in everyone] == [s.limit for s in everyone]
    assert pool.available == pages


def test_a_sequence_can_be_placed_with_its_prompt_taken_as_computed() -> None:
    scheduler = Scheduler(PagePool(4), max_batch=2, chunk=100, prefix_reuse=False)
    placed = sequence(1, [0] * 100, 3)
    scheduler.place(placed, 99)
    assert len(placed.pages) == 2
    assert sizes(step(scheduler)) == {1: 1}
    with pytest.raises(RequestError, match="200 tokens find no free cache pages"):
        scheduler.place(sequence(2, [0] * 201, 3), 200)
