"""Real NBD clients against a lab that mirrors: afterwards the mirror has the same bytes."""

from __future__ import annotations

import json

from twisted.trial.unittest import TestCase

from tests.integration.lab import in_thread
from tests.integration.world import World, need, pattern_file

SIZE = 24 << 20


class ClientTests(TestCase):
    """Each client's reads are right, and what it wrote arrives at the mirror."""

    timeout = 1200
    statistics = False

    def start(self, *options: str) -> World:
        world = World(self, "--size", "24M", "--writelog", "8M", "--journal", "8M", *options)
        world.create()
        world.start()
        return world

    @in_thread
    def test_nbdinfo_and_nbdcopy(self) -> None:
        need("nbdinfo", "nbdcopy")
        world = self.start()
        told = json.loads(world.run(["nbdinfo", "--json", world.uri()]))
        (export,) = told["exports"]
        self.assertEqual(export["export-size"], SIZE)
        self.assertTrue(export["can_multi_conn"] and export["can_fua"] and export["can_flush"])
        self.assertTrue(export["can_trim"] and export["can_zero"])
        self.assertIn("base:allocation", export["contexts"])
        listed = json.loads(world.run(["nbdinfo", "--list", "--json", world.uri("")]))
        self.assertEqual([one["export-name"] for one in listed["exports"]], ["qds0"])

        source = world.base / "source"
        data = bytearray(pattern_file(source, SIZE))
        data[4 << 20 : 12 << 20] = bytes(8 << 20)
        source.write_bytes(data)
        world.run(["nbdcopy", "--flush", str(source), world.uri()])
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), data)
        extents = json.loads(world.run(["nbdinfo", "--map", "--json", world.uri()]))
        self.assertEqual(sum(one["length"] for one in extents), SIZE)
        self.assertTrue(any(one["type"] & 2 for one in extents), extents)
        world.run(["nbdcopy", "--connections=4", world.uri(), str(world.base / "back")])
        self.assertEqual((world.base / "back").read_bytes(), data)

    @in_thread
    def test_qemu(self) -> None:
        need("qemu-img", "qemu-io")
        world = self.start()
        source = world.base / "source"
        pattern_file(source, SIZE, 2)
        raw = ["-f", "raw"]
        world.run(["qemu-img", "convert", "-n", *raw, "-O", "raw", str(source), world.uri()])
        compare = ["qemu-img", "compare", *raw, "-F", "raw", str(source), world.uri()]
        world.run(compare)
        world.settle()
        world.qemu_io("write -P 9 4k 4k")
        world.run(compare, codes=(1,))
        world.run(["qemu-img", "bench", "-w", *raw, "-c", "800", "-d", "32", "-s", "4k",
                   "--flush-interval=100", world.uri()])  # fmt: skip
        world.run(["qemu-img", "bench", *raw, "-c", "800", "-d", "32", world.uri()])
        world.settle()
        world.qemu_io(
            "write -P 17 0 64k",
            "write -f -P 34 64k 4k",
            "write -z 4k 8k",
            "write -z -u 16k 4k",
            "write -P 85 100000 1000",
            "discard 1M 1M",
            "aio_write -P 51 2M 4M",
            "aio_write -P 52 6M 512",
            "aio_flush",
            "read -P 17 0 4k",
            "read -P 0 4k 8k",
            "read -P 0 16k 4k",
            "read -P 17 20k 44k",
            "read -P 34 64k 4k",
            "read -P 85 100000 1000",
            "read -P 51 2M 4M",
            "read -P 52 6M 512",
            "flush",
        )
        world.settle()
        mirror = world.device("secondary", "qds0.mirror").read_bytes()
        self.assertEqual(mirror[:4096], b"\x11" * 4096)
        self.assertEqual(mirror[4096:12288], bytes(8192))
        self.assertEqual(mirror[64 << 10 : 68 << 10], b"\x22" * 4096)
        self.assertEqual(mirror[100000:101000], b"\x55" * 1000)
        self.assertEqual(mirror[2 << 20 : 6 << 20], b"\x33" * (4 << 20))

    @in_thread
    def test_fio_verifies(self) -> None:
        need("fio")
        world = self.start()
        # Four jobs, so four connections; each owns a part and verifies what it wrote there.
        told = world.run(
            [
                *("fio", "--name=verify", "--ioengine=nbd", f"--uri={world.uri()}"),
                *("--rw=randwrite", "--bssplit=4k/70:16k/25:256k/5", "--iodepth=32"),
                *("--numjobs=4", f"--size={SIZE // 4}", f"--offset_increment={SIZE // 4}"),
                *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1"),
                *("--output-format=json", f"--directory={world.base}"),
            ]
        )
        jobs = json.loads(told[told.index("{") :])["jobs"]
        self.assertEqual(len(jobs), 4)
        for job in jobs:
            self.assertEqual(job["error"], 0)
            self.assertEqual(job["write"]["io_bytes"], SIZE // 4)
            self.assertEqual(job["read"]["io_bytes"], SIZE // 4)
        world.settle()
