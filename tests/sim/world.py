"""A group's two sites in one process, on a fake clock: one seed decides all that happens.

``World(seed, base).run()`` is one run: faults and work, then an end to the faults, after which
everything must come to rest.  Invariants are checked on the way, and after each recovery.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import maybeDeferred

from qdsmirror.core.records import BoundUnit
from qdsmirror.errors import BrokenError, DegradedError, QdsError
from qdsmirror.limits import CONTROL_RESERVE_BYTES, KIB, SILENT_PEER_SECONDS
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.rollback import roll_back
from tests.sim.clients import Clients
from tests.sim.disk import Gone
from tests.sim.history import SECTOR, Violation, payload
from tests.sim.modes import check_modes
from tests.sim.process import Fuse, Process
from tests.sim.sites import is_memory
from tests.sim.watch import installed

#: After the faults have ended everything must be mirrored within so many simulated seconds.
LIVENESS_SECONDS = 600.0
STEPS_MAX = 200_000
#: How many runs go on with logs that were initialised anew.
ANEW_CHANCE = 0.1
#: More than this does not arrive at once.
CHUNK_BYTES_MAX = 16 * KIB


class World(Clients):
    """The two sites and what happens to them."""

    # -- what happens -------------------------------------------------------------------------

    def run(self) -> World:
        """Run to the end; raises Violation."""
        Violation.seen.clear()
        with installed(self):
            self._make_disks()
            for name in ("driver", "pmd", "rmd"):
                self.due[name] = 0.0
            if self.random.random() < ANEW_CHANCE:
                self._begin_anew(early=True)
            self._safety()
            self._liveness()
            if not self.latched and (any(self.model.damaged) or self.profile.faults.get("verify")):
                self._verify_in_the_end()
            if not self.latched and self.random.random() < ANEW_CHANCE:
                self._begin_anew()
        return self

    def _safety(self) -> None:
        faults = [(kind, 1 / each) for kind, each in self.profile.faults.items() if each]
        for _ in range(self.profile.steps):
            for kind, chance in faults:
                if self.random.random() < chance:
                    self._fault(kind)
            if self.serving and self.random.random() < 0.3:
                self.ask()
                self._after()
            self.step()

    def _fault(self, kind: str) -> None:
        what, _, whom = kind.partition(" ")
        if kind == "kill master":
            self.kill_master()
        elif what == "kill":
            self.kill(whom)
        elif kind == "cut link":
            self._cut_link()
        elif kind == "slow link":
            self._slow_link()
        elif what == "stop":
            self._stop_driver()
        elif whom == "path":
            self._harm_path(what)
        elif kind == "hang link":
            self.count("hang link")
            self.link_up = not self.link_up
        elif what == "cut":
            self.power_cut(whom)
        elif what == "fuse":
            self._light_fuse()
        elif what == "refresh":
            self._refresh(self.random.choice(("auto", "dirty", "smart", "full")))
        elif what == "bypass":
            self.switch_bypass()
        elif what == "verify":
            self.verify(self.random.choice(("compare", "compare", "repair", "stop")))
        elif what == "damage":
            self._damage()
        elif what in ("extend", "free"):
            self._change_log(what)
        elif what == "backfresh":
            self._backfresh()
        elif what == "rollback":
            self._roll_back()
        elif what == "checkpoint":
            self.switch_checkpoint()
        elif what == "mark":
            self._mark()
        elif what == "operation":
            self._change_operation()
        else:
            self._spoil()

    def _cut_link(self) -> None:
        self.count("cut link")
        self.note("cut link")
        for wire in self.wires:
            wire.cut()

    def _slow_link(self) -> None:
        until = self.clock.seconds() + self.random.choice((0.01, 0.3, 3.0))
        for wire in self.wires:
            wire.slow_until = until

    def _harm_path(self, how: str) -> None:
        """Cut, slow down, or hang one of several paths."""
        path = self.random.choice(self.config.paths).remote
        self.count(f"{how} path")
        self.note(f"{how} {path}")
        if how == "hang":
            self.hanging ^= {path}
        until = self.clock.seconds() + self.random.choice((0.3, 3.0, 60.0))
        for wire in self.wires:
            if wire.path == path and how == "cut":
                wire.cut()
            elif wire.path == path and how == "slow":
                wire.slow_until = until

    def _stop_driver(self) -> None:
        """Stop the driver in order; its clients leave it first."""
        driver = self.driver
        if driver is None or not self.serving:
            return
        self.count("stop driver")
        self.note("stop driver")
        for client in self.clients:
            client.gone = True
        self.clients = []
        self.serving = False

        def stopped(_: Any) -> None:
            if driver is self.driver:
                driver.kill()
                self.driver = None
                self._after_end("driver")

        driver.group.stop().addBoth(stopped)

    def _light_fuse(self) -> None:
        process = self.random.choice([self.driver, self.rmd])
        if process is not None:
            process.fuse = Fuse(
                self.random.randrange(12), self.random.random() < 0.5, self.random.random() < 0.6
            )

    def _refresh(self, kind: str) -> None:
        if not self.serving or self.driver is None or self.driver.group.refresh_job is not None:
            return
        self.count(f"{kind} refresh")
        self.note(f"{kind} refresh")
        begun = maybeDeferred(self.driver.group.refresh, kind)
        begun.addErrback(lambda failure: failure.trap(QdsError))

    def verify(self, how: str) -> None:
        """Begin a verify, or end it; what is not possible now is refused."""
        if not self.serving or self.driver is None:
            return
        self.note(f"verify {how}")
        step = self.steps

        def begun(status: Any) -> None:
            self.count(f"verify {how}")
            self.verifies.setdefault(bytes.fromhex(status["id"]), step)

        asked = maybeDeferred(self.driver.group.verify, how)
        asked.addCallbacks(begun, lambda failure: failure.trap(QdsError))

    def _damage(self) -> None:
        """Somebody writes to a mirror device."""
        if self.latched or self.corruption["beta"].any or self.profile.faults.get("backfresh"):
            # (Who refuses a damaged journal must leave the mirror as it is; and a backfresh makes
            # of it what the LDSUs hold.)
            return
        ldsu = self.random.randrange(self.profile.ldsus)
        for _ in range(self.random.choice((1, 1, 5))):
            at = self.random.randrange(self.profile.size // SECTOR) * SECTOR
            if self.model.damage(ldsu, at, payload(self._number(), SECTOR), self.steps):
                self.count("damage")
                self.note(f"damage mirror {ldsu} at {at}")

    def switch_bypass(self) -> None:
        """Enter bypass, or leave it; what is not possible now is refused."""
        if not self.serving or self.driver is None:
            return
        group = self.driver.group
        to = "off" if group.bypass.phase == "on" else "on"
        self.note(f"bypass {to}")
        switched = maybeDeferred(group.switch_bypass, to)
        switched.addCallback(lambda _: self.count(f"bypass {to}"))
        switched.addErrback(lambda failure: failure.trap(QdsError))

    def _roll_back(self) -> None:
        """Give a refresh up for good, now and then: roll the mirror back."""
        if not self.receiving or self.rmd is None or self.latched:
            return
        if self.rmd.group.mirror.journal.superblock.before is None:
            return
        self.note("roll back")
        if self.random.random() < 0.5:
            self.kill("rmd")
        else:
            self.power_cut("beta")
        for _ in range(self.random.choice((1, 1, 2, 4))):
            if not self.roll_back_once():
                return

    def roll_back_once(self, interruptible: bool = True) -> bool:
        """Run qdsrmdreco --rollback; tell whether it was interrupted."""
        process, runtime = self._process("qdsrmdreco")
        if interruptible and self.random.random() < 0.6:
            process.fuse = Fuse(self.random.randrange(12), self.random.random() < 0.5, False)
        self.model.rolling = True
        try:
            mirror = Mirror.open(self.config, runtime.open_device)
            roll_back(mirror)
        except Gone:
            process.kill()
            if self.random.random() < 0.5:
                self.power_cut("beta")
            self.count("interrupted rollback")
            return True
        except DegradedError:
            # The last one came to its end after all, or the refresh did.
            return False
        except BrokenError as error:
            if self.corruption["beta"].any:
                self.count("rollback over corruption")
            elif "used up" not in str(error):
                raise Violation(f"RECOVER: it cannot be rolled back: {error}") from error
            return False
        finally:
            self.model.rolling = False
            process.kill()
        self.count("rollback")
        self.model.check_rolled_back([bytes(disk.durable) for disk in self.model.mirrors])
        return False

    def switch_checkpoint(self) -> None:
        """Take a checkpoint on the secondary, or release it."""
        if not self.receiving or self.rmd is None:
            return
        group = self.rmd.group
        to = "off" if group.holding.held is not None else "on"
        hold = self.random.choice(("release", "strict")) if to == "on" else ""
        self.note(f"checkpoint {to} {hold}")
        switched = maybeDeferred(group.switch_checkpoint, to, "c", hold)
        switched.addCallback(lambda _: self.count(f"checkpoint {to}"))
        switched.addErrback(self._not_possible)

    def _not_possible(self, failure: Any) -> None:
        """Take a refusal; with a failed device any error."""
        failure.trap(QdsError, *((OSError,) if self.latched else ()))

    def _mark(self) -> None:
        if not self.serving or self.driver is None:
            return
        self.note("mark")
        marked = maybeDeferred(self.driver.group.mark, f"m{self._number()}")
        marked.addCallback(lambda _: self.count("mark"))
        marked.addErrback(lambda failure: failure.trap(QdsError))

    def _backfresh(self) -> None:
        """Begin a backfresh, or a dry run of one, or end it; what cannot be now is refused."""
        if not self.serving or self.driver is None:
            return
        group = self.driver.group
        if group.backfresh.phase == "on":
            if self.random.random() < 0.3:
                self.note("kill backfresh")
                killed = maybeDeferred(group.kill_backfresh, "")
                killed.addCallback(lambda _: self.count("kill backfresh"))
                killed.addErrback(lambda failure: failure.trap(QdsError))
            return
        options = self.random.choice(("", "", "discard", "dry-run"))
        self.begin_backfresh(options)

    def begin_backfresh(self, options: str) -> None:
        """Begin a backfresh."""
        assert self.driver is not None
        self.note(f"backfresh {options}")
        begun = maybeDeferred(self.driver.group.begin_backfresh, options, "")
        begun.addCallback(lambda _: self.count(f"backfresh {options}".strip()))
        begun.addErrback(lambda failure: failure.trap(QdsError))

    def _change_log(self, how: str) -> None:
        """Chain a device of the pool to a writelog, or take one back."""
        if not self.serving or self.driver is None:
            return
        ldsu = self.random.choice(self.config.ldsus)
        self.note(f"{how} {ldsu.name}")
        changed = maybeDeferred(getattr(self.driver.group, how), ldsu.name, "")
        changed.addCallback(lambda _: self.count(how))
        changed.addErrback(lambda failure: failure.trap(QdsError))

    def _change_operation(self) -> None:
        """Change the mode of operation while the driver runs."""
        if not self.serving or self.driver is None:
            return
        choose = self.random.choice
        settings = {"operation": choose(("async", "sync", "near-sync"))}
        if self.random.random() < 0.5:
            settings["on_disconnect"] = choose(("block", "async"))
            settings["near_sync_entries"] = choose(("1", "3"))
        self.note(f"set {settings}")
        self.count("operation")
        self.synchrony.changes()
        if settings["operation"] == "async":
            self.synchrony.forget()
        changed = maybeDeferred(self.driver.group.set_live, json.dumps(settings))
        changed.addErrback(lambda failure: failure.trap(QdsError))

    def _spoil(self) -> None:
        if self.latched:
            return
        path = self.random.choice([one for one in sorted(self.disks) if not is_memory(one)])
        method = self.random.choice(("fdatasync", "pwritev"))
        self.latched.add(path)
        self.disks[path].faults[method] = 1
        if path in self.config.pool:
            # Whose log it is a part of by then is not known.
            self.model.unlogged.update(range(self.profile.ldsus))
        for start, failed in (("/near/data", self.model.dead), ("/near/log", self.model.unlogged)):
            if path.startswith(start):
                failed.add(int(path.removeprefix(start)))
        self.count("error")
        self.note(f"{method} on {path} fails")

    def step(self) -> None:
        """Let one thing happen."""
        self.steps += 1
        random = self.random
        # Some runs are slow to deliver, others let everything that can happen happen at once.
        doable = self._doable()
        if doable and random.random() < 0.9:
            count = 1 if random.random() > self.profile.eager else 8
            for _ in range(count):
                name, action = random.choice(doable)
                self.note(name)
                action()
                self._after()
                doable = self._doable()
                if not doable:
                    break
        else:
            self.advance()

    def _doable(self) -> list[tuple[str, Callable[[], None]]]:
        found: list[tuple[str, Callable[[], None]]] = []
        starved: list[tuple[str, Callable[[], None]]] = []
        slow = self.profile.slow
        for process in self.processes():
            for worker in process.workers:
                if worker.waiting:
                    to = starved if slow and worker.name.endswith(slow) else found
                    to.append((worker.name, worker.step))
            for end in process.ends:
                if end.ready and self.passes(end.wire):
                    found.append((process.name, lambda end=end: end.step(self._some())))
        if starved and (not found or self.random.random() < 0.1):
            return starved
        return found

    def _some(self) -> int:
        return self.random.choice((1, 100, 5000, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX))

    def _after(self) -> None:
        """See to processes that ended in the middle of I/O, and look at the limits."""
        for name in ("driver", "rmd"):
            process: Process | None = getattr(self, name)
            if process is not None and process.ended is not None:
                if process.ended.power:
                    self.power_cut("beta" if name == "rmd" else "alpha")
                else:
                    self.kill(name)
        self._check_bounds()
        if self.driver is not None and self.serving:
            check_modes(self.driver.group)
        if Violation.seen:
            raise Violation.seen[0]
        if self.logged:
            raise Violation(f"BOUND: an unexpected error was logged: {self.logged[0]}")

    def _check_bounds(self) -> None:
        """BOUND: what waits somewhere is limited."""
        profile = self.profile
        frame = profile.log // 4
        if self.driver is not None and self.serving:
            group = self.driver.group
            # A refresh that has been let in reads its chunk first; a frame may come between.
            chunk = max(unit.writelog.ring.size for unit in group.units) // 16
            if group.unapplied_bytes > profile.limit + frame + chunk + 8 * KIB:
                raise Violation("BOUND: too much is unapplied at the driver")
        if self.pmd is not None and self.pmd.group._outbound is not None:
            flying = sum(size for _, size, _, _ in self.pmd.group._outbound._in_flight)
            if flying > profile.window + profile.buffer + frame:
                raise Violation("BOUND: more is on its way than the window allows")
        if self.rmd is not None and self.receiving:
            group = self.rmd.group.committing
            received = profile.limit + CHUNK_BYTES_MAX + frame
            if group.received_bytes > received:
                raise Violation("BOUND: too much is received at the secondary")
            if group.unmirrored_bytes > 2 * profile.limit + received:
                raise Violation("BOUND: too much waits for the mirror")
            session = self.rmd.group._link
            # What a lost path had may be there already when it comes again.
            ahead = (profile.window + profile.buffer + frame) * min(profile.paths, 2)
            if session is not None and session._ahead_bytes > ahead:
                raise Violation("BOUND: too much came ahead of what can be taken")

    def advance(self) -> None:
        """Let time pass, up to the next thing that waits for it."""
        now = self.clock.seconds()
        times = [call.getTime() for call in self.clock.getDelayedCalls()]
        times += self.due.values()
        times += [wire.slow_until for wire in self.wires if wire.slow_until > now]
        later = max(0.0, min(times, default=now + 1.0) - now)
        self.note(f"advance {later:.6f}")
        self.clock.advance(later)
        self._after()
        for name, at in list(self.due.items()):
            if at <= self.clock.seconds():
                del self.due[name]
                self.start(name)
                self._after()

    # -- the end ------------------------------------------------------------------------------

    def _liveness(self) -> None:
        """Stop the faults; everything must be mirrored before long."""
        self.link_up = True
        self.hanging.clear()
        for wire in self.wires:
            wire.slow_until = 0.0
        for process in self.processes():
            process.fuse = None
        for disk in self.disks.values():
            disk.faults.clear()
        if self.latched:
            # With a failed device there is nothing to wait for, but for somebody to say so.
            # A peer whose power was cut is found out by its silence.
            deadline = self.clock.seconds() + SILENT_PEER_SECONDS + 10.0
            self._until(lambda: self._at_rest() or self.clock.seconds() > deadline, "a moment")
            self._check_remembered()
            if not self._at_rest():
                self._check_told()
            else:
                self.check_mirror()
            return
        self._until(self._at_rest, "everything to be mirrored")
        self._check_equal()

    def _needs_new_memory(self) -> bool:
        """Tell whether full writelogs in memory hold what waits for a refresh without room."""
        group = self.driver.group if self.driver is not None and self.serving else None
        return (
            self.profile.memory
            and group is not None
            and group.pmd.awaits_refresh
            and self._has_no_way_out()
        )

    def _has_no_way_out(self) -> bool:
        """Tell whether the driver is in a bypass that its full writelogs do not let it leave."""
        group = self.driver.group if self.driver is not None and self.serving else None
        if group is None or group.bypass.phase != "on":
            return False
        try:
            group.way_out.next_generation()
        except DegradedError:
            return True
        except QdsError:
            # A device has failed: then new writelogs are no way out.
            return False
        return False

    def _until(self, happened: Callable[[], bool], what: str, alone: bool = False) -> None:
        """Go on without faults until something is so; an operator leaves bypass.

        :param alone: no operator is there.
        """
        deadline = self.clock.seconds() + LIVENESS_SECONDS
        for _ in range(STEPS_MAX):
            if happened():
                return
            if self.clock.seconds() > deadline:
                break
            doable = self._doable()
            if doable:
                name, action = self.random.choice(doable)
                self.note(name)
                action()
                self._after()
            else:
                if not alone:
                    self.operate()
                self.advance()
        raise Violation(f"LIVENESS: waited in vain for {what}: {self._state()}")

    def operate(self) -> None:
        """Do what an operator has to, where nothing happens any more by itself."""
        if self._needs_operator():
            self.switch_bypass()
        if self._needs_backfresh():
            assert self.driver is not None
            group = self.driver.group
            # What was given up once, also by bypass, is given up again.
            gives_up = group.backfresh.gives_up or group.bypass.phase == "on"
            self.begin_backfresh("discard" if gives_up else "")
        if self.model.is_held:
            self.switch_checkpoint()
        if self._has_stopped():
            self._go_on_without_rollback()
        if self._differs() or self._needs_refresh():
            self._refresh("auto")
        if self._needs_new_memory():
            self.kill_master()
        if self._is_full_for_good():
            self.switch_bypass()

    def _is_full_for_good(self) -> bool:
        """Tell whether full writelogs hold what a secondary can never take: bypass gives it up."""
        group = self.driver.group if self.driver is not None and self.serving else None
        if group is None or group.bypass.phase != "off" or not group.pmd.link.get("diverged"):
            return False
        if group.units[0].own_frames.control_room:
            return False
        log = group.units[0].writelog
        # What only control frames may use is used up by them alone.
        if self.model.controls_behind(log.durable_tail) < CONTROL_RESERVE_BYTES // log.ring.align:
            raise Violation(
                "COHERENT: a refresh finds no room, though nothing has used its reserve"
            )
        return True

    def _needs_operator(self) -> bool:
        """Tell whether the driver is in a bypass that it does not leave by itself."""
        bypass = self.driver.group.bypass if self.driver is not None else None
        if bypass is None or bypass.phase != "on":
            return False
        itself = self.profile.auto_refresh and bypass.state.get("overflow")
        return not itself or (bool(self.model.rolled) and self._refused())

    def _go_on_without_rollback(self) -> None:
        """Roll back, and choose otherwise for the next refresh, which would stop there too."""
        self.kill("rmd")
        self.roll_back_once(interruptible=False)
        tunables = replace(self.config.tunables, before_images_full="give-up")
        self.config = replace(self.config, tunables=tunables)

    def _has_stopped(self) -> bool:
        """Tell whether the secondary goes no further, for want of before-images."""
        if self.counts.pop("refused for want of before-images", 0):
            return True
        group = self.rmd.group if self.rmd is not None and self.receiving else None
        return group is not None and "before-images are used up" in group.failed

    def _needs_refresh(self) -> bool:
        """Tell whether the secondary was rolled back, and nobody has begun to mend that."""
        group = self.driver.group if self.driver is not None else None
        return (
            group is not None
            and bool(self.model.rolled)
            and group.bypass.phase == "off"
            and not group.coherent
            and group.refresh_job is None
            and (group.verifying.run is None or group.verifying.run.over)
        )

    def _differs(self) -> bool:
        """Tell whether a verify has found the mirror to differ, and nobody mends it."""
        group = self.driver.group if self.driver is not None and self.serving else None
        return (
            group is not None
            and group.bypass.phase == "off"
            and not group.coherent
            and group.refresh_job is None
            and (group.verifying.run is None or group.verifying.run.over)
        )

    _ENDINGS = ("kill driver", "kill pmd", "kill rmd", "cut alpha", "cut beta", "cut link")

    def _verify_in_the_end(self) -> None:
        """A complete verify finds, and mends, all that differs: also what differs only now."""
        self._until(self._is_verify_over, "a verify's end")
        for _ in range(self.random.choice((0, 1, 3))):
            self._damage()
        self.verify(self.random.choice(("compare", "repair")))
        for _ in range(self.random.choice((0, 50, 200))):
            if self.random.random() < 0.01:
                self._fault(self.random.choice(self._ENDINGS))
            if self.serving and self.random.random() < 0.05:
                self.ask()
                self._after()
            self.step()
        self._until(self._may_verify, "a verify and its repair")
        assert self.driver is not None
        self.verify("repair")
        run = self.driver.group.verifying.run
        self._until(lambda: self._is_verify_over() and self._at_rest(), "the last verify")
        assert self.driver is not None
        if self.driver.group.verifying.run is not run or run.result != "equal":
            raise Violation(f"LOUD: the last verify has not mended all: {self._state()}")
        if any(self.model.damaged):
            raise Violation(f"LOUD: not found by a verify: {self.model.damaged}")
        self._check_equal()

    def _may_verify(self) -> bool:
        return (
            self._is_verify_over()
            and self._at_rest()
            and self.driver is not None
            and self.driver.group.pmd.is_connected
        )

    def _is_verify_over(self) -> bool:
        group = self.driver.group if self.driver is not None and self.serving else None
        return group is not None and (group.verifying.run is None or group.verifying.run.over)

    def _needs_backfresh(self) -> bool:
        """Tell whether data devices lack what a killed backfresh has not fetched."""
        if self.driver is None or not self.serving:
            return False
        backfresh = self.driver.group.backfresh
        return backfresh.phase == "off" and bool(backfresh.reason)

    def _begin_anew(self, early: bool = False) -> None:
        """Initialise the writelogs again: the secondary keeps its old history until a refresh.

        GENERATION: nothing of the new one may be taken before.

        :param early: while the histories are short, and so alike in numbers.
        """
        self._until(lambda: self.serving and self.receiving, "the start")
        assert self.rmd is not None
        while early and not self.rmd.group.committing.committed_gsn:
            self.ask()
            self.advance()
            self._until(self._at_rest, "the first writes")
        if not self.rmd.group.mirror.journal.superblock.generations:
            return
        self.count("generations")
        self.note("begin anew")
        self._stop_driver()
        self._until(lambda: self.driver is None, "the driver's end")
        self.due.pop("driver", None)
        self.kill("pmd")
        self.synchrony.forget()
        self.model.begin_generation(
            self._initialise_writelogs(),
            [bytes(self.disks[ldsu.data_device].seen) for ldsu in self.config.ldsus],
        )
        self.start("driver")
        self._until(lambda: self.serving, "the driver")
        before = [bytes(disk.seen) for disk in self.model.mirrors]
        for _ in range(self.random.randrange(1, 12)):
            self.ask()
        self._until(self._refused, "a refusal", alone=True)
        if before != [bytes(disk.seen) for disk in self.model.mirrors]:
            raise Violation("GENERATION: the mirror takes up another history")
        self._refresh(self.random.choice(("smart", "full")))
        self._until(self._at_rest, "the refresh")
        self._check_equal()

    def _refused(self) -> bool:
        return self.driver is not None and self.driver.group.pmd.link["state"] == "refused"

    def _initialise_writelogs(self) -> bytes:
        generation = secrets.token_bytes(16)
        for ldsu in self.config.ldsus:
            self.disks[ldsu.log_device].discard()
            unit = BoundUnit(ldsu.index, ldsu.name, self.profile.size, ldsu.data_device)
            self._make_writelog(ldsu, unit, generation)
        return generation

    def _at_rest(self) -> bool:
        if not self.serving or not self.receiving or self.driver is None or self.rmd is None:
            return False
        group = self.driver.group
        return (
            group.bypass.phase == "off"
            and group.backfresh.phase == "off"
            and not group.backfresh.reason
            and group.pmd.mirrored_gsn == group.next_gsn - 1
            and group.all_applied
            and group.refresh_job is None
            and group.coherent
            and not any(client.open for client in self.clients)
        )

    def _state(self) -> str:
        states = []
        for process in self.processes():
            try:
                states.append(process.group.status())
            except Exception as error:  # noqa: BLE001 - a group half-way through its start
                states.append(repr(error))
        return f"{states}, {[len(c.open) for c in self.clients]} open"

    def _check_told(self) -> None:
        """LOUD: what failed is named where an operator looks."""
        state = self._state()
        if self.driver is None or self.rmd is None:
            return
        if not any(path in state for path in self.latched):
            raise Violation(f"LOUD: nobody names the failed device: {state}")

    def _check_remembered(self) -> None:
        """LOUD: a device whose sync is on record to have failed is in no use (rules.md 4)."""
        for site, process, runs in (
            ("alpha", self.driver, self.serving),
            ("beta", self.rmd, self.receiving),
        ):
            state = self.paths[site].state_file(0)
            failed = json.loads(state.read_bytes())["failed"] if state.exists() else {}
            for path in failed:
                if process is not None and runs and path not in repr(process.group.status()):
                    raise Violation(f"LOUD: {path} has failed, and is used as if it had not")

    def _check_equal(self) -> None:
        self.check_mirror()
        for index, ldsu in enumerate(self.config.ldsus):
            made = self.model.tips[index]
            tip = self.model.content_in(made, self.model.lineage.newest)
            found = {
                path: bytes(self.disks[path].seen)
                for path in (ldsu.data_device, ldsu.mirror_device)
            }
            found[ldsu.mirror_device] = self.model.mended(index, found[ldsu.mirror_device], made)
            for path, content in found.items():
                if content != tip:
                    raise Violation(f"PREFIX: at rest, {path} differs from the history")
        assert self.rmd is not None
        if not self.rmd.group.mirror.journal.superblock.coherent:
            raise Violation("COHERENT: at rest, the mirror does not say that it is coherent")
