"""What throttles hold back: pauses before entries are sent, before writes are answered, a limit."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.compression import Method
from qdsmirror.core.frames import VOID
from qdsmirror.core.nbd import Request
from qdsmirror.core.pacing import tls_bytes
from qdsmirror.errors import UsageError
from qdsmirror.groups.holdback import HoldBack, parse_knobs
from qdsmirror.limits import MIB, THROTTLE_SLEEP_USEC_MAX
from tests.groups.test_band import World as BandWorld
from tests.groups.test_outbound import PmdWorld
from tests.groups.world import BLOCK, DriverWorld, FakeConnection, unique
from tests.storage.logworld import KIB

#: So many buffers do not leave at once.
_SENDS_MAX = 1000


def knobs(**values: int) -> str:
    """Give knobs as a daemon is told them."""
    return json.dumps(values)


class CountingClock(Clock):
    """A clock that counts how often it is read."""

    read = 0

    def seconds(self) -> float:
        self.read += 1
        return super().seconds()


class KnobsTests(SynchronousTestCase):
    def test_what_is_not_told_stays(self) -> None:
        known = {"sleep_us": 5, "limit_kbps": 7}
        self.assertEqual(parse_knobs("{}", known), known)
        self.assertEqual(parse_knobs(knobs(sleep_us=0), known), {"sleep_us": 0, "limit_kbps": 7})

    def test_what_cannot_be_is_refused(self) -> None:
        known = {"sleep_us": 5, "limit_kbps": 7}
        for text in (
            "", "[]", "5", '{"sleep_us": -1}', '{"sleep_us": 1.5}', '{"sleep_us": true}',
            '{"sleep_us": "1"}', '{"writesleep_us": 1}', '{"limit_kbps": null}', "[" * 100_000,
            knobs(sleep_us=THROTTLE_SLEEP_USEC_MAX + 1),
        ):  # fmt: skip
            self.assertRaises(UsageError, parse_knobs, text, known)


class SleepTests(SynchronousTestCase):
    def world(self, frames: int, sleep_us: int = 10_000, **more: Any) -> PmdWorld:
        world = PmdWorld(self, **more)
        world.hold_back.set(knobs(sleep_us=sleep_us))
        for _ in range(frames):
            world.frame(0)
        world.durable()
        world.begin()
        return world

    def test_a_pause_before_each_entry(self) -> None:
        world = self.world(3)
        sent = []
        for _ in range(4):
            sent.append(len(world.link.sent))
            world.clock.advance(0.01)
        self.assertEqual(sent, [0, 1, 2, 3])

    def test_nobody_is_waited_for_when_all_is_sent(self) -> None:
        world = self.world(1)
        world.clock.advance(0.01)
        self.assertEqual(world.clock.getDelayedCalls(), [])
        world.clock.advance(10)
        world.frame(0)
        world.durable()
        self.assertEqual(world.link.sent, [1])
        world.clock.advance(0.01)
        self.assertEqual(world.link.sent, [1, 2])

    def test_less_sleep_counts_at_once(self) -> None:
        world = self.world(3, sleep_us=10_000_000)
        world.clock.advance(5)
        self.assertEqual(world.link.sent, [])
        world.hold_back.set(knobs(sleep_us=1_000_000))
        self.assertEqual(world.link.sent, [1])
        world.hold_back.set(knobs(sleep_us=0))
        self.assertEqual(world.link.sent, [1, 2, 3])
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def test_frames_of_the_group_itself_do_not_wait(self) -> None:
        world = self.world(0)
        world.frame(0, kind=VOID, gsns=5)
        world.durable()
        self.assertEqual(world.link.sent, [1])

    def test_short_pauses_go_together_behind_late_timers(self) -> None:
        world = self.world(200, sleep_us=100)
        for _ in range(20):
            # A timer of the system is never that exact.
            world.clock.advance(0.001)
        self.assertTrue(195 <= len(world.link.sent) <= 200, len(world.link.sent))

    def test_the_end_of_a_session_ends_its_timers(self) -> None:
        world = self.world(3)
        world.out.end()
        world.hold_back.end()
        self.assertEqual(world.clock.getDelayedCalls(), [])
        self.assertEqual(world.hold_back.status(), {"sleep_us": 10_000, "limit_kbps": 0})


class LimitTests(SynchronousTestCase):
    def send(self, world: BandWorld, seconds: int, length: int, step: float = 0.05) -> list[int]:
        """Have always more to send; give how many bytes leave in each second."""
        seen, rates = 0, []
        for _ in range(seconds):
            for _ in range(round(1 / step)):
                for _ in range(_SENDS_MAX):
                    if not world.band.can_send:
                        break
                    world.send(length=length)
                    for worker in world.workers:
                        worker.step_all()
                else:
                    self.fail("there is no limit")
                world.clock.advance(step)
            now = world.near_wire.wire_bytes
            rates.append(now - seen)
            seen = now
        return rates

    def test_so_many_bytes_a_second(self) -> None:
        for paths in (1, 2):
            world = BandWorld(paths)
            world.hold_back.set(knobs(limit_kbps=200))
            rates = self.send(world, 20, 4 * KIB)
            for rate in rates[1:]:
                self.assertLess(abs(rate / 200 / KIB - 1), 0.05, rates)

    def test_with_what_tls_adds_after_compression(self) -> None:
        world = BandWorld(1, Method.of("lz4"))
        world.hold_back.set(knobs(limit_kbps=200))
        self.send(world, 20, 64 * KIB)
        # Frames that shrink to next to nothing: so TLS is much of it.
        sent = world.near_wire.wire_bytes
        self.assertLess(sent, world.near_wire.frame_bytes / 10)
        self.assertTrue(0.85 < sent / 20 / 200 / KIB < 1, sent)

    def test_frames_longer_than_a_seconds_worth(self) -> None:
        world = BandWorld(1)
        world.hold_back.set(knobs(limit_kbps=100))
        rates = self.send(world, 300, MIB - 8 * KIB)
        self.assertLess(abs(sum(rates) / 300 / 100 / KIB - 1), 0.05)

    def test_late_timers_cost_nothing(self) -> None:
        world = BandWorld(1)
        world.hold_back.set(knobs(limit_kbps=1000))
        rates = self.send(world, 10, 4 * KIB, step=0.09)
        self.assertLess(abs(sum(rates) / 9.9 / 1000 / KIB - 1), 0.05)

    def test_it_is_lifted_at_once(self) -> None:
        world = BandWorld(1)
        world.hold_back.set(knobs(limit_kbps=1))
        world.send(length=64 * KIB)
        world.send()
        self.assertEqual(world.paths[0].carries, [1])
        world.clock.advance(10)
        self.assertEqual(world.paths[0].carries, [1])
        told = world.near.writable
        world.hold_back.set(knobs(limit_kbps=0))
        self.assertEqual(world.paths[0].carries, [1, 2])
        self.assertEqual(world.near.writable, told + 1)

    def test_without_one_no_clock_is_read(self) -> None:
        clock = CountingClock()
        hold_back = HoldBack(clock, lambda: None)
        for limit in (0, 5):
            hold_back.set(knobs(limit_kbps=limit))
            clock.read = 0
            self.assertTrue(hold_back.may_send())
            hold_back.sent(10 * KIB)
            self.assertEqual(clock.read > 0, limit > 0)

    def test_what_was_sent_without_one_does_not_count(self) -> None:
        clock = Clock()
        hold_back = HoldBack(clock, lambda: None)
        hold_back.set(knobs(limit_kbps=1))
        hold_back.set(knobs(limit_kbps=0))
        hold_back.sent(MIB)
        clock.advance(3600)
        hold_back.set(knobs(limit_kbps=1))
        self.assertTrue(hold_back.may_send())
        # An hour without a limit saves nothing.
        hold_back.sent(KIB)
        self.assertFalse(hold_back.may_send())

    def test_what_is_sent_at_once_is_little(self) -> None:
        world = PmdWorld(self)
        world.hold_back.set(knobs(limit_kbps=100))
        for _ in range(40):
            world.frame(0, KIB)
        world.durable()
        world.begin()
        self.assertTrue(all(sum(map(len, one)) <= 12 * KIB for one in world.link.buffers))

    def test_it_goes_on_from_session_to_session(self) -> None:
        clock = Clock()
        hold_back = HoldBack(clock, lambda: None)
        hold_back.set(knobs(limit_kbps=1))
        hold_back.sent(10 * KIB)
        self.assertFalse(hold_back.may_send())
        hold_back.end()
        self.assertEqual(clock.getDelayedCalls(), [])
        self.assertFalse(hold_back.may_send())
        clock.advance(tls_bytes(10 * KIB) / KIB)
        self.assertTrue(hold_back.may_send())


class WriteSleepTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = DriverWorld(self)
        self.world.start()
        self.unit = self.world.group.units[0]
        self.told = self.world.group.set_knobs(knobs(writesleep_us=200_000))

    def write(self, *numbers: int, fua: bool = False) -> list[Request]:
        client = self.world.client
        return [client.write(self.unit, n * BLOCK, unique(n), fua) for n in numbers]

    def answered(self, requests: list[Request]) -> list[bool]:
        return [self.world.client.answered(one) for one in requests]

    def test_a_write_is_answered_after_the_pause(self) -> None:
        self.assertEqual(self.told, {"knobs": {"writesleep_us": 200_000}})
        self.assertEqual(self.world.group.status()["knobs"], {"writesleep_us": 200_000})
        first = self.write(1)
        self.world.reactor.advance(0.1)
        second = self.write(2, fua=True)
        self.world.reactor.advance(0.05)
        self.assertEqual(self.answered(first + second), [False, False])
        self.world.reactor.advance(0.05)
        self.assertEqual(self.answered(first + second), [True, False])
        self.world.reactor.advance(0.15)
        self.assertEqual(self.answered(second), [True])

    def test_it_is_durable_and_readable_meanwhile(self) -> None:
        self.write(1, fua=True)
        self.assertEqual(self.world.group.durable_gsn, 1)
        self.assertEqual(self.world.client.read(self.unit, BLOCK, BLOCK), unique(1))

    def test_a_flush_does_not_wait(self) -> None:
        self.write(1)
        flush = self.world.client.flush(self.unit)
        self.world.settle()
        self.assertTrue(self.world.client.answered(flush))

    def test_no_pause_any_more(self) -> None:
        asked = self.write(1, 2)
        self.world.group.set_knobs(knobs(writesleep_us=0))
        self.assertEqual(self.answered(asked), [True, True])
        self.assertEqual(self.answered(self.write(3)), [True])

    def test_a_shorter_pause(self) -> None:
        asked = self.write(1)
        self.world.reactor.advance(0.1)
        self.world.group.set_knobs(knobs(writesleep_us=150_000))
        self.assertEqual(self.answered(asked), [False])
        self.world.reactor.advance(0.05)
        self.assertEqual(self.answered(asked), [True])

    def test_a_stop_does_not_wait(self) -> None:
        self.world.group.set_knobs(knobs(writesleep_us=THROTTLE_SLEEP_USEC_MAX))
        asked = self.write(1)
        self.world.group.stop()
        self.world.settle()
        self.assertEqual(self.answered(asked), [True])

    def test_an_ldsu_that_fails_makes_nobody_wait(self) -> None:
        asked = self.write(1)
        self.unit.refuse("its device has failed")
        self.assertEqual(self.answered(asked), [True])

    def test_a_payload_is_not_kept_while_its_answer_waits(self) -> None:
        asked = self.write(1, 2)
        self.assertEqual(self.world.client.released, asked)

    def test_a_client_that_is_gone_is_forgotten(self) -> None:
        for _ in range(5):
            client = FakeConnection()
            self.unit.attach(client)
            asked = client.write(self.unit, 0, unique(1))
            self.unit.detach(client)
            self.world.reactor.advance(1)
            self.assertFalse(client.answered(asked))

    def test_synchronous_writes_wait_for_both(self) -> None:
        self.world.group.set_live(json.dumps({"operation": "sync"}))
        self.world.group.coherence.coherent = True
        self.world.group.answering.mirror_is_whole()
        self.world.attach()
        asked = self.write(1)
        self.world.reactor.advance(1)
        self.assertEqual(self.answered(asked), [False])
        self.world.commit()
        self.assertEqual(self.answered(asked), [False])
        self.world.reactor.advance(0.2)
        self.assertEqual(self.answered(asked), [True])
