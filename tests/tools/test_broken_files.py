"""One broken group file stops the commands for its own group only, and every failure is told."""

from __future__ import annotations

import json

from twisted.trial.unittest import TestCase

from qdsmirror.tools import configtool, info, refresh, rmdreco, wlscan
from tests.tools.offline import Site


class BrokenFileTests(TestCase):
    """Of three groups the second's file is broken."""

    def site(self, name: str = "alpha") -> Site:
        site = Site(self, name, groups=3, ldsus=1)
        site.initialise()
        site.paths.group_config(1).write_text("operation = nonsense\n")
        return site

    def test_all_selected(self) -> None:
        for name, command, told in (
            ("alpha", info.main, ["dsgrp000", "dsgrp002"]),
            ("alpha", wlscan.main, ["dsgrp000", "dsgrp002"]),
            ("beta", wlscan.main, ["dsgrp000", "dsgrp002"]),
            ("beta", rmdreco.main, ["dsgrp000", "dsgrp002"]),
        ):
            site = self.site(name)
            # qdsinfo has done what it is for, whatever else is to be told (interface.md).
            expected = 0 if command is info.main else 10
            code, output, errors = site.run(command)
            self.assertEqual(code, expected, (command, output, errors))
            for one in told:
                self.assertIn(one, output)
            self.assertEqual(len(errors.splitlines()), 1)
            self.assertIn("dsgrp001.cfg", errors)
            self.assertIn("qdsconfigtool check", errors)
            code, output, errors = site.run(command, "--json")
            self.assertEqual((code, errors), (expected, ""))
            found = json.loads(output)
            names = [one["name"] if command is info.main else one["group"]
                     for one in found["groups"]]  # fmt: skip
            self.assertEqual(names, told)
            (error,) = found["errors"]
            self.assertEqual(error, found["error"])
            self.assertEqual(error["code"], "configuration")
            self.assertIn("dsgrp001.cfg", error["message"])

    def test_show(self) -> None:
        code, output, errors = self.site().run(
            lambda argv: configtool.main([*argv[:2], "show", *argv[2:]])
        )
        self.assertEqual(code, 10)
        self.assertIn("dsgrp002.cfg", output)
        self.assertIn("dsgrp001.cfg", errors)

    def test_a_good_group_selected(self) -> None:
        for name, command in (
            ("alpha", info.main),
            ("alpha", wlscan.main),
            ("beta", wlscan.main),
            ("beta", rmdreco.main),
        ):
            for selection in (["-g", "2"], ["qds2"]):
                code, output, errors = self.site(name).run(command, *selection)
                self.assertEqual(code, 0, (command, output, errors))
                self.assertIn("dsgrp002", output)
                self.assertNotIn("dsgrp000", output)
                self.assertTrue(errors.startswith("warning: "), errors)
                self.assertIn("dsgrp001.cfg", errors)

    def test_the_broken_group_selected(self) -> None:
        for name, command in (
            ("alpha", info.main),
            ("alpha", wlscan.main),
            ("alpha", refresh.main),
            ("beta", rmdreco.main),
        ):
            site = self.site(name)
            # An LDSU of the broken file cannot be told from one that does not exist.
            for selection in (["-g", "1"], ["qds1"]):
                code, output, errors = site.run(command, *selection)
                self.assertEqual((code, output), (10, ""), command)
                self.assertIn("dsgrp001.cfg", errors.splitlines()[-1])
            code, output, _ = site.run(command, "-g", "7")
            self.assertEqual(code, 2)

    def test_a_good_and_the_broken_group_selected(self) -> None:
        """What can be reported is; qds1 may stand in the broken file, or nowhere."""
        site = self.site()
        code, output, errors = site.run(info.main, "-g", "0", "-g", "1")
        self.assertEqual(code, 0, (output, errors))
        self.assertIn("dsgrp000", output)
        self.assertIn("dsgrp001.cfg", errors)
        code, output, _ = site.run(info.main, "qds0", "qds1")
        self.assertEqual((code, output), (10, ""))

    def test_nothing_to_wait_for(self) -> None:
        site = self.site()
        code, _, errors = site.run(info.main, "--wait", "connected")
        self.assertEqual(code, 10)
        self.assertIn("dsgrp001.cfg", errors)
        self.assertEqual(site.run(info.main, "--is", "connected")[0], 10)
        self.assertEqual(site.run(info.main, "--is", "connected", "-g", "0")[0], 3)

    def test_several(self) -> None:
        site = self.site()
        for number in (0, 2):
            site.paths.group_config(number).write_text("nonsense = 1\n")
        code, _, errors = site.run(info.main)
        self.assertEqual(code, 10)
        for number in range(3):
            self.assertIn(f"dsgrp00{number}.cfg", errors.splitlines()[number])


class SeveralFailuresTests(TestCase):
    """Every group that failed is told, not only the first."""

    def test_all_are_told(self) -> None:
        for name, command, device in (
            ("alpha", wlscan.main, "data"),
            ("alpha", wlscan.main, "log"),
            ("beta", wlscan.main, "mirror"),
            ("beta", rmdreco.main, "journal"),
        ):
            site = Site(self, name, groups=3, ldsus=1)
            site.initialise()
            for number in (0, 2):
                site.device(f"{device}{number}").unlink()
            code, output, errors = site.run(command)
            self.assertEqual(code, 1, errors)
            self.assertIn("dsgrp001", output)
            for number, line in zip((0, 2), errors.splitlines(), strict=True):
                self.assertIn(f"/{device}{number}", line)
            code, output, errors = site.run(command, "--json")
            self.assertEqual((code, errors), (1, ""))
            found = json.loads(output)
            self.assertEqual([one["group"] for one in found["groups"]], ["dsgrp001"])
            self.assertEqual(found["error"], found["errors"][0])
            self.assertEqual([one["code"] for one in found["errors"]], ["device", "device"])
            self.assertIn(f"/{device}2", found["errors"][1]["message"])
