from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantbench.infer.cuda.arena import ALIGN, SLAB, Arena, Block


class Slabs:
    """Hands out far apart addresses, as a device would."""

    def __init__(self) -> None:
        self.given: list[tuple[int, int]] = []

    def __call__(self, size: int) -> int:
        address = (len(self.given) + 1) << 40
        self.given.append((address, size))
        return address


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 20)), max_size=40))
def test_rooms_never_overlap_and_come_from_slabs(steps: list[tuple[bool, int]]) -> None:
    slabs = Slabs()
    arena = Arena(slabs)
    held: list[Block] = []
    for drop, size in steps:
        if drop and held:
            held.pop(size % len(held))
            continue
        block = arena.take(size)
        assert block.size >= size
        assert block.pointer % ALIGN == 0
        assert any(a <= block.pointer and block.pointer + block.size <= a + s for a, s in slabs.given)
        assert all(block.pointer + block.size <= b.pointer or b.pointer + b.size <= block.pointer for b in held)
        held.append(block)


def test_the_same_calls_get_the_same_addresses() -> None:
    arena = Arena(Slabs())

    def step() -> list[int]:
        a, b = arena.take(1000), arena.take(70000)
        first = [a.pointer, b.pointer]
        del a
        return [*first, arena.take(300).pointer, arena.take(5000).pointer]

    assert step() == step() == step()


def test_everything_given_back_is_one_room_again() -> None:
    slabs = Slabs()
    arena = Arena(slabs)
    blocks = [arena.take(SLAB // 8) for _ in range(8)]
    del blocks[1::2]
    del blocks
    assert arena.take(SLAB).pointer == slabs.given[0][0]
    assert len(slabs.given) == 1
    assert arena.bytes == SLAB


def test_slabs_that_happen_to_touch_stay_apart() -> None:
    addresses = iter([SLAB, 2 * SLAB, 3 * SLAB])
    arena = Arena(lambda size: next(addresses))
    first, second = arena.take(SLAB), arena.take(SLAB)
    del first, second
    assert arena.take(2 * SLAB).pointer == 3 * SLAB


def test_a_room_larger_than_a_slab_gets_a_slab_of_its_own() -> None:
    arena = Arena(Slabs())
    assert arena.take(3 * SLAB).size == 3 * SLAB


def test_a_step_finds_room_again_whatever_the_order_of_its_slabs() -> None:
    addresses = iter([2 << 40, 1 << 40])  # the second slab, of the large array alone, lies below the first
    arena = Arena(lambda size: next(addresses))
    for _ in range(2):
        small, large = arena.take(1 << 20), arena.take(SLAB + ALIGN)
        del small, large
    assert arena.bytes == 2 * SLAB + ALIGN
