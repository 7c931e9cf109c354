"""Deliberately broken builds: each breaks a rule that keeps an invariant, and must be seen.

A mutation replaces something in the real classes while it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from random import Random
from typing import Any
from unittest import mock

from twisted.internet.defer import maybeDeferred, succeed

from qdsmirror.core import states as states_module
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.frames import VERIFY, parse_header
from qdsmirror.core.recovery import Recovery
from qdsmirror.core.reorder import Reorder
from qdsmirror.core.states import Event
from qdsmirror.groups import direct as direct_module
from qdsmirror.groups import primary as primary_module
from qdsmirror.groups import restart as restart_module
from qdsmirror.groups.answering import Answering
from qdsmirror.groups.applying import Applying
from qdsmirror.groups.attached import PmdEnd
from qdsmirror.groups.attachment import Attachment, DriverEnd
from qdsmirror.groups.backfresh import Backfresh
from qdsmirror.groups.band import Band
from qdsmirror.groups.bypass import ON, Bypass
from qdsmirror.groups.checkpoint import Checkpoints
from qdsmirror.groups.committing import Committing
from qdsmirror.groups.compare import Comparison
from qdsmirror.groups.direct import answer_all
from qdsmirror.groups.failures import Failures
from qdsmirror.groups.memory import Cover, MemoryLogs, MemorySyncing
from qdsmirror.groups.mirroring import Mirroring
from qdsmirror.groups.outbound import Outbound, OutUnit
from qdsmirror.groups.refresh import Refresh
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.groups.session import Session
from qdsmirror.groups.syncing import Syncing
from qdsmirror.groups.unapplied import Unapplied
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.groups.verify import Verify
from qdsmirror.groups.verifying import Verifying
from qdsmirror.groups.waiting import WaitingRequests
from qdsmirror.groups.wayout import WayOut
from qdsmirror.storage import journal as journal_module
from qdsmirror.storage import logreader as logreader_module
from qdsmirror.storage import recovery as recovery_module
from qdsmirror.storage import rollback as rollback_module
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.beforeimages import BeforeImages
from qdsmirror.storage.bitmap import empty_bitmap
from qdsmirror.storage.journal import Applied, Mirror
from qdsmirror.storage.logreader import Ahead, LogReader
from qdsmirror.storage.writelog import Writelog
from tests.sim import profile as profile_module
from tests.sim.disk import SimDevice

Patch = Callable[[Any, str, Any], None]


@dataclass(frozen=True)
class Mutation:
    """A broken build.

    :ivar breaks: the invariant whose rule it breaks.
    :ivar apply: makes the changes, each by a call of its argument (owner, name, value).
    :ivar seeds: how many seeds, at most, until the simulation has seen it.
    :ivar first: the first of them: one that is known to see it soon.
    :ivar sequence: one whose crash states are examined before the seeds are run.
    :ivar schedule: the order in which its work is done.
    :ivar needs: a fault without which it is not seen: seeds that do not draw it are passed over.
    """

    name: str
    breaks: str
    apply: Callable[[Patch], None]
    seeds: int
    sequence: tuple[str, ...] = ()
    first: int = 0
    schedule: int = 0
    needs: str = ""

    def chosen(self) -> Iterator[int]:
        """Give the seeds to be run."""
        drawn = (seed for seed in count(self.first) if not self.needs or self._draws(seed))
        return islice(drawn, self.seeds)

    def _draws(self, seed: int) -> bool:
        profile = profile_module.Profile.draw(Random(seed), Random(f"operation of {seed}"))
        return bool(profile.faults.get(self.needs))

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:

            def patch(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value))

            self.apply(patch)
            yield


MUTATIONS: list[Mutation] = []


def mutation(
    breaks: str,
    seeds: int = 100,
    sequence: tuple[str, ...] = (),
    first: int = 0,
    schedule: int = 0,
    needs: str = "",
) -> Callable[[Callable[[Patch], None]], Any]:
    def keep(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = apply.__name__.strip("_").replace("_", " ")
        MUTATIONS.append(Mutation(name, breaks, apply, seeds, sequence, first, schedule, needs))
        return apply

    return keep


def _wrapped(owner: Any, name: str, before: Any = None, after: Any = None) -> Any:
    """Give a method that calls something more before or behind the real one."""
    real = getattr(owner, name)

    def method(self: Any, *args: Any, **kw: Any) -> Any:
        if before is not None:
            before(self, *args, **kw)
        result = real(self, *args, **kw)
        if after is not None:
            after(self, *args, **kw)
        return result

    return method


#: Ends with a refresh that is interrupted for good, behind which the mirrors are rolled back.
_HALF_REFRESHED = ("with before-images", "trim", "bypass on", "half a refresh")


def _ignore(_result: Any, _error: BaseException | None) -> None:
    """Take the end of a job."""


# -- the primary ----------------------------------------------------------------------------------


@mutation("NO-HIDDEN")
def _apply_before_durable(patch: Patch) -> None:
    def early(unit: Any, frame: Any, *_: Any) -> None:
        unit.run_on_data(partial(apply_entries, unit.device, frame.entries), _ignore)

    patch(DriverUnit, "append", _wrapped(DriverUnit, "append", before=early))


@mutation("NO-AHEAD")
def _announce_before_durable(patch: Patch) -> None:
    real = DriverEnd.durable

    def durable(end: Any, gsn: int, unit: Any) -> None:
        was, unit.durable_end = unit.durable_end, unit.writelog.head
        real(end, end._group.next_gsn - 1, unit)
        unit.durable_end = was

    def appended(unit: Any, *_: Any) -> None:
        if unit.group.pmd.end is not None:
            unit.group.pmd.end.durable(0, unit)

    patch(DriverEnd, "durable", durable)
    patch(DriverUnit, "_was_appended", _wrapped(DriverUnit, "_was_appended", after=appended))


@mutation("DURABLE", first=2)
def _flush_without_sync(patch: Patch) -> None:
    def flush(_syncing: Any, request: Any) -> None:
        request.connection.answer([request])

    patch(Syncing, "flush", flush)


@mutation("DURABLE")
def _fua_answered_from_the_cache(patch: Patch) -> None:
    real = DriverUnit._was_appended

    def was_appended(unit: Any, frame: Any, finished: Any, result: Any, error: Any) -> None:
        for request in finished:
            request.connection.answer([request])
        real(unit, frame, [], result, error)

    patch(DriverUnit, "_was_appended", was_appended)


@mutation("LOUD", seeds=300, first=235, needs="error")
def _failed_sync_taken_for_good(patch: Patch) -> None:
    real = Syncing._committed

    def committed(syncing: Any, count: int, result: Any, error: Any) -> None:
        real(syncing, count, result, None)

    patch(Syncing, "_committed", committed)


@mutation("TAIL", first=61)
def _written_past_a_failed_log_before_that_is_recorded(patch: Patch) -> None:
    def record(failures: Any, wanted: Any, **_: Any) -> Any:
        failures.recorded = wanted
        return succeed(True)

    patch(Failures, "_record", record)


@mutation("BOUND")
def _framed_however_much_is_unapplied(patch: Patch) -> None:
    patch(Unapplied, "has_room", lambda *_: True)


@mutation("LOUD")
def _end_of_a_refresh_that_is_not_shown(patch: Patch) -> None:
    _without_ways(patch, Event.REFRESH_ENDED)


@mutation("LOUD", seeds=300)
def _bypass_that_is_not_shown(patch: Patch) -> None:
    _without_ways(patch, Event.BYPASS_BEGUN)


@mutation("LOUD")
def _lost_link_that_is_not_shown(patch: Patch) -> None:
    _without_ways(patch, Event.LINK_DOWN)


def _without_ways(patch: Patch, event: Event) -> None:
    ways = tuple(way for way in states_module.TRANSITIONS if way.event is not event)
    patch(states_module, "TRANSITIONS", ways)


@mutation("TAIL")
def _tail_past_an_unacknowledged_frame(patch: Patch) -> None:
    _after_cursors(patch, lambda changes: {**changes, "tail": changes["applied"]})


@mutation("TAIL")
def _tail_past_an_unsynced_frame(patch: Patch) -> None:
    def sync(applying: Any, done: Any) -> None:
        done(applying.applied_sequence, None)

    patch(Applying, "sync", sync)


def _after_cursors(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    real = Checkpoints.cursors
    patch(Checkpoints, "cursors", lambda self, unit: change(real(self, unit)))


@mutation("RECOVER")
def _replay_without_sync(patch: Patch) -> None:
    real = restart_module.replay

    def replay(unit: Any) -> int:
        with mock.patch.object(unit.device, "fdatasync", lambda: None):
            return real(unit)

    patch(restart_module, "replay", replay)


@mutation("RECOVER", seeds=0, sequence=("wrap", "wrap", "checkpoint"))
def _one_superblock_slot_only(patch: Patch) -> None:
    real = Writelog.write_superblock

    def write_superblock(log: Any, superblock: Any, *, both: bool = False) -> None:
        even = superblock.counter + superblock.counter % 2
        real(log, replace(superblock, counter=even), both=False)

    patch(Writelog, "write_superblock", write_superblock)


@mutation("RECOVER", first=3)
def _scan_without_sync(patch: Patch) -> None:
    real = Writelog.open.__func__  # type: ignore[attr-defined]

    def open_log(cls: Any, device: Any, *args: Any, **kw: Any) -> Any:
        with mock.patch.object(device, "fdatasync", lambda: None):
            return real(cls, device, *args, **kw)

    patch(Writelog, "open", classmethod(open_log))


@mutation("RECOVER", first=9)
def _body_checksum_not_checked(patch: Patch) -> None:
    patch(logreader_module, "check_body", lambda _header, _frame: None)


@mutation("RECOVER", sequence=("write", "write", "power cut", "write", "ack"))
def _chain_not_checked(patch: Patch) -> None:
    patch(logreader_module, "chain_follows", lambda *_: True)


@mutation("RECOVER", sequence=("wrap", "power cut", "wrap"))
def _remains_of_lost_records_not_cleared(patch: Patch) -> None:
    patch(Writelog, "clear_end", lambda _self, _end: None)


@mutation("RECOVER", seeds=300, first=88)
def _void_ranges_not_recorded(patch: Patch) -> None:
    real = restart_module.judge
    patch(restart_module, "judge", lambda opened: Recovery(real(opened).next_gsn, ()))


@mutation("RECOVER", seeds=400, first=40)
def _damage_taken_for_a_tear(patch: Patch) -> None:
    patch(LogReader, "look_ahead", lambda _self: Ahead())
    real = recovery_module.decide
    patch(
        recovery_module,
        "decide",
        lambda findings: real([replace(f, expected=0, durable_gsn=0) for f in findings]),
    )


@mutation("DURABLE", seeds=200, sequence=("extend", "wrap", "flush"))
def _extensions_not_synced(patch: Patch) -> None:
    patch(Writelog, "sync", lambda log: log.device.fdatasync())


@mutation("RECOVER", seeds=200, first=22)
def _space_used_again_before_that_is_durable(patch: Patch) -> None:
    def free(unit: Any, *_: Any) -> None:
        log = unit.writelog
        log.durable_tail = max(log.durable_tail, min(unit.committed_end, unit.applied_end))

    patch(DriverUnit, "committed", _wrapped(DriverUnit, "committed", after=free))


@mutation("COHERENT", seeds=200, first=10700)
def _no_reserve_for_control_frames(patch: Patch) -> None:
    patch(Writelog, "_reserve", property(lambda _self: 0))


@mutation("RECOVER", seeds=200)
def _replayed_from_the_tail(patch: Patch) -> None:
    real = restart_module.replay

    def replay(unit: Any) -> int:
        superblock = unit.writelog.superblock
        unit.writelog.superblock = replace(superblock, applied=superblock.tail)
        try:
            return real(unit)
        finally:
            unit.writelog.superblock = superblock

    patch(restart_module, "replay", replay)


@mutation("DURABLE", seeds=0, sequence=("stale copy", "flush"))
def _requests_of_lost_connections_framed(patch: Patch) -> None:
    patch(WaitingRequests, "drop_dead", lambda _self: None)


@mutation("PREFIX", seeds=100)
def _trims_that_leave_what_was_there(patch: Patch) -> None:
    real = SimDevice.zero

    def discard(device: Any, offset: int, length: int, unmap: bool) -> None:
        if not unmap:
            real(device, offset, length, unmap)

    patch(SimDevice, "zero", discard)


# -- failed devices -------------------------------------------------------------------------------


@mutation("TAIL", seeds=300, first=106)
def _dead_device_exempt_before_that_is_recorded(patch: Patch) -> None:
    patch(DriverUnit, "exempt", property(lambda unit: bool(unit.dead)))

    def failed(unit: Any, _error: Any) -> None:
        unit.applying.be_exempt()

    patch(DriverUnit, "fail_data", _wrapped(DriverUnit, "fail_data", after=failed))


# -- bypass ---------------------------------------------------------------------------------------


@mutation("NO-HIDDEN", seeds=200, sequence=("bypass on", "write"))
def _dirty_bits_not_synced(patch: Patch) -> None:
    real = direct_module.write_blocks

    def write_blocks(device: Any, *args: Any) -> None:
        with mock.patch.object(device, "fdatasync", lambda: None):
            real(device, *args)

    patch(direct_module, "write_blocks", write_blocks)


@mutation("DURABLE", seeds=300, first=267)
def _bypass_before_everything_is_applied(patch: Patch) -> None:
    patch(Bypass, "is_all_applied", lambda _self: True)


@mutation("NO-HIDDEN", first=2)
def _damage_of_a_bitmap_taken_for_clear(patch: Patch) -> None:
    patch(DirtyBitmap, "damaged_ranges", [])


@mutation(
    "COHERENT",
    seeds=0,
    sequence=("link down", "write", "bypass on", "trim", "smart refresh", "link up"),
    schedule=23,
)
def _compared_with_a_mirror_that_lags(patch: Patch) -> None:
    patch(Refresh, "_may_compare", lambda refresh: refresh.group.pmd.is_connected)


@mutation("COHERENT", first=2)
def _blocks_count_as_equal_without_a_look(patch: Patch) -> None:
    patch(Comparison, "_differs", lambda *_: None)


@mutation("NO-HIDDEN", seeds=200, sequence=("bypass on", "write", "refresh"))
def _bypass_left_without_a_sync(patch: Patch) -> None:
    patch(Bypass, "sync", lambda _self: succeed(None))


@mutation("COHERENT", seeds=200, first=2)
def _marks_forgotten_at_the_start(patch: Patch) -> None:
    patch(restart_module, "load_bitmap", lambda _device, superblock: (empty_bitmap(superblock), ""))


@mutation("COHERENT", seeds=200, first=2)
def _marks_cleared_before_the_mirror_has_them(patch: Patch) -> None:
    def clear(bypass: Any, *_: Any) -> None:
        for unit in bypass._group.units:
            unit.direct.clear_dirty()

    patch(Bypass, "_frame_break", _wrapped(Bypass, "_frame_break", before=clear))


@mutation("TAIL", seeds=200, first=70)
def _what_could_be_sent_is_given_up(patch: Patch) -> None:
    patch(WayOut, "holds_unsendable", property(lambda way: way._bypass.phase == ON))


@mutation("GENERATION", seeds=400, first=347)
def _switch_not_completed_at_the_start(patch: Patch) -> None:
    patch(restart_module, "awaits_switch", lambda *_: False)


# -- synchronous operation ------------------------------------------------------------------------


@mutation("SYNC")
def _answered_before_the_secondary_has_it(patch: Patch) -> None:
    def give(_answering: Any, _unit: Any, requests: Any) -> None:
        answer_all(requests)

    patch(Answering, "give", give)


@mutation("SYNC", first=3)
def _answered_when_sent(patch: Patch) -> None:
    real = Attachment.said_committed

    def said(attachment: Any, end: Any, sent: int, *rest: Any) -> None:
        attachment._group.answering.committed(min(sent, attachment._group.durable_gsn))
        real(attachment, end, sent, *rest)

    patch(Attachment, "said_committed", said)


@mutation("SYNC", seeds=200)
def _degraded_before_that_is_durable(patch: Patch) -> None:
    real = Answering._record

    def record(answering: Any, degraded: Any) -> Any:
        answering.degraded = degraded or answering.degraded
        answering._limit = answering._allowed()
        answering._release()
        return real(answering, degraded)

    patch(Answering, "_record", record)


@mutation("SYNC", seeds=200)
def _degraded_ends_with_the_outage(patch: Patch) -> None:
    patch(Answering, "_is_caught_up", property(lambda self: self._group.pmd.is_connected))


@mutation("SYNC", seeds=200)
def _one_entry_too_many(patch: Patch) -> None:
    def promised(answering: Any) -> int:
        near = answering.operation == "near-sync"
        return answering._group.config.near_sync_entries + 1 if near else 0

    patch(Answering, "_promised", property(promised))


@mutation("SYNC", seeds=400, first=3)
def _entries_of_before_a_crash_not_counted(patch: Patch) -> None:
    def begin(answering: Any) -> None:
        answering._numbers.committed = answering._numbers.framed
        answering._numbers._others_committed = (
            answering._numbers._committed_gsn - answering._numbers.committed
        )

    patch(Answering, "begin", _wrapped(Answering, "begin", after=begin))


@mutation("SYNC", seeds=400, first=40)
def _skipped_by_a_new_history_taken_for_committed(patch: Patch) -> None:
    patch(Answering, "skip", lambda _self: None)


@mutation("SYNC", seeds=200, first=924975550191)
def _history_replaced_before_the_driver_knows(patch: Patch) -> None:
    patch(PmdEnd, "knows_rebase", lambda _end: succeed(None))
    patch(DriverEnd, "know_rebase", lambda _end: None)


@mutation("SYNC", seeds=200, first=14)
def _bypass_answers_at_once(patch: Patch) -> None:
    patch(Answering, "may_go_past", property(lambda _self: True))


# -- writelogs in memory --------------------------------------------------------------------------


def _in_memory(patch: Patch) -> None:
    patch(profile_module, "MEMORY_CHANCE", 1.0)


@mutation("NO-HIDDEN")
def _answered_before_the_bit_is_durable(patch: Patch) -> None:
    _in_memory(patch)
    real = Cover.around

    def around(cover: Any, entries: Any, append: Any) -> Any:
        job = real(cover, entries, lambda: None)
        late = partial(cover._unit.run_on_bitmap, job, _ignore)
        cover._unit.group.runtime.reactor.callLater(0, late)
        return append

    patch(Cover, "around", around)


@mutation("NO-AHEAD")
def _sent_before_the_data_device_is_synced(patch: Patch) -> None:
    _in_memory(patch)

    def early(syncing: Any) -> None:
        unit = syncing._unit
        was, unit.durable_end = unit.durable_end, unit.writelog.head
        if unit.group.pmd.end is not None:
            unit.group.pmd.end.durable(unit.group.next_gsn - 1, unit)
        unit.durable_end = was

    patch(MemorySyncing, "_begin", _wrapped(MemorySyncing, "_begin", before=early))


@mutation("NO-HIDDEN", seeds=200, first=5)
def _bits_cleared_before_the_secondary_has_it(patch: Patch) -> None:
    _in_memory(patch)

    def early(cover: Any) -> None:
        cover._epoch_gsn = 0

    patch(Cover, "settle", _wrapped(Cover, "settle", before=early))


@mutation("NO-HIDDEN", seeds=200, first=36)
def _bits_cleared_in_bypass(patch: Patch) -> None:
    _in_memory(patch)
    patch(MemoryLogs, "may_settle", property(lambda logs: logs._group.coherent))


@mutation("DURABLE", seeds=0, sequence=("in memory", "overlapping write", "flush", "kill driver"))
def _replay_from_memory_in_order(patch: Patch) -> None:
    # As any other log.
    patch(recovery_module, "MemoryLogDevice", Mirror)


@mutation("GENERATION")
def _lost_memory_keeps_the_generation(patch: Patch) -> None:
    _in_memory(patch)
    real = recovery_module.loss_of
    patch(recovery_module, "loss_of", lambda *of: real(*of)._replace(lost=False))


# -- between the sites ----------------------------------------------------------------------------


@mutation("PREFIX")
def _resume_off_by_one(patch: Patch) -> None:
    real = primary_module.agreed_gsn
    patch(primary_module, "agreed_gsn", lambda *told: real(*told) + 1)


@mutation("GENERATION", seeds=200, first=43)
def _resume_by_number_without_proof(patch: Patch) -> None:
    real = primary_module.agreed_gsn

    def agreed(acks: Any, generations: Any) -> int:
        return real([replace(ack, generation=generations[-1]) for ack in acks], generations)

    patch(primary_module, "agreed_gsn", agreed)
    patch(OutUnit, "_proven", lambda _self, cursor, _point: cursor)


@mutation("PREFIX", seeds=300, first=98)
def _frames_of_the_last_session_kept(patch: Patch) -> None:
    real = Committing.forget

    def forget(committing: Any) -> None:
        kept = list(committing._received)
        real(committing)
        committing._received.extend(kept)

    patch(Committing, "forget", forget)


@mutation("PREFIX", seeds=200, first=2)
def _frames_that_look_older_not_taken(patch: Patch) -> None:
    real = Committing.take

    def take(committing: Any, frame: Any, ack_wanted: bool) -> None:
        time_ns = parse_header(frame).time_ns
        if time_ns >= getattr(committing, "newest_ns", 0):
            committing.newest_ns = time_ns
            real(committing, frame, ack_wanted)

    patch(Committing, "take", take)


@mutation("PREFIX", seeds=200, first=2)
def _frames_of_several_paths_taken_as_they_come(patch: Patch) -> None:
    def take(reorder: Any) -> Any:
        return reorder._waiting.pop(next(iter(reorder._waiting)))[1] if len(reorder) else None

    patch(Reorder, "take", take)


@mutation("PREFIX", seeds=200, first=2)
def _frames_taken_twice(patch: Patch) -> None:
    real = Reorder.put

    def put(reorder: Any, first: int, count: int, item: Any) -> bool:
        if first < reorder._next:
            reorder._next = first
        return bool(real(reorder, first, count, item))

    patch(Reorder, "put", put)


@mutation("PREFIX", seeds=200, first=221, needs="cut path")
def _what_a_lost_path_had_is_not_sent_again(patch: Patch) -> None:
    patch(Band, "_again", lambda *_: None)


@mutation("BOUND", seeds=200, first=11)
def _taken_while_too_much_is_under_way(patch: Patch) -> None:
    def give(session: Any) -> None:
        paused, session._paused = session._paused, False
        real(session)
        session._paused = session._paused or paused

    real = Session._give
    patch(Session, "_give", give)


@mutation("BOUND", first=6)
def _window_not_heeded(patch: Patch) -> None:
    def pump(outbound: Any) -> None:
        outbound._in_flight_bytes = 0
        if outbound._link is not None:
            for link in outbound._link._links:
                link.can_send = True

    patch(Outbound, "pump", _wrapped(Outbound, "pump", before=pump))


# -- the secondary --------------------------------------------------------------------------------


@mutation("TAIL")
def _acknowledged_before_the_journal_is_durable(patch: Patch) -> None:
    def early(committing: Any, *_: Any) -> None:
        if committing._received:
            gsn = committing._received[-1].change.header.gsn_last
            committing._tell_acknowledge(gsn, committing.mirrored_gsn)

    patch(Committing, "take", _wrapped(Committing, "take", after=early))


@mutation("PREFIX")
def _mirror_before_the_journal_is_durable(patch: Patch) -> None:
    def early(committing: Any) -> None:
        changes = [received.change for received in committing._received]
        committing._mirror_worker.run(partial(committing.mirror.apply, changes), _ignore)

    patch(Committing, "commit", _wrapped(Committing, "commit", before=early))


@mutation("PREFIX")
def _journal_not_synced(patch: Patch) -> None:
    real = Committing.commit

    def commit(committing: Any) -> None:
        run = committing._journal_worker.run
        device = committing.mirror.journal.device

        def unsynced(job: Any, done: Any) -> None:
            def without() -> Any:
                with mock.patch.object(device, "fdatasync", lambda: None):
                    return job()

            run(without, done)

        with mock.patch.object(committing._journal_worker, "run", unsynced):
            real(committing)

    patch(Committing, "commit", commit)


@mutation("TAIL")
def _journal_freed_before_the_mirror_is_synced(patch: Patch) -> None:
    real = Mirror.checkpoint

    def checkpoint(mirror: Any, *args: Any, **kw: Any) -> Any:
        with ExitStack() as stack:
            for device in mirror.devices:
                stack.enter_context(mock.patch.object(device, "fdatasync", lambda: None))
            return real(mirror, *args, **kw)

    patch(Mirror, "checkpoint", checkpoint)


@mutation("BOUND", seeds=200, first=11)
def _never_presses_back(patch: Patch) -> None:
    patch(RemoteGroup, "_press", lambda _self, _full: None)


@mutation("PREFIX", seeds=50)
def _replay_passes_the_checkpoint(patch: Patch) -> None:
    real = Mirror.replay

    def replay(mirror: Any) -> int:
        with mock.patch.object(Mirror, "held", None):
            return real(mirror)

    patch(Mirror, "replay", replay)


@mutation("DURABLE", seeds=50)
def _checkpoint_told_before_it_is_durable(patch: Patch) -> None:
    real = Mirror.hold

    def hold(mirror: Any, *args: Any) -> None:
        with mock.patch.object(mirror.journal.device, "pwritev", lambda *_: None):
            real(mirror, *args)

    patch(Mirror, "hold", hold)


@mutation("PREFIX", seeds=200, first=166)
def _checkpoint_behind_what_came_with_its_mark(patch: Patch) -> None:
    def all_of_it(mirroring: Any) -> Any:
        ready, mirroring._ready = mirroring._ready, []
        return ready

    def apply(mirroring: Any, batches: Any, durable: Any) -> Applied:
        mark = next((b for b in batches if b.cuts), batches[-1])
        changes = [change for batch in batches for change in batch.changes]
        verdicts = mirroring.mirror.apply(changes)
        mirroring.mirror.reach(mark.changes[-1], mark.end, durable)
        return Applied(batches[-1].end, len(changes), verdicts)

    patch(Mirroring, "_next", all_of_it)
    patch(Mirroring, "_apply", apply)


@mutation("PREFIX", seeds=50, first=2)
def _checkpoint_of_a_history_that_is_being_replaced(patch: Patch) -> None:
    real = Mirroring.begin_anew

    def begin_anew(mirroring: Any, *args: Any) -> Any:
        begun = real(mirroring, *args)
        mirroring._renewing = False
        asked = maybeDeferred(mirroring.hold, "c", "release", 0.0)
        asked.addErrback(lambda _failure: None)
        return begun

    patch(Mirroring, "begin_anew", begin_anew)


@mutation("COHERENT", seeds=200, first=8, needs="rollback")
def _before_images_behind_the_overwrite(patch: Patch) -> None:
    real = Mirror.apply

    def apply(mirror: Any, changes: Any) -> Any:
        listed = list(changes)
        with mock.patch.object(mirror.images, "keep", lambda _changes: None):
            verdicts = real(mirror, listed)
        mirror.images.keep((header.ldsu, found) for header, found, _ in listed)
        return verdicts

    patch(Mirror, "apply", apply)


@mutation("COHERENT", first=1170)
def _before_images_not_synced(patch: Patch) -> None:
    real = BeforeImages._write

    def write(images: Any) -> bool:
        with mock.patch.object(images._log.device, "fdatasync", lambda: None):
            return real(images)

    patch(BeforeImages, "_write", write)


@mutation("COHERENT", seeds=200, first=8, needs="rollback")
def _before_images_retaken_by_a_replay(patch: Patch) -> None:
    def load(images: Any) -> None:
        if not images._loaded and images.period is not None:
            images._forget()
            images._loaded = True

    patch(BeforeImages, "load", load)


@mutation("COHERENT", seeds=200, first=2, needs="rollback")
def _rolled_back_history_goes_on(patch: Patch) -> None:
    real = rollback_module.Generation

    def same(_id: bytes, gsn: int) -> Any:
        return real(rolled_back[-1], gsn)

    rolled_back: list[bytes] = []

    def check(images: Any) -> None:
        rolled_back.append(images._log.superblock.generation)

    patch(BeforeImages, "check", _wrapped(BeforeImages, "check", before=check))
    patch(rollback_module, "Generation", same)


@mutation("COHERENT", seeds=0, sequence=_HALF_REFRESHED)
def _restored_without_a_sync(patch: Patch) -> None:
    real = BeforeImages.restore

    def restore(images: Any) -> int:
        with mock.patch.object(SimDevice, "fdatasync", lambda _device: None):
            return real(images)

    patch(BeforeImages, "restore", restore)


@mutation("COHERENT", seeds=0, sequence=_HALF_REFRESHED)
def _usable_before_it_is_restored(patch: Patch) -> None:
    def restore(images: Any) -> None:
        images._log.update(both=True, coherent=True)

    patch(BeforeImages, "restore", _wrapped(BeforeImages, "restore", before=restore))


@mutation("COHERENT", seeds=200)
def _coherent_while_it_is_refreshed(patch: Patch) -> None:
    real = Mirror.mark_incoherent

    def mark_incoherent(mirror: Any, *args: Any, **kw: Any) -> Any:
        real(mirror, *args, **kw)
        mirror.journal.update(both=True, coherent=True)

    patch(Mirror, "mark_incoherent", mark_incoherent)


@mutation("COHERENT", seeds=200, first=2)
def _end_of_refresh_without_sync(patch: Patch) -> None:
    real = Mirror._mark_coherent

    def mark_coherent(mirror: Any, *args: Any, **kw: Any) -> Any:
        with ExitStack() as stack:
            for device in mirror.devices:
                stack.enter_context(mock.patch.object(device, "fdatasync", lambda: None))
            return real(mirror, *args, **kw)

    patch(Mirror, "_mark_coherent", mark_coherent)


@mutation("COHERENT", seeds=200, first=19)
def _chunk_read_without_what_is_pending(patch: Patch) -> None:
    patch(DriverUnit, "lock", lambda *_: None)
    patch(DriverUnit, "unlock", lambda *_: None)


# -- verify ---------------------------------------------------------------------------------------


@mutation("COHERENT", seeds=200, first=170)
def _hashes_compared_in_a_replay(patch: Patch) -> None:
    def sure(mirror: Any) -> None:
        mirror._unsure_gsn = 0

    patch(Mirror, "replay", _wrapped(Mirror, "replay", before=sure))


@mutation("COHERENT", first=42, needs="verify")
def _hash_appended_without_the_lock(patch: Patch) -> None:
    def found(_verify: Any, unit: Any, *_: Any) -> None:
        unit.unlock()

    patch(Verify, "_found_hole", _wrapped(Verify, "_found_hole", after=found))


@mutation("COHERENT", first=38, needs="verify")
def _hashes_compared_before_the_writes_are_applied(patch: Patch) -> None:
    real = Mirror.apply

    def apply(mirror: Any, changes: Any) -> Any:
        return real(mirror, sorted(changes, key=lambda change: change.header.kind != VERIFY))

    patch(Mirror, "apply", apply)


@mutation("COHERENT", first=2)
def _difference_counted_before_it_is_durable(patch: Patch) -> None:
    def differs(_verifying: Any, _unit: Any, _ranges: Any, then: Any) -> None:
        then()

    patch(Verifying, "differs", differs)


# -- backfresh ------------------------------------------------------------------------------------


@mutation("COHERENT", first=9, needs="backfresh")
def _blocks_overwritten_before_it_is_durable(patch: Patch) -> None:
    patch(Backfresh, "_record_beginning", lambda *_: succeed(None))


@mutation("COHERENT", first=9, needs="backfresh")
def _fetched_recorded_before_it_is_synced(patch: Patch) -> None:
    patch(Backfresh, "_sync", lambda _: succeed(None))


@mutation("COHERENT", seeds=0, sequence=("backfresh",))
def _backfresh_ends_before_it_is_synced(patch: Patch) -> None:
    patch(Bypass, "sync", lambda _self: succeed(None))


@mutation("COHERENT", seeds=200, first=198, needs="backfresh")
def _what_is_given_up_is_sent(patch: Patch) -> None:
    patch(Attachment, "hold", lambda *_: None)


@mutation("RECOVER", first=9)
def _end_completed_in_no_other_superblock(patch: Patch) -> None:
    patch(recovery_module, "completed", list)


__all__ = ["MUTATIONS", "Mutation", "journal_module"]
