"""Entries on a device against a plain copy."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import Entry
from qdsmirror.storage.apply import apply_entries
from tests.fakes import MemoryDevice
from tests.storage.logworld import write

SIZE = 8192
BYTE = st.integers(1, 255)
KINDS = [frames.ZEROES, frames.TRIM, frames.REFRESH_ZEROES, frames.ZERO_WRITE]
ENTRY = st.tuples(st.integers(0, 15), st.integers(1, 4), BYTE, st.sampled_from([0, 0, *KINDS])).map(
    lambda t: (
        Entry(512 * t[0], min(512 * t[1], SIZE - 512 * t[0]), t[3], None)
        if t[3]
        else write(512 * t[0], bytes([t[2]]) * min(512 * t[1], SIZE - 512 * t[0]))
    )
)


class ApplyTests(SynchronousTestCase):
    @settings(max_examples=200)
    @given(st.lists(ENTRY, max_size=10))
    def test_in_order(self, entries: list[Entry]) -> None:
        device = MemoryDevice(SIZE, content=b"\xff" * SIZE)
        copy = bytearray(b"\xff" * SIZE)
        for offset, length, _, payload in entries:
            copy[offset : offset + length] = bytes(length) if payload is None else payload
        apply_entries(device, iter(entries))
        self.assertEqual(device.content(), copy)
        apply_entries(device, entries)
        self.assertEqual(device.content(), copy, "twice changes something")

    def test_neighbours_in_one_write(self) -> None:
        device = MemoryDevice(SIZE)
        apply_entries(
            device,
            [
                write(0, b"a" * 512),
                write(512, b"b" * 512),
                write(2048, b"c" * 512),
                Entry(2560, 512, frames.TRIM, None),
                write(2560, b"d" * 512),
            ],
        )
        self.assertEqual([w.offset for w in device.unsynced], [0, 2048, 2560, 2560])
        self.assertEqual(len(device.unsynced[0].data), 1024)

    def test_only_a_trim_may_unmap(self) -> None:
        device = MemoryDevice(SIZE)
        seen: list[bool] = []
        device.zero = lambda offset, length, unmap: seen.append(unmap)  # type: ignore[method-assign]
        apply_entries(device, [Entry(0, 512, kind, None) for kind in KINDS])
        self.assertEqual(seen, [False, True, False])

    def test_a_write_of_zeroes_is_a_write(self) -> None:
        device = MemoryDevice(SIZE, content=b"x" * SIZE)
        zeroes = Entry(512, 512, frames.ZERO_WRITE, None)
        apply_entries(device, [write(0, b"a" * 512), zeroes, write(1024, b"b" * 512)])
        self.assertEqual([(w.offset, len(w.data)) for w in device.unsynced], [(0, 1536)])
        content = b"a" * 512 + bytes(512) + b"b" * 512
        self.assertEqual(device.content()[:1536], content)

    def test_an_error_leaves_what_came_before(self) -> None:
        device = MemoryDevice(SIZE)
        with self.assertRaises(OSError):
            apply_entries(device, [write(0, b"a" * 512), write(SIZE, b"b"), write(512, b"c")])
        self.assertEqual(device.content(), b"a" * 512 + bytes(SIZE - 512))
