"""Order for what came over several paths, and letters that survive the loss of one."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import letters as letters_module
from qdsmirror.core import stream
from qdsmirror.core.letters import Letters
from qdsmirror.core.reorder import Reorder
from qdsmirror.core.stream import ASK, HEADER_BYTES, MessageParser
from qdsmirror.errors import LimitError, ProtocolError


class ReorderTests(SynchronousTestCase):
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 2**32))
    def test_each_once_in_order_however_they_come(self, counts: list[int], seed: int) -> None:
        chance = random.Random(seed)
        frames = []
        first = start = chance.randrange(1, 100)
        for count in counts:
            frames.append((first, count))
            first += count
        arriving = [frame for frame in frames for _ in range(chance.choice((1, 1, 2, 3)))]
        chance.shuffle(arriving)
        reorder: Reorder[int] = Reorder(start)
        taken: list[int] = []
        for number, count in arriving:
            new = number not in taken and number not in reorder._waiting
            self.assertEqual(reorder.put(number, count, number), new)
            while (one := reorder.take()) is not None:
                taken.append(one)
        self.assertEqual(taken, [number for number, _ in frames])
        self.assertEqual(len(reorder), 0)

    def test_says_what_it_drops(self) -> None:
        reorder: Reorder[str] = Reorder(10)
        self.assertTrue(reorder.put(12, 3, "later"))
        self.assertFalse(reorder.put(12, 3, "again"))
        self.assertIsNone(reorder.take())
        self.assertTrue(reorder.put(10, 2, "first"))
        self.assertEqual([reorder.take(), reorder.take(), reorder.take()], ["first", "later", None])
        self.assertFalse(reorder.put(12, 3, "once more"))
        self.assertFalse(reorder.put(1, 3, "long ago"))

    def test_half_known(self) -> None:
        reorder: Reorder[str] = Reorder(10)
        self.assertRaises(ProtocolError, reorder.put, 8, 3, "x")


def ask(text: bytes) -> bytes:
    return stream.pack_relayed(ASK, text)


def payload(packed: bytes) -> bytes:
    (message,) = MessageParser().feed(packed)
    return bytes(message.payload)


class LettersTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.near, self.far = Letters(), Letters()
        self.got: list[bytes] = []

    def deliver(self, letter: bytes, told: bool = True) -> None:
        found, answer = self.far.read(payload(letter))
        self.got += [bytes(message.payload) for message in found]
        if told:
            self.near.received(payload(answer))

    def test_in_order_and_once(self) -> None:
        one, two, three = (self.near.write(ask(text)) for text in (b"1", b"2", b"3"))
        self.deliver(three, told=False)
        self.deliver(one, told=False)
        self.assertEqual((self.got, self.far.read_all), ([b"1"], 1))
        self.assertEqual(self.near.unreceived, [one, two, three])
        self.deliver(two)
        self.assertEqual(self.got, [b"1", b"2", b"3"])
        self.assertEqual(self.near.unreceived, [])
        for letter in (one, two, three):
            self.deliver(letter)
        self.assertEqual(self.got, [b"1", b"2", b"3"])
        self.assertEqual((self.near.written, self.far.read_all), (3, 3))

    def test_what_the_peer_has_is_not_kept(self) -> None:
        one, two = self.near.write(ask(b"1")), self.near.write(ask(b"2"))
        self.deliver(one)
        self.assertEqual(self.near.unreceived, [two])

    def test_bounded_both_ways(self) -> None:
        self.patch(letters_module, "LETTERS_MAX", 3)
        for _ in range(3):
            self.near.write(ask(b"x"))
        self.assertRaises(LimitError, self.near.write, ask(b"x"))
        self.assertRaises(LimitError, self.far.read, payload(stream.pack_letter(4, ask(b"x"))))
        self.far.read(payload(stream.pack_letter(3, ask(b"x"))))

    def test_received_what_was_never_written(self) -> None:
        self.near.write(ask(b"x"))
        self.assertRaises(ProtocolError, self.near.received, payload(stream.pack_received(2)))
        self.assertRaises(ProtocolError, self.near.received, b"short")

    def test_only_small_messages_are_letters(self) -> None:
        for inner in (
            stream.pack_ack(1, 1), stream.pack_frames([b"x"], True), stream.pack_letter(1, b""),
            b"", ask(b"x")[:-1], ask(b"x") + b"y", bytes(HEADER_BYTES),
        ):  # fmt: skip
            letter = stream.pack_letter(1, inner)[HEADER_BYTES:]
            self.assertRaises(ProtocolError, self.far.read, letter)
