"""qdsdevinfo: what a file or block device is, how large, who uses it, what it holds."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from qdsmirror.errors import DeviceError
from qdsmirror.tools import cli

#: Sizes in sectors are told in these, whatever the device's own sectors are.
SECTOR_BYTES = 512


def build_parser() -> cli.Parser:
    """Make the command's parser."""
    parser = cli.parser(
        "qdsdevinfo", "Show a device's numbers, size, sectors, users and what it holds."
    )
    parser.add_argument("device", metavar="DEV", help="a block device or a regular file")
    return parser


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    found = describe(arguments.device)
    if arguments.json:
        cli.print_json(found)
    else:
        print("\n".join(lines(found)))
    return 0


def describe(path: str) -> dict[str, Any]:
    """Find out about a device without changing it or keeping others from it.

    :return: what ``--json`` prints; sizes in bytes but for ``sectors``.
    :raises DeviceError: it cannot be opened or read.
    """
    from qdsmirror.storage.device import FileDevice, open_shared
    from qdsmirror.storage.identity import users_of
    from qdsmirror.storage.probe import probe_signature

    fd = open_shared(path, "device")
    try:
        device = FileDevice(fd, path)
        numbers = os.fstat(fd).st_rdev if device.is_block else None
        users = users_of(fd)
        if device.is_block and not users and _is_claimed(fd):
            users = ["claimed by a process that has it open"]
        return {
            "device": path,
            "type": "block device" if device.is_block else "file",
            "identity": device.stable or None,
            "major": None if numbers is None else os.major(numbers),
            "minor": None if numbers is None else os.minor(numbers),
            "size": device.size,
            "sectors": device.size // SECTOR_BYTES,
            "logical_block": device.logical_block,
            "physical_block": device.physical_block,
            "in_use": bool(users),
            "users": users,
            "signature": probe_signature(device),
        }
    except OSError as error:
        raise DeviceError(
            f"device {path}: {error.strerror or error}", hint="see the kernel's messages: dmesg"
        ) from error
    finally:
        os.close(fd)


def lines(found: dict[str, Any]) -> list[str]:
    """Put what :func:`describe` found into lines for people."""
    numbers = "none" if found["major"] is None else f"{found['major']}, {found['minor']}"
    rows = [
        ("device", found["device"]),
        ("type", found["type"]),
        ("identity", found["identity"] or "unknown"),
        ("major, minor", numbers),
        ("size", f"{found['sectors']} sectors of {SECTOR_BYTES} bytes ({found['size']} bytes)"),
        ("logical block", f"{found['logical_block']} bytes"),
        ("physical block", f"{found['physical_block']} bytes"),
        ("in use", "; ".join(found["users"]) or "no"),
        ("holds", found["signature"] or "nothing that is recognised"),
    ]
    return [f"{name + ':':<16}{value}" for name, value in rows]


def _is_claimed(fd: int) -> bool:
    """Try whether someone holds a block device with O_EXCL; it is let go of at once."""
    assert stat.S_ISBLK(os.fstat(fd).st_mode)
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError:
        return True
    return False
