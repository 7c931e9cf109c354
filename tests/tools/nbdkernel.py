"""A kernel with an nbd driver, faked by the bytes of its messages, and what holds for a real one.

:class:`KernelContract` is run against the fake wherever the tests run, and against a real kernel
where there is one with the driver: in the guest of tests/integration/guest, or here as root::

    python -m unittest tests.tools.nbdkernel
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import struct
import sys
import tempfile
import threading
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from qdsmirror.errors import DeviceError
from qdsmirror.tools.attach_netlink import Export, KernelNbd

FAMILY_NUMBER = 0x1C
GROUP_NUMBER = 7
SIZE = 1 << 20
WAIT_SECONDS = 120.0
#: linux/nbd-netlink.h, written down a second time: what is sent is read by these.
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = 1, 2, 3, 4, 5
INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, TIMEOUT, SERVER_FLAGS = 1, 2, 3, 4, 5
SOCKETS, DEAD_CONN_TIMEOUT, DEVICE_LIST, BACKEND_IDENTIFIER = 7, 8, 9, 10
SOCK_ITEM, SOCK_FD = 1, 1
DEVICE_ITEM, DEVICE_INDEX, DEVICE_CONNECTED = 1, 1, 2


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split netlink attributes."""
    while data:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def attribute(kind: int, value: bytes) -> bytes:
    """Make a netlink attribute."""
    head = struct.pack("=HH", 4 + len(value), kind)
    return head + value + bytes(-len(value) % 4)


def message(command: int, body: bytes, sequence: int = 0) -> bytes:
    """Make a message of the family."""
    body = struct.pack("=BBH", command, 1, 0) + body
    return struct.pack("=IHHII", 16 + len(body), FAMILY_NUMBER, 0, sequence, 0) + body


def number(value: bytes) -> int:
    """Read an attribute that is a number, of whatever length."""
    return int.from_bytes(value, sys.byteorder)


@dataclass
class FakeDevice:
    """One nbd device.

    :ivar taken: connections that the driver has taken so far.
    """

    connection: socket.socket
    told: dict[int, bytes]
    dead: bool = False
    taken: int = 1
    threads: list[threading.Thread] = field(default_factory=list)


class FakeKernel:
    """nbd.c as qdsattach sees it.

    :param base: gets the directories ``sys`` and ``dev``.
    :ivar reconfigured: how often a new connection was offered.
    :ivar may_notice: while clear, the driver does not notice that connections end.
    """

    def __init__(self, base: Path) -> None:
        self.sys_block = base / "sys"
        self.dev = base / "dev"
        for directory in (self.sys_block, self.dev):
            directory.mkdir(exist_ok=True)
        self.devices: dict[int, FakeDevice] = {}
        self.reconfigured = 0
        self.may_notice = threading.Event()
        self.may_notice.set()
        self.refuses: int = 0
        self._listeners: list[socket.socket] = []
        self._changed = threading.Condition()

    def open(self) -> KernelNbd:
        """Give the fake as the product sees it."""
        return KernelNbd(lambda: FakeSocket(self), self._join, self.sys_block, self.dev)

    @contextmanager
    def open_closing(self) -> Iterator[KernelNbd]:
        """The same for a block."""
        yield self.open()

    def close(self) -> None:
        """End every device and thread."""
        self.may_notice.set()
        for index, device in self.devices.items():
            self._end(index)
            for thread in device.threads:
                thread.join(WAIT_SECONDS)
            device.connection.close()
        for listener in self._listeners:
            listener.close()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the driver does."""
        with self._changed:
            assert self._changed.wait_for(happened, WAIT_SECONDS)

    def _join(self, group: int) -> socket.socket:
        assert group == GROUP_NUMBER
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listeners.append(ours)
        return theirs

    # -- commands -----------------------------------------------------------------------------

    def handle(self, data: bytes) -> list[bytes]:
        """Answer a message; raises OSError where the kernel gives an error."""
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        assert (length, kind) == (len(data), FAMILY_NUMBER)
        command, version, _ = struct.unpack_from("=BBH", data, 16)
        assert version == 1
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        told = dict(attributes(data[20:]))
        with self._changed:
            try:
                return [message(c, b, sequence) for c, b in self._commands[command](self, told)]
            finally:
                self._changed.notify_all()

    def _connect(self, told: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._require(told, SIZE_BYTES, SOCKETS)
        index = next(i for i in range(16) if not self._directory(i).exists())
        device = FakeDevice(_passed(told), told)
        self.devices[index] = device
        directory = self._directory(index)
        (directory / "queue").mkdir(parents=True)
        (directory / "queue" / "io_timeout").write_text("30000\n")
        (directory / "size").write_text(f"{number(told[SIZE_BYTES]) // 512}\n")
        (directory / "backend").write_text(_text(told[BACKEND_IDENTIFIER]) + "\n")
        (directory / "pid").write_text(f"{os.getpid()}\n")
        (self.dev / f"nbd{index}").touch()
        self._receive(index, device)
        return iter([(CONNECT, attribute(INDEX, struct.pack("=I", index)))])

    def _reconfigure(self, told: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._require(told, INDEX)
        index = number(told[INDEX])
        device = self.devices.get(index)
        self.reconfigured += 1
        if device is None or not self._is_connected(index):
            raise OSError(errno.EINVAL, "not configured")
        if told.get(BACKEND_IDENTIFIER) != device.told[BACKEND_IDENTIFIER]:
            raise OSError(errno.EINVAL, "another backend")
        if device.dead:  # else it is not taken, and nothing is said
            device.connection.close()
            device.connection = _passed(told)
            device.dead = False
            device.taken += 1
            self._receive(index, device)
        return iter(())

    def _disconnect(self, told: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._require(told, INDEX)
        index = number(told[INDEX])
        if index not in self.devices and not self._directory(index).exists():
            raise OSError(errno.EINVAL, "no such device")
        self._end(index)
        return iter(())

    def _status(self, told: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
        items = b""
        for index in self.devices:
            item = attribute(DEVICE_INDEX, struct.pack("=I", index))
            item += attribute(DEVICE_CONNECTED, bytes([self._is_connected(index)]))
            items += attribute(DEVICE_ITEM, item)
        return iter([(STATUS, attribute(DEVICE_LIST, items))])

    _commands: Any = {
        CONNECT: _connect,
        RECONFIGURE: _reconfigure,
        DISCONNECT: _disconnect,
        STATUS: _status,
    }

    def _require(self, told: dict[int, bytes], *kinds: int) -> None:
        if any(kind not in told for kind in kinds):
            raise OSError(errno.EINVAL, "an attribute is missing")

    # -- devices --------------------------------------------------------------------------------

    def _directory(self, index: int) -> Path:
        return self.sys_block / f"nbd{index}"

    def _is_connected(self, index: int) -> bool:
        return (self._directory(index) / "pid").exists()

    def _end(self, index: int) -> None:
        (self._directory(index) / "pid").unlink(missing_ok=True)
        device = self.devices.get(index)
        if device is not None:
            with suppress(OSError):
                device.connection.shutdown(socket.SHUT_RDWR)

    def _receive(self, index: int, device: FakeDevice) -> None:
        """Notice the end of a connection, as the driver's receiver does."""
        connection = device.connection

        def work() -> None:
            poller = select.poll()
            poller.register(connection, select.POLLRDHUP)
            poller.poll()
            self.may_notice.wait(WAIT_SECONDS)
            with self._changed:
                device.dead = True
                if self._is_connected(index):
                    told = message(LINK_DEAD, attribute(INDEX, struct.pack("=I", index)))
                    for listener in self._listeners:
                        with suppress(OSError):
                            listener.send(told)
                self._changed.notify_all()

        thread = threading.Thread(target=work, daemon=True)
        device.threads.append(thread)
        thread.start()


class FakeSocket:
    """pyroute2's GenericNetlinkSocket, to a fake kernel."""

    prid = FAMILY_NUMBER
    mcast_groups = {"nbd_mc_group": GROUP_NUMBER}

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._class: Any = None

    def bind(self, family: str, message_class: Any) -> None:
        assert family == "nbd"
        self._class = message_class

    def nlm_request(self, sent: Any, msg_type: int, msg_flags: int) -> Iterator[Any]:
        sent["header"]["type"] = msg_type
        sent["header"]["flags"] = msg_flags
        sent.encode()
        try:
            answers = self._kernel.handle(bytes(sent.data))
        except OSError as error:
            raise NetlinkError(error.errno or 0, error.strerror) from None
        for answer in answers:
            decoded = self._class(answer)
            decoded.decode()
            yield decoded

    def close(self) -> None:
        pass


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()


def _passed(told: dict[int, bytes]) -> socket.socket:
    ((kind, item),) = attributes(told[SOCKETS])
    ((kind_of_value, value),) = attributes(item)
    assert (kind, kind_of_value) == (SOCK_ITEM, SOCK_FD)
    return socket.socket(fileno=os.dup(number(value)))


def answer_zeroes(connection: socket.socket) -> None:
    """Serve NBD's transmission phase until the client ends it: every byte is zero."""
    with connection, suppress(OSError):
        while head := connection.recv(28, socket.MSG_WAITALL):
            _, _, command, cookie, _, length = struct.unpack(">IHHQQI", head)
            if command == 2:
                return
            if command == 1:
                connection.recv(length, socket.MSG_WAITALL)
            reply = struct.pack(">IIQ", 0x67446698, 0, cookie)
            connection.sendall(reply + bytes(length if command == 0 else 0))


class KernelContract:
    """What :class:`KernelNbd` promises, over the fake and over the real thing."""

    kernel: KernelNbd

    def export(self) -> Export:
        # HAS_FLAGS, SEND_FLUSH
        return Export(f"nbd+unix:///{self._testMethodName}?socket=/x", SIZE, 5, 512)  # type: ignore[attr-defined]

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """Give a connection for the driver, and its server's end."""
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=answer_zeroes, args=(theirs.dup(),), daemon=True)
        thread.start()
        self.addCleanup(thread.join, WAIT_SECONDS)  # type: ignore[attr-defined]
        self.addCleanup(theirs.close)  # type: ignore[attr-defined]
        self.addCleanup(hang_up, theirs)  # type: ignore[attr-defined]
        self.addCleanup(ours.close)  # type: ignore[attr-defined]
        return ours, theirs

    def connected(self) -> tuple[int, socket.socket]:
        """Make a device; give its number and its server's end."""
        ours, theirs = self.connection()
        index = self.kernel.connect(ours, self.export(), 60)
        self.addCleanup(self.gone, index)  # type: ignore[attr-defined]
        return index, theirs

    def gone(self, index: int) -> None:
        if self.kernel.is_connected(index):
            self.kernel.disconnect(index)

    def told(self, events: Any, seconds: float = WAIT_SECONDS) -> set[int] | None:
        poller = select.poll()
        poller.register(events, select.POLLIN)
        return events.ended() if poller.poll(1000 * seconds) else set()  # type: ignore[no-any-return]

    def test_connect_and_disconnect(self: Any) -> None:
        index, _ = self.connected()
        uri = self.export().uri
        self.assertTrue(self.kernel.status()[index])
        self.assertTrue(self.kernel.is_connected(index))
        self.assertTrue(self.kernel.is_ready(index, SIZE))
        self.assertFalse(self.kernel.is_ready(index, SIZE + 512))
        self.assertEqual(self.kernel.find(uri), index)
        self.assertTrue(self.kernel.is_of(index, uri))
        self.assertFalse(self.kernel.is_of(index, uri + "x"))
        self.kernel.disconnect(index)
        self.assertFalse(self.kernel.status()[index])
        self.assertFalse(self.kernel.is_connected(index))
        self.assertIsNone(self.kernel.find(uri))
        self.assertFalse(self.kernel.is_of(index, uri))

    def test_requests_are_resent_soon(self: Any) -> None:
        index, _ = self.connected()
        self.kernel.resend_soon(index)
        path = self.kernel._sys_block / f"nbd{index}" / "queue" / "io_timeout"
        self.assertEqual(path.read_text().strip(), "5000")

    def test_the_end_of_a_connection_is_told(self: Any) -> None:
        events = self.kernel.watch()
        self.addCleanup(events.close)
        index, server = self.connected()
        self.assertEqual(events.ended(), set())
        hang_up(server)
        self.assertEqual(self.told(events), {index})
        self.assertTrue(self.kernel.is_connected(index))

    def test_a_new_connection_is_taken_when_the_old_one_is_dead(self: Any) -> None:
        events = self.kernel.watch()
        self.addCleanup(events.close)
        index, server = self.connected()
        for _ in range(2):
            hang_up(server)
            self.assertEqual(self.told(events), {index})
            ours, server = self.connection()
            self.kernel.reconfigure(index, ours, self.export().uri, 60)
            ours.close()
        self.assertTrue(self.kernel.status()[index])
        # That this one's end is told shows that it was taken.
        hang_up(server)
        self.assertEqual(self.told(events), {index})

    def test_a_new_connection_is_not_taken_beside_a_living_one(self: Any) -> None:
        events = self.kernel.watch()
        self.addCleanup(events.close)
        index, server = self.connected()
        ours, other = self.connection()
        self.kernel.reconfigure(index, ours, self.export().uri, 60)
        ours.close()
        # The driver did not keep it: its other end sees that nobody has it any more.
        poller = select.poll()
        poller.register(other, select.POLLRDHUP)
        self.assertTrue(poller.poll(1000 * WAIT_SECONDS))
        self.assertEqual(events.ended(), set())
        hang_up(server)
        self.assertEqual(self.told(events), {index})

    def test_refusals(self: Any) -> None:
        index, server = self.connected()
        ours, _ = self.connection()
        with self.assertRaises(DeviceError) as caught:
            self.kernel.reconfigure(index, ours, "nbd+unix:///another?socket=/x", 60)
        self.assertIn(f"nbd{index}: no new connection: ", str(caught.exception))
        self.kernel.disconnect(index)
        with self.assertRaises(DeviceError):
            self.kernel.reconfigure(index, ours, self.export().uri, 60)
        with self.assertRaises(DeviceError):
            self.kernel.disconnect(9999)


def hang_up(server: socket.socket) -> None:
    """End a connection from the server's side."""
    with suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


class RealKernelTests(KernelContract, unittest.TestCase):
    """The kernel that runs here."""

    def setUp(self) -> None:
        if os.geteuid() != 0:
            raise unittest.SkipTest("needs root")
        try:
            self.kernel = KernelNbd()
        except DeviceError:
            raise unittest.SkipTest("this kernel's nbd driver is not loaded") from None
        self.addCleanup(self.kernel.close)


class FakeKernelTests(KernelContract, unittest.TestCase):
    """The fake."""

    def setUp(self) -> None:
        base = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
        self.addCleanup(shutil.rmtree, base)
        self.fake = FakeKernel(base)
        self.addCleanup(self.fake.close)
        self.kernel = self.fake.open()
        known = Path.is_block_device
        self.addCleanup(setattr, Path, "is_block_device", known)
        Path.is_block_device = Path.exists  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    unittest.main()
