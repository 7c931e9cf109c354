"""The secondary journal and the mirror devices: replay, its interruptions, the coherent mark."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

from blake3 import blake3
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import (
    REFRESH,
    REFRESH_BEGIN,
    REFRESH_END,
    VERIFY,
    VOID,
    Entry,
    parse_header,
)
from qdsmirror.core.records import RECORD_HEADER_BYTES, Cursor, Generation
from qdsmirror.core.verify import Row, Verdict, pack_rows
from qdsmirror.errors import CorruptError, DeviceFailedError, MismatchError, QdsError
from qdsmirror.storage.journal import Mirror, change_of
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import MemoryDevice, at_random, everything, nothing
from tests.storage.logworld import (
    KIB,
    FrameMaker,
    MirrorSite,
    append,
    config,
    initialise,
    write,
)

SIZE = 256 * KIB
MIRROR = 16 * KIB
ONE, TWO = b"1" * 16, b"2" * 16


class Cut(Exception):
    """The power is cut."""


class Power:
    """Counts what devices are told to do, and cuts the power at one of these."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left
        self.calls: list[tuple[str, str]] = []

    def watch(self, device: MemoryDevice) -> None:
        for name in ("pwritev", "zero", "fdatasync"):
            setattr(device, name, self._counted(device, name, getattr(device, name)))

    def _counted(self, device: MemoryDevice, name: str, method: Callable[..., Any]) -> Any:
        def counted(*args: Any) -> Any:
            if self.left is not None:
                if not self.left:
                    raise Cut
                self.left -= 1
            self.calls.append((device.path, name))
            return method(*args)

        return counted


class Site(MirrorSite):
    """Its mirrors are empty."""

    def __init__(self) -> None:
        devices = {
            path: MemoryDevice(size, path=path)
            for path, size in (("/journal", SIZE), ("/mirror0", MIRROR), ("/mirror1", MIRROR))
        }
        super().__init__(config(2), devices)
        self.journal = initialise(devices["/journal"], role="journal", sizes=[MIRROR] * 2)


def entry(number: int, ldsu: int) -> Entry:
    return write(512 * (number % 7), bytes([16 * ldsu + number + 1]) * 1024)


def filled(*, refresh: bool = True) -> tuple[Site, list[list[bytes]]]:
    """A journal with writes, zeroes, a void and a whole refresh; and what each prefix makes."""
    site = Site()
    copies = [bytearray(MIRROR), bytearray(MIRROR)]
    prefixes = [[bytes(c) for c in copies]]

    def add(ldsu: int, *entries: Entry, **control: Any) -> None:
        append(site.journal, site.maker.make(ldsu, entries, **control))
        for offset, length, _, payload in entries:
            copies[ldsu][offset : offset + length] = (
                bytes(length) if payload is None else bytes(payload)
            )
        prefixes.append([bytes(c) for c in copies])

    for number in range(4):
        add(number % 2, entry(number, number % 2))
    add(1, kind=VOID, gsns=3)
    if refresh:
        add(0, kind=REFRESH_BEGIN, control=ONE)
        add(0, Entry(4096, 512, REFRESH, b"r" * 512), Entry(0, 512, frames.REFRESH_ZEROES, None))
        add(1, entry(5, 1), Entry(512, 512, frames.TRIM, None))
        add(0, kind=REFRESH_END, control=ONE)
    add(0, entry(6, 0))
    site.devices["/journal"].fdatasync()
    return site, prefixes


class OpenTests(SynchronousTestCase):
    def refuse(self, site: Site, error: type[QdsError], text: str) -> None:
        with self.assertRaisesRegex(error, text):
            site.open()
        for path, device in site.devices.items():
            self.assertEqual(device.unsynced, [], f"{path} was written")
        self.assertTrue(site.devices["/journal"].closed)

    def test_opens_and_closes(self) -> None:
        site = Site()
        site.open().close()
        self.assertTrue(all(device.closed for device in site.devices.values()))

    def test_another_group_or_use(self) -> None:
        site = Site()
        site.config = config(2, number=4)
        self.refuse(site, MismatchError, "is the journal of dsgrp000, not the journal of dsgrp004")
        site = Site()
        initialise(site.devices["/journal"], role="writelog", sizes=[MIRROR] * 2)
        self.refuse(site, MismatchError, "is the writelog of dsgrp000, not the journal")

    def test_other_ldsus(self) -> None:
        for other in (config(1), config(3), config(2, names={1: "x"})):
            site = Site()
            site.config = other
            self.refuse(site, MismatchError, "was initialised for other LDSUs")

    def test_a_mirror_of_another_size(self) -> None:
        site = Site()
        site.devices["/mirror1"] = MemoryDevice(MIRROR + 512)
        self.refuse(site, MismatchError, "/mirror1 has 16896 bytes; it was initialised with 16384")
        self.assertTrue(site.devices["/mirror0"].closed)


class ReplayTests(SynchronousTestCase):
    def test_replays_in_order_and_frees_the_journal(self) -> None:
        site, prefixes = filled()
        mirror = site.open()
        self.assertEqual(mirror.replay(), 10)
        self.assertEqual(site.contents(), prefixes[-1])
        superblock = site.superblock
        self.assertTrue(superblock.coherent)
        self.assertIsNone(superblock.refresh)
        for cursor in (superblock.tail, superblock.applied, superblock.head, mirror.applied):
            self.assertEqual(cursor.position, mirror.journal.head)
            self.assertEqual(cursor.gsn, site.maker.gsn)
            self.assertEqual(cursor.points, site.maker.points)
        self.assertEqual(superblock.durable_gsn, site.maker.gsn - 1)
        self.assertEqual(mirror.journal.used_bytes, 0)
        # In both slots.
        for slot in (0, 8 * KIB):
            copy = site.copy()
            copy.devices["/journal"].corrupt(slot, bytes(8 * KIB))
            self.assertEqual(copy.superblock.tail, superblock.tail)

    def test_a_generation_whose_switch_is_lost(self) -> None:
        """GENERATION: the primary may go back behind it, and begin another one there."""
        for lost in (0, 1):
            site, _ = filled()
            known = site.superblock.generations
            more = Generation(b"another one here", site.maker.gsn - 1 + lost)
            site.journal.update(both=True, generations=(*known, more))
            site.open().replay()
            self.assertEqual(site.superblock.generations, known if lost else (*known, more))

    def test_again_changes_nothing(self) -> None:
        site, prefixes = filled()
        site.open().replay()
        self.assertEqual(site.open().replay(), 0)
        self.assertEqual(site.contents(), prefixes[-1])
        self.assertTrue(site.superblock.coherent)

    def test_interrupted_at_every_operation(self) -> None:
        original, prefixes = filled()
        power = Power()
        whole = original.copy()
        for device in whole.devices.values():
            power.watch(device)
        whole.open().replay()
        self.assertGreater(len(power.calls), 15)
        random = Random(4)
        for choose in (nothing, everything, at_random(random), at_random(random)):
            for stop in range(len(power.calls)):
                site = original.copy()
                cut = Power(stop)
                for device in site.devices.values():
                    cut.watch(device)
                with self.assertRaises(Cut):
                    site.open().replay()
                site.crash(choose)
                self.check_mark(site, prefixes)
                site.open().replay()
                self.assertEqual(site.contents(), prefixes[-1], stop)
                self.assertTrue(site.superblock.coherent)

    def check_mark(self, site: Site, prefixes: list[list[bytes]]) -> None:
        """Coherent only with all of the refresh on the mirror devices, for certain."""
        superblock = site.superblock
        refreshed = [c[4096:4608] for c in site.contents()][0] == b"r" * 512
        if superblock.coherent:
            self.assertTrue(refreshed)
            self.assertIsNone(superblock.refresh)
        if refreshed and not superblock.coherent:
            self.assertEqual(superblock.refresh, {"id": ONE.hex()})

    def test_the_order_of_the_marks(self) -> None:
        site, _ = filled()
        power = Power()
        for device in site.devices.values():
            power.watch(device)
        mirror = site.open()
        seen: list[tuple[str, bool, bool]] = []
        inner = mirror.devices[0].pwritev

        def watched(buffers: Any, offset: int) -> None:
            durable = MemoryDevice(SIZE, content=site.devices["/journal"].durable())
            found = read_superblock(durable)
            seen.append(("write", found.coherent, found.refresh == {"id": ONE.hex()}))
            inner(buffers, offset)

        mirror.devices[0].pwritev = watched  # type: ignore[method-assign]
        mirror.replay()
        # Two writes before the refresh, one of the refresh, one behind it.
        self.assertEqual(
            [s[1:] for s in seen], [(False, False)] * 2 + [(False, True), (True, False)]
        )
        writes = [n for n, call in enumerate(power.calls) if call == ("/journal", "pwritev")]
        # Two slots for "incoherent"; both mirror devices are synced before two for "coherent".
        coherent = writes[2]
        self.assertEqual(
            power.calls[coherent - 2 : coherent],
            [("/mirror0", "fdatasync"), ("/mirror1", "fdatasync")],
        )
        self.assertEqual(power.calls[coherent + 1], ("/journal", "fdatasync"))

    def test_the_marks_keep_their_order_within_a_batch(self) -> None:
        """As the rmd applies what a burst has brought: all at once."""
        site, prefixes = filled()
        mirror = site.open()
        reached = mirror.scan().reached
        seen: list[bool] = []

        def watch(device: MemoryDevice) -> None:
            inner = device.pwritev

            def watched(buffers: Any, offset: int) -> None:
                if b"r" * 512 in buffers:
                    journal = site.devices["/journal"].durable()
                    found = read_superblock(MemoryDevice(SIZE, content=journal))
                    seen.append(found.coherent)
                    self.assertEqual(found.refresh, {"id": ONE.hex()})
                inner(buffers, offset)

            device.pwritev = watched  # type: ignore[method-assign]

        watch(site.devices["/mirror0"])
        mirror.journal.update(both=True, coherent=True, reason="")
        while mirror.applied.position != reached.position:
            mirror.applied = mirror.apply_journal(reached).place
        self.assertEqual(seen, [False])
        for slot in (0, 8 * KIB):
            copy = site.copy()
            copy.devices["/journal"].corrupt(slot, bytes(8 * KIB))
            self.assertTrue(copy.superblock.coherent, "the end mark is in both slots")
            self.assertIsNone(copy.superblock.refresh)
        # What stands before the end mark is durable by then; what follows it need not be.
        self.assertEqual(site.contents()[0][4096:4608], b"r" * 512)

    def test_a_checkpoint_tells_how_far_the_journal_is_durable(self) -> None:
        site, _ = filled(refresh=False)
        mirror = site.open()
        reader = site.journal.reader(Cursor(), contiguous=True)
        first = reader.read(4096)
        upto = reader.cursor
        mirror.apply([change_of(found.header, found.frame) for found in first])
        rest = list(reader)
        self.assertGreater(len(rest), 2)
        mirror.checkpoint(upto, reader.cursor)
        superblock = site.superblock
        self.assertEqual((superblock.tail, superblock.applied), (upto, upto))
        self.assertEqual(superblock.head, reader.cursor)
        last = site.journal.ring.start + reader.position - 4096
        site.devices["/journal"].corrupt(last + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, f"durable up to position {reader.position}"):
            site.open().replay()

    def test_a_journal_that_changes_meanwhile(self) -> None:
        site, _ = filled(refresh=False)
        mirror = site.open()
        scan = mirror.scan

        def changing() -> Any:
            found = scan()
            site.devices["/journal"].corrupt(site.journal.ring.start + 4096 + 60, b"\xff")
            return found

        mirror.scan = changing  # type: ignore[method-assign]
        with self.assertRaisesRegex(CorruptError, "reads differently than a moment ago"):
            mirror.replay()
        self.assertEqual(site.superblock.applied, Cursor())

    def test_the_end_of_another_refresh_proves_nothing(self) -> None:
        for kinds in (
            [(REFRESH_END, ONE)],
            [(REFRESH_BEGIN, TWO), (REFRESH_END, ONE)],
            [(REFRESH_BEGIN, ONE), (REFRESH_BEGIN, TWO), (REFRESH_END, ONE)],
            [(REFRESH_BEGIN, ONE)],
        ):
            site = Site()
            for kind, refresh in kinds:
                append(site.journal, site.maker.make(0, kind=kind, control=refresh))
            site.open().replay()
            self.assertFalse(site.superblock.coherent, kinds)

    def test_hashes_are_compared_in_their_place_but_not_in_a_replay(self) -> None:
        """A replayed frame may come before what the devices hold already (rules.md 22)."""
        site = Site()
        before, after = b"a" * 512, b"b" * 512

        def verify(content: bytes) -> bytes:
            row = Row(512, 512, blake3(content).digest())
            return site.maker.make(1, kind=VERIFY, control=pack_rows([row]))

        append(site.journal, site.maker.make(1, [write(512, before)]))
        append(site.journal, verify(before))
        append(site.journal, site.maker.make(1, [write(512, after)]))
        site.devices["/journal"].fdatasync()
        # The crash came when all of that was applied, and nothing recorded.
        site.devices["/mirror1"].pwritev([after], 512)
        mirror = site.open()
        found: list[Any] = []
        with mock.patch.object(Mirror, "_compare", lambda *told: found.append(told)):
            mirror.replay()
        self.assertEqual(found, [])
        mirror.journal.update(both=True, coherent=True, reason="")

        def apply(*raws: bytes) -> Any:
            return mirror.apply([change_of(parse_header(raw), raw) for raw in raws])

        equal = [verify(after), site.maker.make(1, [write(512, before)]), verify(before)]
        self.assertEqual([one.differs for one in apply(*equal)], [[], []])
        self.assertTrue(mirror.journal.superblock.coherent)
        site.devices["/mirror1"].pwritev([b"x"], 700)
        gsn = site.maker.gsn
        self.assertEqual(apply(verify(before)), [Verdict(gsn, 1, [(512, 512)])])
        self.assertFalse(site.superblock.coherent)
        self.assertIn("mirror of qds1 differs (bytes 512 to 1023)", site.superblock.reason)
        mirror.applied = Cursor(0, site.maker.gsn)
        self.assertEqual(mirror.found_before(), [Verdict(gsn, 1, [(512, 512)], again=True)])
        begin = site.maker.make(0, kind=REFRESH_BEGIN, control=ONE)
        mirror.reach(change_of(parse_header(begin), begin), mirror.applied, mirror.applied)
        skipped = apply(verify(before))
        self.assertIn("lacks a refresh's end", skipped[0].skipped)
        self.assertEqual(skipped[0].differs, ())
        self.assertEqual(mirror.found_before(), [])
        apply(site.maker.make(0, kind=REFRESH_END, control=ONE))
        self.assertTrue(site.superblock.coherent)
        self.assertIsNone(site.superblock.verify)

    def test_what_a_failed_sync_took_is_no_difference(self) -> None:
        """It is in the journal, and so in the next replay: the mirror stays coherent."""
        site = Site()
        mirror = site.open()
        mirror.replay()
        mirror.journal.update(both=True, coherent=True, reason="")
        device = mirror.devices[1]
        assert isinstance(device, MemoryDevice)
        device.fail("fdatasync")
        self.assertRaises(DeviceFailedError, device.fdatasync)
        row = Row(512, 512, blake3(b"a" * 512).digest())
        raw = site.maker.make(1, kind=VERIFY, control=pack_rows([row]))
        with self.assertRaises(DeviceFailedError) as caught:
            mirror.apply([change_of(parse_header(raw), raw)])
        self.assertIn("/mirror1", caught.exception.message)
        self.assertTrue(site.superblock.coherent)

    def test_a_mirror_that_cannot_be_synced_is_not_called_coherent(self) -> None:
        site, _ = filled()
        site.devices["/mirror1"].fail("fdatasync")
        mirror = site.open()
        with self.assertRaises(QdsError):
            mirror.replay()
        superblock = site.superblock
        self.assertFalse(superblock.coherent)
        self.assertEqual(superblock.applied, Cursor())

    def test_a_torn_journal_is_a_prefix(self) -> None:
        random = Random(5)
        for _ in range(60):
            site = Site()
            copies = [bytearray(MIRROR), bytearray(MIRROR)]
            prefixes = [[bytes(c) for c in copies]]
            for number in range(6):
                ldsu = random.randrange(2)
                one = entry(number, ldsu)
                append(site.journal, site.maker.make(ldsu, [one], durable=number))
                assert one.payload is not None
                copies[ldsu][one.offset : one.offset + one.length] = one.payload
                prefixes.append([bytes(c) for c in copies])
            site.crash(at_random(random))
            mirror = site.open()
            count = mirror.replay()
            self.assertEqual(site.contents(), prefixes[count])
            self.assertEqual(mirror.journal.head, mirror.applied.position)

    def test_every_flipped_bit_of_a_record(self) -> None:
        original, prefixes = filled(refresh=False)
        for record in range(len(prefixes) - 1):
            start = original.journal.ring.start + record * 4096
            for bit in range(8 * start, 8 * (start + RECORD_HEADER_BYTES + 104), 5):
                site = original.copy()
                raw = bytearray(site.devices["/journal"].durable())
                raw[bit // 8] ^= 1 << bit % 8
                site.devices["/journal"].corrupt(0, raw)
                count = site.open().replay()
                self.assertEqual(count, record)
                self.assertEqual(site.contents(), prefixes[record])

    def test_ends_before_its_durable_head(self) -> None:
        site, _ = filled()
        reader = site.journal.reader(Cursor(), contiguous=True)
        reader.read(3 * 4096)
        site.journal.update(head=reader.cursor)
        site.devices["/journal"].corrupt(site.journal.ring.start + 4096 + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, "durable up to position 12288, but intact"):
            site.open().replay()

    def test_a_superblock_of_long_ago(self) -> None:
        site = Site()
        for turn in range(1, 91):
            append(site.journal, site.maker.make(0, [write(0, b"x")]))
            if turn in (20, 45):
                at = Cursor(site.journal.head, site.maker.gsn, dict(site.maker.points))
                site.journal.update(tail=at, applied=at, head=at)
        site.devices["/journal"].fdatasync()
        self.assertEqual(site.superblock.applied.gsn, 46)
        self.assertEqual(site.copy().open().replay(), 45)
        # What stands behind the superblock before it was written over: 60 blocks are a turn.
        site.devices["/journal"].corrupt(site.superblock.counter % 2 * 8 * KIB, bytes(8 * KIB))
        self.assertEqual(site.superblock.applied.gsn, 21)
        with self.assertRaisesRegex(CorruptError, "superblock is of a time before position"):
            site.open().replay()

    def test_frames_are_contiguous(self) -> None:
        site = Site()
        append(site.journal, site.maker.make(0, [write(0, b"1")]))
        append(site.journal, site.maker.make(0, [write(0, b"2")], gsn_first=5))
        self.assertEqual(site.open().replay(), 1)


class ChangeTests(SynchronousTestCase):
    def test_of_each_kind(self) -> None:
        maker = FrameMaker()
        entries = [write(0, b"abc"), Entry(0, 512, frames.TRIM, None)]
        for raw, found, refresh in (
            (maker.make(0, entries), entries, b""),
            (maker.make(0, kind=VOID, gsns=2), [], b""),
            (maker.make(0, kind=REFRESH_BEGIN, control=ONE), [], ONE),
            (maker.make(0, kind=REFRESH_END, control=TWO), [], TWO),
        ):
            change = change_of(parse_header(raw), raw)
            self.assertEqual((list(change.entries), change.control), (found, refresh))


class RebaseTests(SynchronousTestCase):
    def test_incoherent_first_and_in_both_slots(self) -> None:
        site, _ = filled()
        mirror = site.open()
        mirror.replay()
        self.assertTrue(site.superblock.coherent)
        at = Cursor(mirror.journal.head, 77, {})
        mirror.begin_anew(TWO, tail=at, applied=at, head=at)
        for slot in (None, 0, 8 * KIB):
            copy = site.copy()
            if slot is not None:
                copy.devices["/journal"].corrupt(slot, bytes(8 * KIB))
            superblock = copy.superblock
            self.assertFalse(superblock.coherent)
            self.assertEqual(superblock.refresh, {"id": TWO.hex()})
            self.assertEqual(superblock.applied, at)
        self.assertEqual(site.devices["/journal"].unsynced, [])


class PadTests(SynchronousTestCase):
    def test_pads_behind_the_last_frame(self) -> None:
        """A pad that was written, and whose record was lost, ends what is replayed."""
        site = Site()
        count = 0
        while True:
            head = site.journal.head
            rest = site.journal.ring.contiguous(head)
            if rest < 64 * KIB:
                break
            append(site.journal, site.maker.make(0, [entry(count, 0)]))
            count += 1
            site.devices["/journal"].fdatasync()
        large = site.maker.make(0, [write(0, bytes(8 * KIB))])
        placement = site.journal.ring.place(head, head, 48 + len(large) + rest)
        assert placement is not None and placement.pads
        pad, *_ = site.journal.record(placement, len(large), [large], 0)
        site.journal.write([pad])
        site.devices["/journal"].fdatasync()
        mirror = site.open()
        self.assertEqual(mirror.replay(), count)
        self.assertEqual(mirror.applied.position, placement.pads[0][0] + placement.pads[0][1])
