"""The devices of an extension pool in qdswlinit, qdswlscan, qdslab, and at a launch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.config import load_group
from qdsmirror.errors import UsageError
from qdsmirror.limits import KIB, MIB
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice, read_extension
from qdsmirror.tools import lab, launch, wlinit, wlscan
from qdsmirror.tools.lab_plan import Plan
from qdsmirror.tools.lab_sites import Lab
from tests.tools.offline import Site
from tests.tools.sites import captured

SPARE = 256 * KIB


def pool_site(test: TestCase, spares: int = 2) -> Site:
    """Make a host whose group has a pool of devices that are yet to be initialised."""
    site = Site(test)
    for number in range(spares):
        site.make(f"pool{number}", SPARE)
    name_pool(site, spares)
    return site


def name_pool(site: Site, spares: int) -> None:
    devices = ", ".join(str(site.device(f"pool{number}")) for number in range(spares))
    path = site.paths.group_config(0)
    text = path.read_text().split("[pool]")[0]
    path.write_text(f"{text}\n[pool]\ndevices = {devices}\n")


def extension(site: Site, name: str) -> bytes:
    device = open_device(site.device(name), writable=False, exclusive=False)
    try:
        return read_extension(device).id
    finally:
        device.close()


class InitialiseTests(TestCase):
    def test_with_the_logs(self) -> None:
        site = pool_site(self)
        code, output, errors = site.run(wlinit.main)
        self.assertEqual((code, errors), (0, ""))
        line = f"dsgrp000: extension {site.device('pool1')} initialised, {SPARE} bytes"
        self.assertEqual(output.splitlines()[-1], line)
        self.assertNotEqual(extension(site, "pool0"), extension(site, "pool1"))
        # They hold something now.
        site.refused(wlinit.main, 1, "extension of dsgrp000", "already holds")
        self.assertEqual(site.run(wlinit.main, "--yes")[0], 0)

    def test_only_new_ones_while_the_driver_runs(self) -> None:
        site = pool_site(self)
        site.initialise()
        before = site.content()
        site.make("pool2", SPARE)
        name_pool(site, 3)
        with site.daemon("dsgrp000.driver"), site.locked("pool0"), site.locked("log0"):
            code, output, errors = site.run(wlinit.main, "--pool", "--json")
        self.assertEqual((code, errors), (0, ""))
        (made,) = json.loads(output)["initialised"]
        self.assertEqual((made["role"], made["device"]), ("extension", str(site.device("pool2"))))
        self.assertEqual({**site.content(), **before}, site.content())
        extension(site, "pool2")
        _, output, _ = site.run(wlinit.main, "--pool")
        self.assertEqual(output, "nothing new in the extension pools\n")

    def test_refused(self) -> None:
        site = pool_site(self)
        for words, change in (
            (("does not exist",), lambda: site.device("pool1").unlink()),
            (("pool1", "needs"), lambda: site.make("pool1", 16 * KIB)),
        ):
            change()
            site.refused(wlinit.main, 1, *words)
            site.refused(wlinit.main, 1, *words, argv=("--pool",))
        site.make("pool1", SPARE)
        with site.locked("pool1"):
            site.refused(wlinit.main, 1, "in use")
        site.put("pool1", 0x438, b"\x53\xef")
        site.refused(wlinit.main, 1, "pool1", "holds something", argv=("--pool",))
        os.remove(site.device("pool1"))
        os.link(site.device("log0"), site.device("pool1"))
        site.refused(wlinit.main, 1, "the same device")

    def test_at_the_secondary(self) -> None:
        site = pool_site(self)
        site.be("beta")
        site.refused(wlinit.main, 10, "not the primary", argv=("--pool",))


class ScanTests(TestCase):
    def test_an_extended_log(self) -> None:
        site = pool_site(self)
        site.initialise()
        with site.log("log0") as log:
            device = open_device(site.device("pool1"), writable=True)
            log.extend(PoolDevice.open(device, 0))
            device.close()
        code, output, errors = site.run(wlscan.main, "--check")
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("qds0", output)
        site.device("pool0").unlink()
        code, _, errors = site.run(wlscan.main, "--check")
        self.assertEqual(code, 0)
        self.assertIn("warning: ", errors)
        latch = site.latch("pool1")
        code, _, errors = site.run(wlscan.main, "--check")
        self.assertEqual(code, 1)
        self.assertIn(f"warning: extension {site.device('pool1')} has failed", errors)
        self.assertIn("missing", errors)
        latch.clear()
        site.device("pool1").unlink()
        code, _, errors = site.run(wlscan.main, "--check")
        self.assertEqual(code, 1)
        self.assertIn("missing", errors)
        # Nothing stays locked.
        with site.locked("log0"), site.locked("log1"):
            pass


class LaunchTests(TestCase):
    def test_a_missing_one_is_warned_of(self) -> None:
        site = pool_site(self)
        site.device("pool1").unlink()
        group = load_group(site.paths, 0)
        _, _, errors = captured(self, lambda _: launch._check_devices([group], "alpha") or 0)
        self.assertEqual(errors.count("warning: "), 1)
        self.assertIn("pool.devices", errors)


class LabTests(TestCase):
    def test_pool(self) -> None:
        place = Path(tempfile.mkdtemp(dir="/tmp")) / "lab"
        self.addCleanup(shutil.rmtree, place.parent)
        sizes = ["--size", "4M", "--writelog", "2M", "--journal", "3M"]
        pool = ["--groups", "2", "--pool", "3", "--pool-size", "1M"]
        self.assertEqual(captured(self, lab.main, "create", str(place), *sizes, *pool)[0], 0)
        made = Lab(place)
        seen = set()
        for number in range(2):
            group = load_group(made.paths["primary"], number)
            self.assertEqual(len(group.pool), 3)
            for path in group.pool:
                seen.add(path)
                self.assertEqual(os.stat(path).st_size, MIB)
                device = open_device(path, writable=False, exclusive=False)
                self.assertEqual(read_extension(device).group, number)
                device.close()
        self.assertEqual(len(seen), 6)

    def test_impossible(self) -> None:
        for plan in (Plan(pool=129), Plan(pool=-1), Plan(pool=1, pool_size=KIB)):
            error = self.assertRaises(UsageError, Lab("/tmp/qds-none").create, plan)
            self.assertIn("--pool", str(error))
