"""What ``qdsinfo`` tells a person about groups: the cells of its tables, and the lines below.

On a terminal ``info_table`` shows them, elsewhere they are plain text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from qdsmirror.core.states import Mode
from qdsmirror.tools.status import Group

HEADINGS = ("GROUP", "ROLE", "STATE", "SINCE", "COHERENT", "GSN", "COMMITTED", "MIRRORED", "LAG")
UNIT_HEADINGS = ("GROUP", "LDSU", "SIZE", "LOG USED", "FULL IN", "ENTRIES", "DEVICE")
_UNKNOWN = "-"


def is_terminal(stream: TextIO | None = None) -> bool:
    """Tell whether a stream, stdout by default, is a terminal that can show more than lines."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def size_text(size: float | None) -> str:
    """Give bytes as a person reads them: ``256 MiB``."""
    if size is None:
        return _UNKNOWN
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def duration_text(seconds: float | None) -> str:
    """Give a duration: ``3.2 s``, ``5 min``, ``2.5 h``."""
    if seconds is None:
        return _UNKNOWN
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, length, limit in (("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            count = seconds / length
            return f"{count:.1f} {unit}" if unit == "h" else f"{count:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def setting_text(key: str, value: Any) -> str:
    """Give a setting's value so that ``qdsset`` takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "verify_every" and not value:
        return "never"
    return str(value).removesuffix(".0")


def full_text(seconds: float | None) -> str:
    """Give when a log will be full at its present rate; ``-`` while it is not filling."""
    return "FULL" if seconds == 0 else duration_text(seconds)


def group_row(group: Group, now: float) -> tuple[str, ...]:
    """Give a group's cells under HEADINGS.

    :param now: seconds since 1970.
    """
    gsn, lag = group["gsn"], group["lag"]
    since = group["since"]
    coherent = {True: "yes", False: "NO"}.get(group["coherent"], _UNKNOWN)
    return (
        group["name"],
        group["role"],
        "+".join(group["modes"]) or group["state"],
        _UNKNOWN if since is None else duration_text(max(now - since, 0.0)),
        coherent,
        _number(gsn["written"]),
        _number(gsn["committed"]),
        _number(gsn["mirrored"]),
        _lag_text(lag),
    )


def unit_rows(group: Group) -> list[tuple[str, ...]]:
    """Give the cells of a group's LDSUs under UNIT_HEADINGS."""
    rows: list[tuple[str, ...]] = []
    for unit in group["ldsus"]:
        log: dict[str, Any] = unit.get("writelog") or group.get("journal") or {}
        ratio = log.get("used_ratio")
        at = unit["mirror_device"] if group["role"] == "secondary" else unit["data_device"]
        rows.append(
            (
                group["name"],
                unit["name"],
                size_text(unit["size"]),
                _UNKNOWN if ratio is None else f"{100 * ratio:.1f} %",
                full_text(log.get("seconds_to_full")),
                _number(log.get("entries")),
                unit["device"] or at,
            )
        )
    return rows


def remarks(group: Group) -> list[str]:
    """Give the lines that say what is going on, or wrong."""
    lines = []
    progress = group["refresh"]
    if progress:
        reason = _reason_of(group, Mode.REFRESH)
        lines.append(f"{group['name']}: {refresh_text(progress)}" + (reason and f" ({reason})"))
    if group["verify"]:
        lines.append(f"{group['name']}: {verify_text(group['verify'])}")
    if group["backfresh"]:
        lines.append(f"{group['name']}: {backfresh_text(group['backfresh'])}")
    bypass = group["bypass"]
    if bypass and group["role"] == "primary":
        dirty = size_text(bypass["dirty_bytes"])
        text = f"in bypass ({bypass['reason']}), {dirty} dirty; leave it with qdsbypass off"
        if not all((unit.get("writelog") or {}).get("trusted", True) for unit in group["ldsus"]):
            text = (
                f"in bypass, {dirty} dirty; it needs new writelogs: see Failed devices in "
                "qdsmirror-architecture(7)"
            )
        lines.append(f"{group['name']}: {text}")
    lines += _checkpoint_lines(group)
    lines += [f"{group['name']}: {line}" for line in _synchronous_lines(group)]
    lines += _throttle_lines(group)
    lines += _wire_lines(group)
    lines += _before_lines(group)
    lines += _extension_lines(group)
    lines += [f"{group['name']}: {reason}" for reason in _reasons(group)]
    for unit in group["ldsus"]:
        closed = [unit["closed"]] if unit.get("closed") else []
        told = [*closed, *unit["errors"]]
        lines += [f"{group['name']}: {unit['name']}: {one}" for one in told]
    return lines


def _reason_of(group: Group, mode: Mode) -> str:
    """Give why a mode holds; "" if it does not."""
    told = (str(one["reason"]) for one in group["mode_details"] if one["mode"] == mode)
    return next(told, "")


def _throttle_lines(group: Group) -> list[str]:
    """Give what throttles hold the group back by."""
    knobs = group.get("throttled") or {}
    told = []
    if knobs.get("sleep_us"):
        told.append(f"{knobs['sleep_us'] / 1000:g} ms before each entry is sent")
    if knobs.get("writesleep_us"):
        told.append(f"{knobs['writesleep_us'] / 1000:g} ms before a write is answered")
    if knobs.get("limit_kbps"):
        told.append(f"{knobs['limit_kbps']} KB/s at most")
    return [f"{group['name']}: held back by throttles: {', '.join(told)}"] if told else []


def _wire_lines(group: Group) -> list[str]:
    """Give what compression saves, and which of several paths are not up."""
    wire = group.get("wire")
    if not wire or group["pmd"].get("state") != "connected":
        return []
    lines = []
    used, wanted = wire["compression"], wire["wanted"]
    if used not in (None, "none") and wire["wire_bytes"] < wire["frame_bytes"]:
        before, after = size_text(wire["frame_bytes"]), size_text(wire["wire_bytes"])
        lines.append(f"{group['name']}: {used} made {after} of {before}")
    elif used == "none" != wanted and group["role"] == "primary":
        lines.append(f"{group['name']}: not compressed: not both hosts know {wanted}")
    for path in wire["paths"]:
        if path["state"] != "connected":
            reason = f": {path['reason']}" if path.get("reason") else ""
            way = f"{path.get('local') or ''}>{path['remote']}"
            lines.append(f"{group['name']}: path {way} {path['state']}{reason}")
    return lines


def _reasons(group: Group) -> list[str]:
    """Give why the group is as it is, each reason once."""
    pmd, rmd = group["pmd"], group["rmd"]
    told = [group["reason"], pmd.get("reason"), rmd.get("reason")]
    # What is told beside.
    known = [error for unit in group["ldsus"] for error in unit["errors"]]
    if group["role"] == "primary":
        if group["bypass"]:
            known.append(group["bypass"]["reason"])
        if pmd.get("pid") is None and pmd.get("reason"):
            # What the driver says of the link is that there is no pmd.
            told = [one for one in told if one != rmd.get("reason")]
        elif group["driver"]["pid"] is None and pmd.get("code") in (0, None):
            # It says that there is no driver.
            told.remove(pmd.get("reason"))
    found: list[str] = []
    # The same is often said by driver and pmd, or said again with a word before it.
    for reason in told:
        if reason and not any(one in reason for one in (*known, *found)):
            found.append(reason)
    for error in group.get("errors", ()):
        if not any(one in error for one in (*known, *found)):
            found.append(f"earlier: {error}")
            known.append(error)
    return [_with_next_step(group, reason) for reason in found]


def _with_next_step(group: Group, reason: str) -> str:
    """Add what to do about a reason, where a daemon has said."""
    for part in (group["driver"], group["pmd"], group["rmd"]):
        about = part.get("reason") or group["reason"]
        if part.get("hint") and about and about in reason and part["hint"] not in reason:
            return f"{reason}; {part['hint']}"
    return reason


def _checkpoint_lines(group: Group) -> list[str]:
    held = group.get("checkpoint")
    if not held:
        return []
    where = "" if group["role"] == "secondary" else " at the secondary"
    text = f"checkpoint {held['name']} holds{where} at GSN {held['gsn']}"
    uris = "".join(f"; read it at {uri}" for uri in held.get("nbd_uris", {}).values())
    return [f"{group['name']}: {text}{uris}"]


def _synchronous_lines(group: Group) -> list[str]:
    """Tell how synchronous operation is doing; nothing while all is well."""
    told, degraded = group["synchronous"] or {}, group["degraded"]
    lines = []
    if degraded:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(degraded["since"]))
        lines.append(
            f"DEGRADED since {since}: {degraded['reason']}; answers do not wait for the secondary"
        )
    elif told.get("waiting") and (group["bypass"] or group["rmd"]["state"] != "connected"):
        lines.append(
            f"answers that wait for the secondary: {told['waiting']}; to go on without it: "
            "qdsset on_disconnect=async"
        )
    elif told and not told["kept"]:
        lines.append(f"not yet {group['operation']}: what was answered before is being committed")
    if group["settings"]:
        changed = ", ".join(
            f"{key} = {setting_text(key, value)}" for key, value in group["settings"].items()
        )
        lines.append(f"set until the next start: {changed}")
    return lines


def _before_lines(group: Group) -> list[str]:
    """Say whether a refresh can be rolled back, and how much room that takes."""
    told = group.get("before_images")
    if not told or told["state"] in ("off", "ready", "nothing"):
        return []
    if told["state"] == "given-up":
        text = f"the refresh cannot be rolled back any more: {told['reason']}"
    else:
        needed = told["needed_bytes"]
        estimate = f", about {size_text(needed)} will be needed" if needed else ""
        text = (
            f"can be rolled back to GSN {told['rollback_gsn']}: "
            f"{size_text(told['used_bytes'])} of {size_text(told['size'])} for before-images "
            f"used{estimate}"
        )
    return [f"{group['name']}: {text}"]


def _extension_lines(group: Group) -> list[str]:
    lines = []
    for unit in group["ldsus"]:
        for one in (unit.get("writelog") or {}).get("extensions", ()):
            state = "leaves the writelog" if one["leaving"] else "extends the writelog"
            used, size = size_text(one["used_bytes"]), size_text(one["size"])
            lines.append(
                f"{group['name']}: {unit['name']}: {one['device']} {state}, {used} of {size} used"
            )
    pool = group.get("pool") or {}
    if pool.get("free") is not None and pool["devices"]:
        text = f"{pool['free']} of {len(pool['devices'])} extension devices are free"
        lines.append(f"{group['name']}: {text}")
    for one in pool.get("devices", ()):
        if one["reason"]:
            lines.append(f"{group['name']}: {one['device']} cannot be used: {one['reason']}")
    return lines


def refresh_text(progress: dict[str, Any]) -> str:
    """Give a refresh's progress in one line."""
    return progress_text("refresh", progress)


def backfresh_text(told: dict[str, Any]) -> str:
    """Give a group's backfresh in one line."""
    if told["state"] == "counted":
        return f"{size_text(told['changed_bytes'])} differ from the mirror (dry run)"
    if told["state"] == "ended":
        return f"backfresh has ended, {size_text(told['changed_bytes'])} were fetched"
    if "done_bytes" not in told:
        return f"backfresh {told['state']}"
    return progress_text("dry run of a backfresh" if told["dry_run"] else "backfresh", told)


def progress_text(what: str, progress: dict[str, Any]) -> str:
    """Give the progress of a refresh or backfresh in one line."""
    done, remaining = progress["done_bytes"], progress["remaining_bytes"]
    total = done + remaining
    share = 100 * done / total if total else 100.0
    kind = f"{progress['kind']} " if "kind" in progress else ""
    text = f"{kind}{what} {share:.0f} %, {size_text(remaining)} remain"
    if progress.get("rate"):
        text += f", {size_text(progress['rate'])}/s"
    if progress.get("eta_seconds") is not None:
        text += f", {duration_text(progress['eta_seconds'])} to go"
    return text


def verify_text(verify: dict[str, Any]) -> str:
    """Give a verify's progress, or its result, in one line."""
    differing = size_text(verify["differing_bytes"])
    if verify["phase"] == "over":
        then = time.strftime("%Y-%m-%d %H:%M", time.localtime(verify["finished"]))
        if verify["result"] == "ended":
            return f"verify ended at {then} before its end: {verify['reason']}"
        text = f"verified at {then}: "
        text += "equal" if verify["result"] == "equal" else f"{differing} DIFFER"
        repaired = verify["repaired_bytes"]
        return f"{text} ({size_text(repaired)} were repaired)" if repaired else text
    done, remaining = verify["done_bytes"], verify["remaining_bytes"]
    doing = {"compare": "verify", "mend": "repair of what differs", "again": "verify of the repair"}
    text = doing[verify["phase"]]
    if verify["phase"] != "mend":
        share = 100 * done / (done + remaining) if done + remaining else 100.0
        text += f" {share:.0f} %, {size_text(remaining)} remain"
        if verify.get("eta_seconds") is not None:
            text += f", {duration_text(verify['eta_seconds'])} to go"
    return f"{text}, {differing} DIFFER" if verify["differing_bytes"] else text


def plain(groups: Sequence[Group], now: float) -> str:
    """Give the whole report as plain text with aligned columns."""
    parts = [_aligned(HEADINGS, [group_row(group, now) for group in groups])]
    units = [row for group in groups for row in unit_rows(group)]
    if units:
        parts.append(_aligned(UNIT_HEADINGS, units))
    notes = [line for group in groups for line in remarks(group)]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def show(groups: Sequence[Group]) -> None:
    """Print the report to stdout, in colour where that is welcome."""
    if not is_terminal():
        print(plain(groups, time.time()), flush=True)
        return
    from qdsmirror.tools.info_table import print_tables

    print_tables(groups, time.time())


def _number(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)


def _lag_text(lag: dict[str, Any]) -> str:
    if lag["entries"] is None:
        return _UNKNOWN
    if not lag["entries"]:
        return "none"
    entries = "1 entry" if lag["entries"] == 1 else f"{lag['entries']} entries"
    age = "" if lag["seconds"] is None else f", {duration_text(lag['seconds'])}"
    return f"{entries}, {size_text(lag['bytes'])}{age}"


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [headings, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
