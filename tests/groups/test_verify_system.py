"""A verify between both sites: no false alarm, every difference found, what is found mended."""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror.errors import DegradedError
from tests.groups.site import Sites
from tests.groups.world import BLOCK, KIB, MIB, unique

Steps = Generator[Deferred[Any], Any, None]
CHUNK = 64 * KIB


class VerifySites(Sites):
    """Two sites with a mirror that is equal."""

    @inlineCallbacks
    def mirrored(self) -> Steps:
        for index in range(self.ldsus):
            (self.base / f"data{index}").write_bytes(
                b"".join(unique(10**6 * (index + 1) + n) for n in range(self.size // BLOCK))
            )
        yield self.start()
        yield self.connected()
        yield self.refresh()

    def damage(self, index: int, offset: int, length: int = 1) -> None:
        """Write to a mirror device behind everybody's back."""
        with (self.base / f"mirror{index}").open("r+b") as file:
            file.seek(offset)
            was = file.read(length)
            file.seek(offset)
            file.write(bytes(one ^ 0xFF for one in was))

    @inlineCallbacks
    def verify(self, how: str = "compare") -> Steps:
        """Verify to the end; fires with the status then."""
        assert self.driver is not None
        yield self.driver.verify(how)
        yield self.ended()
        return self.status()

    def ended(self) -> Any:
        return self.until(lambda: self.status()["phase"] == "over", "the verify to end")

    def status(self) -> Any:
        assert self.driver is not None
        return self.driver.status()["verify"]

    def scribble(self, number: int) -> None:
        self.write(number % self.ldsus, number * 7 * BLOCK % self.size, unique(number))


class VerifyTests(TestCase):
    timeout = 300

    @inlineCallbacks
    def test_an_equal_mirror_is_found_equal_while_writes_go_on(self) -> Steps:
        sites = VerifySites(self, size=4 * MIB, writelog=8 * MIB, journal=8 * MIB)
        yield sites.mirrored()
        self.assertIsNone(sites.status())
        yield sites.driver.verify("compare")  # type: ignore[union-attr]
        number = 0
        while sites.status()["phase"] != "over":
            for _ in range(3):
                number += 1
                sites.scribble(number)
            yield sites.until(lambda: True, "a turn")
        status = sites.status()
        self.assertEqual((status["result"], status["differing_bytes"]), ("equal", 0))
        self.assertEqual((status["done_bytes"], status["remaining_bytes"]), (8 * MIB, 0))
        self.assertGreater(number, 10)
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(sites.rmd.status()["coherent"])  # type: ignore[union-attr]

    @inlineCallbacks
    def test_differences_are_found_told_and_mended(self) -> Steps:
        sites = VerifySites(self, size=2 * MIB)
        yield sites.mirrored()
        sites.damage(0, 70_000)
        sites.damage(1, 2 * MIB - 1)
        sites.damage(1, MIB, 2 * CHUNK)
        status = yield sites.verify()
        driver, rmd = sites.driver, sites.rmd
        assert driver is not None and rmd is not None
        self.assertEqual(status["result"], "differs")
        self.assertEqual(status["differing_bytes"], 4 * CHUNK)
        self.assertEqual(
            status["differing"],
            [
                {"ldsu": "qds0", "offset": CHUNK, "length": CHUNK},
                {"ldsu": "qds1", "offset": MIB, "length": 2 * CHUNK},
                {"ldsu": "qds1", "offset": 2 * MIB - CHUNK, "length": CHUNK},
            ],
        )
        for group in (driver, rmd):
            said = group.status()
            self.assertFalse(said["coherent"])
            self.assertIn("the mirror of qds0 differs (bytes 65536 to 131071)", said["reason"])
        mended = yield sites.verify("repair")
        self.assertEqual((mended["result"], mended["repaired_bytes"]), ("equal", 4 * CHUNK))
        self.assertEqual(mended["last"]["result"], "differs")
        yield sites.drained()
        sites.assert_equal()
        for group in (driver, rmd):
            self.assertEqual((group.status()["coherent"], group.status()["reason"]), (True, ""))

    @inlineCallbacks
    def test_a_dirty_refresh_mends_what_was_found(self) -> Steps:
        sites = VerifySites(self)
        yield sites.mirrored()
        sites.damage(1, 3 * CHUNK)
        yield sites.verify()
        driver = sites.driver
        assert driver is not None
        begun = yield driver.refresh("auto")
        self.assertEqual((begun["kind"], begun["remaining_bytes"]), ("dirty", CHUNK))
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_what_is_found_stays_known_after_restarts(self) -> Steps:
        sites = VerifySites(self)
        yield sites.mirrored()
        sites.damage(0, 0)
        found = yield sites.verify()
        for stop, start in (
            (sites.stop_driver, sites.start_driver),
            (sites.stop_rmd, sites.start_rmd),
        ):
            yield stop()
            yield start()
            yield sites.connected()
            self.assertFalse(sites.rmd.status()["coherent"])  # type: ignore[union-attr]
            self.assertFalse(sites.driver.coherent)  # type: ignore[union-attr]
            again = sites.status()
            for name in ("result", "differing", "differing_bytes", "finished", "id"):
                self.assertEqual(again[name], found[name])
        mended = yield sites.verify("repair")
        self.assertEqual(mended["result"], "equal")
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_link_and_daemons_may_come_and_go(self) -> Steps:
        sites = VerifySites(self, size=8 * MIB, writelog=16 * MIB, tunables="verify_rate = 8M")
        yield sites.mirrored()
        sites.damage(1, 5 * MIB)
        chooser = random.Random(3)
        yield sites.driver.verify("compare")  # type: ignore[union-attr]
        identity = sites.status()["id"]
        for number, (stop, start) in enumerate(
            (
                (sites.stop_rmd, sites.start_rmd),
                (sites.stop_pmd, sites.start_pmd),
                (sites.stop_driver, sites.start_driver),
            )
        ):
            before = sites.status()["remaining_bytes"]
            yield sites.until(
                lambda before=before: sites.status()["remaining_bytes"] < before, "progress"
            )
            sites.scribble(number)
            sites.cable.budget = chooser.randrange(3000)
            yield sites.until(lambda: sites.cable.budget is None, "a cut")
            yield sites.connected()
            self.assertEqual(sites.status()["phase"], "compare")
            yield stop()
            yield start()
            yield sites.connected()
        yield sites.ended()
        status = sites.status()
        self.assertEqual(status["id"], identity)
        self.assertEqual(
            status["differing"], [{"ldsu": "qds1", "offset": 5 * MIB, "length": CHUNK}]
        )

    @inlineCallbacks
    def test_what_the_link_lost_is_told_on_the_next_one(self) -> None:
        sites = VerifySites(self)
        yield sites.mirrored()
        sites.damage(1, 3 * CHUNK)
        driver, rmd = sites.driver, sites.rmd
        assert driver is not None and rmd is not None
        report = rmd.report
        rmd.report = lambda _: None  # type: ignore[method-assign]
        yield driver.verify("compare")
        yield sites.until(lambda: not rmd.status()["coherent"], "the secondary to find it")
        yield driver.verify("stop")
        self.assertTrue(driver.coherent)
        rmd.report = report  # type: ignore[method-assign]
        sites.cable.cut()
        yield sites.until(lambda: not driver.coherent, "the driver to be told")
        self.assertEqual(driver.units[1].dirty.dirty_bytes(), CHUNK)
        yield driver.refresh("auto")
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(rmd.status()["coherent"])

    @inlineCallbacks
    def test_a_sparse_device_costs_little(self) -> Steps:
        sites = VerifySites(self, size=64 * MIB)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        sites.write(0, 9 * MIB, unique(1))
        sites.damage(1, 33 * MIB)
        yield sites.drained()
        before = sites.driver.next_gsn  # type: ignore[union-attr]
        status = yield sites.verify()
        self.assertLess(sites.driver.next_gsn - before, 40)  # type: ignore[union-attr]
        self.assertEqual(
            status["differing"], [{"ldsu": "qds1", "offset": 33 * MIB, "length": CHUNK}]
        )

    @inlineCallbacks
    def test_what_cannot_be_read_at_the_secondary_differs(self) -> Steps:
        sites = VerifySites(self)
        yield sites.mirrored()
        device = sites.rmd.mirror.devices[0]  # type: ignore[union-attr]
        pread = device.pread

        def failing(length: int, offset: int) -> bytes:
            if offset == 2 * CHUNK:
                raise OSError(5, "Input/output error")
            return pread(length, offset)

        device.pread = failing
        status = yield sites.verify()
        self.assertEqual(
            status["differing"], [{"ldsu": "qds0", "offset": 2 * CHUNK, "length": CHUNK}]
        )

    @inlineCallbacks
    def test_a_refresh_ends_it_and_it_does_not_begin_beside_one(self) -> Steps:
        sites = VerifySites(self, size=4 * MIB, tunables="verify_rate = 64K")
        yield sites.mirrored()
        driver = sites.driver
        assert driver is not None
        yield driver.verify("compare")
        yield driver.refresh("full")
        error = self.assertRaises(DegradedError, driver.verify, "repair")
        self.assertIn("a refresh is in progress", error.message)
        yield sites.ended()
        self.assertEqual(
            (sites.status()["result"], sites.status()["reason"]),
            ("ended", "a refresh is in progress"),
        )
        yield sites.until(lambda: driver.coherent, "the refresh to end")
