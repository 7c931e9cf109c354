"""qdsrmdreco: what it commits to the mirror devices, what it says of them, what it refuses."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core.frames import MARK, REFRESH, REFRESH_BEGIN, REFRESH_END, Entry
from qdsmirror.core.held import pack_mark
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.errors import EXIT_BROKEN, EXIT_DEGRADED, EXIT_USAGE
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.tools import wlscan
from qdsmirror.tools.rmdreco import main
from tests.storage.logworld import FrameMaker, append
from tests.tools.offline import LOG, Site, entry, json_error

GENERATION = b"G" * 16
REFRESH_ID = b"R" * 16


class RecoverTestCase(TestCase):
    groups = 1

    def setUp(self) -> None:
        self.site = Site(self, "beta", groups=self.groups)
        self.site.initialise()
        self.makers: list[FrameMaker] = []
        for number in range(self.groups):
            with self.site.log(f"journal{number}") as log:
                log.update(
                    both=True, generations=(Generation(GENERATION, 1),), coherent=True, reason=""
                )
            self.makers.append(FrameMaker(GENERATION))

    def fill(self, group: int = 0) -> list[int]:
        """Fill a journal with GSN 1 to 4; give the offsets of the frames."""
        make = self.makers[group].make
        frames = [
            make(0, [entry(0, 1, 1024), entry(4096, 2)]),
            make(1, [entry(512, 3)]),
            make(0, [entry(512, 4)]),
        ]
        return self.site.append(f"journal{group}", frames)

    def applied(self, names: Sequence[str] = ("mirror0", "mirror1")) -> None:
        """Check that what :meth:`fill` made is on the mirror devices."""
        content = self.site.content()
        first, second = (content[name] for name in names)
        self.assertEqual(first[:1024], b"\1" * 512 + b"\4" * 512)
        self.assertEqual(first[4096:4608], b"\2" * 512)
        self.assertEqual(second[512:1024], b"\3" * 512)

    def recover(self, *argv: str, code: int = 0) -> dict[str, Any]:
        got, output, errors = self.site.run(main, "--json", *argv)
        self.assertEqual((got, errors), (code, ""), output)
        told = json.loads(output)
        self.assertEqual(told.pop("schema"), 1)
        assert isinstance(told, dict)
        return told

    def durable_head(self, group: int = 0) -> None:
        """Record, as the rmd does, that all the journal holds is durable."""
        output = self.site.run(wlscan.main, "--json", "-g", str(group))[1]
        head = json.loads(output)["groups"][0]["logs"][0]["head"]
        with self.site.log(f"journal{group}") as log:
            log.update(both=True, head=Cursor(head, 5, {}))


class RecoverTests(RecoverTestCase):
    def test_replays(self) -> None:
        self.fill()
        code, output, errors = self.site.run(main)
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(
            output,
            "dsgrp000: 3 frames committed; the mirror stands at GSN 4 and is coherent\n",
        )
        self.applied()
        superblock = self.site.superblock("journal0")
        self.assertEqual(superblock.applied, superblock.tail)
        self.assertEqual((superblock.applied.gsn, superblock.durable_gsn), (5, 4))
        self.assertFalse(any(self.site.content()["data0"]))

    def test_nothing_to_do(self) -> None:
        self.fill()
        self.recover()
        mirrors = {name: c for name, c in self.site.content().items() if "mirror" in name}
        (again,) = self.recover()["groups"]
        self.assertEqual((again["frames"], again["gsn"], again["coherent"]), (0, 4, True))
        after = self.site.content()
        self.assertEqual({name: after[name] for name in mirrors}, mirrors)

    def test_blank_journal(self) -> None:
        self.site.initialise()
        code, output, errors = self.site.run(main)
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(
            output,
            "dsgrp000: 0 frames committed; the mirror stands at GSN 0 and is "
            "NOT coherent (never mirrored)\n",
        )

    def test_json(self) -> None:
        self.fill()
        self.assertEqual(
            self.recover(),
            {
                "groups": [
                    {
                        "group": "dsgrp000",
                        "frames": 3,
                        "gsn": 4,
                        "coherent": True,
                        "reason": "",
                        "generation": GENERATION.hex(),
                        "checkpoint": None,
                    }
                ]
            },
        )

    def test_a_checkpoint_is_passed_only_when_it_is_released(self) -> None:
        make = self.makers[0].make
        frames = [
            make(0, [entry(0, 1, 1024), entry(4096, 2)]),
            make(1, [entry(512, 3)]),
            make(0, [entry(512, 4)]),
            make(0, kind=MARK, control=pack_mark("nightly")),
            make(1, [entry(0, 9)]),
        ]
        self.site.append("journal0", frames)
        code, output, _ = self.site.run(main)
        self.assertEqual(code, 0)
        self.assertIn("4 frames committed; the mirror stands at GSN 5", output)
        self.assertIn("checkpoint nightly holds there", output)
        self.applied()
        self.assertEqual(self.site.content()["mirror1"][:512], bytes(512))
        self.assertEqual(self.recover()["groups"][0]["frames"], 0)
        told = self.recover("--release")["groups"][0]
        self.assertEqual((told["frames"], told["gsn"], told["checkpoint"]), (1, 6, None))
        self.assertEqual(self.site.content()["mirror1"][:512], b"\11" * 512)

    def test_rolling_back_needs_consent_and_goes_with_nothing_else(self) -> None:
        for words in (
            ["--rollback"],
            ["--yes"],
            ["--dry-run"],
            ["--rollback", "--yes", "--release"],
        ):
            self.assertEqual(self.site.run(main, *words)[0], EXIT_USAGE, words)

    def test_nothing_to_roll_back(self) -> None:
        self.fill()
        before = self.site.content()
        for consent in ("--dry-run", "--yes"):
            code, _, errors = self.site.run(main, "--rollback", consent)
            self.assertEqual(code, EXIT_DEGRADED)
        self.assertIn("there is nothing to roll back", errors)
        self.assertEqual(self.site.content(), before)

    def test_no_before_images(self) -> None:
        with self.site.log("journal0") as log:
            log.update(both=True, coherent=False, reason="a refresh is in progress")
        code, _, errors = self.site.run(main, "--rollback", "--yes")
        self.assertEqual(code, EXIT_BROKEN)
        self.assertIn("no before-images (a refresh is in progress); make it anew", errors)

    def test_an_unfinished_refresh_is_told(self) -> None:
        make = self.makers[0].make
        begin = [
            make(0, kind=REFRESH_BEGIN, control=REFRESH_ID),
            make(0, [Entry(0, 512, REFRESH, b"\7" * 512)]),
        ]
        end = make(0, kind=REFRESH_END, control=REFRESH_ID)
        self.site.append("journal0", begin)
        code, output, _ = self.site.run(main)
        self.assertEqual(code, 0)
        self.assertIn("is NOT coherent (a refresh is in progress)", output)
        self.assertEqual(self.site.content()["mirror0"][:512], b"\7" * 512)
        with self.site.log("journal0") as log:
            append(log, end, control=True)
        (group,) = self.recover()["groups"]
        self.assertEqual((group["coherent"], group["frames"]), (True, 1))

    def test_torn_tail(self) -> None:
        self.site.put("journal0", self.fill()[2] + 300, b"\xee")
        (group,) = self.recover()["groups"]
        self.assertEqual((group["frames"], group["gsn"]), (2, 3))
        self.assertEqual(self.site.content()["mirror0"][512:1024], b"\1" * 512)

    def test_after_an_interruption(self) -> None:
        self.fill()
        pwritev = FileDevice.pwritev

        def failing(device: FileDevice, *args: Any) -> None:
            if device.path.endswith("mirror1"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), device.path)
            pwritev(device, *args)

        self.patch(FileDevice, "pwritev", failing)
        code, output, errors = self.site.run(main)
        self.assertEqual((code, output), (1, ""))
        self.assertIn(str(self.site.device("mirror1")), errors)
        self.assertEqual(self.site.superblock("journal0").applied.gsn, 1)
        self.patch(FileDevice, "pwritev", pwritev)
        self.assertEqual(self.recover()["groups"][0]["frames"], 3)
        self.applied()


class RefuseTests(RecoverTestCase):
    def test_corrupt_journal(self) -> None:
        offsets = self.fill()
        self.durable_head()
        self.site.put("journal0", offsets[1] + 300, b"\xee")
        code, output, errors = self.site.run(main)
        self.assertEqual((code, output), (4, ""))
        self.assertEqual(len(errors.splitlines()), 1)
        self.assertIn(str(self.site.device("journal0")), errors)
        self.assertIn("qdsrefresh --full", errors)
        self.assertEqual(self.site.superblock("journal0").applied.gsn, 1)
        code, output, _ = self.site.run(main, "--json")
        self.assertEqual(code, 4)
        self.assertEqual(json_error(self, output)["code"], "corrupt")

    def test_a_superblock_of_an_earlier_turn(self) -> None:
        self.fill()
        with self.site.log("journal0") as log:
            log.head = log.durable_tail = log.ring.size
            append(log, self.makers[0].make(0, [entry(0, 9)]))
        self.site.refused(
            main, 4, str(self.site.device("journal0")), "is of a time before", "qdsrefresh --full"
        )

    def test_damaged_superblocks(self) -> None:
        for offset in (0, self.site.superblock("journal0").slot_bytes):
            self.site.put("journal0", offset + 100, b"\xee")
        self.site.refused(main, 4, str(self.site.device("journal0")), "no intact log")

    def test_not_initialised(self) -> None:
        self.site.device("journal0").unlink()
        self.site.make("journal0", LOG)
        self.site.refused(main, 4, str(self.site.device("journal0")), "qdswlinit")

    def test_a_mirror_of_another_size(self) -> None:
        self.fill()
        self.site.make("mirror1", 128 * 1024)
        self.site.refused(main, 10, str(self.site.device("mirror1")), "131072", "65536")

    def test_beside_a_live_rmd(self) -> None:
        self.fill()
        with self.site.daemon("dsgrp000.rmd"):
            self.site.refused(main, 1, str(os.getpid()), "killrmds")
        for name in ("journal0", "mirror1"):
            with self.site.locked(name):
                self.site.refused(main, 1, f"{self.site.device(name)} is in use")
        self.assertEqual(self.recover()["groups"][0]["frames"], 3)

    def test_holds_the_journal_meanwhile(self) -> None:
        self.fill()
        seen: list[tuple[int, str]] = []
        fdatasync = FileDevice.fdatasync

        def during(device: FileDevice) -> None:
            if device.path.endswith("mirror0") and not seen:
                seen.append((0, ""))
                code, _, errors = self.site.run(main)
                seen[0] = (code, errors)
            fdatasync(device)

        self.patch(FileDevice, "fdatasync", during)
        self.recover()
        self.assertEqual(seen[0][0], 1)
        self.assertIn(f"{self.site.device('journal0')} is in use", seen[0][1])

    def test_not_the_secondary(self) -> None:
        self.fill()
        self.site.be("alpha")
        self.site.refused(main, 10, "alpha is not the secondary", "secondary")

    def test_unknown_group_or_ldsu(self) -> None:
        self.site.refused(main, 2, "dsgrp007", argv=["-g", "7"])
        self.site.refused(main, 2, "'qsd0'", "qds0", argv=["qsd0"])

    def test_a_failed_sync_is_remembered(self) -> None:
        self.fill()
        failing = str(self.site.device("mirror1"))
        with self.site.failing_sync("mirror1"):
            code, _, errors = self.site.run(main)
        self.assertEqual(code, 1)
        self.assertIn(failing, errors)
        self.site.refused(main, 4, failing, "has failed")

    def test_a_failed_device(self) -> None:
        self.fill()
        for name in ("journal0", "mirror1"):
            latch = self.site.latch(name)
            self.site.refused(main, 4, str(self.site.device(name)), "has failed")
            latch.clear()


class SeveralTests(RecoverTestCase):
    groups = 2

    def test_all(self) -> None:
        self.fill(0)
        self.fill(1)
        self.assertEqual([one["gsn"] for one in self.recover()["groups"]], [4, 4])
        self.applied()
        self.applied(("mirror2", "mirror3"))

    def test_only_what_is_selected(self) -> None:
        self.fill(0)
        self.fill(1)
        with self.site.locked("journal0"), self.site.daemon("dsgrp000.rmd"):
            (group,) = self.recover("qds2")["groups"]
        self.assertEqual(group["group"], "dsgrp001")
        self.assertFalse(any(self.site.content()["mirror0"]))

    def test_one_refused_does_not_keep_the_others(self) -> None:
        offsets = self.fill(0)
        self.durable_head(0)
        self.site.put("journal0", offsets[0] + 300, b"\xee")
        self.fill(1)
        code, output, errors = self.site.run(main)
        self.assertEqual(code, 4)
        self.assertIn("dsgrp001: 3 frames committed", output)
        self.assertNotIn("dsgrp000", output)
        self.assertEqual(len(errors.splitlines()), 1)
        self.assertIn(str(self.site.device("journal0")), errors)
        self.applied(("mirror2", "mirror3"))
        told = self.recover(code=4)
        self.assertEqual([one["group"] for one in told["groups"]], ["dsgrp001"])
        self.assertEqual(told["error"]["code"], "corrupt")
        self.assertIn(str(self.site.device("journal0")), told["error"]["message"])

    def test_the_first_groups_failure_is_the_exit_status(self) -> None:
        offsets = [self.fill(0), self.fill(1)]
        pwritev = FileDevice.pwritev
        for corrupt, unwritable, expected in ((0, "mirror2", 4), (1, "mirror0", 1)):
            self.durable_head(corrupt)
            at = offsets[corrupt][0] + 300
            whole = self.site.device(f"journal{corrupt}").read_bytes()[at : at + 1]
            self.site.put(f"journal{corrupt}", at, b"\xee")

            def failing(device: FileDevice, *args: Any, name: str = unwritable) -> None:
                if device.path.endswith(name):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                pwritev(device, *args)

            self.patch(FileDevice, "pwritev", failing)
            code, output, errors = self.site.run(main)
            self.patch(FileDevice, "pwritev", pwritev)
            self.assertEqual((code, output, len(errors.splitlines())), (expected, "", 2))
            self.site.put(f"journal{corrupt}", at, whole)

    def test_a_device_that_cannot_be_written_does_not_either(self) -> None:
        self.fill(0)
        self.fill(1)
        pwritev = FileDevice.pwritev

        def failing(device: FileDevice, *args: Any) -> None:
            if device.path.endswith("mirror0"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            pwritev(device, *args)

        self.patch(FileDevice, "pwritev", failing)
        code, output, errors = self.site.run(main)
        self.assertEqual(code, 1)
        self.assertIn("dsgrp001: 3 frames committed", output)
        self.assertIn("dsgrp000: Input/output error", errors)
