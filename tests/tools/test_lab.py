"""qdslab: two sites on one machine, run by the product's own commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.config import load_group, load_groups, load_host, load_secret
from qdsmirror.errors import ConfigError, QdsError, UsageError
from qdsmirror.limits import MIB
from qdsmirror.tools import info, lab, lab_sites
from qdsmirror.tools.lab_plan import Layout, Plan
from qdsmirror.tools.lab_sites import Lab
from qdsmirror.tools.nbdclient import NbdClient
from qdsmirror.tools.status import nbd_uri
from tests.tools.sites import captured

#: The sites of a lab with one secondary.
SITES = Layout().sites
SMALL = Plan(size=4 * MIB, writelog=2 * MIB, journal=3 * MIB)


def directory(test: TestCase, where: str = "/tmp") -> Path:
    made = Path(tempfile.mkdtemp(prefix="qds-", dir=where))
    test.addCleanup(shutil.rmtree, made, True)
    return made


class CreateTests(TestCase):
    """What create makes, and refuses."""

    def test_files(self) -> None:
        place = directory(self) / "lab"
        made = Lab(place)
        port = made.create(Plan(2, 2, 4 * MIB, 2 * MIB, 3 * MIB))
        for site in SITES:
            paths = made.paths[site]
            host = load_host(paths)
            self.assertEqual(host.name, site)
            self.assertEqual(stat.S_IMODE(host.key.stat().st_mode), 0o600)
            groups = load_groups(paths)
            self.assertEqual([group.port for group in groups], [port, port])
            self.assertEqual([group.role_of(site) for group in groups], [site, site])
        near, far = (load_group(made.paths[site], 1) for site in SITES)
        self.assertEqual(near.identity_digest(), far.identity_digest())
        self.assertEqual([unit.name for unit in near.ldsus], ["qds2", "qds3"])
        self.assertEqual(*(load_secret(made.paths[site], 1) for site in SITES))
        self.assertEqual(os.stat(near.ldsus[1].data_device).st_size, 4 * MIB)
        self.assertEqual(os.stat(near.ldsus[1].mirror_device).st_size, 4 * MIB)
        self.assertEqual(os.stat(near.ldsus[0].writelog_device).st_size, 2 * MIB)
        self.assertEqual(os.stat(near.journal_device).st_size, 3 * MIB)

    def test_given_port(self) -> None:
        made = Lab(directory(self) / "lab")
        self.assertEqual(made.create(Plan(1, 1, 4 * MIB, 2 * MIB, 3 * MIB, 1575)), 1575)
        self.assertEqual(load_group(made.paths["primary"], 0).port, 1575)

    def test_overflow_is_chosen(self) -> None:
        for options, policy in (([], "block"), (["--overflow", "bypass"], "bypass")):
            place = directory(self) / "lab"
            sizes = ["--size", "4M", "--writelog", "2M", "--journal", "3M"]
            self.assertEqual(captured(self, lab.main, "create", str(place), *sizes, *options)[0], 0)
            for site in SITES:
                group = load_group(Lab(place).paths[site], 0)
                self.assertEqual(group.on_overflow, policy)

    def test_several_secondaries(self) -> None:
        """Groups are spread over them in turn; each host has its own groups' files only."""
        made = Lab(directory(self) / "lab")
        made.create(replace(SMALL, groups=3, secondaries=2, port=20000))
        self.assertEqual(made.sites, ("primary", "secondary", "secondary2"))
        self.assertEqual(made.ports, {"secondary": 20000, "secondary2": 20001})
        again = Lab(made.directory)
        self.assertEqual((again.sites, again.ports), (made.sites, made.ports))
        for site, numbers in (("primary", [0, 1, 2]), ("secondary", [0, 2]), ("secondary2", [1])):
            paths = made.paths[site]
            groups = load_groups(paths)
            self.assertEqual([group.number for group in groups], numbers)
            secrets = sorted(path.name for path in paths.etc.glob("*.secret"))
            self.assertEqual(secrets, [f"dsgrp00{number}.secret" for number in numbers])
        self.assertEqual([group.port for group in load_groups(made.paths["primary"])],
                         [20000, 20001, 20000])  # fmt: skip
        names = sorted(path.name for path in made.devices("secondary2").iterdir())
        self.assertEqual(names, ["dsgrp001.journal", "qds1.mirror"])
        made.destroy()
        self.assertFalse(made.directory.exists())

    def test_crossed(self) -> None:
        """Every second group goes the other way."""
        made = Lab(directory(self) / "lab")
        made.create(replace(SMALL, groups=4, secondaries=2, crossed=True))
        ends = [("primary", "secondary"), ("secondary", "primary"),
                ("primary", "secondary2"), ("secondary2", "primary")]  # fmt: skip
        self.assertEqual([made.layout.ends(number) for number in range(4)], ends)
        for number, pair in enumerate(ends):
            for site, role in zip(pair, ("primary", "secondary"), strict=True):
                group = load_group(made.paths[site], number)
                self.assertEqual(group.role_of(site), role)
        ports = [load_group(made.paths["primary"], number).port for number in range(4)]
        listening = [made.ports[site] for site in ("secondary", "primary", "secondary2", "primary")]
        self.assertEqual(ports, listening)
        self.assertEqual(list(made.ports), ["secondary", "secondary2", "primary"])
        self.assertEqual(set(made.pids("secondary2")), {"qdsdriver", "qdspmd", "qdsrmd"})

    def test_a_site_without_a_part(self) -> None:
        made = Lab(directory(self) / "lab")
        for plan in (
            replace(SMALL, secondaries=2),
            replace(SMALL, groups=3, secondaries=2, crossed=True),
        ):
            error = self.assertRaises(UsageError, made.create, plan)
            self.assertEqual(error.hint, f"--groups {4 if plan.crossed else 2}")
        self.assertRaises(
            UsageError, made.create, replace(SMALL, groups=2, secondaries=2, port=65535)
        )
        self.assertFalse(made.directory.exists())

    def test_another_version(self) -> None:
        place = directory(self)
        (place / "lab.json").write_text('{"schema": 1, "port": 1575}')
        error = self.assertRaises(ConfigError, Lab, place)
        self.assertIn("create it again", error.hint)

    def test_mode_is_chosen(self) -> None:
        for options, mode in (([], "async"), (["--mode", "near-sync"], "near-sync")):
            place = directory(self) / "lab"
            sizes = ["--size", "4M", "--writelog", "2M", "--journal", "3M"]
            self.assertEqual(captured(self, lab.main, "create", str(place), *sizes, *options)[0], 0)
            for site in ("primary", "secondary"):
                self.assertEqual(load_group(Lab(place).paths[site], 0).operation, mode)

    def test_not_empty(self) -> None:
        place = directory(self)
        (place / "mine").touch()
        self.assertRaises(UsageError, Lab(place).create, SMALL)
        self.assertEqual(os.listdir(place), ["mine"])

    def test_failure_leaves_nothing(self) -> None:
        place = directory(self) / "lab"

        def fail(main: object, paths: object) -> None:
            raise QdsError("no")

        self.patch(lab_sites, "_command", fail)
        self.assertRaises(QdsError, Lab(place).create, SMALL)
        self.assertFalse(place.exists())

    def test_impossible_plans(self) -> None:
        for plan in (Plan(groups=0), Plan(groups=513), Plan(ldsus=0), Plan(writelog=1000)):
            self.assertRaises(UsageError, Lab("/tmp/qds-none").create, plan)
        self.assertRaises(UsageError, Lab("/tmp/qds-none").create, Plan(port=70000))

    def test_path_too_long(self) -> None:
        error = self.assertRaises(UsageError, Lab, "/tmp/" + "x" * 90)
        self.assertIn("too long", str(error))


class CommandTests(TestCase):
    """The command line."""

    def lab(self, *argv: str) -> tuple[int, str, str]:
        return captured(self, lab.main, *argv)

    def test_create_status_destroy(self) -> None:
        place = str(directory(self) / "lab")
        small = ("--size", "4M", "--writelog", "2M", "--journal", "3M")
        code, output, errors = self.lab("create", place, *small)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("created, port ", output)
        code, output, _ = self.lab("status", "--json", place)
        report = json.loads(output)
        self.assertEqual((code, report["schema"], report["lab"]), (0, 1, place))
        self.assertEqual([site["site"] for site in report["sites"]], ["primary", "secondary"])
        self.assertEqual(report["sites"][0]["daemons"], {"qdsdriver": None, "qdspmd": None})
        self.assertEqual(report["sites"][0]["groups"][0]["reason"], "driver not running")
        self.assertEqual(self.lab("stop", place)[0], 0)
        code, _, errors = self.lab("destroy", place)
        self.assertEqual(code, 2)
        self.assertIn("--yes", errors)
        code, output, _ = self.lab("destroy", place, "--dry-run")
        self.assertEqual(code, 0)
        self.assertRegex(output, "would be removed, [0-9.]+ MiB in files")
        self.assertTrue(os.path.exists(place))
        self.assertEqual(self.lab("destroy", place, "--yes")[0], 0)
        self.assertFalse(os.path.exists(place))

    def test_as_many_groups_as_needed(self) -> None:
        place = str(directory(self) / "lab")
        small = ("--size", "4M", "--writelog", "2M", "--journal", "3M")
        options = ("--secondaries", "2", "--crossed", "--port", "20000")
        code, output, errors = self.lab("create", place, *small, *options)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("created, ports 20000, 20001 and 20002", output)
        _, output, _ = self.lab("status", "--json", place)
        sites = json.loads(output)["sites"]
        self.assertEqual([len(site["groups"]) for site in sites], [4, 2, 2])
        code, output, _ = self.lab("stop", place, "secondary2")
        self.assertEqual((code, output), (0, f"{place}: secondary2 stopped\n"))
        code, _, errors = self.lab("stop", place, "secondary3")
        self.assertEqual(code, 2)
        self.assertIn("sites: primary, secondary, secondary2", errors)

    def test_no_lab(self) -> None:
        place = directory(self)
        (place / "precious").touch()
        for argv in (["start"], ["stop"], ["status"], ["destroy", "--yes"]):
            code, _, errors = self.lab(*argv, str(place))
            self.assertEqual(code, 10, argv)
            self.assertIn("holds no lab", errors)
        self.assertEqual(os.listdir(place), ["precious"])

    def test_attached_ldsu_is_not_destroyed(self) -> None:
        place = directory(self) / "lab"
        made = Lab(place)
        made.create(SMALL)
        attach = made.paths["primary"].run / "attach"
        attach.mkdir()
        (attach / "qds0.json").touch()
        code, _, errors = self.lab("destroy", str(place), "--yes")
        self.assertEqual(code, 1)
        self.assertIn("qdsdetach", errors)
        self.assertTrue((made.devices("primary") / "qds0.data").exists())

    def test_usage(self) -> None:
        place = str(directory(self) / "lab")
        for argv in (
            ["create", place, "--size", "many"],
            ["start", place, "tertiary"],
            ["create", place, "--mode", "asynchronous"],
            ["--root", "/tmp/y", "status", place],
            [],
        ):
            self.assertEqual(self.lab(*argv)[0], 2, argv)


class LiveTests(TestCase):
    """Real daemons, in memory (tmpfs)."""

    timeout = 300

    def setUp(self) -> None:
        if not os.access("/dev/shm", os.W_OK):
            raise SkipTest("needs a tmpfs at /dev/shm")
        self.lab = Lab(directory(self, "/dev/shm") / "lab")
        self.addCleanup(self.end)
        self.lab.create(Plan(2, 1, 8 * MIB, 2 * MIB, 3 * MIB))

    def end(self) -> None:
        if self.lab.directory.exists():
            self.lab.destroy()

    def write(self, group: int, text: bytes) -> None:
        config = load_group(self.lab.paths["primary"], group)
        uri = nbd_uri(self.lab.paths["primary"], config, config.ldsus[0])
        with NbdClient.connect(uri) as client:
            for offset in range(0, client.size, MIB):
                client.write(offset, text.ljust(4096, b"."))
            client.flush()

    def assert_mirrored(self) -> None:
        def look() -> tuple[str, list[info.Group]]:
            return "primary", self.lab.groups("primary")

        info.wait(look, "drained", 240)
        for name in ("qds0", "qds1"):
            data = (self.lab.devices("primary") / f"{name}.data").read_bytes()
            mirror = (self.lab.devices("secondary") / f"{name}.mirror").read_bytes()
            self.assertEqual(len(data), 8 * MIB)
            self.assertTrue(data == mirror, name)

    def test_life(self) -> None:
        """Start, write, stop, start, kill -9, start, destroy."""
        self.lab.start(SITES)
        before = self.lab.pids("primary")
        self.lab.start(SITES)
        self.assertEqual(self.lab.pids("primary"), before)
        for group in self.lab.groups("primary"):
            self.assertEqual((group["modes"], group["coherent"]), (["connected"], True))
        self.write(0, b"first")
        self.write(1, b"second")
        self.assert_mirrored()

        self.lab.stop(SITES)
        self.lab.stop(SITES)
        self.assertEqual(set(self.lab.pids("primary").values()), {None})
        self.assertEqual(set(self.lab.pids("secondary").values()), {None})

        self.lab.start(["primary"])
        self.write(0, b"while the secondary is away")
        self.assertIn("accumulating", self.lab.groups("primary")[0]["modes"])
        self.lab.start(["secondary"])
        self.assert_mirrored()

        for site in SITES:
            for pid in self.lab.pids(site).values():
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
        self.lab.start(SITES)
        self.write(1, b"after kill -9")
        self.assert_mirrored()
        self.lab.destroy()
        self.assertFalse(self.lab.directory.exists())
