"""Samples of what daemons say: rates over an interval, over restarts and silence."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.rates import Rates, Reading
from qdsmirror.core.samples import GroupSample, LdsuSample

KIB = 1024


def driver(**changes: Any) -> dict[str, Any]:
    log = {"size": 4096 * KIB, "used_bytes": 1024 * KIB, "entries": 12, "oldest_age_seconds": 0.5}
    ldsus = [{"name": "qds0", "writelog": log}, {"name": "qds1", "writelog": {**log, "entries": 0}}]
    return {"state": "connected", "lag": {"seconds": 0.5}, "ldsus": ldsus, **changes}


def pmd(kib: int, pid: int = 1, cpu: float = 0.0, shrunk: float = 1.0) -> dict[str, Any]:
    """Say what a pmd has sent: this many KB of frames of each of two LDSUs."""
    ldsus = [
        {"name": name, "frame_bytes": kib * KIB, "data_bytes": kib * KIB // 2, "entries": kib * 10}
        for name in ("qds0", "qds1")
    ]
    return {
        "pmd": {"pid": pid},
        "traffic": {"cpu_seconds": cpu, "ldsus": ldsus},
        "wire": {"frame_bytes": 2 * kib * KIB, "wire_bytes": int(2 * kib * KIB * shrunk)},
        "knobs": {"sleep_us": 15000, "limit_kbps": 0},
    }


class PrimaryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.rates = Rates(["qds0", "qds1"], "primary")
        self.at = 0.0

    def sample(self, after: float = 10.0, **said: Any) -> GroupSample:
        self.at += after
        return self.rates.sample(Reading(1000 + self.at, self.at, **said))

    def test_the_first_knows_no_rate(self) -> None:
        sample = self.sample(driver=driver(), mirror=pmd(100))
        self.assertEqual(
            sample,
            GroupSample(
                epoch=1010.0,
                sleep_us=15000,
                state="connected",
                ldsus=(
                    LdsuSample("qds0", waiting=12, sectors=2048, pctwl=25.0, age_seconds=0.5),
                    LdsuSample("qds1", waiting=0, sectors=2048, pctwl=25.0, age_seconds=0.5),
                ),
                lag_seconds=0.5,
                limit_kbps=0,
            ),
        )

    def test_rates_since_the_one_before(self) -> None:
        self.sample(driver=driver(), mirror=pmd(100, cpu=1.0))
        sample = self.sample(driver=driver(knobs={"writesleep_us": 7}), mirror=pmd(300, cpu=1.5))
        self.assertEqual((sample.netkbps, sample.pctcpu), (40.0, 5.0))
        self.assertEqual(sample.writesleep_us, 7)
        one = sample.ldsus[0]
        self.assertEqual((one.total_kbps, one.data_kbps, one.entries_ps), (20.0, 10.0, 200.0))
        sample = self.sample(5.0, driver=driver(), mirror=pmd(300, cpu=1.5))
        self.assertEqual((sample.netkbps, sample.pctcpu), (0.0, 0.0))
        self.assertEqual(sample.ldsus[1].total_kbps, 0.0)

    def test_what_compression_leaves(self) -> None:
        self.sample(driver=driver(), mirror=pmd(0))
        sample = self.sample(driver=driver(), mirror=pmd(200, shrunk=0.25))
        one = sample.ldsus[0]
        self.assertEqual((sample.netkbps, one.total_kbps, one.data_kbps), (10.0, 5.0, 10.0))

    def test_another_process_counts_from_nothing(self) -> None:
        self.sample(driver=driver(), mirror=pmd(1000, cpu=50.0))
        sample = self.sample(driver=driver(), mirror=pmd(100, pid=2, cpu=0.5))
        self.assertEqual((sample.netkbps, sample.pctcpu), (20.0, 5.0))
        self.assertEqual(sample.ldsus[0].total_kbps, 10.0)
        # Also where its number has come back (and whatever else made a count smaller).
        self.assertEqual(self.sample(driver=driver(), mirror=pmd(0, pid=2)).netkbps, 0.0)

    def test_a_pmd_that_is_gone_sends_nothing(self) -> None:
        self.sample(driver=driver(), mirror=pmd(100))
        sample = self.sample(driver=driver(state="accumulating"), gone=True)
        self.assertEqual((sample.state, sample.netkbps, sample.pctcpu), ("accumulating", 0.0, 0.0))
        self.assertEqual(sample.ldsus[0].entries_ps, 0.0)
        self.assertIsNone(sample.sleep_us)
        sample = self.sample(driver=driver(), mirror=pmd(50, pid=2))
        self.assertEqual(sample.netkbps, 10.0)

    def test_silence_is_made_up_for(self) -> None:
        """Who does not answer once may have sent all the time."""
        self.sample(driver=driver(), mirror=pmd(100))
        sample = self.sample(driver=driver())
        self.assertEqual((sample.netkbps, sample.ldsus[0].total_kbps), (None, None))
        self.assertEqual(self.sample(driver=driver(), mirror=pmd(500)).netkbps, 40.0)

    def test_no_driver(self) -> None:
        self.sample(driver=driver(), mirror=pmd(100))
        sample = self.sample(mirror=pmd(200))
        self.assertEqual((sample.state, sample.lag_seconds, sample.pctwl), ("setup", None, None))
        self.assertEqual(sample.netkbps, 20.0)

    def test_part_of_a_sector_is_in_use(self) -> None:
        log = {"size": 1024, "used_bytes": 513, "entries": 1, "oldest_age_seconds": 0.0}
        told = driver(ldsus=[{"name": "qds0", "writelog": log}])
        first, second = self.sample(driver=told).ldsus
        self.assertEqual((first.sectors, second), (2, LdsuSample("qds1")))


class SecondaryTests(SynchronousTestCase):
    def test_what_arrives_and_the_journal(self) -> None:
        rates = Rates(["qds0", "qds1"], "secondary")
        told = {"state": "connected", "lag": {"seconds": None}, "rmd": {"pid": 1}}
        told["journal"] = {"size": 1000 * KIB, "used_bytes": 10 * KIB, "entries": 3}
        for at, kib in ((10.0, 0), (20.0, 100)):
            sent = {key: pmd(kib)[key] for key in ("wire", "traffic")}
            sample = rates.sample(Reading(at, at, mirror={**told, **sent}))
        self.assertEqual(
            (sample.state, sample.netkbps, sample.lag_seconds), ("connected", 20, None)
        )
        self.assertEqual(
            [(one.total_kbps, one.waiting, one.sectors, one.pctwl) for one in sample.ldsus],
            [(10.0, 3, 20, 1.0)] * 2,
        )
        self.assertEqual(rates.sample(Reading(30.0, 30.0, gone=True)).state, "setup")
