"""What a mirror daemon counts of the frames that it moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import VERIFY, VERIFY_ROW, Entry, parse_header
from qdsmirror.groups.traffic import Traffic
from tests.groups.world import BLOCK, KIB, DriverWorld, unique
from tests.storage.logworld import FrameMaker, write


class TrafficTests(SynchronousTestCase):
    def test_kinds(self) -> None:
        traffic = Traffic(["a", "b"])
        maker = FrameMaker()
        rows = [VERIFY_ROW.pack(n * BLOCK, BLOCK, bytes(32)) for n in range(3)]
        made = [
            maker.make(0, [write(0, unique(1)), write(BLOCK, unique(2))]),
            maker.make(0, [Entry(0, BLOCK, frames.ZERO_WRITE, None)]),
            maker.make(0, [Entry(0, BLOCK, frames.REFRESH, unique(3))]),
            maker.make(0, [Entry(0, BLOCK, frames.REFRESH_ZEROES, None)]),
            maker.make(0, kind=VERIFY, control=b"".join(rows)),
            maker.make(1, kind=frames.BREAK, control=bytes(16)),
        ]
        for raw in made:
            traffic.count(parse_header(raw), memoryview(raw))
        first, second = traffic.status()["ldsus"]
        self.assertEqual(
            first,
            {
                "name": "a",
                "frame_bytes": sum(map(len, made[:5])),
                "data_bytes": 3 * BLOCK,
                "entries": 5,
                "refresh_bytes": BLOCK,
                "verify_bytes": 3 * VERIFY_ROW.size,
            },
        )
        self.assertEqual((second["frame_bytes"], second["data_bytes"]), (len(made[5]), 0))

    def test_a_refresh_has_frames_of_its_own(self) -> None:
        """By its first entry a frame is judged."""
        world = DriverWorld(self, size=256 * KIB, log=4096 * KIB)
        world.data().corrupt(0, b"".join(unique(10**6 + n) for n in range(64)))
        unit = world.start()
        world.attach()
        of_refresh = {frames.REFRESH, frames.REFRESH_ZEROES}
        seen: set[frozenset[bool]] = set()
        make = unit.framing.make

        def see(kind: int, placement: Any, entries: Sequence[Entry] = (), *more: Any) -> Any:
            seen.add(frozenset(one.kind in of_refresh for one in entries))
            return make(kind, placement, entries, *more)

        unit.framing.make = see  # type: ignore[method-assign]
        asked = world.group.refresh("full")
        for number in range(40):
            world.client.write(unit, number * BLOCK, unique(number))
            world.settle(0.1)
            world.commit()
        self.successResultOf(asked)
        self.assertEqual(seen, {frozenset(), frozenset({True}), frozenset({False})})
