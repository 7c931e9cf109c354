from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core.superblock import SUPER_MAGIC
from qdsmirror.storage.device import open_device
from qdsmirror.tools import devinfo
from tests.storage.test_device import make_file, make_loop
from tests.tools.offline import stable_of


def call(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = devinfo.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


class DevinfoTests(TestCase):
    def found(self, path: str) -> dict[str, Any]:
        code, out, err = call("--json", path)
        self.assertEqual((code, err), (0, ""))
        return json.loads(out)

    def test_file(self) -> None:
        path = make_file(self, 1 << 20)
        self.assertEqual(
            self.found(path),
            {
                "schema": 1,
                "device": path,
                "type": "file",
                "identity": stable_of(path) or None,
                "major": None,
                "minor": None,
                "size": 1 << 20,
                "sectors": 2048,
                "logical_block": 512,
                "physical_block": 4096,
                "in_use": False,
                "users": [],
                "signature": None,
            },
        )

    def test_text(self) -> None:
        path = make_file(self, 1 << 20)
        code, out, _ = call(path)
        self.assertEqual(code, 0)
        self.assertIn("2048 sectors of 512 bytes (1048576 bytes)", out)
        self.assertIn("in use:         no\n", out)
        self.assertIn("nothing that is recognised", out)

    def test_odd_sizes_are_told_not_refused(self) -> None:
        self.assertEqual(self.found(make_file(self, 0))["sectors"], 0)
        self.assertEqual(self.found(make_file(self, 1000))["size"], 1000)

    def test_locked_file_with_a_log_of_ours(self) -> None:
        path = make_file(self, 1 << 20)
        device = open_device(path, writable=True)
        self.addCleanup(device.close)
        device.pwritev([SUPER_MAGIC], 0)
        found = self.found(path)
        self.assertTrue(found["in_use"])
        self.assertIn(str(os.getpid()), found["users"][0])
        self.assertEqual(found["signature"], "qdsmirror")

    def test_looking_leaves_no_lock(self) -> None:
        path = make_file(self, 1 << 20)
        self.found(path)
        open_device(path, writable=True).close()

    def test_block_device(self) -> None:
        loop = make_loop(self, make_file(self, 1 << 20), 4096)
        found = self.found(loop)
        self.assertEqual(found["type"], "block device")
        self.assertEqual(os.makedev(found["major"], found["minor"]), os.stat(loop).st_rdev)
        self.assertEqual((found["sectors"], found["logical_block"]), (2048, 4096))
        self.assertFalse(found["in_use"])
        device = open_device(loop, writable=True)
        self.addCleanup(device.close)
        self.assertTrue(self.found(loop)["in_use"])

    def test_missing(self) -> None:
        path = make_file(self) + ".none"
        code, out, err = call(path)
        self.assertEqual((code, out), (1, ""))
        self.assertIn(f"{path} does not exist", err)
        code, out, _ = call("--json", path)
        self.assertEqual((code, json.loads(out)["error"]["code"]), (1, "device"))

    def test_usage(self) -> None:
        self.assertEqual(call()[0], 2)

    def test_import_needs_no_twisted(self) -> None:
        script = "import sys, qdsmirror.tools.devinfo; sys.exit('twisted' in sys.modules)"
        self.assertEqual(subprocess.run([sys.executable, "-c", script]).returncode, 0)
