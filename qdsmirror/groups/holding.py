"""Holding: the checkpoint of a group at its secondary, as operators see it (rules.md 22).

Taken by the operator or by a mark from the primary; exported, read-only, for as long as it holds;
released by the operator, or LOUDLY when the journal fills and it is not strict.  The export is
closed, and nothing reads the mirror devices for it any more, before anything is applied again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock, inlineCallbacks
from twisted.logger import Logger

from qdsmirror.core.held import RELEASE, STRICT, Held, check_name
from qdsmirror.errors import DegradedError, ProtocolError, QdsError, UsageError
from qdsmirror.groups.mirrorexport import Exports
from qdsmirror.limits import CHECKPOINT_JOURNAL_SHARE

if TYPE_CHECKING:
    from qdsmirror.groups.mirroring import Mirroring
    from qdsmirror.groups.remote import RemoteGroup


class Holding:
    """The checkpoint of a group.

    :param group: the remote mirror daemon's side of it.
    """

    log = Logger()

    def __init__(self, group: RemoteGroup) -> None:
        self._group = group
        self._exports = Exports(group)
        self._lock = DeferredLock()
        self._giving_up = False
        self._stopping = False

    @property
    def _mirroring(self) -> Mirroring:
        committing = self._group.committing
        if committing is None:
            raise DegradedError(
                f"{self._group.name}: the remote mirror daemon is starting or stopping",
                hint="try again",
            )
        return committing.mirroring

    @property
    def held(self) -> Held | None:
        """The checkpoint that holds."""
        mirror = self._group.mirror
        return mirror.held if mirror is not None else None

    # -- life ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Go on with a checkpoint that has outlived the daemon."""
        self._stopping = False
        self._exports.clear()
        if self.held is not None:
            self.taken()
            self.look()

    def stop(self) -> Deferred[None]:
        """Close the export; the checkpoint goes on to hold."""
        self._stopping = True
        return self._lock.run(self._exports.close)

    # -- what the operator asks -----------------------------------------------------------------

    def switch(self, to: str, name: str = "", hold: str = "") -> Deferred[dict[str, Any]]:
        """Take (``on``), release (``off``) or show (``list``) the checkpoint.

        :param name: of a new one; default: the time.
        :param hold: of a new one, RELEASE or STRICT; default: as configured.  Of ``off``,
            ``force``: end the clients that read it.
        :raises DegradedError: it cannot be taken now; there is none; clients read it.
        :raises UsageError: a word is none of these.
        """
        if to == "on":
            return self._lock.run(self._take, name, hold)
        if to == "off":
            return self._lock.run(self._let_go, hold == "force")
        if to != "list":
            raise UsageError(f"a checkpoint is not switched {to}", hint="use on, off or list")
        done: Deferred[dict[str, Any]] = Deferred()
        done.callback({"checkpoint": self.status()})
        return done

    @inlineCallbacks
    def _take(self, name: str, hold: str) -> Any:
        hold = hold or self._group.config.tunables.checkpoint_hold
        if hold not in (RELEASE, STRICT):
            raise UsageError(f"hold is not {hold}", hint=f"use {RELEASE} or {STRICT}")
        now = self._group.runtime.wall()
        name = check_name(name or time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)))
        held: Held = yield self._mirroring.hold(name, hold, now)
        self._tell(held)
        self._open()
        return {"checkpoint": self.status()}

    @inlineCallbacks
    def _let_go(self, force: bool) -> Any:
        held = self.held
        mirroring = self._mirroring
        if held is None:
            raise DegradedError(
                f"{self._group.name}: no checkpoint holds",
                hint=f"take one with qdscheckpoint on -g {self._group.number}",
            )
        if self._exports.clients and not force:
            raise DegradedError(
                f"{self._group.name}: {self._exports.clients} clients read checkpoint {held.name}",
                hint="end them first, or use qdscheckpoint off --force",
            )
        told = {"checkpoint": self.status()}
        yield self._exports.close()
        yield mirroring.release()
        self._giving_up = False
        self.report()
        self.log.info("{group}: checkpoint {name} released", group=self._group.name, name=held.name)
        return told

    # -- what happens -----------------------------------------------------------------------------

    def taken(self) -> None:
        """Learn that a checkpoint holds: a mark was reached, or the daemon was started again."""
        held = self.held
        assert held is not None
        self._tell(held)
        self._lock.run(self._open)

    def report(self) -> None:
        """Tell the primary which checkpoint holds."""
        held = self.held
        told = held.to_json() if held is not None else None
        self._group.report({"about": "checkpoint", "checkpoint": told})

    def _tell(self, held: Held) -> None:
        self.report()
        self.log.info(
            "{group}: checkpoint {name} holds at GSN {gsn}; the journal goes on receiving",
            group=self._group.name, name=held.name, gsn=held.gsn,
        )  # fmt: skip

    def _open(self) -> None:
        if self.held is None or self._stopping:
            return
        try:
            self._exports.open()
        except OSError as error:
            self.note(f"the checkpoint cannot be exported: {error}")

    def look(self, full: bool = False) -> None:
        """Release the checkpoint if the journal fills and it may be.

        :param full: the journal does not take the next frame.
        """
        held = self.held
        if held is None or held.hold == STRICT or self._giving_up:
            return
        journal = self._mirroring.mirror.journal
        if full or journal.used_bytes > journal.ring.size * CHECKPOINT_JOURNAL_SHARE:
            self._giving_up = True
            share = round(100 * journal.used_bytes / journal.ring.size)
            self.note(
                f"checkpoint {held.name} at GSN {held.gsn} is released: {share} % of the journal "
                "is in use"
            )
            self._lock.run(self._give_up)

    @inlineCallbacks
    def _give_up(self) -> Any:
        try:
            yield self._let_go(True)
        except (QdsError, OSError) as error:
            self._giving_up = False
            # Somebody has released it, or the failure is told elsewhere.
            self.log.info("{group}: {why}", group=self._group.name, why=str(error))

    def note(self, text: str) -> None:
        """Keep what an operator should know for ``qdsinfo`` and the log (LOUD)."""
        self._group.notes.append(text)
        self.log.error("{group}: {text}", group=self._group.name, text=text)

    def check_rebase(self) -> None:
        """Check that the history may be replaced.

        :raises ProtocolError: a checkpoint holds.
        """
        held = self.held
        if held is not None:
            raise ProtocolError(
                f"checkpoint {held.name} holds at the secondary: its mirror cannot be made anew",
                hint=f"release it there: qdscheckpoint off -g {self._group.number}",
            )

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any] | None:
        """Give the ``checkpoint`` object of ``qdsinfo --json``."""
        held = self.held
        if held is None:
            return None
        return {**held.to_json(), "clients": self._exports.clients, "nbd_uris": self.uris()}

    def uris(self) -> dict[str, str]:
        """Give the NBD URIs under which the mirror devices can be read, by LDSU."""
        return self._exports.uris()
