"""The secondary's group in memory: what is durable when an ACK leaves, and whose frames count."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.config import HostConfig
from qdsmirror.core import stream
from qdsmirror.core.stream import ACK_REQUESTED, FRAME, Ack, Message
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import BrokenError, DeviceFailedError, ProtocolError
from qdsmirror.groups import remote as remote_module
from qdsmirror.groups.authority import Authority
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.session import Session
from qdsmirror.limits import MIRRORED_TOLD_SECONDS
from qdsmirror.net.handshake import RebasePosition
from qdsmirror.paths import Paths
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import Choice, MemoryDevice, StepWorker, nothing
from tests.groups.world import BLOCK, MIB, FakeReactor, group_config, unique
from tests.storage.logworld import GENERATION, OTHER_GENERATION, FrameMaker, initialise, write

JOURNAL, MIRROR = "dsgrp000 journal", "dsgrp000 mirror"


class FakeLink:
    """A connection of the primary: keeps the ACKs and why it was closed."""

    def __init__(self) -> None:
        self.acks: list[Ack] = []
        self.closed = ""
        self.paused = False
        self.reports: list[dict[str, Any]] = []

    method = "none"

    def paths_status(self) -> list[dict[str, Any]]:
        return []

    def acknowledge(self, committed: int, mirrored: int) -> None:
        self.acks.append(stream.Ack(committed, mirrored))

    def send(self, data: bytes) -> None:
        for message in stream.MessageParser().feed(data):
            self.reports.append(json.loads(bytes(message.payload)))

    def close(self, reason: str) -> None:
        self.closed = reason

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class RemoteWorld:
    """A secondary of two LDSUs, and the rmd's group over it, its workers stepped.

    :ivar runtime_changes: what else the group's runtime has.
    """

    runtime_changes: Mapping[str, Any] = {}

    def __init__(self, test: SynchronousTestCase, journal: int = MIB) -> None:
        self.test = test
        self.maker = FrameMaker()
        self.config = group_config(2)
        base = Path(tempfile.mkdtemp(prefix="qdsr", dir="/tmp"))
        test.addCleanup(shutil.rmtree, base)
        self.paths = Paths.of(base)
        self.paths.state_file(0).parent.mkdir(parents=True)
        test.patch(remote_module, "load_secret", lambda *_: bytes(32))
        sizes = {"/far/journal": journal, "/far/mirror0": MIB, "/far/mirror1": MIB}
        self.devices = {path: MemoryDevice(size, path=path) for path, size in sizes.items()}
        initialise(self.devices["/far/journal"], role="journal", sizes=[MIB, MIB], generations=())

    def begin(self) -> Deferred[Any]:
        self.reactor = FakeReactor()
        self.steps: dict[str, StepWorker] = {}

        def worker(name: str) -> StepWorker:
            return self.steps.setdefault(name, StepWorker())

        runtime = Runtime(
            reactor=self.reactor,
            open_device=lambda path, **_: self.devices[path],
            quick_worker=worker,
            slow_worker=worker,
            read_worker=worker,
            wall=self.reactor.seconds,
            server_tls=lambda *_: None,
            **self.runtime_changes,
        )
        host = HostConfig("beta", Path("c"), Path("k"), Path("a"))
        self.group = RemoteGroup(self.config, host, self.paths, self.reactor, runtime)
        return self.group.start()  # type: ignore[no-any-return]

    def start(self) -> RemoteGroup:
        self.test.successResultOf(self.begin())
        return self.group

    def crash(self, choose: Choice = nothing) -> None:
        """Cut the secondary's power."""
        self.devices = {path: device.crash(choose) for path, device in self.devices.items()}

    def connect(self) -> FakeLink:
        link = FakeLink()
        self.group.link_made(cast(Session, link))
        return link

    def frame(self, index: int = 0, block: int | None = None) -> bytes:
        """Make the group's next frame: the GSN's unique bytes, at the block of the same number."""
        number = self.maker.gsn
        at = (number if block is None else block) * BLOCK
        return self.maker.make(index, [write(at, unique(number))])

    def deliver(self, link: FakeLink, frame: bytes, ack: bool = True) -> None:
        message = Message(FRAME, ACK_REQUESTED if ack else 0, frame)
        self.group.link_message(cast(Session, link), message)

    def step(self, name: str) -> None:
        self.test.assertTrue(self.steps[name].step(), f"{name} has no job")

    def settle(self) -> None:
        while any(worker.step() for worker in list(self.steps.values())):
            pass
        self.reactor.advance(MIRRORED_TOLD_SECONDS)

    def block(self, index: int, block: int) -> bytes:
        return self.devices[f"/far/mirror{index}"].content()[block * BLOCK :][:BLOCK]

    @property
    def reached(self) -> tuple[int, int]:
        """The GSNs up to which the group has committed and mirrored."""
        committing = self.group.committing
        assert committing is not None
        return committing.committed_gsn, committing.mirrored_gsn

    @property
    def journal(self) -> MemoryDevice:
        return self.devices["/far/journal"]

    @property
    def superblock(self) -> Superblock:
        return read_superblock(self.journal)


class JournalTests(SynchronousTestCase):
    """A frame is in the durable journal before it is acknowledged, and before it is applied."""

    def test_time_until_it_is_full(self) -> None:
        """Nothing reaches the mirror devices: it fills at the rate of what comes."""
        world = RemoteWorld(self)
        group = world.start()
        link = world.connect()
        self.assertIs(group.status()["journal"]["seconds_to_full"], None)
        for _ in range(10):
            world.deliver(link, world.frame())
            while world.steps[JOURNAL].step():
                pass
            world.reactor.advance(1)
        told = group.status()["journal"]
        free = told["size"] - told["used_bytes"]
        wanted = free / (told["used_bytes"] / 10)
        self.assertApproximates(told["seconds_to_full"], wanted, wanted / 5)

    def test_how_old_what_is_not_mirrored_is(self) -> None:
        """Since it was committed, or the start; it knows no other clock than its own."""
        world, link = self.world, self.link
        told = self.group.status()
        self.assertEqual(
            (told["lag"]["seconds"], told["journal"]["oldest_age_seconds"]), (0.0, 0.0)
        )
        world.reactor.advance(5.0)
        for _ in range(2):
            world.deliver(link, world.frame())
            world.step(JOURNAL)
            world.reactor.advance(2.0)
        told = self.group.status()
        self.assertEqual(told["lag"]["entries"], 2)
        self.assertAlmostEqual(told["lag"]["seconds"], 4.0, 1)
        self.assertEqual(told["journal"]["oldest_age_seconds"], told["lag"]["seconds"])
        world.step(MIRROR)
        told = self.group.status()
        self.assertEqual(told["lag"]["entries"], 1)
        self.assertAlmostEqual(told["lag"]["seconds"], 2.0, 1)
        world.settle()
        self.assertEqual(self.group.status()["lag"], {"entries": 0, "bytes": 0, "seconds": 0.0})

    def setUp(self) -> None:
        self.world = RemoteWorld(self)
        self.group = self.world.start()
        self.link = self.world.connect()

    def test_ack_leaves_after_the_sync(self) -> None:
        world = self.world
        self.assertEqual(self.link.acks, [Ack(0, 0)])
        frame = world.frame()
        world.deliver(self.link, frame)
        self.assertEqual(self.link.acks, [Ack(0, 0)])
        self.assertEqual(world.block(0, 1), bytes(BLOCK))
        world.step(JOURNAL)
        self.assertIn(frame, world.journal.durable())
        self.assertEqual(self.link.acks, [Ack(0, 0), Ack(1, 0)])
        self.assertEqual(world.block(0, 1), bytes(BLOCK))
        world.step(MIRROR)
        self.assertEqual(world.block(0, 1), unique(1))
        self.assertEqual(self.link.acks[-1], Ack(1, 0))
        world.reactor.advance(MIRRORED_TOLD_SECONDS)
        self.assertEqual(self.link.acks[2:], [Ack(1, 1)])

    def test_what_is_mirrored_is_told_with_what_is_committed(self) -> None:
        """Each ACK costs the other side two turns."""
        world = self.world
        for gsn in range(1, 6):
            world.deliver(self.link, world.frame())
            world.step(JOURNAL)
            world.step(MIRROR)
            self.assertEqual(self.link.acks[-1], Ack(gsn, gsn - 1))
        self.assertEqual(len(self.link.acks), 6)
        world.settle()
        self.assertEqual(self.link.acks[6:], [Ack(5, 5)])
        world.reactor.advance(10 * MIRRORED_TOLD_SECONDS)
        self.assertEqual(len(self.link.acks), 7)

    def test_frames_that_come_during_a_sync_get_their_ack_after_the_next(self) -> None:
        """The mirror devices may be slow: what is committed does not wait for them."""
        world = self.world
        for _ in range(2):
            world.deliver(self.link, world.frame())
        world.step(JOURNAL)
        self.assertEqual(self.link.acks[-1], Ack(1, 0))
        world.step(JOURNAL)
        self.assertEqual(self.link.acks[-1], Ack(2, 0))

    def test_what_was_taken_is_counted(self) -> None:
        frames = [self.world.frame(index) for index in (0, 1, 0)]
        for frame in frames:
            self.world.deliver(self.link, frame)
        first, second = self.group.status()["traffic"]["ldsus"]
        expected = {"name": "qds0", "frame_bytes": len(frames[0] + frames[2])}
        counts = {"data_bytes": 2 * BLOCK, "entries": 2, "refresh_bytes": 0, "verify_bytes": 0}
        self.assertEqual(first, {**expected, **counts})
        self.assertEqual((second["name"], second["entries"]), ("qds1", 1))

    def test_what_was_acknowledged_survives_a_power_cut(self) -> None:
        world = self.world
        for number in range(6):
            world.deliver(self.link, world.frame(number % 2))
        world.step(JOURNAL)
        world.step(JOURNAL)
        committed = self.link.acks[-1].committed
        self.assertEqual(committed, 6)
        world.crash()
        world.start()
        self.assertEqual(world.reached, (6, 6))
        for gsn in range(1, 7):
            self.assertEqual(world.block((gsn - 1) % 2, gsn), unique(gsn))

    def test_checkpoint_frees_only_what_is_on_the_mirror(self) -> None:
        world = self.world
        for _ in range(2):
            world.deliver(self.link, world.frame())
            world.step(JOURNAL)
        # GSN 1 is being applied; GSN 2 is durable in the journal and nowhere else.
        world.reactor.advance(self.group.config.tunables.metadata_seconds)
        world.step(MIRROR)
        self.assertEqual(world.reached[1], 1)
        while world.superblock.applied.position == 0 and world.steps[MIRROR].waiting:
            world.reactor.advance(self.group.config.tunables.metadata_seconds)
            world.step(MIRROR)
            self.assertLessEqual(world.superblock.applied.gsn - 1, world.reached[1])
        world.crash()
        world.start()
        self.assertEqual([world.block(0, gsn) for gsn in (1, 2)], [unique(1), unique(2)])

    def test_failed_sync_is_never_acknowledged(self) -> None:
        world = self.world
        world.journal.fail("fdatasync")
        world.deliver(self.link, world.frame())
        world.step(JOURNAL)
        self.assertEqual(self.link.acks, [Ack(0, 0)], "LOUD")
        self.assertIn("journal /far/journal", self.link.closed)
        self.assertIn("journal /far/journal", self.group.failed)
        self.assertEqual(self.group.link_state["state"], "refused")
        again = world.connect()
        world.deliver(again, world.frame())
        world.settle()
        self.assertEqual(again.acks, [Ack(0, 0)])
        self.assertEqual(world.block(0, 1), bytes(BLOCK))
        self.assertRaises(DeviceFailedError, self.group.supersede)
        # The next process must not believe the kernel's next fsync (rules.md 4).
        world.crash()
        error = self.failureResultOf(world.begin())
        error.trap(BrokenError)
        self.assertIn("/far/journal has failed", error.getErrorMessage())

    def test_failed_mirror_device_is_not_reported_as_mirrored(self) -> None:
        world = self.world
        world.devices["/far/mirror0"].fail("pwritev", errno.EIO)
        world.deliver(self.link, world.frame())
        world.settle()
        self.assertEqual(self.link.acks[-1].mirrored, 0)
        self.assertIn("mirror device", self.group.failed)
        self.assertEqual(world.superblock.applied.position, 0)


class SessionTests(SynchronousTestCase):
    """One writer: a newer session ends the older, and nothing of it is left (rules.md 17)."""

    def setUp(self) -> None:
        self.world = RemoteWorld(self)
        self.group = self.world.start()
        self.link = self.world.connect()

    def test_frames_that_were_not_journaled_count_as_never_received(self) -> None:
        world = self.world
        frame = world.frame()
        world.deliver(self.link, frame, ack=False)
        self.group.supersede()
        self.assertIn("superseded", self.link.closed)
        self.assertEqual(self.group.position(0).next_sequence, 1)
        link = world.connect()
        world.deliver(link, frame)
        world.settle()
        self.assertEqual(link.acks[-1], Ack(1, 1))
        self.assertEqual(world.journal.durable().count(frame), 1)
        world.deliver(link, world.frame())
        world.settle()
        world.crash()
        world.start()
        self.assertEqual(world.reached[0], 2)

    def test_no_position_is_told_while_frames_are_being_committed(self) -> None:
        world = self.world
        world.deliver(self.link, world.frame())
        self.assertRaises(ProtocolError, self.group.supersede)
        world.settle()
        self.group.supersede()
        self.assertEqual(self.group.position(0).next_sequence, 2)
        self.assertEqual(self.group.position(0).next_gsn, 2)

    def test_older_connections_frames_are_not_taken(self) -> None:
        world = self.world
        newer = world.connect()
        self.assertIn("superseded", self.link.closed)
        world.deliver(self.link, world.frame())
        world.settle()
        self.assertEqual(world.reached[0], 0)
        self.group.link_lost(cast(Session, self.link), "gone")
        self.assertEqual(self.group.link_state["state"], "connected")
        self.assertEqual(newer.closed, "")

    def test_handshake_that_was_overtaken_does_not_begin(self) -> None:
        def mapped() -> Authority:
            authority = Authority(self.group, lambda: None)
            for index in range(2):
                authority.map_ldsu(index, f"qds{index}", MIB)
            return authority

        slow = mapped()
        mapped().start(bytes(16), 1, "none")
        quick = self.world.connect()
        self.world.deliver(quick, self.world.frame())
        self.world.settle()
        self.group.link_lost(cast(Session, quick), "gone")
        self.assertRaises(ProtocolError, slow.start, bytes(16), 1, "none")
        mapped().start(bytes(16), 1, "none")

    def test_what_arrived_before_the_loss_is_committed(self) -> None:
        world = self.world
        world.deliver(self.link, world.frame(), ack=False)
        self.group.link_lost(cast(Session, self.link), "gone")
        world.settle()
        self.assertEqual(self.group.position(0).next_sequence, 2)


class RebaseTests(SynchronousTestCase):
    """A refresh replaces the history: incoherent first, durably, in both slots (COHERENT)."""

    def points(self) -> list[RebasePosition]:
        return [
            RebasePosition(index, OTHER_GENERATION, GENERATION, 9, b"C" * 16, 20, b"R" * 16)
            for index in range(2)
        ]

    def received(self) -> RemoteWorld:
        """Give a secondary whose mirror has a frame, in the page cache."""
        world = RemoteWorld(self)
        self.group = world.start()
        world.deliver(world.connect(), world.frame())
        world.settle()
        self.assertNotEqual(world.devices["/far/mirror0"].unsynced, [])
        return world

    def test_what_the_mirror_has_is_synced_before(self) -> None:
        """A dirty refresh does not bring it again."""
        world = self.received()
        self.group.supersede()
        done = self.group.rebase(self.points())
        world.settle()
        self.successResultOf(done)
        self.assertEqual(world.devices["/far/mirror0"].unsynced, [])

    def test_a_device_that_fails_in_it(self) -> None:
        """LOUD: nothing is taken any more, and it is named."""
        for path, method in (("/far/mirror1", "fdatasync"), ("/far/journal", "pwritev")):
            with self.subTest(path):
                world = self.received()
                self.group.supersede()
                world.devices[path].fail(method)
                done = self.group.rebase(self.points())
                world.settle()
                self.failureResultOf(done, DeviceFailedError)
                self.assertIn("another history cannot be begun", self.group.failed)
                self.assertIn(path, self.group.failed)
                self.assertRaises(DeviceFailedError, self.group.supersede)

    def test_incoherent_with_the_new_history(self) -> None:
        world = RemoteWorld(self)
        group = world.start()
        link = world.connect()
        world.deliver(link, world.frame())
        world.settle()
        mirror = group.mirror
        assert mirror is not None
        mirror.journal.update(both=True, coherent=True, reason="")
        refresh_id = b"R" * 16
        points = [
            RebasePosition(
                index=index,
                generation=OTHER_GENERATION,
                predecessor=GENERATION,
                next_sequence=9,
                chain=b"C" * 16,
                next_gsn=20,
                refresh_id=refresh_id,
            )
            for index in range(2)
        ]
        group.supersede()
        done = group.rebase(points)
        world.settle()
        self.successResultOf(done)
        status = group.status()
        self.assertEqual(status["modes"], ["refresh", "connected"])
        self.assertEqual([one["mode"] for one in status["mode_details"]], status["modes"])
        self.assertTrue(all(one["reason"] for one in status["mode_details"]))
        size = world.superblock.slot_bytes
        for slot in range(2):
            device = MemoryDevice(MIB, content=world.journal.durable())
            device.corrupt((1 - slot) * size, bytes(512))
            found = read_superblock(device)
            self.assertFalse(found.coherent, f"slot {slot}")
            self.assertEqual((found.refresh or {}).get("id"), refresh_id.hex())
            self.assertEqual(found.generation, OTHER_GENERATION)
        self.assertEqual(world.reached[0], 19)
        told: Any = group.position(1)
        self.assertEqual((told.generation, told.next_sequence), (OTHER_GENERATION, 9))
        world.crash()
        self.assertEqual(world.start().position(0).next_gsn, 20)
