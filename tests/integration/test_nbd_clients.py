"""Real NBD clients against the server, with an export in memory."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Generator
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.core.nbd_requests import Budget
from qdsmirror.net.nbd import listen_nbd
from tests.nbd_memory import ListeningSocket, MemoryExport

reactor: Any = _reactor
Steps = Generator[Deferred[Any], Any, None]

SIZE = 16 << 20
SYSTEM_PYTHON = "/usr/bin/python3"

SHELL = r"""
import nbd

def refused(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errno
    raise AssertionError("not refused")

h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(URI)
assert h.get_structured_replies_negotiated()
assert h.can_multi_conn() and h.can_df() and h.can_fua() and h.can_zero() and h.can_trim()
assert not h.can_cache() and not h.can_fast_zero()
h.pwrite(b"a" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b"a" * 4096
chunks = []
data = h.pread_structured(
    8192, 4096, lambda data, offset, kind, error: chunks.append(kind), nbd.CMD_FLAG_DF
)
assert data == bytes(4096) + b"a" * 4096 and chunks == [nbd.READ_DATA], chunks
found = []
h.block_status(16384, 0, lambda name, offset, entries, error: found.extend(entries))
assert found == [8192, 3, 4096, 0, 4096, 3], found
found.clear()
h.block_status(
    16384, 0, lambda name, offset, entries, error: found.extend(entries), nbd.CMD_FLAG_REQ_ONE
)
assert found == [8192, 3], found
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 8192) == bytes(4096)
h.trim(4096, 0)
h.flush()
h.set_strict_mode(0)
size = h.get_size()
assert refused(h.pwrite, b"a" * 1024, size - 512) == "ENOSPC"
assert refused(h.pread, 1024, size - 512) == "EINVAL"
assert refused(h.pread, 512, 1) == "EINVAL"
assert refused(h.pread, 512, (1 << 64) - 512) in ("EINVAL", "EOVERFLOW")
assert refused(h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO) == "EINVAL"
assert refused(h.cache, 4096, 0) == "EINVAL"
assert h.pread(512, 0) == bytes(512)
# Many at once, more than are taken at a time.
buffers = [nbd.Buffer.from_bytearray(bytearray([n % 256]) * 512) for n in range(300)]
cookies = [h.aio_pwrite(b, n * 512) for n, b in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
assert h.pread(300 * 512, 0) == b"".join(bytes([n % 256]) * 512 for n in range(300))
h.shutdown()

h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(URI)
assert not h.get_structured_replies_negotiated() and not h.can_df()
assert h.pread(512, 512) == b"\1" * 512
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(URI)
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ["qds0", "qds1"], names
h.set_export_name("nothing")
assert refused(h.opt_go) == "ENOENT"
h.set_export_name("qds1")
h.opt_go()
assert h.get_size() == 1 << 20
h.shutdown()
print("done")
"""


class ClientTests(TestCase):
    """Each client does what it is made for, and the bytes are right."""

    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        self.export = MemoryExport(size=SIZE, minimum_block=512)
        exports = {"qds0": self.export, "qds1": MemoryExport("qds1")}
        self.budget = Budget()
        self.listening = ListeningSocket(self)
        self.server = listen_nbd(reactor, self.listening.fileno(), exports, self.budget)
        self.uri = self.listening.uri()
        self.addCleanup(self.end)

    @inlineCallbacks
    def end(self) -> Steps:
        yield self.server.stopListening()
        yield self.server.disconnect_all()
        self.assertEqual(self.budget.free_bytes, self.budget.limit_bytes)

    def path(self, name: str) -> str:
        return os.path.join(self.listening.directory, name)

    def sample(self, name: str = "sample") -> bytes:
        """Make a file of SIZE bytes with holes in it."""
        source = random.Random(7)
        data = bytearray(SIZE)
        for _ in range(40):
            length = source.randrange(512, 200000)
            start = source.randrange(0, SIZE - length)
            data[start : start + length] = source.randbytes(length)
        with open(self.path(name), "wb") as file:
            file.write(data)
        return bytes(data)

    @inlineCallbacks
    def run_client(self, *argv: str, code: int = 0) -> Generator[Deferred[Any], Any, str]:
        program = shutil.which(argv[0])
        if program is None:
            raise SkipTest(f"{argv[0]} is not installed")
        out, err, status = yield getProcessOutputAndValue(
            program, argv[1:], os.environ, self.listening.directory
        )
        self.assertEqual(status, code, (argv, out, err))
        return out.decode()

    @inlineCallbacks
    def test_nbdinfo(self) -> Steps:
        out = yield self.run_client("nbdinfo", "--json", self.uri)
        info = json.loads(out)
        (export,) = info["exports"]
        self.assertEqual(info["protocol"], "newstyle-fixed")
        self.assertTrue(info["structured"])
        self.assertEqual(export["export-size"], SIZE)
        self.assertEqual(export["contexts"], ["base:allocation"])
        self.assertEqual(export["block_size_minimum"], 512)
        self.assertEqual(export["block_size_maximum"], 32 << 20)
        self.assertTrue(export["can_multi_conn"] and export["can_fua"] and export["can_zero"])
        out = yield self.run_client("nbdinfo", "--list", "--json", self.listening.uri(""))
        names = [export["export-name"] for export in json.loads(out)["exports"]]
        self.assertEqual(names, ["qds0", "qds1"])
        out = yield self.run_client("nbdinfo", "--map", "--totals", self.uri)
        self.assertIn("hole,zero", out)

    @inlineCallbacks
    def test_nbdcopy_both_ways(self) -> Steps:
        data = self.sample()
        yield self.run_client("nbdcopy", "--flush", self.path("sample"), self.uri)
        self.assertEqual(self.export.data, data)
        self.assertGreaterEqual(self.export.flushes, 1)
        yield self.run_client("nbdcopy", "--connections=4", self.uri, self.path("back"))
        with open(self.path("back"), "rb") as file:
            self.assertEqual(file.read(), data)

    @inlineCallbacks
    def test_qemu_img(self) -> Steps:
        data = self.sample()
        out = yield self.run_client("qemu-img", "info", "--output=json", self.uri)
        self.assertEqual(json.loads(out)["virtual-size"], SIZE)
        yield self.run_client(
            "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", self.path("sample"), self.uri
        )
        self.assertEqual(self.export.data, data)
        compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw", self.path("sample"), self.uri)
        yield self.run_client(*compare)
        self.export.data[12345] ^= 1
        self.export.written.add(12345 // 4096)
        yield self.run_client(*compare, code=1)
        out = yield self.run_client("qemu-img", "map", "-f", "raw", "--output=json", self.uri)
        self.assertTrue(any(extent["zero"] for extent in json.loads(out)))
        yield self.run_client(
            *("qemu-img", "bench", "-w", "-f", "raw", "-c", "500", "-d", "32", "-s", "4k", self.uri)
        )

    @inlineCallbacks
    def test_qemu_io(self) -> Steps:
        commands = [
            "write -P 17 0 64k",
            "write -f -P 34 64k 4k",
            "write -z 4k 8k",
            "write -z -u 16k 4k",
            "discard 1M 1M",
            "aio_write -P 51 2M 4M",
            "aio_flush",
            "read -P 17 0 4k",
            "read -P 0 4k 8k",
            "read -P 17 20k 44k",
            "read -P 34 64k 4k",
            "read -P 51 2M 4M",
            "flush",
        ]
        argv = [part for command in commands for part in ("-c", command)]
        out = yield self.run_client("qemu-io", "-f", "raw", *argv, self.uri)
        self.assertNotIn("failed", out)
        self.assertEqual(self.export.data[: 4 << 10], b"\x11" * 4096)
        self.assertEqual(self.export.data[2 << 20 : 6 << 20], b"\x33" * (4 << 20))

    @inlineCallbacks
    def test_fio_verifies(self) -> Steps:
        out = yield self.run_client(
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={self.uri}",
            "--rw=randwrite",
            "--bssplit=4k/60:16k/30:512k/10",
            "--numjobs=4",
            f"--size={SIZE // 4}",
            f"--offset_increment={SIZE // 4}",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--minimal",
        )
        self.assertIn("verify", out)

    @inlineCallbacks
    def test_libnbd(self) -> Steps:
        if not os.path.exists(SYSTEM_PYTHON):
            raise SkipTest(f"{SYSTEM_PYTHON} is not installed")
        _, _, status = yield getProcessOutputAndValue(SYSTEM_PYTHON, ["-c", "import nbd"])
        if status:
            raise SkipTest("python3-libnbd is not installed")
        script = SHELL.replace("URI", repr(self.uri))
        out = yield self.run_client(SYSTEM_PYTHON, "-c", script)
        self.assertEqual(out, "done\n")
