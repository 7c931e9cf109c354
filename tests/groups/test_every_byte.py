"""A session of the link is cut behind each byte of its handshake and of its first frames.

The real groups, in the simulation's world: all its checks of the invariants are made after every
step.  (TLS is left out, so that a cut also falls into the middle of a message.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.process import End
from tests.sim.profile import Profile
from tests.sim.runs import a_base
from tests.sim.watch import installed
from tests.sim.world import World

#: Both ways together; the handshake takes about 1100 of them.
BYTES = 2400
STEPS_MAX = 5000


class Knife:
    """Cuts a connection, both ways at once, behind a number of bytes.

    :ivar left: bytes that still pass; ``None`` for any number.
    """

    def __init__(self) -> None:
        self.left: int | None = None
        self._step = End.step

    def stepped(self) -> Callable[[End, int], None]:
        """Give what stands in for :meth:`End.step`."""

        def step(end: End, limit: int) -> None:
            if end.wire.local or not end._coming or not end.reading or self.left is None:
                self._step(end, limit)
                return
            assert end.peer is not None
            count = min(limit, self.left, len(end.peer.out))
            self._step(end, count)
            self.left -= count
            if not self.left:
                self.left = None
                cut(end)

        return step


def cut(end: End) -> None:
    """End a connection; what was on its way is lost."""
    for one in end.wire.ends:
        one.out.clear()
        one.hears_end = True


class EveryByteTests(SynchronousTestCase):
    def test_cut_behind_every_byte(self) -> None:
        """Nothing is lost or doubled, and in the end all is mirrored."""
        seed = int(os.environ.get("QDS_SEED") or Random().randrange(1 << 32))
        drawn = Profile.draw(Random(seed), Random(f"operation of {seed}"))
        profile = replace(drawn, faults={}, steps=0, ldsus=2, eager=1.0, paths=1)
        knife = Knife()
        self.patch(End, "step", knife.stepped())
        in_stream = 0
        with a_base() as base:
            world = World(seed, base, profile)
            try:
                with installed(world):
                    world._make_disks()
                    world.due |= dict.fromkeys(("driver", "pmd", "rmd"), 0.0)
                    world._liveness()
                    for count in range(1, BYTES + 1):
                        in_stream += self.session(world, knife, count)
                    world._liveness()
            except Exception as error:
                raise AssertionError(f"QDS_SEED={seed}: {error!r}") from error
            finally:
                world.close()
        self.assertGreater(in_stream, BYTES // 4)
        self.assertLess(in_stream, BYTES - BYTES // 4)

    def session(self, world: World, knife: Knife, count: int) -> bool:
        """Have a new connection, and cut it; tell whether it had come to be a stream."""
        ends: list[Any] = [one for process in world.processes() for one in process.ends]
        for end in ends:
            if not end.wire.local:
                cut(end)
        knife.left = count
        streamed = False
        for _ in range(STEPS_MAX):
            if knife.left is None:
                return streamed
            rmd = world.rmd
            streamed = rmd is not None and rmd.group.link_state["state"] == "connected"
            if world.serving and world.random.random() < 0.3:
                world.ask()
                world._after()
            if not world._doable():
                # (Full writelogs may have led into a bypass.)
                world.operate()
            world.step()
        raise AssertionError(f"no connection passed {count} bytes")
