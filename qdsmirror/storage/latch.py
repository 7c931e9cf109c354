"""Remembers failed syncs across processes (rules.md 4).

After a failed fsync the kernel reports the next one as good, though what it dropped stays lost.  So
a failure is written to the group's host state file, and no later process uses the device until the
operator clears it by initialising the group's logs again (qdswlinit(1)).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from qdsmirror.errors import BrokenError, DeviceFailedError, QdsError


class FailureLatch:
    """The state file of a group on this host.

    :param path: ``Paths.state_file(number)``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def failures(self) -> dict[str, str]:
        """Give the reasons by device path; empty while nothing has failed.

        :raises BrokenError: the file cannot be read: then nobody knows what failed.
        """
        try:
            found = json.loads(self.path.read_bytes())
            return {str(device): str(reason) for device, reason in found["failed"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BrokenError(
                f"{self.path} cannot be read: {error}",
                hint="it names devices whose sync has failed; see qdswlinit(1)",
            ) from error

    def check(self, devices: Iterable[str]) -> None:
        """Refuse devices whose sync has failed before.

        :raises BrokenError: naming the device and the reason.
        """
        failed = self.failures()
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
        if not isinstance(error, DeviceFailedError):
            return
        failed = self.failures()
        failed[device] = str(error)
        temporary = self.path.with_suffix(".state.new")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"failed": failed}, file)
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

    def clear(self) -> None:
        """Forget all failures, on the operator's word."""
        self.path.unlink(missing_ok=True)
