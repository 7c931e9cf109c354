"""How many answered entries the secondary may lack: the counting behind invariant SYNC.

The application's entries of a group are numbered in the order of their GSNs; what a refresh or the
group itself frames has GSNs and no number.  An entry may be answered once at most so many entries
up to and with it are not committed: none in synchronous operation, n in near-synchronous
(rules.md 21).  What was answered that way stays within the bound whatever is answered later.
"""

from __future__ import annotations

from collections import deque

from qdsmirror.limits import UNNUMBERED_MAX


class SplitNumber(int):
    """A number of a request that does not fit into one frame.

    :ivar first: the number of its first entry.
    """

    first: int

    def __new__(cls, number: int, first: int) -> SplitNumber:
        """Give ``number`` with the first one."""
        made = super().__new__(cls, number)
        made.first = first
        return made


class Allowance:
    """The numbers of one group's entries.

    What a start has found in the writelogs, and does not know to be committed, counts as the
    application's.

    :param committed_gsn: what the secondary has acknowledged.
    :param next_gsn: of the next entry.
    :ivar framed: the number of the last entry of the application.
    :ivar committed: how far these numbers are committed.
    :ivar skipped: numbers (after the first, up to the second) that a refresh brings to a
        secondary that begins anew behind them: they count as committed and are not.
    """

    def __init__(self, committed_gsn: int, next_gsn: int) -> None:
        self.framed = next_gsn - 1
        self.committed = committed_gsn
        self.skipped: tuple[int, int] | None = None
        self._framed_gsn = next_gsn - 1
        self._committed_gsn = committed_gsn
        self._others_framed = 0
        self._others_committed = 0
        #: Of frames that are not the application's: last GSN, and how many GSNs such frames had.
        self._others: deque[tuple[int, int]] = deque()

    def frame(self, gsn_last: int, is_application: bool) -> None:
        """Count the group's next frame."""
        if not is_application and len(self._others) < UNNUMBERED_MAX:
            self._others_framed += gsn_last - self._framed_gsn
            self._others.append((gsn_last, self._others_framed))
        self._framed_gsn = gsn_last
        self.framed = gsn_last - self._others_framed

    def commit(self, gsn: int) -> int:
        """Count what is committed now; give how many of the application's entries that is more."""
        before = self.committed
        self._committed_gsn = max(gsn, self._committed_gsn)
        others = self._others
        while others and others[0][0] <= gsn:
            self._others_committed = others.popleft()[1]
        self.committed = self._committed_gsn - self._others_committed
        return self.committed - before

    def skip(self, committed_before: int) -> None:
        """Learn that what was just counted as committed was skipped.

        :param committed_before: what was committed until then.
        """
        if self.committed > committed_before:
            first = self.skipped[0] if self.skipped is not None else committed_before
            self.skipped = (first, self.committed)

    def is_skipped(self, number: int) -> bool:
        """Tell whether only the end of a refresh brings a request, or its beginning.

        :param number: of its last entry.
        """
        first = number.first if isinstance(number, SplitNumber) else number
        return self.skipped is not None and self.skipped[0] < number and first <= self.skipped[1]

    @property
    def uncommitted(self) -> int:
        """How many entries of the application were framed and are not committed."""
        return self.framed - self.committed

    def answerable(self, limit: int) -> int:
        """Give the last number that may be answered (skipped ones apart).

        :param limit: how many answered entries may be uncommitted.
        """
        return self.committed + (0 if self.skipped is not None else limit)


class CatchUp:
    """How what was answered without being committed becomes less, beside a busy application.

    For every two entries that are committed one more may be answered: so the application is slowed
    down, never stopped, and its backlog ends however busy it is.

    :param uncommitted: how many entries may be uncommitted at first.
    """

    def __init__(self, uncommitted: int) -> None:
        self.limit = uncommitted
        self._paid = 0

    def committed(self, count: int, uncommitted: int) -> None:
        """Learn that more is committed.

        :param count: of the application's entries, just now.
        :param uncommitted: how many of those that were framed are not, now.
        """
        self._paid += count
        less, self._paid = divmod(self._paid, 2)
        self.limit = max(0, min(self.limit - less, uncommitted))
