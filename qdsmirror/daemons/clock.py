"""The clock that a daemon's timers, back-off and lag go by (rules.md 26)."""

from __future__ import annotations

import time
from typing import Any


def use_monotonic_time(reactor: Any) -> None:
    """Have a reactor count seconds that nobody sets: its own are the host's wall clock.

    To be called before the first timer is set: were the host's clock set back by an hour, every
    commit, ping and retry that is due would else be an hour late.
    """
    reactor.seconds = time.monotonic
