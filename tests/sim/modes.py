"""LOUD: the modes that a driver shows are what its group does."""

from __future__ import annotations

from qdsmirror.core.states import Mode
from qdsmirror.groups import backfresh, bypass
from qdsmirror.groups.driver import DriverGroup
from tests.sim.history import Violation

_BELOW = {Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED}


def check_modes(group: DriverGroup) -> None:
    """Compare the modes of a group that serves with what it is at.

    What is on its way in or out, and not durable yet, may be shown or not.
    """
    modes = group.modes.modes
    below = Mode.CONNECTED if group.pmd.link["state"] == "connected" else Mode.ACCUMULATING
    wrong = ""
    if modes & _BELOW != {below}:
        wrong = f"the link is {group.pmd.link['state']}"
    if group.bypass.phase == bypass.ON and Mode.BYPASS not in modes:
        wrong = "it is in bypass"
    if group.bypass.phase == bypass.OFF and Mode.BYPASS in modes and not group.failures.busy:
        wrong = "it is not in bypass"
    if (group.backfresh.phase in (backfresh.ON, backfresh.ENDING)) != (Mode.BACKFRESH in modes):
        wrong = f"its backfresh is {group.backfresh.phase}"
    job, recording = group.refresh_job, group.checkpoints.recording
    if job is None and Mode.REFRESH in modes and not recording:
        wrong = "there is no refresh"
    if job is not None and job.begun.called and Mode.REFRESH not in modes:
        wrong = "a refresh is running"
    if wrong:
        raise Violation(f"LOUD: {wrong}, but it shows {', '.join(sorted(modes))}")
    for mode, held in group.modes.details:
        if not held.reason:
            raise Violation(f"LOUD: it is in {mode.value} without a reason")
