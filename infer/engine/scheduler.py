"""Which tokens of which requests run in the next step: continuous batching with chunked prefill.

A request is a list of tokens of which the first `computed` are in the cache; prefill, decode and recomputation after
preemption are all "compute the rest". Each step takes one token of every request that decodes, and fills up with
prompt tokens to `chunk` (Agrawal et al. 2023, SARATHI). Where pages run out, the request that arrived last gives its
pages back and waits (Kwon et al. 2023, section 4.5: recomputation).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quantbench.errors import RequestError
from quantbench.infer.engine.cache import PagePool, page_key, pages_for
from quantbench.infer.engine.sampling import Sampler
from quantbench.infer.engine.text import TextStream
from quantbench.infer.ops import PAGE


@dataclass(eq=False)
class Running:
    """One request in flight, waiting or running."""

    number: int
    tokens: list[int]  # prompt and generated
    prompt_length: int
    limit: int  # tokens at which it must stop: prompt + max_tokens, or what positions and cache allow
    sampler: Sampler
    text: TextStream | None = None
    computed: int = 0  # tokens whose K and V are in the cache
    reused: int = 0  # prompt tokens found in the cache on first admission
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # names of the full pages, in order

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, from its token `start` on, to be computed in this step."""

    sequence: Running
    start: int
    count: int

    @property
    def ids(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def last(self) -> bool:
        """Whether the newest token is among them, so that its logits choose the next one."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Waiting and running sequences and the pages they hold."""

    def __init__(self, pool: PagePool, max_batch: int, chunk: int, prefix_reuse: bool, offset: int = 0) -> None:
        """`offset`: slots at the start of every sequence's pages that are filled already, by a checkpoint's prefix."""
        self.pool = pool
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # in order of admission
        self.preemptions = 0
        self._max_batch = max_batch
        self._chunk = chunk
        self._prefix_reuse = prefix_reuse
        self._offset = offset

    def add(self, sequence: Running) -> None:
        self.waiting.append(sequence)

    def place(self, sequence: Running, computed: int) -> None:
        """Admits a sequence with its first `computed` tokens taken as computed: its pages hold what they hold.
        Benchmarks begin decoding this way. Raises RequestError where pages are missing."""
        if not self._grow(sequence, computed):
            raise RequestError(f"{computed} tokens find no free cache pages; load with a larger cache_tokens")
        sequence.computed = computed
        self.running.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's work, pages allocated; empty where nothing is left to do."""
        work: dict[int, Chunk] = {}
        budget = self._chunk
        preempted = False
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            count = 1 if sequence.pending == 1 else min(sequence.pending, budget)
            if count <= 0 or sequence not in self.running:
                continue
            while not self._grow(sequence, count):
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                dropped = work.pop(victim.number, None)
                budget += dropped.count if dropped else 0
                if victim is sequence:
                    break
            else:
                work[sequence.number] = Chunk(sequence, sequence.computed, count)
                budget -= count
        while not preempted and self.waiting and len(self.running) < self._max_batch and budget > 0:
            sequence = self.waiting[0]
            self._reuse(sequence)
            count = min(sequence.pending, budget)
            if not self._grow(sequence, count):
                self._release(sequence)
                break
            self.running.append(self.waiting.popleft())
            work[sequence.number] = Chunk(sequence, sequence.computed, count)
            budget -= count
        return list(work.values())

    def commit(self, work: list[Chunk]) -> None:
        """Marks `work` as computed and names the pages that became full."""
        for chunk in work:
            sequence = chunk.sequence
            sequence.computed = chunk.start + chunk.count
            if self._prefix_reuse:
                while len(sequence.keys) < (sequence.computed + self._offset) // PAGE:
                    self._extend_keys(sequence)
                    page = sequence.pages[len(sequence.keys) - 1]
                    self.pool.name(page, sequence.keys[-1])

    def finish(self, sequence: Running) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _extend_keys(self, sequence: Running) -> None:
        start = len(sequence.keys) * PAGE - self._offset
        parent = sequence.keys[-1] if sequence.keys else b""
        sequence.keys.append(page_key(parent, sequence.tokens[max(start, 0) : max(start + PAGE, 0)]))

    def _reuse(self, sequence: Running) -> None:
        """Takes over the pages of the longest known prefix; the last token is always computed, for its logits."""
        if not self._prefix_reuse:
            return
        for _ in range((len(sequence.tokens) - 1 + self._offset) // PAGE):
            self._extend_keys(sequence)
            page = self.pool.find(sequence.keys[-1])
            if page is None:
                sequence.keys.pop()
                break
            sequence.pages.append(self.pool.share(page))
        sequence.computed = max(0, len(sequence.pages) * PAGE - self._offset)
        if sequence.generated == 0:
            sequence.reused = sequence.computed

    def _grow(self, sequence: Running, count: int) -> bool:
        """Whether the sequence has, or now got, pages for `count` more tokens."""
        missing = pages_for(self._offset + sequence.computed + count) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(missing)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def _preempt(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Running) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.computed = [], [], 0
