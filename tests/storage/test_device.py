"""One suite for the fake and for real devices; then what only real ones have."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from twisted.trial.unittest import SkipTest, TestCase
from zope.interface.verify import verifyObject

from qdsmirror import limits
from qdsmirror.errors import DeviceError, DeviceFailedError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage import device, filedevice, ioctl
from qdsmirror.storage.device import FileDevice, open_device, open_shared
from qdsmirror.storage.identity import file_system_of, identify
from tests.fakes import MemoryDevice, at_random, everything, nothing

SIZE = 1 << 20


def make_file(test: TestCase, size: int = SIZE, directory: str | None = None) -> str:
    where = tempfile.mkdtemp(dir=directory)
    test.addCleanup(shutil.rmtree, where)
    path = os.path.join(where, "device")
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def make_loop(test: TestCase, path: str, sector: int = 512, options: tuple[str, ...] = ()) -> str:
    """Attach a loop device, or skip."""
    if os.geteuid() != 0:
        raise SkipTest("root is missing")
    if shutil.which("losetup") is None:
        raise SkipTest("losetup is missing")
    made = subprocess.run(
        ["losetup", "--sector-size", str(sector), *options, "-f", "--show", path],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise SkipTest(f"a free loop device is missing: {made.stderr.strip()}")
    loop = made.stdout.strip()
    test.addCleanup(subprocess.run, ["losetup", "-d", loop], check=True)
    return loop


class DeviceContract:
    """What every IBlockDevice does."""

    # The classes below are TestCases.
    make: Callable[[], Any]
    assertEqual: Any
    assertRaises: Any
    assertIn: Any
    assertTrue: Any
    assertIsNone: Any
    addCleanup: Any

    def setUp(self) -> None:
        self.device = self.make()

    def test_interface(self) -> None:
        self.assertTrue(verifyObject(IBlockDevice, self.device))

    def test_size_and_blocks(self) -> None:
        self.assertEqual(self.device.size, SIZE)
        self.assertIn(self.device.logical_block, (512, 4096))
        self.assertEqual(self.device.physical_block % self.device.logical_block, 0)

    def test_reads_what_was_written(self) -> None:
        self.device.pwritev([b"a" * 4096, bytearray(b"b" * 4096), memoryview(b"c" * 4096)], 8192)
        self.assertEqual(
            self.device.pread(20480, 4096),
            bytes(4096) + b"a" * 4096 + b"b" * 4096 + b"c" * 4096 + bytes(4096),
        )

    def test_more_buffers_than_one_call_takes(self) -> None:
        pieces = [bytes([number % 251]) * 256 for number in range(2 * limits.DEVICE_IOV_MAX + 48)]
        self.device.pwritev(pieces, 4096)
        data = b"".join(pieces)
        self.assertEqual(self.device.pread(len(data), 4096), data)

    def test_empty_buffers(self) -> None:
        self.device.pwritev([], 0)
        self.device.pwritev([b"", b"x" * 4096, b""], 0)
        self.assertEqual(self.device.pread(4096, 0), b"x" * 4096)

    def test_read_past_the_end(self) -> None:
        error = self.assertRaises(OSError, self.device.pread, 8192, SIZE - 4096)
        self.assertEqual(error.errno, errno.EIO)
        self.assertIsNone(self.device.pread_nowait(8192, SIZE - 4096))

    def test_write_past_the_end_changes_nothing(self) -> None:
        for offset in (SIZE - 4096, SIZE, -4096):
            error = self.assertRaises(OSError, self.device.pwritev, [b"x" * 8192], offset)
            self.assertEqual(error.errno, errno.ENOSPC)
            error = self.assertRaises(OSError, self.device.zero, offset, 8192, False)
            self.assertEqual(error.errno, errno.ENOSPC)
        self.assertEqual(self.device.pread(4096, SIZE - 4096), bytes(4096))

    def test_nowait_gives_all_or_nothing(self) -> None:
        self.device.pwritev([b"x" * 8192], 0)
        self.assertIn(self.device.pread_nowait(8192, 0), (b"x" * 8192, None))

    def test_zero(self) -> None:
        for unmap in (False, True):
            self.device.pwritev([b"x" * 65536], 0)
            self.device.zero(4096, 8192, unmap)
            self.device.zero(20480, 0, unmap)
            self.assertEqual(
                self.device.pread(65536, 0), b"x" * 4096 + bytes(8192) + b"x" * (65536 - 12288)
            )

    def test_zero_of_single_sectors_beside_unsynced_data(self) -> None:
        sector = self.device.logical_block
        for unmap in (False, True):
            self.device.pwritev([b"x" * 65536], 0)
            self.device.zero(3 * sector, 5 * sector, unmap)
            self.device.fdatasync()
            self.device.drop_cache()
            self.assertEqual(
                self.device.pread(65536, 0),
                b"x" * (3 * sector) + bytes(5 * sector) + b"x" * (65536 - 8 * sector),
            )

    def test_synced_data_survives_the_cache(self) -> None:
        self.device.pwritev([b"x" * 4096], 4096)
        self.device.fdatasync()
        self.device.drop_cache()
        self.assertEqual(self.device.pread(4096, 4096), b"x" * 4096)

    def test_unsynced_data_survives_drop_cache(self) -> None:
        self.device.pwritev([b"x" * 4096], 4096)
        self.device.drop_cache()
        self.assertEqual(self.device.pread(4096, 4096), b"x" * 4096)

    def test_a_range_of_the_cache_can_be_dropped(self) -> None:
        self.device.pwritev([b"x" * 8192], 4096)
        self.device.fdatasync()
        self.device.pwritev([b"y" * 4096], 8192)
        self.device.drop_cache(4096, 8192)
        self.assertEqual(self.device.pread(8192, 4096), b"x" * 4096 + b"y" * 4096)

    def test_extents_cover_the_range(self) -> None:
        self.device.pwritev([b"x" * 4096], 65536)
        pairs = self.device.extents(4096, 131072)
        self.assertEqual(sum(length for length, _ in pairs), 131072)
        self.assertTrue(all(length > 0 for length, _ in pairs))
        position = 4096
        for length, allocated in pairs:
            if not allocated:
                self.assertEqual(self.device.pread(length, position), bytes(length))
            position += length
        self.assertEqual(self.device.extents(4096, 0), [])

    def test_latched(self) -> None:
        self.device.pwritev([b"x" * 4096], 0)
        self.device.latch("first reason")
        self.device.latch("second reason")
        self.assertEqual(self.device.failed, "first reason")
        for call in (
            lambda: self.device.pwritev([b"y" * 4096], 0),
            lambda: self.device.zero(0, 4096, True),
            self.device.fdatasync,
        ):
            error = self.assertRaises(DeviceFailedError, call)
            self.assertIn("first reason", str(error))
        self.assertEqual(self.device.pread(4096, 0), b"x" * 4096)

    def test_shared_descriptor_sees_later_writes(self) -> None:
        self.device.pwritev([b"x" * 4096], 0)
        fd = self.device.open_shared()
        self.addCleanup(os.close, fd)
        self.device.pwritev([b"y" * 4096], 4096)
        self.assertEqual(os.pread(fd, 8192, 0), b"x" * 4096 + b"y" * 4096)
        self.assertEqual(os.lseek(fd, 0, os.SEEK_END), SIZE)
        self.assertRaises(OSError, os.pwrite, fd, b"z" * 4096, 0)

    def test_closed(self) -> None:
        self.device.close()
        self.device.close()
        for call in (
            lambda: self.device.pwritev([b"y" * 4096], 0),
            lambda: self.device.pread(4096, 0),
            lambda: self.device.pread_nowait(4096, 0),
        ):
            self.assertEqual(self.assertRaises(OSError, call).errno, errno.EBADF)


class MemoryDeviceTests(DeviceContract, TestCase):
    def make(self) -> MemoryDevice:
        return MemoryDevice(SIZE)

    def test_failed_sync_latches(self) -> None:
        self.device.pwritev([b"x" * 4096], 0)
        self.device.fail("fdatasync")
        self.assertRaises(DeviceFailedError, self.device.fdatasync)
        self.assertRaises(DeviceFailedError, self.device.fdatasync)
        self.assertEqual(self.device.pread(4096, 0), b"x" * 4096)
        self.device.drop_cache()
        self.assertEqual(self.device.pread(4096, 0), bytes(4096))

    def test_power_cut_loses_what_was_not_synced(self) -> None:
        self.device.pwritev([b"x" * 4096], 0)
        self.device.fdatasync()
        self.device.pwritev([b"y" * 4096], 0)
        self.assertEqual(self.device.content()[:4096], b"y" * 4096)
        after = self.device.crash(nothing)
        self.assertEqual(after.pread(4096, 0), b"x" * 4096)
        self.assertEqual(after.identity, self.device.identity)
        self.assertRaises(OSError, self.device.pread, 4096, 0)

    def test_power_cut_may_keep_all(self) -> None:
        self.device.pwritev([b"y" * 4096], 0)
        self.assertEqual(self.device.crash(everything).durable()[:4096], b"y" * 4096)

    def test_kill_then_power_cut(self) -> None:
        self.device.pwritev([b"y" * 4096], 0)
        after = self.device.reopen()
        self.assertEqual(after.pread(4096, 0), b"y" * 4096)
        self.assertEqual(after.crash(nothing).pread(4096, 0), bytes(4096))

    def test_torn_writes_reach_every_kind(self) -> None:
        random = Random(7)
        seen = set()
        for _ in range(200):
            device = MemoryDevice(4096)
            device.pwritev([b"y" * 1024], 0)
            after = device.crash(at_random(random)).durable()
            seen.add((after[:512] == b"y" * 512, after[512:1024] == b"y" * 512))
            self.assertEqual(after.replace(b"y" * 512, bytes(512)), bytes(4096))
        self.assertEqual(seen, {(a, b) for a in (False, True) for b in (False, True)})

    def test_faults_come_once(self) -> None:
        self.device.fail("pwritev", errno.ENOSPC)
        error = self.assertRaises(OSError, self.device.pwritev, [b"y" * 512], 0)
        self.assertEqual(error.errno, errno.ENOSPC)
        self.device.pwritev([b"y" * 512], 0)


class FileDeviceTests(DeviceContract, TestCase):
    directory: str | None = None

    def make(self) -> FileDevice:
        self.file = make_file(self, directory=self.directory)
        device = open_device(self.file, writable=True)
        self.addCleanup(device.close)
        return device

    def test_extents_of_a_sparse_file(self) -> None:
        self.device.pwritev([b"x" * 65536], 131072)
        self.assertEqual(
            self.device.extents(0, SIZE), [(131072, False), (65536, True), (SIZE - 196608, False)]
        )
        self.assertEqual(self.device.extents(139264, 8192), [(8192, True)])

    def test_hole_is_told_from_its_start(self) -> None:
        self.device.pwritev([b"x" * 65536], 131072)
        self.assertEqual(self.device.hole(0, SIZE), 131072)
        self.assertEqual(self.device.hole(0, 4096), 4096)
        self.assertEqual(self.device.hole(131072, 4096), 0)
        self.assertEqual(self.device.hole(SIZE - 4096, 4096), 4096)

    def test_extents_are_bounded(self) -> None:
        for offset in range(0, SIZE, 65536):
            self.device.pwritev([b"x" * 4096], offset)
        self.patch(limits, "DEVICE_EXTENTS_MAX", 4)
        pairs = self.device.extents(0, SIZE)
        self.assertEqual(pairs, [(4096, True), (61440, False), (SIZE - 65536, True)])

    def test_unmap_frees_space(self) -> None:
        self.device.pwritev([b"x" * 65536], 0)
        self.device.zero(0, 65536, unmap=True)
        self.assertEqual(self.device.extents(0, 65536), [(65536, False)])
        self.assertEqual(os.stat(self.file).st_size, SIZE)

    def test_zero_where_the_file_system_cannot(self) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "no")

        self.patch(ioctl, "fallocate", refuse)
        self.patch(filedevice, "_ZEROES", bytes(4096))
        self.device.pwritev([b"x" * 65536], 0)
        self.device.zero(512, 12288, unmap=True)
        self.assertEqual(
            self.device.pread(65536, 0), b"x" * 512 + bytes(12288) + b"x" * (65536 - 12800)
        )

    def test_zero_never_asks_for_a_plain_discard(self) -> None:
        """Only a trim may make a hole, and of no range may the old content come back."""
        asked: list[int] = []

        def refuse(_fd: int, mode: int, *_: object) -> None:
            asked.append(mode)
            raise OSError(errno.EOPNOTSUPP, "no")

        self.patch(ioctl, "fallocate", refuse)
        zero = ioctl.FALLOC_FL_ZERO_RANGE | ioctl.FALLOC_FL_KEEP_SIZE
        hole = ioctl.FALLOC_FL_PUNCH_HOLE | ioctl.FALLOC_FL_KEEP_SIZE
        self.device.zero(0, 4096, unmap=False)
        self.assertEqual(asked, [zero])
        self.device.zero(0, 4096, unmap=True)
        # FALLOC_FL_NO_HIDE_STALE (4) would make it one that a block device need not heed.
        self.assertEqual(asked[1:], [hole, zero])

    def test_zero_without_space(self) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        self.patch(ioctl, "fallocate", refuse)
        error = self.assertRaises(OSError, self.device.zero, 0, 4096, False)
        self.assertEqual(error.errno, errno.ENOSPC)

    def test_short_writes_are_continued(self) -> None:
        whole = os.pwritev

        def short(fd: int, buffers: Any, offset: int) -> int:
            joined = b"".join(buffers)
            return whole(fd, [joined[: min(700, len(joined))]], offset)

        pieces = [bytes([number]) * 333 for number in range(20)]
        with mock.patch("os.pwritev", short):
            self.device.pwritev(pieces, 512)
        self.assertEqual(self.device.pread(20 * 333, 512), b"".join(pieces))

    def test_a_write_that_does_not_proceed(self) -> None:
        with mock.patch("os.pwritev", lambda *_: 0):
            error = self.assertRaises(OSError, self.device.pwritev, [b"x"], 0)
        self.assertEqual(error.errno, errno.EIO)

    def test_failed_sync_is_never_called_good(self) -> None:
        with mock.patch("os.fdatasync", side_effect=OSError(errno.EIO, "Input/output error")):
            error = self.assertRaises(DeviceFailedError, self.device.fdatasync)
        self.assertIn(self.file, str(error))
        self.assertEqual(self.device.failed, "fdatasync: Input/output error")
        self.assertRaises(DeviceFailedError, self.device.fdatasync)
        self.assertRaises(DeviceFailedError, self.device.pwritev, [b"x"], 0)

    def test_nowait_unsupported_is_remembered(self) -> None:
        if self.device._nowait is filedevice.Nowait.ALWAYS:
            raise SkipTest("a temporary directory on a disk is missing")
        refused = OSError(errno.EOPNOTSUPP, "no")
        with mock.patch("os.preadv", side_effect=refused) as preadv:
            self.assertIsNone(self.device.pread_nowait(512, 0))
            self.assertIsNone(self.device.pread_nowait(512, 0))
        self.assertEqual(preadv.call_count, 1)

    def test_nowait_serves_cached_pages(self) -> None:
        self.device.pwritev([b"x" * 4096], 4096)
        if self.device.pread_nowait(4096, 4096) is None:
            raise SkipTest("a file system with RWF_NOWAIT is missing")
        self.assertEqual(self.device.pread_nowait(4096, 4096), b"x" * 4096)

    def test_nowait_leaves_long_reads_to_others(self) -> None:
        self.patch(limits, "DEVICE_NOWAIT_BYTES_MAX", 8192)
        self.assertIsNone(self.device.pread_nowait(8193, 0))

    def test_shared_descriptor(self) -> None:
        for fd in (self.device.open_shared(), open_shared(self.file)):
            shared = FileDevice(fd, self.file, "writelog")
            self.device.pwritev([b"z" * 512], 512)
            self.assertEqual(shared.pread(512, 512), b"z" * 512)
            self.assertRaises(OSError, shared.pwritev, [b"y" * 512], 0)
            self.assertTrue(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
            self.assertEqual(shared.identity, self.device.identity)
            # It holds no lock: once the first is closed the device is free, though it stays open.
            self.device.close()
            self.device = open_device(self.file, writable=True)
            shared.close()
        self.device.close()

    def test_shared_follows_the_device_not_the_path(self) -> None:
        self.device.pwritev([b"z" * 512], 0)
        os.rename(self.file, self.file + ".old")
        Path(self.file).write_bytes(bytes(SIZE))
        shared = FileDevice(self.device.open_shared(), self.file)
        self.addCleanup(shared.close)
        self.assertEqual(shared.pread(512, 0), b"z" * 512)

    def test_identity_through_links(self) -> None:
        os.symlink(self.file, self.file + ".soft")
        os.link(self.file, self.file + ".hard")
        other = make_file(self)
        self.assertEqual(identify(self.file + ".soft"), self.device.identity)
        self.assertEqual(identify(self.file + ".hard"), self.device.identity)
        self.assertNotEqual(identify(other), self.device.identity)


class TmpfsDeviceTests(FileDeviceTests):
    directory = "/dev/shm"

    def setUp(self) -> None:
        if not os.path.isdir("/dev/shm"):
            raise SkipTest("/dev/shm is missing")
        super().setUp()

    def test_plain_reads_do_not_wait_in_memory(self) -> None:
        self.assertEqual(self.device.pread_nowait(4096, 0), bytes(4096))

    def test_nowait_unsupported_is_remembered(self) -> None:
        """In memory nothing can wait, so the flag is not even asked for."""
        preadv = os.preadv
        flags: list[int] = []

        def watched(fd: int, buffers: Any, offset: int, flag: int = 0) -> int:
            flags.append(flag)
            return preadv(fd, buffers, offset, flag)

        with mock.patch("os.preadv", watched):
            self.assertEqual(self.device.pread_nowait(512, 0), bytes(512))
        self.assertNotIn(os.RWF_NOWAIT, flags)


class Loop512Tests(DeviceContract, TestCase):
    sector = 512

    def make(self) -> FileDevice:
        self.file = make_file(self)
        self.loop = make_loop(self, self.file, self.sector)
        device = open_device(self.loop, writable=True)
        self.addCleanup(device.close)
        return device

    def test_sector(self) -> None:
        self.assertEqual(self.device.logical_block, self.sector)
        self.assertTrue(self.device.is_block)

    def test_extents_are_all_allocated(self) -> None:
        self.assertEqual(self.device.extents(0, SIZE), [(SIZE, True)])

    def test_one_exclusive_opener(self) -> None:
        error = self.assertRaises(DeviceError, open_device, self.loop, writable=True)
        self.assertIn(f"data device {self.loop} is in use", str(error))
        self.assertRaises(DeviceError, open_device, self.loop, writable=False)
        open_device(self.loop, writable=False, exclusive=False).close()
        shared = open_shared(self.loop)
        self.addCleanup(os.close, shared)
        self.device.close()
        open_device(self.loop, writable=True).close()

    def test_a_loop_device_is_its_file(self) -> None:
        self.assertEqual(identify(self.loop), identify(self.file))
        node = self.file + ".node"
        os.mknod(node, 0o600 | 0o060000, os.stat(self.loop).st_rdev)
        self.assertEqual(identify(node), identify(self.loop))

    def test_a_loop_device_over_a_part_is_not(self) -> None:
        part = make_loop(self, make_file(self), self.sector, ("-o", "65536"))
        self.assertEqual(identify(part).kind, "block")


class Loop4096Tests(Loop512Tests):
    sector = 4096


class OpenTests(TestCase):
    def refused(self, path: str, *words: str, **options: Any) -> DeviceError:
        error = self.assertRaises(
            DeviceError, open_device, path, writable=True, role="mirror device", **options
        )
        for word in ("mirror device", path, *words):
            self.assertIn(word, str(error))
        self.assertTrue(error.hint)
        return error

    def test_missing(self) -> None:
        path = make_file(self)
        self.refused(path + ".none", "does not exist")
        self.refused(path + "/none", "does not exist")

    def test_not_a_device(self) -> None:
        path = make_file(self)
        self.refused(os.path.dirname(path), "a directory")
        self.refused("/dev/null", "a character device")
        os.mkfifo(path + ".pipe")
        self.refused(path + ".pipe", "a pipe")

    def test_permission(self) -> None:
        path = make_file(self)
        with mock.patch("os.open", side_effect=PermissionError(errno.EACCES, "no")):
            self.refused(path, "no permission")

    def test_too_small(self) -> None:
        self.refused(make_file(self, 4096), "too small", "4096", "8192", minimum_bytes=8192)
        self.refused(make_file(self, 0), "too small")

    def test_no_whole_sectors(self) -> None:
        self.refused(make_file(self, 1000), "1000", "512")

    def test_in_use_names_the_holder(self) -> None:
        path = make_file(self)
        first = open_device(path, writable=True)
        self.refused(path, "in use", str(os.getpid()))
        os.symlink(path, path + ".link")
        self.refused(path + ".link", "in use")
        first.close()
        open_device(path, writable=True).close()

    def test_a_refused_open_leaves_nothing_open(self) -> None:
        path = make_file(self, 1000)
        before = os.listdir("/proc/self/fd")
        self.refused(path, "1000")
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def test_mounted(self) -> None:
        if shutil.which("mkfs.ext4") is None:
            raise SkipTest("mkfs.ext4 is missing")
        path = make_file(self, 4 << 20)
        subprocess.run(["mkfs.ext4", "-q", path], check=True)
        loop = make_loop(self, path)
        where = os.path.dirname(path) + "/mnt"
        os.mkdir(where)
        if subprocess.run(["mount", loop, where], capture_output=True).returncode:
            raise SkipTest("the permission to mount is missing")
        self.addCleanup(subprocess.run, ["umount", where], check=True)
        self.refused(loop, "in use", f"mounted on {where}")

    def test_read_only_takes_no_writes(self) -> None:
        device = open_device(make_file(self), writable=False, exclusive=False)
        self.addCleanup(device.close)
        self.assertRaises(OSError, device.pwritev, [b"x" * 512], 0)

    def test_drop_cache_drops(self) -> None:
        device = open_device(make_file(self, 4 << 20), writable=True)
        self.addCleanup(device.close)
        device.pwritev([b"x" * (4 << 20)], 0)
        if device.pread_nowait(4096, 2 << 20) is None:
            raise SkipTest("a file system with RWF_NOWAIT is missing")
        if file_system_of(os.fstat(device.fileno()).st_dev) == "tmpfs":
            raise SkipTest("a temporary directory on a disk is missing")
        device.fdatasync()
        device.drop_cache(3 << 20, 65536)
        self.assertIsNone(device.pread_nowait(4096, 3 << 20))
        self.assertIsNotNone(device.pread_nowait(4096, 1 << 20))
        device.drop_cache()
        self.assertIsNone(device.pread_nowait(4096, 1 << 20))


class PermissionTests(TestCase):
    """Who may not open a device reads what to do."""

    def explained(self, number: int) -> DeviceError:
        return device._explain(OSError(number, os.strerror(number)), "/dev/x", "data device")

    def test_by_its_mode(self) -> None:
        self.patch(os, "environ", {})
        self.assertIn("ls -lL", self.explained(errno.EPERM).hint)

    def test_by_the_unit(self) -> None:
        self.patch(os, "environ", {"INVOCATION_ID": "1"})
        for number in (errno.EPERM, errno.EROFS):
            self.assertIn("qdsconfigtool units --out", self.explained(number).hint)
        self.assertIn("ls -lL", self.explained(errno.EACCES).hint)
