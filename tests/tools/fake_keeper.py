"""The keeper's program with a fake kernel, whose files are in the directory $FAKE_KERNEL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qdsmirror.tools import attach_keeper
from tests.tools.nbdkernel import FakeKernel

if __name__ == "__main__":
    Path.is_block_device = Path.exists  # type: ignore[method-assign, assignment]
    kernel = FakeKernel(Path(os.environ["FAKE_KERNEL"]))
    attach_keeper.KernelNbd = kernel.open  # type: ignore[misc, assignment]
    sys.exit(attach_keeper.main())
