"""Attaching by the kernel's NBD driver: a keeper makes the device and keeps it connected."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import parse_object
from qdsmirror.errors import DeviceError, ProtocolError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.pidfile import running_pid
from qdsmirror.tools.attach_state import (
    GONE_SECONDS,
    Attached,
    forget,
    is_linked,
    link,
    read_state,
    refuse_in_use,
    unlink,
    wait,
    write_state,
)

if TYPE_CHECKING:
    from qdsmirror.tools.attach_netlink import KernelNbd

VIA = "nbd"
#: The keeper's program.
KEEPER = "qdsmirror.tools.attach_keeper"
#: It waits for the device driver as long as an NBD client does, and for the device.
KEEPER_SECONDS = 120.0
_REPORT_BYTES_MAX = 64 * 1024


def is_there() -> bool:
    """Tell whether this kernel has the driver; its module is loaded if need be."""
    # pyroute2 takes 0.3 s, and a kernel without the driver does not need it again.
    from qdsmirror.tools import attach_netlink

    return attach_netlink.driver_is_there()


def attach(paths: Paths, name: str, uri: str, dead_seconds: int) -> Attached:
    """Make the device; one that has lost its keeper gets a new one, mounted or not.

    The caller takes away what is left of it when this fails.

    :raises UnreachableError: nobody serves the export.
    :raises DeviceError: a step failed.
    """
    with _kernel() as kernel:
        index = _index(kernel, uri, read_state(paths, name))
        state = write_state(paths, Attached(name, uri, VIA, 0, "", str(paths.dev / name)))
        # One that is left over has lost its device, or its device the link.
        _end_keeper(paths, name)
        index = _start(paths, name, uri, dead_seconds, index)
        state = replace(state, keeper=_keeper(paths, name) or 0, node=str(kernel.node(index)))
    write_state(paths, state)
    link(Path(state.device), state.node)
    return state


def detach(paths: Paths, state: Attached) -> None:
    """Take the device away; what is gone already is no error.

    :raises DeviceError: it is in use; nothing was taken away then.
    """
    with contextlib.ExitStack() as stack:
        kernel = None
        with contextlib.suppress(DeviceError):  # without the driver there is no device of it
            kernel = stack.enter_context(_kernel())
        index = None if kernel is None else _index(kernel, state.uri, state)
        if kernel is not None and index is not None:
            refuse_in_use(state.name, str(kernel.node(index)))
            _flush(state.name, str(kernel.node(index)))
        _end_keeper(paths, state.name)
        if kernel is not None:
            _disconnect(kernel, state)
    unlink(state)
    forget(paths, state.name)


def is_whole(paths: Paths, state: Attached) -> bool:
    """Tell whether nothing of the device is missing."""
    if not (is_kept(paths, state) and is_linked(state)):
        return False
    with contextlib.suppress(DeviceError), _kernel() as kernel:
        return _index(kernel, state.uri, state) is not None
    return False


def is_kept(paths: Paths, state: Attached) -> bool:
    """Tell whether the keeper lives."""
    return _keeper(paths, state.name) is not None


@contextlib.contextmanager
def _kernel() -> Iterator[KernelNbd]:
    from qdsmirror.tools import attach_netlink

    kernel = attach_netlink.KernelNbd()
    try:
        yield kernel
    finally:
        kernel.close()


def _index(kernel: KernelNbd, uri: str, state: Attached | None) -> int | None:
    """Give the number of the export's device if it is connected."""
    index = kernel.find(uri)
    if index is None and state is not None and state.via == VIA and state.node:
        recorded = int(Path(state.node).name.removeprefix("nbd"))
        index = recorded if kernel.is_of(recorded, uri) else None
    return index


def _disconnect(kernel: KernelNbd, state: Attached) -> None:
    # Looked for again: a keeper that was just starting may have made it only now.
    index = _index(kernel, state.uri, state)
    if index is None:
        return
    kernel.disconnect(index)
    if not wait(lambda: not kernel.is_connected(index), GONE_SECONDS):
        node = kernel.node(index)
        raise DeviceError(f"{state.name}: {node} is still open", hint=f"fuser {node}")


def _flush(name: str, node: str) -> None:
    """Write out what was written to a device; nobody else may have claimed it.

    :raises DeviceError: somebody has, or it fails.
    """
    try:
        descriptor = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        in_use = error.errno == errno.EBUSY
        raise DeviceError(
            f"{name}: {node} cannot be flushed: {error.strerror}",
            hint=f"fuser {node}" if in_use else f"qdsinfo {name}",
        ) from None


# -- the keeper ------------------------------------------------------------------------------------


def _pid_file(paths: Paths, name: str) -> Path:
    return paths.pid_file(f"{name}.keeper")


def _keeper(paths: Paths, name: str) -> int | None:
    return running_pid(_pid_file(paths, name))


def _start(paths: Paths, name: str, uri: str, dead_seconds: int, adopt: int | None) -> int:
    """Start a keeper in the background; give its device's number once that is ready."""
    # -P: nothing is imported from the directory that the caller happens to stand in.
    command = [sys.executable, "-P", "-m", KEEPER, *paths.arguments()]
    command += ["--dead-timeout", str(dead_seconds), name, uri]
    if adopt is not None:
        command += ["--adopt", str(adopt)]
    log = paths.log_file(f"{name}.keeper")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout as pipe:
        told = _report(pipe.fileno())
    if told is None:
        process.kill()
        process.wait()
        raise DeviceError(f"{name}: its keeper does not start", hint=f"look into {log}")
    if "error" in told:
        process.wait()
        raise ampbox.decode_error(str(told["error"]).encode())
    return int(told["index"])


def _report(pipe: int) -> dict[str, Any] | None:
    """Read the line in which a keeper says what it has; ``None`` if it does not."""
    deadline = time.monotonic() + KEEPER_SECONDS
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    data = b""
    while not data.endswith(b"\n") and len(data) < _REPORT_BYTES_MAX:
        if not poller.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            return None
        read = os.read(pipe, _REPORT_BYTES_MAX)
        if not read:
            return None
        data += read
    with contextlib.suppress(ProtocolError):
        return parse_object(data, "a keeper's report")
    return None


def _end_keeper(paths: Paths, name: str) -> None:
    """End the keeper; the device stays as it is.

    :raises QdsError: it does not end.
    """
    pid = _keeper(paths, name)
    if pid is None:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor and the lock together say that this is the process meant.
        if _keeper(paths, name) != pid:
            return
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended = select.poll()
        ended.register(process, select.POLLIN)
        if not ended.poll(1000 * GONE_SECONDS):
            raise QdsError(f"{name}: its keeper (pid {pid}) does not end", hint=f"kill -9 {pid}")
    finally:
        os.close(process)
