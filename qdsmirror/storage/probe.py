"""Recognise what a device already holds, so that nobody's data is overwritten (security.md 7).

Offsets and magic numbers are those of the formats' own on-disk headers (linux/fs, lvm2, mdadm,
cryptsetup, UEFI 2.10 section 5.3, ECMA-119, OpenZFS).  A signature is a hint, not a
proof: checksums are not verified, since a damaged file system is somebody's data too.
"""

from __future__ import annotations

from collections.abc import Callable

from qdsmirror.core.extension import EXTENSION_MAGIC, EXTENSION_SLOT_BYTES
from qdsmirror.core.superblock import SLOT_BYTES, SUPER_MAGIC
from qdsmirror.interfaces import IBlockDevice

#: What a writelog, a journal or an extension of ours is called.
OWN_NAME = "qdsmirror"

_KIB = 1024
_HEAD_BYTES = 256 * _KIB
_TAIL_BYTES = 192 * _KIB

_MD_MAGIC = (0xA92B4EFC).to_bytes(4, "little")
_ZFS_UBERBLOCK = 0x00BAB10C
#: drbd_md_on_disk: versions 8.3 and 8.4, 8.4 unclean, 9.
_DRBD_MAGICS = tuple((0x83740267 + number).to_bytes(4, "big") for number in (4, 5, 6))
_BCACHE_MAGIC = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
_BCACHEFS_MAGIC = bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")

#: (name, offset, magic) of formats that one magic tells.
_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LUKS", 16 * _KIB, b"SKUL\xba\xbe"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 64 * _KIB + 64, b"_BHRfS_M"),
    ("f2fs", _KIB, (0xF2F52010).to_bytes(4, "little")),
    ("md RAID 1.1", 0, _MD_MAGIC),
    ("md RAID 1.2", 4 * _KIB, _MD_MAGIC),
    ("bcache", 4 * _KIB + 24, _BCACHE_MAGIC),
    ("bcachefs", 4 * _KIB + 24, _BCACHEFS_MAGIC),
    ("ISO9660", 32 * _KIB + 1, b"CD001"),
    ("UDF", 32 * _KIB + 1, b"BEA01"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("vfat", 0x36, b"FAT12   "),
    ("vfat", 0x36, b"FAT16   "),
    ("vfat", 0x52, b"FAT32   "),
)


class _View:
    """The first and last bytes of a device, addressed as on the device."""

    def __init__(self, device: IBlockDevice) -> None:
        self.size = device.size
        self.logical_block = device.logical_block
        self._head = device.pread(min(_HEAD_BYTES, self.size), 0)
        self._tail_start = max(self.size - _TAIL_BYTES, 0) // _KIB * _KIB
        self._tail = device.pread(self.size - self._tail_start, self._tail_start)

    def at(self, offset: int, length: int) -> bytes:
        """Give the bytes there; fewer or none where they were not read or do not exist."""
        if offset < 0:
            return b""
        if offset >= self._tail_start:
            start = offset - self._tail_start
            return self._tail[start : start + length]
        return self._head[offset : offset + length]

    def has(self, offset: int, magic: bytes) -> bool:
        """Tell whether exactly these bytes stand there."""
        return self.at(offset, len(magic)) == magic


def probe_signature(device: IBlockDevice) -> str | None:
    """Name what a device holds: a file system, a partition table, a RAID or volume, or our own.

    :return: e.g. ``ext4``, ``LVM2 PV``, ``GPT``; ``qdsmirror`` for a writelog, journal or extension
        of ours; ``None`` where nothing is recognised.
    :raises OSError: the device cannot be read.
    """
    view = _View(device)
    if view.has(0, SUPER_MAGIC) or view.has(0, EXTENSION_MAGIC):
        # What follows are payloads, which may look like anything.
        return OWN_NAME
    for recognise in _RECOGNISERS:
        name = recognise(view)
        if name is not None:
            return name
    return OWN_NAME if _second_slot(device) else None


def _second_slot(device: IBlockDevice) -> bool:
    """Tell whether a log or an extension of ours is left whose first slot is gone."""
    places = [(place, SUPER_MAGIC) for place in SLOT_BYTES]
    places += [(place, EXTENSION_MAGIC) for place in EXTENSION_SLOT_BYTES]
    return any(
        device.pread(4096, place).startswith(magic)
        for place, magic in places
        if place + 4096 <= device.size
    )


def _by_magic(view: _View) -> str | None:
    for name, offset, magic in _MAGICS:
        if view.has(offset, magic):
            return name
    return None


def _ext(view: _View) -> str | None:
    if not view.has(_KIB + 0x38, b"\x53\xef"):
        return None
    compatible, incompatible, read_only = (
        int.from_bytes(view.at(_KIB + offset, 4), "little") for offset in (0x5C, 0x60, 0x64)
    )
    # Features that only ext4 has: beyond filetype, recover, journal_dev, meta_bg and
    # sparse_super, large_file, btree_dir.
    if incompatible & ~0x1E or read_only & ~0x07:
        return "ext4"
    return "ext3" if compatible & 0x04 else "ext2"


def _lvm(view: _View) -> str | None:
    for sector in range(4):
        if view.has(512 * sector, b"LABELONE") and view.has(512 * sector + 24, b"LVM2 001"):
            return "LVM2 PV"
    return None


def _swap(view: _View) -> str | None:
    for page in (4 * _KIB, 8 * _KIB, 16 * _KIB, 32 * _KIB, 64 * _KIB):
        mark = view.at(page - 10, 10)
        if mark in (b"SWAPSPACE2", b"SWAP-SPACE"):
            return "swap"
        if mark.startswith(b"S1SUSPEND"):
            return "swap (a suspended system)"
    return None


def _md_at_end(view: _View) -> str | None:
    newer = (view.size // 512 - 16) // 8 * 8 * 512
    if view.has(newer, _MD_MAGIC):
        return "md RAID 1.0"
    older = view.size // (64 * _KIB) * (64 * _KIB) - 64 * _KIB
    if view.at(older, 4) in (_MD_MAGIC, _MD_MAGIC[::-1]):
        return "md RAID 0.90"
    return None


def _drbd(view: _View) -> str | None:
    # The flexible internal metadata end with the device, 4 KiB of superblock; the magic lies
    # behind fields whose number differs from version to version.
    superblock = view.at(view.size // (4 * _KIB) * (4 * _KIB) - 4 * _KIB, 128)
    fields = [superblock[offset : offset + 4] for offset in range(0, len(superblock), 4)]
    return "DRBD" if any(magic in fields for magic in _DRBD_MAGICS) else None


def _zfs(view: _View) -> str | None:
    # Four labels of 256 KiB, two at either end; their second half is an array of uberblocks.
    end = view.size // (256 * _KIB) * (256 * _KIB)
    for array in (128 * _KIB, end - 128 * _KIB):
        for slot in range(array, array + 128 * _KIB, _KIB):
            mark = view.at(slot, 8)
            if len(mark) == 8 and _ZFS_UBERBLOCK in (
                int.from_bytes(mark, "little"),
                int.from_bytes(mark, "big"),
            ):
                return "zfs"
    return None


def _gpt(view: _View) -> str | None:
    for sector in {512, 4096, view.logical_block}:
        if view.has(sector, b"EFI PART"):
            return "GPT"
        if view.has(view.size // sector * sector - sector, b"EFI PART"):
            return "GPT (its backup)"
    return None


def _boot_sector(view: _View) -> str | None:
    if not view.has(510, b"\x55\xaa"):
        return None
    if _is_fat(view):
        return "vfat"
    entries = [view.at(446 + 16 * number, 16) for number in range(4)]
    used = [entry for entry in entries if entry[4] and entry[12:16] != bytes(4)]
    if used and all(entry[0] in (0, 0x80) for entry in entries):
        return "MBR partition table"
    return None


def _is_fat(view: _View) -> bool:
    """Tell by its BIOS parameter block whether this is a FAT without its customary label."""
    boot = view.at(0, 36)
    cluster, reserved, tables = boot[13], int.from_bytes(boot[14:16], "little"), boot[16]
    return (
        boot[0] in (0xEB, 0xE9)
        and int.from_bytes(boot[11:13], "little") in (512, 1024, 2048, 4096)
        and cluster != 0
        and cluster & (cluster - 1) == 0
        and reserved != 0
        and tables in (1, 2)
        and (boot[21] == 0xF0 or boot[21] >= 0xF8)
    )


#: In this order: a container before what it holds, a weak mark after the strong ones.
_RECOGNISERS: tuple[Callable[[_View], str | None], ...] = (
    _lvm,
    _by_magic,
    _ext,
    _swap,
    _gpt,
    _boot_sector,
    _md_at_end,
    _zfs,
    _drbd,
)
