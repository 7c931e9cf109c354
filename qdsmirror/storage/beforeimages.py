"""Before-images on the journal's device (rules.md 15).  Everything here blocks.

From a refresh's begin to its durable end, one is kept of each part of the mirror devices that
changes, by the refresh or by live writes, durable before the first overwrite; so that a refresh
that is interrupted for good can be rolled back.  One that is there is never taken again: by then
the device may hold something later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from crc32c import crc32c

from qdsmirror.config import GroupConfig
from qdsmirror.core.beforeimage import (
    BLOCK_BYTES,
    ROWS_MAX,
    Image,
    Part,
    Period,
    pack_record,
    parse_block,
    record_bytes,
)
from qdsmirror.core.frames import REFRESH, REFRESH_ZEROES, Entry
from qdsmirror.core.ring import align_up
from qdsmirror.errors import BrokenError, CorruptError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import BEFORE_BATCH_BYTES, BEFORE_CHUNK_BYTES
from qdsmirror.storage.writelog import Writelog

_OF_REFRESH = frozenset((REFRESH, REFRESH_ZEROES))
_ZEROES = bytes(BEFORE_CHUNK_BYTES)
_READ_BYTES = 1 << 20
_GIVE_UP = "give-up"


class _Record(NamedTuple):
    """A record on the device: its parts, and where their contents stand."""

    parts: list[Part]
    at: int
    payload_bytes: int
    payload_crc: int


class BeforeImages:
    """The before-images of a group's mirror devices.

    :ivar config: the group's; its tunables may change.
    :ivar size: bytes that there are for them; 0: none are kept.
    :ivar used_bytes: of these.
    :ivar told: what an operator should know.
    """

    def __init__(self, config: GroupConfig, log: Writelog, devices: Sequence[IBlockDevice]) -> None:
        self.config = config
        self._log = log
        self._devices = devices
        self._start, length = log.superblock.before_area
        self.size = min(length, config.tunables.before_image_bytes)
        self.used_bytes = 0
        self.told: list[str] = []
        self._number = 0
        #: By mirror device, a bit for each part of it.
        self._kept: list[bytearray] = []
        self._pending: list[Image] = []
        self._pending_bytes = 0
        # How far the refresh has come, in bytes of the mirror devices one behind the other.
        self._progress = 0
        self._loaded = False

    @property
    def period(self) -> Period | None:
        """The time since the mirror was last usable; ``None`` while it is, or nothing is kept."""
        return Period.from_json(self._log.superblock.before)

    @property
    def mirror_bytes(self) -> int:
        """Bytes of the mirror devices together."""
        return sum(device.size for device in self._devices)

    # -- keeping ------------------------------------------------------------------------------

    def begin(self, gsn: int) -> dict[str, Any] | None:
        """Give what the superblock is to say when the mirror ceases to be usable.

        :param gsn: the last one that is on the mirror devices, synced.
        """
        superblock = self._log.superblock
        if not superblock.coherent:
            # What it was when it was last usable, if that is known.
            return dict(superblock.before) if superblock.before is not None else None
        if not self.size:
            return None
        self._forget()
        self._loaded = True
        return Period(os.urandom(16).hex(), gsn, superblock.bypass).to_json()

    def _forget(self) -> None:
        self.used_bytes = self._number = self._progress = self._pending_bytes = 0
        self._pending.clear()
        parts = [-(-device.size // BEFORE_CHUNK_BYTES) for device in self._devices]
        self._kept = [bytearray(-(-count // 8)) for count in parts]

    def _is_kept(self, ldsu: int, part: int) -> bool:
        return bool(self._kept[ldsu][part // 8] >> part % 8 & 1)

    def _mark_kept(self, ldsu: int, part: int) -> None:
        self._kept[ldsu][part // 8] |= 1 << part % 8

    def keep(self, changes: Iterable[tuple[int, Sequence[Entry]]]) -> None:
        """Keep what entries, by LDSU, are about to overwrite; durable on return.

        :raises BrokenError: there is no room, and the refresh is to stop then.
        :raises OSError: a device refused.
        """
        period = self.period
        if period is None or period.lost:
            return
        self.load()
        full = False
        for ldsu, found in changes:
            for entry in found:
                full = full or not self._keep(ldsu, entry)
        if full or not self._write():
            self._filled()

    def _keep(self, ldsu: int, entry: Entry) -> bool:
        """Keep what one entry changes; ``False`` where there is no room."""
        device = self._devices[ldsu]
        offset, length, kind, payload = entry
        if kind in _OF_REFRESH:
            before = sum(one.size for one in self._devices[:ldsu])
            self._progress = max(self._progress, before + offset + length)
        at, end = offset, offset + length
        if payload is None:
            # What is not allocated reads as zeroes already.
            at += device.hole(offset, length)
        while at < end:
            number = at // BEFORE_CHUNK_BYTES
            first = number * BEFORE_CHUNK_BYTES
            last = min(first + BEFORE_CHUNK_BYTES, device.size)
            stop = min(end, last)
            if not self._is_kept(ldsu, number):
                held = device.pread(last - first, first)
                new = payload[at - offset : stop - offset] if payload else _ZEROES[: stop - at]
                if memoryview(held)[at - first : stop - first] != new:
                    self._mark_kept(ldsu, number)
                    data = held if held != _ZEROES[: len(held)] else None
                    if not self._add(Image(ldsu, first, last - first, data)):
                        return False
            at = stop
        return True

    def _add(self, image: Image) -> bool:
        self._pending.append(image)
        self._pending_bytes += image.length if image.data is not None else 0
        if len(self._pending) < ROWS_MAX and self._pending_bytes < BEFORE_BATCH_BYTES:
            return True
        return self._write()

    def _write(self) -> bool:
        """Write what is pending, durably; ``False`` where there is no room."""
        images, self._pending, self._pending_bytes = self._pending, [], 0
        period = self.period
        if not images or period is None:
            return True
        align = self._log.ring.align
        need = record_bytes(images, align)
        if self.used_bytes + need > self.size:
            return False
        record = pack_record(self._log.log, bytes.fromhex(period.id), self._number, images)
        fill = need - sum(map(len, record))
        self._log.device.pwritev([*record, bytes(fill)], self._start + self.used_bytes)
        # Each by itself: where the next one stands, this one is whole.
        self._log.device.fdatasync()
        self.used_bytes += need
        self._number += 1
        return True

    def _filled(self) -> None:
        """Do what was chosen beforehand for the case that there is no room."""
        self._pending, self._pending_bytes = [], 0
        number = self.config.number
        text = f"the {self.size} bytes for before-images are used up"
        if self.config.tunables.before_images_full != _GIVE_UP:
            raise BrokenError(
                f"{self.config.name}: {text}: the refresh has stopped (before_images_full = stop)",
                hint=f"go back with qdsrmdreco --rollback -g {number}; or go on with "
                "before_images_full = give-up",
            )
        self._lose(text)

    def _lose(self, reason: str) -> None:
        """Give up rolling back, durably, before anything is overwritten that is not kept (LOUD)."""
        period = self.period
        assert period is not None
        self._log.update(both=True, before=period._replace(lost=reason).to_json())
        self.told.append(f"the refresh cannot be rolled back any more: {reason}")

    # -- reading ------------------------------------------------------------------------------

    def load(self) -> None:
        """Find what was kept before the last end.

        Where it is damaged, rolling back is given up: what is missing must not be taken anew.

        :raises OSError: a device cannot be read, or refused a write.
        """
        period = self.period
        if self._loaded or period is None or period.lost:
            return
        self._forget()
        try:
            last = None
            for record in self._records(period):
                self._take(last)
                last = record
            if last is not None and self._is_whole(last):
                self._take(last)
        except CorruptError as error:
            self._lose(f"before-images on {self._log.device.path} are damaged: {error.message}")
        self._loaded = True

    def _take(self, record: _Record | None) -> None:
        if record is None:
            return
        for part in record.parts:
            self._mark_kept(part.ldsu, part.offset // BEFORE_CHUNK_BYTES)
        self._number += 1
        end = record.at + record.payload_bytes - self._start
        self.used_bytes = align_up(end, self._log.ring.align)

    def _records(self, period: Period) -> Iterator[_Record]:
        """Give the records of a period, in order; the last one may be torn.

        :raises CorruptError: later ones stand behind one that is missing.
        """
        place = number = 0
        key = bytes.fromhex(period.id)
        _, length = self._log.superblock.before_area
        while place + BLOCK_BYTES <= length:
            raw = self._log.device.pread(BLOCK_BYTES, self._start + place)
            try:
                found, table = parse_block(raw, self._log.log, key)
                fits = place + BLOCK_BYTES + table.payload_bytes <= length
                if found != number or not fits or not self._is_sound(table.parts):
                    raise CorruptError("a record stands where another one should")
            except CorruptError:
                self._check_end(place, key)
                return
            yield _Record(
                table.parts, self._start + place + BLOCK_BYTES, table.payload_bytes,
                table.payload_crc,
            )  # fmt: skip
            place += align_up(BLOCK_BYTES + table.payload_bytes, self._log.ring.align)
            number += 1

    def _is_sound(self, parts: Iterable[Part]) -> bool:
        return all(
            part.ldsu < len(self._devices)
            and part.offset % BEFORE_CHUNK_BYTES == 0
            and part.offset < self._devices[part.ldsu].size
            and part.length == min(BEFORE_CHUNK_BYTES, self._devices[part.ldsu].size - part.offset)
            for part in parts
        )

    def _check_end(self, place: int, key: bytes) -> None:
        """Check that no record of this period stands behind its last one."""
        _, length = self._log.superblock.before_area
        align = self._log.ring.align
        while place + BLOCK_BYTES <= length:
            data = memoryview(
                self._log.device.pread(min(_READ_BYTES, length - place), self._start + place)
            )
            for at in range(0, len(data) - BLOCK_BYTES + 1, align):
                try:
                    parse_block(data[at : at + BLOCK_BYTES], self._log.log, key)
                except CorruptError:
                    continue
                raise CorruptError("a record is missing before others")
            place += len(data) // align * align

    def _is_whole(self, record: _Record) -> bool:
        at, left, crc = record.at, record.payload_bytes, 0
        while left:
            data = self._log.device.pread(min(left, _READ_BYTES), at)
            crc = crc32c(data, crc)
            at += len(data)
            left -= len(data)
        return crc == record.payload_crc

    # -- going back -----------------------------------------------------------------------------

    def check(self) -> None:
        """Check that everything that was kept can be read.

        :raises BrokenError: rolling back was given up.
        :raises CorruptError: something is damaged.
        """
        self.load()
        for record in self._kept_records():
            if not self._is_whole(record):
                raise CorruptError(
                    f"before-images on {self._log.device.path} are damaged",
                    hint="the mirror cannot be rolled back: make it anew with qdsrefresh",
                )

    @property
    def restorable_bytes(self) -> int:
        """How much :meth:`restore` would write."""
        return sum(part.length for record in self._kept_records() for part in record.parts)

    def restore(self) -> int:
        """Write everything that was kept back to the mirror devices, and sync them.

        :returns: bytes written.
        """
        count = 0
        for record in self._kept_records():
            at = record.at
            for part in record.parts:
                device = self._devices[part.ldsu]
                if part.has_data:
                    data = self._log.device.pread(part.length, at)
                    at += part.length
                    device.pwritev([data], part.offset)
                else:
                    device.zero(part.offset, part.length, False)
                count += part.length
        for device in self._devices:
            device.fdatasync()
        return count

    def _kept_records(self) -> Iterator[_Record]:
        """Give the records without what was torn at the end: nothing was overwritten for it."""
        period = self.period
        assert period is not None
        for number, record in enumerate(self._records(period)):
            if number == self._number:
                return
            yield record

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Give the ``before_images`` object of ``qdsinfo --json``.

        What the refresh needs is estimated from how much it has used for as much of the mirror
        devices as it has passed; without a refresh, it is what one needs that changes everything.
        """
        period = self.period
        used = self.used_bytes if period is not None else 0
        needed: int | None = None
        if period is None:
            needed = self.mirror_bytes
        elif self._progress:
            needed = round(used * self.mirror_bytes / min(self._progress, self.mirror_bytes))
        state = "off" if not self.size else "ready"
        if period is not None:
            state = "given-up" if period.lost else "keeping"
        elif not self._log.superblock.coherent:
            state = "nothing"
        return {
            "state": state,
            "size": self.size,
            "used_bytes": used,
            "needed_bytes": needed,
            "full": self.config.tunables.before_images_full,
            "rollback_gsn": period.gsn if period is not None and not period.lost else None,
            "reason": period.lost if period is not None else "",
        }
