"""qdsverify beside fake daemons, and how qdsinfo shows a verify."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_BROKEN, EXIT_DEGRADED, DegradedError
from qdsmirror.tools import following, verify
from qdsmirror.tools.info_view import verify_text
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root, pmd_status

MIB = 1 << 20


def state(phase: str = "over", result: str | None = "equal", **changes: Any) -> dict[str, Any]:
    return {
        "id": "ab",
        "phase": phase,
        "repair": False,
        "started": 1790000000.0,
        "finished": 1790000100.0 if phase == "over" else None,
        "result": result,
        "reason": "",
        "done_bytes": 3 * MIB,
        "remaining_bytes": 0 if phase == "over" else MIB,
        "rate": 0,
        "eta_seconds": None,
        "differing_bytes": 0,
        "differing": [],
        "repaired_bytes": 0,
        "last": None,
        "next": None,
        **changes,
    }


DIFFERS = state(
    result="differs",
    differing_bytes=MIB,
    differing=[
        {"ldsu": "qds0", "offset": 65536, "length": 65536},
        {"ldsu": "qds0", "offset": 262144, "length": 131072},
    ],
)


class CommandTests(TestCase):
    def run_beside(
        self, *steps: dict[str, Any] | None, words: tuple[str, ...] = (), answer: Any = None
    ) -> tuple[int, str, str]:
        self.patch(following, "POLL_SECONDS", 0.001)
        paths = host_root(self)
        left = list(steps)

        def status(_words: dict[str, str]) -> dict[str, Any]:
            step = left.pop(0) if len(left) > 1 else left[0]
            return driver_status(verify=step)

        FakeDaemon(self, paths.control_socket("dsgrp000.pmd"), {"Status": pmd_status()})
        self.driver = FakeDaemon(
            self,
            paths.control_socket("dsgrp000.driver"),
            {"Verify": answer or state("compare", None), "Status": status},
        )
        return captured(self, verify.main, "--root", str(paths.root), *words)

    def test_equal(self) -> None:
        code, output, errors = self.run_beside(
            state("compare", None, eta_seconds=5.0), state("compare", None), state()
        )
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(self.driver.calls[0], ("Verify", {"how": "compare"}))
        self.assertEqual(
            output.splitlines(),
            [
                "dsgrp000: verify 75 %, 1 MiB remain, 5.0 s to go",
                "dsgrp000: the mirror is equal",
            ],
        )

    def test_differs(self) -> None:
        code, output, errors = self.run_beside(DIFFERS)
        self.assertEqual(code, EXIT_BROKEN)
        self.assertEqual(
            output.splitlines(),
            [
                "dsgrp000: qds0: bytes 65536 to 131071 differ",
                "dsgrp000: qds0: bytes 262144 to 393215 differ",
                "dsgrp000: and 832 KiB more",
            ],
        )
        self.assertEqual(errors, "dsgrp000: 1 MiB of the mirror differ; qdsverify --repair -g 0\n")

    def test_json(self) -> None:
        code, output, errors = self.run_beside(DIFFERS, words=("--json",))
        self.assertEqual((code, errors), (EXIT_BROKEN, ""))
        told = json.loads(output)
        self.assertEqual(told["groups"], [{**DIFFERS, "group": 0, "name": "dsgrp000"}])
        self.assertEqual(told["error"]["code"], "broken")

    def test_repair(self) -> None:
        code, output, _ = self.run_beside(
            state("mend", None), state(repaired_bytes=131072), words=("--repair",)
        )
        self.assertEqual(code, 0)
        self.assertEqual(self.driver.calls[0], ("Verify", {"how": "repair"}))
        self.assertTrue(
            output.endswith("the mirror is equal, after 128 KiB were repaired\n"), output
        )

    def test_ended_early(self) -> None:
        code, _, errors = self.run_beside(state(result="ended", reason="the group is in bypass"))
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertEqual(errors, "dsgrp000: the verify was ended: the group is in bypass\n")

    def test_another_has_begun(self) -> None:
        code, _, errors = self.run_beside(state("compare", None, id="cd"))
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertIn("another verify has begun", errors)

    def test_stop(self) -> None:
        code, output, _ = self.run_beside(state(), words=("--stop",), answer=state(result="ended"))
        self.assertEqual((code, output), (0, "dsgrp000: verify has ended\n"))
        self.assertEqual(self.driver.calls, [("Verify", {"how": "stop"})])

    def test_refused(self) -> None:
        refusal = DegradedError("dsgrp000 cannot be verified: no", "wait")
        code, _, errors = self.run_beside(None, answer=refusal)
        self.assertEqual((code, errors), (3, "dsgrp000 cannot be verified: no; wait\n"))

    def test_daemons_may_come_and_go(self) -> None:
        self.patch(following, "POLL_SECONDS", 0.001)
        code, _, _ = self.run_beside(None, None, state("compare", None), None, state())
        self.assertEqual(code, 0)


class ViewTests(TestCase):
    def test_lines(self) -> None:
        for shown, part in (
            (state(), "equal"),
            (DIFFERS, "1 MiB DIFFER"),
            (state(repaired_bytes=65536), "equal (64 KiB were repaired)"),
            (state(result="ended", reason="so"), "before its end: so"),
            (state("compare", None, differing_bytes=65536), "64 KiB DIFFER"),
            (state("mend", None), "repair of what differs"),
            (state("again", None), "verify of the repair 75 %"),
        ):
            self.assertIn(part, verify_text(shown))
