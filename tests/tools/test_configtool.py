"""qdsconfigtool: check, show, pki, apply."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.x509.oid import ExtendedKeyUsageOID
from twisted.trial.unittest import TestCase

from qdsmirror import pki
from qdsmirror.config import load_group, load_host
from qdsmirror.errors import ConfigError, UnreachableError
from qdsmirror.limits import APPLY_SECONDS
from qdsmirror.paths import Paths
from qdsmirror.tools import client, configtool, doctor_peer

GROUP = """\
operation = async
[primary]
host = db1
[secondary]
host = dr1
journal_device = /dev/j0
[ldsus]
[[qds0]]
data_device = "/dev/d #0"
writelog_device = /dev/w0
mirror_device = /dev/d0
"""


class ToolTestCase(TestCase):
    """A root with a correct configuration of the primary, and the tool's output caught."""

    def setUp(self) -> None:
        base = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, base)
        self.base = base
        pki.make_hosts(base / "pki", ["db1", "dr1"], [0])
        shutil.copytree(base / "pki" / "db1", base / "root" / "etc")
        self.paths = Paths.of(base / "root")
        self.etc = self.paths.etc
        self.paths.host_config.write_text("name = db1\n")
        self.paths.group_config(0).write_text(GROUP)
        self.out = io.StringIO()
        self.err = io.StringIO()
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)

    def call(self, *argv: str) -> int:
        self.out.truncate(self.out.seek(0))
        self.err.truncate(self.err.seek(0))
        return configtool.main(["--root", str(self.paths.root), *argv])

    def json(self) -> Any:
        return json.loads(self.out.getvalue())


class CheckTests(ToolTestCase):
    def finds(self, *parts: str, code: int = 10) -> None:
        self.assertEqual(self.call("check"), code, self.out.getvalue())
        lines = self.out.getvalue().splitlines()
        self.assertEqual(len(lines), len(parts), lines)
        for line, part in zip(lines, parts, strict=True):
            self.assertIn(part, line)
        self.assertEqual(self.call("check", "--json"), code)
        self.assertEqual(len(self.json()["problems"]), len(parts))

    def test_good(self) -> None:
        self.assertEqual(self.call("check"), 0)
        self.assertEqual(self.out.getvalue(), "no problems found\n")
        self.assertEqual(self.call("check", "--json"), 0)
        self.assertEqual(self.json(), {"schema": 1, "problems": []})

    def test_every_problem_of_every_file(self) -> None:
        self.paths.host_config.write_text("nmae = db1\n")
        self.paths.group_config(0).write_text(GROUP.replace("async", "asink"))
        self.paths.group_config(1).write_text("x")
        self.finds(
            'qds.cfg:1: nmae: unknown key; did you mean "name"?',
            "qds.cfg:1: name: missing",
            f"{self.etc}/dsgrp000.cfg:1: operation:",
            "dsgrp001.cfg:1: ",
        )

    def test_json(self) -> None:
        self.paths.group_config(0).write_text(GROUP.replace("async", "asink"))
        self.assertEqual(self.call("check", "--json"), 10)
        self.assertEqual(
            self.json()["problems"],
            [
                {
                    "file": str(self.paths.group_config(0)),
                    "line": 1,
                    "key": "operation",
                    "message": '"asink" is not one of: async, sync, near-sync; '
                    'did you mean "async"?',
                    "severity": "error",
                    "hint": "",
                }
            ],
        )

    def peer(self, **changes: Any) -> None:
        """Have the secondary tell its configuration: ours, changed."""
        group = load_group(self.paths, 0)
        facts = {"configuration": {**group.comparable(), **changes}}
        ldsus = [{"name": "qds0", "mirror_device": "/dev/d0", "size": 1}]
        self.ways: list[dict[str, Any]] = [{"error": None, "facts": facts, "ldsus": ldsus}]
        self.patch(doctor_peer, "visit", lambda _paths, groups: {0: self.ways} if groups else {})

    def test_against_a_peer_that_has_the_same(self) -> None:
        self.peer()
        self.assertEqual(self.call("check", "--against-peer"), 0)
        self.assertEqual(self.out.getvalue().splitlines()[-1], "no problems found")

    def test_against_a_peer_that_differs(self) -> None:
        self.peer(**{"secondary.journal_device": "/dev/j1", "durability": "always"})
        self.ways[0]["ldsus"][0]["mirror_device"] = "/dev/d7"
        self.assertEqual(self.call("check", "--against-peer"), 10)
        place = f"{self.etc}/dsgrp000.cfg: "
        told = [one for one in self.out.getvalue().splitlines() if one.startswith(place)]
        wanted = (
            'secondary.journal_device is "/dev/j0" here and "/dev/j1" on dr1; make it the same in',
            'warning: durability is "flush" here and "always" on dr1; the primary\'s counts; ',
            'ldsus.qds0.mirror_device is "/dev/d0" here and "/dev/d7" on dr1; make [ldsus]',
        )
        self.assertEqual(len(told), len(wanted), told)
        for line, part in zip(told, wanted, strict=True):
            self.assertTrue(line.startswith(place + part), line)
            self.assertTrue(line.endswith("qdsconfigtool apply"), line)
        self.assertEqual(self.call("check", "--against-peer", "--json"), 10)
        severities = [one["severity"] for one in self.json()["problems"]]
        self.assertEqual(severities, ["error", "warning", "error"])
        self.peer(durability="always")
        self.assertEqual(self.call("check", "--against-peer"), 0)

    def test_against_a_peer_that_cannot_be_asked(self) -> None:
        self.peer()
        told = {"message": "dr1 does not answer", "hint": "on dr1: launchrmds", "code": "x",
                "exit_code": 11, "passing": True}  # fmt: skip
        self.ways[:] = [{"error": told, "local": ""}]
        self.assertEqual(self.call("check", "--against-peer"), 11)
        self.assertIn("dsgrp000: dr1 does not answer; on dr1: launchrmds", self.out.getvalue())
        (self.etc / "host.key").chmod(0o644)
        self.assertEqual(self.call("check", "--against-peer"), 10)

        def failed(*_: Any) -> Any:
            raise ConfigError("no host.pem", "qdsconfigtool check")

        self.patch(doctor_peer, "visit", failed)
        self.assertEqual(self.call("check", "--against-peer", "--json"), 10)
        self.assertIn("no host.pem", [one["message"] for one in self.json()["problems"]])

    def test_against_a_peer_from_the_secondary(self) -> None:
        self.peer()
        for name in ("host.pem", "host.key"):
            shutil.copy(self.base / "pki" / "dr1" / name, self.etc / name)
        self.paths.host_config.write_text("name = dr1\n")
        self.assertEqual(self.call("check", "--against-peer"), 0)
        self.assertIn("on db1: qdsconfigtool check --against-peer", self.out.getvalue())

    def test_files_by_themselves_have_no_peer(self) -> None:
        self.assertEqual(self.call("check", "--against-peer", "dsgrp000.cfg"), 2)

    def test_given_files_only(self) -> None:
        other = self.base / "dsgrp005.cfg"
        other.write_text(GROUP)
        self.paths.group_config(0).write_text("x")
        self.assertEqual(self.call("check", str(other), str(self.paths.host_config)), 0)
        self.assertEqual(self.call("check", str(other), str(self.paths.group_config(0))), 10)
        self.assertEqual(self.call("check", str(self.base / "missing.cfg")), 10)

    def test_modes(self) -> None:
        for file in ("host.key", "dsgrp000.secret", "metrics.token"):
            (self.etc / file).chmod(0o640)
            self.finds(f"{self.etc / file}: mode 0640")
            (self.etc / file).chmod(0o600)

    def test_missing_files(self) -> None:
        for file in ("host.key", "dsgrp000.secret", "host.pem", "ca.pem"):
            saved = (self.etc / file).read_bytes()
            (self.etc / file).unlink()
            self.finds(f"{file}: No such file")
            pki.write_file(self.etc / file, saved, 0o600)

    def test_junk_files(self) -> None:
        for file in ("host.key", "dsgrp000.secret", "metrics.token", "host.pem", "ca.pem"):
            saved = (self.etc / file).read_bytes()
            (self.etc / file).write_bytes(b"5ecret junk")
            self.finds(file)
            self.assertNotIn("5ecret", self.out.getvalue())
            (self.etc / file).write_bytes(saved)

    def test_name_of_the_certificate(self) -> None:
        shutil.copy(self.base / "pki" / "dr1" / "host.pem", self.etc)
        self.finds('bears dr1, but this host is "db1"', "not the key of")
        shutil.copy(self.base / "pki" / "dr1" / "host.key", self.etc)
        self.finds('bears dr1, but this host is "db1"')

    def test_another_authority(self) -> None:
        (self.etc / "ca.pem").write_bytes(pki.Authority.create().pem())
        self.finds("not issued by an authority")
        mine = (self.base / "pki" / "ca.pem").read_bytes()
        (self.etc / "ca.pem").write_bytes(pki.Authority.create().pem() + mine)
        self.assertEqual(self.call("check"), 0)

    def test_dates(self) -> None:
        authority = pki.Authority.load(self.base / "pki")
        now = datetime.now(UTC)
        for begin, days, part, code in (
            (now - timedelta(days=9), 8, "expired at", 10),
            (now + timedelta(days=2), 8, "not valid before", 10),
            (now, 20, "warning: expires in 19 days", 0),
        ):
            certificate, key = authority.issue("db1", days, begin)
            (self.etc / "host.pem").write_bytes(certificate)
            (self.etc / "host.key").write_bytes(key)
            self.finds(part, code=code)

    def test_dates_of_the_authority(self) -> None:
        authority = pki.Authority.create(days=20)
        certificate, key = authority.issue("db1")
        (self.etc / "host.pem").write_bytes(certificate)
        (self.etc / "host.key").write_bytes(key)
        (self.etc / "ca.pem").write_bytes(authority.pem())
        self.finds("host.pem: warning: expires in 19", "ca.pem: warning: expires in 19", code=0)
        self.call("check")
        self.assertIn("make a new authority", self.out.getvalue().splitlines()[1])

    def test_uses(self) -> None:
        class OneUse:
            SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
            CLIENT_AUTH = ExtendedKeyUsageOID.EMAIL_PROTECTION

        self.patch(pki, "ExtendedKeyUsageOID", OneUse)
        certificate, key = pki.Authority.load(self.base / "pki").issue("db1")
        (self.etc / "host.pem").write_bytes(certificate)
        (self.etc / "host.key").write_bytes(key)
        self.finds("not both clientAuth and serverAuth")

    def test_no_name(self) -> None:
        (self.etc / "host.pem").write_bytes((self.etc / "ca.pem").read_bytes())
        self.finds("bears no DNS name", "not the key of")

    def test_groups_of_others_are_a_warning(self) -> None:
        self.paths.host_config.write_text("name = db2\n")
        pki.make_hosts(self.base / "pki2", ["db2"], [])
        for file in ("host.pem", "host.key", "ca.pem"):
            shutil.copy(self.base / "pki2" / "db2" / file, self.etc)
        (self.etc / "dsgrp000.secret").unlink()
        self.finds('warning: neither primary "db1" nor secondary "dr1"', code=0)

    def test_no_group_is_a_warning(self) -> None:
        self.paths.group_config(0).unlink()
        self.finds("warning: no group's file", code=0)

    def test_user(self) -> None:
        self.paths.host_config.write_text("name = db1\nuser = nobody-by-this-name\n")
        self.finds("qds.cfg: user: there is no user")

    def test_user_who_could_not_read(self) -> None:
        me = pwd.getpwuid(os.geteuid()).pw_name
        self.paths.host_config.write_text(f"name = db1\nuser = {me}\n")
        self.assertEqual(self.call("check"), 0)
        other = next(one for one in pwd.getpwall() if one.pw_uid not in (0, os.geteuid()))
        self.paths.host_config.write_text(f"name = db1\nuser = {other.pw_name}\n")
        self.finds(
            f"host.key: does not belong to {other.pw_name}",
            f"metrics.token: does not belong to {other.pw_name}",
            f"dsgrp000.secret: does not belong to {other.pw_name}",
        )

    def test_without_a_token_all_but_the_console_works(self) -> None:
        (self.etc / "metrics.token").unlink()
        self.assertEqual(self.call("check"), 0)

    def test_no_directory(self) -> None:
        shutil.rmtree(self.etc)
        self.assertEqual(self.call("check"), 10)
        self.assertIn("No such file", self.err.getvalue())


class ShowTests(ToolTestCase):
    def test_text_is_a_configuration_with_the_same_meaning(self) -> None:
        self.shows_its_meaning()

    def test_likewise_of_what_is_not_the_default(self) -> None:
        text = GROUP.replace("async", "near-sync\non_disconnect = async\nnear_sync_entries = 7")
        text = text.replace("/dev/w0", "memory:1M\nbitmap_device = /dev/b0").replace(
            "/dev/j0", "/dev/j0\npaths = 10.1.0.1>10.1.0.2, fd00::1>[fd00::2]:576\n[tunables]\n"
            "compression = zstd:3\nverify_every = 7 d\nauto_refresh = yes"
        )  # fmt: skip
        self.paths.group_config(0).write_text(text)
        self.shows_its_meaning()

    def shows_its_meaning(self) -> None:
        self.assertEqual(self.call("show"), 0, self.err.getvalue())
        host, _mark, group = self.out.getvalue().partition("# " + str(self.etc / "dsgrp000.cfg"))
        other = Paths.of(self.base / "other")
        other.etc.mkdir(parents=True)
        other.host_config.write_text(host)
        other.group_config(0).write_text("#" + group)
        self.assertEqual(load_host(other), load_host(self.paths))
        shown, own = load_group(other, 0), load_group(self.paths, 0)
        self.assertEqual(dataclasses.replace(shown, path=own.path), own)

    def test_json(self) -> None:
        self.assertEqual(self.call("show", "--json"), 0)
        told = self.json()
        self.assertEqual(told["host"]["children"], 8)
        [group] = told["groups"]
        self.assertEqual((group["group"], group["role"]), (0, "primary"))
        self.assertEqual(group["configuration"]["secondary"]["port"], 575)
        self.assertEqual(group["configuration"]["ldsus"]["qds0"]["data_device"], "/dev/d #0")

    def test_no_secret(self) -> None:
        secret = (self.etc / "dsgrp000.secret").read_text().strip()
        for argv in (["show"], ["show", "--json"], ["check"]):
            self.call(*argv)
            self.assertNotIn(secret, self.out.getvalue())

    def test_selection(self) -> None:
        text = GROUP.replace("qds0", "qds1").replace("/dev/", "/dev/x/")
        self.paths.group_config(3).write_text(text)
        for argv, numbers in (([], [0, 3]), (["-g", "3"], [3]), (["qds0"], [0])):
            self.assertEqual(self.call("show", "--json", *argv), 0)
            self.assertEqual([one["group"] for one in self.json()["groups"]], numbers)
        self.assertEqual(self.call("show", "-g", "1"), 2)

    def test_no_groups(self) -> None:
        self.paths.group_config(0).unlink()
        self.assertEqual(self.call("show", "--json"), 0)
        self.assertEqual(self.json()["groups"], [])

    def test_wrong(self) -> None:
        self.paths.group_config(0).write_text("x")
        self.assertEqual(self.call("show"), 10)
        self.assertIn("qdsconfigtool check --root", self.err.getvalue())


class PkiTests(ToolTestCase):
    def test_what_it_makes_passes_check(self) -> None:
        out = self.base / "new"
        self.assertEqual(self.call("pki", "--out", str(out), "DB1", "dr1", "--groups", "2"), 0)
        self.assertIn(f"written: {out}/dr1/dsgrp001.secret", self.out.getvalue())
        self.assertIn(f"scp -p {out}/db1/* root@db1:{self.etc}/", self.out.getvalue())
        for file in (out / "db1").iterdir():
            shutil.copy(file, self.etc)
        self.assertEqual(self.call("check"), 0, self.out.getvalue())

    def test_again(self) -> None:
        argv = ["pki", "--out", str(self.base / "pki"), "db1", "dr1", "--json"]
        self.assertEqual(self.call(*argv), 0)
        self.assertEqual((self.json()["written"], len(self.json()["kept"])), ([], 12))
        self.assertEqual(self.call(*argv, "--overwrite"), 0)
        self.assertEqual(len(self.json()["written"]), 8)
        self.assertEqual(self.json()["copy"]["db1"], str(self.base / "pki" / "db1"))

    def test_dry_run(self) -> None:
        """It says what a run would do, and does nothing of it."""
        out = self.base / "pki"
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        argv = ["pki", "--out", str(out), "db1", "dr1", "--groups", "2", "--dry-run"]
        self.assertEqual(self.call(*argv, "--overwrite"), 0)
        said = self.out.getvalue().splitlines()
        for line in (
            f"would be replaced: {out}/db1/host.key",
            f"would be replaced: {out}/dr1/dsgrp000.secret",
            f"would be written: {out}/dr1/dsgrp001.secret",
            f"kept: {out}/ca.key",
        ):
            self.assertIn(line, said)
        self.assertEqual(self.call(*argv, "--json"), 0)
        told = self.json()
        self.assertEqual((len(told["would_write"]), told["would_replace"]), (2, []))
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        self.assertEqual(after, before)
        self.assertEqual(self.call(*argv[:2], str(self.base / "none"), *argv[3:]), 0)
        self.assertFalse((self.base / "none").exists())
        # What a run would refuse.
        (out / "db1" / "host.key").unlink()
        self.assertEqual(self.call(*argv), 10)

    def test_refusals(self) -> None:
        out = str(self.base / "new")
        for argv in (
            ["a", "A"],
            ["a", "b/c"],
            ["..", "b"],
            ["a", "b", "--groups", "513"],
            ["a", "b", "--groups", "-1"],
            ["a"],
        ):
            self.assertEqual(self.call("pki", "--out", out, *argv), 2, argv)
            self.assertEqual(self.err.getvalue().count("\n"), 1)
        self.assertFalse((self.base / "new").exists())

    def test_unwritable(self) -> None:
        (self.base / "file").write_text("")
        self.assertEqual(self.call("pki", "--out", str(self.base / "file"), "a", "b"), 1)
        self.assertIn(f"{self.base}/file", self.err.getvalue())


class ApplyTests(ToolTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.paths.run.mkdir()
        self.answers: dict[str, Callable[[], dict[str, Any]]] = {}
        self.called: list[tuple[str, float, str]] = []
        case = self

        class FakeClient:
            def __init__(self, path: Path, timeout_seconds: float) -> None:
                self.name = path.stem
                self.timeout_seconds = timeout_seconds

            def call(self, command: str) -> dict[str, Any]:
                case.called.append((self.name, self.timeout_seconds, command))
                return case.answers[self.name]()

        self.patch(client, "ControlClient", FakeClient)

    def runs(self, name: str, answer: dict[str, Any] | Exception) -> None:
        def act() -> dict[str, Any]:
            if isinstance(answer, Exception):
                raise answer
            return answer

        self.paths.control_socket(name).touch()
        self.answers[name] = act

    def test_every_running_daemon(self) -> None:
        quiet: dict[str, Any] = {"started": [], "stopped": [], "restarted": [], "errors": []}
        self.runs("qdspmd", quiet)
        self.runs("qdsdriver", {**quiet, "started": [1, 12], "restarted": [0]})
        self.assertEqual(self.call("apply"), 0)
        self.assertEqual(
            self.called, [(name, APPLY_SECONDS, "Apply") for name in ("qdsdriver", "qdspmd")]
        )
        self.assertEqual(
            self.out.getvalue(),
            "qdsdriver: started dsgrp001 dsgrp012, restarted dsgrp000\nqdspmd: nothing to change\n",
        )

    def test_json(self) -> None:
        self.runs("qdsrmd", {"started": [3]})
        self.assertEqual(self.call("apply", "--json"), 0)
        self.assertEqual(self.json(), {"schema": 1, "daemons": {"qdsrmd": {"started": [3]}}})

    def test_errors_of_groups(self) -> None:
        self.runs("qdsrmd", {"started": [3], "errors": ["dsgrp001.cfg:1: bad"]})
        self.assertEqual(self.call("apply"), 10)
        self.assertEqual(
            self.out.getvalue(), "qdsrmd: started dsgrp003\nqdsrmd: dsgrp001.cfg:1: bad\n"
        )

    def test_nothing_runs(self) -> None:
        self.assertEqual(self.call("apply"), 11)
        self.assertIn("launchdriver", self.err.getvalue())

    def test_one_fails_and_the_others_are_told(self) -> None:
        self.runs("qdsdriver", UnreachableError("nobody listens", "launchdriver"))
        self.runs("qdspmd", {"started": [0]})
        self.assertEqual(self.call("apply"), 11)
        self.assertEqual(self.out.getvalue(), "qdspmd: started dsgrp000\n")
        self.assertEqual(self.err.getvalue(), "qdsdriver: nobody listens; launchdriver\n")
        self.assertEqual(self.call("apply", "--json"), 11)
        self.assertEqual(self.json()["error"]["code"], "unreachable")

    def test_a_daemon_that_refuses(self) -> None:
        self.runs("qdsdriver", ConfigError("qds.cfg:1: name: changed"))
        self.assertEqual(self.call("apply"), 10)


class ParserTests(TestCase):
    def test_no_twisted_at_start(self) -> None:
        for module in ("configtool", "configcheck", "cli"):
            path = Path(configtool.__file__).with_name(f"{module}.py")
            self.assertNotIn("twisted", path.read_text())

    def test_subcommands(self) -> None:
        text = configtool.build_parser().format_help()
        for name in ("check", "show", "pki", "apply"):
            self.assertIn(f"    {name} ", text)


class UnitsTests(ToolTestCase):
    """The drop-ins of the systemd units."""

    def test_printed(self) -> None:
        file = self.base / "a file %1"
        file.write_bytes(b"")
        text = GROUP.replace("/dev/w0", f'"{file}"').replace("= /dev/d0", "= /dev/mirror")
        self.paths.group_config(0).write_text(text)
        self.assertEqual(self.call("units"), 0)
        told = self.out.getvalue()
        self.assertIn("# qdsdriver.service.d/qdsmirror-devices.conf\n", told)
        self.assertIn('DeviceAllow="/dev/d #0" rw\n', told)
        self.assertIn(f'ReadWritePaths="-{self.base}/a file %%1"\n', told)
        # What is the other host's is nothing for this one.
        self.assertNotIn("/dev/mirror", told)
        self.assertNotIn("qdsrmd", told)

    def test_written_at_the_secondary(self) -> None:
        self.paths.host_config.write_text("name = dr1\n")
        out = self.base / "system"
        self.assertEqual(self.call("units", "--out", str(out)), 0)
        (written,) = [path for path in out.rglob("*") if path.is_file()]
        self.assertEqual(written, out / "qdsrmd.service.d" / "qdsmirror-devices.conf")
        lines = written.read_text().splitlines()
        self.assertEqual(
            lines[1:], ["[Service]", 'DeviceAllow="/dev/d0" rw', 'DeviceAllow="/dev/j0" rw']
        )
        self.assertIn(f"{written} written", self.out.getvalue())

    def test_json(self) -> None:
        self.assertEqual(self.call("units", "--json"), 0)
        told = json.loads(self.out.getvalue())
        self.assertEqual(list(told["units"]), ["qdsdriver.service.d/qdsmirror-devices.conf"])
        self.assertEqual(told["written"], [])

    def test_a_broken_file(self) -> None:
        self.paths.group_config(1).write_text("nonsense\n")
        self.assertEqual(self.call("units"), 10)
        self.assertEqual(self.out.getvalue(), "")

    def test_unwritable(self) -> None:
        (self.base / "file").write_text("")
        self.assertEqual(self.call("units", "--out", str(self.base / "file")), 1)
