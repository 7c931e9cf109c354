"""The kernel's NBD driver: its generic netlink family (linux/nbd-netlink.h), its sysfs, its nodes.

A device is made of a connection that has been negotiated already.  When that ends, requests wait
for the dead-connection timeout, and go on as soon as a new connection has been handed over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from qdsmirror.errors import DeviceError

FAMILY = "nbd"
GROUP = "nbd_mc_group"
_VERSION = 1
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = range(1, 6)

#: What was sent over a connection that has ended is sent again when it is this old.  The driver's
#: own timeout is off: it would end the connection of a device driver that only is slow.
RESEND_SECONDS = 5
_SECTOR_BYTES = 512
_EVENT_BYTES_MAX = 64 * 1024
# Not in the socket module: linux/netlink.h.
_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_NETLINK_GENERIC = 16
#: Numbers below it are netlink's own messages.
_NLMSG_MIN_TYPE = 0x10


class NbdMessage(genlmsg):  # type: ignore[misc]
    """A message of the family ``nbd``; the order gives the attributes' numbers."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        """``NBD_SOCK_ITEM``, any number of them."""

        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            """One socket."""

            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]
        """``NBD_DEVICE_ITEM``, any number of them."""

        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            """One device."""

            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


@dataclass(frozen=True)
class Export:
    """What the kernel is told of an export.

    :ivar uri: also the device's backend identifier, by which it is found again.
    :ivar size: bytes.
    :ivar flags: the transmission flags that the server gave.
    :ivar block_bytes: the device's logical block.
    """

    uri: str
    size: int
    flags: int
    block_bytes: int


class LinkEvents:
    """The family's messages about ended connections, from now on."""

    def __init__(self, source: socket.socket) -> None:
        source.setblocking(False)
        self._source = source

    def fileno(self) -> int:
        """Give what can be polled for reading."""
        return self._source.fileno()

    def ended(self) -> set[int] | None:
        """Read what has come: the devices' numbers; ``None`` when some of it was lost."""
        found: set[int] = set()
        while True:
            try:
                data = self._source.recv(_EVENT_BYTES_MAX)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return None
            if int.from_bytes(data[4:6], sys.byteorder) < _NLMSG_MIN_TYPE:
                continue
            message = NbdMessage(data)
            message.decode()
            index = message.get_attr("NBD_ATTR_INDEX")
            if message["cmd"] == LINK_DEAD and index is not None:
                found.add(index)

    def close(self) -> None:
        """End listening."""
        self._source.close()


class KernelNbd:
    """The NBD driver of the running kernel.

    :param make_socket: makes the generic netlink socket.
    :param make_events: makes a socket that gets the messages of a multicast group, by its number.
    :param sys_block: where the kernel shows block devices.
    :param dev: where their nodes are.
    :raises DeviceError: this kernel has no such driver, or does not show it to this process.
    """

    def __init__(
        self,
        make_socket: Callable[[], Any] = GenericNetlinkSocket,
        make_events: Callable[[int], socket.socket] | None = None,
        sys_block: Path = Path("/sys/block"),
        dev: Path = Path("/dev"),
    ) -> None:
        self._make_events = make_events or _join
        self._sys_block = sys_block
        self._dev = dev
        self._socket = make_socket()
        try:
            self._socket.bind(FAMILY, NbdMessage)
        except (NetlinkError, OSError) as error:
            self._socket.close()
            code = error.code if isinstance(error, NetlinkError) else error.errno
            raise DeviceError(
                f"the kernel's nbd driver does not answer: {os.strerror(code or 0)}",
                hint="modprobe nbd",
            ) from None

    def close(self) -> None:
        """Close the netlink socket; devices stay."""
        self._socket.close()

    # -- requests ---------------------------------------------------------------------------------

    def connect(self, connection: socket.socket, export: Export, dead_seconds: int) -> int:
        """Make a device of a negotiated connection; give its number.

        :param dead_seconds: how long its requests wait for a new connection.
        :raises DeviceError: the kernel refuses.
        """
        answers = self._ask(
            CONNECT,
            f"{export.uri}: no device",
            ["NBD_ATTR_SIZE_BYTES", export.size],
            ["NBD_ATTR_BLOCK_SIZE_BYTES", export.block_bytes],
            ["NBD_ATTR_TIMEOUT", 0],
            ["NBD_ATTR_SERVER_FLAGS", export.flags],
            ["NBD_ATTR_DEAD_CONN_TIMEOUT", dead_seconds],
            ["NBD_ATTR_BACKEND_IDENTIFIER", export.uri],
            _sockets(connection),
        )
        index = next((i for a in answers if (i := a.get_attr("NBD_ATTR_INDEX")) is not None), None)
        if index is None:
            raise DeviceError(f"{export.uri}: the kernel does not say which device it made")
        return int(index)

    def reconfigure(
        self, index: int, connection: socket.socket, uri: str, dead_seconds: int
    ) -> None:
        """Hand over a new connection; the kernel takes it if the one it has is dead.

        :raises DeviceError: the kernel refuses.
        """
        self._ask(
            RECONFIGURE,
            f"nbd{index}: no new connection",
            ["NBD_ATTR_INDEX", index],
            ["NBD_ATTR_DEAD_CONN_TIMEOUT", dead_seconds],
            ["NBD_ATTR_BACKEND_IDENTIFIER", uri],
            _sockets(connection),
        )

    def disconnect(self, index: int) -> None:
        """End a device; what it still has to do fails.

        :raises DeviceError: the kernel refuses.
        """
        self._ask(DISCONNECT, f"nbd{index}: not disconnected", ["NBD_ATTR_INDEX", index])

    def status(self) -> dict[int, bool]:
        """Give every device of the driver, and whether it is connected."""
        found: dict[int, bool] = {}
        for answer in self._ask(STATUS, "nbd: no status"):
            for name, item in (answer.get_attr("NBD_ATTR_DEVICE_LIST") or {}).get("attrs", ()):
                if name == "NBD_DEVICE_ITEM":
                    index = item.get_attr("NBD_DEVICE_INDEX")
                    found[index] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
        return found

    def watch(self) -> LinkEvents:
        """Listen for connections that end."""
        return LinkEvents(self._make_events(self._socket.mcast_groups[GROUP]))

    def _ask(self, command: int, what: str, *attributes: list[Any]) -> list[Any]:
        # With an answer of its own a command is not acknowledged as well: one message ends it.
        answered = command in (CONNECT, STATUS)
        message = NbdMessage()
        message["cmd"] = command
        message["version"] = _VERSION
        message["attrs"] = list(attributes)
        flags = NLM_F_REQUEST if answered else NLM_F_REQUEST | NLM_F_ACK
        try:
            return list(self._socket.nlm_request(message, self._socket.prid, msg_flags=flags))
        except NetlinkError as error:
            raise _refused(what, error) from None

    # -- what the kernel shows --------------------------------------------------------------------

    def node(self, index: int) -> Path:
        """Give the path of a device's node."""
        return self._dev / f"nbd{index}"

    def is_connected(self, index: int) -> bool:
        """Tell whether a device has a configuration: its connection may be dead all the same."""
        return (self._sys_block / f"nbd{index}" / "pid").exists()

    def is_ready(self, index: int, size: int) -> bool:
        """Tell whether a device has its size (bytes) and its node."""
        told = _read(self._sys_block / f"nbd{index}" / "size")
        return told == str(size // _SECTOR_BYTES) and self.node(index).is_block_device()

    def is_of(self, index: int, uri: str) -> bool:
        """Tell whether a connected device is of this export.

        A kernel before 5.14 does not know that; what is connected is believed to be then.
        """
        if not self.is_connected(index):
            return False
        identifier = _read(self._sys_block / f"nbd{index}" / "backend")
        return identifier is None or identifier == uri

    def find(self, uri: str) -> int | None:
        """Give the connected device of an export, where the kernel knows that."""
        for path in sorted(self._sys_block.glob("nbd*/backend")):
            number = path.parent.name.removeprefix("nbd")
            if number.isdecimal() and _read(path) == uri and self.is_connected(int(number)):
                return int(number)
        return None

    def is_under_way(self, index: int) -> bool:
        """Tell whether the driver has requests that were sent and are not answered."""
        counts = _read(self._sys_block / f"nbd{index}" / "inflight") or ""
        return any(count != "0" for count in counts.split())

    def resend_soon(self, index: int) -> None:
        """Let requests of an ended connection be sent again after :data:`RESEND_SECONDS`."""
        path = self._sys_block / f"nbd{index}" / "queue" / "io_timeout"
        # Without it (before Linux 5.0) that takes the kernel's 30 seconds.
        with contextlib.suppress(OSError):
            path.write_text(str(1000 * RESEND_SECONDS))


def driver_is_there() -> bool:
    """Tell whether the kernel's NBD driver can be used; its module is loaded if there is one."""
    if _answers():
        return True
    if shutil.which("modprobe") is None:
        return False
    subprocess.run(["modprobe", "-q", "nbd"], capture_output=True, stdin=subprocess.DEVNULL)
    return _answers()


def _answers() -> bool:
    try:
        KernelNbd().close()
    except DeviceError:
        return False
    return True


def _join(group: int) -> socket.socket:
    # pyroute2's own sockets read only while a request of theirs is under way.
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
    made.bind((0, 0))
    made.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return made


def _sockets(connection: socket.socket) -> list[Any]:
    item = ["NBD_SOCK_ITEM", {"attrs": [["NBD_SOCK_FD", connection.fileno()]]}]
    return ["NBD_ATTR_SOCKETS", {"attrs": [item]}]


def _refused(what: str, error: NetlinkError) -> DeviceError:
    reasons = {
        errno.EPERM: ("the kernel permits it to root only", "run as root, outside of a container"),
        errno.EBUSY: ("the device is in use by something else", "lsblk"),
        errno.ENOMEM: ("the kernel has no memory for it", "free"),
    }
    known, hint = reasons.get(error.code, ("", "see what the kernel says: dmesg"))
    said = os.strerror(error.code)
    return DeviceError(f"{what}: {known or 'the kernel refuses'} ({said})", hint=hint)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().rstrip("\n")
    except OSError:
        return None
