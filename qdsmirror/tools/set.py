"""``qdsset KEY=VALUE``: change a setting of running groups until their daemons' next start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.configlive import DAEMONS, SETTINGS, parse_settings
from qdsmirror.errors import ConfigError, QdsError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.orders import ANSWER_SECONDS

_WHERE = {"driver": "primary", "pmd": "primary", "rmd": "secondary"}


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser(
        "qdsset",
        "Change settings of running groups until the next start; without any, show them.",
        epilog=f"Settings: {', '.join(SETTINGS)}.  See dsgrp.cfg(5).",
    )
    cli.add_selection(
        made,
        "KEY=VALUE, as in dsgrp.cfg(5), or an LDSU: only the groups with these",
        [f"{name}=" for name in SETTINGS],
    )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsset``: return once the daemons go by the new values."""
    arguments = build_parser().parse_args(argv)
    words = [name for name in arguments.names if "=" in name]
    arguments.names = [name for name in arguments.names if "=" not in name]
    settings = parse_settings(words)
    for name in arguments.names:
        if name in SETTINGS:
            raise UsageError(f"{name}: to what?", hint=f"qdsset {name}=VALUE")
    paths = cli.paths_of(arguments)
    selected, failed = cli.load_selection(arguments, paths)
    host = load_host(paths).name
    groups: list[dict[str, Any]] = []
    for config in selected:
        try:
            groups.append(_set(paths, config, host, settings))
        except QdsError as error:
            failed.append(error)
    if arguments.json:
        cli.print_json({"groups": groups, **cli.errors_json(failed)})
    else:
        for group in groups:
            _tell(group, settings)
    return cli.report_all(failed, arguments.json)


def _set(
    paths: Paths, config: GroupConfig, host: str, settings: Mapping[str, str]
) -> dict[str, Any]:
    """Tell the group's daemons of this host; give the values that they go by now.

    :raises QdsError: what one of them says, or that it does not answer.
    """
    here = DAEMONS[config.role_of(host) or "secondary"]
    for key in settings:
        users = SETTINGS[key].daemons
        if not set(users) & set(here):
            raise ConfigError(
                f"{config.name}: {key} is a setting of the {_WHERE[users[0]]}",
                hint=f"run this on {config.primary_host}",
            )
    values: dict[str, Any] = {}
    for daemon in here:
        own = {key: text for key, text in settings.items() if daemon in SETTINGS[key].daemons}
        if own or not settings:
            control = paths.control_socket(f"{config.name}.{daemon}")
            client = ControlClient(control, ANSWER_SECONDS)
            values |= client.call("Set", settings=json.dumps(own))["settings"]
    return {"group": config.number, "name": config.name, "settings": values}


def _tell(group: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    for key in settings or group["settings"]:
        value = group["settings"][key]
        text = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        print(f"{group['name']}: {key} = {text}")
