"""What is wrong with a group, by what its daemons say of it (the objects of ``qdsinfo --json``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qdsmirror.core.findings import Finding, advice, error, warning
from qdsmirror.errors import EXIT_BROKEN, EXIT_DEGRADED, EXIT_FAILED, EXIT_UNREACHABLE

Group = Mapping[str, Any]

#: A log that is fuller than this will soon make writes wait, or its group enter bypass.
LOG_FULL_RATIO = 0.8
#: One that will be full sooner than this, too.
LOG_FULL_SECONDS = 900.0
_LAUNCHERS = {"driver": "launchdriver", "pmd": "launchpmds", "rmd": "launchrmds"}
_PLAINLY_DOWN = "not running"


def diagnose(group: Group, root: str = "") -> list[Finding]:
    """Find what is wrong with a group.

    :param group: as ``qdsinfo --json`` has it.
    :param root: what commands have to be told besides, e.g. ``--root DIR``.
    """
    commands = _Commands(group, root)
    side = _primary if group["role"] == "primary" else _secondary
    return [*side(group, commands), *_both(group, commands)]


class _Commands:
    """Next commands, complete with what selects root and group."""

    def __init__(self, group: Group, root: str) -> None:
        self._root = f" {root}" if root else ""
        self._group = f" -g {group['group']}"

    def host(self, command: str) -> str:
        """Give a command about the host."""
        return command + self._root

    def group(self, command: str) -> str:
        """Give a command about the group; options may follow its name."""
        name, _, rest = command.partition(" ")
        return f"{name}{self._root}{self._group}" + (f" {rest}" if rest else "")


def _primary(group: Group, commands: _Commands) -> Iterator[Finding]:
    yield from _daemon(group, "driver", commands)
    if group["driver"]["pid"] is not None:
        yield from _pmd(group, commands)
    yield from _bypass(group, commands)
    yield from _synchronous(group, commands)
    for unit in group["ldsus"]:
        yield from _unit(group, unit, commands)


def _secondary(group: Group, commands: _Commands) -> Iterator[Finding]:
    yield from _daemon(group, "rmd", commands)
    rmd = group["rmd"]
    name, number = group["name"], group["group"]
    if rmd["pid"] is not None and rmd.get("state") == "refused":
        step = rmd.get("hint") or commands.host("qdsconfigtool check")
        told = f"{name}: the primary's connection was refused: {rmd.get('reason')}"
        yield error("link", told, step, number, rmd.get("code") or EXIT_FAILED)
    elif rmd["pid"] is not None and rmd.get("state") != "connected":
        told = f"{name}: no connection from the primary {group['peer']}: {rmd.get('reason')}"
        step = f"on {group['peer']}: qdsinfo -g {number}; qdsdoctor --peer -g {number}"
        yield warning("link", told, step, number)
    journal = group.get("journal") or {}
    yield from _filling(group, "its journal", journal, commands)


def _daemon(group: Group, role: str, commands: _Commands) -> Iterator[Finding]:
    """Tell of a daemon that does not serve the group, and of one of whose devices has failed."""
    part, name, number = group[role], group["name"], group["group"]
    reason = str(part.get("reason") or group["reason"] or "")
    if part["pid"] is not None and not (role == "driver" and part.get("state") == "failed"):
        return
    if part.get("state") == "failed":
        # What it says ends with what to do about it.
        code = part.get("code") or EXIT_FAILED
        told = f"{name}: its {role} has failed: {reason}"
        yield error(
            "daemons", told, f"mend that, then: {commands.host('qdsconfigtool apply')}",
            number, code,
        )  # fmt: skip
    elif _PLAINLY_DOWN in reason or not reason:
        told = f"{name}: {role} not running"
        step = commands.host(_LAUNCHERS[role])
        yield error("daemons", told, step, number, EXIT_UNREACHABLE)
    else:
        told = f"{name}: its {role} does not answer: {reason}"
        step = f"mend that, then: {commands.host('qdsconfigtool apply')}"
        yield error("daemons", told, step, number, EXIT_UNREACHABLE)


def _pmd(group: Group, commands: _Commands) -> Iterator[Finding]:
    pmd, name, number = group["pmd"], group["name"], group["group"]
    if pmd.get("pid") is None:
        yield from _daemon(group, "pmd", commands)
        return
    reason = str(pmd.get("reason") or "")
    state = pmd.get("state")
    step = pmd.get("hint") or commands.group("qdsdoctor --peer")
    if state == "refused":
        told = f"{name}: the link is refused: {reason}"
        yield error("link", told, step, number, pmd.get("code") or EXIT_FAILED)
    elif state != "connected":
        told = f"{name}: no link to {group['peer']}: {reason or 'not connected yet'}"
        yield error("link", told, step, number, EXIT_UNREACHABLE)
    for path in (group.get("wire") or {}).get("paths", ()):
        if state == "connected" and path["state"] != "connected":
            way = f"{path.get('local') or ''}>{path['remote']} port {path['port']}"
            told = f"{name}: network path {way} is {path['state']}: {path.get('reason')}"
            yield warning("link", told, commands.group("qdsdoctor --peer"), number)


def _bypass(group: Group, commands: _Commands) -> Iterator[Finding]:
    bypass, number = group["bypass"], group["group"]
    if not bypass:
        return
    name = group["name"]
    if not all((unit.get("writelog") or {}).get("trusted", True) for unit in group["ldsus"]):
        told = f"{name}: in bypass, for a writelog has failed: {bypass['reason']}"
        steps = (
            f"replace its device; {commands.host('killdriver')}; "
            f"{commands.group('qdswlinit --yes')}; {commands.host('launchdriver')}; "
            f"{commands.group('qdsrefresh --full')}"
        )
        yield error("devices", told, steps, number, EXIT_BROKEN)
        return
    told = (
        f"{name}: in bypass ({bypass['reason']}): the mirror stays as it was then, "
        f"{bypass.get('dirty_bytes')} bytes may differ"
    )
    yield warning("state", told, commands.group("qdsbypass off"), number)


def _synchronous(group: Group, commands: _Commands) -> Iterator[Finding]:
    told, degraded = group["synchronous"] or {}, group["degraded"]
    name, number = group["name"], group["group"]
    if degraded:
        text = f"{name}: degraded, answers do not wait for the secondary: {degraded['reason']}"
        yield warning("state", text, commands.group("qdsdoctor --peer"), number)
    elif told.get("waiting") and group["pmd"].get("state") != "connected":
        text = f"{name}: {told['waiting']} writes wait for the secondary, which is away"
        step = commands.group("qdsset on_disconnect=async")
        step += "; or bring it back: " + commands.group("qdsdoctor --peer")
        yield error("state", text, step, number, EXIT_DEGRADED)


def _unit(group: Group, unit: Mapping[str, Any], commands: _Commands) -> Iterator[Finding]:
    name, number = group["name"], group["group"]
    if unit.get("dead"):
        for reason in unit["errors"]:
            yield error(
                "devices",
                f"{name}: {unit['name']}: {reason}: its applications get errors",
                f"replace {unit['data_device']}; {commands.host('killdriver')}; "
                f"{commands.host('qdswlinit')} --replaced {unit['name']}; "
                f"{commands.host('launchdriver')}; "
                f"{commands.group('qdsbackfresh --yes')}",
                number,
                EXIT_BROKEN,
            )
    log = unit.get("writelog") or {}
    yield from _filling(group, f"the writelog of {unit['name']}", log, commands)


def _filling(
    group: Group, what: str, log: Mapping[str, Any], commands: _Commands
) -> Iterator[Finding]:
    """Warn of a log that is nearly full, or will be soon."""
    ratio, seconds = log.get("used_ratio"), log.get("seconds_to_full")
    soon = seconds is not None and seconds < LOG_FULL_SECONDS
    if ratio is None or ratio < LOG_FULL_RATIO and not (soon and ratio > 0.5):
        return
    told = f"{group['name']}: {what} is {100 * ratio:.0f} % full"
    if seconds is not None:
        told += f", entirely in {seconds:.0f} s at the present rate"
    yield warning("state", told, _way_out(group, commands), group["group"])


def _way_out(group: Group, commands: _Commands) -> str:
    """Give what makes room in a log."""
    held = group.get("checkpoint")
    if held:
        where = "" if group["role"] == "secondary" else f"on {group['peer']}: "
        return f"release the checkpoint: {where}" + commands.group("qdscheckpoint off")
    if group["role"] == "secondary":
        return "see what the mirror devices do: iostat -x 5; " + commands.group("qdsinfo --watch")
    if group["pmd"].get("state") != "connected":
        return "mend the link: " + commands.group("qdsdoctor --peer")
    if (group.get("pool") or {}).get("free"):
        return commands.group("qdsextend")
    return "the link or the secondary is too slow: " + commands.group("qdsdoctor --peer")


def _both(group: Group, commands: _Commands) -> Iterator[Finding]:
    name, number = group["name"], group["group"]
    busy = group["refresh"] or group["backfresh"] or "refresh" in group["modes"]
    if group["coherent"] is False and not busy and not group["bypass"]:
        told = f"{name}: the mirror is not coherent, it is no state of the primary's disks"
        where = "" if group["role"] == "primary" else f"on {group['peer']}: "
        step = where + (commands.group("qdsrefresh") if not where else f"qdsrefresh -g {number}")
        yield error("state", told, step, number, EXIT_BROKEN)
    held = group.get("checkpoint")
    if held:
        where = "" if group["role"] == "secondary" else f"on {group['peer']}: "
        told = f"{name}: checkpoint {held['name']} holds the mirror at GSN {held['gsn']}"
        step = where + f"qdscheckpoint off -g {number}, when it is no longer needed"
        yield advice("state", told, step, number)
    verify = group["verify"]
    if verify and verify.get("result") == "differs" and not verify.get("repair"):
        told = f"{name}: a verify found {verify['differing_bytes']} bytes of the mirror to differ"
        yield error("state", told, commands.group("qdsverify --repair"), number, EXIT_BROKEN)
    for note in group.get("errors", ()):
        told = f"{name}: earlier: {note}"
        yield advice("state", told, f"see the daemon's log; {commands.group('qdsinfo')}", number)
