"""Compression on the wire: what is wrapped comes out again, and no message makes us allocate."""

from __future__ import annotations

import random
from struct import Struct

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from lz4.block import compress as lz4_compress
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import compression as compression_module
from qdsmirror.core import stream
from qdsmirror.core.compression import Method, Packer, declared_bytes, known, unpack
from qdsmirror.core.frames import ENTRIES, WRITE, Entry, build_header, entry_table
from qdsmirror.core.stream import ACK_REQUESTED, COMPRESSED, HEADER_BYTES, MessageParser
from qdsmirror.errors import LimitError, ProtocolError
from qdsmirror.limits import (
    COMPRESSION_BACKOFF_BYTES_MAX,
    FRAME_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    KIB,
    MIB,
)

METHODS = [Method("lz4"), Method("zstd", 1), Method("zstd", 3), Method("zstd", 19)]
QUICK = [Method("lz4"), Method("zstd", 3)]
WRAP = Struct(">B3xI")


def frame(payload: bytes, gsn: int = 1) -> bytes:
    table = entry_table([Entry(0, len(payload), WRITE, None)])
    header, _ = build_header(
        kind=ENTRIES, ldsu=0, generation=bytes(16), sequence=gsn, gsn_first=gsn, gsn_count=1,
        durable_gsn=0, time_ns=0, previous_chain=bytes(16), entry_count=1, body=[table, payload],
    )  # fmt: skip
    return header + table + payload


def received(wire: bytes, name: str) -> tuple[list[bytes], list[int]]:
    """Give the frames that messages bring, and the messages' flags."""
    frames: list[bytes] = []
    flags: list[int] = []
    for message in MessageParser().feed(wire):
        assert message.type == stream.FRAME
        flags.append(message.flags)
        if message.flags & COMPRESSED:
            frames += map(bytes, unpack(message.payload, name))
        else:
            frames.append(bytes(message.payload))
    return frames, flags


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def text(length: int) -> bytes:
    return (b"so many rows of the same text, " * (length // 31 + 1))[:length]


class MethodTests(SynchronousTestCase):
    def test_tunable_is_read_and_shown(self) -> None:
        for said, method in (
            ("none", Method("none")), ("lz4", Method("lz4")), ("zstd", Method("zstd", 3)),
            ("zstd:7", Method("zstd", 7)),
        ):  # fmt: skip
            self.assertEqual(Method.of(said), method)
        self.assertEqual(list(map(str, METHODS)), ["lz4", "zstd:1", "zstd:3", "zstd:19"])

    def test_what_is_missing_here_is_not_known(self) -> None:
        self.patch(compression_module, "lz4", None)
        self.assertEqual((known("lz4"), known("zstd")), ("none", "zstd"))

    def test_what_is_unknown_here_is_not_agreed_on(self) -> None:
        self.assertEqual([known(one) for one in ("lz4", "zstd", "none", "brotli", "")],
                         ["lz4", "zstd", "none", "none", "none"])  # fmt: skip


class PackingTests(SynchronousTestCase):
    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(METHODS),
        st.lists(
            st.one_of(
                st.binary(min_size=1, max_size=5000),
                st.integers(1, 200_000).map(text),
                st.integers(1, 200_000).map(noise),
            ),
            min_size=1,
            max_size=8,
        ),
    )
    def test_frames_come_out_as_they_went_in(self, method: Method, payloads: list[bytes]) -> None:
        frames = [frame(payload, gsn) for gsn, payload in enumerate(payloads, 1)]
        packer = Packer(method)
        for _ in range(2):
            wire = packer.pack(frames)
            found, flags = received(wire, method.name)
            self.assertEqual(found, frames)
            self.assertTrue(flags[-1] & ACK_REQUESTED)
            self.assertFalse(any(one & ACK_REQUESTED for one in flags[:-1]))
            self.assertLessEqual(len(wire), sum(map(len, frames)) + HEADER_BYTES * len(frames))

    def test_without_compression_frames_are_as_they_are(self) -> None:
        frames = [frame(text(4096), 1), frame(text(4096), 2)]
        wire = Packer(Method("none")).pack(frames)
        self.assertEqual(received(wire, "none"), (frames, [0, ACK_REQUESTED]))

    def test_what_shrinks_is_small_on_the_wire(self) -> None:
        for method in METHODS:
            for payload, most in ((text(256 * KIB), 0.02), (bytes(256 * KIB), 0.01)):
                wire = Packer(method).pack([frame(payload)])
                self.assertLess(len(wire), most * len(payload), method)

    def test_small_frames_of_a_buffer_are_compressed_together(self) -> None:
        frames = [frame(noise(4096, 7), gsn) for gsn in range(1, 33)]
        for method in QUICK:
            wire = Packer(method).pack(frames)
            # Each of them alone does not shrink at all.
            self.assertLess(len(wire), 0.2 * sum(map(len, frames)))
            self.assertEqual(received(wire, method.name)[0], frames)

    def test_no_message_declares_more_than_a_frame_may_have(self) -> None:
        frames = [frame(text(FRAME_PAYLOAD_BYTES_MAX // 2), gsn) for gsn in range(1, 8)]
        for method in QUICK:
            wire = Packer(method).pack(frames)
            found = [m.payload for m in MessageParser().feed(wire)]
            self.assertEqual(len(found), 4)
            self.assertLessEqual(max(map(declared_bytes, found)), FRAME_BYTES_MAX)
            self.assertEqual(received(wire, method.name)[0], frames)


class IncompressibleTests(SynchronousTestCase):
    def test_passes_as_it_is(self) -> None:
        frames = [frame(noise(MIB))]
        for method in METHODS:
            self.assertEqual(Packer(method).pack(frames), stream.pack_frames(frames, True))

    def test_costs_a_sample_and_in_the_long_run_less(self) -> None:
        looked_at = [0]
        packer = Packer(Method("lz4"))
        real = packer._compress
        assert real is not None

        def counting(block: bytes) -> bytes:
            looked_at[0] += len(block)
            return real(block)

        packer._compress = counting
        packer.pack([frame(noise(MIB))])
        self.assertLess(looked_at[0], 17 * KIB)
        looked_at[0] = 0
        total = 64
        for _ in range(total):
            packer.pack([frame(noise(MIB))])
        self.assertLess(looked_at[0], total * MIB // 200)
        # Small frames likewise, which a sample could not judge.
        looked_at[0] = 0
        for _ in range(1000):
            packer.pack([frame(noise(4096))])
        self.assertLess(looked_at[0], 1000 * 4096 // 64)

    def test_is_looked_at_again_before_long(self) -> None:
        packer = Packer(Method("zstd", 3))
        for _ in range(100):
            packer.pack([frame(noise(MIB))])
        plain = 0
        while len(packer.pack([frame(text(MIB))])) > MIB // 2:
            plain += MIB
        self.assertLessEqual(plain, COMPRESSION_BACKOFF_BYTES_MAX)
        self.assertLess(len(packer.pack([frame(text(MIB))])), MIB // 10)


class HostileTests(SynchronousTestCase):
    """What a message declares is bounded first, and is all that it may give."""

    def packed(self, name: str, content: bytes) -> bytes:
        if name == "lz4":
            return bytes(lz4_compress(content, store_size=False))
        return zstandard.ZstdCompressor(write_content_size=False).compress(content)

    def refused(self, payload: bytes, name: str, words: str) -> None:
        error = self.assertRaises((ProtocolError, LimitError), unpack, payload, name)
        self.assertIn(words, error.message)

    def test_declared_too_long(self) -> None:
        for name, number in (("lz4", 1), ("zstd", 2)):
            for length in (FRAME_BYTES_MAX + 1, 2**32 - 1):
                self.assertRaises(LimitError, declared_bytes, WRAP.pack(number, length) + b"x")
                self.assertRaises(LimitError, unpack, WRAP.pack(number, length) + b"x", name)

    def test_bombs(self) -> None:
        """A message of a few hundred KiB that would become a gigabyte."""
        bomb = bytes(64 * MIB)
        for name, number in (("lz4", 1), ("zstd", 2)):
            packed = self.packed(name, bomb)
            self.refused(WRAP.pack(number, MIB) + packed, name, "compressed message")
        inside = zstandard.ZstdCompressor(write_content_size=True).compress(bomb)
        self.refused(WRAP.pack(2, MIB) + inside, "zstd", "67108864 inside")

    def test_zstd_that_lies_about_its_content(self) -> None:
        """The data declares a terabyte inside: it is not allocated."""
        # Magic, descriptor of an eight-byte length without a window, the length, an empty block.
        lie = bytes.fromhex("28b52ffd e0") + (1 << 40).to_bytes(8, "little") + b"\x01\0\0"
        self.refused(WRAP.pack(2, MIB) + lie, "zstd", "inside")

    def test_zstd_with_an_immense_window(self) -> None:
        # Descriptor without a length; a window of 2 GiB.
        lie = bytes.fromhex("28b52ffd 00 a8 010000")
        self.refused(WRAP.pack(2, MIB) + lie, "zstd", "compressed message")

    def test_holds_less_than_it_declares(self) -> None:
        one = frame(text(4096))
        for name, number in (("lz4", 1), ("zstd", 2)):
            self.refused(WRAP.pack(number, len(one) + 1) + self.packed(name, one), name, "message")

    def test_something_behind_it(self) -> None:
        one = frame(text(4096))
        wire = WRAP.pack(2, len(one)) + self.packed("zstd", one) + b"x"
        self.refused(wire, "zstd", "damaged")

    def test_another_algorithm_than_known(self) -> None:
        one = frame(text(4096))
        wire = WRAP.pack(1, len(one)) + self.packed("lz4", one)
        for name in ("zstd", "none"):
            self.refused(wire, name, "agreed was")
        self.refused(WRAP.pack(9, len(one)) + b"x", "zstd", "algorithm 9")

    def test_no_frames_inside(self) -> None:
        for name, number in (("lz4", 1), ("zstd", 2)):
            for content in (text(4096), frame(text(4096))[:-1], frame(text(4096)) + b"x"):
                wire = WRAP.pack(number, len(content)) + self.packed(name, content)
                self.refused(wire, name, "frame")

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(["lz4", "zstd"]), st.binary(max_size=200), st.integers(0, 2**32 - 1))
    def test_any_bytes(self, name: str, data: bytes, length: int) -> None:
        number = compression_module.ALGORITHMS[name]
        for payload in (data, WRAP.pack(number, length) + data):
            self.assertRaises((ProtocolError, LimitError), unpack, payload, name)

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(QUICK), st.data())
    def test_any_damage(self, method: Method, data: st.DataObject) -> None:
        (message,) = MessageParser().feed(Packer(method).pack([frame(text(3000))]))
        broken = bytearray(message.payload)
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            found = unpack(broken, method.name)
        except (ProtocolError, LimitError):
            return
        self.assertLessEqual(sum(map(len, found)), FRAME_BYTES_MAX)
