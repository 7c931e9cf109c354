"""Has masters start no process for statistics beside their children (site(3)).

It is a third of what a lab's start costs; it is there wherever a test does not say otherwise.
"""

from __future__ import annotations

import sys

if "qdsmirror.daemons.run" in sys.orig_argv:
    from qdsmirror.daemons.master import Master

    def without(master: type[Master]) -> None:
        """Make a master's class one that has none."""
        master.has_statistics = False

    Master.__init_subclass__ = classmethod(without)  # type: ignore[assignment]
