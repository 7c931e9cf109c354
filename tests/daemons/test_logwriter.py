"""A log that takes nothing holds nobody up, and what is lost is told."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.daemons.logwriter import LogWriter


class LogWriterTests(SynchronousTestCase):
    def pipe(self, limit: int = 4096) -> LogWriter:
        self.end, write = os.pipe()
        self.addCleanup(os.close, self.end)
        self.addCleanup(os.close, write)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        self.capacity = fcntl.fcntl(write, fcntl.F_GETPIPE_SZ)
        return LogWriter(write, limit)

    def read(self, enough: bytes) -> str:
        """Read until this has come."""
        data = b""
        while enough not in data:
            ready, _, _ = select.select((self.end,), (), (), 120)
            self.assertTrue(ready, data[-200:])
            data += os.read(self.end, 1 << 16)
        return data.decode()

    def test_lines_in_order(self) -> None:
        writer = self.pipe()
        for number in range(20):
            writer.write(f"line {number}\n")
        self.assertTrue(writer.finish(120))
        self.assertEqual(self.read(b"19\n").splitlines(), [f"line {n}" for n in range(20)])

    def test_a_pipe_that_nobody_reads(self) -> None:
        writer = self.pipe()
        os.write(writer._descriptor, b"f" * self.capacity)
        line = "x" * 99 + "\n"
        for _ in range(1000):
            writer.write(line)
        self.assertFalse(writer.finish(0.01))
        self.assertEqual(writer.dropped, 1000 - 4096 // len(line))
        text = self.read(b"were lost)\n")
        self.assertIn("(960 lines of the log before this one were lost)", text)
        text += "".join(f"{one}\n" for one in self.read_rest(writer))
        self.assertEqual(text.count(line), 40)
        self.assertEqual(writer.dropped, 0)

    def read_rest(self, writer: LogWriter) -> list[str]:
        writer.write("end\n")
        return self.read(b"end\n").splitlines()[:-1]

    def test_a_descriptor_that_refuses(self) -> None:
        read, write = os.pipe()
        os.close(read)
        self.addCleanup(os.close, write)
        writer = LogWriter(write)
        writer.write("lost\n")
        self.assertTrue(writer.finish(120))
        self.assertEqual(writer.dropped, 1)

    def test_a_descriptor_that_does_not_block(self) -> None:
        writer = self.pipe(1 << 20)
        os.set_blocking(writer._descriptor, False)
        for number in range(3000):
            writer.write(f"{number}\n")
        self.assertEqual(self.read(b"2999\n").splitlines(), [str(n) for n in range(3000)])

    def test_a_surrogate_is_written_somehow(self) -> None:
        writer = self.pipe()
        writer.write("\udcff\n")
        self.assertEqual(self.read(b"\n"), "\\udcff\n")

    def test_the_last_lines_come_before_the_end(self) -> None:
        program = (
            "from qdsmirror.daemons import logs; from twisted.logger import Logger\n"
            # The writing thread gets its turn only where the main one waits.
            "import sys; sys.setswitchinterval(100)\n"
            "logs.begin('rmd'); [Logger('qdsmirror').info('line{n}', n=n) for n in range(50)]"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=240
        )
        self.assertEqual(len(done.stderr.splitlines()), 50)
        self.assertTrue(done.stderr.endswith("line49\n"))

    def test_after_a_fork(self) -> None:
        writer = self.pipe()
        writer.write("parent\n")
        self.assertTrue(writer.finish(120))
        child = os.fork()
        if not child:
            writer.write("child\n")
            os._exit(0 if writer.finish(120) else 1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.read(b"child\n"), "parent\nchild\n")
