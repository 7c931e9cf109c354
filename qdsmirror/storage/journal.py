"""The secondary journal and the mirror devices of a group, and how the one becomes the other.

The same for the remote mirror daemon and for qdsrmdreco(1).  Everything here blocks.  Invariants
kept: PREFIX (frames are applied in GSN order, and only after they are durable in the journal),
COHERENT (the superblock says "incoherent" before the first chunk of a refresh is applied, and
"coherent" only after its end mark, with everything before it synced), RECOVER (applying twice
changes nothing).  While a checkpoint holds, nothing beyond it is applied, whatever comes between
(rules.md 22).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from qdsmirror.config import GroupConfig
from qdsmirror.core.frames import (
    BREAK,
    ENTRIES,
    MARK,
    NUMBERS_END,
    REFRESH_BEGIN,
    REFRESH_END,
    VERIFY,
    Buffer,
    Entry,
    FrameHeader,
    control_payload,
    entries,
)
from qdsmirror.core.generations import begun
from qdsmirror.core.held import Held, mark_name
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.core.verify import Kept, Range, Verdict, parse_rows
from qdsmirror.errors import CorruptError, DeviceFailedError, MismatchError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.beforeimages import BeforeImages
from qdsmirror.storage.binding import Bound, look_ahead, seal, take_over
from qdsmirror.storage.fingerprint import ranges_text
from qdsmirror.storage.logreader import READ_BYTES
from qdsmirror.storage.recovery import check_binding, closing_on_error
from qdsmirror.storage.verify import differing
from qdsmirror.storage.writelog import Writelog

#: Frames behind which something is recorded: nothing that follows is applied together with them.
CUTS = frozenset((MARK, REFRESH_BEGIN, REFRESH_END))

_REMEDY = "the journal lost or changed data: make a new mirror with qdsrefresh --full"


class Change(NamedTuple):
    """What a frame does to the mirror.

    :ivar control: a control frame's payload: the id that it names, of a refresh, bypass or
        generation; hashes; or nothing.
    """

    header: FrameHeader
    entries: Sequence[Entry]
    control: bytes


def change_of(header: FrameHeader, frame: Buffer) -> Change:
    """Read what an intact frame does.

    :raises CorruptError: its table and payloads do not fit each other.
    """
    if header.kind == ENTRIES:
        return Change(header, entries(header, frame), b"")
    return Change(header, (), control_payload(header, frame))


class Applied(NamedTuple):
    """What was applied.

    :ivar place: behind it; ``frames``: how many.
    :ivar verdicts: as :meth:`Mirror.apply` gives them.
    """

    place: Cursor
    frames: int
    verdicts: list[Verdict]


class JournalScan(NamedTuple):
    """What a journal holds behind its ``applied`` cursor.

    :ivar entries: GSNs of these frames together.
    :ivar reached: behind the last intact frame.
    :ivar stopped: why the scan ended there.
    :ivar damage: why the journal is refused; empty while it is usable.
    """

    frames: int
    entries: int
    reached: Cursor
    stopped: str
    damage: str


class Mirror:
    """A group's journal and mirror devices, open and locked.

    :ivar applied: behind the last frame applied (not yet synced).
    :ivar reached: behind the last frame that :meth:`replay` found in the journal.
    :ivar told: what an operator should know.
    """

    def __init__(self, config: GroupConfig, journal: Writelog, devices: Sequence[IBlockDevice]):
        self.config = config
        self.journal = journal
        self.devices = list(devices)
        self.applied = self.reached = journal.superblock.applied
        self.told: list[str] = []
        self.images = BeforeImages(config, journal, self.devices)
        #: Up to this GSN the devices may hold what a later frame wrote: nothing is compared.
        self._unsure_gsn = NUMBERS_END

    @classmethod
    def open(cls, config: GroupConfig, open_device: Callable[..., IBlockDevice]) -> Mirror:
        """Open and lock the journal, then the mirror devices, and check that they belong together.

        :raises DeviceError: one is missing, in use, or too small.
        :raises MismatchError: the journal is another group's, or for other LDSUs or sizes.
        """
        with closing_on_error() as opened:
            journal_device = open_device(
                config.journal_device, writable=True, role=f"journal of {config.name}"
            )
            opened.callback(journal_device.close)
            journal = Writelog.open(journal_device)
            check_binding(journal.superblock, config, "journal", config.journal_device)
            bound = [(unit.index, unit.name) for unit in journal.superblock.units]
            if bound != [(ldsu.index, ldsu.name) for ldsu in config.ldsus]:
                raise MismatchError(
                    f"journal {config.journal_device} was initialised for other LDSUs "
                    f"({', '.join(name for _, name in bound)}) than {config.path} names",
                    hint=f"restore the LDSUs' names and order there; or, if the change is meant, "
                    f"run qdswlinit -g {config.number} --yes here, then qdsrefresh --full",
                )
            devices = []
            for ldsu, unit in zip(config.ldsus, journal.superblock.units, strict=True):
                device = open_device(
                    ldsu.mirror_device, writable=True, role=f"mirror device of {ldsu.name}"
                )
                opened.callback(device.close)
                if device.size != unit.size:
                    raise MismatchError(
                        f"mirror device {ldsu.mirror_device} has {device.size} bytes; it was "
                        f"initialised with {unit.size}",
                        hint=f"restore it, or run qdswlinit -g {config.number} --yes and refresh",
                    )
                devices.append(device)
        return cls(config, journal, devices)

    def close(self) -> None:
        """Close every device."""
        with ExitStack() as stack:
            for device in (self.journal.device, *self.devices):
                stack.callback(device.close)

    def scan(self) -> JournalScan:
        """Read what the journal holds, and judge whether it is all that was durable."""
        superblock = self.journal.superblock
        path = self.journal.device.path
        reader = self.journal.reader(superblock.applied, contiguous=True)
        frames = entries = 0
        for found in reader:
            frames += 1
            entries += found.header.gsn_count
        reached, stopped, damage = reader.cursor, reader.stopped, ""
        try:
            # The durable GSN in frames is the primary's and says nothing of the journal.
            durable = max(superblock.head.position, look_ahead(self.journal, reader).durable_end)
        except CorruptError as error:
            damage = f"{path}: {error.message}"
        else:
            if reached.position < durable:
                damage = (
                    f"{path}: durable up to position {durable}, but intact only up to "
                    f"{reached.position} ({stopped})"
                )
        return JournalScan(frames, entries, reached, stopped, damage)

    def replay(self) -> int:
        """Apply what the journal holds, after any end (patent: qdsrmdreco), and sync everything.

        Up to a checkpoint that holds, or to a mark that takes one.

        :returns: frames applied.
        :raises CorruptError: the journal ends before what was durable in it, or its superblock is
            not the newest there was; nothing was written then.
        :raises MismatchError: another device stands under a mirror device's path.
        """
        scan = self.scan()
        if scan.damage:
            raise CorruptError(scan.damage, _REMEDY)
        self.check_foreign()
        self.images.load()
        self.journal.head = scan.reached.position
        self.reached = scan.reached
        count = 0
        while self.held is None and self.applied.position != scan.reached.position:
            done = self.apply_journal(scan.reached)
            self.applied = done.place
            count += done.frames
        self._unsure_gsn = scan.reached.gsn - 1
        # A checkpoint too may stand in one slot only so far.
        known = begun(self.journal.superblock.generations, scan.reached.gsn)
        self.checkpoint(self.applied, scan.reached, generations=known)
        return count

    def check_foreign(self) -> None:
        """Look whether somebody else has written to a mirror device; the mirror is none then.

        :raises MismatchError: another device stands under a mirror device's path.
        """
        self.told += take_over(self._bound, self.config, self._mark_foreign)

    def apply_journal(self, upto: Cursor) -> Applied:
        """Apply the next frames that are durable in the journal, as many as one read gives.

        One of CUTS is the last of them.

        :param upto: behind the last that is.
        :raises CorruptError: it does not hold what it should.
        :raises OSError: a device or the journal refused.
        """
        cursor = self.applied
        changes: list[Change] = []
        verdicts: list[Verdict] = []
        reader = self.journal.reader(cursor, contiguous=True)
        for found in reader.read(READ_BYTES, upto.position):
            changes.append(change_of(found.header, found.frame))
            cursor = cursor.after(found.header, found.end)
            if found.header.kind in CUTS:
                break
        else:
            # Pads may stand behind the last one.
            cursor = reader.cursor
        if changes:
            verdicts = self.apply(changes)
            self.reach(changes[-1], cursor, upto)
        elif cursor.position != upto.position:
            raise CorruptError(
                f"{self.journal.device.path}: reads differently than a moment ago", _REMEDY
            )
        return Applied(cursor, len(changes), verdicts)

    # -- a checkpoint -------------------------------------------------------------------------

    @property
    def held(self) -> Held | None:
        """The checkpoint that holds."""
        return Held.from_json(self.journal.superblock.checkpoint)

    def reach(self, last: Change, place: Cursor, durable: Cursor) -> None:
        """Do what the last frame applied asks for behind it.

        :param place: behind it.
        :param durable: as for :meth:`checkpoint`.
        """
        if last.header.kind == REFRESH_BEGIN:
            # What came before is not replayed over what follows any more.
            self.mark_incoherent(
                last.control,
                last.header.gsn_first - 1,
                tail=place,
                applied=place,
                head=durable,
                durable_gsn=durable.gsn - 1,
            )
        elif last.header.kind == MARK:
            self._reach_mark(last, place, durable)

    def _reach_mark(self, last: Change, place: Cursor, durable: Cursor) -> None:
        """Take the checkpoint that a mark asks for, if the mirror is usable there."""
        name, hold = mark_name(last.control), self.config.tunables.checkpoint_hold
        if not self.journal.superblock.coherent:
            reason = self.journal.superblock.reason
            self.told.append(f"no checkpoint at mark {name}: the mirror is not usable: {reason}")
            return
        since = last.header.time_ns / 1e9
        self.hold(Held(name, place.gsn - 1, since, hold, True), place, durable)

    def go_by(self, config: GroupConfig) -> None:
        """Go by other tunables from now on."""
        self.config = self.images.config = config

    def take_told(self) -> list[str]:
        """Give what an operator should know, once."""
        told = [*self.told, *self.images.told]
        self.told.clear()
        self.images.told.clear()
        return told

    def hold(self, held: Held, place: Cursor, durable: Cursor) -> None:
        """Record, in both slots, that nothing beyond a place is applied; all before it is, synced.

        :param durable: as for :meth:`checkpoint`.
        """
        self.checkpoint(place, durable, checkpoint=held.to_json())

    def release(self) -> None:
        """Record that applying goes on."""
        self.journal.update(both=True, checkpoint=None)

    @property
    def _bound(self) -> list[Bound]:
        units = zip(self.journal.superblock.units, self.devices, strict=True)
        return [Bound(self.journal, unit.index, device) for unit, device in units]

    def _mark_foreign(self, reason: str) -> None:
        """Record that somebody else has written to a mirror device: it is no mirror any more.

        Under a new generation the primary finds that the histories differ (rules.md 8), and
        continues only with a full refresh.
        """
        known = self.journal.superblock
        generations = (Generation(os.urandom(16), known.applied.gsn),)
        self.journal.update(
            both=True,
            coherent=False,
            reason=reason,
            refresh=None,
            bypass=None,
            checkpoint=None,
            before=None,
            # A journal that was never filled has none, and its mirror nothing to lose.
            generations=generations if known.generations else (),
        )

    def seal(self) -> None:
        """Record what the mirror devices hold, at an orderly end (rules.md 24).

        :raises OSError: a device cannot be read or synced, or the journal not written.
        """
        seal(self._bound)

    def apply(self, changes: Iterable[Change]) -> list[Verdict]:
        """Apply frames, in order, to the mirror devices.

        One of CUTS is the last of them, if any is there; :meth:`reach` does what it asks for.

        :returns: what was found at each VERIFY frame; nothing of one that a crash has left behind,
            whose later frames the devices may hold already (rules.md 22).
        :raises OSError: a device or the journal refused.
        """
        verdicts: list[Verdict] = []
        changes = list(changes)
        self.images.keep((header.ldsu, found) for header, found, _ in changes)
        for header, found, control in changes:
            if self.journal.superblock.bypass is not None and header.kind == ENTRIES:
                # The primary did not come to enter it.
                self.journal.update(both=True, bypass=None)
            if header.kind == ENTRIES:
                apply_entries(self.devices[header.ldsu], found)
            elif header.kind == REFRESH_END:
                self._mark_coherent(control)
            elif header.kind == BREAK:
                self._mark_break(control, header.time_ns / 1e9)
            elif header.kind == VERIFY and header.gsn_first > self._unsure_gsn:
                verdicts.append(self._compare(header, control))
        return verdicts

    def _compare(self, header: FrameHeader, control: bytes) -> Verdict:
        """Compare what a mirror device holds here with what the LDSU held (LOUD)."""
        superblock = self.journal.superblock
        if superblock.refresh is not None:
            return Verdict(
                header.gsn_first,
                header.ldsu,
                skipped="the secondary's mirror lacks a refresh's end",
            )
        found = differing(self.devices[header.ldsu], parse_rows(control))
        self.check_read(header.ldsu)
        if found:
            self._keep_found(header.ldsu, found)
        return Verdict(header.gsn_first, header.ldsu, found)

    def check_read(self, ldsu: int) -> None:
        """Check, once a mirror device was read, that it still holds what was written to it.

        Its failed sync may have taken that away, until the journal is replayed (rules.md 4).

        :raises DeviceFailedError: a sync has failed.
        """
        device = self.devices[ldsu]
        if device.failed is not None:
            reason = f"{device.role} {device.path} failed: {device.failed}"
            raise DeviceFailedError(reason, path=device.path)

    def _keep_found(self, ldsu: int, found: Sequence[Range]) -> None:
        """Record, in both slots, that the mirror differs, and where."""
        superblock = self.journal.superblock
        kept = Kept(superblock.verify)
        kept.add(ldsu, found)
        changes: dict[str, Any] = {"verify": kept.to_json()}
        if superblock.coherent:
            name = self.config.ldsus[ldsu].name
            where = ranges_text([(offset, offset + length) for offset, length in found])
            reason = f"a verify has found that the mirror of {name} differs ({where})"
            changes |= {"coherent": False, "reason": reason}
        if superblock.coherent or changes["verify"] != superblock.verify:
            self.journal.update(both=True, **changes)

    def found_before(self) -> list[Verdict]:
        """Give what verifies have found here, if it still holds where the mirror stands."""
        superblock = self.journal.superblock
        if superblock.coherent or superblock.refresh is not None or superblock.verify is None:
            return []
        return Kept(superblock.verify).verdicts(self.applied.gsn - 1)

    def mark_incoherent(self, refresh_id: bytes, gsn: int, **changes: Any) -> None:
        """Record, in both slots, that a refresh has begun to change the mirror.

        :param gsn: the last one on the mirror devices; it is synced first, so that the mirror can
            be rolled back to it.
        :param changes: of other fields of the superblock.
        """
        for device in self.devices:
            device.fdatasync()
        self.journal.update(
            both=True,
            coherent=False,
            reason="a refresh is in progress",
            refresh={"id": refresh_id.hex()},
            bypass=None,
            before=self.images.begin(gsn),
            **changes,
        )

    def begin_anew(self, refresh_id: bytes, **changes: Any) -> None:
        """Record another history's beginning; what the journal held is applied, and not needed.

        It is synced before: a dirty refresh does not bring it again.
        """
        self.mark_incoherent(refresh_id, self.applied.gsn - 1, **changes)

    def _mark_break(self, bypass_id: bytes, since: float) -> None:
        """Record that what the mirror holds is complete, and older than the primary's state."""
        self.journal.update(
            both=True,
            bypass={"id": bypass_id.hex(), "since": since, "reason": "the primary is in bypass"},
        )

    def _mark_coherent(self, refresh_id: bytes) -> None:
        refresh = self.journal.superblock.refresh
        if refresh is None or refresh["id"] != refresh_id.hex():
            # The end of a refresh that another one has overtaken proves nothing.
            return
        for device in self.devices:
            device.fdatasync()
        self.journal.update(
            both=True, coherent=True, reason="", refresh=None, verify=None, before=None
        )

    def checkpoint(self, upto: Cursor, durable: Cursor, **changes: Any) -> None:
        """Sync the mirror devices and free the journal up to a place that is applied.

        :param durable: behind the last frame that is durable in the journal: a later scan that
            does not come so far has found corruption (rules.md 6).
        :param changes: of other fields of the superblock.
        """
        for device in self.devices:
            device.fdatasync()
        self.journal.update(
            both=True,
            tail=upto,
            applied=upto,
            head=durable,
            durable_gsn=durable.gsn - 1,
            **changes,
        )
