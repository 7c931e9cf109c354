"""A terminal of a given width, and what a program has put on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import traceback
from collections.abc import Callable

ROWS = 50


def on_terminal(
    work: Callable[[], object],
    columns: int,
    seconds: float = 240.0,
    *,
    until: Callable[[str], bool] = lambda text: False,
    **environment: str,
) -> str:
    """Run something in a process whose standard streams are a terminal; give all it wrote there.

    :param until: tells of what it wrote so far whether somebody now presses Ctrl-C.
    :param environment: beside what the terminal says.
    """
    pid, master = pty.fork()
    if not pid:
        try:
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            os.environ |= {"TERM": "xterm-256color", **environment}
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
            work()
        except Exception:  # noqa: BLE001 - whoever runs it sees it on the terminal
            traceback.print_exc()
        finally:
            os._exit(0)
    found, pressed = b"", False
    while select.select([master], [], [], seconds)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        found += data
        if not pressed and until(found.decode(errors="replace")):
            pressed = True
            os.write(master, b"\x03")
    os.close(master)
    os.waitpid(pid, 0)
    return found.decode()


def screen(output: str) -> list[str]:
    """Give the lines that remain on an endless terminal, without colours and spaces at the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b.", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row = max(row - count, 0)
            elif part.endswith("K"):
                lines[row] = "" if part == "\x1b[2K" else lines[row][:column]
            elif part.endswith("H"):
                row = column = 0
            elif part.endswith("J"):
                del lines[row + 1 :]
        elif not part.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
