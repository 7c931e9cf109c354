"""Throttles hold a group within what its owner wants, on the fake clock, through crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.evaluation import State, evaluate
from qdsmirror.core.samples import GroupSample
from qdsmirror.core.throttles import Throttle
from qdsmirror.limits import KIB
from tests.sim.history import Violation
from tests.sim.runs import a_base
from tests.sim.throttled import KnobWorld, ThrottledWorld, throttle

_NOON = 12 * 3600.0
_OFFICE = {"start": "08:00:00", "stop": "17:00:00"}
#: The patent's Figure 10, completed: conf/throttles.sample has the same.
FIGURE_10 = (
    throttle("passed 200", "netkbps T> 200", "sleep inc 15000", **_OFFICE),
    throttle("above 300", "netkbps > 300", "sleep inc 5000", **_OFFICE),
    throttle("fallen to 200", "netkbps T<= 200", "sleep dec 15000", **_OFFICE),
    throttle("below 200", "netkbps < 200", "sleep dec 5000", **_OFFICE),
    throttle("nearly idle", "netkbps < 50", "sleep dec 10000", **_OFFICE),
    throttle("out of hours", "netkbps >= 0", "sleep set 0", start="17:00:00", stop="08:00:00"),
)


#: Seeds whose knobs are turned all the time.
KNOB_SEEDS = 40


@contextmanager
def world(throttles: Sequence[Throttle], **more: Any) -> Iterator[ThrottledWorld]:
    """Give a world of its own."""
    with a_base() as base:
        made = ThrottledWorld(1, base, throttles, **more)
        try:
            yield made
        finally:
            made.close()


def utc(at: float) -> datetime:
    """Show UTC."""
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None)


def rates(one: ThrottledWorld, seconds: int = 10) -> list[float]:
    """Give the KB a second on the wire, over so many seconds each."""
    sent = one.sent
    return [
        sum(sent[at : at + seconds]) / seconds / KIB
        for at in range(0, len(sent) - seconds + 1, seconds)
    ]


class FigureTenTests(SynchronousTestCase):
    def test_they_are_the_samples(self) -> None:
        from tests.test_config import CONF, GROUP, RootedTestCase

        case = RootedTestCase()
        case.setUp()
        self.addCleanup(case.doCleanups)
        found = case.group(GROUP + (CONF / "throttles.sample").read_text()).throttles
        self.assertEqual(found, FIGURE_10)

    def test_a_group_is_held_near_200_to_300_kb_a_second(self) -> None:
        """Over 600 seconds of a load of 800; out of hours that ends within one evaluation."""
        with world(FIGURE_10) as one:
            one.run_throttled(lambda: one.load(600), lambda: one.load(20))
            found = rates(one)
            self.assertGreater(found[0], 600)
            self.assertTrue(all(190 <= rate <= 310 for rate in found[4:60]), found)
            held = sum(found[4:60]) / len(found[4:60])
            self.assertTrue(200 <= held <= 300, held)
            # It is 17:00:00 by then.
            self.assertEqual([knobs.sleep_us for knobs in one.knobs[59:61]], [30000, 0])
            self.assertGreater(found[60], 600)

    def test_a_dip_is_recovered_from(self) -> None:
        """What the first throttle adds each time 200 are passed is taken back at each fall."""
        for dip, rush in ((156.0, 311.0), (60.0, 700.0), (190.0, 201.0), (0.0, 0.0)):
            state, now, rates = State(), _NOON, []
            for turn in range(40):
                # Writes of 8 KiB, each of which waits so long, and takes half a millisecond.
                rate = min(800.0, 8e6 / (500 + state.knobs.sleep_us))
                rate = {15: dip, 16: rush}.get(turn, rate)
                rates.append(rate)
                found = GroupSample(epoch=now, netkbps=rate)
                state = evaluate(FIGURE_10, state, [found], now, utc).state
                now += 10.0
            self.assertTrue(all(200 <= rate <= 300 for rate in rates[10:15]), rates)
            self.assertTrue(all(200 <= rate <= 300 for rate in rates[22:]), rates)

    def test_the_pause_goes_back_to_zero_with_the_load(self) -> None:
        def no_load() -> None:
            one.kbps = 0.0
            one.load(130)

        with world(FIGURE_10) as one:
            one.run_throttled(lambda: one.load(60), no_load)
            sleeps = [knobs.sleep_us for knobs in one.knobs]
            self.assertEqual(max(sleeps), 30000)
            self.assertEqual(sleeps[-2:], [0, 0])
            # While the writelog is not empty the group still sends all that it may.
            self.assertTrue(all(b <= a for a, b in zip(sleeps[6:], sleeps[7:], strict=False)))

    def test_it_is_the_sleep_that_holds_it(self) -> None:
        with world(()) as one:
            one.run_throttled(lambda: one.load(20))
            self.assertTrue(all(rate > 600 for rate in rates(one)), rates(one))


class LimitTests(SynchronousTestCase):
    def check(self, limit: int, **more: Any) -> None:
        with world([throttle("limit", "netkbps >= 0", f"limit {limit}")], **more) as one:
            one.run_throttled(lambda: one.load(120))
            held = sum(one.sent[20:120]) / 100 / KIB
            self.assertLess(abs(held / limit - 1), 0.05, rates(one))

    def test_small_writes(self) -> None:
        self.check(50, write_bytes=2 * KIB, kbps=200)

    def test_large_writes(self) -> None:
        self.check(300, write_bytes=32 * KIB)

    def test_compressed(self) -> None:
        """What the simulation writes shrinks to a fortieth."""
        self.check(10, compression="lz4", inline=0)

    def test_over_several_paths(self) -> None:
        self.check(200, paths=3)

    def test_it_ends_with_its_window(self) -> None:
        limit = throttle("limit", "netkbps >= 0", "limit 100", start="16:50:00", stop="16:50:30")
        with world([limit]) as one:
            one.run_throttled(lambda: one.load(60))
            found = rates(one)
            self.assertTrue(all(rate < 120 for rate in found[1:3]), found)
            self.assertTrue(all(rate > 600 for rate in found[3:]), found)


class PoolTests(SynchronousTestCase):
    """A write of 2 KiB takes 4 KiB of a writelog: 10 KiB in a second here."""

    THROTTLES = (
        throttle("filling", "pctwl > 60", "extend"),
        throttle("empty again", "pctwl < 20", "free"),
    )

    def test_extended_before_it_overflows_and_freed_through_crashes(self) -> None:
        def crash(name: str) -> Callable[[], None]:
            return lambda: one.kill(name)

        def link(up: bool) -> None:
            one.link_up = up
            for wire in one.wires:
                wire.cut()

        chains: list[int] = []

        def look() -> None:
            group = one.driver.group if one.driver is not None else None
            assert group is not None
            self.assertEqual(group.bypass.phase, "off")
            chains.append(len(group.extensions.chain(group.units[0])))

        more: dict[str, Any] = {
            "ldsus": 1, "log": 300 * KIB, "pool": 3, "on_overflow": "bypass", "kbps": 5.0,
            "write_bytes": 2 * KIB,
        }  # fmt: skip
        with world(self.THROTTLES, **more) as one:
            one.run_throttled(
                lambda: link(False),
                lambda: one.load(25),
                look,
                crash("driver"),
                lambda: one.load(30),
                look,
                crash("pmd"),
                lambda: one.load(10),
                look,
                lambda: link(True),
                lambda: one.load(25),
                crash("driver"),
                lambda: one.load(60),
                look,
            )
            self.assertEqual((chains[0], chains[-1]), (1, 0), chains)
            self.assertGreater(max(chains), 1, chains)
            self.assertGreaterEqual(one.counts["extend"], 2)
            self.assertGreaterEqual(one.counts["free"], 2)

    def test_without_throttles_it_overflows(self) -> None:
        with world((), ldsus=1, log=300 * KIB, on_overflow="bypass", kbps=8.0,
                   write_bytes=2 * KIB) as one:  # fmt: skip

            def cut() -> None:
                one.link_up = False
                for wire in one.wires:
                    wire.cut()

            def look() -> None:
                assert one.driver is not None
                self.assertEqual(one.driver.group.bypass.phase, "on")
                one.link_up = True

            one.run_throttled(cut, lambda: one.load(65), look)


class KnobTests(SynchronousTestCase):
    def test_no_invariant_is_violated_however_knobs_are_turned(self) -> None:
        """Through all the faults of the simulation, in the middle of pauses and limits."""
        turned = 0
        for seed in range(KNOB_SEEDS):
            with a_base() as base:
                one = KnobWorld(seed, base)
                try:
                    one.run()
                except Violation as violation:
                    self.fail(f"seed {seed}: {violation}")
                finally:
                    one.close()
                turned += one.counts["knobs"]
        self.assertGreater(turned, 5 * KNOB_SEEDS)
