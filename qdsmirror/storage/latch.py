"""Remembers failed syncs across processes (rules.md 4).

After a failed fsync the kernel reports the next one as good, though what it dropped stays lost.  So
a failure is told to the master, which remembers it for its life and hands it to every child that it
starts, and written to the group's host state file.  No later process uses the device, even if that
file could not be written, until the operator clears both by initialising the group's logs again
(qdswlinit(1)).

The same file keeps what a primary's group has made of its failed devices (rules.md 13, 16), as its
superblocks do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qdsmirror.config import LdsuConfig
from qdsmirror.core.failures import Dead, Failed, Untrusted
from qdsmirror.core.frames import NUMBERS_END
from qdsmirror.errors import BrokenError, DeviceFailedError, QdsError
from qdsmirror.limits import FAILURE_REASON_CHARS_MAX


class FailureMemory:
    """Failed syncs as a process remembers them, by group and device path; first reasons stand."""

    def __init__(self) -> None:
        self._failed: dict[int, dict[str, str]] = {}

    def of(self, number: int) -> dict[str, str]:
        """Give a group's failed devices and why they failed."""
        return dict(self._failed.get(number, {}))

    def groups(self) -> list[int]:
        """Give the numbers of the groups with failed devices."""
        return sorted(self._failed)

    def remember(self, number: int, device: str, reason: str) -> None:
        """Take note of a failure."""
        self._failed.setdefault(number, {}).setdefault(device, reason)

    def forget(self, number: int) -> list[str]:
        """Forget a group's failures, on the operator's word; give the devices."""
        return sorted(self._failed.pop(number, {}))

    def hand_over(self, numbers: Iterable[int]) -> int | None:
        """Put these groups' failures into a memory file, for another process to :meth:`take`.

        :returns: its descriptor, the caller's to close; ``None`` if nothing has failed.
        :raises OSError: no file could be made.
        """
        failed = {number: self._failed[number] for number in numbers if number in self._failed}
        if not failed:
            return None
        descriptor = os.memfd_create("qdsmirror failures")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(json.dumps(failed).encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def take(self, descriptor: int) -> None:
        """Remember what another process has handed over.

        :param descriptor: a :meth:`hand_over`'s; closed here.
        """
        with open(descriptor, "rb") as file:
            file.seek(0)
            found: dict[str, dict[str, str]] = json.load(file)
        for number, failed in found.items():
            for device, reason in failed.items():
                self.remember(int(number), device, reason)


def _tell_nobody(_device: str, _reason: str) -> None:
    """Stand in where there is no master: in the offline tools."""


class FailureLatch:
    """What is known of a group's failed devices: the state file, and what processes remember.

    :param path: ``Paths.state_file(number)``.
    :param known: gives what this process remembers of the group's failures.
    :param tell: told (device, reason) of each failure before the file is written.
    """

    def __init__(
        self,
        path: Path,
        known: Callable[[], Mapping[str, str]] = dict,
        tell: Callable[[str, str], None] = _tell_nobody,
    ) -> None:
        self.path = path
        self._known = known
        self._tell = tell

    def failures(self) -> dict[str, str]:
        """Give the reasons by device path; empty while nothing has failed.

        :raises BrokenError: the file cannot be read: then nobody knows what failed.
        """
        return {**self._known(), **self._read()[0]}

    def group(self) -> Failed:
        """Give what the group has made of its failed devices.

        :raises BrokenError: the file cannot be read.
        """
        return self._read()[1]

    def known(self, ldsus: Iterable[LdsuConfig], now: float) -> Failed:
        """Give what is known of a primary's failed devices before any is opened.

        :param ldsus: all of the group.
        :param now: seconds since 1970: since when a device has failed that only a sync's failure is
            recorded of.
        :raises BrokenError: the file cannot be read.
        """
        recorded, group = self._read()
        failed = {**self._known(), **recorded}
        untrusted, dead = dict(group.untrusted), dict(group.dead)
        for ldsu in ldsus:
            log, data = failed.get(ldsu.log_device), failed.get(ldsu.data_device)
            # A crash came between the failure and its recording: then nothing has gone past the
            # log.
            if log is not None and ldsu.index not in untrusted:
                reason = f"writelog {ldsu.log_device} failed: {log}"
                untrusted[ldsu.index] = Untrusted(_shorten(reason), now, NUMBERS_END - 1, False, 0)
            if data is not None and ldsu.index not in dead:
                reason = f"data device {ldsu.data_device} failed: {data}"
                dead[ldsu.index] = Dead(_shorten(reason), now, 0)
        return Failed(untrusted, dead, group.generation)

    def _read(self) -> tuple[dict[str, str], Failed]:
        try:
            found = json.loads(self.path.read_bytes())
            failed = {str(device): str(reason) for device, reason in found["failed"].items()}
            return failed, Failed.from_json(found.get("group"))
        except FileNotFoundError:
            return {}, Failed()
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BrokenError(
                f"{self.path} cannot be read: {error}",
                hint="it names devices whose sync has failed; see qdswlinit(1)",
            ) from error

    def check(self, devices: Iterable[str]) -> None:
        """Refuse devices whose sync has failed before.

        :raises BrokenError: naming the device and the reason; or the file cannot be read.
        """
        failed = self.failures()
        self.try_to_keep()
        for device in devices:
            if device in failed:
                raise BrokenError(
                    f"{device} has failed: {failed[device]}",
                    hint="replace or check it, then run qdswlinit --yes and make a new mirror",
                )

    def record(self, device: str, error: BaseException) -> None:
        """Note a failure durably, if it is one of a sync; any other may be tried again.

        :raises QdsError: it cannot be written.
        """
        if self.tell(device, error):
            self.write(device, error)

    def tell(self, device: str, error: BaseException) -> bool:
        """Let the processes remember a failure, as the first part of :meth:`record`; never blocks.

        :returns: whether it is one of a sync, so that :meth:`write` must follow.
        """
        if not isinstance(error, DeviceFailedError):
            return False
        self._tell(device, str(error))
        return True

    def write(self, device: str, error: BaseException) -> None:
        """Note durably what was told, as the second part of :meth:`record`.

        :raises QdsError: it cannot be written.
        """
        recorded, group = self._read()
        self._write({device: str(error), **self._known(), **recorded}, group)

    def record_group(self, failed: Failed) -> None:
        """Write durably what the group makes of its failed devices.

        :raises QdsError: it cannot be written, or not be read.
        """
        self._write(self.failures(), failed)

    def keep(self) -> None:
        """Write what is remembered into the state file, where that lacks it.

        :raises QdsError: it cannot be written, or not be read.
        """
        recorded, group = self._read()
        known = self._known()
        if known.keys() - recorded.keys():
            self._write({**known, **recorded}, group)

    def try_to_keep(self) -> None:
        """Do as :meth:`keep`; where that fails, the memory holds that told us of the failures.

        Its owner says so at its end.
        """
        with suppress(QdsError):
            self.keep()

    def _write(self, failed: Mapping[str, str], group: Failed) -> None:
        body: dict[str, Any] = {"failed": failed}
        if group:
            body["group"] = group.to_json()
        temporary = self.path.with_suffix(".state.new")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as cause:
            raise QdsError(f"{self.path} cannot be written: {cause}") from cause

    def forget(self, devices: Iterable[str], group: Failed) -> None:
        """Forget some devices' failures, on the operator's word; those of others stay.

        :param group: what stays of what the group has made of them.
        :raises QdsError: it cannot be written, or not be read.
        """
        gone = set(devices)
        self._write({path: why for path, why in self.failures().items() if path not in gone}, group)

    def clear(self) -> None:
        """Forget all failures in the file, on the operator's word."""
        self.path.unlink(missing_ok=True)


def _shorten(reason: str) -> str:
    return reason[:FAILURE_REASON_CHARS_MAX]
