"""A verify in the driver: exact in the order, paced, its results durable, its schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core import frames, nbd, watermark
from qdsmirror.core.frames import Entry
from qdsmirror.core.verify import Range, Row, parse_rows
from qdsmirror.errors import DegradedError, UsageError
from qdsmirror.groups import verify as verify_module
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.storage.verify import differing
from tests.fakes import MemoryDevice, everything, nothing
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, durable_superblock, unique

CHUNK = 64 * KIB
LINK_UP = {"state": "connected", "code": 0, "reason": ""}
LINK_DOWN = {"state": "connecting", "code": 0, "reason": "gone"}

#: Gives what of an LDSU's rows differs at the secondary.
Differs = Callable[[int, Sequence[Row]], Sequence[Range]]


def nowhere(_ldsu: int, _rows: Sequence[Row]) -> Sequence[Range]:
    return []


class VerifyWorld(DriverWorld):
    """A driver with a mirror; the test is its pmd, and its secondary.

    :ivar model: by LDSU what it holds at this place of the order.
    :ivar hashed: (GSN, LDSU, rows) of the frames with hashes, in order.
    :ivar told: what :meth:`answer` has reported on, the last GSN.
    :ivar wrong: what of them is not what the LDSU holds at their place.
    """

    def begin_work(self, coherent: bool = True) -> DriverUnit:
        self.model = [bytearray() for _ in self.config.ldsus]
        for index in range(len(self.config.ldsus)):
            size = self.data(index).size
            content = b"".join(unique(10**6 * (index + 1) + n) for n in range(size // BLOCK))
            self.data(index).corrupt(0, content)
            self.model[index][:] = content
        unit = self.start()
        if coherent:
            self.group.coherence.coherent = self.group.coherence.tracked = True
            for one in self.group.units:
                one.writelog.update(both=True, coherent=True, reason="")
        self.link()
        return unit

    def start(self) -> DriverUnit:
        self.hashed: list[tuple[int, int, list[Row]]] = []
        self.wrong: list[Range] = []
        self.told = 0
        unit = super().start()
        for one in self.group.units:
            one.framing.make = self._watched(one)  # type: ignore[method-assign]
        return unit

    def _watched(self, unit: DriverUnit) -> Any:
        make, index = unit.framing.make, unit.index

        def framed(
            kind: int,
            placement: Any,
            entries: Sequence[Entry] = (),
            control: Sequence[Any] = (),
            gsns: Any = None,
        ) -> Any:
            made = make(kind, placement, entries, control, gsns)
            for offset, length, _, payload in entries:
                data = bytes(length) if payload is None else payload
                self.model[index][offset : offset + length] = data
            if kind == frames.VERIFY:
                rows = parse_rows(b"".join(control))
                self.hashed.append((made[0].gsn_last, index, rows))
                content = bytes(self.model[index])
                self.wrong += differing(MemoryDevice(len(content), content=content), rows)
            return made

        return framed

    def link(self, state: Any = LINK_UP) -> None:
        if state is LINK_UP:
            self.attach()
        self.pmd.dataReceived(watermark.pack_json(watermark.LINK, state))

    # -- the secondary --------------------------------------------------------------------------

    def report(self, gsn: int, differs: Sequence[Range] = (), **more: Any) -> None:
        ldsu = next((ldsu for at, ldsu, _ in self.hashed if at == gsn), 0)
        body = {"about": "verify", "gsn": gsn, "ldsu": ldsu, **more}
        body["differs"] = [list(one) for one in differs]
        self.pmd.dataReceived(watermark.pack_json(watermark.REPORT, body))

    def answer(self, differs: Differs = nowhere) -> None:
        """Report on what is durable, and commit it."""
        for gsn, ldsu, rows in list(self.hashed):
            if self.told < gsn <= self.group.durable_gsn:
                self.told = gsn
                self.report(gsn, differs(ldsu, rows))
        self.commit()

    def to_the_end(self, differs: Differs = nowhere) -> dict[str, Any]:
        for _ in range(300):
            self.settle(0.1)
            self.answer(differs)
            if self.status()["phase"] == "over":
                self.settle(0.1)
                return self.status()
        raise AssertionError(f"it does not end: {self.status()}")

    # -- the operator ---------------------------------------------------------------------------

    def verify(self, how: str = "compare") -> Any:
        begun = self.group.verify(how)
        self.settle(0.01)
        return self.test.successResultOf(begun)

    def status(self) -> dict[str, Any]:
        status = self.group.status()["verify"]
        assert isinstance(status, dict)
        return status

    def covered(self) -> list[list[Range]]:
        """Give by LDSU which ranges were hashed, in order."""
        found: list[list[Range]] = [[] for _ in self.config.ldsus]
        for _, ldsu, rows in self.hashed:
            found[ldsu] += [(row.offset, row.length) for row in rows]
        return found


def all_chunks(size: int) -> list[Range]:
    return [(at, min(CHUNK, size - at)) for at in range(0, size, CHUNK)]


class ExactTests(SynchronousTestCase):
    """Every write framed before a frame is in its hashes, and none behind it."""

    def play(self, seed: int) -> VerifyWorld:
        chooser = random.Random(seed)
        world = VerifyWorld(self, size=512 * KIB, log=4 * MIB, stepped=True)
        self.patch(verify_module, "VERIFY_READ_BYTES", CHUNK)
        unit = world.begin_work()
        world.verify()
        for number in range(3000):
            action = chooser.random()
            if action < 0.4:
                command, data = chooser.choice(
                    ((nbd.CMD_WRITE, unique(number)), (nbd.CMD_TRIM, None), (nbd.CMD_FLUSH, None))
                )
                offset = 0 if command == nbd.CMD_FLUSH else chooser.randrange(128) * BLOCK
                length = 0 if command == nbd.CMD_FLUSH else BLOCK
                world.client.ask(unit, command, offset, length, data)
            elif action < 0.95:
                ready = [name for name, one in world.steps.items() if one.waiting]
                # Reads are slow, so that much happens meanwhile.
                if "qds0 read" in ready and len(ready) > 1 and chooser.random() < 0.9:
                    ready.remove("qds0 read")
                if ready:
                    world.steps[chooser.choice(ready)].step()
            else:
                world.reactor.advance(chooser.choice((0.0, 0.001, 0.01)))
                world.answer()
            if world.status()["phase"] == "over":
                break
        self.assertEqual(world.wrong, [])
        return world

    def test_each_hash_is_of_what_is_framed_before_it(self) -> None:
        ended = 0
        for seed in range(12):
            world = self.play(seed)
            ended += world.status()["result"] == "equal"
            world.close()
        self.assertGreater(ended, 8)

    def test_everything_is_hashed_once(self) -> None:
        world = VerifyWorld(self, ldsus=2, size=2 * MIB + 3 * BLOCK, log=MIB)
        world.begin_work()
        status = world.verify()
        self.assertEqual((status["phase"], status["finished"]), ("compare", None))
        status = world.to_the_end()
        self.assertEqual(status["result"], "equal")
        self.assertEqual(world.covered(), [all_chunks(2 * MIB + 3 * BLOCK)] * 2)
        self.assertEqual(world.wrong, [])

    def test_a_hole_is_not_hashed(self) -> None:
        world = VerifyWorld(self, size=16 * MIB)
        unit = world.begin_work()
        for offset, length in ((MIB, 9 * MIB), (12 * MIB + BLOCK, 2 * MIB)):
            world.model[0][offset : offset + length] = bytes(length)
            world.data().corrupt(offset, bytes(length))
        world.client.write(unit, 3 * MIB, unique(1))
        world.verify()
        self.assertEqual(world.to_the_end()["result"], "equal")
        self.assertEqual(world.wrong, [])
        self.assertLess(sum(len(rows) for _, _, rows in world.hashed), 160)
        found = world.covered()[0]
        self.assertEqual(sum(length for _, length in found), 16 * MIB)
        for (first, length), (second, _) in zip(found, found[1:], strict=False):
            self.assertEqual(first + length, second)


class PaceTests(SynchronousTestCase):
    def rate(self, world: VerifyWorld, seconds: float, before: Any = lambda: None) -> float:
        """Let time pass; give the bytes hashed in a second."""
        begun = sum(length for one in world.covered() for _, length in one)
        for _ in range(round(seconds / 0.01)):
            before()
            world.settle(0.01)
            world.answer()
        return (sum(length for one in world.covered() for _, length in one) - begun) / seconds

    def test_no_more_is_read_than_the_rate_allows(self) -> None:
        world = VerifyWorld(self, size=16 * MIB, verify_rate=4 * MIB)
        world.begin_work()
        world.verify()
        self.assertAlmostEqual(self.rate(world, 2.0) / (4 * MIB), 1.0, delta=0.3)

    def test_an_application_at_work_goes_first_and_does_not_starve_it(self) -> None:
        self.patch(verify_module, "VERIFY_READ_BYTES", CHUNK)
        world = VerifyWorld(self, size=16 * MIB, log=4 * MIB, stepped=True)
        unit = world.begin_work()
        world.verify()
        number = 0

        def keep_busy() -> None:
            nonlocal number
            for _ in range(3):
                number += 1
                world.client.write(unit, number % 64 * BLOCK, unique(number))
            # Its next write waits whenever one is appended.
            for name, worker in world.steps.items():
                if "writelog" not in name:
                    worker.step()

        hashed = []
        for _ in range(400):
            keep_busy()
            world.reactor.advance(0.01)
            if world.steps["qds0 writelog"].waiting and number % 2:
                world.steps["qds0 writelog"].step()
            world.answer()
            hashed.append(len(world.hashed))
        turns = 4.0 / limits.VERIFY_TURN_SECONDS
        self.assertGreater(hashed[-1], turns / 4)
        self.assertLess(hashed[-1], turns * 1.5)
        self.assertEqual(world.wrong, [])

    def test_reads_go_first_too(self) -> None:
        world = VerifyWorld(self, size=32 * MIB)
        unit = world.begin_work()

        def read(times: int) -> None:
            for _ in range(times):
                world.client.ask(unit, nbd.CMD_READ, 0, BLOCK)

        world.verify()
        busy = self.rate(world, 2.0, partial(read, 10))
        self.assertLess(busy, 1.3 * MIB / limits.VERIFY_TURN_SECONDS)
        self.assertGreater(busy, 0.5 * MIB / limits.VERIFY_TURN_SECONDS)
        self.assertGreater(self.rate(world, 0.3, partial(read, 1)), 3 * busy)

    def test_what_waits_for_reports_is_bounded(self) -> None:
        world = VerifyWorld(self, size=32 * MIB, verify_rate=limits.VERIFY_RATE_BYTES_MAX)
        world.begin_work()
        world.verify()
        for _ in range(50):
            world.settle(0.1)
        self.assertEqual(len(world.hashed), limits.VERIFY_FRAMES_MAX)
        self.assertEqual(world.to_the_end()["result"], "equal")

    def test_without_room_in_the_log_nothing_is_hashed(self) -> None:
        world = VerifyWorld(self, size=2 * MIB, log=MIB)
        unit = world.begin_work()
        number = 0
        while len(world.client.done) == number:
            number += 1
            world.client.write(unit, number % 64 * BLOCK, unique(number))
        world.verify()
        reads = []
        digests = unit.reading.digests
        unit.reading.digests = lambda *how: reads.append(how) or digests(*how)  # type: ignore[func-returns-value, method-assign]
        world.settle(5)
        self.assertEqual((reads, world.hashed), ([], []))
        world.commit()
        self.assertEqual(world.to_the_end()["result"], "equal")

    def test_without_a_link_it_waits(self) -> None:
        world = VerifyWorld(self, size=8 * MIB, verify_rate=4 * MIB)
        world.begin_work()
        world.verify()
        world.settle(0.3)
        world.link(LINK_DOWN)
        framed = len(world.hashed)
        world.settle(5)
        self.assertEqual(len(world.hashed), framed)
        world.link()
        world.settle(5)
        self.assertGreater(len(world.hashed), framed)


class LostTests(SynchronousTestCase):
    """What the secondary has passed without a word is sent again."""

    def test_a_report_that_is_lost(self) -> None:
        world = VerifyWorld(self, size=2 * MIB)
        world.begin_work()
        world.verify()
        world.settle(1)
        self.assertEqual(len(world.hashed), 2)
        world.report(world.hashed[1][0])
        world.commit()
        world.settle(3)
        self.assertEqual(world.covered()[0], all_chunks(2 * MIB) + all_chunks(MIB))
        self.assertEqual(world.status()["remaining_bytes"], 2 * MIB)
        world.report(world.hashed[2][0])
        self.assertEqual(world.status()["result"], "equal")

    def test_what_is_not_mirrored_is_waited_for(self) -> None:
        world = VerifyWorld(self, size=2 * MIB)
        world.begin_work()
        world.verify()
        world.settle(30)
        self.assertEqual(len(world.hashed), 2)
        self.assertEqual(world.status()["phase"], "compare")

    def test_a_crash_goes_on_behind_what_was_reported(self) -> None:
        for ending in ("kill", "crash"):
            world = VerifyWorld(self, ldsus=2, size=3 * MIB, verify_rate=8 * MIB)
            world.begin_work()
            identity = world.verify()["id"]
            world.settle(0.4)
            reported = world.hashed[:2]
            for gsn, _, _ in reported:
                world.report(gsn)
            world.commit()
            world.settle(1.5)
            first = len(world.hashed)
            self.assertGreater(first, 2)
            if ending == "kill":
                world.kill()
            else:
                world.crash(nothing)
            world.start()
            world.link()
            status = world.to_the_end()
            self.assertEqual((status["id"], status["result"]), (identity, "equal"), ending)
            self.assertEqual(
                world.covered(), [all_chunks(3 * MIB)[2 * MIB // CHUNK :], all_chunks(3 * MIB)]
            )
            world.close()


class FoundTests(SynchronousTestCase):
    """What differs is durable, before it counts as verified."""

    @staticmethod
    def bad(*chunks: int) -> Differs:
        """Give a secondary at which some chunks of the first LDSU differ."""

        def differs(ldsu: int, rows: Sequence[Row]) -> Sequence[Range]:
            return [
                (row.offset, row.length)
                for row in rows
                if ldsu == 0 and row.offset // CHUNK in chunks
            ]

        return differs

    def found(self, world: VerifyWorld) -> None:
        status = world.status()
        self.assertEqual((status["result"], status["differing_bytes"]), ("differs", 2 * CHUNK))
        self.assertEqual(
            [(one["ldsu"], one["offset"], one["length"]) for one in status["differing"]],
            [("qds0", 3 * CHUNK, CHUNK), ("qds0", 20 * CHUNK, CHUNK)],
        )
        self.assertFalse(world.group.coherent)
        self.assertIn("the mirror of qds0 differs", world.group.status()["reason"])
        dirty = world.group.units[0].dirty
        self.assertEqual(dirty.dirty_bytes(), 2 * CHUNK)
        self.assertTrue(dirty.is_marked(3 * CHUNK) and dirty.is_marked(20 * CHUNK))

    def test_differences_are_kept_over_a_power_cut(self) -> None:
        world = VerifyWorld(self, ldsus=2, size=2 * MIB)
        world.begin_work()
        world.verify()
        world.to_the_end(self.bad(3, 20))
        self.found(world)
        world.crash(nothing)
        for index in range(2):
            self.assertFalse(durable_superblock(world.log(index).durable()).coherent)
        world.start()
        self.found(world)

    def test_what_is_found_is_durable_before_it_counts(self) -> None:
        """A crash at any moment forgets no difference: it is known, or found again."""
        for count in range(60):
            world = VerifyWorld(self, ldsus=2, size=512 * KIB, stepped=True)
            world.begin_work()
            world.verify()
            world.settle(0.2)
            for gsn, ldsu, rows in world.hashed:
                world.report(gsn, self.bad(5)(ldsu, rows))
            world.commit()
            for _ in range(count):
                if not any(worker.step() for worker in list(world.steps.values())):
                    break
            world.crash(everything if count % 2 else nothing)
            world.start()
            world.link()
            status = world.to_the_end()
            again = 5 * CHUNK in [at for at, _ in world.covered()[0]]
            known = not world.group.coherent and world.group.units[0].dirty.is_marked(5 * CHUNK)
            self.assertTrue(again or (known and status["differing_bytes"] == CHUNK), count)
            world.close()

    def test_old_marks_of_a_bypass_do_not_count_as_differences(self) -> None:
        world = VerifyWorld(self, size=MIB)
        unit = world.begin_work()
        unit.dirty.mark([(0, MIB)])
        world.verify()
        self.assertEqual(unit.dirty.dirty_bytes(), 0)
        world.to_the_end(self.bad(2))
        self.assertEqual(unit.dirty.dirty_bytes(), CHUNK)
        # Of a mirror that differs they stay.
        world.verify()
        self.assertEqual(unit.dirty.dirty_bytes(), CHUNK)

    def test_repair_sends_what_differs_and_looks_at_it_again(self) -> None:
        world = VerifyWorld(self, ldsus=2, size=2 * MIB)
        world.begin_work()
        world.verify("repair")
        broken = {3, 20}

        def differs(ldsu: int, rows: Sequence[Row]) -> Sequence[Range]:
            if world.group.verifying.run.phase == "again":  # type: ignore[union-attr]
                return []
            return self.bad(*broken)(ldsu, rows)

        status = world.to_the_end(differs)
        self.assertEqual((status["result"], status["repaired_bytes"]), ("equal", 2 * CHUNK))
        self.assertTrue(world.group.coherent)
        self.assertEqual(world.covered()[0][-2:], [(3 * CHUNK, CHUNK), (20 * CHUNK, CHUNK)])

    def test_what_cannot_be_mended_differs(self) -> None:
        world = VerifyWorld(self, size=MIB)
        world.begin_work()
        world.verify("repair")
        status = world.to_the_end(self.bad(1))
        self.assertEqual(status["result"], "differs")
        self.assertFalse(world.group.coherent)

    def test_a_repair_goes_on_after_a_crash(self) -> None:
        for seconds in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
            world = VerifyWorld(self, size=512 * KIB)
            world.begin_work()
            identity = world.verify("repair")["id"]
            bad = self.bad(1)
            passed = 0.0
            while passed < seconds:
                world.settle(0.05)
                world.answer(bad if world.status()["phase"] == "compare" else nowhere)
                passed += 0.05
            world.crash(nothing)
            world.start()
            world.link()
            for _ in range(200):
                world.settle(0.1)
                world.answer(bad if world.status()["phase"] == "compare" else nowhere)
                if world.status()["phase"] == "over":
                    break
            status = world.status()
            self.assertEqual((status["id"], status["result"]), (identity, "equal"), seconds)
            self.assertEqual(status["repaired_bytes"], CHUNK)
            self.assertTrue(world.group.coherent)
            world.close()


class ToldAgainTests(SynchronousTestCase):
    """What the secondary has found and the driver did not hear of (the link, or a crash)."""

    def test_it_is_taken_whatever_is_known_of_the_verify(self) -> None:
        world = VerifyWorld(self, ldsus=2, size=MIB)
        world.begin_work()
        world.report(7, [(CHUNK, CHUNK)], ldsu=1)
        world.settle(0.1)
        group = world.group
        self.assertFalse(group.coherent)
        self.assertTrue(group.coherence.tracked)
        self.assertTrue(group.units[1].dirty.is_marked(CHUNK))
        self.assertIsNone(group.status()["verify"])
        world.crash(nothing)
        world.start()
        self.assertFalse(world.group.coherent)
        self.assertTrue(world.group.units[1].dirty.is_marked(CHUNK))

    def test_it_says_nothing_of_the_frame_whose_number_it_bears(self) -> None:
        """That frame was applied in a replay, which compares nothing."""
        for told in ([(MIB, CHUNK)], [(0, CHUNK)], []):
            world = VerifyWorld(self, size=2 * MIB)
            world.begin_work()
            world.verify()
            world.settle(1)
            waiting = world.status()["remaining_bytes"]
            world.report(world.hashed[0][0], told, again=True, more=not told)
            self.assertFalse(world.pmd.transport.disconnecting)
            self.assertFalse(world.group.coherent)
            self.assertEqual(world.status()["remaining_bytes"], waiting)
            world.close()

    def test_a_verify_that_finds_nothing_any_more_does_not_call_the_mirror_equal(self) -> None:
        world = VerifyWorld(self, size=MIB)
        world.begin_work()
        world.verify()
        world.report(0, [(0, CHUNK)])
        status = world.to_the_end()
        self.assertEqual((status["result"], status["differing_bytes"]), ("differs", 0))
        world.verify("repair")
        self.assertEqual(world.to_the_end()["result"], "equal")
        self.assertTrue(world.group.coherent)

    def test_more_than_could_be_kept_needs_another_refresh_than_a_dirty_one(self) -> None:
        world = VerifyWorld(self, size=MIB)
        world.begin_work()
        world.report(1, more=True)
        world.settle(0.1)
        self.assertFalse(world.group.coherent or world.group.coherence.tracked)

    def test_a_dirty_refresh_that_may_be_past_it_does_not_make_the_mirror_coherent(self) -> None:
        world = VerifyWorld(self, size=4 * MIB, log=MIB)
        world.begin_work()
        for number in range(40):
            world.report(number, [(number * CHUNK, CHUNK)])
        world.settle(0.1)
        begun = world.group.refresh("dirty")
        world.settle(0.2)
        self.successResultOf(begun)
        self.assertIsNotNone(world.group.refresh_job)
        world.report(99, [(60 * CHUNK, CHUNK)])
        for _ in range(50):
            world.settle(0.1)
            world.commit()
        self.assertFalse(world.group.coherent)
        self.assertTrue(world.group.coherence.tracked)
        world.group.refresh("dirty")
        for _ in range(50):
            world.settle(0.1)
            world.commit()
        self.assertTrue(world.group.coherent)

    def test_what_does_not_exist_cuts_the_pmd_off(self) -> None:
        for ldsu, wrong in ((5, []), (0, [(MIB, CHUNK)]), (0, [(0, 0)])):
            world = VerifyWorld(self, size=MIB)
            world.begin_work()
            world.report(1, wrong, ldsu=ldsu)
            self.assertTrue(world.pmd.transport.disconnecting or world.pmd.transport.disconnected)
            self.assertTrue(world.group.coherent)
            world.close()


class EndTests(SynchronousTestCase):
    def test_it_does_not_begin_where_it_cannot(self) -> None:
        world = VerifyWorld(self)
        world.begin_work(coherent=False)
        error = self.assertRaises(DegradedError, world.group.verify, "compare")
        self.assertIn("not coherent", error.message)
        self.assertRaises(UsageError, world.group.verify, "dance")
        self.assertRaises(DegradedError, world.group.verify, "stop")
        world.group.coherence.coherent = world.group.coherence.tracked = True
        world.link(LINK_DOWN)
        error = self.assertRaises(DegradedError, world.group.verify, "compare")
        self.assertIn("no link", error.message)
        self.assertIsNone(world.group.status()["verify"])

    def test_the_operator_ends_it(self) -> None:
        world = VerifyWorld(self, size=4 * MIB, verify_rate=MIB)
        world.begin_work()
        world.verify()
        world.settle(1)
        status = world.verify("stop")
        self.assertEqual((status["phase"], status["result"]), ("over", "ended"))
        framed = len(world.hashed)
        world.settle(10)
        self.assertEqual(len(world.hashed), framed)
        world.kill()
        world.start()
        self.assertEqual(world.status()["reason"], "asked for by the operator")

    def test_a_second_order_joins_the_first(self) -> None:
        world = VerifyWorld(self, size=4 * MIB)
        world.begin_work()
        first = world.verify()
        second = world.verify("repair")
        self.assertEqual(first["id"], second["id"])
        self.assertTrue(second["repair"])

    def test_bypass_ends_it(self) -> None:
        world = VerifyWorld(self, size=4 * MIB, verify_rate=MIB)
        world.begin_work()
        world.verify()
        world.settle(0.2)
        entered = world.group.switch_bypass("on")
        world.settle(3)
        self.successResultOf(entered)
        self.assertEqual(
            (world.status()["result"], world.status()["reason"]),
            ("ended", "the group is in bypass"),
        )

    def test_what_the_secondary_could_not_compare_ends_it(self) -> None:
        world = VerifyWorld(self, size=MIB)
        world.begin_work()
        world.verify()
        world.settle(0.2)
        world.report(world.hashed[0][0], skipped="the secondary says why")
        self.assertEqual(world.status()["reason"], "the secondary says why")

    def test_a_data_device_that_cannot_be_read_ends_it(self) -> None:
        world = VerifyWorld(self, size=MIB)
        world.begin_work()
        world.data().fail("pread")
        world.verify()
        world.settle(0.2)
        self.assertIn("qds0 cannot be read at 0", world.status()["reason"])

    def test_a_report_about_another_range_cuts_the_pmd_off(self) -> None:
        for wrong in ((MIB, CHUNK), (0, 2 * MIB), (0, 0)):
            world = VerifyWorld(self, size=4 * MIB)
            world.begin_work()
            world.verify()
            world.settle(0.2)
            world.report(world.hashed[0][0], [wrong])
            self.assertTrue(world.pmd.transport.disconnecting or world.pmd.transport.disconnected)
            self.assertTrue(world.group.coherent)
            world.close()

    def test_an_orderly_stop_leaves_it_to_the_next_start(self) -> None:
        world = VerifyWorld(self, size=4 * MIB, verify_rate=2 * MIB)
        world.begin_work()
        identity = world.verify()["id"]
        world.settle(0.7)
        world.answer()
        self.successResultOf(world.group.stop())
        world._forget()
        world.start()
        world.link()
        status = world.to_the_end()
        self.assertEqual((status["id"], status["result"]), (identity, "equal"))
        self.assertLess(len(world.covered()[0]), 4 * MIB // CHUNK)


class ScheduleTests(SynchronousTestCase):
    def world(self, **tunables: Any) -> VerifyWorld:
        world = VerifyWorld(self, size=MIB, **{"verify_every": 3600.0, **tunables})
        world.begin_work()
        return world

    def let_pass(self, world: VerifyWorld, seconds: float) -> None:
        for _ in range(10):
            world.settle(seconds / 10)
            world.answer()

    def test_it_begins_by_itself_and_again_when_it_is_due(self) -> None:
        world = self.world()
        self.let_pass(world, 20)
        status = world.status()
        self.assertEqual(status["result"], "equal")
        self.assertAlmostEqual(status["next"] - status["finished"], 3600.0, delta=1)
        self.let_pass(world, 3500)
        self.assertEqual(world.status()["id"], status["id"])
        self.let_pass(world, 200)
        self.assertNotEqual(world.status()["id"], status["id"])
        self.assertEqual(world.status()["last"]["finished"], status["finished"])

    def test_another_interval_counts_from_the_same_end(self) -> None:
        world = self.world(verify_every=0.0)
        world.verify()
        finished = world.to_the_end()["finished"]
        self.let_pass(world, 100)
        world.group.set_live('{"verify_every": "500"}')
        self.assertAlmostEqual(world.status()["next"] - finished, 500.0, delta=1)
        self.let_pass(world, 300)
        self.assertEqual(world.status()["finished"], finished)
        self.let_pass(world, 200)
        self.assertNotEqual(world.status()["finished"], finished)

    def test_never(self) -> None:
        world = self.world(verify_every=0.0)
        self.let_pass(world, 20)
        self.assertIsNone(world.group.status()["verify"])

    def test_none_begins_while_the_driver_stops(self) -> None:
        """It may be long until everything is on the disks: nothing else may come in between."""
        world = self.world()
        self.let_pass(world, 20)
        identity = world.status()["id"]
        world.group.verifying.stop()
        self.let_pass(world, 3700)
        self.assertEqual(world.status()["id"], identity)

    def test_it_waits_for_link_and_coherence(self) -> None:
        world = VerifyWorld(self, size=MIB, verify_every=3600.0)
        world.begin_work(coherent=False)
        self.let_pass(world, 20)
        self.assertIsNone(world.group.status()["verify"])
        world.group.coherence.coherent = world.group.coherence.tracked = True
        world.link(LINK_DOWN)
        world.settle(20)
        self.assertIsNone(world.group.status()["verify"])
        world.link()
        self.let_pass(world, 20)
        self.assertEqual(world.status()["result"], "equal")

    def test_it_is_counted_over_a_restart_whatever_the_clock_does(self) -> None:
        for jump, due in ((0.0, 3600.0), (-86400.0, 3600.0), (1800.0, 1800.0), (90000.0, 0.0)):
            world = self.world()
            self.let_pass(world, 20)
            world.kill()
            finished = world.status()["finished"]
            world.start()
            world.group.runtime.wall = partial(float, finished + jump)
            world.group.verifying.set_due()
            self.assertAlmostEqual(
                world.group.verifying._due - world.reactor.seconds(), due, delta=1
            )
            world.close()

    def test_one_that_was_ended_is_tried_again_before_long(self) -> None:
        world = self.world(verify_every=30 * 86400.0, verify_rate=64 * KIB)
        world.settle(3)
        world.verify("stop")
        left = world.status()["next"] - world.status()["finished"]
        self.assertAlmostEqual(left, limits.VERIFY_RETRY_SECONDS_MAX, delta=1)
