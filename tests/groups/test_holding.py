"""A checkpoint on the secondary: durable, and nothing passes it, whatever comes between."""

from __future__ import annotations

import errno
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from qdsmirror.core.frames import MARK, REFRESH_BEGIN, REFRESH_END
from qdsmirror.core.held import Held, mark_name, pack_mark
from qdsmirror.errors import (
    CorruptError,
    DegradedError,
    DeviceFailedError,
    ProtocolError,
    UsageError,
)
from qdsmirror.groups import committing as committing_module
from qdsmirror.groups.mirrorexport import MirrorExport
from qdsmirror.storage import journal as journal_module
from tests.fakes import MemoryDevice, StepWorker, everything, nothing
from tests.groups.test_remote import JOURNAL, MIRROR, RemoteWorld
from tests.groups.world import BLOCK, FakeConnection, unique
from tests.storage.logworld import write

KIB = 1024


class Listener:
    """Where the NBD server would be."""

    def __init__(self, exports: Any) -> None:
        self.exports = exports
        self.connections: set[object] = set()
        self.closed = False
        self.gone: Deferred[None] = Deferred()

    def stopListening(self) -> None:  # noqa: N802
        self.closed = True

    def disconnect_all(self) -> Deferred[None]:
        if not self.connections:
            self.gone.callback(None)
        return self.gone


class Bound:
    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


class HoldingWorld(RemoteWorld):
    """A secondary whose mirror is usable."""

    def __init__(self, test: SynchronousTestCase, journal: int = 1 << 20) -> None:
        super().__init__(test, journal)
        self.listeners: list[Listener] = []
        self.start()
        mirror = self.group.mirror
        assert mirror is not None
        mirror.journal.update(both=True, coherent=True, reason="")
        self.link = self.connect()

    def begin(self) -> Deferred[Any]:
        def listen(_reactor: Any, _fd: int, exports: Any, _budget: Any) -> Listener:
            self.listeners.append(Listener(exports))
            return self.listeners[-1]

        self.runtime_changes = {"listen": listen, "bind": lambda _path: Bound()}
        return super().begin()

    def write(self, count: int = 1) -> None:
        """Let frames arrive; the GSN's bytes, at the block of the same number, LDSU by LDSU."""
        for _ in range(count):
            self.deliver(self.link, self.frame(self.maker.gsn % 2))
        self.settle()

    def mark(self, name: str) -> None:
        self.deliver(self.link, self.maker.make(0, kind=MARK, control=pack_mark(name)))

    def switch(self, to: str, name: str = "", hold: str = "") -> Deferred[dict[str, Any]]:
        return self.group.switch_checkpoint(to, name, hold)

    def on(self, name: str = "backup", hold: str = "") -> dict[str, Any]:
        told = self.switch("on", name, hold)
        self.settle()
        return self.test.successResultOf(told)["checkpoint"]  # type: ignore[no-any-return]

    def off(self, force: bool = False) -> None:
        told = self.switch("off", hold="force" if force else "")
        self.settle()
        self.test.successResultOf(told)

    def mirrored(self) -> list[int]:
        """Give the GSNs whose bytes are on the mirror devices."""
        return [gsn for gsn in range(1, self.maker.gsn) if self.block(gsn % 2, gsn) == unique(gsn)]

    @property
    def held(self) -> Held | None:
        return Held.from_json(self.superblock.checkpoint)


class NameTests(SynchronousTestCase):
    def test_a_mark_has_a_name_that_a_terminal_can_bear(self) -> None:
        self.assertEqual(mark_name(pack_mark("nightly:2026-11-23T01.00_x")),
                         "nightly:2026-11-23T01.00_x")  # fmt: skip
        self.assertEqual(mark_name(pack_mark("x" * 64)), "x" * 64)
        for name in ("", "x" * 65, " a", "-a", "a\x1b[2J", "ä"):
            self.assertRaises(UsageError, pack_mark, name)
            self.assertRaises(CorruptError, mark_name, name.encode().ljust(64, b"\0") + b"\xff")

    def test_a_mark_without_one_is_refused_at_the_door(self) -> None:
        world = HoldingWorld(self)
        frame = world.maker.make(0, kind=MARK, control=b"\x1b[2J".ljust(64, b"\0"))
        self.assertRaises(ProtocolError, world.deliver, world.link, frame)


class HoldTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = HoldingWorld(self)

    def test_holds_while_the_journal_goes_on(self) -> None:
        world = self.world
        world.write(3)
        told = world.on()
        self.assertEqual((told["name"], told["gsn"], told["hold"]), ("backup", 3, "release"))
        world.write(5)
        self.assertEqual(world.reached, (8, 3))
        self.assertEqual(world.link.acks[-1].committed, 8)
        self.assertEqual(world.mirrored(), [1, 2, 3])
        self.assertEqual(world.group.committing.unmirrored_bytes, 0)  # type: ignore[union-attr]
        world.off()
        self.assertEqual(world.reached, (8, 8))
        self.assertEqual(world.mirrored(), list(range(1, 9)))
        self.assertEqual(world.link.acks[-1].mirrored, 8)
        world.write(2)
        self.assertEqual(world.mirrored(), list(range(1, 11)))

    def test_durable_before_it_is_told(self) -> None:
        world = self.world
        world.write(2)
        told = world.switch("on", "backup")
        world.deliver(world.link, world.frame())
        self.assertNoResult(told)
        world.settle()
        self.successResultOf(told)
        world.crash(nothing)
        self.assertEqual(world.held, world.held and world.held._replace(name="backup", gsn=2))
        world.start()
        self.assertEqual(world.reached, (3, 2))
        self.assertEqual(world.mirrored(), [1, 2])

    def test_a_restart_and_a_replay_stop_at_it(self) -> None:
        world = self.world
        world.write(3)
        world.on()
        world.write(4)
        for choose in (nothing, everything):
            world.crash(choose)
            world.start()
            world.link = world.connect()
            self.assertEqual(world.mirrored(), [1, 2, 3])
            self.assertEqual(world.reached[1], 3)
            world.write(1)
        self.assertEqual(world.reached, (9, 3))
        self.assertEqual(len(world.listeners), 3)
        world.off()
        self.assertEqual(world.mirrored(), list(range(1, 10)))
        world.crash()
        world.start()
        self.assertEqual(world.mirrored(), list(range(1, 10)))
        self.assertIsNone(world.held)

    def test_a_release_that_a_crash_interrupts(self) -> None:
        world = self.world
        world.write(1)
        world.on()
        world.write(3)
        world.switch("off")
        world.step(MIRROR)
        world.crash()
        self.assertIsNone(world.held)
        world.start()
        self.assertEqual(world.mirrored(), [1, 2, 3, 4])

    def test_what_is_under_way_is_on_the_mirror_first(self) -> None:
        world = self.world
        for _ in range(2):
            world.deliver(world.link, world.frame(world.maker.gsn % 2))
            world.step(JOURNAL)
        told = world.switch("on", "now")
        world.settle()
        # The first was being applied; the second was kept for later.
        self.assertEqual(self.successResultOf(told)["checkpoint"]["gsn"], 1)
        self.assertEqual(world.mirrored(), [1])
        world.off()
        self.assertEqual(world.mirrored(), [1, 2])

    def test_refused_while_the_mirror_is_refreshed(self) -> None:
        world = self.world
        world.deliver(world.link, world.maker.make(0, kind=REFRESH_BEGIN, control=b"R" * 16))
        world.step(JOURNAL)
        # It was usable when this was asked for.
        told = world.switch("on", "early")
        world.settle()
        error = self.failureResultOf(told, DegradedError).value
        self.assertIn("a refresh is in progress", error.message)
        self.assertIn("--wait coherent", error.hint)
        self.failureResultOf(world.switch("on", "again"), DegradedError)
        world.deliver(world.link, world.maker.make(0, kind=REFRESH_END, control=b"R" * 16))
        world.settle()
        self.assertEqual(world.on()["gsn"], 2)

    def test_refused_where_it_means_nothing(self) -> None:
        world = self.world
        self.failureResultOf(world.switch("off"), DegradedError)
        for words in (("on", "bad name"), ("on", "good", "loose"), ("up", "")):
            with self.assertRaises(UsageError):
                told = world.switch(*words)
                self.failureResultOf(told).raiseException()
        world.on("one")
        error = self.failureResultOf(world.switch("on", "two"), DegradedError).value
        self.assertIn("checkpoint one holds already", error.message)
        self.assertIn("qdscheckpoint off", error.hint)
        self.assertEqual(self.successResultOf(world.switch("list"))["checkpoint"]["name"], "one")

    def test_a_history_is_not_replaced_under_it(self) -> None:
        world = self.world
        world.write(1)
        world.on()
        world.group.supersede()
        error = self.failureResultOf(world.group.rebase([]), ProtocolError).value
        self.assertIn("backup holds", error.message)

    def test_a_failed_device_ends_the_asking(self) -> None:
        world = self.world
        world.write(1)
        world.devices["/far/mirror0"].fail("fdatasync", errno.EIO)
        told = world.switch("on", "bad")
        world.settle()
        self.failureResultOf(told)
        self.assertIn("cannot be recorded", world.group.failed)
        self.failureResultOf(world.switch("on", "bad"), DeviceFailedError)

    def test_stopping_leaves_what_is_held_in_the_journal(self) -> None:
        world = self.world
        world.write(2)
        world.on()
        world.write(3)
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)
        self.assertTrue(world.listeners[-1].closed)
        world.devices = {path: device.reopen() for path, device in world.devices.items()}
        world.start()
        self.assertEqual(world.reached, (5, 2))

    def test_stopping_does_not_wait_for_all_to_be_caught_up(self) -> None:
        world = self.world
        self.patch(committing_module, "RECEIVED_BYTES_MAX", 1)
        world.write(2)
        world.on()
        world.write(30)
        self.patch(journal_module, "READ_BYTES", 4 * KIB)
        world.switch("off")
        while world.reached[1] == 2:
            self.assertTrue(any(worker.step() for worker in list(world.steps.values())))
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)
        world.devices = {path: device.reopen() for path, device in world.devices.items()}
        self.assertLess(world.superblock.applied.gsn, 10)
        world.start()
        self.assertEqual(world.reached, (32, 32))

    def test_frames_arrive_while_it_catches_up(self) -> None:
        """What was held is read in pieces; what arrives meanwhile is not kept in memory."""
        world = self.world
        world.on()
        world.write(20)
        self.patch(journal_module, "READ_BYTES", 4 * KIB)
        world.switch("off")
        for _ in range(10):
            world.deliver(world.link, world.frame(world.maker.gsn % 2))
            for name in list(world.steps):
                world.steps[name].step()
            self.assertEqual(world.group.committing.unmirrored_bytes, 0)  # type: ignore[union-attr]
        world.settle()
        self.assertEqual(world.mirrored(), list(range(1, 31)))
        world.write(1)
        self.assertEqual(world.mirrored(), list(range(1, 32)))


class MarkTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = HoldingWorld(self)

    def test_taken_exactly_there(self) -> None:
        """Whatever came with it in one burst."""
        world = self.world
        for _ in range(3):
            world.deliver(world.link, world.frame(world.maker.gsn % 2), ack=False)
        world.mark("nightly")
        for _ in range(3):
            world.deliver(world.link, world.frame(world.maker.gsn % 2))
        world.settle()
        self.assertEqual(world.reached, (7, 4))
        self.assertEqual(world.mirrored(), [1, 2, 3])
        held = world.held
        assert held is not None
        self.assertEqual((held.name, held.gsn, held.mark), ("nightly", 4, True))
        self.assertEqual(held.since, 1_700_000_000.0)
        self.assertEqual(list(world.listeners[-1].exports), ["qds0", "qds1"])
        world.off()
        self.assertEqual(world.mirrored(), [1, 2, 3, 5, 6, 7])

    def test_a_replay_stops_there(self) -> None:
        world = self.world
        world.write(2)
        world.mark("nightly")
        world.deliver(world.link, world.frame(0), ack=False)
        world.deliver(world.link, world.frame(0))
        world.step(JOURNAL)
        if world.steps[JOURNAL].waiting:
            world.step(JOURNAL)
        world.crash()
        world.start()
        self.assertEqual(world.reached, (5, 3))
        self.assertEqual(world.mirrored(), [1, 2])
        world.crash()
        world.start()
        self.assertEqual(world.reached, (5, 3))

    def test_the_next_one_waits_for_the_first_one_s_release(self) -> None:
        world = self.world
        world.mark("one")
        world.write(1)
        world.mark("two")
        world.write(1)
        self.assertEqual(world.reached, (4, 1))
        world.off()
        self.assertEqual(world.reached, (4, 3))
        self.assertEqual(world.held and world.held.name, "two")
        world.off()
        self.assertEqual(world.reached, (4, 4))

    def test_passed_over_loudly_where_the_mirror_is_not_usable(self) -> None:
        world = self.world
        world.deliver(world.link, world.maker.make(0, kind=REFRESH_BEGIN, control=b"R" * 16))
        world.mark("nightly")
        world.write(1)
        self.assertEqual(world.reached, (3, 3))
        self.assertIsNone(world.held)
        self.assertIn("no checkpoint at mark nightly", str(world.group.notes))

    def test_a_checkpoint_of_the_superblocks_does_not_go_back_behind_it(self) -> None:
        world = self.world
        world.write(2)
        for _ in range(2):
            world.deliver(world.link, world.frame(world.maker.gsn % 2))
        world.step(JOURNAL)
        world.mark("nightly")
        world.step(MIRROR)
        while world.steps[JOURNAL].step():
            pass
        world.reactor.advance(world.group.config.tunables.metadata_seconds)
        world.settle()
        held = world.held
        assert held is not None
        self.assertEqual(world.superblock.applied.gsn, held.gsn + 1)


class FullJournalTests(SynchronousTestCase):
    def fill(self, world: HoldingWorld, count: int) -> None:
        for _ in range(count):
            frame = world.maker.make(0, [write(0, unique(1) * 8)])
            world.deliver(world.link, frame)
            world.settle()

    def test_released_loudly_before_it_is_full(self) -> None:
        world = HoldingWorld(self, 256 * KIB)
        world.write(1)
        world.on()
        self.fill(world, 80)
        self.assertIsNone(world.held)
        self.assertEqual(world.reached, (81, 81))
        self.assertIn("checkpoint backup at GSN 1 is released: 7", str(world.group.notes))
        self.assertTrue(world.listeners[-1].closed)
        self.assertEqual(world.link.paused, False)

    def test_strict_presses_back(self) -> None:
        world = HoldingWorld(self, 256 * KIB)
        self.patch(committing_module, "RECEIVED_BYTES_MAX", 4 * KIB)
        world.write(1)
        world.on(hold="strict")
        self.fill(world, 80)
        held = world.held
        assert held is not None
        self.assertEqual(world.reached[1], 1)
        self.assertLess(world.reached[0], 81)
        self.assertTrue(world.link.paused)
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)

    def test_strict_goes_on_when_it_is_released(self) -> None:
        world = HoldingWorld(self, 256 * KIB)
        self.patch(committing_module, "RECEIVED_BYTES_MAX", 4 * KIB)
        world.on(hold="strict")
        self.fill(world, 80)
        world.off()
        self.assertEqual(world.reached, (80, 80))
        self.assertFalse(world.link.paused)

    def test_not_before_its_clients_are_gone(self) -> None:
        world = HoldingWorld(self, 256 * KIB)
        world.write(1)
        world.on()
        listener = world.listeners[-1]
        listener.connections.add(object())
        self.failureResultOf(world.switch("off"), DegradedError)
        self.fill(world, 80)
        self.assertTrue(listener.closed)
        self.assertIsNotNone(world.held)
        self.assertEqual(world.reached[1], 1)
        listener.connections.clear()
        listener.gone.callback(None)
        world.settle()
        self.assertIsNone(world.held)
        self.assertEqual(world.reached, (81, 81))


class ExportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.device = MemoryDevice(16 * BLOCK, path="/far/mirror0")
        self.device.pwritev([unique(3)], 3 * BLOCK)
        self.worker = StepWorker()
        self.export = MirrorExport("qds0", self.device, self.worker)
        self.client = FakeConnection()

    def ask(self, command: int, *arguments: Any) -> Any:
        return self.client.ask(self.export, command, *arguments)

    def test_reads_and_refuses_the_rest(self) -> None:
        read = self.ask(nbd.CMD_READ, 3 * BLOCK, BLOCK)
        self.worker.step()
        self.assertEqual(self.client.data[read], unique(3))
        before = self.device.content()
        for command, data in (
            (nbd.CMD_WRITE, bytes(BLOCK)),
            (nbd.CMD_TRIM, None),
            (nbd.CMD_WRITE_ZEROES, None),
        ):
            refused = self.ask(command, 0, BLOCK, data)
            self.assertEqual(self.client.errors[refused], errno.EPERM)
        self.assertEqual(self.device.content(), before)

    def test_a_read_that_fails(self) -> None:
        self.device.fail("pread", errno.EIO)
        read = self.ask(nbd.CMD_READ, 0, BLOCK)
        self.worker.step()
        self.assertEqual(self.client.errors[read], errno.EIO)
