"""What is replaced in the product while it is simulated: chance, limits, what is watched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from twisted.logger import LogLevel, globalLogPublisher

from qdsmirror.core import bitmap as bitmap_module
from qdsmirror.core import verify as core_verify
from qdsmirror.core.frames import FrameHeader
from qdsmirror.core.records import RECORD_HEADER_BYTES
from qdsmirror.core.reorder import Reorder
from qdsmirror.core.superblock import Superblock
from qdsmirror.core.verify import Verdict
from qdsmirror.errors import DeviceFailedError, QdsError
from qdsmirror.groups import answering as answering_module
from qdsmirror.groups import backfresh as backfresh_module
from qdsmirror.groups import band as band_module
from qdsmirror.groups import committing as committing_module
from qdsmirror.groups import compare as compare_module
from qdsmirror.groups import fetching as fetching_module
from qdsmirror.groups import memory as memory_module
from qdsmirror.groups import outbound as outbound_module
from qdsmirror.groups import primary as primary_module
from qdsmirror.groups import session as session_module
from qdsmirror.groups import verify as group_verify
from qdsmirror.groups.backfresh import Backfresh
from qdsmirror.groups.band import Band
from qdsmirror.groups.coherence import Coherence
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.groups.framing import Framing
from qdsmirror.groups.session import Session
from qdsmirror.groups.verifying import Verifying
from qdsmirror.limits import KIB
from qdsmirror.storage import beforeimages as beforeimages_module
from qdsmirror.storage import verify as storage_verify
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.writelog import Writelog
from tests.sim import backfreshes
from tests.sim.clients import Clients
from tests.sim.history import Violation, Written
from tests.sim.sites import Sites


@contextmanager
def installed(world: Clients, watching: bool = True) -> Iterator[None]:
    """Take the place of chance, and watch what the groups do.

    :param watching: also where they send, and what superblocks say.
    """
    profile = world.profile
    bytes_of = world.random_bytes.randbytes

    def observe(event: Any) -> None:
        if "log_failure" in event and event.get("log_level") is LogLevel.critical:
            world.logged.append(event["log_failure"].getTraceback())

    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(os, "urandom", bytes_of)
        patch(os, "getpid", lambda: 4711)
        patch(secrets, "token_bytes", bytes_of)
        patch(committing_module, "RECEIVED_BYTES_MAX", profile.limit)
        patch(committing_module, "UNMIRRORED_BYTES_MAX", 2 * profile.limit)
        patch(bitmap_module, "BITMAP_CHUNK_BYTES_MIN", 4 * KIB)
        patch(memory_module, "MEMORY_SETTLE_SECONDS", 0.2)
        patch(compare_module, "COMPARE_SPAN_BYTES", 8 * KIB)
        patch(fetching_module, "COMPARE_CHUNK_BYTES", 4 * KIB)
        patch(fetching_module, "COMPARE_SPAN_BYTES", 8 * KIB)
        patch(fetching_module, "BACKFRESH_READ_BYTES", 4 * KIB)
        patch(fetching_module, "BACKFRESH_SPANS_MAX", 2)
        patch(backfresh_module, "BACKFRESH_RECORD_SECONDS", 0.05)
        patch(answering_module, "CATCH_UP_ENTRIES", profile.catch_up_entries)
        patch(beforeimages_module, "BEFORE_CHUNK_BYTES", 4 * KIB)
        patch(beforeimages_module, "BEFORE_BATCH_BYTES", 16 * KIB)
        patch(outbound_module, "SEND_BUFFER_BYTES", profile.buffer)
        patch(primary_module, "STRIPE_BYTES", max(4 * KIB, profile.buffer // 4))
        patch(band_module, "INLINE_BYTES_MAX", profile.inline)
        patch(session_module, "INLINE_BYTES_MAX", profile.inline)
        for module in (core_verify, storage_verify, group_verify):
            patch(module, "VERIFY_CHUNK_BYTES", 4 * KIB)
        patch(group_verify, "VERIFY_READ_BYTES", 8 * KIB)
        patch(Framing, "make", _watched_frame(world, Framing.make))
        if not watching:
            yield
            return
        patch(Band, "send_frames", _watched_send_frames(world, Band.send_frames))
        patch(Session, "_fail", _watched_fail(Session._fail))
        patch(Session, "link_made", _counted(world, "path joined", Session.link_made, _joined))
        patch(Band, "_again", _counted(world, "stripes sent again", Band._again, _any))
        patch(Reorder, "put", _counted(world, "frames in order again", Reorder.put, _early))
        patch(
            session_module.compression,
            "unpack",
            _counted(world, "messages unpacked", session_module.compression.unpack, _any),
        )
        patch(Mirror, "begin_anew", _watched_anew(world, Mirror.begin_anew))
        patch(Mirror, "mark_incoherent", _watched_begin(world, Mirror.mark_incoherent))
        patch(Mirror, "hold", _watched_hold(world, Mirror.hold))
        patch(Mirror, "release", _watched_release(world, Mirror.release))
        patch(Session, "acknowledge", _watched_acknowledge(world, Session.acknowledge))
        patch(Mirror, "_compare", _watched_compare(world, Mirror._compare))
        patch(Verifying, "ended", _watched_end(world, Verifying.ended))
        patch(Writelog, "write_superblock", _watched_superblock(world, Writelog.write_superblock))
        _watch_backfreshes(world, patch)
        globalLogPublisher.addObserver(observe)
        stack.callback(globalLogPublisher.removeObserver, observe)
        yield


def _watch_backfreshes(world: Clients, patch: Any) -> None:
    overwrite = backfreshes.watched_overwrite(world, fetching_module._overwrite)
    patch(fetching_module, "_overwrite", overwrite)
    patch(Backfresh, "_fetch", backfreshes.watched_fetch(world, Backfresh._fetch))
    patch(DriverGroup, "stand_at", backfreshes.watched_stand_at(world, DriverGroup.stand_at))
    became_equal = backfreshes.watched_became_equal(world, Coherence.became_equal)
    patch(Coherence, "became_equal", became_equal)


def _watched_frame(world: Sites, original: Any) -> Any:
    def frame(
        framing: Framing,
        kind: int,
        placement: Any,
        entries: Any = (),
        control: Any = (),
        gsns: Any = None,
    ) -> Any:
        before, unit = framing.chain, framing._unit
        group = unit.group
        first = gsns[0] if gsns else group.next_gsn
        made, writes = original(framing, kind, placement, entries, control, gsns)
        world.model.framed(
            unit.index,
            group.generation,
            before,
            made.sequence,
            made.chain,
            kind,
            (first, made.gsn_last),
            list(entries),
            made.end,
            _essence(unit.writelog, writes),
            b"".join(control),
        )
        return made, writes

    return frame


def _watched_fail(original: Any) -> Any:
    """Nothing that an honest primary does is refused in the middle of a session."""

    def fail(session: Session, error: QdsError) -> None:
        if not session._closed and not isinstance(error, DeviceFailedError):
            Violation(f"PREFIX: a session ended over {error.message}")
        original(session, error)

    return fail


def _counted(world: Sites, what: str, original: Any, when: Callable[..., bool]) -> Any:
    def counted(*args: Any) -> Any:
        if when(*args):
            world.count(what)
        return original(*args)

    return counted


def _any(*_: Any) -> bool:
    return True


def _joined(session: Session, _link: Any) -> bool:
    return bool(session.links)


def _early(reorder: Reorder[Any], first: int, *_: Any) -> bool:
    return first > reorder._next


def _watched_anew(world: Sites, original: Any) -> Any:
    def begin_anew(mirror: Mirror, refresh_id: bytes, **changes: Any) -> None:
        generation, place = changes["generations"][-1].id, changes["tail"]
        for index, point in place.points.items():
            world.model.rebased(index, generation, point.chain, place.gsn)
        original(mirror, refresh_id, **changes)

    return begin_anew


def _essence(log: Writelog, writes: Any) -> list[Written]:
    """Give what must be on the platters: not what fills up a block."""
    *pads, last = writes
    essence = [(where, bytes(pad[0][:RECORD_HEADER_BYTES])) for where, pad in pads]
    essence.append((last[0], b"".join(last[1][:-1])))
    return [(log._device(at.device).path, at.offset, data) for at, data in essence]


def _watched_send_frames(world: Sites, original: Any) -> Any:
    def send_frames(band: Band, sent: Sequence[memoryview]) -> None:
        for frame in sent:
            world.model.sent(frame)
        original(band, sent)

    return send_frames


def _watched_acknowledge(world: Sites, original: Any) -> Any:
    def acknowledge(session: Session, committed: int, mirrored: int) -> None:
        world.model.told(committed, session._owner.position(0).generation or b"")
        original(session, committed, mirrored)

    return acknowledge


def _watched_begin(world: Sites, original: Any) -> Any:
    def mark_incoherent(mirror: Mirror, *args: Any, **kw: Any) -> None:
        world.model.refresh_begins(mirror.journal.superblock)
        original(mirror, *args, **kw)

    return mark_incoherent


def _watched_hold(world: Sites, original: Any) -> Any:
    def hold(mirror: Mirror, held: Any, place: Any, durable: Any) -> None:
        original(mirror, held, place, durable)
        world.model.holds(place, mirror.journal.superblock)

    return hold


def _watched_release(world: Sites, original: Any) -> Any:
    def release(mirror: Mirror) -> None:
        world.model.is_held = False
        original(mirror)

    return release


def _watched_compare(world: Sites, original: Any) -> Any:
    def compare(mirror: Mirror, header: FrameHeader, control: bytes) -> Verdict:
        coherent = mirror.journal.superblock.coherent
        found: Verdict = original(mirror, header, control)
        if not found.skipped:
            world.model.compared(header, core_verify.parse_rows(control), found, coherent)
        return found

    return compare


def _watched_end(world: Sites, original: Any) -> Any:
    def ended(verifying: Verifying) -> None:
        original(verifying)
        run = verifying.run
        assert run is not None
        began = world.verifies.get(run.id)
        if began is not None and run.result != "ended":
            world.model.verified(began, run.result == "equal", world.known_dirty)

    return ended


def _watched_superblock(world: Clients, original: Any) -> Any:
    def write_superblock(log: Writelog, superblock: Superblock, **kw: Any) -> None:
        before = log.superblock
        if superblock.role == "writelog" and hasattr(world, "model"):
            world.model.backfreshes.superblock(superblock)
        if superblock.role == "writelog" and len(superblock.generations) > 1:
            world.model.leaves_bypass(superblock.generation)
        if superblock.role == "journal" and hasattr(world, "model") and world.model.rolling:
            world.model.rolls_back(superblock)
        original(log, superblock, **kw)
        if not hasattr(world, "model"):
            return
        if log.superblock.role == "writelog":
            world.synchrony.superblock(before, log.superblock)
            world.model.writelog_recorded(log.superblock)
        else:
            world.model.journal_recorded(before, log.superblock)

    return write_superblock
