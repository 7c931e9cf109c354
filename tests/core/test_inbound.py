"""What the secondary refuses, and that it then has taken nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import BREAK, NUMBERS_END, REFRESH_BEGIN, SWITCH, VOID, Entry
from qdsmirror.core.inbound import Intake
from qdsmirror.core.records import BEGINNING, Cursor, Generation
from qdsmirror.errors import DivergedError, ProtocolError, QdsError
from tests.storage.logworld import GENERATION, OTHER_GENERATION, FrameMaker, write

SIZES = (8192, 4096)


class IntakeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.maker = FrameMaker()
        self.intake = Intake(Cursor(), SIZES, [Generation(GENERATION, 1)])

    def state(self) -> tuple[Any, ...]:
        return (self.intake.gsn, self.intake.points, self.intake.generations)

    def refuse(self, raw: bytes, error: type[QdsError], text: str) -> None:
        before = self.state()
        with self.assertRaisesRegex(error, text):
            self.intake.check(raw)
        self.assertEqual(self.state(), before, "it took something")

    def test_takes_what_comes_next(self) -> None:
        for ldsu, count in ((0, 2), (1, 1), (0, 1)):
            entries = [write(512 * n, b"x" * 512) for n in range(count)]
            header, found = self.intake.check(self.maker.make(ldsu, entries))
            self.assertEqual(found, entries)
            self.assertEqual(self.intake.gsn, header.gsn_last + 1)
        self.assertEqual(self.intake.points, self.maker.points)
        self.assertEqual(self.intake.point(0).sequence, 3)
        _, found = self.intake.check(self.maker.make(1, kind=VOID, gsns=9))
        self.assertEqual((self.intake.gsn, found), (14, ()))
        self.intake.check(self.maker.make(0, kind=REFRESH_BEGIN, control=bytes(16)))

    def test_goes_on_where_the_cursor_stands(self) -> None:
        self.maker.make(0, [write(0, b"1")])
        cursor = Cursor(4096, 2, dict(self.maker.points))
        intake = Intake(cursor, SIZES, [Generation(GENERATION, 1)])
        self.assertEqual(intake.point(1), BEGINNING)
        intake.check(self.maker.make(0, [write(0, b"2")]))
        self.assertEqual(cursor.points[0].sequence, 2, "the cursor was changed")

    def test_every_flipped_bit(self) -> None:
        raw = self.maker.make(0, [write(0, b"abc"), Entry(0, 512, frames.TRIM, None)])
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            self.refuse(bytes(flipped), ProtocolError, "damaged frame")
        self.intake.check(raw)

    @settings(max_examples=100)
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, raw: bytes) -> None:
        with self.assertRaises(ProtocolError):
            Intake(Cursor(), SIZES, []).check(raw)

    def test_truncated_or_with_more_behind(self) -> None:
        raw = self.maker.make(0, [write(0, b"abc")])
        self.refuse(raw[:-1], ProtocolError, "damaged")
        self.refuse(raw + b"\0", ProtocolError, "damaged")
        self.refuse(raw[:50], ProtocolError, "damaged")
        self.refuse(b"", ProtocolError, "damaged")

    def test_a_repeated_or_skipped_frame(self) -> None:
        first = self.maker.make(0, [write(0, b"1")])
        second = self.maker.make(0, [write(0, b"2")])
        third = self.maker.make(1, [write(0, b"3")])
        self.refuse(second, ProtocolError, "GSN 2 where 1 comes next")
        self.intake.check(first)
        self.refuse(first, ProtocolError, "GSN 1 where 2 comes next")
        self.refuse(third, ProtocolError, "GSN 3 where 2 comes next")
        self.intake.check(second)
        self.intake.check(third)

    def test_another_history(self) -> None:
        self.intake.check(self.maker.make(0, [write(0, b"1")]))
        good = dict(self.maker.points)
        gsn = self.maker.gsn
        for changes, text in (
            ({"generation": OTHER_GENERATION}, "another generation"),
            ({"sequence": 3}, "does not continue"),
            ({"sequence": 1}, "does not continue"),
            ({"previous_chain": bytes(16)}, "does not continue"),
        ):
            self.maker.points, self.maker.gsn = dict(good), gsn
            self.refuse(self.maker.make(0, [write(0, b"2")], **changes), DivergedError, text)

    def test_a_switch_leads_to_another_generation(self) -> None:
        self.intake.check(self.maker.make(0, [write(0, b"1")]))
        self.maker.generation = OTHER_GENERATION
        good, gsn = dict(self.maker.points), self.maker.gsn

        def again(kind: int = SWITCH, control: bytes = GENERATION) -> bytes:
            self.maker.points, self.maker.gsn = dict(good), gsn
            return self.maker.make(0, kind=kind, control=control)

        self.refuse(again(control=OTHER_GENERATION), DivergedError, "another generation")
        self.refuse(again(control=bytes(16)), DivergedError, "another generation")
        self.refuse(again(BREAK), DivergedError, "another generation")
        self.intake.check(again())
        new = Generation(OTHER_GENERATION, 2)
        self.assertEqual(self.intake.generations, (Generation(GENERATION, 1), new))
        self.intake.check(self.maker.make(1, [write(0, b"2")]))
        # Neither back to the one before, nor to itself.
        self.refuse(
            self.maker.make(0, kind=SWITCH, control=GENERATION), DivergedError, "generation"
        )
        self.maker.gsn -= 1
        self.maker.generation = GENERATION
        self.refuse(
            self.maker.make(0, kind=SWITCH, control=OTHER_GENERATION), DivergedError, "generation"
        )

    def test_a_generation_that_was_listed_before_its_first_frame_came(self) -> None:
        known = [Generation(GENERATION, 1), Generation(OTHER_GENERATION, 3)]
        self.intake = Intake(Cursor(), SIZES, known)
        self.intake.check(self.maker.make(0, [write(0, b"1")]))
        self.intake.check(self.maker.make(0, [write(0, b"2")]))
        good, gsn = dict(self.maker.points), self.maker.gsn
        for generation, kind, control in (
            (GENERATION, BREAK, bytes(16)),
            (OTHER_GENERATION, BREAK, bytes(16)),
            (OTHER_GENERATION, SWITCH, bytes(16)),
        ):
            self.maker.points, self.maker.gsn = dict(good), gsn
            self.maker.generation = generation
            self.refuse(self.maker.make(0, kind=kind, control=control), DivergedError, "generation")
        self.maker.points, self.maker.gsn = dict(good), gsn
        self.intake.check(self.maker.make(0, kind=SWITCH, control=GENERATION))
        self.assertEqual(self.intake.generations, tuple(known))

    def test_a_blank_secondary_takes_the_first_generation_only(self) -> None:
        self.intake = Intake(Cursor(), SIZES, [])
        self.refuse(self.maker.make(0, [write(8192, b"x")]), ProtocolError, "beyond LDSU 0")
        maker = FrameMaker()
        self.intake.check(maker.make(0, [write(0, b"1")]))
        self.assertEqual(self.intake.generations, (Generation(GENERATION, 1),))
        maker.generation = OTHER_GENERATION
        self.refuse(maker.make(0, [write(0, b"2")]), DivergedError, "another generation")

    def test_beyond_its_device(self) -> None:
        for ldsu, entry in (
            (1, write(4095, b"xy")),
            (1, write(8000, b"x")),
            (0, write(1 << 62, b"x")),
            (0, Entry(8192, 1, frames.TRIM, None)),
            (0, Entry((1 << 62) - 1, 1, frames.ZEROES, None)),
        ):
            self.refuse(
                FrameMaker().make(ldsu, [write(0, b"ok"), entry]), ProtocolError, "is beyond LDSU"
            )
        self.intake.check(FrameMaker().make(1, [write(4095, b"x")]))

    def test_an_ldsu_that_does_not_exist(self) -> None:
        for ldsu in (2, (1 << 32) - 1):
            self.refuse(FrameMaker().make(ldsu, [write(0, b"x")]), ProtocolError, "not mapped")

    def test_numbers_that_overflow(self) -> None:
        raw = FrameMaker().make(0, kind=VOID, gsns=NUMBERS_END)
        self.refuse(raw, ProtocolError, "out of range")

    def test_a_mark_with_a_long_payload(self) -> None:
        raw = FrameMaker().make(0, kind=REFRESH_BEGIN, control=bytes(1000))
        self.refuse(raw, ProtocolError, "no such body")
