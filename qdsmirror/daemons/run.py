"""A master in the foreground: ``python -m qdsmirror.daemons.run qdsdriver [--root DIR]``.

What ``twistd -n qdsdriver`` does, without twistd's own options and lines in the log; the launch
commands, in.pmd and in.rmd run it.
"""

# Twisted's usage and Service have no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from qdsmirror import errors
from qdsmirror.daemons import logs


def main(argv: Sequence[str] | None = None) -> int:
    """Run a master until it is told to end.

    :param argv: the daemon's name and its options; default: the process's.
    :returns: the exit code, errors.py; what is wrong at the start ends the process instead.
    """
    name, *rest = sys.argv[1:] if argv is None else argv
    if name not in logs.DAEMONS:
        raise ValueError(f"{name} is none of {', '.join(logs.DAEMONS)}")
    module: Any = importlib.import_module(f"qdsmirror.daemons.{name.removeprefix('qds')}")
    options = module.Options()
    options.parseOptions(rest)
    service = module.makeService(options)
    service.startService()
    reactor: Any = service.reactor
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    logs.begin(name)
    reactor.run()
    return errors.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
