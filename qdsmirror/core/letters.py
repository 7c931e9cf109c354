"""Small messages that survive the loss of a path: each arrives once, in the order of writing.

While a session has one path, TCP sees to that.  With several, a path may be lost while the session
goes on: what the peer has not said to have is sent again over another.  An ACK says how many
letters were written before it: a report comes before the ACK of what it is about.
"""

from __future__ import annotations

from collections import deque

from qdsmirror.core import stream
from qdsmirror.core.frames import Buffer
from qdsmirror.core.reorder import Reorder
from qdsmirror.core.stream import Message
from qdsmirror.errors import LimitError, ProtocolError
from qdsmirror.limits import LETTERS_MAX


class Letters:
    """One end's letters, both ways.

    :ivar written: how many this end has written; ``read_all``: up to which it has read the peer's.
    """

    def __init__(self) -> None:
        self.written = 0
        self.read_all = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._waiting: Reorder[Message] = Reorder(1)

    @property
    def unreceived(self) -> list[bytes]:
        """What the peer has not said to have, packed as it was."""
        return [letter for _, letter in self._kept]

    def write(self, message: bytes) -> bytes:
        """Make a letter of a packed message, and keep it.

        :raises LimitError: the peer has let too many come without a word (BOUND).
        """
        if len(self._kept) >= LETTERS_MAX:
            raise LimitError(f"more than {LETTERS_MAX} messages wait for the peer")
        self.written += 1
        letter = stream.pack_letter(self.written, message)
        self._kept.append((self.written, letter))
        return letter

    def received(self, payload: Buffer) -> None:
        """Take the peer's word about what it has.

        :raises ProtocolError: it has what was never written.
        """
        number = stream.parse_received(payload)
        if number > self.written:
            raise ProtocolError(f"RECEIVED of letter {number}, but only {self.written} was sent")
        while self._kept and self._kept[0][0] <= number:
            self._kept.popleft()

    def read(self, payload: Buffer) -> tuple[list[Message], bytes]:
        """Take a letter.

        :returns: the messages that are next now, and what to tell the peer.
        :raises ProtocolError: see :func:`stream.parse_letter`.
        :raises LimitError: too many before it have not come.
        """
        number, message = stream.parse_letter(payload)
        if number > self.read_all + LETTERS_MAX:
            raise LimitError(f"letter {number} where {self.read_all + 1} comes next")
        self._waiting.put(number, 1, message)
        found: list[Message] = []
        while (one := self._waiting.take()) is not None:
            found.append(one)
        self.read_all += len(found)
        return found, stream.pack_received(self.read_all)
