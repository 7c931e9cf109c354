"""What an application asks of a driver and is promised; a power cut before each I/O of that."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from qdsmirror.core.nbd import Request
from tests.fakes import MemoryDevice
from tests.groups.world import BLOCK, DriverWorld, unique


class Power:
    """Cuts the power before the I/O with a given number, counted over all devices."""

    def __init__(self, test: SynchronousTestCase) -> None:
        self.count = 0
        self.limit: int | None = None
        enter = MemoryDevice._enter

        def counted(device: MemoryDevice, method: str, writes: bool = False, **more: Any) -> None:
            enter(device, method, writes, **more)
            if writes:
                self.tick()

        self._patch = test.patch(MemoryDevice, "_enter", counted)

    def tick(self) -> None:
        """Count an I/O; it fails when the power is cut."""
        if self.limit is not None and self.count >= self.limit:
            raise OSError(errno.EIO, "the power is cut")
        self.count += 1

    def restore(self) -> None:
        """Count no more."""
        self._patch.restore()


class Application(ABC):
    """An application's writes and flushes, one block each.

    :ivar promised: content that must survive, by (LDSU, offset).
    :ivar possible: content that may be found, likewise.
    :ivar asked: writes that nothing has promised yet.
    :ivar flushes: flushes that are not answered, and the writes that they promise.
    """

    def __init__(self, test: SynchronousTestCase, world: DriverWorld) -> None:
        self.test = test
        self.world = world
        self.promised: dict[tuple[int, int], bytes] = {}
        self.possible: dict[tuple[int, int], set[bytes]] = {}
        self.asked: dict[Request, tuple[tuple[int, int], bytes]] = {}
        self.flushes: dict[Request, list[Request]] = {}
        self.numbers = iter(range(1, 10_000))

    @abstractmethod
    def settle(self) -> None:
        """Let things happen that can happen by themselves."""

    def write(self, ldsu: int, block: int, fua: bool = False, trim: bool = False) -> Request:
        place = (ldsu, block * BLOCK)
        data = bytes(BLOCK) if trim else unique(next(self.numbers))
        self.possible.setdefault(place, {bytes(BLOCK)}).add(data)
        # Whatever was promised of it may be replaced from now on.
        self.promised.pop(place, None)
        self.asked = {r: one for r, one in self.asked.items() if one[0] != place}
        request = self.world.client.request(
            nbd.CMD_TRIM if trim else nbd.CMD_WRITE,
            place[1],
            BLOCK,
            None if trim else data,
            nbd.CMD_FLAG_FUA if fua else 0,
        )
        self.asked[request] = place, data
        return self._submit(ldsu, request)

    def flush(self, ldsu: int) -> Request:
        client = self.world.client
        request = client.request(nbd.CMD_FLUSH)
        self.flushes[request] = [
            r for r, one in self.asked.items() if one[0][0] == ldsu and r in client.done
        ]
        return self._submit(ldsu, request)

    def _submit(self, ldsu: int, request: Request) -> Request:
        self.world.group.units[ldsu].submit([request])
        self.settle()
        self.note()
        return request

    def note(self) -> None:
        """Take note of what was promised by now."""
        done = set(self.world.client.done)
        for request in [r for r in self.asked if r in done and r.flags & nbd.CMD_FLAG_FUA]:
            self._promise(request)
        for request in [r for r in self.flushes if r in done]:
            for write in self.flushes.pop(request):
                self._promise(write)

    def _promise(self, request: Request) -> None:
        if request in self.asked:
            place, data = self.asked.pop(request)
            self.promised[place] = data
            self.possible[place] = {data}

    def content(self, ldsu: int, offset: int, length: int = BLOCK) -> bytes:
        """Give what the driver reads."""
        return self.world.client.read(self.world.group.units[ldsu], offset, length)

    def check_possible(self, dead: int | None = None) -> None:
        """Check that no sector is of another time; of a dead LDSU nothing is read."""
        for (ldsu, offset), some in self.possible.items():
            if ldsu == dead:
                continue
            found = self.content(ldsu, offset)
            for at in range(0, BLOCK, 512):
                fits = {one[at : at + 512] for one in some}
                self.test.assertIn(found[at : at + 512], fits, f"of another time: {ldsu} {offset}")


Story = TypeVar("Story", bound=Application)


def cut_before_each(
    test: SynchronousTestCase, begin: Callable[[Power], Story], tell: Callable[[Story], None]
) -> Iterator[Story]:
    """Tell a story to its end, then again and again, cut before each of its I/Os.

    :param begin: makes the story; its driver is started with the power on.
    """
    power = Power(test)
    total: int | None = None
    limit: int | None = None
    while total is None or limit < total:
        power.limit = None
        story = begin(power)
        story.world.start()
        power.count, power.limit = 0, limit
        tell(story)
        if total is None:
            total = power.count
        power.limit = None
        yield story
        story.world.close()
        limit = 0 if limit is None else limit + 1
    power.restore()
    test.assertGreater(total, 40)
