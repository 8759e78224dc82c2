"""Memory of a step: rooms in large slabs, taken best fit, given back when nobody holds them.

Best fit keeps a slab of its own for the large array that it was made for: a step that is captured asks for what it
asked for when it ran the first time, and must find room for all of it.

The same sequence of calls gets the same addresses, whatever ran before, because neighbours are joined when they are
given back. Slabs are never returned to the device.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

ALIGN = 256
SLAB = 64 << 20


class Block:
    """A room of `size` bytes at `pointer`. Dropping it gives the room back."""

    def __init__(self, arena: Arena, pointer: int, size: int) -> None:
        self.arena, self.pointer, self.size = arena, pointer, size

    def __del__(self) -> None:
        self.arena.give(self.pointer, self.size)


class Arena:
    """`slab(size)` gives the address of new memory."""

    def __init__(self, slab: Callable[[int], int]) -> None:
        self._slab = slab
        self._free: list[tuple[int, int]] = []  # (address, size), by address
        self._starts: set[int] = set()  # of slabs: neighbours by chance, which copies may not run across
        self.bytes = 0  # of all slabs

    def take(self, size: int) -> Block:
        needed = -(-size // ALIGN) * ALIGN
        fits = [(room, i) for i, (_, room) in enumerate(self._free) if room >= needed]
        if fits:
            room, i = min(fits)
            pointer = self._free[i][0]
            self._free[i : i + 1] = [(pointer + needed, room - needed)] if room > needed else []
            return Block(self, pointer, needed)
        fresh = max(SLAB, needed)
        pointer = self._slab(fresh)
        self.bytes += fresh
        self._starts.add(pointer)
        self.give(pointer, fresh)
        return self.take(size)

    def give(self, pointer: int, size: int) -> None:
        insort(self._free, (pointer, size))
        i = next(i for i, (start, _) in enumerate(self._free) if start == pointer)
        for left in (i, i - 1):  # join the next, then the one before
            if 0 <= left < len(self._free) - 1:
                start, room = self._free[left]
                following, more = self._free[left + 1]
                if start + room == following and following not in self._starts:
                    self._free[left : left + 2] = [(start, room + more)]
