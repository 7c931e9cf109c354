"""Before-images and the way back: durable before the overwrite, one of each part, never anew."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import REFRESH, REFRESH_BEGIN, REFRESH_END, REFRESH_ZEROES, TRIM, Entry
from qdsmirror.core.records import Generation
from qdsmirror.errors import BrokenError, DegradedError
from qdsmirror.storage import beforeimages as module
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.rollback import check_rollback, roll_back
from tests.fakes import MemoryDevice, at_random, everything, nothing
from tests.storage.logworld import GENERATION, KIB, MirrorSite, append, config, initialise
from tests.storage.logworld import write as entry
from tests.storage.test_journal import Cut, Power

MIRROR = 64 * KIB
AREA = 256 * KIB
PART = 4 * KIB
ID, OTHER = b"R" * 16, b"S" * 16


class Site(MirrorSite):
    """Its mirrors hold something, and a refresh is in its journal."""

    def __init__(self, area: int = AREA, full: str = "give-up") -> None:
        made = config(2)
        tunables = replace(made.tunables, before_images_full=full)
        contents = [Random(n).randbytes(MIRROR // 2).ljust(MIRROR, b"\0") for n in (1, 2)]
        devices = {
            "/journal": MemoryDevice(512 * KIB + area, path="/journal"),
            "/mirror0": MemoryDevice(MIRROR, path="/mirror0", content=contents[0]),
            "/mirror1": MemoryDevice(MIRROR, path="/mirror1", content=contents[1]),
        }
        super().__init__(replace(made, tunables=tunables), devices)
        self.journal = initialise(
            self.devices["/journal"], role="journal", sizes=[MIRROR] * 2, before_bytes=area
        )
        self.journal.update(
            both=True, coherent=True, reason="", generations=(Generation(GENERATION, 1),)
        )

    def add(self, ldsu: int, *entries: Entry, **control: Any) -> None:
        append(self.journal, self.maker.make(ldsu, entries, **control))
        self.devices["/journal"].fdatasync()

    def fill(self, end: bool = False) -> list[bytes]:
        """Write, then refresh with live writes between; give the mirrors at the refresh's begin."""
        self.add(0, entry(0, b"w" * 1024))
        self.add(1, entry(8192, b"w" * 1024), Entry(16384, 8192, TRIM, None))
        expected = [bytearray(content) for content in self.contents()]
        expected[0][:1024] = b"w" * 1024
        expected[1][8192:9216] = b"w" * 1024
        expected[1][16384:24576] = bytes(8192)
        self.add(0, kind=REFRESH_BEGIN, control=ID)
        self.add(0, Entry(0, 8192, REFRESH, b"r" * 8192))
        self.add(0, entry(4096, b"live" * 256), Entry(40 * KIB, 8192, REFRESH_ZEROES, None))
        self.add(1, Entry(0, 32 * KIB, REFRESH_ZEROES, None))
        self.add(1, entry(60 * KIB, b"live" * 1024))
        self.add(0, Entry(0, 4096, REFRESH, b"s" * 4096))
        if end:
            self.add(0, kind=REFRESH_END, control=ID)
        return [bytes(content) for content in expected]


class RollbackTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(module, "BEFORE_CHUNK_BYTES", PART)
        self.patch(module, "BEFORE_BATCH_BYTES", 3 * PART)


class RollbackTests(RollbackTestCase):
    def test_back_to_the_begin(self) -> None:
        site = Site()
        expected = site.fill()
        mirror = site.open()
        mirror.replay()
        self.assertNotEqual(site.contents(), expected)
        self.assertFalse(site.superblock.coherent)
        done = roll_back(site.open())
        self.assertEqual(done.gsn, 3)
        self.assertEqual(site.contents(), expected)
        superblock = site.superblock
        self.assertTrue(superblock.coherent)
        self.assertIn("rolled back to GSN 3", superblock.reason)
        self.assertIsNone(superblock.refresh)
        self.assertIsNone(superblock.before)
        # The primary finds another history, and the journal nothing to replay.
        self.assertNotEqual(superblock.generation, GENERATION)
        self.assertEqual(superblock.applied.gsn, 4)
        self.assertEqual(site.open().replay(), 0)
        self.assertEqual(site.contents(), expected)
        with self.assertRaisesRegex(DegradedError, "nothing to roll back"):
            roll_back(site.open())

    def test_only_parts_that_change_are_kept_and_each_once(self) -> None:
        site = Site()
        site.fill()
        mirror = site.open()
        mirror.replay()
        images = mirror.images
        parts = [part for record in images._records(images.period) for part in record.parts]
        places = [(part.ldsu, part.offset) for part in parts]
        self.assertEqual(len(places), len(set(places)))
        # LDSU 0: two parts of data; its zeroes were zeroes already.  LDSU 1: six of eight were not.
        zeroed = [(1, at) for at in range(0, 32 * KIB, PART) if not 16 * KIB <= at < 24 * KIB]
        self.assertEqual(set(places), {(0, 0), (0, PART), (1, 60 * KIB), *zeroed})
        self.assertFalse([p for p in parts if p.has_data and p.offset == 60 * KIB], "a hole")

    def test_a_refresh_that_ends_frees_them(self) -> None:
        site = Site()
        site.fill(end=True)
        site.open().replay()
        self.assertTrue(site.superblock.coherent)
        self.assertIsNone(site.superblock.before)
        with self.assertRaises(DegradedError):
            roll_back(site.open())

    def test_a_second_refresh_goes_back_behind_the_first(self) -> None:
        site = Site()
        expected = site.fill()
        site.add(0, kind=REFRESH_BEGIN, control=OTHER)
        site.add(1, Entry(32 * KIB, 4096, REFRESH, b"o" * 4096))
        site.open().replay()
        roll_back(site.open())
        self.assertEqual(site.contents(), expected)

    def test_never_taken_again_by_a_replay(self) -> None:
        """Interrupted anywhere, replayed, interrupted, rolled back: always what it was."""
        original = Site()
        expected = original.fill()
        power = Power()
        whole = original.copy()
        for device in whole.devices.values():
            power.watch(device)
        whole.open().replay()
        random = Random(7)
        count = len(power.calls)
        self.assertGreater(count, 20)
        for choose in (nothing, everything, at_random(random), at_random(random)):
            for stop in range(count):
                site = original.copy()
                self.interrupt(site, Mirror.replay, stop, choose)
                if random.random() < 0.5:
                    self.interrupt(site, Mirror.replay, random.randrange(count), choose)
                if site.superblock.coherent:
                    # It has not begun, or what came before it was not replayed yet.
                    site.open().replay()
                roll_back(site.open())
                self.assertEqual(site.contents(), expected, stop)

    def interrupt(self, site: Site, work: Any, stop: int, choose: Any) -> None:
        cut = Power(stop)
        for device in site.devices.values():
            cut.watch(device)
        try:
            work(site.open())
        except Cut:
            pass
        site.crash(choose)

    def test_interrupted_anywhere_and_run_again(self) -> None:
        original = Site()
        expected = original.fill()
        original.open().replay()
        original.crash(nothing)
        power = Power()
        whole = original.copy()
        for device in whole.devices.values():
            power.watch(device)
        roll_back(whole.open())
        random = Random(8)
        for choose in (nothing, everything, at_random(random)):
            for stop in range(len(power.calls)):
                site = original.copy()
                self.interrupt(site, roll_back, stop, choose)
                if random.random() < 0.5:
                    # The daemon was started in between: nothing is replayed over it.
                    site.open().replay()
                if site.superblock.coherent:
                    self.assertEqual(site.contents(), expected, stop)
                    continue
                roll_back(site.open())
                self.assertEqual(site.contents(), expected, stop)
                self.assertTrue(site.superblock.coherent)

    def test_durable_before_the_first_overwrite(self) -> None:
        site = Site()
        site.fill()
        mirror = site.open()
        journal = site.devices["/journal"]
        for index in (0, 1):
            device = site.devices[f"/mirror{index}"]
            inner = device.pwritev

            def watched(buffers: Any, offset: int, inner: Any = inner) -> None:
                if mirror.journal.superblock.before is not None:
                    self.assertEqual(journal.unsynced, [])
                inner(buffers, offset)

            device.pwritev = watched  # type: ignore[method-assign]
        mirror.replay()


class FullTests(RollbackTestCase):
    def test_given_up_loudly(self) -> None:
        site = Site(area=4 * PART)
        site.fill()
        mirror = site.open()
        mirror.replay()
        self.assertIn("cannot be rolled back any more", str(mirror.take_told()))
        self.assertIn("used up", site.superblock.before["lost"])
        self.assertEqual(mirror.images.status()["state"], "given-up")
        self.assertEqual(mirror.applied.gsn, site.maker.gsn)
        before = site.contents()
        with self.assertRaisesRegex(BrokenError, "cannot be rolled back: the .* used up"):
            roll_back(site.open())
        self.assertEqual(site.contents(), before)

    def test_stopped_and_rolled_back(self) -> None:
        site = Site(area=4 * PART, full="stop")
        expected = site.fill()
        for _ in range(2):
            mirror = site.open()
            with self.assertRaisesRegex(BrokenError, "has stopped") as caught:
                mirror.replay()
            self.assertIn("--rollback", caught.exception.hint)
        roll_back(site.open())
        self.assertEqual(site.contents(), expected)

    def test_stopped_and_gone_on_by_choosing_otherwise(self) -> None:
        site = Site(area=4 * PART, full="stop")
        site.fill(end=True)
        self.assertRaises(BrokenError, site.open().replay)
        tunables = replace(site.config.tunables, before_images_full="give-up")
        site.config = replace(site.config, tunables=tunables)
        site.open().replay()
        self.assertTrue(site.superblock.coherent)

    def test_none_where_there_is_no_room_or_nothing_is_wanted(self) -> None:
        for area, wanted in ((0, 1 << 30), (AREA, 0)):
            site = Site(area=area)
            tunables = replace(site.config.tunables, before_image_bytes=wanted)
            site.config = replace(site.config, tunables=tunables)
            site.fill()
            mirror = site.open()
            self.assertEqual(mirror.images.status()["state"], "off")
            mirror.replay()
            with self.assertRaisesRegex(BrokenError, "no before-images"):
                roll_back(site.open())

    def test_none_of_a_mirror_that_was_not_usable(self) -> None:
        site = Site()
        site.journal.update(both=True, coherent=False, reason="never mirrored")
        site.fill()
        mirror = site.open()
        mirror.replay()
        self.assertEqual(mirror.images.status()["state"], "nothing")
        with self.assertRaisesRegex(BrokenError, "no before-images"):
            roll_back(site.open())


class DamageTests(RollbackTestCase):
    def damaged(self, at: int) -> Site:
        site = Site()
        site.fill()
        site.open().replay()
        start, _ = site.superblock.before_area
        site.devices["/journal"].corrupt(start + at, b"x" * 512)
        return site

    def test_a_record_that_is_missing_before_others(self) -> None:
        site = self.damaged(0)
        mirror = site.open()
        mirror.replay()
        self.assertIn("are damaged", str(mirror.take_told()))
        with self.assertRaisesRegex(BrokenError, "damaged"):
            roll_back(site.open())

    def test_a_content_that_is_damaged(self) -> None:
        site = self.damaged(4096 + 512)
        before = site.contents()
        with self.assertRaisesRegex(BrokenError, "damaged"):
            roll_back(site.open())
        self.assertEqual(site.contents(), before)
        self.assertFalse(site.superblock.coherent)

    def test_somebody_else_has_written_to_a_mirror(self) -> None:
        site = Site()
        site.fill()
        mirror = site.open()
        mirror.replay()
        mirror.seal()
        site.devices["/mirror0"].pwritev([b"somebody"], 100)
        site.devices["/mirror0"].fdatasync()
        with self.assertRaisesRegex(BrokenError, "no before-images .*changed while"):
            roll_back(site.open())


class DryRunTests(RollbackTestCase):
    def test_says_what_a_run_does_and_writes_nothing(self) -> None:
        site = Site()
        site.fill()
        site.open().replay()
        before = {path: device.content() for path, device in site.devices.items()}
        mirror = site.open()
        told = (check_rollback(mirror).gsn, mirror.images.restorable_bytes)
        self.assertEqual({path: one.content() for path, one in site.devices.items()}, before)
        self.assertEqual(roll_back(site.open()), told)


class EstimateTests(RollbackTestCase):
    def test_by_what_was_passed(self) -> None:
        site = Site()
        mirror = site.open()
        self.assertEqual(mirror.images.status()["needed_bytes"], 2 * MIRROR)
        self.assertEqual(mirror.images.status()["state"], "ready")
        site.add(0, kind=REFRESH_BEGIN, control=ID)
        site.add(0, Entry(0, 16 * KIB, REFRESH, b"r" * 16 * KIB))
        mirror = site.open()
        mirror.replay()
        status = mirror.images.status()
        self.assertEqual((status["state"], status["rollback_gsn"]), ("keeping", 0))
        self.assertEqual(status["used_bytes"], 16 * KIB + 2 * 4096)
        self.assertEqual(status["needed_bytes"], 8 * status["used_bytes"])
