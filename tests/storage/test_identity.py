"""What a device is under any path: from a made-up /sys and /dev, and from a real file."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import BoundUnit
from qdsmirror.core.superblock import slot_bytes_for
from qdsmirror.storage import identity, ioctl
from qdsmirror.storage.identity import is_same, stable_identity
from tests.storage.test_device import make_file, make_loop


class BlockIdentityTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.base)
        self.patch(identity, "_SYS_BLOCK", self.base / "numbers")
        self.patch(identity, "_BY_ID", self.base / "by-id")
        (self.base / "numbers").mkdir()
        (self.base / "by-id").mkdir()

    def disk(self, name: str, number: str, **attributes: str) -> Path:
        directory = self.base / name
        directory.mkdir(parents=True)
        (directory / "dev").write_text(number + "\n")
        for attribute, text in attributes.items():
            place = directory / attribute.replace("__", "/")
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
        (self.base / "numbers" / number).symlink_to(directory)
        return directory

    def of(self, number: str) -> str:
        major, minor = map(int, number.split(":"))
        return identity._shortened(identity._block_identity(os.makedev(major, minor)))

    def test_device_mapper(self) -> None:
        self.disk("dm-0", "253:0", dm__uuid="LVM-" + "x" * 64 + "\n")
        self.assertEqual(self.of("253:0"), "dm:LVM-" + "x" * 64)

    def test_disk_with_wwid_and_serial(self) -> None:
        self.disk("sda", "8:0", device__wwid="t10.ATA     QEMU  7 \n", serial="AB 12\0\n")
        self.assertEqual(self.of("8:0"), "wwid:t10.ATA_QEMU_7 serial:AB_12")

    def test_partition(self) -> None:
        self.disk("nvme0n1", "259:0", wwid="eui.00253\n")
        self.disk("nvme0n1/p2", "259:2", partition="2\n")
        self.assertEqual(self.of("259:2"), "wwid:eui.00253-part2")

    def test_a_name_of_udev_where_the_kernel_has_none(self) -> None:
        self.disk("sdb", "8:16")
        for name in ("usb-b", "usb-a", "usb-other"):
            (self.base / "by-id" / name).touch()
        stated = os.stat

        def see(path: str | os.PathLike[str]) -> object:
            name = Path(path).name
            if name in ("usb-a", "usb-b"):
                return SimpleNamespace(st_rdev=os.makedev(8, 16), st_mode=stat.S_IFBLK)
            return stated(path)

        self.patch(os, "stat", see)
        self.assertEqual(self.of("8:16"), "by-id:usb-a")

    def test_nothing_known(self) -> None:
        self.disk("sdc", "8:32")
        self.assertEqual(self.of("8:32"), "")
        self.assertEqual(self.of("8:48"), "")

    def test_bounded_by_whole_words(self) -> None:
        self.disk("sdd", "8:64", wwid="w" * 60, serial="s" * 60)
        self.assertEqual(self.of("8:64"), "wwid:" + "w" * 60)
        # A superblock has room for one of each LDSU.
        units = [BoundUnit(n, f"qds{n}", 1 << 44, "/dev/x" * 6, "w" * 100) for n in range(256)]
        room = slot_bytes_for(len(units), 1 << 30, 4096)
        self.assertLess(sum(len(str(unit.to_json())) for unit in units), room // 2)


class FileIdentityTests(SynchronousTestCase):
    def identity(self, path: str) -> str:
        with open(path, "rb") as file:
            return stable_identity(file.fileno())

    def test_by_inode_where_that_lasts(self) -> None:
        path = make_file(self)
        self.patch(identity, "file_system_of", lambda _: "ext4")
        found = self.identity(path)
        self.assertEqual(found, f"ext4:{os.stat(path).st_ino}")
        os.rename(path, path + "2")
        self.assertEqual(self.identity(path + "2"), found)

    def test_not_where_it_does_not(self) -> None:
        path = make_file(self)
        for kind in ("tmpfs", "overlay", "nfs4", ""):
            self.patch(identity, "file_system_of", lambda _, kind=kind: kind)
            self.assertEqual(self.identity(path), "")

    def test_the_file_system_of_this_directory_is_known(self) -> None:
        self.assertNotEqual(identity.file_system_of(os.stat("/proc").st_dev), "")

    def test_a_loop_device_is_its_file(self) -> None:
        path = make_file(self)
        loop = make_loop(self, path)
        self.assertEqual(self.identity(loop), self.identity(path))

    def test_a_loop_device_of_a_part_is_a_block_device(self) -> None:
        path = make_file(self)
        self.patch(ioctl, "loop_backing", lambda _: None)
        self.patch(identity, "_block_identity", lambda _: "serial:1")
        status = os.stat(path)
        block = SimpleNamespace(st_mode=stat.S_IFBLK, st_rdev=1, st_dev=status.st_dev, st_ino=1)
        self.patch(os, "fstat", lambda _: block)
        self.assertEqual(stable_identity(0), "serial:1")


class SameTests(SynchronousTestCase):
    def test_by_the_surest_word_of_both(self) -> None:
        for one, other, same in (
            ("wwid:1 serial:A", "wwid:1 serial:A", True),
            ("wwid:1 serial:A", "wwid:2 serial:A", False),
            ("serial:A", "wwid:2 serial:A", True),
            ("wwid:2 serial:A", "serial:A", True),
            ("serial:A", "serial:B", False),
            ("by-id:x", "serial:A", False),
            ("", "serial:A", False),
            ("wwid:naa.5:6", "wwid:naa.5:6", True),
        ):
            self.assertEqual(is_same(one, other), same, (one, other))
