"""Rows of a performance tracking file: written, read again, and what is no row."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.samples import GroupSample, LdsuSample, header, parse, row

SAMPLE = GroupSample(
    epoch=1790000000.25,
    pctcpu=12.5,
    sleep_us=15000,
    state="connected",
    ldsus=(
        LdsuSample("qds0", 210.5, 200.25, 50.5, 12, 96, 1.25, 0.2),
        LdsuSample("a.b-c"),
    ),
    netkbps=211.5,
    lag_seconds=0.25,
    writesleep_us=0,
    limit_kbps=0,
)

_FLOATS = st.none() | st.integers(0, 10**9).map(lambda n: n / 4)
_WHOLE = st.none() | st.integers(0, 10**12)
_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,10}", fullmatch=True)
_LDSUS = st.builds(
    LdsuSample,
    name=_NAMES,
    total_kbps=_FLOATS,
    data_kbps=_FLOATS,
    entries_ps=_FLOATS,
    waiting=_WHOLE,
    sectors=_WHOLE,
    pctwl=_FLOATS,
    age_seconds=_FLOATS,
)
_SAMPLES = st.builds(
    GroupSample,
    epoch=st.integers(0, 2**40).map(lambda n: n / 8),
    pctcpu=st.none() | st.integers(0, 10**6).map(lambda n: n / 2),
    sleep_us=_WHOLE,
    state=st.sampled_from(["setup", "connected", "bypass"]),
    ldsus=st.lists(_LDSUS, max_size=4, unique_by=lambda one: one.name).map(tuple),
    netkbps=_FLOATS,
    lag_seconds=_FLOATS,
    writesleep_us=_WHOLE,
    limit_kbps=_WHOLE,
)


class RowTests(SynchronousTestCase):
    def test_the_columns(self) -> None:
        self.assertEqual(
            header(["qds0"]),
            "# epoch pctcpu sleep_us state qds0.total_kbps qds0.data_kbps qds0.entries_ps "
            "qds0.waiting qds0.sectors qds0.pctwl qds0.age_s netkbps lag_s writesleep_us "
            "limit_kbps",
        )

    def test_a_row(self) -> None:
        self.assertEqual(
            row(SAMPLE),
            "1790000000.250 12.5 15000 connected 210.50 200.25 50.50 12 96 1.25 0.200 "
            "- - - - - - - 211.50 0.250 0 0",
        )

    @given(_SAMPLES)
    @settings(max_examples=200, deadline=None)
    def test_what_is_written_is_read(self, sample: GroupSample) -> None:
        table = parse([header([one.name for one in sample.ldsus]) + "\n", row(sample) + "\n"])
        self.assertEqual(table.samples, [sample])
        self.assertEqual(table.damaged, [])

    def test_the_fullest_writelog(self) -> None:
        self.assertEqual(SAMPLE.pctwl, 1.25)
        self.assertIsNone(GroupSample(1.0).pctwl)


class ReadingTests(SynchronousTestCase):
    def test_the_head_may_change_in_between(self) -> None:
        one = GroupSample(1.0, ldsus=(LdsuSample("qds0", waiting=1),))
        two = GroupSample(2.0, ldsus=(LdsuSample("qds1", waiting=2),))
        lines = [header(["qds0"]), row(one), header(["qds1"]), row(two)]
        self.assertEqual(parse(lines).samples, [one, two])

    def test_columns_of_a_later_version_are_passed_over(self) -> None:
        table = parse(["# epoch new state qds0.new qds0.waiting", "5.000 x bypass y 7"])
        expected = GroupSample(5.0, state="bypass", ldsus=(LdsuSample("qds0", waiting=7),))
        self.assertEqual(table.samples, [expected])

    def test_what_is_no_row_is_named(self) -> None:
        good = "7.000 0.0 0 connected"
        lines = ["1.000 - - setup", "# epoch pctcpu sleep_us state", good, "8.000 0.0", good]
        lines += ["x 0.0 0 setup", "9.000 nan 0 setup", "- 0.0 0 setup", "9.000 -1 0 setup", ""]
        lines += ["\0\0\0", "9.000 1e999 0 setup"]
        table = parse(lines)
        self.assertEqual([one.epoch for one in table.samples], [7.0, 7.0])
        self.assertEqual(table.damaged, [1, 4, 6, 7, 8, 9, 10, 11, 12])

    @given(st.lists(st.text(max_size=40), max_size=6))
    @settings(max_examples=200, deadline=None)
    def test_nothing_read_raises(self, lines: list[str]) -> None:
        parse([header(["qds0"]), *lines])
