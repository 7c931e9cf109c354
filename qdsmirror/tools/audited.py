"""Changes that a command makes without a daemon, in the audit log (security.md 12)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qdsmirror import audit
from qdsmirror.errors import EXIT_OK, QdsError
from qdsmirror.paths import Paths


@contextmanager
def audited(paths: Paths, command: str, arguments: argparse.Namespace) -> Iterator[None]:
    """Note what comes of a change; that the log cannot be written is told, and ends nothing.

    With ``--dry-run`` there is no change.

    :param command: its name.
    :param arguments: of its command line; those given are kept.
    """
    given = {key: str(value) for key, value in vars(arguments).items() if value}
    if "dry_run" in given:
        yield
        return
    try:
        yield
    except QdsError as error:
        _note(paths, command, given, error.exit_code, error.message)
        raise
    _note(paths, command, given, EXIT_OK, "")


def _note(paths: Paths, command: str, given: dict[str, str], code: int, message: str) -> None:
    try:
        audit.append_own(paths, command, given, code, message)
    except OSError as error:
        print(f"warning: {paths.audit_log}: {error.strerror}", file=sys.stderr)


__all__ = ["audited"]
