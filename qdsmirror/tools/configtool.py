"""``qdsconfigtool``: check and show the configuration, make certificates, apply changes."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdsmirror.config import GroupConfig, HostConfig, load_host, scan_groups
from qdsmirror.core.throttles import Throttle
from qdsmirror.errors import EXIT_CONFIG, EXIT_OK, QdsError, UnreachableError, UsageError
from qdsmirror.limits import APPLY_SECONDS, GROUPS_MAX, HOST_CERTIFICATE_DAYS
from qdsmirror.paths import Paths, group_name
from qdsmirror.tools import cli

if TYPE_CHECKING:
    from qdsmirror.config import Problem
    from qdsmirror.pki import Made

#: The masters that take up changed files, in the order in which they are told.
MASTERS = ("qdsdriver", "qdsrmd", "qdspmd", "qdsconsole")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsconfigtool``."""
    made = cli.parser("qdsconfigtool", "Check, show and apply the configuration; make its keys.")
    commands = cli.subcommands(made)
    check = cli.subcommand(
        commands, "check", "Name everything that is wrong in the configuration of this host."
    )
    check.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="only these files, by themselves (default: all of the host, with keys and secrets)",
    )
    check.add_argument(
        "--against-peer",
        action="store_true",
        help="also compare the groups' files with those of their secondaries, which are asked",
    )
    cli.subcommand(
        commands, "show", "Print the configuration in effect, defaults included.", groups=True
    )
    _add_pki(commands)
    units = cli.subcommand(
        commands, "units", "Let the systemd units open the devices of this host's groups."
    )
    units.add_argument(
        "--out",
        metavar="DIR",
        help="write drop-ins there, e.g. /etc/systemd/system (default: print them)",
    )
    cli.subcommand(commands, "apply", "Make the running daemons take up changed files.")
    _add_throttle(commands)
    return made


def _add_pki(commands: Any) -> None:
    pki = cli.subcommand(
        commands, "pki", "Make authority, certificates and group secrets for a pair of hosts."
    )
    pki.add_argument("--out", metavar="DIR", required=True, help="where to put them")
    pki.add_argument("primary", metavar="PRIMARY_NAME", help="the primary's name in its qds.cfg")
    pki.add_argument("secondary", metavar="SECONDARY_NAME", help="likewise the secondary's")
    pki.add_argument(
        "--groups",
        metavar="N",
        type=_count,
        default=1,
        help=f"make secrets for groups 0 to N-1, N at most {GROUPS_MAX} (default: 1)",
    )
    pki.add_argument(
        "--overwrite",
        action="store_true",
        help="renew certificates, keys and secrets that exist; the authority stays",
    )
    pki.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be written, replaced and kept",
    )


def _add_throttle(commands: Any) -> None:
    throttle = cli.subcommand(
        commands, "throttle", "Say what throttles mean, or when they would have fired.", groups=True
    )
    what = throttle.add_mutually_exclusive_group(required=True)
    what.add_argument("--explain", action="store_true", help="say in words what they mean")
    what.add_argument(
        "--replay",
        metavar="FILE.prf",
        help="evaluate them on what a performance tracking file has recorded",
    )
    throttle.add_argument(
        "--file", metavar="FILE.cfg", help="those of this file (default: of the group's own)"
    )
    throttle.add_argument(
        "--zone", metavar="NAME", help="replay in this time zone (default: the host's)"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 <= int(text) <= GROUPS_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {GROUPS_MAX}")
    return int(text)


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsconfigtool``.

    :returns: the exit code: 10 if ``check`` found an error.
    """
    arguments = build_parser().parse_args(argv)
    commands = {
        "check": _check,
        "show": _show,
        "pki": _pki,
        "units": _units,
        "apply": _apply,
        "throttle": _throttle,
    }
    return commands[arguments.command](arguments, cli.paths_of(arguments))


# -- check -----------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace, paths: Paths) -> int:
    from qdsmirror.tools import configcheck, progress

    compared: list[tuple[Problem, int]] = []
    if arguments.files:
        if arguments.against_peer:
            raise UsageError(
                "files by themselves are compared with nobody's",
                "qdsconfigtool check --against-peer",
            )
        problems = configcheck.check_files([Path(file) for file in arguments.files])
    else:
        problems = configcheck.check_all(paths)
    if arguments.against_peer:
        with progress.waiting(arguments.json, "peer", "asking the secondaries"):
            compared = configcheck.check_peer(paths)
        problems = problems + [one for one, _ in compared]
    if arguments.json:
        cli.print_json(
            {
                "problems": [
                    {**dataclasses.asdict(problem), "file": str(problem.file)}
                    for problem in problems
                ]
            }
        )
    else:
        for problem in problems:
            print(cli.one_line(str(problem)))
        if not problems:
            print("no problems found")
    codes = dict(compared)
    wrong = [codes.get(one, EXIT_CONFIG) for one in problems if one.severity == "error"]
    return EXIT_CONFIG if EXIT_CONFIG in wrong else next(iter(wrong), EXIT_OK)


# -- show ------------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace, paths: Paths) -> int:
    host = load_host(paths)
    groups: list[GroupConfig] = []
    broken: list[QdsError] = []
    if any(scan_groups(paths)) or arguments.numbers or arguments.names:
        groups, broken = cli.load_selection(arguments, paths)
    if arguments.json:
        described = [{**_group(group), "role": group.role_of(host.name)} for group in groups]
        cli.print_json({"host": _host(host), "groups": described, **cli.errors_json(broken)})
        return cli.report_all(broken, as_json=True)
    print(f"# {paths.host_config}")
    for key, value in _host(host).items():
        print(f"{key} = {_text(value)}" if value != "" else f"# {key}: whoever starts the daemons")
    for group in groups:
        print(f"\n# {group.path}: here {group.role_of(host.name) or 'neither side'}")
        _print_section(_group(group)["configuration"], 0)
    return cli.report_all(broken, as_json=False)


def _host(host: HostConfig) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(host).items()
    }


def _group(group: GroupConfig) -> dict[str, Any]:
    """Give a group's configuration as its file is built."""
    return {
        "group": group.number,
        "name": group.name,
        "file": str(group.path),
        "configuration": {
            "operation": group.operation,
            "durability": group.durability,
            "on_overflow": group.on_overflow,
            "on_disconnect": group.on_disconnect,
            "near_sync_entries": group.near_sync_entries,
            "primary": {"host": group.primary_host, "address": group.primary_address},
            "secondary": {
                "host": group.secondary_host,
                "address": group.secondary_address,
                "port": group.port,
                "journal_device": group.journal_device,
                **({"paths": ", ".join(map(str, group.paths))} if group.paths else {}),
            },
            "tunables": {
                **dataclasses.asdict(group.tunables),
                "verify_every": group.tunables.verify_every or "never",
            },
            **({"pool": {"devices": ", ".join(group.pool)}} if group.pool else {}),
            "ldsus": {
                ldsu.name: {
                    "data_device": ldsu.data_device,
                    "writelog_device": ldsu.writelog_device,
                    **({"bitmap_device": ldsu.bitmap_device} if ldsu.bitmap_device else {}),
                    "mirror_device": ldsu.mirror_device,
                }
                for ldsu in group.ldsus
            },
            **({"throttles": dict(map(_described, group.throttles))} if group.throttles else {}),
        },
    }


def _described(throttle: Throttle) -> tuple[str, dict[str, Any]]:
    window = throttle.window
    return throttle.name, {
        **({"from": f"{window.start}", "to": f"{window.stop}"} if window is not None else {}),
        "test": str(throttle.test),
        "actions": [str(action) for action in throttle.actions],
    }


def _print_section(section: dict[str, Any], depth: int) -> None:
    indent = "  " * max(0, depth - 1)
    for key, value in section.items():
        if isinstance(value, dict):
            print("  " * depth + "[" * (depth + 1) + key + "]" * (depth + 1))
            _print_section(value, depth + 1)
        elif isinstance(value, list):
            print(f'{indent}{key} = """')
            print("\n".join(f"{indent}  {line}" for line in value))
            print(f'{indent}"""')
        else:
            print(f"{indent}{key} = {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if not any(special in text for special in "#'\""):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'


# -- pki -------------------------------------------------------------------------------------------


def _pki(arguments: argparse.Namespace, paths: Paths) -> int:
    from qdsmirror import pki
    from qdsmirror.configvalues import valid_host_name

    names = [arguments.primary.lower(), arguments.secondary.lower()]
    for name in names:
        if not valid_host_name(name):
            raise UsageError(f"{name!r} is not a host name", "use letters, digits, -_.")
    if names[0] == names[1]:
        raise UsageError("primary and secondary have the same name", "give two names")
    out = Path(arguments.out).absolute()
    numbers = range(arguments.groups)
    dry_run = arguments.dry_run
    made = pki.make_hosts(out, names, numbers, overwrite=arguments.overwrite, dry_run=dry_run)
    if dry_run:
        return _tell_pki_plan(made, arguments.json)
    if arguments.json:
        cli.print_json(
            {
                "written": [str(path) for path in made.written],
                "replaced": [str(path) for path in made.replaced],
                "kept": [str(path) for path in made.kept],
                "copy": {name: str(out / name) for name in names},
            }
        )
        return EXIT_OK
    for word, files in (("written", made.written), ("kept", made.kept)):
        for path in files:
            print(f"{word}: {path}")
    print()
    for name in names:
        print(f"Copy the files of {out / name} to {paths.etc} of {name}, modes kept:")
        print(f"  scp -p {shlex.quote(str(out / name))}/* root@{name}:{paths.etc}/")
    print(
        f"Keep {out / pki.CA_KEY} off both hosts: who has it can pass for any host.\n"
        f"The certificates are valid for {HOST_CERTIFICATE_DAYS} days."
    )
    return EXIT_OK


def _tell_pki_plan(made: Made, as_json: bool) -> int:
    """Say what would be done."""
    fresh = [path for path in made.written if path not in made.replaced]
    plan = (
        ("would_write", "would be written", fresh),
        ("would_replace", "would be replaced", made.replaced),
        ("kept", "kept", made.kept),
    )
    if as_json:
        cli.print_json({key: [str(path) for path in files] for key, _, files in plan})
        return EXIT_OK
    for _, words, files in plan:
        for path in files:
            print(f"{words}: {path}")
    return EXIT_OK


# -- units -----------------------------------------------------------------------------------------


def _units(arguments: argparse.Namespace, paths: Paths) -> int:
    from qdsmirror.tools.units import drop_ins, write

    groups, problems = scan_groups(paths)
    for error in cli.broken_files(paths, problems).values():
        # Without its devices a group that runs could not be started again.
        raise error
    made = drop_ins(load_host(paths).name, groups)
    written = write(Path(arguments.out), made) if arguments.out is not None else []
    if arguments.json:
        cli.print_json({"units": made, "written": [str(path) for path in written]})
    elif arguments.out is None:
        for name, text in made.items():
            print(f"# {name}\n{text}")
    else:
        for path in written:
            print(f"{path} written")
        print("systemctl daemon-reload; what runs already keeps what it has until it is restarted")
    return EXIT_OK


# -- throttle --------------------------------------------------------------------------------------


def _throttle(arguments: argparse.Namespace, paths: Paths) -> int:
    from qdsmirror.tools import throttles

    if arguments.explain:
        return throttles.explain(arguments, paths)
    return throttles.replay(arguments, paths)


# -- apply -----------------------------------------------------------------------------------------


def _apply(arguments: argparse.Namespace, paths: Paths) -> int:
    from qdsmirror.tools.client import ControlClient

    running = [name for name in MASTERS if paths.control_socket(name).exists()]
    if not running:
        raise UnreachableError(
            f"no daemon runs here: there is no control socket in {paths.run}",
            "start them with launchdriver, launchpmds or launchrmds",
        )
    answers: dict[str, Any] = {}
    failed: list[tuple[str, QdsError]] = []
    for name in running:
        try:
            answers[name] = ControlClient(paths.control_socket(name), APPLY_SECONDS).call("Apply")
        except QdsError as error:
            failed.append((name, error))
    if arguments.json and not failed:
        cli.print_json({"daemons": answers})
    elif not arguments.json:
        _print_answers(answers)
    for name, refusal in failed:
        raise type(refusal)(f"{name}: {refusal.message}", refusal.hint)
    return EXIT_CONFIG if any(answer.get("errors") for answer in answers.values()) else EXIT_OK


def _print_answers(answers: dict[str, dict[str, Any]]) -> None:
    for name, answer in answers.items():
        done = [
            f"{what} {' '.join(map(group_name, answer[what]))}"
            for what in ("started", "stopped", "restarted", "retuned", "retried")
            if answer.get(what)
        ]
        done += [f"new sessions show {path}" for path in answer.get("renewed", [])]
        print(f"{name}: {', '.join(done) or 'nothing to change'}")
        for error in answer.get("errors", []):
            print(cli.one_line(f"{name}: {error}"))
