"""LOUD: the modes that a driver shows are what its group does."""

from __future__ import annotations

from functools import lru_cache

from qdsmirror.core.states import Mode
from qdsmirror.groups import backfresh, bypass
from qdsmirror.groups.driver import DriverGroup
from tests.sim.history import Violation

_BELOW = {Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED}


def check_modes(group: DriverGroup) -> None:
    """Compare the modes of a group that serves with what it is at.

    What is on its way in or out, and not durable yet, may be shown or not.
    """
    job = group.refresh_job
    modes = group.modes.modes
    wrong = _wrong(
        modes,
        group.pmd.link["state"],
        group.bypass.phase,
        group.failures.busy,
        group.backfresh.phase,
        job is not None,
        job is not None and job.begun.called,
        bool(group.checkpoints.recording),
    )
    if wrong:
        raise Violation(f"LOUD: {wrong}, but it shows {', '.join(sorted(modes))}")
    for mode, held in group.modes.details:
        if not held.reason:
            raise Violation(f"LOUD: it is in {mode.value} without a reason")


@lru_cache(maxsize=4096)
def _wrong(
    modes: frozenset[Mode],
    link: str,
    bypass_phase: str,
    failing: bool,
    backfresh_phase: str,
    refreshes: bool,
    refresh_begun: bool,
    recording: bool,
) -> str:
    """Give what is wrong with the modes for a group that is at this; asked after every step."""
    below = Mode.CONNECTED if link == "connected" else Mode.ACCUMULATING
    wrong = ""
    if modes & _BELOW != {below}:
        wrong = f"the link is {link}"
    if bypass_phase == bypass.ON and Mode.BYPASS not in modes:
        wrong = "it is in bypass"
    if bypass_phase == bypass.OFF and Mode.BYPASS in modes and not failing:
        wrong = "it is not in bypass"
    if (backfresh_phase in (backfresh.ON, backfresh.ENDING)) != (Mode.BACKFRESH in modes):
        wrong = f"its backfresh is {backfresh_phase}"
    if not refreshes and Mode.REFRESH in modes and not recording:
        wrong = "there is no refresh"
    if refresh_begun and Mode.REFRESH not in modes:
        wrong = "a refresh is running"
    return wrong
