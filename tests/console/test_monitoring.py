"""Alert rules and dashboard: valid, about metrics that exist, and saying what to type next."""

from __future__ import annotations

import configparser
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from qdsmirror.console.metrics import Metrics
from tests.console.test_metrics import PROMISED
from tests.console.world import Host
from tests.tools.sites import host_root

ROOT = Path(__file__).parents[2]
RULES = ROOT / "conf" / "prometheus" / "qdsmirror.rules.yml"
DASHBOARD = ROOT / "conf" / "grafana" / "qdsmirror.json"
RULE_TESTS = Path(__file__).with_name("qdsmirror.rules.test.yml")
#: What alerts must be about, and a word of the alert that is.
TOPICS = ("Lags", "WritelogFilling", "WritelogFullSoon", "NotCoherent", "RefreshStalled", "Bypass",
          "VerifyMismatch", "CertificateExpires", "DaemonGone", "ConsoleGone")  # fmt: skip


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        raise SkipTest("promtool is missing")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=240)


def metrics_in(text: str) -> set[str]:
    """Find the metrics that an expression is about, by the names of their families."""
    found = set(re.findall(r"\bqds_[a-z_]+\b", text))
    return {re.sub(r"(_latency_seconds)_(bucket|sum|count)$", r"\1", name) for name in found}


def rule_texts(key: str) -> list[str]:
    """Read what the rules have at a key, each in one line of its own."""
    return re.findall(rf"^\s+(?:- )?{key}: (.*)$", RULES.read_text(), re.MULTILINE)


def panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return made


def expressions(value: Any) -> Iterator[str]:
    """Find every expression and query of a dashboard."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


class Case(SynchronousTestCase):
    def families(self) -> set[str]:
        """Give the names of all metrics that a scrape tells."""
        host = Host(self, host_root(self))  # type: ignore[arg-type]
        return {
            one.name + ("_total" if one.type == "counter" else "")
            for one in Metrics(host.look()).families()
        }


class RulesTests(Case):
    def test_promtool_takes_them(self) -> None:
        done = promtool("check", "rules", str(RULES))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"SUCCESS: {len(rule_texts('alert'))} rules found", done.stdout)

    def test_they_fire_when_they_should(self) -> None:
        done = promtool("test", "rules", str(RULE_TESTS))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_each_has_its_test(self) -> None:
        tested = RULE_TESTS.read_text()
        for alert in rule_texts("alert"):
            self.assertIn(alert, tested)

    def test_metrics_exist(self) -> None:
        wanted = metrics_in(" ".join(rule_texts("expr")))
        self.assertGreater(len(wanted), 8)
        self.assertEqual(wanted - self.families(), set())

    def test_topics(self) -> None:
        alerts = rule_texts("alert")
        self.assertEqual([one for one in TOPICS if f"Qds{one}" not in " ".join(alerts)
                          and f"QdsMirror{one}" not in alerts], [])  # fmt: skip
        self.assertEqual(len(alerts), len(set(alerts)))

    def test_they_say_what_to_do(self) -> None:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        scripts = setup["options.entry_points"]["console_scripts"]
        commands = {line.split("=")[0].strip() for line in scripts.strip().splitlines()}
        descriptions = rule_texts("description")
        self.assertEqual(len(descriptions), len(rule_texts("alert")))
        for text in descriptions:
            self.assertIn("Next", text)
            named = set(re.findall(r"\b(?:qds|launch|kill)[a-z]+\b", text.partition("Next")[2]))
            named.discard("qdsmirror")
            self.assertEqual(named - commands, set(), text)


class DashboardTests(Case):
    def test_metrics_exist_and_none_is_forgotten(self) -> None:
        used = metrics_in(" ".join(expressions(json.loads(DASHBOARD.read_text()))))
        told = self.families()
        self.assertEqual(used - told, set())
        self.assertEqual(PROMISED - used, set())

    def test_expressions_are_good(self) -> None:
        """As recording rules: promtool says what is wrong in one."""
        made = json.loads(DASHBOARD.read_text())
        lines = ["groups:", "  - name: dashboard", "    rules:"]
        found = [one for one in expressions(made) if not one.startswith("label_values(")]
        self.assertGreater(len(found), 25)
        for number, text in enumerate(found):
            plain = text.replace("$__rate_interval", "5m").replace('"$', '"')
            self.assertNotIn("$", plain, "a variable that Grafana does not replace")
            lines += [f"      - record: expression{number}", f"        expr: {json.dumps(plain)}"]
        path = Path(self.mktemp())
        path.write_text("\n".join(lines) + "\n")
        done = promtool("check", "rules", str(path))
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_every_query_goes_to_the_chosen_source(self) -> None:
        for panel in panels():
            for target in panel.get("targets", []):
                self.assertEqual(target["datasource"]["uid"], "${datasource}")
                self.assertEqual(panel["datasource"], target["datasource"])

    def test_panels_have_names_numbers_and_places_of_their_own(self) -> None:
        made = panels()
        self.assertEqual(len({panel["id"] for panel in made}), len(made))
        self.assertTrue(all(panel["title"] for panel in made))
        for one, other in itertools.combinations([panel["gridPos"] for panel in made], 2):
            apart = (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            )
            self.assertTrue(apart, (one, other))
            self.assertLessEqual(one["x"] + one["w"], 24)

    def test_several_values_in_a_table_have_letters_of_their_own(self) -> None:
        for panel in panels():
            letters = [target["refId"] for target in panel.get("targets", [])]
            self.assertEqual(len(letters), len(set(letters)), panel["title"])
