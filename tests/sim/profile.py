"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from qdsmirror.limits import KIB, MEMORY_LOG_BYTES_MIN, WRITELOG_BYTES_MIN
from tests.sim.history import SECTOR

#: How many runs have their writelogs in memory.
MEMORY_CHANCE = 0.2


@dataclass(frozen=True)
class Profile:
    """What a run is made of; drawn from the seed.

    :ivar steps: of the safety phase.
    :ivar pool: extension devices.
    :ivar corruption: at how many power cuts a sector of a log is damaged, of 1.
    :ivar auto_refresh: whether the bypass of an overflow is left without an operator.
    :ivar checkpoint_hold: what becomes of a checkpoint when the journal fills.
    :ivar verify_rate: bytes that a verify reads in a second; verify_every: seconds between two.
    :ivar before_bytes: of the journal, for before-images; ``before_images_full``: what then.
    :ivar slow: how the names of workers end that are seldom stepped; "": none.
    :ivar catch_up_entries: stands for the constant of that name.
    :ivar paths: network paths between the sites.
    :ivar inline: frames of more bytes are compressed by a worker.
    :ivar faults: of each kind, one in so many steps on the average; 0: never.
    :ivar memory: whether the writelogs are in memory.
    """

    steps: int
    ldsus: int
    size: int
    log: int
    journal: int
    block: int
    durability: str
    on_overflow: str
    pool: int
    corruption: float
    auto_refresh: bool
    verify_rate: int
    verify_every: float
    metadata_entries: int
    metadata_seconds: float
    window: int
    limit: int
    buffer: int
    clients: int
    eager: float
    slow: str
    checkpoint_hold: str
    before_bytes: int
    before_images_full: str
    faults: dict[str, int]
    operation: str = "async"
    on_disconnect: str = "block"
    near_sync_entries: int = 2
    catch_up_entries: int = 4
    paths: int = 1
    compression: str = "none"
    inline: int = 16 * KIB
    memory: bool = False

    @classmethod
    def draw(cls, random: Random, aside: Random) -> Profile:
        """Draw a profile.

        :param aside: draws the operation, so that half of the runs are as they would be without.
        """
        choose = random.choice
        small = WRITELOG_BYTES_MIN // SECTOR * SECTOR
        log = choose((small, small, 300 * KIB))
        kinds = ("kill driver", "kill pmd", "kill rmd", "cut alpha", "cut beta", "cut link")
        faults = {kind: choose((0, 100, 300, 800)) for kind in kinds}
        faults["fuse"] = choose((0, 60, 200))
        faults["hang link"] = choose((0, 0, 400))
        faults["slow link"] = choose((0, 30, 100))
        faults["stop driver"] = choose((0, 0, 400))
        faults["error"] = choose((0, 0, 0, 500))
        faults["refresh"] = choose((0, 0, 300))
        faults["bypass"] = choose((0, 0, 0, 100, 300))
        pool = choose((0, 0, 1, 2))
        faults["extend"] = choose((0, 60, 200)) if pool else 0
        faults["free"] = choose((60, 200)) if faults["extend"] else 0
        # By themselves: what else a seed decides stays as it was.
        own = Random(repr(random.getstate()))
        faults["checkpoint"] = own.choice((0, 0, 0, 60, 200))
        faults["mark"] = own.choice((0, 60, 200)) if faults["checkpoint"] else 0
        other = Random(f"paths {aside.getstate()}")
        paths = other.choice((1, 1, 1, 2, 3))
        if paths > 1:
            faults["cut path"] = other.choice((0, 30, 100))
            faults["slow path"] = other.choice((0, 30, 100))
            faults["hang path"] = other.choice((0, 0, 100))
        last = Random(f"verify {aside.getstate()}")
        faults["verify"] = last.choice((0, 100, 300))
        faults["damage"] = last.choice((0, 0, 0, 100)) if faults["verify"] else 0
        apart = Random(f"memory {aside.getstate()}")
        memory = apart.random() < MEMORY_CHANCE
        if memory:
            faults["kill master"] = apart.choice((0, 100, 300, 800))
            log = max(log, MEMORY_LOG_BYTES_MIN)
        if not faults["damage"] and not memory:
            # (A mirror that was damaged unnoticed is what it would make the data devices.)
            faults["backfresh"] = Random(f"backfresh {faults}").choice((0, 0, 0, 60, 150))
        before = own.choice((0, 0, 32 * KIB, 256 * KIB, 256 * KIB))
        # (Beside a backfresh only where a secondary has stopped for want of before-images.)
        rolls = before and not faults.get("backfresh")
        faults["rollback"] = own.choice((20, 60)) if rolls else 0
        return cls(
            steps=choose((200, 400, 800)),
            ldsus=choose((1, 2, 2, 3)),
            size=choose((16, 64)) * KIB,
            log=log,
            journal=choose((log, 400 * KIB)),
            block=choose((512, 512, 4096)),
            durability=choose(("flush", "flush", "always")),
            on_overflow=choose(("block", "bypass")),
            pool=pool,
            corruption=choose((0.0, 0.5)),
            auto_refresh=choose((False, True)),
            metadata_entries=choose((1, 5, 50, 4096)),
            metadata_seconds=choose((0.1, 1.0, 20.0)),
            window=choose((8, 64, 1024)) * KIB,
            limit=choose((16, 64, 1024)) * KIB,
            buffer=choose((8, 32, 1024)) * KIB,
            clients=choose((1, 1, 2)),
            eager=random.random(),
            slow=choose(("", "", "journal", "mirror", "data", "commit", "writelog", "reader")),
            verify_rate=last.choice((256, 4096)) * KIB,
            verify_every=last.choice((0.0, 0.0, 2.0)),
            checkpoint_hold=own.choice(("release", "strict")),
            before_bytes=before,
            before_images_full=own.choice(("give-up", "give-up", "stop")),
            faults=faults,
            **cls._draw_operation(aside, faults),
            paths=paths,
            compression=other.choice(("none", "none", "lz4", "zstd:1")),
            inline=other.choice((0, 16 * KIB)),
            memory=memory,
        )

    @staticmethod
    def _draw_operation(random: Random, faults: dict[str, int]) -> dict[str, Any]:
        choose = random.choice
        if choose((True, False)):
            return {}
        faults["operation"] = choose((0, 0, 60, 200))
        return {
            "operation": choose(("sync", "sync", "near-sync", "near-sync", "async")),
            "on_disconnect": choose(("block", "async")),
            "near_sync_entries": choose((1, 2, 5)),
            "catch_up_entries": choose((0, 4, 1000)),
        }
