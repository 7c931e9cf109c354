"""Answering: what of a group's changes may be answered with regard to the secondary (SYNC).

Whoever has an answer that is due locally (in the writelog, or durable there) gives it here.  In
asynchronous operation it goes out; in synchronous and near-synchronous operation it may have to
wait until the secondary has committed enough (:mod:`qdsmirror.core.allowance`).

Where writes cannot be committed, they wait, or, with ``on_disconnect = async``, go on once it is
durable in the group's superblocks that it is *degraded* (rules.md 21).  So they do in a bypass that
the operator has begun.  A bypass after a failed writelog is none: there they wait.  Degraded ends,
durably, when all that was answered meanwhile is committed and the mirror is coherent.

A full refresh may let the secondary's history begin anew: what was framed before its cut then comes
with the refresh, and is answered at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.logger import Logger

from qdsmirror.core.allowance import Allowance, CatchUp
from qdsmirror.core.nbd import CMD_FLUSH
from qdsmirror.errors import QdsError
from qdsmirror.groups.bypass import LEAVING, OFF, ON
from qdsmirror.groups.delaying import DelayedAnswers
from qdsmirror.groups.direct import abandon_all
from qdsmirror.limits import CATCH_UP_ENTRIES, FAILURE_REASON_CHARS_MAX, STOP_ANSWER_SECONDS

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.core.superblock import Superblock
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit
    from qdsmirror.interfaces import INbdConnection

ASYNC, SYNC, NEAR_SYNC = "async", "sync", "near-sync"
BLOCK = "block"

#: Number, order of arrival, LDSU, request.
_Held = tuple[int, int, "DriverUnit", "Request"]


class Answering:
    """The answers of one group.

    A finished request's ``state`` is the number of its last entry; a flush's that of the last entry
    framed before it.

    :ivar degraded: since when (seconds since 1970) and why more is answered than the operation
        promises, as the superblocks have it; ``None`` while nothing is.
    :ivar kept_since: since when all that was answered is as the operation promises (seconds since
        1970); ``None`` while it is not, and in asynchronous operation.
    :ivar delayed: holds writes up that may be answered, where a throttle says so.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.degraded: dict[str, Any] | None = None
        self.kept_since: float | None = None
        self.delayed = DelayedAnswers(group.runtime.reactor)
        self._numbers = Allowance(0, 1)
        #: How many answered entries may be uncommitted; None: any number.
        self._limit: int | None = None
        #: Nothing behind this number is answered.
        self._answered = 0
        self._catch_up: CatchUp | None = None
        self._held: list[_Held] = []
        self._skipped: list[_Held] = []
        self._gone: WeakSet[INbdConnection] = WeakSet()
        self._arrived = 0
        self._skipping = False
        self._recording = False
        self._recorded: list[Deferred[None]] = []
        self._begun = self._leaving = False
        self._deadline: Any = None

    def resume(self, superblocks: Iterable[Superblock]) -> None:
        """Take up what the superblocks say: one that says so is enough."""
        said = next((s.degraded for s in superblocks if s.degraded is not None), None)
        self.degraded = dict(said) if said is not None else None

    def begin(self) -> None:
        """Begin to answer: everything is recovered.

        Whatever is not known to be committed may have been answered.
        """
        group = self._group
        # Of another history, where numbers are given anew.
        self._give_up()
        self._catch_up = None
        self._numbers = Allowance(group.committed_gsn, group.next_gsn)
        self._answered = self._numbers.framed
        if not group.coherent:
            # Perhaps a refresh was to bring what counts as committed.
            self._numbers.skip(0)
        for unit in group.units:
            unit.last_number = self._numbers.framed if self._numbers.uncommitted else 0
        self._begun = True
        self.look()

    # -- what is promised -----------------------------------------------------------------------

    @property
    def operation(self) -> str:
        """The mode of operation of now: ASYNC, SYNC or NEAR_SYNC."""
        return self._group.config.operation

    @property
    def is_prompt(self) -> bool:
        """Whether frames should become durable, and so leave, without waiting for company.

        Half of what may be uncommitted is room enough for those that do wait.
        """
        return self._limit is not None and 2 * self._numbers.uncommitted >= self._limit

    @property
    def waits_for_room(self) -> bool:
        """Whether a full writelog makes writes wait, whatever ``on_overflow`` says.

        A bypass would answer what cannot be committed.
        """
        return self.operation != ASYNC and self._group.config.on_disconnect == BLOCK

    @property
    def may_go_past(self) -> bool:
        """Whether writes may be answered that went past the writelogs."""
        return self.operation == ASYNC or self.degraded is not None

    @property
    def _promised(self) -> int:
        """How many answered entries the operation lets be uncommitted, unless it is ASYNC."""
        return self._group.config.near_sync_entries if self.operation == NEAR_SYNC else 0

    def _allowed(self) -> int | None:
        group = self._group
        promised = self._promised
        catch_up, self._catch_up = self._catch_up, None
        if self.operation == ASYNC:
            return None
        if self.degraded is None:
            return promised
        if group.bypass.phase == ON:
            return None
        if group.config.on_disconnect == BLOCK:
            return promised
        if not self._group.pmd.is_connected:
            return None
        self._catch_up = catch_up or CatchUp(self._numbers.uncommitted)
        return max(promised, self._catch_up.limit)

    # -- answers --------------------------------------------------------------------------------

    @property
    def last_number(self) -> int:
        """The number of the last entry that the application's frames had."""
        return self._numbers.framed

    def framed(self, frame: UnitFrame) -> None:
        """Count a new frame."""
        self._numbers.frame(frame.gsn_last, bool(frame.entries))

    def give(self, unit: DriverUnit, requests: Sequence[Request]) -> None:
        """Answer an LDSU's requests, now or when that may be; locally they are due."""
        limit = self._limit
        if limit is None:
            self.delayed.give(requests)
            return
        upto = self._numbers.answerable(limit)
        now: list[Request] = []
        for request in requests:
            if request.state <= upto and not self._awaits_refresh(request):
                now.append(request)
            elif request.connection not in self._gone:
                self._hold(unit, request)
        self.delayed.give(self._noted(now))
        if len(now) == len(requests):
            return
        if self._leaving and self._deadline is None:
            self._give_up()
        else:
            self._judge()

    def _awaits_refresh(self, request: Request) -> bool:
        """Tell whether a change comes to the secondary with a refresh only.

        A flush does not wait for that: it would, long, where nothing is written meanwhile.
        """
        return request.command != CMD_FLUSH and self._numbers.is_skipped(request.state)

    def _hold(self, unit: DriverUnit, request: Request) -> None:
        # Its payload is in the writelog: others may have the room that it took.
        request.connection.release(request)
        self._arrived += 1
        held = (request.state, self._arrived, unit, request)
        if self._awaits_refresh(request):
            self._skipped.append(held)
        else:
            heappush(self._held, held)

    def _noted(self, requests: list[Request]) -> list[Request]:
        self._answered = max([self._answered, *[request.state for request in requests]])
        return requests

    def _release(self) -> None:
        """Answer what may be answered by now."""
        held, limit = self._held, self._limit
        free: list[Request] = []
        if limit is None:
            free = [one[-1] for one in sorted(held)]
            held.clear()
        else:
            upto = self._numbers.answerable(limit)
            while held and held[0][0] <= upto:
                free.append(heappop(held)[-1])
        if self._skipped and (limit is None or self.degraded is not None):
            free += [one[-1] for one in self._skipped]
            self._skipped.clear()
        if free:
            self.delayed.give(self._noted(free))

    def forget(self, connection: INbdConnection) -> None:
        """Drop the answers of a client that is gone, also those that are yet to be given here."""
        self._gone.add(connection)
        self.delayed.forget(connection)
        if self._held or self._skipped:
            self._keep(lambda one: one[-1].connection is not connection)

    def drop(self, unit: DriverUnit) -> list[Request]:
        """Give what waits of an LDSU, and forget it; the caller answers."""
        self.delayed.hurry()
        dropped = [one[-1] for one in sorted([*self._held, *self._skipped]) if one[2] is unit]
        self._keep(lambda one: one[2] is not unit)
        return dropped

    def _keep(self, wanted: Callable[[_Held], bool]) -> None:
        self._held = [one for one in self._held if wanted(one)]
        heapify(self._held)
        self._skipped = [one for one in self._skipped if wanted(one)]

    # -- what the group tells -------------------------------------------------------------------

    def skip(self) -> None:
        """Learn that the next that is said to be committed was skipped: a history began anew."""
        self._skipping = True

    def committed(self, gsn: int) -> None:
        """Learn what the secondary has committed."""
        numbers = self._numbers
        before = numbers.committed
        more = numbers.commit(gsn)
        if self._skipping:
            self._skipping = False
            self._skip(before)
        if self.operation == ASYNC and self.degraded is None:
            return
        if self._catch_up is not None:
            self._catch_up.committed(more, numbers.uncommitted)
        self.look()

    def _skip(self, committed_before: int) -> None:
        self._numbers.skip(committed_before)
        self._skipped += [one for one in self._held if self._awaits_refresh(one[-1])]
        self._held = [one for one in self._held if not self._awaits_refresh(one[-1])]
        heapify(self._held)

    def mirror_is_whole(self) -> None:
        """Learn that a refresh has ended: what was skipped has come with it."""
        self._numbers.skipped = None
        skipped, self._skipped = self._skipped, []
        for one in skipped:
            heappush(self._held, one)
        self.look()

    def look(self) -> None:
        """Look again at what may be answered: link, bypass or settings have changed."""
        if not self._begun:
            return
        was = self._limit
        self._limit = self._allowed()
        if was is None and self._limit is not None:
            self._answered = max(self._answered, self._numbers.framed)
        self._release()
        self._judge()
        self._note_kept()

    def _note_kept(self) -> None:
        numbers = self._numbers
        kept = (
            self.operation != ASYNC
            and self.degraded is None
            and numbers.skipped is None
            and self._answered <= numbers.committed + self._promised
        )
        if not kept:
            self.kept_since = None
        elif self.kept_since is None:
            self.kept_since = self._group.runtime.wall()

    # -- degraded -------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Begin or end to be degraded, if it is time for that."""
        if self._recording:
            return
        if self.degraded is None:
            why = self._why_degraded()
            if why:
                now = self._group.runtime.wall()
                self._record({"since": now, "reason": why[:FAILURE_REASON_CHARS_MAX]})
        elif self.operation == ASYNC or self._is_caught_up:
            self._record(None)

    def _why_degraded(self) -> str:
        """Give why the group must begin to be degraded; "" where it need not, or may not."""
        group = self._group
        goes_on = group.config.on_disconnect != BLOCK
        if self.operation == ASYNC:
            return ""
        # Also while it is being left, which waits for what was written past the writelogs.
        in_bypass = group.bypass.phase in (ON, LEAVING)
        if in_bypass and (goes_on or not group.failures.stops_framing):
            return f"in bypass: {group.bypass.reason}"
        if not goes_on or all(unit.log_failed for unit in group.units):
            return ""
        if not self._group.pmd.is_connected:
            link = group.pmd.link["reason"] or group.pmd.link["state"]
            return f"the secondary is not connected: {link}" if self._held else ""
        if self._skipped:
            return "a refresh must first bring what was written before it began"
        behind = self._answered - self._numbers.committed - self._promised
        return f"{behind} answered entries are to be committed" if behind > CATCH_UP_ENTRIES else ""

    @property
    def _is_caught_up(self) -> bool:
        return (
            self._group.pmd.is_connected
            and self._group.bypass.phase == OFF
            and self._group.coherent
            and self._numbers.skipped is None
            and self._limit == self._promised
            and self._answered <= self._numbers.committed + self._promised
        )

    @inlineCallbacks
    def _record(self, degraded: dict[str, Any] | None) -> Any:
        """Make it durable everywhere that the group is degraded, or is so no longer.

        Only then more is answered than is promised; and from before the end on nothing is.
        """
        self._recording = True
        group = self._group
        if degraded is None:
            self.degraded = None
            self._limit = self._allowed()
        try:
            yield group.checkpoints.record_everywhere(degraded=degraded)
        except QdsError:
            # A writelog has failed, and is not asked again.
            pass
        else:
            self.degraded = degraded
            text = "no longer degraded" if degraded is None else f"degraded: {degraded['reason']}"
            self.log.warn("{group}: {text}", group=group.name, text=text)
        self._recording = False
        self.look()
        for unit in group.units:
            unit.direct.go_on()
        if not self._recording:
            waiting, self._recorded = self._recorded, []
            for one in waiting:
                one.callback(None)

    def settled(self) -> Deferred[None]:
        """Fire when nothing is being recorded of it."""
        if not self._recording:
            return succeed(None)
        fired: Deferred[None] = Deferred()
        self._recorded.append(fired)
        return fired

    # -- the end --------------------------------------------------------------------------------

    def leave(self) -> None:
        """Give up what waits, soon or at once: the driver stops, and clients ask again."""
        self._leaving = True
        self.delayed.end()
        group = self._group
        if group.bypass.phase == ON and not self.may_go_past:
            for unit in group.units:
                abandon_all(unit.direct.drop())
        if self._group.pmd.is_connected:
            reactor = group.runtime.reactor
            self._deadline = reactor.callLater(STOP_ANSWER_SECONDS, self._end)
        else:
            self._end()

    def link_changed(self) -> None:
        """Learn that the secondary is there, or gone; at a stop nothing waits for it then."""
        self.look()
        if self._leaving and not self._group.pmd.is_connected:
            self._end()

    def left(self) -> None:
        """Learn that the driver's clients are gone: nothing waits any more."""
        self._end()

    def _end(self) -> None:
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = None
        self._give_up()

    def _give_up(self) -> None:
        requests = [one[-1] for one in sorted([*self._held, *self._skipped])]
        self._held, self._skipped = [], []
        abandon_all(requests)

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Give what ``qdsinfo --json`` says of it."""
        waiting = len(self._held) + len(self._skipped)
        if not self.may_go_past:
            waiting += sum(unit.direct.waiting for unit in self._group.units)
        asynchronous = self.operation == ASYNC
        return {
            "operation": self.operation,
            "degraded": dict(self.degraded) if self.degraded is not None else None,
            "synchronous": None
            if asynchronous
            else {
                "kept": self.kept_since is not None,
                "since": self.kept_since,
                "waiting": waiting,
                "on_disconnect": self._group.config.on_disconnect,
                "near_sync_entries": self._promised or None,
            },
        }
