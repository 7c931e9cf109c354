"""A log that repeats itself is cut short, with a count of what was left out.

Lines are alike when they are about the same and differ in numbers only.  Of those alike some pass
in each period, and of all together many; when the period is over, a line says how many did not, and
gives one of them.

What has failed is limited by its kind alone, and the outcomes of commands are not limited here at
all: no storm of other lines may hide either (security.md 12).
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from qdsmirror.daemons.logfields import fields_of
from qdsmirror.limits import (
    LOG_ALIKE_LINES_MAX,
    LOG_KINDS_MAX,
    LOG_LINES_MAX,
    LOG_PERIOD_SECONDS,
)

#: Those that stand by themselves: ``qds1`` is not ``qds2``.
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.-])[0-9]+")
#: What text lines are compared by.
_KIND_CHARACTERS = 200

_TOLD = "({suppressed_lines} lines {suppressed_which} were suppressed) {text}"

#: What many lines of other kinds do not suppress.
_SEVERE = frozenset({LogLevel.error, LogLevel.critical})

#: Calls a function after some seconds, from any thread.
Later = Callable[[float, Callable[[], None]], Any]


@dataclass
class _Period:
    """Lines of one kind in a period that began at a time."""

    begun: float
    passed: int = 0
    suppressed: int = 0
    last: LogEvent | None = None


def _kind(event: LogEvent) -> str:
    """Give what lines that are alike have in common."""
    about = fields_of(event)
    level = event.get("log_level", LogLevel.info).name
    text = _NUMBER.sub("#", formatEvent(event))[:_KIND_CHARACTERS]
    return f"{level} {about.group} {about.ldsu} {text}"


@implementer(ILogObserver)
class RateLimit:
    """An observer in front of another one.

    :param observer: gets what passes.
    :param later: has counts told when a period is over; without, the next event does.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        observer: ILogObserver,
        later: Later | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observer = observer
        self._later = later
        self._clock = clock
        self._lock = threading.RLock()
        self._all = _Period(clock())
        #: In the order in which they began.
        self._periods: OrderedDict[str, _Period] = OrderedDict()
        self._awaited = False

    def __call__(self, event: LogEvent) -> None:
        """Pass an event on, or count it."""
        if event.get("audit"):
            # The control socket bounds how much may be asked for.
            self._observer(event)
            return
        with self._lock:
            now = self._clock()
            self._end_periods(now)
            kind = _kind(event)
            period = self._periods.get(kind)
            if period is None:
                period = self._periods[kind] = _Period(now)
                if len(self._periods) > LOG_KINDS_MAX:
                    self._tell(self._periods.popitem(last=False)[1])
            if period.passed >= LOG_ALIKE_LINES_MAX:
                self._suppress(period, event)
            elif event.get("log_level") in _SEVERE:
                period.passed += 1
                self._observer(event)
            elif self._all.passed >= LOG_LINES_MAX:
                self._suppress(self._all, event)
            else:
                period.passed += 1
                self._all.passed += 1
                self._observer(event)

    def flush(self) -> None:
        """Tell what was left out so far: this process ends."""
        with self._lock:
            self._end_periods(float("inf"))

    def _suppress(self, period: _Period, event: LogEvent) -> None:
        period.suppressed += 1
        period.last = event
        if self._later is not None and not self._awaited:
            self._awaited = True
            self._later(LOG_PERIOD_SECONDS, self._wake)

    def _wake(self) -> None:
        with self._lock:
            self._awaited = False
            self._end_periods(self._clock())
            if self._later is not None and any(
                one.suppressed for one in (self._all, *self._periods.values())
            ):
                self._awaited = True
                self._later(LOG_PERIOD_SECONDS, self._wake)

    def _end_periods(self, now: float) -> None:
        """Tell of the periods that are over."""
        while self._periods:
            kind, period = next(iter(self._periods.items()))
            if now - period.begun < LOG_PERIOD_SECONDS:
                break
            del self._periods[kind]
            self._tell(period)
        if now - self._all.begun >= LOG_PERIOD_SECONDS:
            ended, self._all = self._all, _Period(min(now, self._clock()))
            self._tell(ended, "of many kinds")

    def _tell(self, period: _Period, which: str = "like this one") -> None:
        if period.last is None:
            return
        told = {
            key: value for key, value in period.last.items()
            if not key.startswith("log_") or key in ("log_namespace", "log_level", "log_time")
        }  # fmt: skip
        self._observer(
            {
                **told,
                "log_format": _TOLD,
                "suppressed_lines": period.suppressed,
                "suppressed_which": which,
                "text": formatEvent(period.last).partition("\n")[0],
            }
        )
