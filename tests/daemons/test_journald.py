"""Entries in the journal's own form, against a socket that stands for journald's."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.daemons import journald, logfields, logs
from qdsmirror.limits import LOG_ALIKE_LINES_MAX, LOG_ENTRY_BYTES_MAX


def parse(data: bytes) -> dict[str, str]:
    """Read an entry as journald does."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n", rest
            rest = rest[1:]
        found[name.decode()] = value.decode()
        data = rest
    return found


class JournalCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        self.path = str(self.root / "socket")
        self.journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.journal.close)
        self.journal.bind(self.path)
        self.journal.settimeout(120)
        self.patch(journald, "SOCKET", self.path)

    def receive(self) -> dict[str, str]:
        return parse(self.journal.recv(1 << 20))


class JournalTests(JournalCase):
    def setUp(self) -> None:
        super().setUp()
        self.writer = journald.JournalWriter("qdsrmd")
        self.addCleanup(self.writer.close)
        self.publisher = LogPublisher(logs.observer("rmd", self.writer))
        self.log = Logger("qdsmirror.groups.x", observer=self.publisher)

    def test_fields(self) -> None:
        self.log.error("{group} {unit}: lost from {gsn}", group="dsgrp007", unit="qds3", gsn=812)
        self.assertEqual(
            self.receive(),
            {
                "MESSAGE": "dsgrp007 qds3: lost from 812",
                "PRIORITY": "3",
                "SYSLOG_IDENTIFIER": "qdsrmd",
                "QDS_GROUP": "dsgrp007",
                "QDS_LDSU": "qds3",
                "QDS_SEQUENCE": "812",
                "QDS_MODULE": "qdsmirror.groups.x",
            },
        )

    def test_where_the_group_is(self) -> None:
        logfields.follow("dsgrp007", lambda: 9)
        self.addCleanup(logfields.forget, "dsgrp007")
        self.log.info("{group}: connected", group="dsgrp007")
        self.assertEqual(self.receive()["QDS_SEQUENCE"], "9")
        self.log.info("{names}: started", names="dsgrp007 dsgrp008")
        self.assertNotIn("QDS_GROUP", self.receive())
        self.log.info("{name}: {x}", name="dsgrp007.driver", x="\udcff")
        told = self.receive()
        self.assertEqual((told["QDS_GROUP"], told["QDS_SEQUENCE"]), ("dsgrp007", "9"))
        self.log.warn("{side}: handshake refused", side="dsgrp007 secondary")
        self.assertEqual(self.receive()["QDS_GROUP"], "dsgrp007")
        logfields.forget("dsgrp007")
        self.log.info("refused: group {group}", group=7)
        told = self.receive()
        self.assertEqual(told["QDS_GROUP"], "dsgrp007")
        self.assertNotIn("QDS_SEQUENCE", told)

    def test_priorities(self) -> None:
        for emit, priority in (
            (self.log.info, "6"), (self.log.warn, "4"), (self.log.error, "3"),
            (self.log.critical, "2"),
        ):  # fmt: skip
            emit("text")
            self.assertEqual(self.receive()["PRIORITY"], priority)

    def test_several_lines_are_one_entry(self) -> None:
        try:
            raise ZeroDivisionError("a=b")
        except ZeroDivisionError:
            self.log.failure("{group}: a bug", Failure(), group="dsgrp000")
        told = self.receive()
        self.assertTrue(told["MESSAGE"].startswith("dsgrp000: a bug\nTraceback"), told)
        self.assertTrue(told["MESSAGE"].endswith("ZeroDivisionError: a=b"), told)
        self.assertEqual(told["QDS_GROUP"], "dsgrp000")

    def test_no_field_is_made_by_what_is_logged(self) -> None:
        self.log.info("{text}", text="one\nPRIORITY=0\nQDS_GROUP=dsgrp001")
        told = self.receive()
        self.assertEqual(told["PRIORITY"], "6")
        self.assertNotIn("QDS_GROUP", told)

    def test_a_long_text_is_cut(self) -> None:
        self.log.info("{text}", text="x" * (1 << 20))
        self.assertEqual(len(self.receive()["MESSAGE"]), LOG_ENTRY_BYTES_MAX)

    def test_a_count_of_what_was_suppressed(self) -> None:
        for number in range(LOG_ALIKE_LINES_MAX + 7):
            self.log.warn("{group}: slow by {n} s", group="dsgrp000", n=number)
        (filtering,) = list(self.publisher._observers)
        filtering._observer.flush()
        for _ in range(LOG_ALIKE_LINES_MAX):
            self.assertNotIn("QDS_SUPPRESSED", self.receive())
        told = self.receive()
        self.assertEqual((told["QDS_SUPPRESSED"], told["QDS_GROUP"]), ("7", "dsgrp000"))
        self.assertEqual(told["PRIORITY"], "4")

    def test_entries_that_are_lost_are_counted(self) -> None:
        os.unlink(self.path)
        self.log.info("one")
        self.log.info("two")
        self.assertTrue(self.writer.finish(120))
        again = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(again.close)
        again.settimeout(120)
        again.bind(self.path)
        self.log.info("three")
        self.assertEqual(parse(again.recv(9999))["MESSAGE"], "three")
        told = parse(again.recv(9999))
        self.assertEqual(told["MESSAGE"], "2 entries of the log before this one were lost")
        self.assertEqual(told["SYSLOG_IDENTIFIER"], "qdsrmd")


class StreamTests(JournalCase):
    PROGRAM = (
        "import os, sys; from qdsmirror.daemons import journald, logs\n"
        "from twisted.logger import Logger\n"
        "journald.SOCKET = sys.argv[1]; found = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino + int(sys.argv[2])}'\n"
        "logs.begin('rmd'); Logger('qdsmirror').info('hello')\n"
    )

    def run_program(self, other: int) -> str:
        command = [sys.executable, "-c", self.PROGRAM, self.path, str(other)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        return done.stderr

    def test_a_stream_that_is_the_journals(self) -> None:
        self.assertEqual(self.run_program(0), "")
        told = self.receive()
        self.assertEqual((told["MESSAGE"], told["SYSLOG_IDENTIFIER"]), ("hello", "qdsrmd"))

    def test_one_that_is_not(self) -> None:
        """A service manager's environment, but standard error leads elsewhere."""
        self.assertIn("]: hello\n", self.run_program(1))
        self.journal.setblocking(False)
        self.assertRaises(BlockingIOError, self.journal.recv, 1)

    def test_no_descriptor(self) -> None:
        self.assertFalse(journald.is_journal(-1, {"JOURNAL_STREAM": "1:2"}))
