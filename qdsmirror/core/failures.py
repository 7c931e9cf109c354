"""What is durably known of a group's failed devices (rules.md 13, 16).

It stands in the superblock of every writelog that still can be written, and in the group's state
file.  Where they differ, the worst record holds: a crash may have come between two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Untrusted:
    """A writelog that is not believed and not written any more.

    :ivar reason: what failed; ``since``: when, in seconds since 1970.
    :ivar upto: the break: no frame with a later GSN is ever sent.
    :ivar drained: all that the log held is on the data devices, synced: it is not read any more.
    :ivar size: bytes of its LDSU.
    """

    reason: str
    since: float
    upto: int
    drained: bool
    size: int

    def worse(self, other: Untrusted) -> Untrusted:
        """Give what two records of the same failure say together."""
        first = min(self, other, key=lambda one: one.since)
        return Untrusted(
            first.reason,
            first.since,
            min(self.upto, other.upto),
            self.drained or other.drained,
            first.size,
        )


@dataclass(frozen=True)
class Dead:
    """A data device that has failed: its LDSU answers errors, and nothing is replayed onto it.

    :ivar reason: what failed; ``since``: when, in seconds since 1970.
    :ivar size: bytes of the LDSU.
    """

    reason: str
    since: float
    size: int


@dataclass(frozen=True)
class Failed:
    """The failed devices of a group, by the index of their LDSU.

    :ivar generation: the group's, in hexadecimal: perhaps no superblock is left that says so.
    """

    untrusted: Mapping[int, Untrusted] = field(default_factory=dict)
    dead: Mapping[int, Dead] = field(default_factory=dict)
    generation: str = ""

    def __bool__(self) -> bool:
        return bool(self.untrusted or self.dead)

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in superblocks and in the state file."""
        return {
            "untrusted": {
                str(index): [one.reason, one.since, one.upto, one.drained, one.size]
                for index, one in self.untrusted.items()
            },
            "dead": {
                str(index): [one.reason, one.since, one.size] for index, one in self.dead.items()
            },
            "generation": self.generation,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> Failed:
        """Read :meth:`to_json`'s form; nothing has failed where there is none.

        :raises ValueError: it is of another form.
        """
        if body is None:
            return cls()
        try:
            untrusted = {int(i): Untrusted(*one) for i, one in body["untrusted"].items()}
            dead = {int(i): Dead(*one) for i, one in body["dead"].items()}
            generation = bytes.fromhex(body["generation"]).hex()
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the record of failed devices cannot be read: {error}") from error
        for log in untrusted.values():
            _check(log.reason, log.since, log.upto, log.size)
        for device in dead.values():
            _check(device.reason, device.since, device.size)
        return cls(untrusted, dead, generation)


def _check(reason: object, since: object, *numbers: object) -> None:
    if not (
        isinstance(reason, str)
        and isinstance(since, int | float)
        and all(isinstance(n, int) and n >= 0 for n in numbers)
    ):
        raise ValueError("the record of failed devices cannot be read")


def worst(records: Iterable[Failed]) -> Failed:
    """Give what several records of one group say together: whatever one of them says."""
    untrusted: dict[int, Untrusted] = {}
    dead: dict[int, Dead] = {}
    generation = ""
    for record in records:
        for index, log in record.untrusted.items():
            untrusted[index] = untrusted[index].worse(log) if index in untrusted else log
        for index, device in record.dead.items():
            dead.setdefault(index, device)
        generation = record.generation or generation
    return Failed(untrusted, dead, generation)
