"""The ring over several devices, against a model that remembers every byte of each."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.ring import Extent, Place, Ring, align_up
from qdsmirror.limits import EXTENSIONS_PER_LOG_MAX, EXTENTS_MAX

ALIGN = 4096
START = 3 * ALIGN


class Model:
    """A log whose every live block is known.

    :ivar live: place of each block that is needed, to its position.
    """

    def __init__(self, test: SynchronousTestCase, blocks: int, at: int) -> None:
        self.test = test
        self.ring = Ring(START, blocks * ALIGN, ALIGN)
        self.head = self.tail = at * ALIGN
        self.live: dict[Place, int] = {}
        self.records: list[int] = []
        self.leaving: set[int] = set()
        #: Sizes of the devices chained, in blocks.
        self.sizes: dict[int, int] = {}

    def place(self, unaligned: int, reserve: int) -> None:
        ring, test = self.ring, self.test
        found = ring.place(self.head, self.tail, unaligned, reserve)
        if found is None:
            return
        test.assertEqual(found.record_bytes, align_up(unaligned, ALIGN))
        test.assertLessEqual(found.end + reserve - self.tail, ring.size)
        at = self.head
        for position, length in found.pads:
            test.assertEqual((position, length), (at, ring.contiguous(at)))
            test.assertLess(length, found.record_bytes, "a pad where the record fits")
            at += length
        test.assertEqual(found.position, at)
        first = ring.physical(at)
        for position in range(self.head, found.end, ALIGN):
            block = ring.physical(position)
            test.assertNotIn(block, self.live, "overwrites what is needed")
            test.assertNotIn(block.device, self.leaving, "enters a device that is being freed")
            if position >= at:
                test.assertEqual(block, (first.device, first.offset + position - at), "crosses")
            self.live[block] = position
        self.head = found.end
        self.records.append(found.end)

    def move_tail(self, count: int) -> None:
        old, ring = self.tail, self.ring
        for end in self.records[:count]:
            self.tail = end
        del self.records[:count]
        self.live = {block: p for block, p in self.live.items() if p >= self.tail}
        if self.leaving and self.tail != old:
            self.become(ring.without(self.tail, old + ring.size, self.leaving))

    def extend(self, blocks: int, which: int) -> None:
        number = next(n for n in range(1, 99) if n not in self.sizes)
        if number > EXTENSIONS_PER_LOG_MAX:
            return
        turn = self.tail + self.ring.size
        places = [*self.ring.boundaries(self.head, turn), turn]
        at = places[which % len(places)]
        self.sizes[number] = blocks
        self.become(self.ring.inserted(self.tail, at, Extent(number, START, blocks * ALIGN)))

    def free(self, which: int) -> None:
        if not self.sizes:
            return
        self.leaving.add(sorted(self.sizes)[which % len(self.sizes)])
        self.become(self.ring.without(self.tail, self.head, self.leaving))

    def become(self, ring: Ring) -> None:
        self.ring = ring
        for number in [n for n in self.leaving if n not in ring.devices]:
            self.leaving.discard(number)
            del self.sizes[number]
        self.check()

    def check(self) -> None:
        ring, test = self.ring, self.test
        for block, position in self.live.items():
            test.assertEqual(ring.physical(position), block, "a live position moved")
        places = [ring.physical(p) for p in range(self.tail, self.tail + ring.size, ALIGN)]
        expected = {
            Place(e.device, offset)
            for e in ring.extents
            for offset in range(e.offset, e.offset + e.length, ALIGN)
        }
        test.assertEqual(len(places), len(expected), "two positions share a place")
        test.assertEqual(set(places), expected)
        test.assertEqual(ring, Ring.from_json(ring.to_json()))
        for number, blocks in self.sizes.items():
            held = sum(e.length for e in ring.extents if e.device == number)
            if number in self.leaving:
                test.assertTrue(0 < held <= blocks * ALIGN)
                inside = [p for block, p in self.live.items() if block.device == number]
                test.assertEqual(len(inside) * ALIGN, held, "what leaves is all needed")
            else:
                test.assertEqual(held, blocks * ALIGN)
        others = [e for e in ring.extents if e.device not in self.leaving]
        test.assertLessEqual(len(others), 2 * len(self.sizes) + 1, "parts that adjoin are apart")
        test.assertLessEqual(len(ring.extents), EXTENTS_MAX)


STEPS = st.one_of(
    st.tuples(st.just("place"), st.integers(1, 6 * ALIGN), st.sampled_from([0, ALIGN, 3 * ALIGN])),
    st.tuples(st.just("tail"), st.integers(0, 8)),
    st.tuples(st.just("extend"), st.integers(1, 12), st.integers(0, 5)),
    st.tuples(st.just("free"), st.integers(0, 15)),
)


class ExtensionTests(SynchronousTestCase):
    @settings(max_examples=400, deadline=None)
    @given(st.integers(4, 20), st.integers(0, 50), st.lists(STEPS, max_size=80))
    def test_every_live_position_keeps_its_place(
        self, blocks: int, at: int, steps: list[tuple[str, int] | tuple[str, int, int]]
    ) -> None:
        model = Model(self, blocks, at)
        actions = {
            "place": model.place,
            "tail": model.move_tail,
            "extend": model.extend,
            "free": model.free,
        }
        for name, *numbers in steps:
            actions[name](*numbers)  # type: ignore[operator]
        # All that was chained and is freed leaves once the tail has come round.
        for number in list(model.sizes):
            model.free(sorted(model.sizes).index(number))
        model.move_tail(len(model.records))
        self.assertEqual(model.sizes, {})
        self.assertEqual(model.ring.extents, (Extent(0, START, blocks * ALIGN),))

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=8),
        st.integers(1, 8),
    )
    def test_spare_is_what_the_worst_head_leaves(
        self, parts: list[tuple[int, int]], record: int
    ) -> None:
        extents = tuple(
            Extent(device, 100 * n * ALIGN, blocks * ALIGN)
            for n, (device, blocks) in enumerate(parts)
        )
        ring = Ring(0, sum(e.length for e in extents), ALIGN, 0, extents)
        left = []
        for head in range(0, ring.size, ALIGN):
            found = ring.place(head, head, record * ALIGN)
            left.append(ring.size - (found.end - head) if found is not None else -1)
        spare = ring.spare(record * ALIGN)
        self.assertEqual(spare >= 0, min(left) >= 0)
        if spare >= 0:
            self.assertEqual(spare, min(left))

    def test_joined_again(self) -> None:
        ring = Ring(START, 10 * ALIGN, ALIGN)
        extended = ring.inserted(4 * ALIGN, 14 * ALIGN, Extent(1, 0, 5 * ALIGN))
        self.assertEqual(
            extended.extents,
            (
                Extent(0, START + 4 * ALIGN, 6 * ALIGN),
                Extent(0, START, 4 * ALIGN),
                Extent(1, 0, 5 * ALIGN),
            ),
        )
        self.assertEqual(extended.without(20 * ALIGN, 20 * ALIGN, {1}).extents, ring.extents)
        self.assertEqual((extended.payload_cap, extended.own_bytes), (ring.payload_cap, ring.size))

    def test_between_two_extents_where_there_is_room(self) -> None:
        ring = Ring(START, 10 * ALIGN, ALIGN)
        self.assertEqual(ring.boundaries(4 * ALIGN, 14 * ALIGN), [10 * ALIGN])
        self.assertEqual(ring.boundaries(12 * ALIGN, 14 * ALIGN), [])
        extended = ring.inserted(4 * ALIGN, 10 * ALIGN, Extent(1, 0, 5 * ALIGN))
        self.assertEqual(len(extended.extents), 2, "nothing is divided")
