"""What throttles have done beside turning knobs: writelogs, messages, mail, programs.

Each kind has a lane of its own, so that a relay that does not answer, or a program that takes its
time, holds no extension of a writelog up.  What is done takes no part of the data path's time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, maybeDeferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.configsafety import why_unsafe
from qdsmirror.core.evaluation import Fired
from qdsmirror.core.events import CONSOLE as CONSOLE_EVENT
from qdsmirror.core.events import DONE, FAILED, action_line, event_line
from qdsmirror.core.throttles import CONSOLE, EXEC, EXTEND, FREE, MAIL, SYSLOG, Action
from qdsmirror.errors import QdsError, UnreachableError
from qdsmirror.groups.programs import run_program
from qdsmirror.limits import (
    ACTIONS_WAITING_MAX,
    CONSOLE_TEXTS_KEPT,
    EXEC_SECONDS_MAX,
    FAILURE_AGAIN_SECONDS,
    MAIL_ATTEMPTS,
    MAIL_END_SECONDS,
    MAIL_RETRY_SECONDS,
    MAIL_SECONDS_MAX,
    ORDER_SECONDS_MAX,
)
from qdsmirror.net.asking import ask
from qdsmirror.net.control import Extend, Free
from qdsmirror.net.mailing import compose, send_mail
from qdsmirror.net.syslog import SOCKET, send_syslog
from qdsmirror.paths import Paths

#: Of mails that the relay has not taken when the process, or the group's statistics, must end.
GIVEN_UP = "given up: the process is stopped"


class Lane:
    """Things that are done one after another."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], Deferred[Any]]] = deque()
        self._running: Deferred[Any] | None = None
        self._idle: list[Deferred[None]] = []

    def run(self, do: Callable[[], Any]) -> Deferred[Any]:
        """Do something when what was given before is done; fires with its result.

        :raises QdsError: too much waits.
        """
        done: Deferred[Any] = Deferred()
        if len(self._waiting) >= ACTIONS_WAITING_MAX:
            done.errback(QdsError(f"{ACTIONS_WAITING_MAX} of its kind wait already"))
            return done
        self._waiting.append((do, done))
        self._go_on()
        return done

    def idle(self) -> Deferred[None]:
        """Fire when nothing is being done, and nothing waits."""
        idle: Deferred[None] = Deferred()
        self._idle.append(idle)
        self._go_on()
        return idle

    def give_up(self, why: str) -> None:
        """End what is being done, and begin nothing that waits: all of it fails with this."""
        while self._waiting:
            self._waiting.popleft()[1].errback(QdsError(why))
        if self._running is not None:
            self._running.cancel()

    def _go_on(self) -> None:
        if self._running is not None:
            return
        if not self._waiting:
            idle, self._idle = self._idle, []
            for one in idle:
                one.callback(None)
            return
        do, done = self._waiting.popleft()
        self._running = running = maybeDeferred(do)

        def ended(result: Any) -> None:
            self._running = None
            done.callback(result)
            self._go_on()

        running.addBoth(ended)


@dataclass
class Means:
    """By what actions are done, so that tests can give other means.

    :ivar ask: gives an order to a daemon; as :func:`qdsmirror.net.asking.ask`.
    :ivar mail: as :func:`qdsmirror.net.mailing.send_mail`.
    :ivar syslog: takes a text; ``program``: as :func:`qdsmirror.groups.programs.run_program`.
    :ivar programs: the lane of programs, which all groups of a host share.
    """

    ask: Callable[..., Deferred[Any]] = ask
    mail: Callable[..., Deferred[Any]] = send_mail
    syslog: Callable[[str], None] = send_syslog
    program: Callable[..., str] = run_program
    programs: Lane = field(default_factory=Lane)


class Actions:
    """Does the actions of one group's throttles.

    :param wall: seconds since 1970.
    :param tell: takes lines for the group's events.
    :ivar console: the last texts for the console, oldest first, each with its time.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        paths: Paths,
        reactor: Any,
        means: Means,
        wall: Callable[[], float],
        tell: Callable[[list[str]], None],
    ) -> None:
        self.console: deque[tuple[float, str]] = deque(maxlen=CONSOLE_TEXTS_KEPT)
        self._config = config
        self._paths = paths
        self._reactor = reactor
        self._means = means
        self._wall = wall
        self._tell = tell
        self._mails = Lane()
        #: Fires when a mail that was not taken is to be tried again.
        self._again: Deferred[None] | None = None
        self._ordered: set[tuple[str, str]] = set()
        self._owed: list[tuple[Fired, Action, str]] = []
        #: By throttle and action that failed last: when each message was told, monotonic seconds.
        self._failing: dict[tuple[str, str], dict[str, float]] = {}
        self._stopped = False
        self._do: Mapping[str, Callable[[Fired, Action], None]] = {
            SYSLOG: self._syslog,
            CONSOLE: self._console,
            MAIL: self._mail,
            EXEC: self._exec,
        }

    @inlineCallbacks
    def stop(self) -> Any:
        """Begin nothing more, and let no program go on; fires when mails are with the relay.

        Their throttles have fired, and do not fire again for what they tell of: each has one more
        attempt, and what the relay has not taken within MAIL_END_SECONDS in all is given up.
        """
        self._stopped = True
        if self._again is not None:
            self._again.callback(None)
        sent = self._mails.idle()
        timer = self._reactor.callLater(MAIL_END_SECONDS, self._mails.give_up, GIVEN_UP)
        yield sent
        if timer.active():
            timer.cancel()

    def perform(self, fired: Fired, extended: Container[str]) -> None:
        """Do what a throttle says, in its order; what takes time goes on beside the rest.

        :param extended: LDSUs whose writelogs have an extension that could be freed.
        """
        for action in fired.actions:
            if action.kind in (EXTEND, FREE):
                for ldsu in fired.targets:
                    if action.kind == EXTEND or ldsu in extended:
                        self._order(fired, action, ldsu)
            elif action.kind in self._do:
                self._do[action.kind](fired, action)

    def try_again(self, is_true: Callable[[Fired, str], bool]) -> None:
        """Order again what did not reach the driver, where a throttle would not by itself.

        :param is_true: whether what a throttle fired for is still so, by LDSU.
        """
        owed, self._owed = self._owed, []
        for fired, action, ldsu in owed:
            if is_true(fired, ldsu):
                self._order(fired, action, ldsu)

    def is_failing(self, fired: Fired, action: Action) -> bool:
        """Tell whether an action failed last, and that was told not long ago."""
        return bool(self._told(_key(fired, action)))

    # -- writelogs ------------------------------------------------------------------------------

    def _order(self, fired: Fired, action: Action, ldsu: str) -> None:
        """Have the driver extend a writelog, or free it, unless it is just doing so."""
        order = (action.kind, ldsu)
        if order in self._ordered or self._stopped:
            return
        self._ordered.add(order)
        asked = self._means.ask(
            self._reactor,
            self._paths.control_socket(f"{self._config.name}.driver"),
            Extend if action.kind == EXTEND else Free,
            ORDER_SECONDS_MAX,
            ldsu=ldsu,
            device="",
        )

        def ended(result: Any) -> Any:
            self._ordered.discard(order)
            lost = isinstance(result, Failure) and isinstance(result.value, UnreachableError)
            if lost and fired.throttle.test.transition:
                # It will not fire again for this, and the driver may be back in a moment.
                self._owed.append((fired, action, ldsu))
            return result

        asked.addBoth(ended)
        asked.addCallback(lambda said: f"{ldsu}: {said['device']} is {said['state']}")
        self._report(fired, action, asked)

    # -- messages -------------------------------------------------------------------------------

    def _syslog(self, fired: Fired, action: Action) -> None:
        try:
            self._means.syslog(action.text)
        except OSError as error:
            self._failed(fired, action, QdsError(f"the system's log {SOCKET}: {error.strerror}"))
        else:
            self._failing.pop(_key(fired, action), None)

    def _console(self, fired: Fired, action: Action) -> None:
        now = self._wall()
        self.console.append((now, action.text))
        self._tell([event_line(now, CONSOLE_EVENT, action.text)])
        # Where that is not permitted, the text is kept for who asks: no error.
        with suppress(OSError):
            _write_console(self._paths.console, f"qdsmirror: {self._config.name}: {action.text}")

    # -- mail -----------------------------------------------------------------------------------

    def _mail(self, fired: Fired, action: Action) -> None:
        self._report(fired, action, self._mails.run(partial(self._deliver, fired, action)))

    @inlineCallbacks
    def _deliver(self, fired: Fired, action: Action) -> Any:
        """Give a mail to the relay, which may be behind the very link that has failed."""
        host = load_host(self._paths)
        if host.relay is None:
            raise QdsError(f"no mail_relay is configured in {self._paths.host_config}")
        sender = f"qdsmirror@{host.name}"
        body = "\n".join(f"{key}: {value}" for key, value in self._facts(fired).items())
        message = compose(
            sender,
            action.address,
            f"{self._config.name}: {action.text}",
            f"{action.text}\n\nhost: {host.name}\n{body}\n",
        )
        for attempt in range(MAIL_ATTEMPTS):
            try:
                yield self._means.mail(
                    self._reactor, host.relay, sender, action.address, message, MAIL_SECONDS_MAX
                )
            except QdsError:
                if attempt + 1 == MAIL_ATTEMPTS or self._stopped:
                    raise
                yield self._pause(MAIL_RETRY_SECONDS * 2**attempt)
            except CancelledError:
                raise QdsError(GIVEN_UP) from None
            else:
                return f"taken by {host.relay.host}"
        raise AssertionError

    @inlineCallbacks
    def _pause(self, seconds: float) -> Any:
        """Wait before another attempt, unless there is no time for that."""
        self._again = Deferred()
        timer = self._reactor.callLater(seconds, self._again.callback, None)
        yield self._again
        self._again = None
        if timer.active():
            timer.cancel()

    # -- programs -------------------------------------------------------------------------------

    def _exec(self, fired: Fired, action: Action) -> None:
        ran = self._means.programs.run(partial(self._run, fired, action))
        self._report(fired, action, ran)

    def _run(self, fired: Fired, action: Action) -> Deferred[str]:
        if self._stopped:
            raise QdsError("the daemons are stopped")
        # When it is its turn, for the permission may have been withdrawn.
        self._check_permission()
        facts = {f"QDS_{key.upper()}": value for key, value in self._facts(fired).items()}
        if self._paths.root is not None:
            facts["QDS_ROOT"] = str(self._paths.root)
        pool = self._reactor.getThreadPool()
        ran: Deferred[str] = deferToThreadPool(
            self._reactor, pool, self._means.program,
            action.argv, facts, EXEC_SECONDS_MAX, lambda: self._stopped,
        )  # fmt: skip
        return ran.addCallback(lambda said: said or "ended well")

    def _check_permission(self) -> None:
        """Refuse programs unless root, or the daemons' user, has allowed them (security.md 9).

        :raises QdsError: nobody has, or others can write what says so, or what names the program.
        """
        path = self._paths.host_config
        if not load_host(self._paths).allow_exec:
            raise QdsError(f"programs are not allowed: allow_exec = yes in {path} would allow them")
        for one in (path, self._paths.group_config(self._config.number)):
            why = why_unsafe(one)
            if why:
                raise QdsError(f"allow_exec is not honoured: {why}")

    # -- what came of it ------------------------------------------------------------------------

    def _facts(self, fired: Fired) -> dict[str, str]:
        """Say what has happened, for who reads a mail, and for programs."""
        return {
            "group": self._config.name,
            "throttle": fired.throttle.name,
            "test": str(fired.throttle.test),
            "value": f"{fired.value:.3f}".rstrip("0").rstrip("."),
            "ldsus": " ".join(fired.ldsus),
        }

    def _report(self, fired: Fired, action: Action, done: Deferred[Any]) -> None:
        def ended(text: str) -> None:
            self._failing.pop(_key(fired, action), None)
            line = action_line(self._wall(), DONE, fired.throttle, action, text)
            self._tell([line])

        def failed(failure: Failure) -> None:
            error = failure.value
            if not isinstance(error, QdsError):
                self.log.failure(
                    "{group}: {action}", failure, group=self._config.name, action=action
                )
                error = QdsError(f"{type(error).__name__}: {error}")
            self._failed(fired, action, error)

        done.addCallbacks(ended, failed)

    def _told(self, key: tuple[str, str]) -> dict[str, float]:
        """Give the messages of a failing action that were told not long ago, and when."""
        since = self._reactor.seconds() - FAILURE_AGAIN_SECONDS
        return {text: at for text, at in self._failing.get(key, {}).items() if at > since}

    def _failed(self, fired: Fired, action: Action, error: QdsError) -> None:
        """Tell that an action has failed, unless it is known to fail so."""
        key = _key(fired, action)
        told = self._told(key)
        if error.message in told:
            return
        self._failing[key] = {**told, error.message: self._reactor.seconds()}
        self._tell([action_line(self._wall(), FAILED, fired.throttle, action, error.message)])
        self.log.error(
            "{group}: throttle {throttle}: {action}: {error}",
            group=self._config.name, throttle=fired.throttle.name, action=str(action),
            error=error.message,
        )  # fmt: skip


def _key(fired: Fired, action: Action) -> tuple[str, str]:
    return fired.throttle.name, str(action)


def _write_console(path: Path, text: str) -> None:
    """Write a line to a console, if it is there and takes it at once.

    :raises OSError: it does not.
    """
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_APPEND
    descriptor = os.open(path, flags)
    try:
        clean = "".join(one if one.isprintable() else "?" for one in text)
        os.write(descriptor, f"\r\n{clean}\r\n".encode("utf-8", "replace"))
    finally:
        os.close(descriptor)
