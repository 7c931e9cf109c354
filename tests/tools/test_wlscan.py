"""qdswlscan: what it finds in fresh, filled, torn and damaged logs, and what it changes."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core import frames
from qdsmirror.core.failures import Dead, Failed, Untrusted
from qdsmirror.core.frames import REFRESH, Entry
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.storage.bitmap import empty_bitmap
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.tools import wlinit
from qdsmirror.tools.wlscan import main
from tests.storage.logworld import append
from tests.tools.offline import DATA, LOG, Site, entry, json_error


class ScanTestCase(TestCase):
    def setUp(self) -> None:
        self.site = Site(self, self.host)
        self.site.initialise()

    host = "alpha"

    def scan(self, *argv: str, code: int = 0) -> dict[str, Any]:
        """Scan with --json; give the group."""
        got, output, errors = self.site.run(main, "--json", *argv)
        self.assertEqual((got, errors), (code, ""), output)
        told = json.loads(output)
        self.assertEqual(told["schema"], 1)
        self.assertEqual([group["group"] for group in told["groups"]], ["dsgrp000"])
        group = told["groups"][0]
        assert isinstance(group, dict)
        return group

    def unchanged(self, *argv: str, code: int = 0) -> dict[str, Any]:
        before = self.site.content()
        group = self.scan(*argv, code=code)
        after = self.site.content()
        for name, content in before.items():
            self.assertTrue(after[name] == content, f"{name} was written")
        return group

    def filled(self, durable: int = 0) -> dict[str, list[int]]:
        """Fill the writelogs; give the offsets of the frames in each.

        GSN 1-2 and 4 are of qds0, 3 and 5 of qds1; the frame of GSN 4 overwrites a part of 1.
        """
        maker = self.site.maker("log0")
        first = [maker.make(0, [entry(0, 1, 1024), entry(4096, 2)])]
        second = [maker.make(1, [entry(512, 3)])]
        first.append(maker.make(0, [entry(512, 4)], durable=durable))
        second.append(maker.make(1, [entry(8192, 5)], durable=durable))
        return {
            "log0": self.site.append("log0", first),
            "log1": self.site.append("log1", second),
        }

    def damage(self, name: str, offset: int) -> None:
        """Change a byte of a record's payload."""
        self.site.put(name, offset + 300, b"\xee")


class PrimaryTests(ScanTestCase):
    def test_fresh(self) -> None:
        group = self.unchanged()
        self.assertEqual((group["role"], group["refused"]), ("primary", ""))
        self.assertEqual(group["generation"], self.site.superblock("log0").generation.hex())
        self.assertEqual([log["name"] for log in group["logs"]], ["qds0", "qds1"])
        for index, log in enumerate(group["logs"]):
            self.assertEqual(log["device"], str(self.site.device(f"log{index}")))
            self.assertEqual((log["tail"], log["applied"], log["head"]), (0, 0, 0))
            self.assertEqual((log["frames_to_replay"], log["entries_to_replay"]), (0, 0))

    def test_check_changes_nothing(self) -> None:
        self.filled()
        for _ in range(2):
            group = self.unchanged("--check")
            self.assertFalse(group["replayed"])
            self.assertEqual(group["voids"], [])
            found = [(log["frames_to_replay"], log["entries_to_replay"]) for log in group["logs"]]
            self.assertEqual(found, [(2, 3), (2, 2)])
            for log in group["logs"]:
                self.assertEqual(log["applied"], 0)
                self.assertGreater(log["head"], 0)

    def test_replays(self) -> None:
        self.filled()
        logs = {name: self.site.content()[name] for name in ("log0", "log1")}
        self.assertTrue(self.scan()["replayed"])
        after = self.site.content()
        data = after["data0"]
        self.assertEqual(data[:1024], b"\1" * 512 + b"\4" * 512)
        self.assertEqual(data[4096:4608], b"\2" * 512)
        self.assertEqual(after["data1"][512:1024], b"\3" * 512)
        self.assertEqual(after["data1"][8192:8704], b"\5" * 512)
        # Only the driver moves the logs on; the mirror is the other host's.
        self.assertEqual({name: after[name] for name in logs}, logs)
        self.assertFalse(any(after["mirror0"]) or any(after["mirror1"]))
        self.assertTrue(self.scan()["replayed"])
        self.assertEqual(self.site.content(), after)

    def test_a_refresh_is_not_written_back(self) -> None:
        maker = self.site.maker("log0")
        read = [Entry(0, 512, REFRESH, b"\7" * 512), Entry(512, 512, frames.REFRESH_ZEROES, None)]
        self.site.append("log0", [maker.make(0, read)])
        self.site.put("data0", 0, b"\10" * 1024)
        self.scan()
        self.assertEqual(self.site.content()["data0"][:1024], b"\10" * 1024)

    def test_text(self) -> None:
        self.filled()
        code, output, errors = self.site.run(main, "--check")
        self.assertEqual((code, errors), (0, ""))
        lines = output.splitlines()
        self.assertIn("dsgrp000 (primary), generation ", lines[0])
        self.assertIn(f"qds0: {self.site.device('log0')}: tail 0, applied 0, head ", lines[1])
        self.assertIn("2 frames with 3 entries to replay", lines[1])
        self.assertEqual(len(lines), 3)
        code, output, _ = self.site.run(main)
        self.assertEqual(code, 0)
        self.assertIn("replayed onto the data devices", output)

    def test_torn_tail(self) -> None:
        self.damage("log1", self.filled()["log1"][1])
        group = self.unchanged("--check")
        self.assertEqual(group["refused"], "")
        self.assertEqual(group["logs"][1]["frames_to_replay"], 1)
        self.assertIn("checksum", group["logs"][1]["stopped"])
        self.scan()
        after = self.site.content()
        self.assertEqual(after["data1"][512:1024], b"\3" * 512)
        self.assertFalse(any(after["data1"][8192:]), "the torn frame was replayed")

    def test_void_range(self) -> None:
        self.damage("log1", self.filled()["log1"][0])
        group = self.unchanged("--check")
        # GSN 3 is lost, and qds1's later frame does not continue its chain; 4 is in qds0's log.
        self.assertEqual(group["voids"], [[3, 1]])
        self.assertIn("void range: GSN 3 to 3", self.site.run(main, "--check")[1])

    def test_damaged_durable_frame(self) -> None:
        # Later frames say that GSN 3 was durable.
        self.damage("log1", self.filled(durable=3)["log1"][0])
        for argv in (["--check"], []):
            group = self.unchanged(*argv, code=4)
            self.assertFalse(group["replayed"])
            self.assertIn("GSN 3 was durable", group["refused"])
            before = self.site.content()
            code, output, errors = self.site.run(main, *argv)
            self.assertEqual(code, 4)
            self.assertIn("qds1", output)
            self.assertEqual(len(errors.splitlines()), 1)
            self.assertIn("GSN 3 was durable", errors)
            self.assertIn("qdswlscan(1)", errors)
            self.assertEqual(self.site.content(), before)

    def test_damage_below_the_recorded_head_names_the_log(self) -> None:
        offsets = self.filled()["log1"]
        head = self.unchanged("--check")["logs"][1]["head"]
        with self.site.log("log1") as log:
            log.update(head=Cursor(head, 6, {}))
        self.damage("log1", offsets[1])
        group = self.unchanged(code=4)
        self.assertIn("writelog of qds1", group["refused"])

    def test_damaged_superblocks(self) -> None:
        site = self.site
        size = site.superblock("log1").slot_bytes
        site.put("log1", 100, b"\xee")
        self.assertEqual(self.unchanged()["refused"], "", "the other slot")
        site.put("log1", size + 100, b"\xee")
        site.refused(main, 4, str(site.device("log1")), "no intact log")
        code, output, _ = site.run(main, "--check", "--json")
        self.assertEqual(code, 4)
        self.assertEqual(json_error(self, output)["code"], "corrupt")

    def test_not_initialised(self) -> None:
        site = self.site
        site.device("log1").unlink()
        site.make("log1", LOG)
        site.refused(main, 4, str(site.device("log1")), "qdswlinit")

    def test_initialised_one_by_one(self) -> None:
        other = Site(self)
        other.initialise()
        content = other.device("log1").read_bytes()
        self.site.device("log1").write_bytes(content)
        self.site.refused(main, 4, "different generations", "qdswlinit")

    def test_a_superblock_of_an_earlier_turn(self) -> None:
        self.filled()
        with self.site.log("log1") as log:
            log.head = log.durable_tail = log.ring.size
            append(log, self.site.maker("log1").make(1, [entry(0, 9)]))
        for argv in (["--check"], []):
            self.site.refused(main, 4, "writelog of qds1", "is of a time before", argv=argv)

    def test_a_data_device_that_cannot_be_written(self) -> None:
        self.filled()

        def failing(device: FileDevice, *_: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.patch(FileDevice, "pwritev", failing)
        self.site.refused(main, 1, f"{self.site.device('data0')}: Input/output error")

    def test_beside_a_live_driver(self) -> None:
        site = self.site
        with site.daemon("dsgrp000.driver"):
            for argv in ([], ["--check"]):
                site.refused(main, 1, str(os.getpid()), "killdriver", argv=argv)
        for name in ("log1", "data1"):
            with site.locked(name):
                site.refused(main, 1, f"{site.device(name)} is in use", argv=["--check"])
        self.scan()

    def test_closes_what_it_opened(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        self.scan()
        with self.site.locked("log1"):
            self.site.run(main)
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)


class FailedDeviceTests(ScanTestCase):
    """What the driver would serve past is scanned past (rules.md 13, 16)."""

    def setUp(self) -> None:
        super().setUp()
        self.filled()
        self.before = self.site.content()

    def scanned(self, *argv: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scan with --json; give the group and the failed device that it names."""
        got, output, errors = self.site.run(main, "--json", *argv)
        self.assertEqual((got, errors), (4, ""), output)
        told = json.loads(output)
        (group,) = told["groups"]
        (failed,) = group["failed"]
        (error,) = told["errors"]
        self.assertEqual(error["code"], "broken")
        self.assertIn(f"{failed['ldsu']}: {failed['reason']}", error["message"])
        self.assertEqual(group["refused"], "")
        return group, failed

    def recorded(self, failed: Failed) -> None:
        """Record it in the group's state file, as the driver does."""
        FailureLatch(self.site.paths.state_file(0)).record_group(failed)

    def changed(self) -> list[str]:
        after = self.site.content()
        return [name for name, content in self.before.items() if after[name] != content]

    def test_a_data_device(self) -> None:
        self.site.latch("data1")
        group, failed = self.scanned("--check")
        found = [(log["frames_to_replay"], log["entries_to_replay"]) for log in group["logs"]]
        self.assertEqual(found, [(2, 3), (2, 2)])
        self.assertEqual(self.changed(), [])
        self.assertTrue(self.scanned()[0]["replayed"])
        self.assertEqual(self.changed(), ["data0"])
        self.assertEqual((failed["ldsu"], failed["use"]), ("qds1", "data device"))
        self.assertEqual(failed["device"], str(self.site.device("data1")))
        self.assertIsNone(failed["since"], "nobody recorded it")

    def test_a_sync_that_fails_here(self) -> None:
        with self.site.failing_sync("data1"):
            code, _, errors = self.site.run(main)
        self.assertEqual(code, 1)
        self.assertIn(str(self.site.device("data1")), errors)
        self.assertIn("fdatasync", self.scanned()[1]["reason"])

    def test_a_writelog_of_which_something_is_needed(self) -> None:
        self.site.latch("log1")
        synced: list[str] = []
        fdatasync = os.fdatasync

        def note(fd: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
            fdatasync(fd)

        self.patch(os, "fdatasync", note)
        group, failed = self.scanned()
        self.assertEqual(group["logs"][1]["frames_to_replay"], 2)
        self.assertEqual(failed["use"], "writelog")
        self.assertIn("log0", synced)
        self.assertNotIn("log1", synced, "what it holds is in the page cache only")
        self.assertEqual(self.changed(), ["data0", "data1"])

    def test_a_writelog_that_is_not_needed(self) -> None:
        path = self.site.device("log1")
        lost = Untrusted(f"writelog {path} failed: EIO", 1790000000.0, 2, True, DATA)
        generation = self.site.superblock("log0").generation.hex()
        self.recorded(Failed({1: lost}, {}, generation))
        path.unlink()
        del self.before["log1"]
        group, failed = self.scanned()
        self.assertEqual((failed["since"], failed["reason"]), (lost.since, lost.reason))
        log = group["logs"][1]
        self.assertEqual((log["tail"], log["applied"], log["head"]), (None, None, None))
        self.assertEqual(group["generation"], generation)
        self.assertEqual(self.changed(), ["data0"])
        code, output, errors = self.site.run(main)
        self.assertEqual(code, 4)
        self.assertIn(f"qds1: {path}: not read any more", output)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lost.since))
        self.assertIn(f"qds1: since {since}: {lost.reason}", output)
        self.assertEqual(len(errors.splitlines()), 1)
        self.assertIn("qdsmirror-architecture(7)", errors)

    def test_only_superblocks_know_it(self) -> None:
        dead = Dead("data device x failed: EIO", 1790000000.0, DATA)
        with self.site.log("log0") as log:
            log.update(failures=Failed({}, {1: dead}).to_json())
        self.assertEqual(self.scanned()[1]["reason"], dead.reason)
        self.assertIn("data0", self.changed())
        self.assertNotIn("data1", self.changed())

    def test_it_is_told_beside_what_stops_the_scan(self) -> None:
        self.site.latch("data1")
        self.site.device("log0").unlink()
        code, output, errors = self.site.run(main)
        self.assertEqual((code, output), (4, ""))
        first, second = errors.splitlines()
        self.assertIn("data1 failed", first)
        self.assertIn("log0", second)


class BypassTests(ScanTestCase):
    STATE = {"id": "ab", "since": 1790000000.0, "reason": "writelog of qds0 is full"}
    SINCE = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1790000000.0))

    def test_primary(self) -> None:
        self.assertIsNone(self.scan("--check")["bypass"])
        for name in ("log0", "log1"):
            with self.site.log(name) as log:
                log.update(both=True, bypass=self.STATE)
        bitmap = empty_bitmap(self.site.superblock("log1"))
        ((_, block),) = bitmap.blocks(bitmap.mark([(0, 1)]))
        self.site.put("log1", bitmap.area.start, block)
        dirty = min(bitmap.area.chunk, DATA)
        group = self.unchanged("--check")
        self.assertEqual(group["bypass"], {**self.STATE, "dirty_bytes": dirty})
        code, output, _ = self.site.run(main)
        self.assertEqual(code, 0)
        self.assertIn(f"in bypass since {self.SINCE} (writelog of qds0 is full); 64 KiB", output)
        # The bitmap of a failed writelog is not believed.
        self.site.latch("log0")
        self.assertEqual(self.scan(code=4)["bypass"]["dirty_bytes"], DATA + dirty)

    def test_damage_to_a_bitmap_is_a_warning(self) -> None:
        area = empty_bitmap(self.site.superblock("log1")).area
        self.site.put("log1", area.start + 8, b"\x01")
        code, _, errors = self.site.run(main, "--check")
        self.assertEqual(code, 0)
        self.assertIn("warning: the dirty bitmap of qds1 on", errors)
        self.assertIn(f"bytes 0 to {DATA - 1} of the LDSU count as changed", errors)

    def test_secondary(self) -> None:
        self.site.be("beta")
        self.site.initialise()
        self.assertIsNone(self.scan()["bypass"])
        with self.site.log("journal0") as log:
            log.update(both=True, generations=(Generation(b"G" * 16, 1),), bypass=self.STATE)
        self.assertEqual(self.scan()["bypass"], self.STATE)
        self.assertIn(f"bypass since {self.SINCE}", self.site.run(main)[1])


class SecondaryTests(ScanTestCase):
    host = "beta"

    def setUp(self) -> None:
        super().setUp()
        # A journal is blank until a primary begins its history.
        with self.site.log("journal0") as log:
            log.update(both=True, generations=(Generation(b"G" * 16, 1),), coherent=True)
        self.make = self.site.maker("journal0").make

    def fill(self, durable: int = 0) -> list[int]:
        frame = [
            self.make(0, [entry(0, 1), entry(4096, 2)]),
            self.make(1, [entry(512, 3)]),
            self.make(0, [entry(512, 4)], durable=durable),
        ]
        return self.site.append("journal0", frame)

    def test_blank(self) -> None:
        site = self.site
        self.assertEqual(site.run(wlinit.main, "--yes")[0], 0)
        code, output, _ = site.run(main, "--check")
        self.assertEqual(code, 0)
        self.assertIn("dsgrp000 (secondary), generation none yet", output)
        self.assertIn("0 frames with 0 entries", output)

    def test_changes_nothing(self) -> None:
        self.fill()
        for argv in ([], ["--check"]):
            group = self.unchanged(*argv)
            self.assertEqual((group["role"], group["replayed"]), ("secondary", False))
            (log,) = group["logs"]
            self.assertEqual(log["name"], "journal")
            self.assertEqual(log["device"], str(self.site.device("journal0")))
            self.assertEqual((log["frames_to_replay"], log["entries_to_replay"]), (3, 4))

    def test_torn_tail(self) -> None:
        self.damage("journal0", self.fill()[2])
        group = self.unchanged("--check")
        self.assertEqual(group["logs"][0]["frames_to_replay"], 2)
        self.assertEqual(group["refused"], "")

    def test_damaged_durable_frame(self) -> None:
        offsets = self.fill()
        head = self.unchanged()["logs"][0]["head"]
        with self.site.log("journal0") as log:
            log.update(both=True, head=Cursor(head, 5, {}))
        self.assertEqual(self.unchanged("--check")["refused"], "")
        self.damage("journal0", offsets[1])
        group = self.unchanged("--check", code=4)
        self.assertIn(str(self.site.device("journal0")), group["refused"])
        self.assertIn(f"durable up to position {head}", group["refused"])
        code, output, errors = self.site.run(main)
        self.assertEqual(code, 4)
        self.assertIn(str(self.site.device("journal0")), errors)

    def test_a_superblock_of_an_earlier_turn(self) -> None:
        site = self.site
        self.fill()
        with site.log("journal0") as log:
            ring = log.ring.size
            # What lies at the beginning was written in the ring's second turn.
            log.head = log.durable_tail = ring
            append(log, self.make(0, [entry(0, 9)]))
        group = self.unchanged("--check", code=4)
        self.assertIn(str(site.device("journal0")), group["refused"])
        self.assertIn("is of a time before", group["refused"])

    def test_a_failed_device(self) -> None:
        for name in ("journal0", "mirror1"):
            latch = self.site.latch(name)
            self.site.refused(main, 4, str(self.site.device(name)), "has failed")
            latch.clear()

    def test_beside_a_live_rmd(self) -> None:
        site = self.site
        with site.daemon("dsgrp000.rmd"):
            site.refused(main, 1, str(os.getpid()), "killrmds")
        for name in ("journal0", "mirror1"):
            with site.locked(name):
                site.refused(main, 1, f"{site.device(name)} is in use", argv=["--check"])


class SelectionTests(TestCase):
    def test_a_group_of_another_host(self) -> None:
        site = Site(self)
        site.be("gamma")
        site.refused(main, 10, "gamma is neither primary nor secondary", "qds.cfg")

    def test_unknown_group_or_ldsu(self) -> None:
        site = Site(self)
        site.refused(main, 2, "dsgrp007", argv=["-g", "7"])
        site.refused(main, 2, "'qsd0'", "qds0", argv=["qsd0"])

    def test_only_what_is_selected(self) -> None:
        site = Site(self, groups=2, ldsus=1)
        site.initialise()
        with site.locked("log0"):
            code, output, _ = site.run(main, "--check", "qds1")
        self.assertEqual(code, 0)
        self.assertIn("dsgrp001", output)
        self.assertNotIn("dsgrp000", output)

    def test_every_group_is_told_though_one_is_refused(self) -> None:
        site = Site(self, groups=2, ldsus=1)
        site.initialise()
        frame = site.maker("log0").make(0, [entry(0, 1)])
        (offset,) = site.append("log0", [frame])
        with site.log("log0") as log:
            log.update(head=Cursor(4096, 2, {}))
        site.put("log0", offset + 300, b"\xee")
        code, output, errors = site.run(main)
        self.assertEqual(code, 4)
        self.assertIn("dsgrp001 (primary)", output)
        self.assertIn("replayed", output)
        self.assertIn("writelog of qds0", errors)
