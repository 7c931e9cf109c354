"""What throttles do: windows, transitions, knobs, and which writelogs are meant."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.evaluation import Knobs, Outcome, State, carried, evaluate, measure
from qdsmirror.core.samples import GroupSample, LdsuSample
from qdsmirror.core.throttles import (
    Throttle,
    parse_actions,
    parse_test,
    parse_time,
    window,
)
from qdsmirror.limits import THROTTLE_SLEEP_USEC_MAX


def clock(at: float) -> datetime:
    """Show UTC."""
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None)


def throttle(
    test: str, *actions: str, name: str = "one", start: str = "--", stop: str = "--"
) -> Throttle:
    """Make a throttle of texts."""
    return Throttle(
        name, parse_test(test), parse_actions(actions), window(parse_time(start), parse_time(stop))
    )


def sample(**values: float) -> GroupSample:
    """Make a sample; an LDSU's name stands for its pctwl."""
    ldsus = tuple(
        LdsuSample(name, pctwl=value) for name, value in values.items() if name.startswith("qds")
    )
    group = {name: value for name, value in values.items() if not name.startswith("qds")}
    return GroupSample(epoch=0.0, ldsus=ldsus, **group)  # type: ignore[arg-type]


class CarriedTests(SynchronousTestCase):
    """What a state becomes where throttles have other numbers from now on."""

    def test_limits_in_force_become_the_new_ones(self) -> None:
        state = State(limits={"a": 50, "b": 60, "c": 70, "gone": 5}, true_of={"x": frozenset()})
        now = [
            throttle("netkbps > 1", "limit 80", name="a"),
            throttle("netkbps > 1", "limit 60", name="b"),
            throttle("netkbps > 1", "limit off", name="c"),
            throttle("netkbps > 1", "limit 9", name="not in force"),
        ]
        found = carried(state, now)
        self.assertEqual(found.limits, {"a": 80, "b": 60})
        self.assertEqual(found.true_of, state.true_of)


class EvaluationTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.state = State()
        self.now = 0.0

    def evaluate(self, *throttles: Throttle, **values: float) -> Outcome:
        """Evaluate ten seconds later, and keep the state."""
        outcome = evaluate(throttles, self.state, [sample(**values)], self.now, clock)
        self.now += 10.0
        self.state = outcome.state
        return outcome

    def fired(self, one: Throttle, *values: float, measure: str = "netkbps") -> list[bool]:
        """Tell at which of some values a throttle fires."""
        return [bool(self.evaluate(one, **{measure: value}).fired) for value in values]

    def test_relations_fire_at_every_evaluation(self) -> None:
        for relation, wanted in {
            ">": [False, False, True, True],
            ">=": [False, True, True, True],
            "<": [True, False, False, False],
            "<=": [True, True, False, False],
            "==": [False, True, False, False],
            "!=": [True, False, True, True],
        }.items():
            one = throttle(f"netkbps {relation} 200", "extend")
            self.assertEqual(self.fired(one, 199, 200, 201, 300), wanted, relation)

    def test_transitions_fire_when_the_relation_becomes_true(self) -> None:
        values = (300.0, 100.0, 300.0, 300.0, 200.0, 200.0, 201.0)
        for relation, wanted in {
            "T>": [True, False, True, False, False, False, True],
            "T>=": [True, False, True, False, False, False, False],
            "T<": [False, True, False, False, False, False, False],
            "T<=": [False, True, False, False, True, False, False],
            "T==": [False, False, False, False, True, False, False],
            "T!=": [True, False, False, False, False, False, True],
        }.items():
            self.state = State()
            one = throttle(f"netkbps {relation} 200", "extend")
            self.assertEqual(self.fired(one, *values), wanted, relation)

    def test_values_are_compared_as_whole_numbers_and_lag_with_its_fraction(self) -> None:
        self.assertEqual(
            self.fired(throttle("netkbps == 200", "free"), 199.6, 200.6), [True, False]
        )
        self.assertEqual(
            self.fired(throttle("lag > 1.5", "free"), 1.5, 1.501, measure="lag_seconds"),
            [False, True],
        )
        self.assertEqual(
            self.fired(throttle("pctcpu T>= 100", "free"), 99.4, 99.5, measure="pctcpu"),
            [False, True],
        )

    def test_a_link_that_fails_pages_and_gives_the_all_clear(self) -> None:
        page = throttle("lag T> 60", 'mail op@x.org "late"', name="late")
        clear = throttle("lag T<= 60", 'console "all clear"', name="clear")
        said = []
        for lag in (0, 5, 55, 65, 75, 300, 30, 0):
            outcome = self.evaluate(page, clear, lag_seconds=lag)
            said.append([one.throttle.name for one in outcome.fired])
        # The first evaluation counts the one before it as false.
        self.assertEqual(said, [["clear"], [], [], ["late"], [], [], ["clear"], []])

    def test_what_is_not_known_is_no_transition(self) -> None:
        one = throttle("lag T> 60", "free")
        self.assertEqual(self.fired(one, 70, measure="lag_seconds"), [True])
        self.assertEqual(self.evaluate(one, netkbps=1).fired, ())
        self.assertEqual(self.fired(one, 70, 0, 70, measure="lag_seconds"), [False, False, True])
        self.assertEqual(evaluate([one], State(), [], 0.0, clock).fired, ())

    def test_each_ldsu_for_itself(self) -> None:
        rising = throttle("pctwl T> 60", "extend", name="rising")
        low = throttle("pctwl < 20", "free", name="low")
        seen = []
        for qds0, qds1 in ((70, 10), (70, 70), (10, 30), (70, 30)):
            outcome = self.evaluate(rising, low, qds0=qds0, qds1=qds1)
            seen.append([(one.throttle.name, one.targets) for one in outcome.fired])
        self.assertEqual(
            seen,
            [
                [("rising", ("qds0",)), ("low", ("qds1",))],
                [("rising", ("qds1",))],
                [("low", ("qds0",))],
                [("rising", ("qds0",))],
            ],
        )

    def test_another_measure_means_the_fullest_writelog(self) -> None:
        one = throttle("lag > 1", "extend")
        (fired,) = self.evaluate(one, lag_seconds=2, qds0=10, qds1=30, qds2=20).fired
        self.assertEqual((fired.ldsus, fired.targets), ((), ("qds1",)))
        (fired,) = self.evaluate(one, lag_seconds=2).fired
        self.assertEqual(fired.targets, ())

    def test_sleeps_are_set_incremented_and_decremented_within_bounds(self) -> None:
        more = throttle("netkbps > 0", "sleep inc 15000", "writesleep inc 9000000")
        less = throttle("netkbps == 0", "sleep dec 10000", "writesleep set 7")
        sleeps = []
        for rate in (1, 1, 0, 0, 0, 0):
            state = self.evaluate(more, less, netkbps=rate).state
            sleeps.append((state.sleep_us, state.writesleep_us))
        self.assertEqual(
            sleeps,
            [(15000, 9000000), (30000, THROTTLE_SLEEP_USEC_MAX)]
            + [(20000, 7), (10000, 7), (0, 7), (0, 7)],
        )

    def test_one_evaluation_goes_by_the_order_of_throttles(self) -> None:
        self.evaluate(
            throttle("netkbps > 0", "sleep set 100", name="a"),
            throttle("netkbps > 0", "sleep inc 5", "sleep dec 1", name="b"),
            netkbps=1,
        )
        self.assertEqual(self.state.knobs, Knobs(sleep_us=104))

    def test_sleep_outlasts_its_window_and_a_limit_does_not(self) -> None:
        office = throttle(
            "netkbps > 200", "sleep inc 15000", "limit 250", start="00:00:00", stop="00:00:20"
        )
        after = throttle(
            "netkbps >= 0", "sleep set 0", name="after", start="00:00:30", stop="00:00:40"
        )
        knobs = []
        for _ in range(5):
            outcome = self.evaluate(office, after, netkbps=300)
            knobs.append((outcome.state.knobs.sleep_us, outcome.state.knobs.limit_kbps))
        self.assertEqual(knobs, [(15000, 250), (30000, 250), (30000, 0), (0, 0), (0, 0)])

    def test_a_window_that_opens_again_is_a_first_evaluation(self) -> None:
        one = throttle("netkbps T> 200", "free", start="00:00:00", stop="00:00:20")
        self.assertEqual(self.fired(one, 300, 300), [True, False])
        self.now = 86400.0
        self.evaluate(throttle("lag > 0", "free", name="other"), netkbps=300)
        self.assertEqual(self.fired(one, 300), [True])

    def test_the_lowest_limit_holds_and_off_ends_all(self) -> None:
        high = throttle("netkbps > 100", "limit 900", name="high")
        low = throttle("netkbps > 200", "limit 300", name="low")
        off = throttle("netkbps == 0", "limit off", name="off")
        limits = [
            self.evaluate(low, high, off, netkbps=rate).state.knobs.limit_kbps
            for rate in (150, 250, 150, 0, 50)
        ]
        self.assertEqual(limits, [900, 300, 300, 0, 0])

    def test_a_throttle_that_is_gone_leaves_nothing(self) -> None:
        one = throttle("netkbps > 0", "limit 5", "sleep set 9", "writesleep set 8")
        self.evaluate(one, netkbps=1)
        self.evaluate(netkbps=1)
        self.assertEqual(self.state, State())

    def test_a_sleep_stays_while_a_throttle_is_left_that_turns_it(self) -> None:
        self.evaluate(throttle("netkbps > 0", "sleep set 9", "writesleep set 8"), netkbps=1)
        closed = throttle("lag > 9", "sleep dec 1", name="b", start="10:00:00", stop="11:00:00")
        self.evaluate(closed, netkbps=1)
        self.assertEqual(self.state.knobs, Knobs(sleep_us=9))
        self.evaluate(throttle("lag > 9", "extend"), netkbps=1)
        self.assertEqual(self.state.knobs, Knobs())

    def test_a_throttle_that_is_changed_has_no_past(self) -> None:
        early = throttle("lag T> 300", "free")
        self.assertEqual(self.fired(early, 400, 400, measure="lag_seconds"), [True, False])
        for changed in (
            throttle("lag T<= 600", "free"),
            throttle("lag T<= 600", "free", start="00:00:00", stop="12:00:00"),
            throttle("lag T<= 600", "free", start="00:00:00", stop="12:00:00", name="other"),
        ):
            self.assertEqual(self.fired(changed, 400, 400, measure="lag_seconds"), [True, False])
        # What it does is not what it is about.
        done = throttle("lag T<= 600", "extend", start="00:00:00", stop="12:00:00", name="other")
        self.assertEqual(self.fired(done, 400, measure="lag_seconds"), [False])

    def test_a_limit_that_its_throttle_does_not_set_any_more_has_ended(self) -> None:
        self.evaluate(throttle("netkbps > 200", "limit 5"), netkbps=300)
        self.assertEqual(self.state.knobs.limit_kbps, 5)
        self.evaluate(throttle("netkbps > 200", "limit 5"), netkbps=1)
        self.assertEqual(self.state.knobs.limit_kbps, 5)
        self.evaluate(throttle("netkbps > 200", "limit 7"), netkbps=1)
        self.assertEqual(self.state.knobs.limit_kbps, 0)

    def test_values_are_of_the_time_since_the_last_evaluation(self) -> None:
        history = [
            GroupSample(
                1.0, pctcpu=10, netkbps=100, lag_seconds=9, ldsus=(LdsuSample("a", pctwl=5),)
            ),
            GroupSample(2.0, netkbps=300, ldsus=(LdsuSample("a", pctwl=7), LdsuSample("b"))),
        ]
        self.assertEqual(
            measure(history),
            {"netkbps": {"": 200}, "pctcpu": {"": 10}, "pctwl": {"a": 7}, "lag": {}},
        )
        # As the patent's file has it: by LDSU only.
        old = GroupSample(
            1.0,
            ldsus=(LdsuSample("a", total_kbps=10, age_seconds=2), LdsuSample("b", total_kbps=5)),
        )
        self.assertEqual(measure([old])["netkbps"], {"": 15})
        self.assertEqual(measure([old])["lag"], {"": 2})

    def test_it_says_what_fired(self) -> None:
        (fired,) = self.evaluate(throttle("pctwl > 60", "extend"), qds0=61, qds1=90).fired
        self.assertEqual(str(fired), "one: pctwl > 60: 61 (qds0 qds1)")
        (fired,) = self.evaluate(throttle("lag > 1", "extend"), lag_seconds=1.5).fired
        self.assertEqual(str(fired), "one: lag > 1: 1.500")

    @given(st.lists(st.integers(0, 400), max_size=40))
    def test_sleep_is_never_out_of_bounds(self, rates: list[int]) -> None:
        self.state = State()
        more = throttle("netkbps > 300", "sleep inc 4000000", name="more")
        less = throttle("netkbps < 200", "sleep dec 3000000", name="less")
        for rate in rates:
            state = self.evaluate(more, less, netkbps=rate).state
            self.assertTrue(0 <= state.sleep_us <= THROTTLE_SLEEP_USEC_MAX)
