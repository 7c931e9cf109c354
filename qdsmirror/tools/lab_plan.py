"""What a lab is to have, and which site plays which part in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qdsmirror.errors import UsageError
from qdsmirror.limits import (
    EXTENSIONS_PER_GROUP_MAX,
    GROUPS_MAX,
    KIB,
    LDSUS_PER_GROUP_MAX,
    MEMORY_LOG_BYTES_MAX,
    MEMORY_LOG_BYTES_MIN,
    MIB,
    WRITELOG_BYTES_MIN,
)

PRIMARY, SECONDARY = "primary", "secondary"
#: A site's daemons by the part that it plays.
CONSOLE = "qdsconsole"
DAEMONS = {PRIMARY: ("qdsdriver", "qdspmd"), SECONDARY: ("qdsrmd",)}

_SIZE_BYTES_MIN = 4 * KIB
_POOL_BYTES_MIN = 128 * KIB


@dataclass(frozen=True)
class Layout:
    """Which sites a lab has, and between which of them each group is mirrored.

    :ivar groups: number of groups.
    :ivar secondaries: how many sites there are beside the primary.
    :ivar crossed: every second group goes the other way, so that each site plays both parts.
    :ivar console: each site has a console daemon, too.
    """

    groups: int = 1
    secondaries: int = 1
    crossed: bool = False
    console: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        """Give a plan's layout."""
        return cls(plan.groups, plan.secondaries, plan.crossed, plan.console)

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> Layout:
        """Read what :meth:`to_json` gave."""
        console = words.get("console", False)
        return cls(words["groups"], words["secondaries"], words["crossed"], console)

    def to_json(self) -> dict[str, Any]:
        """Give it as the lab's own file keeps it."""
        return asdict(self)

    @property
    def groups_min(self) -> int:
        """How many groups give every site all its parts."""
        return self.secondaries * (2 if self.crossed else 1)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites' names: ``primary``, ``secondary``, ``secondary2`` ..."""
        more = (f"{SECONDARY}{number}" for number in range(2, self.secondaries + 1))
        return PRIMARY, SECONDARY, *more

    def ends(self, group: int) -> tuple[str, str]:
        """Give the sites that are primary and secondary of a group.

        Groups are spread over the secondaries in turn; in a crossed lab two by two, of which the
        second goes the other way.
        """
        turn, back = divmod(group, 2) if self.crossed else (group, 0)
        other = self.sites[1 + turn % self.secondaries]
        return (other, PRIMARY) if back else (PRIMARY, other)

    def daemons(self, site: str) -> tuple[str, ...]:
        """Give the daemons that a site runs."""
        parts = {
            part
            for number in range(self.groups)
            for part, end in zip((PRIMARY, SECONDARY), self.ends(number), strict=True)
            if end == site
        }
        names = tuple(name for part in DAEMONS if part in parts for name in DAEMONS[part])
        return (*names, CONSOLE) if self.console else names

    def check(self) -> None:
        """Look whether every site has something to do.

        :raises UsageError: there are too few groups for that.
        """
        if self.groups < self.groups_min:
            raise UsageError(
                f"--groups {self.groups} is too few for {self.secondaries} secondaries"
                + (" with --crossed" if self.crossed else ""),
                hint=f"--groups {self.groups_min}",
            )


@dataclass(frozen=True)
class Plan:
    """What a lab is to have.

    :ivar groups: number of logical groups; ``ldsus`` of LDSUs in each.
    :ivar size: bytes of each LDSU; likewise ``writelog`` and ``journal``.
    :ivar port: of the first rmd, the others' follow; ``None`` chooses free ones.
    :ivar overflow: ``on_overflow`` of every group.
    :ivar memory: whether the writelogs are in memory.
    :ivar mode: ``operation`` of every group.
    :ivar pool: number of devices in each group's extension pool, of ``pool_size`` bytes each.
    :ivar secondaries: number of secondary sites, over which the groups are spread.
    :ivar crossed: see :class:`Layout`; likewise ``console``.
    """

    groups: int = 1
    ldsus: int = 1
    size: int = 256 * MIB
    writelog: int = 64 * MIB
    journal: int = 128 * MIB
    port: int | None = None
    overflow: str = "block"
    pool: int = 0
    pool_size: int = 64 * MIB
    mode: str = "async"
    secondaries: int = 1
    crossed: bool = False
    memory: bool = False
    console: bool = False

    def check(self) -> None:
        """Look whether such a lab can be.

        :raises UsageError: a number is out of its range.
        """
        least = MEMORY_LOG_BYTES_MIN if self.memory else WRITELOG_BYTES_MIN
        most = MEMORY_LOG_BYTES_MAX if self.memory else 1 << 62
        for name, value, low, high in (
            ("groups", self.groups, 1, GROUPS_MAX),
            ("ldsus", self.ldsus, 1, LDSUS_PER_GROUP_MAX),
            ("size", self.size, _SIZE_BYTES_MIN, 1 << 62),
            ("writelog", self.writelog, least, most),
            ("journal", self.journal, WRITELOG_BYTES_MIN, 1 << 62),
            ("pool", self.pool, 0, EXTENSIONS_PER_GROUP_MAX),
            ("pool_size", self.pool_size, _POOL_BYTES_MIN, 1 << 62),
            ("port", self.port or 1, 1, 65535),
            ("secondaries", self.secondaries, 1, GROUPS_MAX),
        ):
            if not low <= value <= high:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option} {value} is not within {low} to {high}",
                    hint="qdslab create --help",
                )
        Layout.of(self).check()
