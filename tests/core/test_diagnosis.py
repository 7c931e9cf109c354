"""What a group's status tells a doctor: each state names its way out, a healthy one nothing."""

from __future__ import annotations

import copy
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.diagnosis import diagnose
from qdsmirror.core.findings import Severity

HEALTHY: dict[str, Any] = {
    "group": 3,
    "name": "dsgrp003",
    "role": "primary",
    "operation": "async",
    "degraded": None,
    "synchronous": None,
    "state": "connected",
    "modes": ["connected"],
    "reason": "",
    "coherent": True,
    "peer": "dr1",
    "refresh": None,
    "bypass": None,
    "backfresh": None,
    "verify": None,
    "checkpoint": None,
    "wire": {"paths": [{"local": None, "remote": "dr1", "port": 575, "state": "connected"}]},
    "pool": {"free": 0},
    "driver": {"pid": 1},
    "pmd": {"pid": 2, "state": "connected", "reason": "", "code": 0, "hint": ""},
    "rmd": {"pid": None, "state": "connected", "reason": "", "code": 0},
    "ldsus": [
        {
            "name": "qds0",
            "data_device": "/dev/d0",
            "dead": False,
            "errors": [],
            "writelog": {"trusted": True, "used_ratio": 0.1, "seconds_to_full": None},
        }
    ],
    "errors": [],
}
AT_SECONDARY: dict[str, Any] = {
    **HEALTHY,
    "role": "secondary",
    "peer": "db1",
    "driver": {"pid": None},
    "pmd": {"pid": None, "state": "connected"},
    "rmd": {"pid": 4, "state": "connected", "reason": "", "code": 0, "hint": ""},
    "journal": {"used_ratio": 0.0, "seconds_to_full": None},
}


class DiagnosisTests(SynchronousTestCase):
    def finds(self, group: dict[str, Any], *expected: tuple[str, str, str], code: int = 0) -> None:
        """Expect findings, each (severity, words of the message, words of the next step)."""
        found = diagnose(group, "--root /r")
        self.assertEqual(len(found), len(expected), found)
        for one, (severity, message, step) in zip(found, expected, strict=True):
            self.assertEqual(one.severity, Severity(severity), one)
            self.assertIn(message, one.message)
            self.assertIn(step, one.next_step)
            self.assertEqual(one.group, 3)
            if code:
                self.assertEqual(one.code, code)

    def of(self, base: dict[str, Any] = HEALTHY, **changes: Any) -> dict[str, Any]:
        return {**copy.deepcopy(base), **changes}

    def test_healthy(self) -> None:
        self.finds(HEALTHY)
        self.finds(AT_SECONDARY)

    def test_daemons(self) -> None:
        down = {"pid": None, "state": "stopped", "reason": "pmd not running"}
        self.finds(self.of(pmd=down), ("error", "pmd not running", "launchpmds --root /r"), code=11)
        self.finds(
            self.of(driver={"pid": None}, reason="driver not running"),
            ("error", "driver not running", "launchdriver --root /r"),
            code=11,
        )
        self.finds(
            self.of(driver={"pid": None}, reason="driver is being relaunched"),
            ("error", "does not answer: driver is being relaunched", "qdsconfigtool apply"),
        )
        failed = {"pid": None, "state": "failed", "reason": "port in use; ss -l", "code": 10}
        self.finds(
            self.of(driver=failed),
            ("error", "its driver has failed: port in use; ss -l", "qdsconfigtool apply --root"),
            code=10,
        )
        self.finds(
            self.of(AT_SECONDARY, rmd={"pid": None, "state": "stopped", "reason": ""}),
            ("error", "rmd not running", "launchrmds --root /r"),
        )

    def test_link(self) -> None:
        link = {"pid": 2, "state": "refused", "reason": "expired", "code": 12, "hint": "renew it"}
        self.finds(
            self.of(pmd=link), ("error", "the link is refused: expired", "renew it"), code=12
        )
        link = {**link, "state": "connecting", "code": 0, "hint": ""}
        self.finds(
            self.of(pmd=link),
            ("error", "no link to dr1: expired", "qdsdoctor --root /r -g 3 --peer"),
            code=11,
        )
        paths = [{**HEALTHY["wire"]["paths"][0], "state": "connecting", "reason": "down"}]
        self.finds(self.of(wire={"paths": paths}), ("warning", ">dr1 port 575 is connecting", ""))
        rmd = {"pid": 4, "state": "refused", "reason": "no secret", "code": 12, "hint": "compare"}
        self.finds(
            self.of(AT_SECONDARY, rmd=rmd), ("error", "was refused: no secret", "compare"), code=12
        )
        rmd = {"pid": 4, "state": "connecting", "reason": "waiting for the primary"}
        self.finds(
            self.of(AT_SECONDARY, rmd=rmd),
            ("warning", "no connection from the primary db1: waiting", "on db1: qdsinfo -g 3"),
        )

    def test_bypass(self) -> None:
        bypass = {"reason": "a writelog is full", "dirty_bytes": 65536}
        self.finds(
            self.of(bypass=bypass, coherent=False),
            ("warning", "65536 bytes may differ", "qdsbypass --root /r -g 3 off"),
        )

    def test_failed_devices(self) -> None:
        group = self.of(bypass={"reason": "a writelog failed", "dirty_bytes": 1})
        group["ldsus"][0]["writelog"]["trusted"] = False
        self.finds(
            group, ("error", "a writelog has failed", "qdswlinit --root /r -g 3 --yes"), code=4
        )
        group = self.of()
        group["ldsus"][0] |= {"dead": True, "errors": ["data device /dev/d0 failed: EIO"]}
        self.finds(group, ("error", "/dev/d0 failed", "--replaced qds0"), code=4)

    def test_coherence(self) -> None:
        self.finds(
            self.of(coherent=False), ("error", "not coherent", "qdsrefresh --root /r -g 3"), code=4
        )
        self.finds(self.of(coherent=False, refresh={"kind": "full"}))
        self.finds(
            self.of(AT_SECONDARY, coherent=False),
            ("error", "not coherent", "on db1: qdsrefresh -g 3"),
        )
        self.finds(self.of(AT_SECONDARY, coherent=False, modes=["refresh"]))

    def test_synchronous(self) -> None:
        self.finds(
            self.of(degraded={"since": 1.0, "reason": "the link was lost"}),
            ("warning", "answers do not wait", "qdsdoctor"),
        )
        away = {"pid": 2, "state": "connecting", "reason": "lost", "hint": "h"}
        self.finds(
            self.of(pmd=away, synchronous={"waiting": 7}),
            ("error", "no link", "h"),
            ("error", "7 writes wait", "qdsset --root /r -g 3 on_disconnect=async"),
        )

    def test_a_log_that_fills(self) -> None:
        def filled(ratio: float, seconds: float | None, **changes: Any) -> dict[str, Any]:
            group = self.of(**changes)
            group["ldsus"][0]["writelog"] |= {"used_ratio": ratio, "seconds_to_full": seconds}
            return group

        self.finds(filled(0.79, None))
        self.finds(filled(0.4, 10.0))
        self.finds(filled(0.9, None), ("warning", "qds0 is 90 % full", "too slow"))
        self.finds(filled(0.6, 60.0), ("warning", "60 % full, entirely in 60 s", "too slow"))
        self.finds(
            filled(0.9, None, pool={"free": 1}), ("warning", "90 %", "qdsextend --root /r -g 3")
        )
        held = {"name": "c1", "gsn": 8}
        self.finds(
            filled(0.9, None, checkpoint=held),
            ("warning", "90 %", "on dr1: qdscheckpoint"),
            ("advice", "checkpoint c1 holds the mirror at GSN 8", "on dr1: qdscheckpoint off -g 3"),
        )
        journal = {"used_ratio": 0.95, "seconds_to_full": 5.0}
        self.finds(
            self.of(AT_SECONDARY, journal=journal), ("warning", "its journal is 95 %", "iostat")
        )

    def test_a_verify_that_found_something(self) -> None:
        verify = {"result": "differs", "differing_bytes": 4096, "repair": False}
        self.finds(
            self.of(verify=verify), ("error", "4096 bytes", "qdsverify --root /r -g 3 --repair")
        )
        self.finds(self.of(verify={**verify, "result": "equal"}))

    def test_notes(self) -> None:
        self.finds(self.of(errors=["it was odd"]), ("advice", "earlier: it was odd", "qdsinfo"))
