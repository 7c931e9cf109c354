"""The modes of a group: every pair of modes and event, every row of the tables, random walks."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.states import (
    ASKED,
    REFUSALS,
    TRANSITIONS,
    Event,
    GroupModes,
    Holding,
    Mode,
)
from qdsmirror.errors import DegradedError
from qdsmirror.limits import MODE_CHANGES_KEPT

S, A, C, R = Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED, Mode.REFRESH
B, K = Mode.BYPASS, Mode.BACKFRESH
E = Event

Modes = frozenset[Mode]

#: How the driver and the link move what is below: one of these three holds at any time.
BELOW: dict[tuple[Mode, Event], Mode] = {
    (S, E.DRIVER_STARTED): A,
    (A, E.DRIVER_STOPPED): S,
    (C, E.DRIVER_STOPPED): S,
    (A, E.LINK_UP): C,
    (A, E.LINK_DOWN): A,
    (C, E.LINK_DOWN): A,
}
_ABOVE: tuple[tuple[set[Mode], Event, set[Mode]], ...] = (
    (set(), E.REFRESH_BEGUN, {R}),
    ({R}, E.REFRESH_RESTARTED, {R}),
    ({R}, E.REFRESH_ENDED, set()),
    ({R}, E.REFRESH_KILLED, set()),
    (set(), E.BYPASS_BEGUN, {B}),
    ({R}, E.BYPASS_BEGUN, {B}),
    (set(), E.WRITELOG_FAILED, {B}),
    ({R}, E.WRITELOG_FAILED, {B}),
    ({K}, E.WRITELOG_FAILED, {K, B}),
    ({B}, E.BYPASS_ENDED, {R}),
    (set(), E.BACKFRESH_BEGUN, {K}),
    ({B}, E.BACKFRESH_BEGUN, {K, B}),
    ({K}, E.BACKFRESH_ENDED, set()),
    ({K}, E.BACKFRESH_KILLED, set()),
    ({K, B}, E.BACKFRESH_ENDED, {B}),
    ({K, B}, E.BACKFRESH_KILLED, {B}),
)
#: What comes on top while LDSUs are served, whether accumulating or connected.
ABOVE = {(frozenset(was), event): frozenset(now) for was, event, now in _ABOVE}

#: What the commands that a hint names ask for.
COMMANDS = {
    "launchdriver": {E.DRIVER_STARTED},
    "qdsbypass off": {E.BYPASS_ENDED},
    "qdsrefresh": {E.REFRESH_BEGUN, E.BYPASS_ENDED},
    "launchrefresh": {E.REFRESH_BEGUN, E.BYPASS_ENDED},
    "killrefresh": {E.REFRESH_KILLED},
    "launchbackfresh": {E.BACKFRESH_BEGUN},
    "killbackfresh": {E.BACKFRESH_KILLED},
    "wait until": {E.REFRESH_ENDED, E.BACKFRESH_ENDED},
}


def expected(modes: Modes, event: Event) -> Modes | None:
    """Give what an event leads to by the tables of this module; ``None`` for no way."""
    below = next(mode for mode in (S, A, C) if mode in modes)
    above = modes - {below}
    if (below, event) in BELOW:
        after = BELOW[below, event]
        return frozenset({after}) if after is S else above | {after}
    if below is not S and (above, event) in ABOVE:
        return ABOVE[above, event] | {below}
    return None


def machine() -> GroupModes:
    return GroupModes("dsgrp007", 7, 0.0)


def paths() -> dict[Modes, tuple[Event, ...]]:
    """Find every set of modes that can hold, each by a way that leads to it."""
    found: dict[Modes, tuple[Event, ...]] = {}
    waiting: list[tuple[Event, ...]] = [()]
    while waiting:
        path = waiting.pop(0)
        modes = walk(path).modes
        if modes not in found:
            found[modes] = path
            waiting += [(*path, event) for event in Event]
    return found


def walk(path: tuple[Event, ...]) -> GroupModes:
    group = machine()
    for event in path:
        group.happen(event, 0.0)
    return group


REACHABLE = paths()


class StatesTests(SynchronousTestCase):
    def test_what_can_hold(self) -> None:
        above: tuple[Modes, ...] = tuple(frozenset(some) for some in ((), (R,), (B,), (K,), (K, B)))
        served = {some | {below} for some in above for below in (A, C)}
        self.assertEqual(set(REACHABLE), served | {frozenset({S})})

    def test_every_pair(self) -> None:
        for modes, path in REACHABLE.items():
            for event in Event:
                after = expected(modes, event)
                group = walk(path)
                self.assertEqual(group.allows(event), after is not None, (modes, event))
                self.assertEqual(group.happen(event, 1.0, "why"), after is not None)
                self.assertEqual(group.modes, modes if after is None else after, (modes, event))

    def test_every_row_is_used_and_explained(self) -> None:
        used = set()
        for modes in REACHABLE:
            for event in Event:
                ways = [way for way in TRANSITIONS if way.applies(event, modes)]
                self.assertLessEqual(len(ways), 1, (modes, event))
                used.update(ways)
        self.assertEqual(used, set(TRANSITIONS))
        for way in TRANSITIONS:
            self.assertTrue(way.why and way.event.value)

    def test_modes_are_shown_in_their_order(self) -> None:
        group = walk(REACHABLE[frozenset({C, B, K})])
        self.assertEqual(group.shown, [K, B, C])
        self.assertEqual(group.state, K)
        self.assertEqual([mode for mode, _ in group.details], [K, B, C])

    def test_the_state_that_is_shown(self) -> None:
        group = GroupModes("dsgrp000", 0, 1.0)
        self.assertEqual((group.state, group.since), (S, 1.0))
        group.happen(E.DRIVER_STARTED, 2.0, "started")
        self.assertEqual((group.state, group.since, group.reason), (A, 2.0, "started"))
        group.happen(E.REFRESH_BEGUN, 3.0)
        self.assertEqual((group.state, group.since), (R, 3.0))
        # The link comes up behind what is shown.
        group.happen(E.LINK_UP, 4.0)
        self.assertEqual((group.state, group.since), (R, 3.0))
        self.assertEqual(group.reason, E.REFRESH_BEGUN.value)
        group.happen(E.REFRESH_ENDED, 5.0)
        self.assertEqual((group.state, group.since), (C, 5.0))
        self.assertEqual(group.details, [(C, Holding(4.0, E.LINK_UP.value))])

    def test_another_reason_for_what_holds(self) -> None:
        group = machine()
        group.happen(E.DRIVER_STARTED, 1.0, "no pmd")
        group.happen(E.LINK_DOWN, 2.0, "no route")
        self.assertEqual(group.details, [(A, Holding(1.0, "no route"))])


class RefusalTests(SynchronousTestCase):
    def test_every_refusal_has_its_row_and_a_way_out(self) -> None:
        used = set()
        for modes, path in REACHABLE.items():
            group = walk(path)
            for event in ASKED:
                if group.allows(event):
                    group.refuse(event)
                    continue
                used.add(next(one for one in REFUSALS if one.applies(event, modes)))
                error = self.assertRaises(DegradedError, group.refuse, event)
                self.assertTrue(error.message.startswith("dsgrp007: "), error.message)
                self.assertNotIn("{", error.hint)
                asks = [
                    COMMANDS[name] for name in COMMANDS if re.search(rf"\b{name}\b", error.hint)
                ]
                leads = any(group.allows(one) for some in asks for one in some)
                self.assertTrue(leads, (modes, event, error.hint))
        self.assertEqual(used, set(REFUSALS))

    def test_what_is_coming_counts(self) -> None:
        group = walk((E.DRIVER_STARTED,))
        group.refuse(E.REFRESH_BEGUN)
        error = self.assertRaises(DegradedError, group.refuse, E.REFRESH_BEGUN, R)
        self.assertIn("running already", error.message)
        self.assertRaises(DegradedError, group.refuse, E.REFRESH_KILLED)
        group.refuse(E.REFRESH_KILLED, R)
        self.assertEqual(group.modes, {A})


class WalkTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.sampled_from(list(Event)), st.text(max_size=2)), max_size=80))
    def test_random_walks(self, steps: list[tuple[Event, str]]) -> None:
        """Whatever happens, each mode knows when it was entered, and by what last."""
        group = machine()
        modes: Modes = frozenset({S})
        held = {S: Holding(0.0, E.DRIVER_STOPPED.value)}
        shown_since = 0.0
        changes: list[tuple[int, float, tuple[Mode, ...], str]] = []
        for count, (event, reason) in enumerate(steps):
            now = count + 1.0
            after = expected(modes, event)
            self.assertEqual(group.happen(event, now, reason), after is not None)
            if after is not None:
                was = group_state(modes)
                for mode in after - modes:
                    held[mode] = Holding(now, reason or event.value)
                if after != modes:
                    shown = tuple(mode for mode in Mode if mode in after)
                    changes.append((len(changes) + 1, now, shown, reason or event.value))
                if after == modes:
                    kept = A if event is E.LINK_DOWN else R
                    held[kept] = Holding(held[kept].since, reason or event.value)
                modes = after
                if group_state(modes) is not was:
                    shown_since = now
            self.assertEqual(group.modes, modes)
            self.assertEqual(list(group.changes), changes[-MODE_CHANGES_KEPT:])
            self.assertEqual(dict(group.details), {mode: held[mode] for mode in modes})
            self.assertEqual((group.state, group.since), (group_state(modes), shown_since))
            for asked in ASKED:
                if group.allows(asked):
                    group.refuse(asked)
                else:
                    self.assertRaises(DegradedError, group.refuse, asked)


def group_state(modes: Modes) -> Mode:
    return next(mode for mode in (K, R, B, A, C, S) if mode in modes)
