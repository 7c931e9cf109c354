"""qdswlinit: what it makes, what it refuses, and that it looks at everything before it writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.config import load_groups
from qdsmirror.core.records import BoundUnit
from qdsmirror.limits import FRAME_BYTES_MAX, KIB, MIB, WRITELOG_BYTES_MIN
from qdsmirror.storage.device import open_device
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.recovery import close_units, open_units
from qdsmirror.tools.wlinit import main
from tests.tools.offline import DATA, LOG, Site, json_error, stable_of

EXT4 = (0x438, b"\x53\xef")


class MakeTests(TestCase):
    def test_writelogs_at_the_primary(self) -> None:
        site = Site(self)
        site.put("data0", 0, b"precious")
        before = site.content()
        code, output, errors = site.run(main)
        self.assertEqual((code, errors), (0, ""))
        lines = output.splitlines()
        self.assertEqual(len(lines), 2)
        self.assertIn(f"dsgrp000: writelog {site.device('log0')} initialised, {LOG} bytes", lines)
        made = [site.superblock("log0"), site.superblock("log1")]
        for index, superblock in enumerate(made):
            self.assertEqual((superblock.role, superblock.group), ("writelog", 0))
            path = str(site.device(f"data{index}"))
            unit = BoundUnit(index, f"qds{index}", DATA, path, stable_of(path))
            self.assertEqual(superblock.units, (unit,))
            self.assertFalse(superblock.coherent)
        # One history for the group, a name of its own for each log.
        self.assertEqual(made[0].generation, made[1].generation)
        self.assertEqual(len(made[0].generation), 16)
        self.assertNotEqual(made[0].log, made[1].log)
        after = site.content()
        for name in ("data0", "data1", "mirror0", "mirror1", "journal0"):
            self.assertEqual(after[name], before[name], name)

    def share(self, site: Site) -> None:
        """Let both LDSUs name the first one's writelog device."""
        path = site.paths.group_config(0)
        path.write_text(
            path.read_text().replace(str(site.device("log1")), str(site.device("log0")))
        )

    def test_writelogs_that_share_a_device(self) -> None:
        site = Site(self)
        site.make("log0", 2 * LOG)
        self.share(site)
        code, output, errors = site.run(main)
        self.assertEqual((code, errors), (0, ""))
        half = LOG // 4096 * 4096
        line = f"dsgrp000: writelog {site.device('log0')} initialised, {half} bytes"
        self.assertEqual(output.splitlines(), [line] * 2)
        (config,) = load_groups(site.paths)
        units = open_units(config, open_device)
        self.addCleanup(close_units, units)
        self.assertEqual([u.writelog.superblock.units[0].name for u in units], ["qds0", "qds1"])
        self.assertEqual([u.writelog.superblock.device_bytes for u in units], [half] * 2)

    def test_a_device_that_is_too_small_for_two(self) -> None:
        site = Site(self)
        self.share(site)
        site.device("log0").unlink()
        site.make("log0", 2 * WRITELOG_BYTES_MIN)
        site.refused(main, 1, str(site.device("log0")), "a log needs")

    def test_before_images_get_what_the_mirrors_need(self) -> None:
        site = Site(self, "beta")
        code, output, _ = site.run(main)
        self.assertEqual(code, 0)
        needed = 2 * (DATA + 4096)
        self.assertIn(f"of these {needed} bytes for before-images", output)
        self.assertEqual(site.superblock("journal0").before_area[1], needed)
        path = site.paths.group_config(0)
        text = path.read_text().replace("[ldsus]", "[tunables]\nbefore_image_bytes = 0\n[ldsus]")
        path.write_text(text)
        _, output, _ = site.run(main, "--yes", "--json")
        self.assertEqual(json.loads(output)["initialised"][0]["before_image_bytes"], 0)
        self.assertEqual(site.superblock("journal0").before_area[1], 0)

    def test_journal_at_the_secondary(self) -> None:
        site = Site(self, "beta")
        before = site.content()
        code, output, errors = site.run(main)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn(f"dsgrp000: journal {site.device('journal0')} initialised", output)
        superblock = site.superblock("journal0")
        self.assertEqual((superblock.role, superblock.group), ("journal", 0))
        self.assertEqual(
            [(unit.index, unit.name, unit.size) for unit in superblock.units],
            [(0, "qds0", DATA), (1, "qds1", DATA)],
        )
        self.assertEqual(superblock.generations, ())
        self.assertFalse(superblock.coherent)
        after = site.content()
        del before["journal0"], after["journal0"]
        self.assertEqual(after, before)

    def test_each_group_has_its_own_history(self) -> None:
        site = Site(self, groups=2, ldsus=1)
        site.initialise()
        generations = {site.superblock(name).generation for name in ("log0", "log1")}
        self.assertEqual(len(generations), 2)

    def test_selection(self) -> None:
        for selection in (["-g", "1"], ["qds1"]):
            site = Site(self, groups=2, ldsus=1)
            before = site.content()
            code, output, _ = site.run(main, *selection)
            self.assertEqual(code, 0)
            self.assertIn("dsgrp001", output)
            self.assertNotIn("dsgrp000", output)
            self.assertEqual(site.content()["log0"], before["log0"])

    def test_json(self) -> None:
        site = Site(self, ldsus=1)
        code, output, errors = site.run(main, "--json")
        self.assertEqual((code, errors), (0, ""))
        log = str(site.device("log0"))
        self.assertEqual(
            json.loads(output),
            {
                "schema": 1,
                "initialised": [
                    {"group": "dsgrp000", "role": "writelog", "device": log, "size": LOG}
                ],
            },
        )

    def test_again_only_with_consent(self) -> None:
        for name, device in (("alpha", "log0"), ("beta", "journal0")):
            site = Site(self, name, ldsus=1)
            site.initialise()
            first = site.superblock(device).log
            site.refused(main, 1, str(site.device(device)), "writelog or journal", "--yes")
            self.assertEqual(site.run(main, "--yes")[0], 0)
            self.assertNotEqual(site.superblock(device).log, first)

    def test_dry_run(self) -> None:
        """It says what a run would make and lose, and writes nothing; what is refused still is."""
        for name, device, other in (("alpha", "log0", None), ("beta", "journal0", "mirror0")):
            site = Site(self, name, ldsus=1)
            if other is not None:
                site.put(other, *EXT4)
            code, output, _ = site.run(main, "--dry-run", "--json")
            planned = json.loads(output)
            lost = [one["device"] for one in planned["would_lose"]]
            self.assertEqual((code, lost), (0, [str(site.device(other))] if other else []))
            self.assertNotIn("initialised", planned)
            site.initialise()
            before = site.content()
            code, output, _ = site.run(main, "--dry-run")
            self.assertEqual(code, 0)
            self.assertIn(f"{site.device(device)} would be initialised", output)
            self.assertIn(f"{site.device(device)} holds a writelog or journal", output)
            self.assertIn("--yes", output)
            self.assertEqual(site.content(), before)
            code, output, _ = site.run(main, "--yes", "--json")
            self.assertEqual(json.loads(output)["initialised"], planned["would_initialise"])
            with site.locked(device):
                site.refused(main, 1, "in use", argv=("--dry-run",))


class RefuseTests(TestCase):
    """Nothing is written, even where only the last device is wrong."""

    def test_missing(self) -> None:
        for name, device in (("alpha", "log1"), ("alpha", "data1"), ("beta", "mirror1")):
            site = Site(self, name)
            site.device(device).unlink()
            site.refused(main, 1, f"{site.device(device)} does not exist")

    def test_foreign_signature(self) -> None:
        for name, device in (("alpha", "log1"), ("beta", "mirror1"), ("beta", "journal0")):
            site = Site(self, name)
            site.put(device, *EXT4)
            site.refused(main, 1, str(site.device(device)), "ext", "--yes")
            self.assertEqual(site.run(main, "--yes")[0], 0, device)

    def test_a_file_system_on_the_data_device_is_what_it_is_for(self) -> None:
        site = Site(self)
        site.put("data1", *EXT4)
        self.assertEqual(site.run(main)[0], 0)

    def test_in_use_whatever_the_consent(self) -> None:
        for name, device in (
            ("alpha", "log1"),
            ("alpha", "data1"),
            ("beta", "mirror1"),
            ("beta", "journal0"),
        ):
            site = Site(self, name)
            with site.locked(device):
                for argv in ([], ["--yes"]):
                    site.refused(main, 1, f"{site.device(device)} is in use", argv=argv)
            self.assertEqual(site.run(main)[0], 0, "unlocked again")

    def test_beside_its_daemon(self) -> None:
        for name, daemon, kill in (("alpha", "driver", "killdriver"), ("beta", "rmd", "killrmds")):
            site = Site(self, name)
            with site.daemon(f"dsgrp000.{daemon}"):
                site.refused(main, 1, str(os.getpid()), kill, argv=["--yes"])

    def test_the_other_hosts_daemon_is_none_of_ours(self) -> None:
        site = Site(self)
        with site.daemon("dsgrp000.rmd"):
            self.assertEqual(site.run(main)[0], 0)

    def test_below_the_minimum(self) -> None:
        for name, device in (("alpha", "log1"), ("beta", "journal0")):
            site = Site(self, name)
            site.device(device).unlink()
            site.make(device, WRITELOG_BYTES_MIN - 512)
            site.refused(main, 1, str(site.device(device)), "too small", str(WRITELOG_BYTES_MIN))
            site.make(device, WRITELOG_BYTES_MIN if name == "alpha" else LOG)
            self.assertEqual(site.run(main)[0], 0, device)

    def test_a_journal_too_small_for_its_ldsus(self) -> None:
        # 150 KiB do for one LDSU, but not for the superblocks of so many.
        site = Site(self, "beta", groups=2, ldsus=40)
        site.device("journal1").unlink()
        site.make("journal1", WRITELOG_BYTES_MIN)
        site.refused(main, 1, str(site.device("journal1")), "40 LDSUs")

    def test_a_journal_too_small_for_the_largest_frame(self) -> None:
        site = Site(self, "beta")
        journal = site.device("journal0")
        journal.unlink()
        site.make("journal0", 2 * MIB)
        _, _, errors = site.run(main)
        needed = int(errors.partition(" need ")[2].partition(";")[0])
        for size in (2 * MIB, needed - 512):
            journal.unlink()
            site.make("journal0", size)
            site.refused(main, 1, str(journal), str(size), str(needed), argv=["--yes"])
        site.make("journal0", needed)
        self.assertEqual(site.run(main)[0], 0)
        with site.log("journal0") as log:
            self.assertTrue(log.takes(FRAME_BYTES_MAX))

    def test_a_broken_file(self) -> None:
        site = Site(self, groups=2, ldsus=1)
        site.paths.group_config(1).write_text("operation = nonsense\n")
        # Everything is selected: nothing is written while one of them is not known.
        site.refused(main, 10, "dsgrp001.cfg")
        code, output, errors = site.run(main, "-g", "0")
        self.assertEqual(code, 0)
        self.assertIn("dsgrp000: writelog", output)
        self.assertTrue(errors.startswith("warning: "))
        self.assertIn("dsgrp001.cfg", errors)

    def test_small_log_is_warned_of(self) -> None:
        site = Site(self)
        site.device("log1").unlink()
        site.make("log1", 2 * MIB - 4 * KIB)
        code, output, errors = site.run(main, "--json")
        self.assertEqual(code, 0)
        self.assertEqual(len(json.loads(output)["initialised"]), 2)
        self.assertEqual(len(errors.splitlines()), 1)
        self.assertIn(f"warning: writelog {site.device('log1')} has only", errors)

    def test_a_data_device_that_is_a_log(self) -> None:
        site = Site(self)
        site.initialise()
        site.device("data1").write_bytes(site.device("log0").read_bytes())
        site.refused(main, 1, str(site.device("data1")), "holds a writelog", argv=["--yes"])

    def test_one_device_twice(self) -> None:
        for name, alias, other in (
            ("alpha", "log1", "data0"),
            ("alpha", "log1", "log0"),
            ("beta", "journal0", "mirror1"),
        ):
            for link in (os.symlink, os.link):
                site = Site(self, name)
                site.device(other).unlink()
                site.make(other, LOG)
                site.device(alias).unlink()
                link(site.device(other), site.device(alias))
                site.refused(
                    main,
                    1,
                    str(site.device(alias)),
                    "is the same device as",
                    str(site.device(other)),
                    argv=["--yes"],
                )

    def test_a_group_of_another_host(self) -> None:
        site = Site(self)
        site.be("gamma")
        site.refused(main, 10, "gamma is neither primary nor secondary", "qds.cfg")

    def test_unknown_group_or_ldsu(self) -> None:
        site = Site(self)
        site.refused(main, 2, "dsgrp007 is not configured", argv=["-g", "7"])
        site.refused(main, 2, "no LDSU is named 'qsd0'", "qds0", argv=["qsd0"])

    def test_json_error(self) -> None:
        site = Site(self)
        site.device("log1").unlink()
        code, output, errors = site.run(main, "--json")
        self.assertEqual((code, errors), (1, ""))
        error = json_error(self, output)
        self.assertEqual(error["code"], "device")
        self.assertIn(str(site.device("log1")), error["message"])


class SpaceTests(TestCase):
    def test_sparse_logs_get_their_blocks(self) -> None:
        for name, logs in (("alpha", ("log0", "log1")), ("beta", ("journal0",))):
            site = Site(self, name)
            for log in logs:
                self.assertLess(os.stat(site.device(log)).st_blocks * 512, LOG)
            self.assertEqual(site.run(main)[0], 0)
            for log in logs:
                status = os.stat(site.device(log))
                self.assertGreaterEqual(status.st_blocks * 512, LOG)
                self.assertEqual(status.st_size, LOG)
        # A data device may stay as sparse as its owner made it.
        self.assertLess(os.stat(site.device("mirror0")).st_blocks * 512, DATA)

    def test_no_space(self) -> None:
        site = Site(self)
        preallocate = FileDevice.preallocate

        def full(device: FileDevice) -> None:
            if device.path.endswith("log1"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch(FileDevice, "preallocate", full)
        site.refused(
            main, 1, f"writelog of qds1 {site.device('log1')}", str(LOG), "No space left on device"
        )
        self.patch(FileDevice, "preallocate", preallocate)
        self.assertEqual(site.run(main)[0], 0)

    def test_a_full_file_system(self) -> None:
        site = Site(self)
        small = site.directory / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            raise SkipTest("needs root, to mount a tmpfs")
        self.addCleanup(subprocess.run, ["umount", str(small)], check=True)
        site.device("log1").unlink()
        (small / "log1").touch()
        os.truncate(small / "log1", LOG)
        site.device("log1").symlink_to(small / "log1")
        before = site.content()
        code, output, errors = site.run(main)
        self.assertEqual((code, output), (1, ""))
        self.assertIn("No space left on device", errors)
        self.assertIn(str(site.device("log1")), errors)
        self.assertEqual(site.content(), before)


class LatchTests(TestCase):
    def test_is_cleared(self) -> None:
        for name, device in (("alpha", "log0"), ("beta", "mirror0")):
            site = Site(self, name, groups=2, ldsus=1)
            latch, other = site.latch(device), site.latch("log1", 1)
            self.assertEqual(site.run(main, "-g", "0")[0], 0)
            self.assertEqual(latch.failures(), {})
            self.assertEqual(list(other.failures()), [str(site.device("log1"))])

    def test_stays_when_nothing_was_initialised(self) -> None:
        site = Site(self)
        latch = site.latch("log0")
        site.put("log1", *EXT4)
        site.refused(main, 1, "ext")
        self.assertEqual(list(latch.failures()), [str(site.device("log0"))])

    def test_stays_until_the_last_log_is_made(self) -> None:
        site = Site(self)
        latch = site.latch("log0")
        with site.failing_sync("log1"):
            code, _, errors = site.run(main)
        self.assertEqual(code, 1)
        self.assertIn(str(site.device("log1")), errors)
        self.assertEqual(list(latch.failures()), [str(site.device("log0"))])

    def test_an_unreadable_one_is_cleared_too(self) -> None:
        site = Site(self)
        site.paths.state_file(0).write_text("{")
        self.assertEqual(site.run(main)[0], 0)
        self.assertFalse(site.paths.state_file(0).exists())


class AuditTests(TestCase):
    def test_who_initialised_what(self) -> None:
        site = Site(self)
        site.run(main, "--dry-run")
        self.assertFalse(site.paths.audit_log.exists())
        site.run(main)
        code, _, _ = site.run(main)
        self.assertNotEqual(code, 0)
        (done,) = map(json.loads, site.paths.audit_log.read_text().splitlines())
        self.assertEqual((done["event"], done["command"]), ("done", "qdswlinit"))
        self.assertEqual(done["uid"], os.getuid())
        self.assertEqual(done["arguments"]["root"], str(site.paths.root))
