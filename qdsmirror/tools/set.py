"""``qdsset KEY=VALUE``: change a setting of running groups until their daemons' next start."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.configlive import (
    DAEMONS,
    SETTINGS,
    THROTTLE_KEYS,
    changed,
    parse_settings,
    setting,
)
from qdsmirror.errors import ConfigError, QdsError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, info_view
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.orders import ANSWER_SECONDS


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser(
        "qdsset",
        "Change settings of running groups until the next start; without any, show them.",
        epilog=f"Settings: {', '.join((*SETTINGS, *THROTTLE_KEYS))}.  See dsgrp.cfg(5).",
    )
    cli.add_selection(
        made,
        "KEY=VALUE, as in dsgrp.cfg(5), or an LDSU: only the groups with these",
        [f"{name}=" for name in (*SETTINGS, *THROTTLE_KEYS)],
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
        if setting(name) is not None:
            raise UsageError(f"{name}: to what?", hint=f"qdsset {shlex.quote(f'{name}=VALUE')}")
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
    role = config.role_of(host) or "secondary"
    orders: dict[str, dict[str, str]] = {daemon: {} for daemon in DAEMONS[role]}
    for key, text in settings.items():
        users = [daemon for daemon in orders if _goes_by(daemon, key, role)]
        if not users:
            other = "primary" if role == "secondary" else "secondary"
            where = config.primary_host if other == "primary" else config.secondary_host
            raise ConfigError(
                f"{config.name}: {key} is a setting of the {other}", hint=f"run this on {where}"
            )
        for daemon in users:
            orders[daemon][key] = text
    for daemon, own in orders.items():
        # Before the first of them is told.
        _check(config, own, daemon)
    values: dict[str, Any] = {}
    for daemon, own in orders.items():
        if own or not settings:
            control = paths.control_socket(f"{config.name}.{daemon}")
            client = ControlClient(control, ANSWER_SECONDS)
            values |= client.call("Set", settings=json.dumps(own))["settings"]
    return {"group": config.number, "name": config.name, "settings": values}


def _check(config: GroupConfig, settings: Mapping[str, str], daemon: str) -> None:
    try:
        changed(config, settings, daemon)
    except UsageError as error:
        raise UsageError(f"{config.name}: {error.message}", error.hint) from None


def _goes_by(daemon: str, key: str, role: str) -> bool:
    found = setting(key)
    return found is not None and found.is_of(daemon, role)


def _tell(group: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    for key in settings or group["settings"]:
        text = info_view.setting_text(key, group["settings"][key])
        print(f"{group['name']}: {key} = {text}")
