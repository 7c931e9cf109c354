"""A machine in QEMU, emulated, with a stock Debian kernel and the host's files (read-only)."""

from __future__ import annotations

import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SkipTest

HERE = Path(__file__).parent
#: What the guest needs besides what is built into the kernel, in no particular order.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "ext4", "loop", "nbd")
#: The fewest instructions that this host's programs may count on and make use of: those for wider
#: registers cost an emulator more than they save.  The kernel wants random numbers at its start.
CPU = "Nehalem-v1,+rdrand"
PROGRAMS = ("qemu-system-x86_64", "busybox", "modprobe")
_PT_INTERP = 3
_EXECUTABLE, _FILE, _DIRECTORY = 0o100755, 0o100644, 0o040755


def find_kernel() -> tuple[Path, str]:
    """Give the newest kernel here that has all modules, and its version.

    :raises SkipTest: something is missing, by name.
    """
    if os.uname().machine != "x86_64":
        raise SkipTest("the guest is an x86_64 machine and runs this host's programs")
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise SkipTest(f"{program} is not installed")
    for kernel in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        version = kernel.name.removeprefix("vmlinuz-")
        if os.access(kernel, os.R_OK) and modules(version):
            return kernel, version
    raise SkipTest(f"no kernel in /boot has {', '.join(MODULES)} (package linux-image-amd64)")


def modules(version: str) -> list[Path]:
    """Give the files of the modules in the order of loading; none when one is missing."""
    found: list[Path] = []
    for name in MODULES:
        done = subprocess.run(
            ["modprobe", "--set-version", version, "--show-depends", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return []
        for line in done.stdout.splitlines():
            words = line.split()
            if words[0] == "insmod" and Path(words[1]) not in found:
                found.append(Path(words[1]))
    return found


def initial_files(version: str, settings: dict[str, str]) -> bytes:
    """Make the archive that the kernel starts from.

    :param settings: shell variables for the scripts.
    :raises SkipTest: busybox needs libraries.
    """
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    if _is_dynamic(busybox):
        raise SkipTest("busybox is not a static one (package busybox-static)")
    lines = [f"{key}='{value}'\n" for key, value in settings.items()]
    entries = [
        (name, _DIRECTORY, b"") for name in ("bin", "dev", "proc", "sys", "host", "lab", "modules")
    ]
    entries += [
        ("bin/busybox", _EXECUTABLE, busybox),
        ("init", _EXECUTABLE, (HERE / "init.sh").read_bytes()),
        ("script.sh", _FILE, (HERE / "script.sh").read_bytes()),
        ("settings", _FILE, "".join(lines).encode()),
    ]
    for number, path in enumerate(modules(version)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        entries.append((f"modules/{number:02d}-{path.name.split('.')[0]}.ko", _FILE, data))
    return b"".join(_archive(entries))


def _is_dynamic(program: bytes) -> bool:
    """Tell whether a 64-bit ELF program names an interpreter, elf(5)."""
    offset, size, count = struct.unpack_from("<32xQ14xHH", program)
    kinds = [struct.unpack_from("<I", program, offset + size * i)[0] for i in range(count)]
    return _PT_INTERP in kinds


def _archive(entries: list[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Write cpio's "newc" format (the kernel's Documentation, early-userspace/buffer-format)."""
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        named = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(named), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + named
        yield head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def run(kernel: Path, files: Path, console: Path, seconds: float) -> bool:
    """Run the machine until it switches itself off; tell whether it did in time.

    :param files: what :func:`initial_files` made.
    :param console: gets what the machine writes to its serial line.
    """
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU, "-smp", "2", "-m", "1536"]
    command += ["-no-reboot", "-serial", f"file:{console}"]
    command += ["-kernel", str(kernel), "-initrd", str(files)]
    command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"]
    command += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
    command += ["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=seconds, check=True)
    except subprocess.TimeoutExpired:
        return False
    return True
