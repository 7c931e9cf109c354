"""The ring against a model that remembers every byte."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import ENTRY_BYTES, HEADER_BYTES
from qdsmirror.core.records import RECORD_HEADER_BYTES
from qdsmirror.core.ring import Place, Placement, Ring, align_up
from qdsmirror.core.superblock import layout
from qdsmirror.errors import DeviceError
from qdsmirror.limits import (
    CONTROL_RECORDS_MIN,
    CONTROL_RESERVE_BYTES,
    FRAME_PAYLOAD_BYTES_MAX,
    GIB,
    KIB,
    MIB,
    WRITELOG_BYTES_MIN,
)

ALIGN = 4096


class RingTests(SynchronousTestCase):
    @settings(max_examples=200)
    @given(
        st.integers(4, 20),
        st.sampled_from([0, ALIGN, 3 * ALIGN]),
        st.lists(
            st.one_of(
                st.integers(1, 6 * ALIGN).map(lambda n: ("place", n)),
                st.integers(0, 8).map(lambda n: ("free", n)),
            ),
            max_size=60,
        ),
    )
    def test_never_overwrites_what_is_not_free(
        self, blocks: int, reserve: int, steps: list[tuple[str, int]]
    ) -> None:
        ring = Ring(ALIGN, blocks * ALIGN, ALIGN)
        owner: dict[int, int] = {}  # block of the device -> position
        live: list[tuple[int, int]] = []
        head = tail = 0
        for step, number in steps:
            if step == "free":
                for start, end in live[:number]:
                    for position in range(start, end, ALIGN):
                        del owner[ring.physical(position).offset]
                    tail = end
                del live[:number]
                continue
            placement = ring.place(head, tail, number, reserve)
            need = align_up(number, ALIGN)
            rest = ring.contiguous(head)
            pad = 0 if need <= rest else rest
            pads = ((head, pad),) if pad else ()
            if placement is None:
                self.assertGreater(head + pad + need + reserve, tail + ring.size)
                continue
            self.assertEqual(placement, Placement(pads, head + pad, need))
            self.assertLessEqual(placement.end + reserve - tail, ring.size)
            first = ring.physical(placement.position).offset
            self.assertLessEqual(first + need, ring.start + ring.size, "wraps")
            if pad:
                self.assertEqual(ring.physical(placement.position), Place(0, ring.start))
            for position in range(head, placement.end, ALIGN):
                block = ring.physical(position).offset
                self.assertTrue(ring.start <= block < ring.start + ring.size)
                self.assertNotIn(block, owner, "overwrites a record that is needed")
                owner[block] = position
            live.append((head, placement.end))
            head = placement.end

    def test_the_reserve_lets_control_records_in(self) -> None:
        ring = Ring(0, 16 * ALIGN, ALIGN)
        head = 0
        while (place := ring.place(head, 0, ALIGN, 4 * ALIGN)) is not None:
            head = place.end
        self.assertEqual(head, 12 * ALIGN)
        for _ in range(4):
            place = ring.place(head, 0, 200)
            assert place is not None
            head = place.end
        self.assertIsNone(ring.place(head, 0, 200))

    def test_the_largest_frame_fits_an_empty_log_wherever_it_stands(self) -> None:
        for device in (WRITELOG_BYTES_MIN, 200 * KIB, MIB, 5 * MIB, 17 * MIB, GIB):
            for physical in (512, 4096, 16 * KIB, 64 * KIB):
                try:
                    _, ring, _ = layout(device, 1, physical)
                except DeviceError:
                    self.assertLess(device, 18 * physical + 2 * MIB)
                    continue
                frame = (
                    RECORD_HEADER_BYTES
                    + HEADER_BYTES
                    + ring.entries_cap * ENTRY_BYTES
                    + ring.payload_cap
                )
                reserve = max(CONTROL_RESERVE_BYTES, CONTROL_RECORDS_MIN * ring.align)
                step = max(ring.align, ring.size // 64 // ring.align * ring.align)
                for head in range(0, ring.size, step):
                    self.assertIsNotNone(
                        ring.place(head, head, frame, reserve), (device, physical, head)
                    )

    def test_caps(self) -> None:
        self.assertEqual(Ring(0, GIB).payload_cap, FRAME_PAYLOAD_BYTES_MAX)
        self.assertEqual(Ring(0, GIB).entries_cap, 4096)
        self.assertEqual(Ring(0, 64 * KIB).payload_cap, 8 * KIB)
        self.assertEqual(Ring(0, 64 * KIB).entries_cap, 16)
