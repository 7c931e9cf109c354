"""The metrics: the promised names, with values from what the daemons say, and nothing made up."""

from __future__ import annotations

import math
import shutil
import subprocess
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from qdsmirror.console.metrics import Metrics, render
from tests.console.world import Host, driver, pmd, samples
from tests.groups.world import KIB, DriverWorld
from tests.tools.sites import host_root

#: As promised, each with its labels less group and role.
PROMISED = {
    "qds_build_info",
    "qds_group_state",
    "qds_coherent",
    "qds_bypass_active",
    "qds_writelog_used_ratio",
    "qds_writelog_entries",
    "qds_writelog_oldest_entry_age_seconds",
    "qds_writelog_seconds_to_full",
    "qds_last_commit_timestamp_seconds",
    "qds_refresh_remaining_bytes",
    "qds_verify_mismatch_bytes",
    "qds_cert_expiry_timestamp_seconds",
    "qds_sent_bytes_total",
    "qds_sent_entries_total",
    "qds_throttle_fired_total",
    "qds_write_latency_seconds",
}
OWN = 'group="dsgrp000",role="primary"'
LDSU = 'group="dsgrp000",ldsu="qds0",role="primary"'


def verify(**changes: Any) -> dict[str, Any]:
    found = {"result": "differs", "differing_bytes": 8192, "last": None}
    return {**found, **changes}


class MetricsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.paths = host_root(self)  # type: ignore[arg-type]
        self.host = Host(self, self.paths)

    def scrape(self, **changes: Any) -> dict[str, float]:
        """Scrape, with changes to what the driver says."""
        if changes:
            self.host.answers["dsgrp000.driver"] = driver(**changes)
            self.host.reactor.advance(1.0)
        return samples(render(self.host.look()))

    def writelog(self, **changes: Any) -> dict[str, float]:
        ldsus = driver()["ldsus"]
        ldsus[0]["writelog"] |= changes
        return self.scrape(ldsus=ldsus)

    def test_promised_names(self) -> None:
        told = {
            one.name + ("_total" if one.type == "counter" else "")
            for one in Metrics(self.host.look()).families()
        }
        self.assertEqual(PROMISED - told, set())

    def test_a_group(self) -> None:
        told = self.scrape()
        for name, value in {
            f"qds_coherent{{{OWN}}}": 1,
            f"qds_bypass_active{{{OWN}}}": 0,
            f'qds_group_state{{{OWN},state="connected"}}': 1,
            f'qds_group_state{{{OWN},state="bypass"}}': 0,
            f'qds_daemon_up{{daemon="driver",{OWN}}}': 1,
            f'qds_daemon_up{{daemon="pmd",{OWN}}}': 1,
            f"qds_last_commit_timestamp_seconds{{{OWN}}}": 1790000123.5,
            f"qds_refresh_remaining_bytes{{{OWN}}}": 0,
            f"qds_verify_mismatch_bytes{{{OWN}}}": 0,
            f"qds_writelog_used_ratio{{{LDSU}}}": 0.01,
            f"qds_writelog_entries{{{LDSU}}}": 12,
            f"qds_writelog_oldest_entry_age_seconds{{{LDSU}}}": 0.2,
            f"qds_writelog_seconds_to_full{{{LDSU}}}": math.inf,
            f"qds_sent_entries_total{{{LDSU}}}": 70,
            f"qds_wire_bytes_total{{{OWN}}}": 6000,
            "qds_configuration_errors": 0,
        }.items():
            self.assertEqual(told[name], value, name)

    def test_what_is_sent_adds_up(self) -> None:
        told = self.scrape()
        labels = 'group="dsgrp000",kind="{}",ldsu="qds0",role="primary"'
        kinds = {
            kind: told[f"qds_sent_bytes_total{{{labels.format(kind)}}}"]
            for kind in ("data", "refresh", "verify", "header")
        }
        self.assertEqual(kinds, {"data": 5000, "refresh": 3000, "verify": 500, "header": 1500})
        self.assertEqual(sum(kinds.values()), 10_000)

    def test_throttles(self) -> None:
        told = self.scrape()
        name = 'qds_throttle_fired_total{{{},throttle="{}"}}'
        self.assertEqual(told[name.format(OWN, "office hours")], 7)
        self.assertEqual(told[name.format(OWN, 'a \\"quoted\\" \\\\ name')], 0)
        del self.host.answers["dsgrp000.stats"]
        self.host.reactor.advance(1.0)
        told = samples(render(self.host.look()))
        self.assertEqual(told[f'qds_daemon_up{{daemon="stats",{OWN}}}'], 0)
        self.assertFalse([one for one in told if "throttle" in one])

    def test_latency(self) -> None:
        told = self.scrape()
        labels = 'group="dsgrp000",ldsu="qds0",le="{}",role="primary"'
        bucket = {
            bound: told[f"qds_write_latency_seconds_bucket{{{labels.format(bound)}}}"]
            for bound in ("0.0001", "0.00025", "0.01", "0.025", "+Inf")
        }
        self.assertEqual(bucket, {"0.0001": 0, "0.00025": 3, "0.01": 3, "0.025": 4, "+Inf": 4})
        self.assertEqual(told[f"qds_write_latency_seconds_count{{{LDSU}}}"], 4)
        self.assertAlmostEqual(told[f"qds_write_latency_seconds_sum{{{LDSU}}}"], 0.0206)

    def test_how_soon_the_writelog_is_full(self) -> None:
        name = f"qds_writelog_seconds_to_full{{{LDSU}}}"
        self.assertEqual(self.writelog(seconds_to_full=90.5)[name], 90.5)
        self.assertEqual(self.writelog(seconds_to_full=0.0)[name], 0)

    def test_states(self) -> None:
        told = self.scrape(
            state="bypass", modes=["bypass", "accumulating"], coherent=False, bypass={"lost": False}
        )
        self.assertEqual(told[f"qds_bypass_active{{{OWN}}}"], 1)
        self.assertEqual(told[f"qds_coherent{{{OWN}}}"], 0)
        self.assertEqual(told[f'qds_group_state{{{OWN},state="bypass"}}'], 1)
        self.assertEqual(told[f'qds_group_state{{{OWN},state="accumulating"}}'], 0)

    def test_a_refresh(self) -> None:
        told = self.scrape(refresh={"remaining_bytes": 12345})
        self.assertEqual(told[f"qds_refresh_remaining_bytes{{{OWN}}}"], 12345)

    def test_what_a_verify_found(self) -> None:
        last = {"finished": 1.0, "result": "differs", "differing_bytes": 4096}
        name = f"qds_verify_mismatch_bytes{{{OWN}}}"
        for expected, changes in (
            (8192, {"verify": verify()}),
            (0, {"verify": verify(), "coherent": True}),
            (0, {"verify": verify(), "refresh": {"remaining_bytes": 1}}),
            (4096, {"verify": verify(result=None, differing_bytes=0, last=last)}),
            (4096, {"verify": verify(result="ended", differing_bytes=0, last=last)}),
            (0, {"verify": verify(result="equal", differing_bytes=0, last=last)}),
        ):
            told = self.scrape(**{"coherent": False, **changes})
            self.assertEqual(told[name], expected, changes)

    def test_what_is_not_known_is_absent(self) -> None:
        del self.host.answers["dsgrp000.driver"]
        told = self.scrape()
        self.assertEqual(told[f'qds_daemon_up{{daemon="driver",{OWN}}}'], 0)
        self.assertEqual(told[f'qds_daemon_up{{daemon="pmd",{OWN}}}'], 1)
        self.assertEqual(told[f'qds_group_state{{{OWN},state="setup"}}'], 1)
        names = {name.partition("{")[0] for name in told}
        for absent in (
            "qds_coherent",
            "qds_bypass_active",
            "qds_refresh_remaining_bytes",
            "qds_writelog_entries",
            "qds_write_latency_seconds_count",
        ):
            self.assertNotIn(absent, names)

    def test_nothing_is_sent_while_there_is_no_pmd(self) -> None:
        del self.host.answers["dsgrp000.pmd"]
        told = self.scrape()
        self.assertFalse([name for name in told if "sent" in name or "wire" in name])
        self.assertEqual(told[f"qds_coherent{{{OWN}}}"], 1)

    def test_a_secondary(self) -> None:
        paths = host_root(self, "beta")  # type: ignore[arg-type]
        host = Host(self, paths)
        journal = {
            "devices": ["/dev/vg0/j0"], "size": 1 << 27, "used_bytes": 4096, "used_ratio": 0.03,
            "entries": 1, "seconds_to_full": None,
        }  # fmt: skip
        host.answers = {
            "dsgrp000.rmd": {
                "state": "accumulating",
                "modes": ["accumulating"],
                "coherent": True,
                "last_commit": 1790000001.0,
                "journal": journal,
            }
        }
        told = samples(render(host.look()))
        own = 'group="dsgrp000",role="secondary"'
        for name, value in {
            f"qds_coherent{{{own}}}": 1,
            f'qds_group_state{{{own},state="accumulating"}}': 1,
            f'qds_daemon_up{{daemon="rmd",{own}}}': 1,
            f"qds_journal_used_ratio{{{own}}}": 0.03,
            f"qds_journal_seconds_to_full{{{own}}}": math.inf,
            f"qds_last_commit_timestamp_seconds{{{own}}}": 1790000001,
        }.items():
            self.assertEqual(told[name], value, name)
        host.answers = {}
        host.reactor.advance(1.0)
        told = samples(render(host.look()))
        self.assertEqual(told[f'qds_daemon_up{{daemon="rmd",{own}}}'], 0)
        self.assertFalse([name for name in told if "journal" in name])

    def test_what_a_driver_really_says(self) -> None:
        world = DriverWorld(self, log=256 * KIB)
        world.start()
        self.host.answers["dsgrp000.driver"] = world.group.status()
        told = self.scrape()
        self.assertEqual(told[f"qds_writelog_used_ratio{{{LDSU}}}"], 0)
        self.assertEqual(told[f"qds_write_latency_seconds_count{{{LDSU}}}"], 0)

    def test_promtool_finds_nothing_wrong(self) -> None:
        if shutil.which("promtool") is None:
            raise SkipTest("promtool is missing")
        self.host.answers["dsgrp000.pmd"] = pmd()
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=render(self.host.look()),
            capture_output=True,
            timeout=240,
        )
        self.assertEqual((checked.returncode, checked.stdout, checked.stderr), (0, b"", b""))
