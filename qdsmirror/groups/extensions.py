"""The extension pool of a group: chains its devices to writelogs in use, and takes them back.

The log's superblock has the word on which devices it has (man page qdswritelog(5)); the pool is
what no superblock names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from qdsmirror.errors import DegradedError, DeviceFailedError, QdsError, UsageError
from qdsmirror.storage.extension import PoolDevice, open_pool
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import OpenUnit

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit

#: Remembers a failed sync for good, of a device by its path.
Remember = Callable[[str, BaseException], None]


class Extensions:
    """The extension devices of a group.

    :ivar unusable: why those cannot be used that are not here, by their paths.
    """

    log = Logger()

    def __init__(self, group: DriverGroup, latch: FailureLatch) -> None:
        self._group = group
        self._latch = latch
        self._opened: list[PoolDevice] = []
        self._free: list[PoolDevice] = []
        #: How many changes of each LDSU's log are under way.
        self._changing: dict[int, int] = {}
        #: How many changes are not yet answered.
        self._untold = 0
        self.unusable: dict[str, str] = {}

    # -- start and stop -------------------------------------------------------------------------

    def open(self, *, failed: bool = False) -> list[PoolDevice]:
        """Open the devices of the pool (blocking).

        :param failed: a writelog has failed and is still read: leave the page cache as it is.
        :returns: those that could be opened, whoever has them.
        """
        known = self._latch.failures()
        good = [path for path in self._group.config.pool if path not in known or failed]
        for path in self._group.config.pool:
            if path in known:
                self.unusable[path] = known[path]
        open_device = self._group.runtime.open_device
        self._opened, problems = open_pool(good, self._group.number, open_device, failed=failed)
        for path, error in problems.items():
            self.unusable[path] = error.message
            self._record(path, error)
        for path, reason in self.unusable.items():
            self.log.warn(
                "{group}: extension {path} cannot be used: {reason}",
                group=self._group.name, path=path, reason=reason,
            )  # fmt: skip
        return self._opened

    def settle(self, units: Sequence[OpenUnit]) -> None:
        """Bring back to the pool what no writelog has, whatever a crash has left (blocking)."""
        chained = {one.id for unit in units for one in unit.writelog.extensions.values()}
        left = [one for one in self._opened if one.id not in chained]
        trusted = all(unit.untrusted is None for unit in units)
        for device in left:
            # A log that has failed is not read: what it has is not known.
            if not device.header.log or trusted:
                self._take_back(device, self._record)
            else:
                self.unusable[device.device.path] = "of a writelog that has failed"

    def _take_back(self, device: PoolDevice, remember: Remember) -> None:
        path = device.device.path
        if path in self.unusable:
            return
        if device.header.log and device.failure is None:
            device.release()
        if device.failure is not None:
            self._lose(device, device.failure, remember)
        else:
            order = self._group.config.pool.index
            self._free.append(device)
            self._free.sort(key=lambda one: order(one.device.path))

    def _lose(self, device: PoolDevice, error: BaseException, remember: Remember) -> None:
        """Never use a device again."""
        path = device.device.path
        self.unusable[path] = str(error)
        self._group.note_error(f"extension {path} failed: {error}")
        remember(path, error)

    def _record(self, path: str, error: BaseException) -> None:
        """Remember a failed sync for good (rules.md 4; blocking)."""
        try:
            self._latch.record(path, error)
        except QdsError as cause:
            self._group.note_error(cause.message)

    def stop(self) -> Deferred[None]:
        """Fire when nothing is half-way: the driver stops."""
        return self._group.bypass.until(lambda: not self._untold)

    def close(self) -> None:
        """Close all devices, of whatever log; the workers have stopped."""
        for device in self._opened:
            device.device.close()

    # -- what is where --------------------------------------------------------------------------

    def collect(self) -> None:
        """Take back what the logs have given back."""
        for unit in self._group.units:
            while unit.writelog.released:
                device = unit.writelog.released.pop(0)
                self._take_back(device, self._group.failures.remember)
                self.log.info(
                    "{group}: {path} has left the writelog of {unit}",
                    group=self._group.name, path=device.device.path, unit=unit.name,
                )  # fmt: skip

    def changes(self, unit: DriverUnit) -> bool:
        """Tell whether an LDSU's log is being extended or freed: it has no room meanwhile."""
        return bool(self._changing.get(unit.index))

    def status(self) -> dict[str, Any]:
        """Give the ``pool`` object of ``qdsinfo --json``."""
        self.collect()
        users = {
            one.device.path: (unit, number)
            for unit in self._group.units
            for number, one in list(unit.writelog.extensions.items())
        }
        free = {one.device.path for one in self._free}
        rows = []
        for path in self._group.config.pool:
            unit, number = users.get(path, (None, 0))
            state = "free" if path in free else "unusable"
            if unit is not None:
                state = "leaving" if number in _leaving(unit) else "chained"
            elif path not in free and path not in self.unusable:
                state = "changing"
            rows.append(
                {
                    "device": path,
                    "state": state,
                    "ldsu": unit.name if unit is not None else None,
                    "reason": self.unusable.get(path, ""),
                }
            )
        return {
            "devices": rows,
            "free": sum(row["state"] == "free" for row in rows),
            "used": sum(row["ldsu"] is not None for row in rows),
        }

    def chain(self, unit: DriverUnit) -> list[dict[str, Any]]:
        """Give the ``extensions`` of an LDSU's ``writelog`` object, in the order of chaining."""
        log = unit.writelog
        superblock, devices = log.superblock, dict(log.extensions)
        sizes = superblock.ring.bytes_between(0, superblock.ring.size)
        used = superblock.ring.bytes_between(log.durable_tail, log.head)
        uncommitted = superblock.ring.bytes_between(unit.committed_end, log.head)
        return [
            {
                "device": devices[one.number].device.path,
                "size": sizes.get(one.number, 0),
                "used_bytes": used.get(one.number, 0),
                "uncommitted_bytes": uncommitted.get(one.number, 0),
                "leaving": one.leaving,
            }
            for one in superblock.extensions
            if one.number in devices
        ]

    # -- extending and freeing ------------------------------------------------------------------

    def extend(self, ldsu: str, path: str) -> Deferred[dict[str, Any]]:
        """Chain a device to an LDSU's writelog; fires once that is durable.

        :param path: of the device; empty: the first that is free.
        :raises DegradedError: none is free, or not this one.
        :raises LimitError: the log has as many as it may.
        :raises DeviceError: the device does not fit the log, or has failed.
        """
        unit = self._unit(ldsu)
        device = self._choose(path)
        self._free.remove(device)

        def done(error: BaseException | None) -> None:
            if error is None or device in unit.writelog.extensions.values():
                return
            # What its header says by now counts for nothing: no superblock names it.
            remember = self._group.failures.remember
            if isinstance(error, (OSError, DeviceFailedError)):
                self._lose(device, error, remember)
            else:
                self._take_back(device, remember)

        return self._change(unit, partial(unit.writelog.extend, device), done, device.device.path)

    def free(self, ldsu: str, path: str) -> Deferred[dict[str, Any]]:
        """Begin to take a device out of an LDSU's writelog; fires once that is durable.

        :param path: of the device; empty: the one that was chained last.
        :raises UsageError: the log has no such extension.
        :raises DegradedError: it is leaving already, or cannot be done without.
        """
        unit = self._unit(ldsu)
        number = self._chained(unit, path)
        device = unit.writelog.extensions[number].device.path
        return self._change(unit, partial(unit.writelog.free, number), lambda _error: None, device)

    def _unit(self, name: str) -> DriverUnit:
        group = self._group
        if not group.is_serving:
            raise QdsError(f"{group.name}: the driver does not serve this group yet")
        group.failures.check_logs("change of the writelogs")
        unit = next((one for one in group.units if one.name == name), None)
        if unit is None:
            raise UsageError(f"{group.name} has no LDSU {name}", hint="qdsinfo lists the LDSUs")
        return unit

    def _choose(self, path: str) -> PoolDevice:
        """Find the device by which a log is to be extended."""
        self.collect()
        name, pool = self._group.name, self.status()["devices"]
        if not path:
            if self._free:
                return self._free[0]
            leaving = next((row for row in pool if row["state"] == "leaving"), None)
            raise DegradedError(
                f"{name}: no device of the extension pool is free ({len(pool)} in it)",
                hint=f"wait until {leaving['device']} is drained: qdsinfo"
                if leaving
                else f"free one with qdsfree, or add devices in {self._group.config.path}, then "
                "qdswlinit --pool and qdsconfigtool apply",
            )
        wanted = os.path.normpath(path)
        for one in self._free:
            if os.path.normpath(one.device.path) == wanted:
                return one
        row = next((one for one in pool if os.path.normpath(one["device"]) == wanted), None)
        if row is None:
            raise UsageError(
                f"{path} is not in the extension pool of {name}", hint="qdsinfo --json"
            )
        why = {
            "unusable": row["reason"],
            "chained": f"the writelog of {row['ldsu']} has it",
            "leaving": f"it is still being drained from the writelog of {row['ldsu']}",
        }.get(row["state"], "it is just being chained")
        raise DegradedError(f"{name}: {path} is not free: {why}", hint="qdsinfo")

    def _chained(self, unit: DriverUnit, path: str) -> int:
        """Find the number of the extension that is to leave."""
        writelog = unit.writelog
        wanted = os.path.normpath(path) if path else ""
        found = [
            one
            for one in writelog.superblock.extensions
            if one.number in writelog.extensions
            and wanted in ("", os.path.normpath(writelog.extensions[one.number].device.path))
        ]
        if not found:
            raise UsageError(
                f"the writelog of {unit.name} is not extended" + (f" by {path}" if path else ""),
                hint="qdsinfo --json lists what it is extended by",
            )
        staying = [one for one in found if not one.leaving]
        if not staying:
            waits = any(row["leaving"] and row["uncommitted_bytes"] for row in self.chain(unit))
            raise DegradedError(
                f"the writelog of {unit.name} is being freed already, and "
                + ("not drained yet" if waits else "drained: the next checkpoint frees it"),
                hint="watch it with qdsinfo"
                + ("; it drains as the secondary commits" if waits else ""),
            )
        return staying[-1].number

    def _change(
        self,
        unit: DriverUnit,
        job: Callable[[], None],
        settled: Callable[[BaseException | None], None],
        path: str,
    ) -> Deferred[dict[str, Any]]:
        """Change the layout of a log in its worker, and go on with what waited for room."""
        group = self._group
        fired: Deferred[dict[str, Any]] = Deferred()

        def done(_result: None, error: BaseException | None) -> None:
            self._changing[unit.index] -= 1
            if error is not None and unit.writelog.is_undecided:
                # Nobody knows which layout a crash would leave.
                unit.fail_log(error)
            settled(error)
            unit.full_since = None
            group.frame_again()
            group.checkpoints.take()
            if error is None:
                fired.callback(self._answer(unit, path))
            elif isinstance(error, QdsError):
                fired.errback(error)
            else:
                fired.errback(QdsError(f"{group.name}: {path}: {error}", hint="qdsinfo"))
            self._untold -= 1
            group.bypass.poke()

        self._untold += 1
        self._changing[unit.index] = self._changing.get(unit.index, 0) + 1
        unit.run_on_log(job, done)
        return fired

    def _answer(self, unit: DriverUnit, path: str) -> dict[str, Any]:
        row = next((one for one in self.chain(unit) if one["device"] == path), None)
        leaving = row if row is not None and row["leaving"] else None
        log = unit.writelog
        return {
            "ldsu": unit.name,
            "device": path,
            "state": "free" if row is None else "leaving" if leaving else "chained",
            "drain_bytes": leaving["used_bytes"] if leaving else 0,
            "uncommitted_bytes": leaving["uncommitted_bytes"] if leaving else 0,
            "size": log.ring.size,
            "used_bytes": log.used_bytes,
            "pool_free": self.status()["free"],
        }


def _leaving(unit: DriverUnit) -> set[int]:
    return {one.number for one in unit.writelog.superblock.extensions if one.leaving}
