"""The process for statistics, with a fake clock: rows, events, throttles, what they have done."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.samples import parse
from qdsmirror.core.throttles import Throttle
from qdsmirror.errors import DegradedError, QdsError, UnreachableError, UsageError
from qdsmirror.groups.actions import Means
from qdsmirror.groups.statistics import Machine, StatisticsGroup
from qdsmirror.groups.tracking import Tracking
from qdsmirror.limits import FAILURE_AGAIN_SECONDS, MAIL_END_SECONDS
from qdsmirror.net.asking import NobodyThereError
from qdsmirror.net.control import Extend, Free, SetKnobs, Status
from qdsmirror.paths import Paths
from tests.core.test_evaluation import throttle
from tests.core.test_rates import driver as driver_status
from tests.core.test_rates import pmd as pmd_status
from tests.fakes import ImmediateWorker, StepWorker
from tests.groups.world import FakeReactor, group_config

HOST = "name = alpha\n"
START = 1_790_000_000.0


class StatisticsCase(SynchronousTestCase):
    """A group's statistics; its daemons say what ``said`` has, and are told what is in ``told``."""

    role: Any = "primary"

    def setUp(self) -> None:
        base = Path(tempfile.mkdtemp(dir="/tmp", prefix="qdss"))
        self.addCleanup(shutil.rmtree, base)
        self.paths = Paths.of(base)
        for one in (self.paths.etc, self.paths.var, self.paths.run, self.paths.dev):
            one.mkdir()
        self.host(HOST)
        self.paths.group_config(0).write_text("")
        self.paths.group_config(0).chmod(0o644)
        self.reactor = FakeReactor()
        self.config = group_config(2)
        self.worker: Any = ImmediateWorker()
        self.said: dict[str, Any] = {"driver": driver_status(**self.modes()), "pmd": pmd_status(0)}
        self.told: list[tuple[str, str, Any]] = []
        self.answers: dict[Any, Any] = {}
        self.syslog: list[str] = []
        self.mails: list[tuple[str, int, str, bytes]] = []
        self.mail_error: QdsError | None = None
        #: What the relay answers, where it does not answer at once.
        self.relays: list[Deferred[Any]] = []
        self.cancelled: list[Deferred[Any]] = []
        self.slow = False
        self.programs: list[tuple[tuple[str, ...], dict[str, str]]] = []
        self.program_error: QdsError | None = None
        self.master = 7

    def host(self, text: str, mode: int = 0o644) -> None:
        self.paths.host_config.write_text(text)
        self.paths.host_config.chmod(mode)

    def modes(self, *changes: str, pid: int = 5) -> dict[str, Any]:
        modes = changes[-1].split(",") if changes else ["connected"]
        told = [
            {"number": n, "time": START + n, "modes": one.split(","), "reason": f"reason {n}"}
            for n, one in enumerate(changes, 1)
        ]
        return {"state": modes[0], "modes": modes, "changes": told, "driver": {"pid": pid}}

    def ask(self, _reactor: Any, path: Any, command: Any, _seconds: float, **sent: Any) -> Any:
        daemon = str(path).split(".")[-2]
        if command is not Status:
            text = sent.get("knobs")
            self.told.append((daemon, command.__name__, json.loads(text) if text else sent))
        said = self.said.get(daemon) if command is Status else self.answers.get(command)
        if command is SetKnobs and said is None:
            self.said[daemon]["knobs"] = json.loads(sent["knobs"])
            said = {}
        if isinstance(said, Deferred):
            return said
        if said is None:
            return fail(NobodyThereError(f"no daemon answers on {path}"))
        return fail(said) if isinstance(said, Exception) else succeed(said)

    def mail(
        self, _reactor: Any, relay: Any, sender: str, to: str, message: bytes, _: float
    ) -> Any:
        self.mails.append((relay.host, relay.port, to, message))
        if self.slow:
            self.relays.append(Deferred(self.cancelled.append))
            return self.relays[-1]
        return fail(self.mail_error) if self.mail_error is not None else succeed(None)

    def program(self, argv: Any, variables: Any, _seconds: float, _given_up: Any) -> str:
        self.programs.append((argv, dict(variables)))
        if self.program_error is not None:
            raise self.program_error
        return ""

    def begin(self, *throttles: Throttle, **tunables: Any) -> StatisticsGroup:
        config = dataclasses.replace(
            self.config,
            throttles=throttles,
            tunables=dataclasses.replace(self.config.tunables, **tunables),
        )
        machine = Machine(
            self.reactor,
            lambda _name: self.worker,
            ask=self.ask,
            wall=lambda: START + self.reactor.seconds(),
            clock=lambda at: datetime.fromtimestamp(at, UTC).replace(tzinfo=None),
            master=self.master,
        )
        means = Means(self.ask, self.mail, self.syslog.append, self.program)
        self.group = StatisticsGroup(config, self.role, self.paths, machine, means)
        self.successResultOf(self.group.start())
        self.reactor.advance(0.0)
        return self.group

    def restart(self, *throttles: Throttle) -> None:
        """Have a successor of a process that was killed."""
        assert self.group._timer is not None
        self.group._timer.cancel()
        self.worker = ImmediateWorker()
        self.begin(*throttles)

    def pass_(self, seconds: float = 10.0) -> None:
        self.reactor.advance(seconds)

    def rows(self) -> list[str]:
        return self.paths.tracking_file(0).read_text().splitlines()[1:]

    def events(self, what: str = "") -> list[str]:
        """Give the events, less the first line and the times."""
        path = self.paths.event_file(0)
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        return [
            rest for rest in (line.partition(" ")[2] for line in lines) if rest.startswith(what)
        ]

    def fill(self, percent: float, *extended: str) -> None:
        """Have qds0's writelog so full, and some that are extended."""
        status = driver_status(**self.modes())
        for one in status["ldsus"]:
            used = percent if one["name"] == "qds0" else 1
            chain = [{"device": "/x", "leaving": False}] if one["name"] in extended else []
            log = {**one["writelog"], "size": 10000, "used_bytes": int(100 * used)}
            one["writelog"] = {**log, "extensions": chain}
        self.said["driver"] = {**status, "knobs": self.said["driver"].get("knobs", {})}


class RowTests(StatisticsCase):
    def test_a_row_per_interval(self) -> None:
        self.begin()
        self.assertFalse(self.paths.tracking_file(0).exists())
        for kib in (100, 300, 300):
            self.said["pmd"] = pmd_status(kib)
            self.pass_()
        table = parse(self.paths.tracking_file(0).read_text().splitlines())
        self.assertEqual(table.damaged, [])
        self.assertEqual([one.epoch - START for one in table.samples], [10, 20, 30])
        self.assertEqual([one.netkbps for one in table.samples], [20, 40, 0])
        self.assertEqual(self.group.status()["rows"], 3)

    def test_its_own_interval_and_limit(self) -> None:
        self.begin(perf_interval=1.0, prf_limit=2000)
        for _ in range(40):
            self.pass_(1.0)
        self.assertEqual(self.group.status()["rows"], 40)
        self.assertTrue((self.paths.var / "dsgrp000.prf.1").exists())
        self.assertLess(self.paths.tracking_file(0).stat().st_size, 2000)

    def test_the_pmd_and_the_driver_are_down(self) -> None:
        self.begin()
        self.said = {"driver": self.said["driver"]}
        self.pass_()
        self.said = {"pmd": pmd_status(0)}
        self.pass_()
        self.said = {}
        self.pass_()
        self.assertEqual([one.split()[3] for one in self.rows()], ["connected", "setup", "setup"])

    def test_who_does_not_answer_is_not_asked_again_meanwhile(self) -> None:
        self.begin()
        waiting: Deferred[Any] = Deferred()
        self.said["driver"] = waiting
        for _ in range(5):
            self.pass_()
        self.said["driver"] = UnreachableError("slow")
        waiting.errback(UnreachableError("no answer in time"))
        self.assertEqual(len(self.rows()), 1)
        self.pass_()
        self.assertEqual(len(self.rows()), 2)

    def test_what_is_due_meanwhile_has_its_turn_when_the_answers_are_there(self) -> None:
        self.answers[Extend] = DegradedError("none")
        self.begin(throttle("pctwl > 20", "extend"), perf_interval=6.0, throttle_interval=7.0)
        self.fill(61)
        waiting: Deferred[Any] = Deferred()
        self.said["driver"], full = waiting, self.said["driver"]
        self.told.clear()
        self.pass_(6.0)
        self.pass_(1.0)
        self.pass_(5.0)
        self.assertEqual(self.told, [])
        self.said["driver"] = full
        waiting.errback(UnreachableError("no answer in time"))
        # A row of the one who did not answer, and the evaluation of the one who does.
        self.assertEqual(len(self.rows()), 1)
        self.assertEqual([name for _, name, _ in self.told], ["Extend"])

    def test_a_machine_that_slept_goes_on_in_its_rhythm(self) -> None:
        self.begin()
        self.pass_(3605.0)
        self.pass_(5.0)
        self.pass_()
        epochs = [float(one.split()[0]) - START for one in self.rows()]
        self.assertEqual(epochs, [3605.0, 3610.0, 3620.0])

    def test_a_disk_that_hangs_holds_nothing_up(self) -> None:
        self.worker = StepWorker()
        self.begin(throttle("pctwl > 20", "extend"), perf_interval=1.0, throttle_interval=1.0)
        self.answers[Extend] = {"device": "/x", "state": "chained"}
        for _ in range(1100):
            self.pass_(1.0)
        self.assertGreater(len(self.told), 1000)
        self.assertIn("the disk does not take", self.group.status()["errors"][0])
        self.worker.step_all()
        self.pass_(1.0)
        self.worker.step_all()
        self.assertEqual(self.group.status()["errors"], [])

    def test_of_what_is_left_to_a_successor_only_the_newest_waits(self) -> None:
        self.worker = StepWorker()
        tracking = Tracking("dsgrp000", self.worker)
        path, other = self.paths.statistics_file(0), self.paths.statistics_file(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1000):
            tracking.replace(path, str(number))
        self.assertEqual(len(self.worker.waiting), 1)
        self.worker.step()
        self.assertEqual((path.read_text(), len(self.worker.waiting)), ("0", 1))
        self.worker.step_all()
        self.assertEqual(path.read_text(), "999")
        for number in range(3):
            tracking.replace(path, f"more {number}")
            tracking.replace(other, f"other {number}")
        stopped = tracking.stop()
        self.worker.step_all()
        self.successResultOf(stopped)
        self.assertEqual((path.read_text(), other.read_text()), ("more 2", "other 2"))

    def test_what_could_not_be_left_does_not_keep_what_follows(self) -> None:
        self.worker = StepWorker()
        tracking = Tracking("dsgrp000", self.worker)
        path = self.paths.statistics_file(0)
        path.mkdir(parents=True)
        for number in range(3):
            tracking.replace(path, str(number))
        self.worker.step()
        self.assertIn("Is a directory", tracking.error)
        path.rmdir()
        self.worker.step_all()
        self.assertEqual(path.read_text(), "2")

    def test_events_are_not_for_all_to_read(self) -> None:
        self.addCleanup(os.umask, os.umask(0o022))
        self.said["driver"] = driver_status(**self.modes("accumulating"))
        self.begin()
        self.pass_()
        for file, mode in ((self.paths.event_file(0), 0o640), (self.paths.tracking_file(0), 0o644)):
            self.assertEqual(file.stat().st_mode & 0o777, mode)

    def test_a_disk_that_refuses(self) -> None:
        self.begin()
        self.paths.tracking_file(0).mkdir()
        self.pass_()
        self.assertIn("Is a directory", self.group.status()["errors"][0])
        self.paths.tracking_file(0).rmdir()
        self.pass_()
        self.assertEqual((self.group.status()["errors"], len(self.rows())), ([], 1))

    def test_stop(self) -> None:
        self.begin()
        waiting: Deferred[Any] = Deferred()
        self.said["driver"] = waiting
        self.pass_()
        stopped = self.group.stop()
        self.assertNoResult(stopped)
        waiting.callback({**driver_status(), "knobs": {"writesleep_us": 0}})
        self.successResultOf(stopped)
        self.assertEqual(len(self.rows()), 1)
        self.assertEqual(self.reactor.getDelayedCalls(), [])


class ModeTests(StatisticsCase):
    def change(self, *changes: str, pid: int = 5) -> None:
        self.said["driver"] = driver_status(**self.modes(*changes, pid=pid))
        self.pass_()

    def test_every_change_has_a_line(self) -> None:
        self.said["driver"] = driver_status(**self.modes("accumulating", "connected"))
        self.begin()
        self.change("accumulating", "connected", "accumulating", "connected", "refresh,connected")
        self.change("accumulating", "connected", "accumulating", "connected", "refresh,connected")
        names = ["accumulating", "connected", "accumulating", "connected", "refresh,connected"]
        expected = [f"mode {name} reason {n}" for n, name in enumerate(names, 1)]
        self.assertEqual(self.events(), expected)
        first = self.paths.event_file(0).read_text().splitlines()[1]
        self.assertEqual(first, f"{START + 1:.3f} mode accumulating reason 1")

    def test_nothing_is_told_twice_by_a_successor(self) -> None:
        self.said["driver"] = driver_status(**self.modes("accumulating"))
        self.begin()
        self.restart()
        self.change("accumulating", "connected")
        self.assertEqual(self.events(), ["mode accumulating reason 1", "mode connected reason 2"])

    def test_a_driver_that_is_gone_and_its_successor(self) -> None:
        self.said["driver"] = driver_status(**self.modes("accumulating"))
        self.begin()
        driver = self.said.pop("driver")
        self.pass_()
        self.pass_()
        self.said["driver"] = UnreachableError("slow")
        self.pass_()
        self.said["driver"] = driver
        self.change("accumulating", pid=6)
        gone = "mode setup its driver does not serve it"
        here = "mode accumulating reason 1"
        self.assertEqual(self.events(), [here, gone, here])

    def test_what_was_kept_may_be_nonsense(self) -> None:
        for text in ("", "[]", '{"seen": 5}', '{"seen": [1, 2, []], "master": 7}', "\x00"):
            self.paths.statistics_file(0).write_text(text)
            self.begin()
            self.successResultOf(self.group.stop())
            self.worker = ImmediateWorker()


class SecondaryTests(StatisticsCase):
    role = "secondary"

    def test_rows_and_modes_and_no_throttles(self) -> None:
        journal = {"size": 1000, "used_bytes": 100, "entries": 3}
        rmd = {"rmd": {"pid": 1}, "modes": ["accumulating"], "state": "accumulating"}
        rmd = {**rmd, "reason": "waiting", "journal": journal, "traffic": None, "wire": {}}
        self.said = {"rmd": rmd}
        self.begin(throttle("pctwl > 0", "extend", 'syslog "no"'))
        self.said = {"rmd": {**rmd, "modes": ["connected"], "state": "connected", "reason": ""}}
        self.pass_()
        self.pass_()
        self.assertEqual(self.events(), ["mode accumulating waiting", "mode connected"])
        self.assertEqual((self.told, self.syslog), ([], []))
        self.assertEqual([one.split()[9] for one in self.rows()], ["10.00", "10.00"])


class KnobTests(StatisticsCase):
    """Figure 10's first throttles, and whom they are told."""

    def test_a_pmd_is_told_and_its_successor_again(self) -> None:
        self.begin(throttle("netkbps > 30", "sleep inc 15000", "writesleep set 5"))
        self.said["pmd"] = pmd_status(200)
        del self.said["pmd"]["knobs"]
        self.pass_()
        pmd = {"sleep_us": 15000, "limit_kbps": 0}
        expected = [("driver", "SetKnobs", {"writesleep_us": 5}), ("pmd", "SetKnobs", pmd)]
        self.assertEqual(sorted(self.told[-2:]), expected)
        self.told.clear()
        self.pass_()
        self.assertEqual(self.told, [])
        self.said["pmd"] = pmd_status(0, pid=2)
        self.said["pmd"]["knobs"] = {"sleep_us": 0, "limit_kbps": 0}
        self.pass_()
        self.assertEqual(self.told, [("pmd", "SetKnobs", pmd)])
        self.assertEqual(self.group.status()["knobs"], {**pmd, "writesleep_us": 5})

    def test_who_refuses_is_told_again(self) -> None:
        self.begin(throttle("netkbps > 30", "sleep inc 15000"))
        self.told.clear()
        self.answers[SetKnobs] = DegradedError("not now")
        self.said["pmd"] = {**pmd_status(200), "knobs": {"sleep_us": 0, "limit_kbps": 0}}
        self.pass_()
        self.pass_()
        self.assertEqual([one[0] for one in self.told if one[0] == "pmd"], ["pmd", "pmd"])

    def test_a_successor_goes_on(self) -> None:
        """What was set holds on, and a transition does not come again."""
        one = throttle("netkbps T> 30", "sleep inc 15000", 'syslog "over"')
        self.begin(one)
        self.said["pmd"] = pmd_status(200)
        self.pass_()
        self.restart(one)
        self.said["pmd"] = pmd_status(400)
        self.pass_()
        self.assertEqual(self.syslog, ["over"])
        self.assertEqual(self.group.status()["knobs"]["sleep_us"], 15000)

    def test_daemons_that_start_anew_begin_at_nothing(self) -> None:
        one = throttle("netkbps > 30", "sleep inc 15000")
        self.begin(one)
        self.said["pmd"] = pmd_status(200)
        self.pass_()
        self.master = 8
        self.restart(one)
        self.assertEqual(self.told[-1], ("pmd", "SetKnobs", {"sleep_us": 0, "limit_kbps": 0}))

    def test_its_events(self) -> None:
        """A line for each that fires, but not where it has nothing to do again and again."""
        self.begin(
            throttle("netkbps > 30", "sleep inc 15000", name="more"),
            throttle("netkbps < 10", "sleep dec 20000", name="less"),
        )
        for kib in (200, 400, 400, 400, 400, 400):
            self.said["pmd"] = {**pmd_status(kib), "knobs": self.said["pmd"]["knobs"]}
            self.pass_()
        self.assertEqual(
            self.events("fired"),
            ['fired "more" netkbps > 30: 40: sleep inc 15000'] * 2
            + ['fired "less" netkbps < 10: 0: sleep dec 20000'] * 2,
        )
        counts = [(one["name"], one["fired"]) for one in self.group.status()["throttles"]]
        self.assertEqual(counts, [("more", 2), ("less", 4)])


class SettingsTests(StatisticsCase):
    """What ``qdsset`` changes while they work."""

    def set(self, **texts: str) -> Any:
        return self.successResultOf(self.group.set_live(json.dumps(texts)))["settings"]

    def test_intervals_and_limit(self) -> None:
        self.begin(throttle("netkbps >= 0", 'syslog "x"'), throttle_interval=60.0)
        self.assertEqual(self.set()["throttle_interval"], 60.0)
        told = self.set(perf_interval="1", throttle_interval="2 s", prf_limit="16K")
        self.assertEqual((told["perf_interval"], told["throttle_interval"]), (1.0, 2.0))
        self.syslog.clear()
        for _ in range(4):
            self.pass_(1.0)
        self.assertEqual((len(self.rows()), len(self.syslog)), (4, 2))
        for _ in range(300):
            self.pass_(1.0)
        self.assertTrue((self.paths.var / "dsgrp000.prf.1").exists())
        self.assertLessEqual(self.paths.tracking_file(0).stat().st_size, 16 * 1024)
        self.set(perf_interval="100")
        before = self.group.status()["rows"]
        for _ in range(150):
            self.pass_(1.0)
        self.assertEqual(self.group.status()["rows"] - before, 2)
        told = self.group.status()["settings"]
        self.assertEqual(
            told, {"perf_interval": 100.0, "throttle_interval": 2.0, "prf_limit": 16384}
        )

    def test_a_limit_in_force_is_another_at_once(self) -> None:
        """Also that of a transition, which does not come again."""
        self.begin(throttle("netkbps T> 30", "limit 50", name="office hours"))
        self.said["pmd"] = pmd_status(400)
        self.pass_()
        self.assertEqual(self.group.status()["knobs"]["limit_kbps"], 50)
        self.told.clear()
        self.set(**{"office hours.limit": "100"})
        knobs = {"sleep_us": 0, "limit_kbps": 100}
        self.assertEqual(self.told, [("pmd", "SetKnobs", knobs)])
        self.pass_()
        self.assertEqual(self.group.status()["knobs"]["limit_kbps"], 100)
        self.set(**{"office hours.limit": "off"})
        self.assertEqual(self.told[-1], ("pmd", "SetKnobs", {**knobs, "limit_kbps": 0}))

    def test_a_pmd_that_is_down_is_told_later(self) -> None:
        self.begin(throttle("netkbps >= 0", "limit 50", name="a"))
        self.pass_()
        pmd = self.said.pop("pmd")
        self.answers[SetKnobs] = NobodyThereError("no pmd")
        self.set(**{"a.limit": "70"})
        del self.answers[SetKnobs]
        self.said["pmd"] = pmd
        self.pass_()
        self.assertEqual(self.said["pmd"]["knobs"]["limit_kbps"], 70)

    def test_a_number_of_a_test(self) -> None:
        self.begin(throttle("netkbps > 30", 'syslog "over"', name="a"))
        self.set(**{"a.value": "50"})
        kib = 0
        for rate in (40, 51, 50):
            kib += 5 * rate
            self.said["pmd"] = pmd_status(kib)
            self.pass_()
        self.assertEqual(self.syslog, ["over"])

    def test_all_or_none(self) -> None:
        self.begin(throttle("netkbps > 30", "limit 5", name="a"))
        wrong = self.group.set_live(json.dumps({"a.limit": "9", "b.limit": "9"}))
        error = self.failureResultOf(wrong, UsageError).value
        self.assertIn('there is no throttle "b"', error.message)
        self.assertEqual(self.group.status()["settings"], {})

    def test_a_successor_goes_by_what_was_set(self) -> None:
        one = throttle("netkbps T> 30", "limit 50", name="a")
        self.begin(one)
        self.said["pmd"] = pmd_status(400)
        self.pass_()
        self.set(**{"a.limit": "80", "perf_interval": "3"})
        self.restart(one)
        self.assertEqual(self.group.status()["settings"], {"a.limit": 80, "perf_interval": 3.0})
        self.assertEqual(self.group.status()["knobs"]["limit_kbps"], 80)
        self.pass_()
        self.assertEqual(self.group.status()["knobs"]["limit_kbps"], 80)
        # Another file says itself what is wanted.
        self.restart(throttle("netkbps T> 30", "limit 60", name="a"))
        self.assertEqual(self.group.status()["settings"], {})
        # And so do the daemons' next start.
        self.set(**{"a.limit": "90"})
        self.master = 8
        self.restart(throttle("netkbps T> 30", "limit 60", name="a"))
        self.assertEqual(self.group.status()["settings"], {})

    def test_it_is_answered_when_a_successor_would_go_by_it(self) -> None:
        self.worker = StepWorker()
        self.begin(throttle("netkbps > 30", "limit 50", name="a"))
        self.worker.step_all()
        answered = self.group.set_live(json.dumps({"a.limit": "80"}))
        self.assertNoResult(answered)
        self.worker.step_all()
        self.successResultOf(answered)
        self.assertIn('"a.limit": "80"', self.paths.statistics_file(0).read_text())


class WritelogTests(StatisticsCase):
    def test_extended_while_the_pmd_is_down_and_freed(self) -> None:
        self.answers = {
            Extend: {"device": "/x", "state": "chained"},
            Free: {"device": "/x", "state": "leaving"},
        }
        del self.said["pmd"]
        self.begin(
            throttle("pctwl > 60", "extend", name="full"),
            throttle("pctwl < 20", "free", name="empty"),
        )
        self.told.clear()
        self.fill(61)
        self.pass_()
        orders = [("driver", "Extend", {"ldsu": "qds0", "device": ""})]
        self.assertEqual(self.told, orders)
        self.fill(19, "qds0")
        self.pass_()
        orders.append(("driver", "Free", {"ldsu": "qds0", "device": ""}))
        self.assertEqual(self.told, orders)
        # Nothing is left to be freed.
        self.fill(19)
        self.pass_()
        self.pass_()
        self.assertEqual(self.told, orders)
        self.assertEqual(
            self.events("done"),
            ['done "full" extend: qds0: /x is chained', 'done "empty" free: qds0: /x is leaving'],
        )

    def test_the_fullest_where_another_measure_was_tested(self) -> None:
        self.answers = {Extend: {"device": "/x", "state": "chained"}}
        self.fill(50)
        self.begin(throttle("lag T> 0", "extend"))
        self.assertEqual([one for one in self.told if one[1] == "Extend"][0][2]["ldsu"], "qds0")

    def test_an_order_that_is_under_way_is_not_given_twice(self) -> None:
        self.answers[Extend] = waiting = Deferred()
        self.fill(61)
        self.begin(throttle("pctwl > 20", "extend"))
        self.told.clear()
        self.pass_()
        self.assertEqual(self.told, [])
        waiting.errback(DegradedError("no device of the pool is free"))
        self.assertEqual(len(self.events("failed")), 1)
        self.answers[Extend] = DegradedError("none")
        self.pass_()
        self.assertEqual([one[1] for one in self.told], ["Extend"])

    def test_what_keeps_failing_is_told_once(self) -> None:
        self.fill(61)
        self.answers[Extend] = DegradedError("none is free")
        self.begin(throttle("pctwl > 60", "extend"))
        for _ in range(20):
            self.pass_()
        lines = ['fired "one" pctwl > 60: 61 (qds0): extend', 'failed "one" extend: none is free']
        told = [one for one in self.events() if not one.startswith("mode")]
        self.assertEqual(told, lines)
        # It is tried all the same, and another reason is news.
        self.assertEqual([name for _, name, _ in self.told].count("Extend"), 21)
        self.answers[Extend] = DegradedError("none has the size")
        self.pass_()
        self.assertEqual(self.events("failed")[1:], ['failed "one" extend: none has the size'])
        self.assertEqual(len(self.events("fired")), 1)

    def test_what_keeps_failing_is_told_again_after_an_hour_or_a_success(self) -> None:
        self.fill(61)
        self.answers[Extend] = DegradedError("none is free")
        self.begin(throttle("pctwl > 60", "extend"))
        self.pass_(FAILURE_AGAIN_SECONDS - 10)
        self.assertEqual((len(self.events("fired")), len(self.events("failed"))), (1, 1))
        self.pass_()
        self.assertEqual((len(self.events("fired")), len(self.events("failed"))), (2, 2))
        self.answers[Extend] = {"device": "/x", "state": "chained"}
        self.pass_()
        self.answers[Extend] = DegradedError("none is free")
        self.pass_()
        self.assertEqual(len(self.events("failed")), 3)

    def test_what_did_not_reach_the_driver_at_a_transition_is_ordered_again(self) -> None:
        one = throttle("pctwl T> 60", "extend")
        self.fill(10)
        self.begin(one)
        self.told.clear()
        self.fill(70)
        self.answers[Extend] = UnreachableError("just being relaunched")
        self.pass_()
        self.pass_()
        self.answers[Extend] = {"device": "/x", "state": "chained"}
        self.pass_()
        self.pass_()
        self.assertEqual([name for _, name, _ in self.told], ["Extend"] * 3)

    def test_but_not_when_it_is_so_no_longer(self) -> None:
        self.fill(10)
        self.begin(throttle("pctwl T> 60", "extend"))
        self.told.clear()
        self.fill(70)
        self.answers[Extend] = UnreachableError("just being relaunched")
        self.pass_()
        self.fill(10)
        self.pass_()
        self.pass_()
        self.assertEqual(len(self.told), 1)


class MessageTests(StatisticsCase):
    def test_pages_and_all_clears(self) -> None:
        """A link fails and returns: each is told once."""
        self.host(HOST + "mail_relay = relay.example.com:2525\n")
        self.begin(
            throttle("lag T> 30", 'mail pager@example.com "link lost"', 'syslog "lost"', name="a"),
            throttle("lag T<= 30", 'console "all clear"', name="b"),
        )
        for lag in (5, 31, 40, 90, 10, 0, 0):
            self.said["driver"]["lag"] = {"seconds": lag}
            self.pass_()
        self.assertEqual((len(self.mails), self.syslog), (1, ["lost"]))
        relay, port, to, message = self.mails[0]
        self.assertEqual((relay, port, to), ("relay.example.com", 2525, "pager@example.com"))
        text = message.decode()
        for part in ("Subject: dsgrp000: link lost", "From: qdsmirror@alpha", "test: lag T> 30"):
            self.assertIn(part, text)
        # Of the all clears the first is of the first evaluation, before which nothing was known.
        self.assertEqual([one["text"] for one in self.group.status()["console"]], ["all clear"] * 2)
        self.assertEqual(self.events("console"), ["console all clear"] * 2)

    def test_the_console(self) -> None:
        self.paths.console.write_text("")
        self.begin(throttle("lag > 0", 'console "look at it"'))
        self.assertIn(b"\r\nqdsmirror: dsgrp000: look at it\r\n", self.paths.console.read_bytes())
        self.paths.console.unlink()
        self.pass_()
        self.assertEqual(len(self.group.status()["console"]), 2)
        self.assertFalse(self.paths.console.exists())

    def test_a_relay_that_is_behind_the_link_that_failed(self) -> None:
        self.host(HOST + "mail_relay = relay\n")
        self.mail_error = QdsError("no route to host")
        self.begin(throttle("lag T> 0.1", 'mail a "b"', 'syslog "c"'))
        self.assertEqual((len(self.mails), self.syslog), (1, ["c"]))
        self.pass_(10.0)
        self.assertEqual(len(self.mails), 2)
        self.mail_error = None
        self.pass_(20.0)
        self.pass_(1000.0)
        self.assertEqual(len(self.mails), 3)
        self.assertEqual(self.events("done"), ['done "one" mail a "b": taken by relay'])

    def test_a_relay_that_never_takes_it(self) -> None:
        self.host(HOST + "mail_relay = relay\n")
        self.mail_error = QdsError("refused")
        self.begin(throttle("lag T> 0.1", 'mail a "b"'))
        for _ in range(100):
            self.pass_()
        self.assertEqual(len(self.mails), 5)
        self.assertEqual(self.events("failed"), ['failed "one" mail a "b": refused'])

    def test_no_relay(self) -> None:
        self.begin(throttle("lag T> 0.1", 'mail a "b"'))
        (line,) = self.events("failed")
        self.assertIn("no mail_relay is configured", line)


class EndTests(StatisticsCase):
    def test_what_comes_of_orders_after_the_end_is_dropped(self) -> None:
        self.answers[Extend] = waiting = Deferred()
        self.fill(61)
        self.begin(throttle("pctwl > 20", "extend"))
        self.successResultOf(self.group.stop())
        waiting.callback({"device": "/x", "state": "chained"})
        self.assertEqual(self.events("done"), [])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def pages(self) -> None:
        """Have two mails fired, for a relay that lets one wait."""
        self.host(HOST + "mail_relay = relay\n")
        self.slow = True
        self.begin(throttle("lag T> 0.1", 'mail a "b"', 'mail c "d"'))
        self.assertEqual(len(self.mails), 1)

    def test_the_relay_has_mails_before_the_end(self) -> None:
        self.pages()
        stopped = self.group.stop()
        self.reactor.advance(MAIL_END_SECONDS / 2)
        self.assertNoResult(stopped)
        self.relays[0].callback(None)
        self.assertEqual(len(self.mails), 2)
        self.assertNoResult(stopped)
        self.relays[1].callback(None)
        self.successResultOf(stopped)
        self.assertEqual(len(self.events("done")), 2)
        self.assertEqual(self.events("failed"), [])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_a_relay_that_does_not_answer_delays_the_end_for_a_while_only(self) -> None:
        self.pages()
        stopped = self.group.stop()
        self.reactor.advance(MAIL_END_SECONDS - 0.1)
        self.assertNoResult(stopped)
        self.reactor.advance(0.1)
        self.successResultOf(stopped)
        self.assertEqual(len(self.mails), 1)
        self.assertEqual(self.cancelled, self.relays)
        first, second = self.events("failed")
        for line, mail in ((first, 'mail c "d"'), (second, 'mail a "b"')):
            self.assertIn(f"{mail}: given up: the process is stopped", line)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_a_relay_that_refuses_is_asked_once_more_at_the_end(self) -> None:
        self.host(HOST + "mail_relay = relay\n")
        self.mail_error = QdsError("refused")
        self.begin(throttle("lag T> 0.1", 'mail a "b"', 'mail c "d"'))
        self.assertEqual(len(self.mails), 1)
        self.successResultOf(self.group.stop())
        self.reactor.advance(1000.0)
        self.assertEqual([one[2] for one in self.mails], ["a", "a", "c"])
        self.assertEqual(len(self.events("failed")), 2)
        for line in self.events("failed"):
            self.assertTrue(line.endswith(": refused"), line)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_a_relay_that_is_back_has_what_waits_for_another_attempt(self) -> None:
        self.host(HOST + "mail_relay = relay\n")
        self.mail_error = QdsError("refused")
        self.begin(throttle("lag T> 0.1", 'mail a "b"'))
        self.mail_error = None
        self.successResultOf(self.group.stop())
        self.assertEqual(len(self.events("done")), 1)
        self.assertEqual(self.events("failed"), [])

    def test_what_would_fire_at_the_end_fires_in_the_successor(self) -> None:
        self.host(HOST + "mail_relay = relay\n")
        page = throttle("lag T> 30", 'mail a "b"')
        self.said["driver"]["lag"] = {"seconds": 0}
        self.begin(page)
        asked: Deferred[Any] = Deferred()
        late, self.said["driver"] = {**self.said["driver"], "lag": {"seconds": 31}}, asked
        self.pass_()
        stopped = self.group.stop()
        asked.callback(late)
        self.successResultOf(stopped)
        self.assertEqual((self.mails, self.events("fired")), ([], []))
        self.said["driver"] = late
        self.worker = ImmediateWorker()
        self.begin(page)
        self.assertEqual(len(self.mails), 1)


class ProgramTests(StatisticsCase):
    def setUp(self) -> None:
        super().setUp()
        self.throttle = throttle("pctwl T> 20", 'exec /bin/page "link lost" now', name="p")

    def test_allowed(self) -> None:
        self.host(HOST + "allow_exec = yes\n")
        self.begin(self.throttle)
        ((argv, variables),) = self.programs
        self.assertEqual(argv, ("/bin/page", "link lost", "now"))
        self.assertEqual(
            variables,
            {
                "QDS_GROUP": "dsgrp000",
                "QDS_THROTTLE": "p",
                "QDS_TEST": "pctwl T> 20",
                "QDS_VALUE": "25",
                "QDS_LDSUS": "qds0 qds1",
                "QDS_ROOT": str(self.paths.root),
            },
        )
        self.assertEqual(len(self.events("done")), 1)

    def refused(self, why: str) -> None:
        self.begin(self.throttle)
        self.assertEqual(self.programs, [])
        (line,) = self.events("failed")
        self.assertIn(why, line)

    def test_not_allowed(self) -> None:
        self.refused("programs are not allowed")

    def test_others_can_write_the_hosts_file(self) -> None:
        self.host(HOST + "allow_exec = yes\n", 0o666)
        self.refused("qds.cfg can be written by others (mode 0666)")

    def test_others_can_write_the_groups_file(self) -> None:
        self.host(HOST + "allow_exec = yes\n")
        self.paths.group_config(0).chmod(0o664)
        self.refused("dsgrp000.cfg can be written by others")

    def test_it_fails(self) -> None:
        self.host(HOST + "allow_exec = yes\n")
        self.program_error = QdsError("/bin/page ended with exit code 3")
        self.begin(self.throttle)
        self.assertIn("ended with exit code 3", self.events("failed")[0])
