"""What the commands share by which drivers, or rmds, are told to do something.

They act on the groups of which this host is primary (or secondary), each by its own daemon: what
one refuses keeps none of the others from being asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.errors import ConfigError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli
from qdsmirror.tools.client import ControlClient

#: A driver answers when what it was told is durable in every writelog of the group.
ANSWER_SECONDS = 30.0


def primaries(paths: Paths, arguments: argparse.Namespace) -> cli.Selection:
    """Give the selected groups of which this host is primary, and which have broken files.

    :raises ConfigError: there is none, or one that was named is not.
    """
    return _of_role(paths, arguments, "primary")


def secondaries(paths: Paths, arguments: argparse.Namespace) -> cli.Selection:
    """Give those of which this host is secondary, as :func:`primaries` does."""
    return _of_role(paths, arguments, "secondary")


def _of_role(paths: Paths, arguments: argparse.Namespace, role: str) -> cli.Selection:
    host = load_host(paths)
    selected, broken = cli.load_selection(arguments, paths)
    here = [one for one in selected if one.role_of(host.name) == role]
    others = [one for one in selected if one not in here]
    if not here or (others and (arguments.numbers or arguments.names)):
        other = (others or selected)[0]
        where = other.primary_host if role == "primary" else other.secondary_host
        raise ConfigError(
            f"host {host.name} is not the {role} of {other.name}", hint=f"run this on {where}"
        )
    return cli.Selection(here, broken)


def order(
    paths: Paths, config: GroupConfig, command: str, *, daemon: str = "driver", **words: str
) -> dict[str, Any]:
    """Call a command of a group's driver.

    :param daemon: or of its ``rmd``.
    :returns: the daemon's answer with the group's number and name.
    :raises QdsError: what it says, or that it does not answer.
    """
    control = paths.control_socket(f"{config.name}.{daemon}")
    answer = ControlClient(control, ANSWER_SECONDS).call(command, **words)
    return {**answer, "group": config.number, "name": config.name}


def order_all(
    paths: Paths,
    configs: Iterable[GroupConfig],
    failed: list[QdsError],
    command: str,
    *,
    daemon: str = "driver",
    **words: str,
) -> list[dict[str, Any]]:
    """Call a command of every group's driver.

    :param failed: takes what was refused.
    :param daemon: as for :func:`order`.
    :returns: the answers as :func:`order` gives them.
    """
    done = []
    for config in configs:
        try:
            done.append(order(paths, config, command, daemon=daemon, **words))
        except QdsError as error:
            failed.append(error)
    return done


def tell(as_json: bool, groups: list[dict[str, Any]], text: str, failed: Sequence[QdsError]) -> int:
    """Say what was done to which groups, and what was not; give the exit code."""
    if as_json:
        cli.print_json({"groups": groups, **cli.errors_json(failed)})
    else:
        for group in groups:
            print(f"{group['name']}: {text}")
    return cli.report_all(failed, as_json)
