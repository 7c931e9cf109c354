"""qdswlinit and qdswlscan where writelogs are in memory: the bitmap device is all that they see."""

from __future__ import annotations

import json

from twisted.trial.unittest import TestCase

from qdsmirror.config import load_group
from qdsmirror.core.superblock import RingMemory
from qdsmirror.limits import KIB, MIB
from qdsmirror.storage.bitmap import load_bitmap, write_blocks
from qdsmirror.storage.device import open_device
from qdsmirror.storage.memory import absent_memory, open_memory_log
from qdsmirror.storage.recovery import close_units, open_units
from qdsmirror.storage.writelog import Writelog
from qdsmirror.tools import wlinit, wlscan
from tests.tools.offline import Site


class MemoryLogTests(TestCase):
    def setUp(self) -> None:
        self.site = Site(self, ldsus=2)
        path = self.site.paths.group_config(0)
        text = path.read_text()
        for number in range(2):
            log, bitmap = self.site.device(f"log{number}"), self.site.device(f"bitmap{number}")
            new = f"memory:1M\n  bitmap_device = {bitmap}"
            text = text.replace(f"writelog_device = {log}", f"writelog_device = {new}")
            self.site.make(f"bitmap{number}", 64 * KIB)
        path.write_text(text)

    def test_initialised(self) -> None:
        before = self.site.content()
        code, output, errors = self.site.run(wlinit.main, "--json")
        self.assertEqual((code, errors), (0, f"{self.warning(0)}{self.warning(1)}"))
        for number, made in enumerate(json.loads(output)["initialised"]):
            self.assertEqual(made["device"], str(self.site.device(f"bitmap{number}")))
            self.assertEqual(made["memory_bytes"], MIB)
            superblock = self.site.superblock(f"bitmap{number}")
            self.assertEqual(superblock.memory, RingMemory())
            self.assertEqual(superblock.ring.size, MIB - 4 * KIB)
        after = self.site.content()
        changed = {name for name in after if after[name] != before[name]}
        self.assertEqual(changed, {"bitmap0", "bitmap1"})

    def warning(self, number: int) -> str:
        told = f"warning: writelog memory:1M of qds{number} has only {MIB} bytes"
        return f"{told}; 2097152 or more are advised\n"

    def test_used_and_too_small(self) -> None:
        self.assertEqual(self.site.run(wlinit.main)[0], 0)
        code, _, errors = self.site.run(wlinit.main)
        self.assertNotEqual(code, 0)
        self.assertIn("bitmap device of qds0", errors)
        self.assertIn("already holds a writelog", errors)
        self.assertEqual(self.site.run(wlinit.main, "--yes")[0], 0)
        self.site.device("bitmap1").unlink()
        self.site.make("bitmap1", 16 * KIB)
        code, _, errors = self.site.run(wlinit.main, "--yes")
        self.assertNotEqual(code, 0)
        self.assertIn("needs 20480 bytes at least", errors)

    def test_one_bitmap_device_for_both(self) -> None:
        path = self.site.paths.group_config(0)
        one, other = (str(self.site.device(f"bitmap{number}")) for number in range(2))
        path.write_text(path.read_text().replace(other, one))
        self.assertEqual(self.site.run(wlinit.main)[0], 0)
        group = load_group(self.site.paths, 0)
        units = open_units(group, open_device)
        names = [unit.writelog.superblock.units[0].name for unit in units]
        close_units(units)
        self.assertEqual(names, ["qds0", "qds1"])

    def test_scanned(self) -> None:
        self.site.run(wlinit.main)
        code, output, _ = self.site.run(wlscan.main, "--check", "--json")
        self.assertEqual(code, 0)
        for log in json.loads(output)["groups"][0]["logs"]:
            self.assertEqual(
                (log["memory_bytes"], log["lost"], log["dirty_bytes"]), (MIB, False, 0)
            )
        self.use()
        before = self.site.content()
        code, output, _ = self.site.run(wlscan.main, "--check")
        self.assertEqual(code, 0)
        self.assertIn("1 MiB in memory, held by the driver's master, lost if that has", output)
        self.assertIn("64 KiB dirty", output)
        self.assertIn("1 MiB in memory, empty; 0 B dirty", output)
        self.assertEqual(self.site.content(), before)

    def use(self) -> None:
        """Let the first log have had memory, and something that it may not have sent."""
        ldsu = load_group(self.site.paths, 0).ldsus[0]
        device = open_device(ldsu.bitmap_device, writable=True, role="writelog")
        log = Writelog.open(open_memory_log(device, ldsu, absent_memory))
        log.update(both=True, memory=RingMemory("ab" * 16, 1))
        dirty, _ = load_bitmap(device, log.superblock)
        write_blocks(device, dirty.area, dirty.blocks(dirty.mark([(0, 512)])))
        device.close()

    def test_refused_where_the_configuration_was_changed(self) -> None:
        self.site.run(wlinit.main)
        path = self.site.paths.group_config(0)
        path.write_text(path.read_text().replace("memory:1M", "memory:2M"))
        code, _, errors = self.site.run(wlscan.main, "--check")
        self.assertNotEqual(code, 0)
        self.assertIn("was not initialised as the bitmap device of qds0 with memory:2M", errors)
