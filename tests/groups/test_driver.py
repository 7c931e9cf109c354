"""The driver's group: tail, checkpoints, recovery after any end, attachments."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames, nbd, watermark
from qdsmirror.core.records import Cursor, Point
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import CorruptError, DeviceError, MismatchError, QdsError
from qdsmirror.groups import refresh as refresh_module
from qdsmirror.groups.outbound import OutUnit
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.paths import Paths
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import at_random, everything, nothing
from tests.groups.world import BLOCK, GENERATION, KIB, MIB, DriverWorld, FakeConnection, unique


class TailTests(SynchronousTestCase):
    """TAIL: never past what is not committed, or not applied and synced."""

    def test_tail_waits_for_the_commit(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        for number in range(3):
            world.client.write(unit, number * BLOCK, unique(number))
        world.settle(3)
        superblock = read_superblock(world.log())
        self.assertEqual(superblock.tail.position, 0)
        self.assertEqual(superblock.applied.position, unit.durable_end)
        self.assertEqual(superblock.durable_gsn, 3)
        world.commit(2)
        world.settle(3)
        superblock = read_superblock(world.log())
        self.assertEqual(superblock.tail.position, world.frames[1].end)
        self.assertEqual(superblock.tail.gsn, 3)
        world.commit(3)
        world.settle(3)
        self.assertEqual(read_superblock(world.log()).tail.position, unit.durable_end)
        self.assertEqual(unit.writelog.used_bytes, 0)

    def test_tail_waits_for_apply_and_sync(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        world.attach()
        world.settle(0.1)
        world.client.write(unit, 0, unique(1))
        world.step("qds0 writelog")
        world.reactor.advance(0.01)
        world.step("qds0 commit")
        world.commit()
        self.assertEqual(world.group.committed_gsn, 1)
        # Committed at the secondary, not yet applied here.
        counter = read_superblock(world.log()).counter
        world.group.checkpoints.take()
        world.step("qds0 commit")
        superblock = read_superblock(world.log())
        self.assertGreater(superblock.counter, counter)
        self.assertEqual((superblock.tail.position, superblock.applied.position), (0, 0))
        # Applied while a sync that may have missed it was under way: not yet synced.
        world.step("qds0 data")
        world.group.checkpoints.take()
        self.assertEqual(world.group.checkpoints.applied_gsn, 0)
        self.assertEqual(read_superblock(world.log()).tail.position, 0)
        world.settle(0.1)
        self.assertEqual(world.group.checkpoints.applied_gsn, 1)
        self.assertEqual(read_superblock(world.log()).tail.position, unit.durable_end)
        self.assertEqual(world.data().durable()[:BLOCK], unique(1))

    def test_frame_applied_after_its_devices_sync_is_not_synced(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.attach()

        def durable(unit: DriverUnit, number: int) -> None:
            world.client.write(unit, number * BLOCK, unique(number), fua=True)
            world.step(f"{unit.name} writelog")
            world.step(f"{unit.name} commit")

        for number, unit in enumerate((first, second)):
            durable(unit, number)
            world.step(f"{unit.name} data")
        world.group.checkpoints.take()
        durable(first, 2)
        world.commit()
        # The sync of qds0, then the write of GSN 3; the sync of qds1 ends after both.
        world.step("qds0 data", 2)
        self.assertNotIn(unique(2), world.data().durable())
        world.step("qds1 data")
        world.steps["qds0 commit"].step_all()
        superblock = read_superblock(world.log())
        place = world.frames[0].end
        self.assertEqual((superblock.applied.position, superblock.tail.position), (place, place))
        world.crash(nothing)
        unit = world.start()
        self.assertEqual(world.client.read(unit, 2 * BLOCK, BLOCK), unique(2))

    def test_tail_at_the_applied_end_names_no_later_gsn(self) -> None:
        """A pmd that begins there must find the committed frame that was not yet applied."""
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        world.attach()
        for number in range(2):
            world.client.write(unit, number * BLOCK, unique(number), fua=True)
            world.step("qds0 writelog")
            world.step("qds0 commit")
            if not number:
                world.step("qds0 data")
        world.commit()
        world.group.checkpoints.take()
        # The write of GSN 2 waits before the sync; what it would write stays unwritten.
        jobs = world.steps["qds0 data"].waiting
        jobs.popleft()
        world.step("qds0 data")
        world.steps["qds0 commit"].step_all()
        superblock = read_superblock(world.log())
        self.assertEqual((superblock.tail.position, superblock.tail.gsn), (world.frames[0].end, 2))
        world.kill()
        unit = world.start()
        reader = unit.writelog.reader(superblock.tail)
        self.assertEqual([found.header.gsn_first for found in reader], [2])

    def test_applied_is_contiguous_over_the_group(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.client.write(first, 0, unique(1))
        world.client.write(second, 0, unique(2))
        for name in ("qds0 writelog", "qds1 writelog"):
            world.step(name)
        world.reactor.advance(0.01)
        for name in ("qds0 commit", "qds1 commit", "qds1 data"):
            world.step(name)
        world.reactor.advance(1.5)
        for _ in range(3):
            for name in ("qds1 data", "qds1 commit", "qds0 commit"):
                world.steps[name].step_all()
        self.assertEqual(second.applying.synced_sequence, 1)
        self.assertEqual(world.group.checkpoints.applied_gsn, 0)
        self.assertEqual(read_superblock(world.log(1)).applied.position, 0)
        world.settle(3)
        self.assertEqual(world.group.checkpoints.applied_gsn, 2)
        self.assertGreater(read_superblock(world.log(1)).applied.position, 0)

    def test_durable_gsn_has_no_gap(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.attach()
        world.client.write(first, 0, unique(1))
        world.client.write(second, 0, unique(2))
        world.step("qds1 writelog")
        world.reactor.advance(0.01)
        world.step("qds1 commit")
        self.assertEqual(world.group.durable_gsn, 0)
        world.step("qds0 writelog")
        world.reactor.advance(0.01)
        world.step("qds0 commit")
        self.assertEqual(world.group.durable_gsn, 2)

    def test_commit_beyond_what_is_durable_is_refused(self) -> None:
        world = DriverWorld(self)
        world.start()
        world.attach()
        world.commit(7, [])
        self.assertEqual(world.group.committed_gsn, 0)
        self.assertIn("only 0 is durable", world.group.status()["errors"][0])

    def test_checkpoint_after_many_entries(self) -> None:
        world = DriverWorld(self, metadata_entries=4, metadata_seconds=60.0)
        unit = world.start()
        counter = read_superblock(world.log()).counter
        for number in range(12):
            world.client.write(unit, number * BLOCK, unique(number))
            world.reactor.advance(0.01)
        superblock = read_superblock(world.log())
        self.assertGreater(superblock.counter, counter)
        self.assertGreaterEqual(superblock.applied.gsn, 8)

    def test_idle_group_writes_no_superblock(self) -> None:
        world = DriverWorld(self)
        world.start()
        world.settle(5)
        counter = read_superblock(world.log()).counter
        world.settle(50)
        self.assertEqual(read_superblock(world.log()).counter, counter)


class RecoveryTests(SynchronousTestCase):
    """Whatever ended the driver, the next one stands where the answers were."""

    def test_answered_writes_survive_a_kill_at_any_point(self) -> None:
        for seed in range(15):
            self._one_life(seed, power_cut=False)

    def test_flushed_writes_survive_a_power_cut_at_any_point(self) -> None:
        for seed in range(15):
            self._one_life(seed, power_cut=True)

    def _one_life(self, seed: int, power_cut: bool) -> None:
        """Three lives of a driver under writes and flushes, each ended at a random step."""
        random = Random(seed)
        world = DriverWorld(self, ldsus=2, log=256 * KIB, stepped=True)
        blocks = 24
        # By (LDSU, block): what must at least be there, and what may be there instead.
        must: dict[tuple[int, int], int] = {}
        may: dict[tuple[int, int], list[int]] = {}
        number = 0
        for _ in range(3):
            world.start()
            world.attach()
            self._assert_content(world, must, may, f"seed {seed}")
            issued: list[tuple[nbd.Request, tuple[int, int], int]] = []
            covered: list[tuple[nbd.Request, list[tuple[tuple[int, int], int]]]] = []
            for _ in range(random.randrange(5, 120)):
                action = random.random()
                index = random.randrange(2)
                unit = world.group.units[index]
                if action < 0.3:
                    number += 1
                    place = (index, random.randrange(blocks))
                    fua = random.random() < 0.2
                    request = world.client.write(unit, place[1] * BLOCK, unique(number), fua=fua)
                    may.setdefault(place, []).append(number)
                    issued.append((request, place, number))
                    if fua:
                        covered.append((request, [(place, number)]))
                elif action < 0.35:
                    before = [
                        (p, n) for r, p, n in issued if p[0] == index and world.client.answered(r)
                    ]
                    covered.append((world.client.flush(unit), before))
                elif action < 0.4:
                    world.reactor.advance(random.choice((0.001, 0.6)))
                elif action < 0.42:
                    world.commit()
                else:
                    random.choice(list(world.steps.values())).step()
                for unit in world.group.units:
                    tail = unit.writelog.superblock.tail.position
                    self.assertLessEqual(tail, unit.committed_end, f"seed {seed}: TAIL")
                    self.assertLessEqual(tail, unit.applied_end, f"seed {seed}: TAIL")
            if power_cut:
                kept = [one for r, some in covered if r in world.client.done for one in some]
                world.crash(at_random(random))
            else:
                kept = [(p, n) for r, p, n in issued if r in world.client.done]
                world.kill()
            for place, n in kept:
                must[place] = max(n, must.get(place, 0))
        world.start()
        self._assert_content(world, must, may, f"seed {seed}")
        world.close()

    def _assert_content(
        self,
        world: DriverWorld,
        must: dict[tuple[int, int], int],
        may: dict[tuple[int, int], list[int]],
        told: str,
    ) -> None:
        for (index, block), numbers in may.items():
            content = world.client.read(world.group.units[index], block * BLOCK, BLOCK)
            self.assertEqual(content, world.data(index).content()[block * BLOCK :][:BLOCK])
            least = must.get((index, block), 0)
            allowed = [unique(n) for n in numbers if n >= least]
            if not least:
                allowed.append(bytes(BLOCK))
            self.assertIn(content, allowed, f"{told}: LDSU {index} block {block}: DURABLE")

    def test_lost_suffix_becomes_a_void_range(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.client.write(first, 0, unique(1))
        world.client.write(second, 0, unique(2))
        # Only the second LDSU's frame gets to its log.
        world.step("qds1 writelog")
        world.kill()
        world.start()
        self.assertEqual(world.group.next_gsn, 3)
        self.assertEqual(world.group.durable_gsn, 2)
        self.assertEqual(world.data(1).content()[:BLOCK], unique(2))
        info = world.attach()
        gsns = []
        for unit, description in zip(world.group.units, info["units"], strict=True):
            reader = unit.writelog.reader(Cursor.from_json(description["tail"]))
            gsns += [(f.header.gsn_first, f.header.kind) for f in reader]
        self.assertEqual(sorted(gsns), [(1, 2), (2, 1)])
        world.kill()
        # The void range is found again, not made again.
        world.start()
        self.assertEqual(world.group.next_gsn, 3)
        self.assertEqual(world.group.units[0].framed_point.sequence, 2)

    def test_void_range_is_durable_before_a_superblock_counts_it(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.client.write(first, 0, unique(1))
        world.client.write(second, 0, unique(2))
        world.step("qds1 writelog")
        world.kill()
        log = world.log()
        start = first.writelog.ring.start
        pwritev = log.pwritev
        voids: list[int] = []

        def watched(buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
            if offset >= start:
                # What is cleared behind the log's end is no void range.
                voids.extend([offset] if any(map(any, buffers)) else [])
            else:
                self.assertTrue(voids)
                self.assertFalse([w for w in log.unsynced if w.offset >= start], "rules.md 6")
            pwritev(buffers, offset)

        log.pwritev = watched  # type: ignore[method-assign]
        world.start()
        self.assertEqual(len(voids), 1)

    def test_record_that_lost_its_pad_does_not_come_back(self) -> None:
        """A pad that is written anew would make it follow again (rules.md 2)."""
        world = DriverWorld(self, log=256 * KIB)
        unit = world.start()
        world.attach()
        ring = unit.writelog.ring
        number = 0
        # Up to a record that goes behind the ring's end, and the pad before it.
        while unit.writelog.head < ring.size:
            self.assertTrue(world.client.answered(world.client.write(unit, 0, unique(number))))
            world.commit()
            world.settle(2.0)
            number += 1
            if ring.size - unit.writelog.head == BLOCK:
                break
        lost = world.client.write(unit, 0, unique(100))
        self.assertTrue(world.client.answered(lost))
        unsynced = world.log().unsynced
        self.assertEqual([len(write.data) for write in unsynced[-2:]], [BLOCK, 2 * BLOCK])
        pad = unsynced[-2]
        world.crash(lambda write: nothing(write) if write is pad else everything(write))
        unit = world.start()
        self.assertEqual(world.data().content()[:BLOCK], unique(number - 1))
        world.client.write(unit, 0, unique(101))
        pad = world.log().unsynced[-2]
        world.crash(lambda write: everything(write) if write is pad else nothing(write))
        world.start()
        self.assertEqual(world.data().content()[:BLOCK], unique(number - 1))

    def test_corrupt_group_is_refused_before_anything_is_replayed(self) -> None:
        world = DriverWorld(self, ldsus=2, stepped=True)
        for unit in (world.start(), world.group.units[1]):
            world.client.write(unit, 0, unique(unit.index), fua=True)
            world.step(f"{unit.name} writelog")
            world.step(f"{unit.name} commit")
        # Later frames say that the one of qds1 was durable.
        unit = world.group.units[0]
        world.client.write(unit, BLOCK, unique(2), fua=True)
        world.step("qds0 writelog")
        world.step("qds0 commit")
        place = world.group.units[1].writelog.ring.start
        world.kill()
        world.log(1).corrupt(place + 300, b"\xee")
        self.failureResultOf(world.begin(), CorruptError)
        for index in (0, 1):
            self.assertEqual(world.data(index).content(), bytes(world.data(index).size))

    def test_replay_happens_again_when_it_was_interrupted(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        world.step("qds0 writelog")
        world.kill()
        world.data().fail("fdatasync")
        failure = self.failureResultOf(world.begin())
        failure.trap(DeviceError, OSError)
        self.assertTrue(world.data().closed and world.log().closed)
        world.crash(nothing)
        world.start()
        self.assertEqual(world.data().durable()[:BLOCK], unique(1))

    def test_lost_durable_frame_is_corruption(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        for number in range(3):
            world.client.write(unit, number * BLOCK, unique(number), fua=True)
        place = unit.writelog.ring.physical(world.frames[1].end).offset - BLOCK
        world.kill()
        world.log().corrupt(place, b"X")
        failure = self.failureResultOf(world.begin(), CorruptError)
        self.assertIn("/near/log0", failure.getErrorMessage() + "/near/log0")

    def test_failed_sync_is_remembered_by_the_next_driver(self) -> None:
        """The kernel would report the next fsync as good (rules.md 4)."""
        for name, state in (("log1", "bypass"), ("data1", "accumulating")):
            world = DriverWorld(self, ldsus=2)
            base = Path(tempfile.mkdtemp(prefix="qdsd", dir="/tmp"))
            self.addCleanup(shutil.rmtree, base)
            world.paths = Paths.of(base)
            world.paths.state_file(0).parent.mkdir(parents=True)
            world.start()
            world.devices[f"/near/{name}"].fail("fdatasync")
            # Its payload is what any block holds: past the writelog, nobody knows it there.
            world.client.ask(world.group.units[1], nbd.CMD_WRITE, 0, BLOCK, bytes(BLOCK))
            world.settle(3)
            self.assertTrue(world.group.units[1].errors)
            world.crash(nothing)
            world.start()
            self.assertEqual(world.group.state, state)
            self.assertIn(f"/near/{name} failed", world.group.status()["reason"])
            self.assertEqual(world.devices[f"/near/{name}"].syncs, 0)

    def test_foreign_log_is_refused_and_everything_is_closed(self) -> None:
        world = DriverWorld(self, ldsus=2)
        world.devices["/near/log0"], world.devices["/near/log1"] = world.log(1), world.log(0)
        failure = self.failureResultOf(world.begin(), MismatchError)
        self.assertIn("writelog of qds1", failure.getErrorMessage())
        self.assertTrue(world.data(0).closed and world.log(0).closed)

    def test_stop_applies_everything_and_leaves_nothing_to_replay(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        requests = [world.client.write(unit, n * BLOCK, unique(n)) for n in range(20)]
        world.step("qds0 writelog", 2)
        stopped = world.group.stop()
        self.assertNoResult(stopped)
        world.settle()
        self.successResultOf(stopped)
        self.assertEqual(world.client.done, requests)
        self.assertEqual(
            world.data().durable()[: 20 * BLOCK], b"".join(unique(n) for n in range(20))
        )
        self.assertEqual(world.reactor.getDelayedCalls(), [])
        self.assertTrue(world.data().closed and world.log().closed)
        superblock = read_superblock(world.log().reopen())
        self.assertEqual(superblock.applied.position, superblock.head.position)
        self.assertEqual(superblock.applied.gsn, 21)

    def test_stop_with_a_full_log_ends(self) -> None:
        world = DriverWorld(self, log=256 * KIB)
        unit = world.start()
        for number in range(100):
            world.client.write(unit, number * BLOCK, unique(number))
        self.assertLess(len(world.client.done), 100)
        world.client.gone = True  # what ending the NBD server makes of every client
        stopped = world.group.stop()
        world.settle(3)
        self.successResultOf(stopped)

    def test_numbers_go_on_after_a_restart(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        world.settle(2)
        point = unit.framed_point
        world.kill()
        unit = world.start()
        self.assertEqual(unit.framed_point, point)
        world.client.write(unit, 0, unique(2))
        self.assertEqual(world.frames[0].gsn_last, 2)
        self.assertEqual(world.frames[0].sequence, 2)


class RefreshTests(SynchronousTestCase):
    """What a refresh sends, and the writes between, make the mirror equal (rules.md 14)."""

    def test_frames_in_their_order_make_the_device(self) -> None:
        self.patch(refresh_module, "REFRESH_READ_BYTES", 4 * BLOCK)
        for seed in range(8):
            self._one_refresh(Random(seed), f"seed {seed}")

    def test_progress_is_what_the_secondary_has_committed(self) -> None:
        """A power cut may take what is framed: a resumed refresh must send it again."""
        world = DriverWorld(self)
        world.data().corrupt(0, unique(1, 64 * KIB))
        world.start()
        world.attach()
        world.group.refresh("full")
        job = world.group.refresh_job
        assert job is not None
        world.settle(1)
        self.assertGreater(world.group.durable_gsn, 1)
        world.commit(1)
        self.assertEqual(job.status()["done_bytes"], 0)
        world.commit()
        self.assertGreater(job.status()["done_bytes"], 0)

    def _one_refresh(self, random: Random, told: str) -> None:
        world = DriverWorld(self, log=3 * MIB, size=32 * BLOCK, stepped=True)
        content = b"".join(unique(1000 + n) for n in range(12))
        world.data().corrupt(8 * BLOCK, content)
        unit = world.start()
        world.attach()
        begun = world.group.refresh("full")
        number = 0
        while world.group.refresh_job is not None and number < 200:
            number += 1
            block = random.randrange(29)
            if unit.waiting._locked is not None and random.random() < 0.5:
                # Twice into the chunk that is being read or found to be a hole.
                block = min(29, unit.waiting._locked[0] // BLOCK)
                world.client.write(unit, block * BLOCK, unique(1000 + number, 2 * BLOCK))
            if random.random() < 0.3:
                world.client.ask(unit, nbd.CMD_TRIM, block * BLOCK, 2 * BLOCK)
            elif random.random() < 0.5:
                world.client.write(unit, block * BLOCK, unique(number, 3 * BLOCK))
            for _ in range(random.randrange(6)):
                random.choice(list(world.steps.values())).step()
            world.reactor.advance(random.choice((0.0, 0.002)))
            if random.random() < 0.1:
                world.commit()
        for _ in range(50):
            world.settle(1)
            world.commit()
        self.successResultOf(begun)
        self.assertTrue(world.group.coherent, told)
        mirror = bytearray(b"?" * world.data().size)
        for found in unit.writelog.reader(Cursor()):
            if found.header.kind != frames.ENTRIES:
                continue
            for entry in frames.entries(found.header, found.frame):
                data = bytes(entry.length) if entry.payload is None else entry.payload
                mirror[entry.offset : entry.offset + entry.length] = data
        self.assertTrue(bytes(mirror) == world.data().content(), told)
        world.kill()


class AttachmentTests(SynchronousTestCase):
    """What a pmd is told, and which pmd counts."""

    def test_not_before_the_driver_serves(self) -> None:
        world = DriverWorld(self)
        world.start()
        self.successResultOf(world.group.stop())
        self.assertRaises(QdsError, world.group.attach_pmd)

    def test_pmd_learns_what_is_durable_and_reads_it(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        info, descriptors, end = world.group.attach_pmd()
        self.addCleanup(os.close, end)
        self.addCleanup(os.close, descriptors[0])
        world.client.write(unit, 0, unique(1), fua=True)
        said = list(watermark.WatermarkParser().feed(world.reactor.adopted[-1].transport.value()))
        self.assertEqual(said[-1][0], watermark.DURABLE)
        self.assertEqual(watermark.parse_durable(said[-1][1]), (1, [(0, unit.durable_end)]))
        out = OutUnit.from_info(info["units"][0], {GENERATION}, iter(descriptors))
        frames = out.read_from(out.committed).read(1 << 20, unit.durable_end)
        self.assertEqual([f.header.gsn_first for f in frames], [1])
        self.assertRaises(OSError, os.write, descriptors[0], b"x")

    def test_pmd_that_reads_slowly_gets_the_newest_state(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        world.pmd.pauseProducing()
        for number in range(10):
            world.client.write(unit, 0, unique(number), fua=True)
        self.assertEqual(world.pmd.transport.value(), b"")
        world.pmd.resumeProducing()
        said = list(watermark.WatermarkParser().feed(world.pmd.transport.value()))
        self.assertEqual(
            [watermark.parse_durable(s[1]) for s in said], [(10, [(0, unit.durable_end)])]
        )

    def test_only_the_latest_attachment_counts(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        old = world.pmd
        world.attach()
        self.assertTrue(old.transport.disconnecting)
        world.client.write(unit, 0, unique(1), fua=True)
        world.pmd, new = old, world.pmd
        world.commit()
        old.dataReceived(watermark.pack_json(watermark.LINK, {"state": "connected", "reason": ""}))
        self.assertEqual(world.group.committed_gsn, 0)
        self.assertEqual(world.group.state.value, "accumulating")
        old.connectionLost()
        new.dataReceived(
            watermark.pack_json(
                watermark.LINK, {"state": "connected", "reason": "", "code": 0, "pid": 7}
            )
        )
        world.pmd = new
        world.commit()
        self.assertEqual(world.group.committed_gsn, 1)
        self.assertEqual(world.group.status()["state"], "connected")
        self.assertEqual(world.group.status()["pmd"]["pid"], 7)
        new.connectionLost()
        self.assertEqual(world.group.status()["state"], "accumulating")
        self.assertEqual(world.group.status()["pmd"]["state"], "stopped")

    def test_babble_ends_the_attachment(self) -> None:
        world = DriverWorld(self)
        world.start()
        world.attach()
        world.pmd.dataReceived(b"\xff" * 64)
        self.assertTrue(world.pmd.transport.disconnecting)

    def test_resume_after_a_kill_between_two_superblocks(self) -> None:
        """The committed places of the LDSUs are of different age; each must still be readable."""
        world = DriverWorld(self, ldsus=2, stepped=True)
        first, second = world.start(), world.group.units[1]
        world.attach()
        for number in range(4):
            unit = (first, second)[number % 2]
            world.client.write(unit, 0, unique(number))
            world.settle(0.01)
        world.commit()
        world.reactor.advance(1.5)
        for name in ("qds0 data", "qds1 data"):
            world.steps[name].step_all()
        world.steps["qds0 commit"].step_all()
        world.kill()
        places = [read_superblock(world.log(i)).tail for i in (0, 1)]
        self.assertGreater(places[0].gsn, places[1].gsn)
        world.start()
        info, descriptors, end = world.group.attach_pmd()
        for descriptor in (*descriptors, end):
            self.addCleanup(os.close, descriptor)
        for index, unit in enumerate(world.group.units):
            out = OutUnit.from_info(info["units"][index], {GENERATION}, iter(descriptors[index:]))
            point = unit.framed_point
            found = out.find(Point(point.sequence, point.chain))
            self.assertEqual(found.position, unit.durable_end)

    def test_resume_after_two_kills_in_a_row(self) -> None:
        """The first leaves tails of different age; the start after it must not mix them."""
        world = DriverWorld(self, ldsus=2, stepped=True)
        world.start()
        world.attach()
        for number in range(4):
            world.client.write(world.group.units[number % 2], 0, unique(number))
            world.settle(0.01)
        world.commit()
        world.reactor.advance(1.5)
        for name in ("qds0 data", "qds1 data", "qds0 commit"):
            world.steps[name].step_all()
        for _ in range(2):
            world.kill()
            world.start()
        tails = [read_superblock(world.log(index)).tail for index in (0, 1)]
        self.assertGreater(tails[0].position, tails[1].position)
        for unit, tail in zip(world.group.units, tails, strict=True):
            found = [frame.end for frame in unit.writelog.reader(tail)]
            self.assertEqual([tail.position, *found][-1], unit.durable_end)

    def test_places_outside_the_log_are_ignored(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        world.client.write(unit, 0, unique(1), fua=True)
        world.commit(1, [Committed(0, unit.durable_end + BLOCK, 9, bytes(16))])
        self.assertEqual(unit.committed_end, 0)


class StatusTests(SynchronousTestCase):
    """What qdsinfo is told."""

    def test_lag_grows_with_time_and_ends_with_the_commit(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        self.assertEqual(world.group.status()["lag"], {"entries": 0, "bytes": 0, "seconds": 0.0})
        for number in range(3):
            world.client.write(unit, number * BLOCK, unique(number))
            world.reactor.advance(1)
        told = world.group.status()
        self.assertEqual(told["lag"]["entries"], 3)
        self.assertGreaterEqual(told["lag"]["bytes"], 3 * BLOCK)
        self.assertAlmostEqual(told["lag"]["seconds"], 3.0, 1)
        world.commit(2)
        self.assertAlmostEqual(world.group.status()["lag"]["seconds"], 1.0, 1)
        world.commit(3)
        told = world.group.status()
        self.assertEqual((told["lag"]["entries"], told["lag"]["seconds"]), (0, 0.0))
        self.assertEqual(
            told["gsn"],
            {"written": 3, "durable": 3, "applied": 3, "sent": 3, "committed": 3, "mirrored": 3},
        )

    def test_client_that_is_gone_is_forgotten(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        connection = FakeConnection()
        unit.attach(connection)
        unit.detach(connection)
        self.assertEqual(unit.connections, set())
