"""How commands wait for the end of what they have begun: by looking, again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from qdsmirror.config import GroupConfig
from qdsmirror.errors import QdsError, UnreachableError
from qdsmirror.paths import Paths
from qdsmirror.tools.status import Group, collect_groups

POLL_SECONDS = 0.2
#: A failure that has stood for so many looks is one.
REFUSED_LOOKS = 5

#: Gives a group object as it is now.
Look = Callable[[GroupConfig], Group]


def looking(paths: Paths) -> Look:
    """Give what looks at a group of which this host is primary."""
    return lambda config: collect_groups(paths, config.primary_host, [config])[0]


def until_over(
    configs: Sequence[GroupConfig],
    look: Look,
    over: Callable[[Group], bool],
    final: Callable[[Group, QdsError], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, QdsError]:
    """Look at groups until each is over, or it is clear that it will not be.

    Daemons may come and go meanwhile: a group of which nobody says anything is looked at again.

    :param over: tells whether a group is over; what it raises may pass, as a link that is refused
        for a moment does, and counts once it was raised at REFUSED_LOOKS looks in a row ...
    :param final: ... or at once, if this says so.
    :returns: by group number why there was no end, in the order in which that was seen.
    """
    waiting = list(configs)
    refusals: Counter[int] = Counter()
    ended: dict[int, QdsError] = {}
    while waiting:
        for config in list(waiting):
            number = config.number
            try:
                group = look(config)
            except UnreachableError:
                continue
            try:
                done = over(group)
                refusals[number] = 0
            except QdsError as error:
                refusals[number] += 1
                done = refusals[number] >= REFUSED_LOOKS or final(group, error)
                if done:
                    ended[number] = error
            if done:
                waiting.remove(config)
        if waiting:
            sleep(POLL_SECONDS)
    return ended
