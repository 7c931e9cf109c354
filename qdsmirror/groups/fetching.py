"""Fetching: compares LDSUs with their mirror devices, and takes from these what differs.

Ranges of an LDSU in order, several under way at a time: the secondary is asked for the hashes of a
range, the data device is hashed, and what differs is asked for, kept where that is wanted, and
written.  It never gives up: what fails is tried again, and a link that was lost is waited for.
Behind each new link it is first made sure that the mirror stands where it stood.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from qdsmirror.core.backfresh import BackfreshState
from qdsmirror.core.frames import TRIM, WRITE, Entry
from qdsmirror.core.questions import DIGEST_BYTES, HASHES, READ, Standing
from qdsmirror.errors import BrokenError, DeviceFailedError, QdsError
from qdsmirror.groups.agreeing import ask_standings
from qdsmirror.limits import (
    BACKFRESH_READ_BYTES,
    BACKFRESH_RETRY_SECONDS_MAX,
    BACKFRESH_RETRY_SECONDS_MIN,
    BACKFRESH_SPANS_MAX,
    COMPARE_CHUNK_BYTES,
    COMPARE_SPAN_BYTES,
)
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.hashing import chunk_digests
from qdsmirror.storage.keep import KeepWriter, Kept

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit
    from qdsmirror.interfaces import IBlockDevice

_ZEROES = bytes(COMPARE_CHUNK_BYTES)

#: Offset and length.
Span = tuple[int, int]


class _Range:
    """A part of an LDSU on its way.

    :ivar chunk: bytes by which it is compared.
    :ivar spans: what differs and is not fetched yet; ``None`` before that is known.
    :ivar changed: bytes of it that differed.
    """

    def __init__(self, unit: DriverUnit, offset: int, length: int, chunk: int) -> None:
        self.unit = unit
        self.offset = offset
        self.length = length
        self.chunk = chunk
        self.spans: deque[Span] | None = None
        self.changed = 0

    @property
    def is_done(self) -> bool:
        return self.spans is not None and not self.spans


class Fetching:
    """One pass over a group's LDSUs.

    :param writes: whether what differs is fetched, or only counted.
    :param states: by LDSU, where to begin, and where its mirror must stand.
    :param ended: told when there is nothing left to do; what was written is not synced yet.
    :ivar done: by LDSU, bytes that are compared, and written where they differed.
    :ivar changed: by LDSU, bytes of them that differed.
    :ivar touched: whether something may have been written.
    """

    def __init__(
        self,
        group: DriverGroup,
        states: Sequence[BackfreshState],
        ended: Callable[[], object],
        *,
        writes: bool,
        keep: KeepWriter | None = None,
    ) -> None:
        self._group = group
        self._states = states
        self._ended = ended
        self._writes = writes
        self._keep = keep
        self.id = states[0].id
        self.started = states[0].started
        self.done = [state.done for state in states]
        self.changed = [state.changed for state in states]
        self.touched = False
        self._trouble = ""
        self._asked = list(self.done)
        self._under_way: deque[_Range] = deque()
        self._worker = group.runtime.slow_worker(f"{group.name} backfresh")
        self._jobs = 0
        self._idle: list[Deferred[None]] = []
        self._stopped = False
        #: A trial counts what differs from whatever the mirror is by then.
        self._verified = not writes
        self._verifying = False
        self._stalled: list[_Range] = []
        self._retry: Any = None
        self._retry_seconds = BACKFRESH_RETRY_SECONDS_MIN
        self._began_at = group.runtime.reactor.seconds()
        self._began_bytes = sum(self.done)

    # -- life ---------------------------------------------------------------------------------

    def link_up(self) -> None:
        """Learn of another link: behind it, the mirror may be another."""
        self._verified = not self._writes
        self.poke()

    def halt(self, reason: str) -> None:
        """Go on never more."""
        self.stop()
        self._trouble = reason

    def poke(self) -> None:
        """Go on, if there is a way."""
        if self._stopped:
            return
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if not self._verified:
            self._verify()
            return
        self._trouble = ""
        stalled, self._stalled = self._stalled, []
        for part in stalled:
            self._go_on(part)
        self._fill()

    def stop(self) -> Deferred[None]:
        """Ask and write nothing more; fires when nothing is being written, or will be."""
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        idle: Deferred[None] = Deferred()
        self._idle.append(idle)
        self._note_idle()
        return idle

    def close(self) -> Deferred[None]:
        """End its worker, and close the file."""
        closed = self._worker.stop()
        if self._keep is not None:
            keep = self._keep
            closed.addCallback(lambda _: keep.close())
        return closed

    def _note_idle(self) -> None:
        if self._stopped and not self._jobs:
            waiting, self._idle = self._idle, []
            for idle in waiting:
                idle.callback(None)

    def _run(
        self, job: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        self._jobs += 1

        def ended(result: Any, error: BaseException | None) -> None:
            self._jobs -= 1
            done(result, error)
            self._note_idle()

        self._worker.run(job, ended)

    # -- where the mirror stands ----------------------------------------------------------------

    def _verify(self) -> None:
        if self._verifying:
            return
        self._verifying = True
        asked = ask_standings(self._group)
        asked.addCallback(self._stands)
        asked.addErrback(lambda failure: self._fail(None, failure))
        asked.addBoth(self._has_verified)

    def _has_verified(self, _result: object) -> None:
        self._verifying = False
        if self._verified:
            self.poke()

    def _stands(self, standings: Sequence[Standing]) -> None:
        for unit, state, found in zip(self._group.units, self._states, standings, strict=True):
            if not found.coherent or found.place != state.place:
                raise BrokenError(
                    f"the mirror of {unit.name} is not what it was when the backfresh began",
                    hint="end it with killbackfresh, and begin another",
                )
            if not found.quiet:
                raise BrokenError(f"the mirror of {unit.name} lacks what its journal holds")
        self._verified = True
        self._retry_seconds = BACKFRESH_RETRY_SECONDS_MIN

    def _fail(self, part: _Range | None, failure: Failure) -> None:
        """Wait, and try again."""
        failure.trap(QdsError, OSError)  # type: ignore[no-untyped-call]
        if part is not None:
            self._stalled.append(part)
        if self._stopped:
            return
        self._verified = not self._writes
        self._trouble = failure.getErrorMessage()
        if self._retry is None:
            reactor = self._group.runtime.reactor
            self._retry = reactor.callLater(self._retry_seconds, self._try_again)
            self._retry_seconds = min(2 * self._retry_seconds, BACKFRESH_RETRY_SECONDS_MAX)

    def _try_again(self) -> None:
        self._retry = None
        self.poke()

    # -- ranges -------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Take up further ranges; know when there is none."""
        while self._verified and len(self._under_way) < BACKFRESH_SPANS_MAX:
            part = self._next()
            if part is None:
                break
            self._under_way.append(part)
            self._go_on(part)
        if not self._under_way and self._next_index() is None and not self._stopped:
            self._stopped = True
            self._ended()

    def _next_index(self) -> int | None:
        units = self._group.units
        return next((i for i, unit in enumerate(units) if self._asked[i] < unit.size), None)

    def _next(self) -> _Range | None:
        index = self._next_index()
        if index is None:
            return None
        unit = self._group.units[index]
        offset = self._asked[index]
        length = min(COMPARE_SPAN_BYTES, unit.size - offset)
        self._asked[index] = offset + length
        return _Range(unit, offset, length, self._group.config.tunables.chunk_size)

    def _go_on(self, part: _Range) -> None:
        """Ask what is to be known next of a range."""
        if self._stopped:
            return
        if not self._verified:
            self._stalled.append(part)
            return
        if part.is_done:
            self._finish()
            return
        ask = self._group.pmd.questions.ask
        if part.spans is None:
            asked = ask(HASHES, part.unit.index, part.offset, part.length, part.chunk)
            asked.addCallback(partial(self._hashed, part))
        else:
            asked = ask(READ, part.unit.index, *part.spans[0])
            asked.addCallback(partial(self._fetched, part, part.spans[0]))
        asked.addErrback(partial(self._fail, part))

    def _hashed(self, part: _Range, theirs: bytes) -> None:
        if self._stopped:
            return
        device = part.unit.device

        def compare() -> list[Span]:
            ours = chunk_digests(device, part.offset, part.length, part.chunk)
            return differing(part.offset, part.length, part.chunk, ours, theirs)

        self._run(compare, partial(self._compared, part))

    def _compared(
        self, part: _Range, spans: list[Span] | None, error: BaseException | None
    ) -> None:
        if spans is None:
            name = part.unit.name
            self._fail(part, _failure(f"data device of {name} cannot be read: {error}"))
            return
        part.changed = sum(length for _, length in spans)
        part.spans = deque(spans if self._writes else ())
        self._go_on(part)

    def _fetched(self, part: _Range, span: Span, data: bytes) -> None:
        if self._stopped:
            # Whoever has stopped us relies on that nothing is written any more.
            return
        self.touched = True
        unit = part.unit
        job = partial(_overwrite, unit.device, unit.index, span[0], data, self._keep)
        self._run(job, partial(self._written, part))

    def _written(
        self, part: _Range, failed: BaseException | None, error: BaseException | None
    ) -> None:
        if failed is not None:
            part.unit.fail_data(failed)
            self.halt(part.unit.dead)
        elif error is not None:
            where = f"{self._keep.path}: " if self._keep is not None else ""
            self._fail(part, _failure(f"{where}{error}"))
        else:
            assert part.spans is not None
            part.spans.popleft()
            self._go_on(part)

    def _finish(self) -> None:
        while self._under_way and self._under_way[0].is_done:
            part = self._under_way.popleft()
            self.done[part.unit.index] = part.offset + part.length
            self.changed[part.unit.index] += part.changed
        self._retry_seconds = BACKFRESH_RETRY_SECONDS_MIN
        self._fill()

    # -- status -------------------------------------------------------------------------------

    @property
    def waits(self) -> str:
        """Why it does not go on; "" while it does."""
        pmd = self._group.pmd
        if not self._stopped and not pmd.is_connected:
            return f"there is no link to the secondary: {pmd.link['reason'] or 'none yet'}"
        return self._trouble

    @property
    def remaining_bytes(self) -> int:
        """What is not compared yet."""
        return sum(unit.size for unit in self._group.units) - sum(self.done)

    def status(self) -> dict[str, Any]:
        """Give the ``backfresh`` object of ``qdsinfo --json``."""
        state = "fetching" if self._writes else "counting"
        if not self.remaining_bytes:
            state = "ending" if self._writes else "counted"
        elif self.waits:
            state = "waiting"
        done = sum(self.done)
        remaining = self.remaining_bytes
        elapsed = self._group.runtime.reactor.seconds() - self._began_at
        rate = (done - self._began_bytes) / elapsed if elapsed > 0 else 0.0
        return {
            "state": state,
            "id": self.id.hex(),
            "dry_run": not self._writes,
            "done_bytes": done,
            "remaining_bytes": remaining,
            "changed_bytes": sum(self.changed),
            "rate": round(rate),
            "eta_seconds": round(remaining / rate, 1) if rate else None,
            "started": self.started,
            "keep": self._keep.path if self._keep is not None else "",
            "waits": self.waits,
        }


def _failure(text: str) -> Failure:
    return Failure(QdsError(text))  # type: ignore[no-untyped-call]


def differing(offset: int, length: int, chunk: int, ours: bytes, theirs: bytes) -> list[Span]:
    """Give what differs in a range, neighbours together up to what is read at once.

    :param chunk: bytes of which each digest is; the last one's may be less.
    :param ours: the digests of its chunks, one after the other; ``theirs`` likewise.
    """
    spans: list[Span] = []
    for number, at in enumerate(range(0, length, chunk)):
        place = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
        if ours[place] == theirs[place]:
            continue
        size = min(chunk, length - at)
        first, before = spans[-1] if spans else (0, 0)
        if spans and first + before == offset + at and before + size <= BACKFRESH_READ_BYTES:
            spans[-1] = (first, before + size)
        else:
            spans.append((offset + at, size))
    return spans


def _overwrite(
    device: IBlockDevice, ldsu: int, offset: int, data: bytes, keep: KeepWriter | None
) -> BaseException | None:
    """Write what was fetched, after what stands there is kept, durably.

    :returns: how the data device failed; ``None``: it did not.
    :raises OSError: the blocks could not be read or kept; nothing is written then.
    :raises CorruptError: likewise.
    """
    if keep is not None:
        keep.append([Kept(ldsu, offset, device.pread(len(data), offset))])
    view = memoryview(data)
    entries = []
    for at in range(0, len(data), COMPARE_CHUNK_BYTES):
        piece = view[at : at + COMPARE_CHUNK_BYTES]
        empty = piece == _ZEROES[: len(piece)]
        entries.append(
            Entry(offset + at, len(piece), TRIM if empty else WRITE, None if empty else piece)
        )
    try:
        apply_entries(device, entries)
    except (OSError, DeviceFailedError) as error:
        return error
    return None
