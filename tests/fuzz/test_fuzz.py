"""Every parser takes arbitrary bytes, and good ones with something changed."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames, nbd_options
from qdsmirror.core.inbound import Intake
from qdsmirror.core.records import Cursor, Generation
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import GENERATION, INFO, SIZE, TARGETS, pieces, seal_frame

EXAMPLES = 200
_SEEDS = seeds()
#: (where, in parts of the length; bytes that replace as many; how many more are cut out)
_EDIT = st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8))


def edited(data: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    """Change some places of good bytes."""
    for where, put, cut in edits:
        at = int(where * len(data))
        data = data[:at] + put + data[at + len(put) + cut :]
    return data


def arbitrary(target: str) -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.binary(max_size=600),
        st.builds(edited, st.sampled_from(_SEEDS[target]), st.lists(_EDIT, max_size=4)),
    )


class FuzzTests(SynchronousTestCase):
    """One test for each target is added below."""

    def test_every_target_has_seeds_that_it_takes(self) -> None:
        self.assertEqual(set(_SEEDS), set(TARGETS))
        for name, good in _SEEDS.items():
            for data in good:
                TARGETS[name](data)

    def test_seeds_reach_what_lies_behind_the_checks(self) -> None:
        talk = nbd_options.Negotiation(lambda: ["qds0"], {"qds0": INFO}.get)
        for piece in pieces(_SEEDS["nbd_options"][0]):
            talk.receive(piece)
        self.assertTrue(talk.finished and talk.block_status)
        taking = Intake(Cursor(), [SIZE], [Generation(GENERATION, 1)])
        header, found = taking.check(seal_frame(_SEEDS["intake"][0]))
        self.assertEqual((header.entry_count, found[0].length), (1, 512))

    def test_an_error_out_of_contract_is_noticed(self) -> None:
        def broken(*_: object) -> None:
            raise IndexError("out of contract")

        for room, name, target in (
            (nbd_options.Negotiation, "_answer", "nbd_options"),
            (frames, "check_body", "frame_headers"),
        ):
            with mock.patch.object(room, name, broken):
                self.assertRaises(IndexError, TARGETS[target], _SEEDS[target][0])


def _test(name: str, target: Callable[[bytes], None]) -> Callable[[FuzzTests], None]:
    @settings(max_examples=EXAMPLES)
    @given(arbitrary(name))
    def test(_self: FuzzTests, data: bytes) -> None:
        target(data)

    return test


for _name, _target in TARGETS.items():
    setattr(FuzzTests, f"test_{_name}", _test(_name, _target))
