"""The frame of every command: common options, selection of groups, errors, exit codes.

A command's module has ``build_parser()`` and ``main(argv=None) -> int``::

    def build_parser() -> argparse.ArgumentParser:
        return cli.parser("qdsinfo", "Show the state of the groups.", groups=True)

    @cli.run
    def main(argv: Sequence[str] | None = None) -> int:
        arguments = build_parser().parse_args(argv)
        paths = cli.paths_of(arguments)
        ...
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

from qdsmirror import __version__
from qdsmirror.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    DeviceError,
    QdsError,
    UsageError,
)
from qdsmirror.limits import GROUPS_MAX
from qdsmirror.paths import Paths, group_name
from qdsmirror.pidfile import running_pid

if TYPE_CHECKING:
    from pathlib import Path

    from qdsmirror.config import GroupConfig, HostConfig, Problem

#: Version of every JSON object that a command prints.
SCHEMA = 1

Main = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError`; options are never abbreviated."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **keywords)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        :raises UsageError: always.
        """
        raise UsageError(f"{self.prog}: {message}", hint=f"{self.prog} --help")


def parser(
    prog: str, description: str, *, groups: bool = False, epilog: str | None = None
) -> Parser:
    """Make a command's parser with the options that every command has.

    :param groups: whether it acts on groups: adds ``-g N`` and ``LDSU...``.
    """
    made = Parser(prog=prog, description=description, epilog=epilog)
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_common(made, False)
    if groups:
        add_selection(made)
    return made


def subcommands(of: argparse.ArgumentParser) -> Any:
    """Prepare a parser for subcommands; one must be given and stands in ``command``."""
    return of.add_subparsers(dest="command", metavar="COMMAND", required=True)


def subcommand(
    subparsers: Any, name: str, description: str, *, groups: bool = False
) -> argparse.ArgumentParser:
    """Add a subcommand; the common options may stand before or after its name.

    :param subparsers: what :func:`subcommands` gave.
    """
    made: argparse.ArgumentParser = subparsers.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    _add_common(made, True)
    if groups:
        add_selection(made)
    return made


def _add_common(to: argparse.ArgumentParser, inner: bool) -> None:
    # A subcommand's own default would overwrite what was given before its name.
    def default(value: Any) -> Any:
        return argparse.SUPPRESS if inner else value

    to.add_argument(
        "--json", action="store_true", default=default(False), help="print one JSON object"
    )
    to.add_argument(
        "--root",
        metavar="DIR",
        default=default(None),
        help="use DIR/etc, DIR/var, DIR/run and DIR/dev (default: $QDS_ROOT)",
    )


def paths_of(arguments: argparse.Namespace) -> Paths:
    """Find the paths that ``--root`` or ``$QDS_ROOT`` selects.

    :raises UsageError: the root is too long.
    """
    return Paths.of(arguments.root)


# -- selection of groups ---------------------------------------------------------------------------


def completes(action: argparse.Action, words: Iterable[str]) -> None:
    """Have the shells offer words for an argument that takes others, too."""
    action.completes = tuple(words)  # type: ignore[attr-defined]


def add_selection(
    to: argparse.ArgumentParser,
    names_help: str = "only the groups that have these LDSUs",
    words: Iterable[str] = (),
) -> None:
    """Add ``-g N`` (repeatable) and ``LDSU...``; :func:`select_groups` evaluates them.

    :param names_help: what LDSUs select.
    :param words: what may stand there beside LDSUs.
    """
    to.add_argument(
        "-g",
        dest="numbers",
        metavar="N",
        type=_group_number,
        action="append",
        default=[],
        help=f"only logical group N, 0 to {GROUPS_MAX - 1}; may be repeated (default: all)",
    )
    completes(to.add_argument("names", metavar="LDSU", nargs="*", help=names_help), words)


def _group_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < GROUPS_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a group's number")
    return int(text)


def select_groups(
    arguments: argparse.Namespace, groups: Sequence[GroupConfig]
) -> list[GroupConfig]:
    """Give the groups that ``-g`` or LDSU names select, in number order; without any, all.

    :param groups: the configured ones.
    :raises UsageError: both are given, or a group or LDSU does not exist.
    :raises ConfigError: no group is configured at all.
    """
    if not groups:
        raise ConfigError("no logical group is configured", "write dsgrp000.cfg; see dsgrp.cfg(5)")
    if arguments.numbers and arguments.names:
        raise UsageError("give either -g N or LDSUs, not both")
    by_number = {group.number: group for group in groups}
    by_name = {ldsu.name: group for group in groups for ldsu in group.ldsus}
    chosen = set(arguments.numbers)
    for number in arguments.numbers:
        if number not in by_number:
            known = ", ".join(str(one) for one in sorted(by_number)[:10])
            raise UsageError(f"{group_name(number)} is not configured", f"groups here: {known}")
    for name in arguments.names:
        if name not in by_name:
            raise UsageError(f"no LDSU is named {name!r}", _nearest_ldsu(name, by_name))
        chosen.add(by_name[name].number)
    return [by_number[number] for number in sorted(chosen or by_number)]


class Selection(NamedTuple):
    """What ``-g`` and LDSU names select.

    :ivar groups: the good ones, in number order; never empty.
    :ivar broken: an error for each selected group whose file is broken.
    """

    groups: list[GroupConfig]
    broken: list[QdsError]


def taking_part(groups: Iterable[GroupConfig], host: HostConfig, paths: Paths) -> list[GroupConfig]:
    """Give those of the groups in which this host plays a part.

    :raises ConfigError: there is none.
    """
    here = [group for group in groups if group.role_of(host.name) is not None]
    if not here:
        names = ", ".join(group.name for group in groups)
        raise ConfigError(
            f"host {host.name} is neither primary nor secondary of {names}",
            hint=f"compare name in {paths.host_config} with the groups' hosts: qdsconfigtool show",
        )
    return here


def load_selection(arguments: argparse.Namespace, paths: Paths) -> Selection:
    """Load the group files and select among them: a broken file stops its own group only.

    A broken one that is not selected is warned of on standard error.

    :raises UsageError: as :func:`select_groups`.
    :raises ConfigError: nothing that is selected is good, or a name may stand in a broken file.
    """
    from qdsmirror.config import scan_groups

    groups, problems = scan_groups(paths)
    broken = broken_files(paths, problems)
    wanted = {paths.group_config(number) for number in arguments.numbers}
    if arguments.names:
        known = {ldsu.name for group in groups for ldsu in group.ldsus}
        if broken and not known.issuperset(arguments.names):
            raise next(iter(broken.values()))
        selected = {}
    elif wanted:
        selected = {path: error for path, error in broken.items() if path in wanted}
    else:
        selected = broken
    if selected and (not groups or wanted and wanted.issubset(selected)):
        if len(selected) > 1:
            report_all(list(selected.values())[:-1], as_json=arguments.json)
        raise list(selected.values())[-1]
    for path, error in broken.items():
        if path not in selected:
            print(f"warning: {one_line(error.message)}", file=sys.stderr)
    good = [one for one in arguments.numbers if paths.group_config(one) not in selected]
    arguments = argparse.Namespace(numbers=good, names=arguments.names)
    return Selection(select_groups(arguments, groups), list(selected.values()))


def broken_files(paths: Paths, problems: Sequence[Problem]) -> dict[Path, QdsError]:
    """Give one error for each file that has problems.

    :param problems: of ``config.scan_groups``.
    """
    from qdsmirror.config import ProblemsError

    hint = " ".join(["qdsconfigtool check", *paths.arguments()])
    return {
        path: ProblemsError([one for one in problems if one.file == path], hint)
        for path in dict.fromkeys(one.file for one in problems)
    }


def _nearest_ldsu(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return (f"did you mean {found[0]}? " if found else "") + "qdsinfo lists the LDSUs"


# -- output and errors -----------------------------------------------------------------------------


def print_json(value: dict[str, Any], *, indent: int | None = 2) -> None:
    """Print an object, with its schema version first, on standard output.

    :param indent: ``None`` puts it on one line (``--watch --json``).
    """
    print(json.dumps({"schema": SCHEMA, **value}, indent=indent, ensure_ascii=False), flush=True)


def one_line(text: str) -> str:
    """Make a text one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def report(error: QdsError, as_json: bool) -> int:
    """Print an error, on standard output as JSON or else as one line on standard error.

    :returns: the exit code.
    """
    if as_json:
        print_json({"error": described(error)}, indent=None)
    else:
        parts = [one_line(part) for part in (error.message, error.hint) if part]
        print("; ".join(parts), file=sys.stderr)
    return error.exit_code


def described(error: QdsError) -> dict[str, str]:
    """Give an error as ``--json`` shows it."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def errors_json(errors: Sequence[QdsError]) -> dict[str, Any]:
    """Give what an object says of groups that failed beside others: ``error``, the first; all."""
    told = [described(error) for error in errors]
    return {"error": told[0], "errors": told} if told else {}


def report_all(errors: Sequence[QdsError], as_json: bool) -> int:
    """Print every error as a line on standard error, unless the JSON object has them.

    :returns: the first one's exit code, 0 if there is none.
    """
    for error in errors:
        if not as_json:
            report(error, as_json=False)
    return errors[0].exit_code if errors else EXIT_OK


def run(main_function: Main) -> Callable[..., int]:
    """Decorate a ``main(argv)``: whatever it raises becomes the promised output and exit code.

    A :class:`QdsError` (usage errors of the parser among them) is one line on standard error, or
    with ``--json`` an object on standard output.  Ctrl-C exits with 130; a reader that closed
    our standard output ends the command quietly.  Our own faults keep their traceback.
    """

    @functools.wraps(main_function)
    def main(argv: Sequence[str] | None = None) -> int:
        given = sys.argv[1:] if argv is None else list(argv)
        try:
            try:
                code = _guarded(main_function, given)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _silence(sys.stdout)
            return EXIT_FAILED
        return code

    return main


def _guarded(main_function: Main, argv: list[str]) -> int:
    as_json = "--json" in argv[: argv.index("--") if "--" in argv else None]
    try:
        return main_function(argv)
    except QdsError as error:
        return report(error, as_json)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as end:  # argparse: --help, --version
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return report(QdsError(f"{where}{error.strerror or error}"), as_json)


def _silence(stream: TextIO) -> None:
    # Otherwise the interpreter complains once more when it flushes the stream at exit.
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Tell what an OSError befell: one of an open device knows a descriptor only.

    :param what: e.g. ``writelog of qds0 /dev/vg0/log0``.
    :raises DeviceError: instead of it.
    """
    try:
        yield
    except OSError as error:
        where = f" {os.fsdecode(error.filename)}:" if error.filename is not None else ""
        raise DeviceError(
            f"{what}:{where} {error.strerror or error}", hint="see what the kernel says: dmesg"
        ) from error


def refuse_beside_daemon(paths: Paths, group: GroupConfig, role: str) -> None:
    """Refuse to touch a group's devices while its daemon has them.

    :param role: ``driver`` or ``rmd``.
    :raises QdsError: it runs.
    """
    pid = running_pid(paths.pid_file(f"{group.name}.{role}"))
    if pid is not None:
        kill = "killdriver" if role == "driver" else "killrmds"
        raise QdsError(
            f"{group.name}: its {role} runs (pid {pid}) and holds the devices",
            hint=f"end it first: {' '.join([kill, *paths.arguments()])}; or select others with -g",
        )
