"""A comparison of LDSUs with their mirror devices, chunk by chunk, by blake3, while writes go on.

Both sites hash the same span at the same time, several spans in flight.  What is hashed is, of each
byte, what it was at some instant meanwhile, and the two instants differ.  Equal is equal all the
same: whatever was written to a byte between them reaches the mirror device in its order, and leaves
there what it leaves here.  Two things are needed for that.  All that was written since the mirror's
instant has gone through the writelogs: so nothing is compared before the mirror devices have all
from before the refresh began.  And what was hashed here is not lost: so a verdict counts once the
writes hashed are durable (rules.md 14).

A verdict is about the one secondary that gave it: see :meth:`Refresh.begin`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from twisted.python.failure import Failure

from qdsmirror.core.questions import DIGEST_BYTES, HASHES
from qdsmirror.errors import DegradedError
from qdsmirror.limits import (
    COMPARE_HASHES_MAX,
    COMPARE_RANGES_MAX,
    COMPARE_SPAN_BYTES,
    COMPARE_SPANS_MAX,
)

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


class _Span:
    """A range that is being compared.

    :ivar chunk: bytes by which it is.
    :ivar asked: whether the secondary is at it; ``ours``, ``theirs``: the digests, once known.
    """

    def __init__(self, unit: DriverUnit, offset: int, length: int, chunk: int) -> None:
        self.unit = unit
        self.offset = offset
        self.length = length
        self.chunk = chunk
        self.asked = False
        self.hashing = False
        self.ours: bytes | None = None
        self.theirs: bytes | None = None


class Comparison:
    """Finds what differs; the :class:`~qdsmirror.groups.coverage.Coverage` of a smart refresh.

    :param found: called when more is known.
    :ivar proven_gsn: the verdicts until now count once this is durable.
    """

    def __init__(self, group: DriverGroup, found: Callable[[], None]) -> None:
        self._group = group
        self._found = found
        self._begun = False
        self.proven_gsn = 0
        self._known = [0] * len(group.units)
        self._ranges: deque[tuple[int, int, int]] = deque()
        self._spans: deque[_Span] = deque()
        # What is compared next.
        self._unit = 0
        self._offset = 0

    # -- Coverage -------------------------------------------------------------------------------

    def next(self, unit: DriverUnit, offset: int) -> tuple[int, int] | None:
        """See :class:`Coverage`."""
        ranges = self._ranges
        while ranges and (ranges[0][0], ranges[0][2]) <= (unit.index, offset):
            ranges.popleft()
        if not ranges or ranges[0][0] != unit.index:
            return None
        return max(offset, ranges[0][1]), ranges[0][2]

    def known(self, unit: DriverUnit) -> int:
        """See :class:`Coverage`."""
        return self._known[unit.index]

    def bytes_from(self, unit: DriverUnit, offset: int) -> int:
        """See :class:`Coverage`: what is equal is work, too."""
        return unit.size - offset

    def begin(self, done: Sequence[int]) -> None:
        """See :class:`Coverage`."""
        self._known = list(done)
        self._offset = done[0]
        self._begun = True
        self.go_on()

    def stop(self) -> None:
        """See :class:`Coverage`."""
        self._begun = False

    def go_on(self) -> None:
        """See :class:`Coverage`."""
        if not self._begun:
            return
        while len(self._spans) < COMPARE_SPANS_MAX and len(self._ranges) < COMPARE_RANGES_MAX:
            span = self._take_span()
            if span is None:
                break
            self._spans.append(span)
        # Hashing may end at once, and call us again.
        for span in list(self._spans):
            self._ask(span)
            self._hash(span)

    # -- spans ------------------------------------------------------------------------------------

    def _take_span(self) -> _Span | None:
        units = self._group.units
        while self._unit < len(units) and self._offset >= units[self._unit].size:
            self._unit += 1
            self._offset = self._known[self._unit] if self._unit < len(units) else 0
        if self._unit >= len(units):
            return None
        unit = units[self._unit]
        # Whole chunks, counted from the LDSU's start.
        end = min((self._offset // COMPARE_SPAN_BYTES + 1) * COMPARE_SPAN_BYTES, unit.size)
        chunk = self._group.config.tunables.chunk_size
        span = _Span(unit, self._offset, end - self._offset, chunk)
        self._offset = end
        return span

    def _ask(self, span: _Span) -> None:
        questions = self._group.pmd.questions
        if span.asked or not questions.has_room:
            return
        span.asked = True
        asked = questions.ask(HASHES, span.unit.index, span.offset, span.length, span.chunk)
        asked.addCallbacks(partial(self._answered, span), partial(self._unanswered, span))

    def _answered(self, span: _Span, digests: bytes) -> None:
        span.theirs = digests
        self._take_verdicts()

    def _unanswered(self, span: _Span, failure: Failure) -> None:
        if isinstance(failure.value, DegradedError):
            # The link is gone; asked again when it is back.
            span.asked = False
            return
        # What the secondary cannot read it may be able to write.
        self._group.note_error(f"{span.unit.name}: {failure.getErrorMessage()}")
        self._answered(span, b"")

    def _hash(self, span: _Span) -> None:
        if span.hashing or sum(s.hashing and s.ours is None for s in self._spans) >= (
            COMPARE_HASHES_MAX
        ):
            return
        span.hashing = True
        span.unit.reading.digests(span.offset, span.length, span.chunk, partial(self._hashed, span))

    def _hashed(self, span: _Span, digests: bytes | None, error: BaseException | None) -> None:
        # An error here is met again, and told, by the read of what then counts as different.
        span.ours = digests if error is None and digests is not None else b"?"
        # All that was hashed was framed by now.
        self.proven_gsn = self._group.next_gsn - 1
        self._take_verdicts()

    def _take_verdicts(self) -> None:
        spans = self._spans
        some = False
        while self._begun and spans and spans[0].ours is not None and spans[0].theirs is not None:
            span = spans.popleft()
            self._compare(span)
            self._known[span.unit.index] = span.offset + span.length
            some = True
        if some:
            self._found()
        self.go_on()

    def _compare(self, span: _Span) -> None:
        ours, theirs = span.ours or b"", span.theirs or b""
        end = span.offset + span.length
        for number, at in enumerate(range(span.offset, end, span.chunk)):
            digest = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
            if ours[digest] and ours[digest] == theirs[digest]:
                continue
            self._differs(span.unit.index, at, min(at + span.chunk, end))

    def _differs(self, unit: int, first: int, end: int) -> None:
        if self._ranges and self._ranges[-1][0] == unit and self._ranges[-1][2] == first:
            first = self._ranges.pop()[1]
        self._ranges.append((unit, first, end))
