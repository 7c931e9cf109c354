"""Run a program with the system calls that a systemd unit leaves it, and no others.

``python -m tests.integration.confine UNIT PROGRAM ARGUMENT...``: what the unit's SystemCallFilter
allows is asked of ``systemd-analyze syscall-filter``; the rest fails with EPERM, as under the unit.
Without systemd as the first process that is as near as one gets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

# linux/audit.h, linux/bpf_common.h, linux/seccomp.h, linux/prctl.h
_ARCH = 0xC000003E
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SET_SECCOMP, _MODE_FILTER, _SET_NO_NEW_PRIVS = 22, 2, 38


@cache
def members(name: str) -> frozenset[str]:
    """Give the system calls of a set (``@privileged``), or the one that is named."""
    if not name.startswith("@"):
        return frozenset({name})
    command = ["systemd-analyze", "syscall-filter", "--no-pager", name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in said.splitlines()[1:]]
    inner = [members(line) for line in lines if line and not line.startswith("#")]
    return frozenset().union(*inner)


def allowed(unit: Path) -> set[str]:
    """Give the system calls that a unit's filter allows."""
    found: set[str] = set()
    for text in re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE):
        named = set().union(*map(members, text.removeprefix("~").split()))
        # What every program needs is allowed without being named.
        found = found - named if text.startswith("~") else found | named | members("@default")
    return found


def numbers(names: Iterable[str]) -> list[int]:
    """Give the numbers of system calls, of those that this machine has."""
    pairs = re.findall(r"^#define __NR_(\w+) (\d+)$", HEADER.read_text(), re.MULTILINE)
    known = {name: int(number) for name, number in pairs}
    return sorted(known[name] for name in names if name in known)


def program(calls: Iterable[int]) -> bytes:
    """Make the filter, in BPF."""
    steps = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, _ARCH), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    steps.append((_LOAD, 0, 0, 0))
    for number in calls:
        steps += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def confine(code: bytes) -> None:
    """Have the kernel go by a filter from now on, for this process and what it starts.

    :raises OSError: the kernel does not.
    """
    library = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(code, len(code))
    rules = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(held))
    for arguments in ((_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _MODE_FILTER, rules, 0, 0)):
        if library.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    confine(program(numbers(allowed(Path(sys.argv[1])))))
    os.execv(sys.argv[2], sys.argv[2:])
