from __future__ import annotations

import os
import shutil
import subprocess
import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.core.superblock import SLOT_BYTES, SUPER_MAGIC
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice
from qdsmirror.storage.probe import probe_signature
from tests.fakes import MemoryDevice
from tests.storage.test_device import make_file

MIB = 1 << 20
OWN_SLOT = SUPER_MAGIC + b"\0\1"
MD = bytes.fromhex("fc4e2ba9")


def device(*pieces: tuple[int, bytes], size: int = MIB, sector: int = 512) -> MemoryDevice:
    made = MemoryDevice(size, logical_block=sector)
    for offset, data in pieces:
        made.pwritev([data], offset % size)
    return made


def ext(compatible: int, incompatible: int, read_only: int) -> tuple[int, bytes]:
    features = b"".join(
        number.to_bytes(4, "little") for number in (compatible, incompatible, read_only)
    )
    return 1024 + 56, b"\x53\xef" + bytes(0x5C - 58) + features


def boot_sector(*entries: bytes, start: bytes = b"") -> tuple[int, bytes]:
    table = b"".join(entries).ljust(64, b"\0")
    return 0, start.ljust(446, b"\0") + table + b"\x55\xaa"


PARTITION = bytes.fromhex("80202100 83aa2882 00080000 00780000")
FAT_BOOT = b"\xeb\x3c\x90mkfs.any" + bytes.fromhex("0002 04 0400 02 0002 0080 f8 2000")


class HandMadeTests(TestCase):
    """Headers that no program on the machine may be able to make."""

    def expect(self, name: str | None, made: MemoryDevice) -> None:
        self.assertEqual(probe_signature(made), name)

    def test_empty(self) -> None:
        for size in (512, 4096, 65536, 150 * 1024, MIB):
            self.expect(None, device(size=size))
            self.expect(None, MemoryDevice(size, content=b"\xff" * size))

    def test_ext(self) -> None:
        self.expect("ext2", device(ext(0x38, 0x02, 0x03)))
        self.expect("ext3", device(ext(0x3C, 0x02, 0x03)))
        self.expect("ext4", device(ext(0x3C, 0x2C2, 0x6B)))
        self.expect("ext4", device(ext(0x38, 0x02, 0x10)))
        self.expect("ext4", device(ext(0x3C, 0x42, 0x03)))

    def test_volumes_and_encryption(self) -> None:
        for sector in range(4):
            label = b"LABELONE" + bytes(16) + b"LVM2 001"
            self.expect("LVM2 PV", device((512 * sector, label)))
        self.expect(None, device((512, b"LABELONE" + bytes(16) + b"LVM1 001")))
        self.expect("LUKS", device((0, b"LUKS\xba\xbe\0\2")))
        self.expect("LUKS", device((16384, b"SKUL\xba\xbe\0\2")))

    def test_md_raid(self) -> None:
        self.expect("md RAID 1.1", device((0, MD)))
        self.expect("md RAID 1.2", device((4096, MD)))
        self.expect("md RAID 1.0", device((-8192, MD)))
        self.expect("md RAID 0.90", device((-65536, MD)))
        self.expect("md RAID 0.90", device((-65536, MD[::-1])))
        odd = MIB + 5 * 512
        self.expect("md RAID 1.0", device((MIB + 5 * 512 - 8192 - 2560, MD), size=odd))
        self.expect("md RAID 0.90", device((MIB - 65536, MD), size=odd))

    def test_file_systems(self) -> None:
        self.expect("xfs", device((0, b"XFSB")))
        self.expect("btrfs", device((0x10040, b"_BHRfS_M")))
        self.expect("f2fs", device((1024, bytes.fromhex("1020f5f2"))))
        self.expect("ISO9660", device((32769, b"CD001")))
        self.expect("UDF", device((32769, b"BEA01")))
        self.expect("ntfs", device(boot_sector(start=b"\xeb\x52\x90NTFS    ")))
        self.expect("exfat", device(boot_sector(start=b"\xeb\x76\x90EXFAT   ")))
        self.expect("vfat", device((0x52, b"FAT32   ")))
        self.expect("vfat", device((0x36, b"FAT16   ")))
        self.expect("vfat", device(boot_sector(start=FAT_BOOT)))

    def test_zfs(self) -> None:
        mark = (0x00BAB10C).to_bytes(8, "little")
        self.expect("zfs", device((128 * 1024 + 5 * 1024, mark)))
        self.expect("zfs", device((128 * 1024, mark[::-1])))
        self.expect("zfs", device((MIB - 128 * 1024, mark), size=MIB + 3 * 4096))

    def test_caches_and_drbd(self) -> None:
        bcache = uuid.UUID("c68573f6-4e1a-45ca-8265-f57f48ba6d81").bytes
        bcachefs = uuid.UUID("c68573f6-66ce-90a9-d96a-60cf803df7ef").bytes
        self.expect("bcache", device((4096 + 24, bcache)))
        self.expect("bcachefs", device((4096 + 24, bcachefs)))
        self.expect("DRBD", device((-4096 + 60, bytes.fromhex("8374026b"))))
        self.expect("DRBD", device((MIB - 4096 + 52, bytes.fromhex("8374026d")), size=MIB + 512))

    def test_swap(self) -> None:
        for page in (4096, 16384, 65536):
            self.expect("swap", device((page - 10, b"SWAPSPACE2")))
        self.expect("swap (a suspended system)", device((4086, b"S1SUSPEND\0")))

    def test_partition_tables(self) -> None:
        self.expect("GPT", device((512, b"EFI PART"), boot_sector(PARTITION)))
        self.expect("GPT", device((4096, b"EFI PART"), sector=4096))
        self.expect("GPT (its backup)", device((-512, b"EFI PART")))
        self.expect("MBR partition table", device(boot_sector(PARTITION)))
        self.expect(None, device(boot_sector()))
        self.expect(None, device(boot_sector(b"\x17" + PARTITION[1:])))

    def test_own(self) -> None:
        self.expect("qdsmirror", device((0, OWN_SLOT)))
        for place in SLOT_BYTES:
            self.expect("qdsmirror", device((place, OWN_SLOT)))

    def test_own_extension(self) -> None:
        made = MemoryDevice(MIB)
        header = PoolDevice.initialise(made, 0).header
        self.expect("qdsmirror", made)
        made.corrupt(0, bytes(header.slot_bytes))
        self.expect("qdsmirror", made)

    def test_own_payloads_may_look_like_anything(self) -> None:
        self.expect("qdsmirror", device((0, OWN_SLOT), (0x10040, b"_BHRfS_M")))

    def test_a_file_system_over_the_rest_of_a_log(self) -> None:
        self.expect("ext4", device(ext(0x3C, 0x2C2, 0x6B), (SLOT_BYTES[0], OWN_SLOT)))

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 600), st.binary(max_size=600))
    def test_any_size_and_content(self, sectors: int, content: bytes) -> None:
        made = device((0, content[: sectors * 512]), size=sectors * 512)
        self.assertIsInstance(probe_signature(made), (str, type(None)))


class RealTests(TestCase):
    """What real programs make, in a file."""

    def expect(self, name: str, *command: str, size: int = 16 * MIB, text: str = "") -> None:
        if shutil.which(command[0]) is None:
            raise SkipTest(f"{command[0]} is missing")
        path = make_file(self, size)
        made = subprocess.run([*command, path], input=text, capture_output=True, text=True)
        self.assertEqual(made.returncode, 0, made.stderr)
        opened = open_device(path, writable=False)
        self.addCleanup(opened.close)
        self.assertEqual(probe_signature(opened), name)

    def test_ext4(self) -> None:
        self.expect("ext4", "mkfs.ext4", "-q")

    def test_ext3(self) -> None:
        self.expect("ext3", "mkfs.ext3", "-q")

    def test_ext2(self) -> None:
        self.expect("ext2", "mkfs.ext2", "-q")

    def test_xfs(self) -> None:
        self.expect("xfs", "mkfs.xfs", "-q", size=320 * MIB)

    def test_swap(self) -> None:
        self.expect("swap", "mkswap")

    def test_gpt(self) -> None:
        self.expect("GPT", "sfdisk", "-q", text="label: gpt\n,\n")

    def test_mbr(self) -> None:
        self.expect("MBR partition table", "sfdisk", "-q", text="label: dos\n,\n")

    def test_vfat(self) -> None:
        self.expect("vfat", "mkfs.vfat")

    def test_btrfs(self) -> None:
        self.expect("btrfs", "mkfs.btrfs", "-q", size=160 * MIB)

    def test_ntfs(self) -> None:
        self.expect("ntfs", "mkfs.ntfs", "-q", "-F")

    def test_nothing_is_written(self) -> None:
        path = make_file(self)
        before = os.stat(path).st_mtime_ns
        opened = open_device(path, writable=False)
        self.addCleanup(opened.close)
        probe_signature(opened)
        self.assertEqual(os.stat(path).st_mtime_ns, before)
