"""qdsdoctor: what it looks at, one by one, and the archive without secrets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror import pki
from qdsmirror.config import load_group, load_host
from qdsmirror.core.findings import Finding, Severity
from qdsmirror.core.redaction import redact
from qdsmirror.core.samples import GroupSample, LdsuSample, header, row
from qdsmirror.errors import QdsError
from qdsmirror.limits import MIB
from qdsmirror.paths import Paths
from qdsmirror.tools import doctor, doctor_bundle, doctor_host, doctor_peer, doctor_sizes, progress
from qdsmirror.tools.doctor_devices import Device, examine, look, names_by_kernel
from qdsmirror.tools.doctor_disks import Disks
from qdsmirror.tools.units import drop_ins, write

COMMANDS = doctor_bundle._COMMANDS
GROUP = """\
operation = async
[primary]
host = db1
[secondary]
host = dr1
port = {port}
journal_device = /dev/j0
[ldsus]
[[qds0]]
data_device = {base}/data0
writelog_device = {base}/log0
mirror_device = /dev/d0
"""


class DoctorTestCase(TestCase):
    """A root with a correct configuration of the primary, and the output caught."""

    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.base)
        pki.make_hosts(self.base / "pki", ["db1", "dr1"], [0])
        shutil.copytree(self.base / "pki" / "db1", self.base / "root" / "etc")
        self.paths = Paths.of(self.base / "root")
        for directory in (self.paths.var, self.paths.run):
            directory.mkdir()
        self.paths.host_config.write_text("name = db1\n")
        self.write_group()
        for name in ("data0", "log0"):
            (self.base / name).write_bytes(bytes(4 * MIB))
        self.out, self.err = io.StringIO(), io.StringIO()
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)

    def write_group(self, port: int = 575) -> None:
        self.paths.group_config(0).write_text(GROUP.format(base=self.base, port=port))

    def call(self, *argv: str) -> int:
        self.out.truncate(self.out.seek(0))
        self.err.truncate(self.err.seek(0))
        return doctor.main(["--root", str(self.paths.root), *argv])

    def json(self, *argv: str) -> dict[str, Any]:
        self.code = self.call("--json", *argv)
        told: dict[str, Any] = json.loads(self.out.getvalue())
        return told

    def find(self, found: Iterable[Finding], *words: str) -> Finding:
        """Give the one finding that has these words in its message."""
        told = list(found)
        fitting = [one for one in told if all(word in one.message for word in words)]
        self.assertEqual(len(fitting), 1, told)
        return fitting[0]


class CommandTests(DoctorTestCase):
    def test_text(self) -> None:
        self.assertEqual(self.call(), 1)
        lines = self.out.getvalue().splitlines()
        at = lines.index(f"error: writelog of qds0 {self.base}/log0 is not initialised")
        self.assertEqual(lines[at + 1], f"  next: qdswlinit --root {self.paths.root} -g 0")
        self.assertIn("error: dsgrp000: driver not running", lines)
        self.assertIn(f"the secondary was not asked: qdsdoctor --peer --root {self.paths.root}",
                      lines)  # fmt: skip
        self.assertEqual(self.err.getvalue(), "")

    def test_json(self) -> None:
        told = self.json("-g", "0")
        self.assertEqual((told["schema"], told["host"], told["groups"]), (1, "db1", [0]))
        self.assertEqual((told["recommendations"], told["bundle"]), ({}, None))
        for one in told["findings"]:
            self.assertEqual(list(one), ["severity", "check", "group", "message", "next"])
        ranks = [Severity(one["severity"]) for one in told["findings"]]
        self.assertEqual(ranks, sorted(ranks, key=list(Severity).index))

    def test_a_configuration_that_cannot_be_read(self) -> None:
        self.paths.host_config.write_text("nmae = db1\n")
        told = self.json()
        self.assertEqual((self.code, told["host"], told["groups"]), (10, None, []))
        self.assertIn('did you mean "name"', told["findings"][0]["message"])
        shutil.rmtree(self.paths.etc)
        told = self.json()
        self.assertEqual((self.code, told["error"]["code"]), (10, "configuration"))
        self.assertIn(str(self.paths.etc), told["error"]["message"])

    def test_usage(self) -> None:
        for argv in (("-g", "7"), ("qds9",), ("--outage", "soon"), ("--outage", "0 s"), ("--no",)):
            self.assertEqual(self.call(*argv), 2, argv)
            self.assertEqual(self.out.getvalue(), "")

    def test_a_secondary_is_told_whom_to_ask(self) -> None:
        shutil.rmtree(self.paths.etc)
        shutil.copytree(self.base / "pki" / "dr1", self.paths.etc)
        self.paths.host_config.write_text("name = dr1\n")
        self.write_group()
        told = self.json("--peer")
        (one,) = [one for one in told["findings"] if one["check"] == "peer"]
        self.assertIn("db1 cannot be asked from here", one["message"])
        self.assertEqual(one["next"], "on db1: qdsdoctor --peer")


class DiskTests(DoctorTestCase):
    """A sysfs of our own: sda with a partition; dm-0 on md0 of two disks; loop0 of a file."""

    def setUp(self) -> None:
        super().setUp()
        self.sys = self.base / "sys"
        self.block = self.sys / "dev" / "block"
        self.block.mkdir(parents=True)
        self.add("8:0", "sda")
        self.add("8:1", "sda/sda1", partition="1")
        self.add("8:16", "sdb")
        self.add("8:32", "sdc", cache="write back")
        self.add("9:0", "md0", slaves={"sdb": "8:16", "sdc": "8:32"})
        self.add("253:0", "dm-0", slaves={"md0": "9:0"})
        self.add("253:1", "dm-1", slaves={"sda1": "8:1"})
        self.mounts = self.base / "mountinfo"
        self.mounts.write_text("")

    def add(self, number: str, place: str, **what: Any) -> None:
        directory = self.sys / "devices" / place
        directory.mkdir(parents=True)
        if "partition" in what:
            (directory / "partition").write_text(what["partition"])
        for name, slave in what.get("slaves", {}).items():
            (directory / "slaves" / name).mkdir(parents=True)
            (directory / "slaves" / name / "dev").write_text(slave + "\n")
        if "cache" in what:
            (directory / "queue").mkdir()
            (directory / "queue" / "write_cache").write_text(what["cache"] + "\n")
        if "scsi" in what:
            (directory / "device" / "scsi_disk" / "0:0:0:0").mkdir(parents=True)
            kept = directory / "device" / "scsi_disk" / "0:0:0:0" / "cache_type"
            kept.write_text(what["scsi"] + "\n")
        (self.block / number).symlink_to(directory)

    def below(self, major: int, minor: int) -> set[str]:
        return set(Disks(self.sys, self.mounts).below_device(os.makedev(major, minor)))

    def test_stacks(self) -> None:
        self.assertEqual(self.below(8, 0), {"sda"})
        self.assertEqual(self.below(8, 1), {"sda"})
        self.assertEqual(self.below(9, 0), {"sdb", "sdc"})
        self.assertEqual(self.below(253, 0), {"sdb", "sdc"})
        self.assertEqual(self.below(253, 1), {"sda"})
        self.assertEqual(self.below(1, 99), set())

    def test_a_loop_device_lies_where_its_file_does(self) -> None:
        self.add("7:0", "loop0")
        (self.sys / "devices" / "loop0" / "loop").mkdir()
        (self.sys / "devices" / "loop0" / "loop" / "backing_file").write_text(f"{self.base}/log0\n")
        device = os.stat(self.base).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        (self.block / number).symlink_to(self.sys / "devices" / "sdb")
        self.assertEqual(self.below(7, 0), {"sdb"})

    def test_stacked_in_a_circle(self) -> None:
        self.add("253:7", "dm-7", slaves={"dm-7": "253:7"})
        self.below(253, 7)

    def mounted(self, kind: str, options: str) -> Disks:
        device = os.stat(self.base).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        self.mounts.write_text(
            f"36 35 {number} / /data rw,noatime shared:1 - {kind} /dev/x {options}\n"
        )
        return Disks(self.sys, self.mounts)

    def findings(self, disks: Disks) -> list[Finding]:
        devices = look([load_group(self.paths, 0)], "db1")
        return list(examine(self.paths, devices, disks))

    def test_what_a_flush_is_worth(self) -> None:
        found = self.findings(self.mounted("ext4", "rw,nobarrier"))
        one = self.find(found, "data device of qds0", "and 1 more", "no flush is done", "/data")
        self.assertIn("mount -o remount,barrier /data", one.next_step)
        self.find(self.findings(self.mounted("tmpfs", "rw")), "data device", "lost with the power")
        self.find(self.findings(self.mounted("nfs4", "rw")), "data device", "is nfs4")
        for one in self.findings(self.mounted("ext4", "rw,barrier=1")):
            self.assertNotIn("flush", one.message)

    def test_flushes_that_a_block_device_keeps_back(self) -> None:
        number = os.stat(self.base).st_dev
        place = self.block / f"{os.major(number)}:{os.minor(number)}"
        disks = Disks(self.sys, self.mounts)
        self.add("8:48", "sdd", cache="write back", scsi="write back")
        self.add("8:49", "sdd/sdd1", partition="1")
        self.add("8:64", "sde", cache="write through", scsi="write through")
        self.add("8:80", "sdf", cache="write through", scsi="write back, no read (daft)")
        for up, (name, slaves, cache, told) in enumerate((
            ("a", {"sdd1": "8:49"}, "write back", None),
            ("b", {"sdd1": "8:49"}, "write through", ("b", "sdd")),
            ("c", {"sde": "8:64"}, "write through", None),
            ("d", {"sde": "8:64", "sdf": "8:80"}, "write back", ("sdf", "sdf")),
            ("e", {"b": "1000:1"}, "write back", ("b", "sdd")),
            ("f", {"f": "1000:5"}, "write through", None),
            ("g", {}, "", None),
        )):  # fmt: skip
            self.add(f"1000:{up}", name, slaves=slaves, cache=cache)
            place.symlink_to(self.sys / "devices" / name)
            self.assertEqual(disks.unflushed(str(self.base)), told, name)
            if told is not None:
                one = self.find(self.findings(disks), f"{told[0]} is set to get no flushes",
                                f"{told[1]} has a volatile write cache", "and 1 more")  # fmt: skip
                self.assertIn(f"/sys/block/{told[0]}/queue/write_cache", one.next_step)
            place.unlink()
        self.assertEqual(disks.unflushed(str(self.base)), None)

    def test_a_data_device_and_its_writelog_share_a_disk(self) -> None:
        """Files of one file system, whatever is below it."""
        device = os.stat(self.base).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        (self.block / number).symlink_to(self.sys / "devices" / "dm-0")
        one = self.find(self.findings(Disks(self.sys, self.mounts)), "share the disk sdb, sdc")
        self.assertIs(one.severity, Severity.WARNING)
        self.assertIn(f"{self.base}/log0", one.message)
        self.assertIn("move the writelog to another disk", one.next_step)

    def test_many_share_a_disk(self) -> None:
        """They are told once."""
        text = self.paths.group_config(0).read_text()
        for name in ("data", "log"):
            (self.base / f"{name}1").write_bytes(bytes(4 * MIB))
        lines = [
            "[[qds1]]",
            f"data_device = {self.base}/data1",
            f"writelog_device = {self.base}/log1",
            "mirror_device = /dev/d1",
        ]
        self.paths.group_config(0).write_text(text + "\n".join(lines) + "\n")
        disks = Disks(self.sys, self.mounts)
        self.patch(disks, "below", lambda path: frozenset(["sda"]))
        self.find(self.findings(disks), "share the disk sda, as do 1 more such pairs")

    def test_other_disks(self) -> None:
        disks = Disks(self.sys, self.mounts)
        self.patch(disks, "below", lambda path: frozenset([path]))
        for one in self.findings(disks):
            self.assertNotIn("share", one.message)


class DeviceTests(DoctorTestCase):
    def findings(self) -> list[Finding]:
        devices = look([load_group(self.paths, 0)], "db1")
        return list(examine(self.paths, devices, Disks(Path("/nowhere"), Path("/nowhere"))))

    def test_sizes(self) -> None:
        (self.base / "log0").write_bytes(bytes(100 * 1024))
        one = self.find(self.findings(), "has 102400 bytes, 153600 are needed")
        self.assertEqual(one.severity, Severity.ERROR)
        (self.base / "log0").write_bytes(bytes(MIB))
        one = self.find(self.findings(), "has only 1048576 bytes")
        self.assertEqual(one.severity, Severity.WARNING)

    def test_what_is_no_device(self) -> None:
        (self.base / "data0").unlink()
        self.find(self.findings(), "data0 does not exist")
        (self.base / "data0").mkdir()
        self.find(self.findings(), "data0 is a directory")

    def test_sparse_beyond_what_is_free(self) -> None:
        with open(self.base / "data0", "wb") as file:
            file.truncate(1 << 43)
        one = self.find(self.findings(), "data0 is a sparse file")
        self.assertIn(f"fallocate -l {1 << 43}", one.next_step)

    def test_a_state_file_that_cannot_be_read(self) -> None:
        self.paths.state_file(0).write_text("{")
        one = self.find(self.findings(), "dsgrp000.state cannot be read")
        self.assertEqual(one.code, 4)

    def test_names_that_do_not_last(self) -> None:
        group = load_group(self.paths, 0)
        key = ("ldsus", "qds0", "data_device")
        for path, told in (("/dev/sdb", 1), ("/dev/nvme0n1", 1), ("/dev/vg0/sd", 0), ("/sda", 0)):
            self.assertEqual(len(list(names_by_kernel([Device(group, key, path)]))), told, path)


class HostTests(DoctorTestCase):
    def test_files(self) -> None:
        self.paths.etc.chmod(0o777)
        self.paths.var.chmod(0o777)
        host, group = load_host(self.paths), load_group(self.paths, 0)
        found = list(doctor_host.examine_files(self.paths, host, [group]))
        self.assertEqual(
            self.find(found, "etc: mode 0777").next_step, f"chmod go-w {self.paths.etc}"
        )
        self.assertIn("chmod o-w", self.find(found, "var: mode 0777").next_step)
        self.paths.var.chmod(0o1777)
        self.paths.etc.chmod(0o755)
        self.assertEqual(list(doctor_host.examine_files(self.paths, host, [group])), [])

    def test_space(self) -> None:
        def free(blocks: int, inodes: int) -> list[Finding]:
            values = os.statvfs_result(
                (4096, 4096, 1 << 30, blocks, blocks, 100, inodes, inodes, 0, 255)
            )
            self.patch(doctor_host.os, "statvfs", lambda _: values)
            places = (self.paths.var, self.paths.run)
            return list(doctor_host.examine_space(places))

        self.assertEqual(free(1 << 20, 1000), [])
        (one,) = free(1 << 12, 1000)
        self.assertEqual(one.severity, Severity.WARNING)
        (one,) = free(10, 1000)
        self.assertIn("no space left", one.message)
        (one,) = free(1 << 20, 3)
        self.assertIn("no inodes left", one.message)

    def test_clock(self) -> None:
        self.assertEqual(list(doctor_host.examine_clock(True)), [])
        self.assertEqual(list(doctor_host.examine_clock(None)), [])
        (one,) = doctor_host.examine_clock(False)
        self.assertIn("timedatectl", one.next_step)
        self.assertIn(doctor_host.clock_is_synchronised(), (True, False, None))

    def test_kernel(self) -> None:
        modules, libraries = self.base / "modules", self.base / "lib"
        release = libraries / os.uname().release
        release.mkdir(parents=True)
        self.assertIsNone(doctor_host.kernel_has_nbd(modules, libraries))
        (release / "modules.dep").write_text("kernel/drivers/block/nbd.ko.xz:\n")
        self.assertFalse(doctor_host.kernel_has_nbd(modules, libraries))
        (modules / "nbd").mkdir(parents=True)
        self.assertTrue(doctor_host.kernel_has_nbd(modules, libraries))
        self.assertEqual(list(doctor_host.examine_kernel(True)), [])
        (one,) = doctor_host.examine_kernel(False)
        self.assertIn("modprobe nbd", one.next_step)
        self.patch(doctor_host.attach_fuse, "missing_programs", lambda: ["nbdfuse"])
        (one,) = doctor_host.examine_kernel(None)
        self.assertIn("nbdfuse are not installed", one.message)

    def test_drop_ins(self) -> None:
        units = self.base / "units"
        units.mkdir()
        groups = [load_group(self.paths, 0)]

        def found() -> list[Finding]:
            return list(doctor_host.examine_drop_ins("db1", groups, [units], booted=True))

        self.assertEqual(found(), [])
        (units / "qdsdriver.service").write_text("[Service]\nDevicePolicy=closed\n")
        (one,) = found()
        self.assertIn(f"does not let qdsdriver use {self.base}/", one.message)
        self.assertIn("qdsconfigtool units --out", one.next_step)
        write(units, drop_ins("db1", groups))
        self.assertEqual(found(), [])
        drop_in = units / "qdsdriver.service.d" / "qdsmirror-devices.conf"
        drop_in.write_text(drop_in.read_text().replace("data0", "data9"))
        self.assertIn("data0", found()[0].message)
        # Whoever opens all devices to the daemon needs none of it.
        (units / "qdsdriver.service").write_text("[Service]\n")
        self.assertEqual(found(), [])
        self.assertEqual(
            list(doctor_host.examine_drop_ins("db1", groups, [units], booted=False)), []
        )

    def test_units(self) -> None:
        units = self.base / "units"
        (units / "multi-user.target.wants").mkdir(parents=True)

        def found() -> list[str]:
            return [
                one.message for one in doctor_host.examine_units(["primary"], [units], booted=True)
            ]

        self.assertEqual(list(doctor_host.examine_units(["primary"], [units], booted=False)), [])
        self.assertEqual(len(found()), 2)
        for name in ("qdsdriver", "qdspmd"):
            (units / f"{name}.service").write_text("")
        self.assertIn("qdsdriver.service is not enabled", found()[0])
        for name in ("qdsdriver", "qdspmd"):
            (units / "multi-user.target.wants" / f"{name}.service").symlink_to("..")
        self.assertEqual(found(), [])

    def test_ports(self) -> None:
        table = self.base / "tcp"
        table.write_text(
            "  sl  local_address rem_address   st tx_queue\n"
            "   0: 0100007F:023F 00000000:0000 0A 00000000:00000000\n"
            "   1: 0100007F:0240 0100007F:9999 01 00000000:00000000\n"
        )
        self.assertEqual(doctor_host.listening_ports([table, self.base / "none"]), {0x23F})
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            self.assertIn(port, doctor_host.listening_ports())
        group = load_group(self.paths, 0)
        (found,) = doctor_host.examine_ports(self.paths, [group], frozenset([575]))
        self.assertIn("port 575 is in use, and not by qdsrmd", found.message)
        self.assertIn("end that program", found.next_step)
        kept = frozenset([575])
        (found,) = doctor_host.examine_ports(self.paths, [group], frozenset([575]), kept)
        self.assertIn("systemd holds port 575 for qdsrmd", found.message)
        self.assertTrue(found.next_step.startswith("systemctl start qdsrmd"), found.next_step)
        self.assertNotIn("end that program", found.next_step)
        self.assertEqual(list(doctor_host.examine_ports(self.paths, [group], frozenset())), [])
        self.patch(doctor_host, "running_pid", lambda _: 7)
        (found,) = doctor_host.examine_ports(self.paths, [group], frozenset())
        self.assertIn("nobody listens on port 575", found.message)

    def test_ports_that_systemd_holds(self) -> None:
        told = "Listen=[::]:575 (Stream)\nListen=1575 (Stream)\nListen=/run/9 (Datagram)\n"
        active = f"{told}ActiveState=active\n"
        self.assertEqual(doctor_host.ports_of_socket(active), {575, 1575})
        self.assertEqual(doctor_host.ports_of_socket(f"{told}ActiveState=inactive\n"), set())
        self.assertEqual(doctor_host.ports_of_socket(""), set())
        systemctl = self.base / "bin" / "systemctl"
        systemctl.parent.mkdir()
        systemctl.write_text(f"#!/bin/sh\n[ $3 = qdsrmd.socket ] && cat <<END\n{active}END\n")
        systemctl.chmod(0o755)
        self.patch(doctor_host, "_SYSTEMD", self.base / "none")
        self.assertEqual(doctor_host.systemd_ports(), set())
        self.patch(doctor_host, "_SYSTEMD", self.base)
        path = os.environ["PATH"]
        self.addCleanup(os.environ.__setitem__, "PATH", path)
        os.environ["PATH"] = f"{systemctl.parent}:{path}"
        self.assertEqual(doctor_host.systemd_ports(), {575, 1575})
        systemctl.unlink()
        os.environ["PATH"] = str(systemctl.parent)
        self.assertEqual(doctor_host.systemd_ports(), set())


class SizeTests(DoctorTestCase):
    def record(self, kbps: float, generation: str = "") -> None:
        lines = [header(["qds0"])]
        start = 0.0 if generation else 1e6
        for number in range(200):
            ldsu = LdsuSample("qds0", kbps, kbps, 1.0, 0, 0, 0.0, 0.0)
            lines.append(
                row(GroupSample(start + 10.0 * number, 1.0, 0, "connected", (ldsu,), kbps))
            )
        name = f"dsgrp000.prf{generation}"
        (self.paths.var / name).write_text("\n".join([*lines, "1795 half a ro"]))

    def test_recommended(self) -> None:
        self.record(1024)
        told = self.json("--outage", "1 min")
        asked = told["recommendations"]["dsgrp000"]
        self.assertEqual(asked["writelog_bytes"], {"qds0": 80 * MIB})
        self.assertEqual(asked["link_bytes_per_second"], 1.25 * MIB)
        (one,) = [one for one in told["findings"] if one["check"] == "sizes"]
        self.assertIn("its writelog of 4 MiB is full 4 s after the link fails", one["message"])
        self.assertIn("80 MiB last for 60 s", one["message"])
        self.assertIn(f"qdsextend --root {self.paths.root} qds0", one["next"])
        self.call("--outage", "1 min")
        self.assertIn("link: 10.5 Mbit/s for the busiest hour", self.out.getvalue())

    def test_both_generations(self) -> None:
        self.record(1024, ".1")
        self.record(1)
        asked = self.json("--outage", "1 min")["recommendations"]["dsgrp000"]
        self.assertEqual(asked["writelog_bytes"], {"qds0": 80 * MIB})
        self.assertAlmostEqual(asked["recorded_seconds"], 2 * 1990)

    def test_a_journal(self) -> None:
        self.record(1024)
        group = load_group(self.paths, 0)
        asked = doctor_sizes.recommended(self.paths, group, 3600.0)
        assert asked is not None
        (one,) = doctor_sizes.examine_journal(group, asked, 3600.0, MIB)
        self.assertIn("a journal of 4.406 GiB lets a checkpoint hold for 60 min", one.message)
        self.assertEqual(list(doctor_sizes.examine_journal(group, asked, 3600.0, 0)), [])
        self.assertEqual(list(doctor_sizes.examine_journal(group, asked, 3600.0, 5 << 30)), [])
        self.assertEqual(doctor_peer.journal_bytes([{"error": {}}]), 0)
        way = {"error": None, "facts": {"journal_bytes": 7}}
        self.assertEqual(doctor_peer.journal_bytes([{"error": {}}, way]), 7)

    def test_enough(self) -> None:
        self.record(1)
        told = self.json("--outage", "1 min")
        found = [one["message"] for one in told["findings"] if one["check"] == "sizes"]
        self.assertIn("dsgrp000", told["recommendations"])
        self.assertEqual(found, [])

    def test_words(self) -> None:
        for given, text in ((0, "0 bytes"), (1 << 20, "1 MiB"), (3 << 30, "3 GiB")):
            self.assertEqual(doctor_sizes.size(given), text)
        for given, text in ((90, "90 s"), (7200, "2 h"), (86400 * 3, "3 days"), (600, "10 min")):
            self.assertEqual(doctor_sizes.duration(given), text)
        for rate, text in ((1.25e6, "10 Mbit/s"), (1.0, "8 bit/s"), (2e9, "16 Gbit/s")):
            self.assertEqual(doctor_sizes.bits(rate), text)


class PeerTests(DoctorTestCase):
    """What visits tell; how they are made is tested with real daemons."""

    def way(self, **changes: Any) -> dict[str, Any]:
        group = load_group(self.paths, 0)
        facts = {"version": doctor_peer.__version__, "time": 100.0, "state": "connected",
                 "notes": [], "configuration": group.comparable()}  # fmt: skip
        return {
            "local": None, "remote": "dr1", "port": 575, "error": None,
            "facts": {**facts, **changes},
            "ldsus": [{"name": "qds0", "mirror_device": "/dev/d0", "size": 4 * MIB}],
            "asked": 100.0, "answered": 100.0, "certificate_ends": 1e12,
        }  # fmt: skip

    def findings(self, *ways: dict[str, Any], size: int = 4 * MIB) -> list[Finding]:
        return list(doctor_peer.examine(load_group(self.paths, 0), ways, {"qds0": size}))

    def test_good(self) -> None:
        self.assertEqual(self.findings(self.way()), [])

    def test_differences(self) -> None:
        self.find(self.findings(self.way(time=200.0)), "the clock of dr1 is 100.0 s ahead")
        self.find(self.findings(self.way(version="0.0")), "0.0")
        self.find(self.findings(self.way(), size=5 * MIB), "the mirror device", "on dr1 has")
        soon = {**self.way(), "certificate_ends": time.time() + 5.5 * 86400}
        self.find(self.findings(soon), "certificate of dr1 expires in")

    def test_what_is_wrong_there(self) -> None:
        one = self.find(self.findings(self.way(state="failed", notes=["no\x1b disk"])), "no  disk")
        self.assertEqual(one.severity, Severity.ERROR)
        one = self.find(self.findings(self.way(notes=["was odd"])), "was odd")
        self.assertEqual(one.severity, Severity.ADVICE)

    def test_a_path_that_is_down_beside_a_good_one(self) -> None:
        error = {"code": "unreachable", "exit_code": 11, "passing": False, "message": "no way",
                 "hint": ""}  # fmt: skip
        bad = {**self.way(), "local": "10.0.0.1", "error": error}
        one = self.find(
            self.findings(bad, self.way(time=200.0)), "dsgrp000: no way (from 10.0.0.1)"
        )
        self.assertEqual((one.code, one.check), (11, "link"))
        self.find(self.findings(bad, self.way(time=200.0)), "the clock")
        identity = {**error, "code": "identity", "exit_code": 12}
        one = self.find(self.findings({**bad, "error": identity}), "no way")
        self.assertEqual((one.code, one.check), (12, "identity"))

    def test_facts_of_no_known_form(self) -> None:
        """The secondary is not trusted to tell anything in the form that we would."""
        for odd in (None, True, float("nan"), "no disk", {"a": 1}, [[1], {}, 7], 10**400):
            for fact in ("time", "state", "notes", "configuration"):
                self.assertEqual(self.findings(self.way(**{fact: odd})), [], (fact, odd))
            self.find(self.findings(self.way(version=odd)), "is installed here")
        for odd in (None, True, "7", [7], {}, 7.5, -7):
            self.assertEqual(doctor_peer.journal_bytes([self.way(journal_bytes=odd)]), 0, odd)
        self.find(self.findings(self.way(notes=[7, "was odd"])), "was odd")

    def test_what_another_group_says_in_the_same_words_is_told(self) -> None:
        def told(group: int) -> Finding:
            words = f"dsgrp00{group}: the peer's disk is full"
            return Finding(Severity.ERROR, "peer", words, "df", group)

        arguments = doctor.build_parser().parse_args([])
        checkup = doctor.Checkup(self.paths, arguments, findings=[told(0)])
        checkup._add_news([told(0), told(1)])
        self.assertEqual(checkup.findings, [told(0), told(1)])

    def test_what_is_waited_for_is_told(self) -> None:
        stages: list[Any] = []

        @contextlib.contextmanager
        def waiting(*what: Any) -> Iterator[None]:
            stages.append(what)
            yield
            stages.append("over")

        def visit(*_: Any) -> doctor_peer.Visits:
            stages.append("visit")
            return {}

        self.patch(progress, "waiting", waiting)
        self.patch(doctor_peer, "visit", visit)
        self.call("--peer")
        self.assertEqual(stages, [(False, "peer", "asking the secondaries"), "visit", "over"])

    def test_a_visitor_that_fails(self) -> None:
        group = load_group(self.paths, 0)
        self.paths.host_config.unlink()
        error = self.assertRaises(QdsError, doctor_peer.visit, self.paths, [group])
        self.assertIn("qds.cfg", error.message)
        self.assertEqual(error.exit_code, 10)
        self.assertEqual(doctor_peer.visit(self.paths, []), {})
        self.patch(doctor_peer.sys, "executable", "/bin/true")
        error = self.assertRaises(QdsError, doctor_peer.visit, self.paths, [group])
        self.assertIn("could not be asked", error.message)


class BundleTests(DoctorTestCase):
    """Canaries are planted wherever a secret may stand; none may be found in the archive."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(doctor_bundle, "_COMMANDS", {"echo.txt": ["echo", "hello"]})
        self.target = self.base / "help.tgz"
        self.canaries = [b"hunter22pass", b"token-canary-0001", b"ghp_0123456789abcdef"]
        etc, var = self.paths.etc, self.paths.var
        secret = self.paths.group_secret(0).read_bytes().strip()
        key = (etc / "host.key").read_bytes()
        body = [line for line in key.splitlines() if not line.startswith(b"-----")]
        self.canaries += [secret, secret.upper(), *body]
        # It need not stand beside the others, nor be called a token.
        self.paths.host_config.write_text(f"name = db1\nmetrics_token_file = {self.base}/scrape\n")
        (self.base / "scrape").write_bytes(b"token-canary-0001\n")
        (self.base / "scrape").chmod(0o600)
        (etc / "ca.key").write_bytes((self.base / "pki" / "ca.key").read_bytes())
        self.canaries += (etc / "ca.key").read_bytes().splitlines()[1:2]
        with open(self.paths.group_config(0), "ab") as file:
            file.write(b"# password = hunter22pass\n# the token is token-canary-0001\n# " + secret)
        other = pki.Authority.create().issue("x")[1]
        self.canaries += [line for line in other.splitlines() if not line.startswith(b"-----")]
        log = b"started\n" + key + b"Authorization: Bearer ghp_0123456789abcdef\n" + secret.upper()
        (var / "qdsdriver.log").write_bytes(log + b"\n" + other + b"\nended\n")
        (var / "dsgrp000.prf").write_bytes(b"# epoch\n" + secret + b"\n")
        (var / "dsgrp000.evt").write_bytes(b"exec /bin/page token-canary-0001\n")
        (var / "qdspmd.log").symlink_to(etc / "host.key")
        (var / "notes.txt").write_bytes(b"hunter22pass")

    def contents(self) -> dict[str, bytes]:
        found = {}
        with tarfile.open(self.target) as archive:
            for member in archive.getmembers():
                self.assertTrue(member.isfile(), member.name)
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.partition("/")[2]] = file.read()
        return found

    def test_no_secret_is_in_it(self) -> None:
        self.call("--bundle", str(self.target))
        found = self.contents()
        for name, content in found.items():
            for canary in self.canaries:
                self.assertNotIn(canary, content, name)
            self.assertNotIn(b"PRIVATE KEY", content, name)
        self.assertGreater(len(self.canaries), 8)
        for name in found:
            self.assertFalse(name.endswith((".key", ".secret", ".token", "notes.txt")), name)
        self.assertNotIn("var/qdspmd.log", found)

    def test_what_helps_is(self) -> None:
        told = self.json("--bundle", str(self.target))
        found = self.contents()
        self.assertEqual(told["bundle"]["file"], str(self.target))
        self.assertEqual(sorted(told["bundle"]["members"]), sorted(found))
        self.assertIn(b"data_device = ", found["etc/dsgrp000.cfg"])
        self.assertIn(b"started\n", found["var/qdsdriver.log"])
        self.assertIn(b"ended\n", found["var/qdsdriver.log"])
        self.assertIn(b"host.key", found["files.txt"])
        self.assertEqual(found["host/echo.txt"], b"hello\n")
        said = json.loads(found["doctor.json"])
        self.assertEqual(said["findings"], told["findings"])
        self.assertEqual(json.loads(found["info.json"])["groups"][0]["group"], 0)

    def test_its_owner_alone_may_read_it(self) -> None:
        self.call("--bundle", str(self.target))
        self.assertEqual(self.target.stat().st_mode & 0o777, 0o600)
        self.assertEqual([one.name for one in self.base.glob(".help*")], [])

    def test_nothing_is_overwritten(self) -> None:
        self.target.write_text("mine")
        self.assertEqual(self.call("--bundle", str(self.target)), 1)
        self.assertIn("exists already", self.err.getvalue())
        self.assertEqual(self.target.read_text(), "mine")
        self.assertEqual(self.call("--bundle", str(self.base / "no" / "x.tgz")), 1)
        self.assertIn("No such file", self.err.getvalue())

    def test_an_existing_file_is_refused_before_the_run(self) -> None:
        ran: list[Any] = []
        self.patch(doctor.Checkup, "run", ran.append)
        self.target.symlink_to("nowhere")
        self.assertEqual(self.call("--bundle", str(self.target)), 1)
        self.assertEqual(ran, [])

    def test_every_daemon_is_asked_for(self) -> None:
        for name in ("units.txt", "journal.txt"):
            for daemon in ("qdsdriver", "qdspmd", "qdsrmd", "qdsconsole"):
                self.assertIn(daemon, " ".join(COMMANDS[name]), name)

    def test_secrets_across_the_cut(self) -> None:
        """Whatever the place where a text is cut, no part of a secret is left of it."""
        secret = self.canaries[3]
        tail = b"".join(b"line %02d\n" % number for number in range(20))
        lines = b"a " + secret + b"; password = 'hunter 22pass'; -u admin:hunter22pass\n" + tail
        output = self.base / "output"
        output.write_bytes(lines)
        self.patch(doctor_bundle, "_COMMANDS", {"cat.txt": ["cat", str(output)]})
        (self.paths.var / "qdsdriver.log").write_bytes(lines)
        for most in range(len(tail) + 5, len(lines), 7):
            self.patch(doctor_bundle, "BUNDLE_LOG_BYTES", most)
            self.target.unlink(missing_ok=True)
            self.call("--bundle", str(self.target))
            found = self.contents()
            for name in ("var/qdsdriver.log", "host/cat.txt"):
                self.assertIn(
                    found[name][: -len(tail)], (b"", redact(lines, [secret])[: -len(tail)])
                )
                self.assertTrue(found[name].endswith(tail))

    def test_of_a_long_log_the_end(self) -> None:
        self.patch(doctor_bundle, "BUNDLE_LOG_BYTES", 1000)
        lines = b"".join(b"line %d\n" % number for number in range(1000))
        (self.paths.var / "qdsdriver.log").write_bytes(lines)
        self.call("--bundle", str(self.target))
        content = self.contents()["var/qdsdriver.log"]
        self.assertTrue(content.startswith(b"line "))
        self.assertTrue(content.endswith(b"line 999\n"))
        self.assertLessEqual(len(content), 1000)
