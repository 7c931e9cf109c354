"""Small messages of a session, beside its frames, over whichever of its paths are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qdsmirror.core import stream
from qdsmirror.core.letters import Letters
from qdsmirror.core.stream import Message
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import LETTER_EVERYWHERE_BYTES_MAX
from qdsmirror.net.link import Link


class Mail:
    """One end's small messages: each arrives once while the session lasts.

    :param links: gives the paths, the best first.
    :param several: there may be more than one, so that one may be lost.
    """

    def __init__(self, links: Callable[[], Sequence[Link]], several: bool) -> None:
        self._links = links
        self._letters = Letters() if several else None

    @property
    def written(self) -> int:
        """How many letters were sent."""
        return self._letters.written if self._letters is not None else 0

    @property
    def read(self) -> int:
        """Up to which of the peer's letters all have come."""
        return self._letters.read_all if self._letters is not None else 0

    def send(self, message: bytes) -> None:
        """Send a packed message.

        :raises LimitError: see :meth:`Letters.write`.
        """
        if self._letters is not None:
            self._post(self._letters.write(message))
        else:
            for link in self._links():
                link.send(message)

    def take(self, link: Link, message: Message) -> Sequence[Message]:
        """Give the messages that one brings, which may be none.

        :raises ProtocolError: it is not what the peer may send.
        :raises LimitError: see :meth:`Letters.read`.
        """
        if message.type not in (stream.LETTER, stream.RECEIVED):
            return (message,)
        if self._letters is None:
            raise ProtocolError("the peer numbers its messages, though there is one path only")
        if message.type == stream.RECEIVED:
            self._letters.received(message.payload)
            return ()
        found, answer = self._letters.read(message.payload)
        link.send(answer)
        return found

    def again(self) -> None:
        """Send what the peer does not have yet once more: a path was lost."""
        if self._letters is not None:
            for letter in self._letters.unreceived:
                self._post(letter)

    def _post(self, letter: bytes) -> None:
        links = self._links()
        # A short one costs less than waiting until a path that hangs is given up.
        for link in links if len(letter) <= LETTER_EVERYWHERE_BYTES_MAX else links[:1]:
            link.send(letter)
