"""The driver's clients: what they ask, and what they were promised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zope.interface import implementer

from qdsmirror.core import nbd
from qdsmirror.core.nbd import Request
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.interfaces import INbdConnection
from qdsmirror.limits import KIB
from tests.sim.history import Violation, payload
from tests.sim.profile import Profile
from tests.sim.sites import Sites
from tests.sim.synchrony import Synchrony

#: One write of so many is of zeroes.
_ZEROES_EACH = 13


@implementer(INbdConnection)
class Client:
    """A client's connection to the driver."""

    def __init__(self, world: Clients, number: int) -> None:
        self.world = world
        self.number = number
        self.gone = False
        self.open: dict[int, Asked] = {}

    def __hash__(self) -> int:
        return self.number

    def answer(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.world.answered(self._asked(request))

    def answer_read(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        self.world.was_read(self._asked(request), b"".join(pieces))

    def answer_error(self, request: Request, errno_code: int, message: str) -> None:
        self._asked(request)
        self.world.was_refused(message)

    def release(self, request: Request) -> None:
        request.payload = None

    def answer_status(self, request: Request, extents: Sequence[tuple[int, int]]) -> None:
        self._asked(request)

    def abandon(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._asked(request)
        self.gone = True

    def hung_up(self) -> bool:
        return self.gone

    def _asked(self, request: Request) -> Asked:
        asked = self.open.pop(id(request), None)
        if asked is None:
            raise Violation("DURABLE: a request is answered twice")
        return asked


class Asked:
    """A request that a client waits for.

    :ivar expected: of a read, the newest answered write of each sector.
    :ivar zeroes: whether a write is of zeroes.
    :ivar since: the last GSN by the time of the request.
    :ivar answer: when a write was answered, or a flush asked for; in the order of numbers.
    """

    def __init__(
        self, number: int, ldsu: int, request: Request, since: int, zeroes: bool = False
    ) -> None:
        self.number = number
        self.ldsu = ldsu
        self.request = request
        self.since = since
        self.zeroes = zeroes
        self.expected: dict[int, int] = {}
        self.answer = 0

    def __str__(self) -> str:
        asked = self.request
        return f"command {asked.command} of {asked.length} bytes at {asked.offset}"


class Clients(Sites):
    """The sites, and the applications at the primary.

    :ivar answered_writes: by LDSU, the writes that no answered flush covers yet.
    """

    def __init__(self, seed: int, base: Path, profile: Profile | None = None) -> None:
        super().__init__(seed, base, profile)
        self.clients: list[Client] = []
        self.answered_writes: list[list[Asked]] = []
        self.synchrony = Synchrony(self)

    def driver_began(self) -> None:
        self.answered_writes = [[] for _ in self.config.ldsus]
        self.synchrony.recovered()
        self.model.backfreshes.given_up = self.synchrony.forget
        self.clients = [Client(self, n) for n in range(self.profile.clients)]

    def driver_ended(self) -> None:
        for client in self.clients:
            client.open.clear()
        self.clients = []

    # -- clients ------------------------------------------------------------------------------

    def ask(self) -> None:
        """Let a client ask for one thing or several."""
        random = self.random
        ldsu = random.randrange(self.profile.ldsus)
        client = random.choice(self.clients)
        if len(client.open) > 64:
            return
        assert self.driver is not None
        unit: DriverUnit = self.driver.group.units[ldsu]
        asked = [self._request(client, ldsu) for _ in range(random.choice((1, 1, 1, 2, 5)))]
        self.note(f"ask {ldsu} {[(a.request.command, a.request.offset) for a in asked]}")
        unit.submit([one.request for one in asked])

    def _request(self, client: Client, ldsu: int) -> Asked:
        random = self.random
        block = self.profile.block
        blocks = self.profile.size // block
        command = random.choices(
            (nbd.CMD_WRITE, nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES),
            (60, 8, 16, 4, 4),
        )[0]
        if command == nbd.CMD_FLUSH:
            return self.submit(client, ldsu, command, 0, 0)
        length = random.choice((1, 1, 2, 8, min(blocks, 64 * KIB // block)))
        length = min(length, blocks)
        offset = random.randrange(blocks - length + 1)
        # So short that it is one entry: zeroes do not tell whose they are.
        zeroes = not self.numbers % _ZEROES_EACH and length * block <= 16 * KIB
        return self.submit(client, ldsu, command, offset * block, length * block, zeroes)

    def submit(
        self,
        client: Client,
        ldsu: int,
        command: int,
        offset: int,
        length: int,
        zeroes: bool = False,
    ) -> Asked:
        """Make a request and know it; the caller hands it to the LDSU.

        :param zeroes: what a write has for its payload.
        """
        number = self._number()
        flags = 0
        data: bytes | None = None
        sectors = self.model.sectors[ldsu]
        if command in (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            if self.random.random() < 0.15:
                flags |= nbd.CMD_FLAG_FUA
            if command == nbd.CMD_WRITE and not zeroes:
                data = payload(number, length)
            elif command == nbd.CMD_WRITE_ZEROES and self.random.random() < 0.5:
                flags |= nbd.CMD_FLAG_NO_HOLE
            sectors.write(number, offset, length, data)
            if command == nbd.CMD_WRITE and zeroes:
                data = bytes(length)
        request = Request(client, bytes(8), command, flags, offset, length, data)
        since = max(tip.gsn_last for tip in self.model.tips)
        asked = Asked(number, ldsu, request, since, zeroes)
        if command == nbd.CMD_READ:
            asked.expected = sectors.expect(offset, length)
        elif command == nbd.CMD_FLUSH:
            asked.answer = number
        client.open[id(request)] = asked
        return asked

    def answered(self, asked: Asked) -> None:
        """Take a success; from now on it is a promise."""
        self.count("answers")
        request, ldsu = asked.request, asked.ldsu
        sectors = self.model.sectors[ldsu]
        if request.command == nbd.CMD_FLUSH:
            safe = [one for one in self.answered_writes[ldsu] if one.answer < asked.answer]
            self.answered_writes[ldsu] = [
                one for one in self.answered_writes[ldsu] if one.answer > asked.answer
            ]
        else:
            self.synchrony.answered(asked)
            sectors.answered(asked.number, request.offset, request.length)
            if request.payload is not None:
                self.model.check_answered(ldsu, request.offset, request.payload)
            if request.flags & nbd.CMD_FLAG_FUA or self.profile.durability == "always":
                safe = [asked]
            else:
                safe = []
                asked.answer = self._number()
                self.answered_writes[ldsu].append(asked)
        for one in safe:
            done = one.request
            if not self.model.is_safe(ldsu, one.number, done.offset, done.length):
                why = "LOUD" if self.latched else "DURABLE"
                raise Violation(f"{why}: LDSU {ldsu} promises what is on no platters: {one}")
            sectors.made_safe(one.number, done.offset, done.length)

    def was_read(self, asked: Asked, data: bytes) -> None:
        self.count("reads")
        self.model.sectors[asked.ldsu].check_read(
            asked.expected, asked.request.offset, data, f"read of LDSU {asked.ldsu}"
        )

    def was_refused(self, message: str) -> None:
        self.count("refused requests")
        if "backfresh" in message:
            self.count("refused over a backfresh")
        elif not any(path in message for path in self.latched):
            raise Violation(f"LOUD: a request is refused without a failed device: {message}")
