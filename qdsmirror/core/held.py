"""A checkpoint on the secondary: where in the group's order applying pauses (rules.md 22).

It is coherent across the group's mirror devices, because it lies between two frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qdsmirror.errors import CorruptError, UsageError
from qdsmirror.limits import CHECKPOINT_NAME_BYTES_MAX

if TYPE_CHECKING:
    from qdsmirror.core.frames import Buffer

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{CHECKPOINT_NAME_BYTES_MAX - 1}}}", re.ASCII)

#: What is done when the journal fills: the checkpoint is given up, or the primary has to wait.
RELEASE, STRICT = "release", "strict"


def check_name(name: str) -> str:
    """Give a checkpoint's name, if it can be one.

    :raises UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:CHECKPOINT_NAME_BYTES_MAX]!r} cannot name a checkpoint",
            hint=f"use at most {CHECKPOINT_NAME_BYTES_MAX} letters, digits, -_.: and begin with a "
            "letter or digit",
        )
    return name


def pack_mark(name: str) -> bytes:
    """Give the payload of the frame that marks a place by this name.

    :raises UsageError: see :func:`check_name`.
    """
    return check_name(name).encode("ascii").ljust(CHECKPOINT_NAME_BYTES_MAX, b"\0")


def mark_name(payload: Buffer) -> str:
    """Read a mark's payload.

    :raises CorruptError: it holds no name.
    """
    name = bytes(payload).rstrip(b"\0").decode("ascii", "replace")
    if not _NAME.fullmatch(name):
        raise CorruptError("a mark without a name")
    return name


class Held(NamedTuple):
    """A checkpoint that holds.

    :ivar gsn: the last GSN that the mirror devices have.
    :ivar since: seconds since 1970; of a mark's, when it was set at the primary.
    :ivar hold: RELEASE or STRICT.
    :ivar mark: whether a mark from the primary has taken it.
    """

    name: str
    gsn: int
    since: float
    hold: str = RELEASE
    mark: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a journal's superblock."""
        return self._asdict()

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> Held | None:
        """Read :meth:`to_json`'s form.

        :raises ValueError: a value is out of range; TypeError: of another form.
        """
        if body is None:
            return None
        # Commands need the names above only, and what it imports takes its time.
        from qdsmirror.core.frames import NUMBERS_END

        held = cls(**body)
        if (
            not _NAME.fullmatch(held.name)
            or type(held.gsn) is not int
            or not 0 <= held.gsn < NUMBERS_END
            or not isinstance(held.since, int | float)
            or held.hold not in (RELEASE, STRICT)
            or type(held.mark) is not bool
        ):
            raise ValueError("the checkpoint cannot be read")
        return held
