"""Every pair of modes and event, and every row of the table."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.states import TRANSITIONS, Event, GroupModes, Mode

S, A, C, R = Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED, Mode.REFRESH
B = Mode.BYPASS
E = Event

#: What each event leads to; a pair that is absent changes nothing.
EXPECTED: dict[tuple[frozenset[Mode], Event], frozenset[Mode]] = {
    (frozenset(before), event): frozenset(after)
    for before, event, after in (
        ({S}, E.DRIVER_STARTED, {A}),
        ({A}, E.DRIVER_STOPPED, {S}),
        ({A}, E.LINK_UP, {C}),
        ({A}, E.REFRESH_BEGUN, {A, R}),
        ({C}, E.DRIVER_STOPPED, {S}),
        ({C}, E.LINK_DOWN, {A}),
        ({C}, E.REFRESH_BEGUN, {C, R}),
        ({A, R}, E.DRIVER_STOPPED, {S}),
        ({A, R}, E.LINK_UP, {C, R}),
        ({A, R}, E.REFRESH_BEGUN, {A, R}),
        ({A, R}, E.REFRESH_ENDED, {A}),
        ({A, R}, E.REFRESH_KILLED, {A}),
        ({C, R}, E.DRIVER_STOPPED, {S}),
        ({C, R}, E.LINK_DOWN, {A, R}),
        ({C, R}, E.REFRESH_BEGUN, {C, R}),
        ({C, R}, E.REFRESH_ENDED, {C}),
        ({C, R}, E.REFRESH_KILLED, {C}),
        ({A}, E.BYPASS_BEGUN, {A, B}),
        ({C}, E.BYPASS_BEGUN, {C, B}),
        ({A, R}, E.BYPASS_BEGUN, {A, B}),
        ({C, R}, E.BYPASS_BEGUN, {C, B}),
        ({A, B}, E.DRIVER_STOPPED, {S}),
        ({A, B}, E.LINK_UP, {C, B}),
        ({A, B}, E.BYPASS_ENDED, {A, R}),
        ({C, B}, E.DRIVER_STOPPED, {S}),
        ({C, B}, E.LINK_DOWN, {A, B}),
        ({C, B}, E.BYPASS_ENDED, {C, R}),
    )
}


def reachable() -> set[frozenset[Mode]]:
    found: set[frozenset[Mode]] = set()
    waiting = [frozenset({S})]
    while waiting:
        modes = waiting.pop()
        if modes in found:
            continue
        found.add(modes)
        for event in Event:
            group = GroupModes(0.0)
            group.modes = modes
            group.happen(event, 1.0)
            waiting.append(group.modes)
    return found


class StatesTests(SynchronousTestCase):
    def test_every_reachable_pair(self) -> None:
        reached = reachable()
        self.assertEqual(reached, {before for before, _ in EXPECTED})
        for modes in reached:
            for event in Event:
                group = GroupModes(0.0)
                group.modes = modes
                known = (modes, event) in EXPECTED
                self.assertEqual(group.allows(event), known, (modes, event))
                self.assertEqual(group.happen(event, 1.0, "why"), known, (modes, event))
                self.assertEqual(group.modes, EXPECTED.get((modes, event), modes))
                self.assertEqual(group.reason, "why" if known else "")

    def test_every_row_is_used_and_explained(self) -> None:
        used = set()
        for modes in reachable():
            for event in Event:
                way = next((t for t in TRANSITIONS if t.applies(event, modes)), None)
                if way is not None:
                    used.add(way)
        self.assertEqual(used, set(TRANSITIONS))
        for way in TRANSITIONS:
            self.assertTrue(way.why)
            self.assertTrue(all(event.value for event in Event))

    def test_at_most_one_row_applies(self) -> None:
        for modes in reachable():
            for event in Event:
                ways = [t for t in TRANSITIONS if t.applies(event, modes)]
                self.assertLessEqual(len(ways), 1, (modes, event))

    def test_the_driver_stops_from_every_state(self) -> None:
        for modes in reachable():
            group = GroupModes(0.0)
            group.modes = modes
            group.happen(Event.DRIVER_STOPPED, 1.0)
            self.assertEqual(group.modes, {S})

    def test_setup_accumulating_and_connected_exclude_each_other(self) -> None:
        for modes in reachable():
            self.assertEqual(len(modes - {R, B}), 1)
            self.assertFalse({R, B} <= modes)

    def test_modes_are_shown_in_their_order(self) -> None:
        group = GroupModes(0.0)
        group.modes = frozenset({C, A, B, R})
        self.assertEqual(group.shown, [R, B, A, C])
        self.assertEqual(group.state, R)

    def test_the_state_that_is_shown(self) -> None:
        group = GroupModes(1.0)
        self.assertEqual((group.state, group.since), (S, 1.0))
        group.happen(Event.DRIVER_STARTED, 2.0, "started")
        self.assertEqual((group.state, group.since, group.reason), (A, 2.0, "started"))
        group.happen(Event.REFRESH_BEGUN, 3.0)
        self.assertEqual((group.state, group.since), (R, 3.0))
        # The link comes up behind what is shown.
        group.happen(Event.LINK_UP, 4.0)
        self.assertEqual((group.state, group.since), (R, 3.0))
        group.happen(Event.REFRESH_ENDED, 5.0)
        self.assertEqual((group.state, group.since), (C, 5.0))
