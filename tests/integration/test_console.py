"""The console daemon among the others: what it tells of real groups, whom it refuses, and that
nothing which becomes of it or of its clients holds the data up."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.config import load_host
from qdsmirror.errors import EXIT_CONFIG
from qdsmirror.limits import CONSOLE_CONNECTIONS_MAX
from qdsmirror.paths import Paths
from qdsmirror.tools.nbdclient import NbdClient
from tests.console.test_metrics import PROMISED
from tests.console.test_monitoring import DASHBOARD, RULES, expressions, metrics_in
from tests.console.world import samples
from tests.integration.lab import WAIT_SECONDS, LabFixture, in_thread

BLOCK = 4096
#: What a group needs for a throttle to be counted.
THROTTLE = """
[throttles]
  [[busy]]
  from = --
  to = --
  test = netkbps > 1000000
  actions = "syslog busy"
"""


class ConsoleCase(TestCase):
    timeout = 1200

    def begin(self, *options: str, start: bool = True) -> LabFixture:
        lab = LabFixture(self, "--size", "16M", "--writelog", "8M", "--console", *options)
        lab.create()
        if start:
            for site in (lab.primary, lab.secondary):
                with (site / "etc" / "dsgrp000.cfg").open("a") as file:
                    file.write(THROTTLE)
            lab.start()
        return lab

    def place(self, root: Path) -> tuple[str, int]:
        listen = load_host(Paths.of(root)).console
        return listen.host, listen.port

    def token(self, root: Path) -> str:
        return (root / "etc" / "metrics.token").read_text().strip()

    def get(
        self, root: Path, token: str | None = None, context: ssl.SSLContext | None = None
    ) -> tuple[int, bytes]:
        """Ask a site's console for its metrics; by TLS where there is a context."""
        host, port = self.place(root)
        connection: http.client.HTTPConnection
        if context is None:
            connection = http.client.HTTPConnection(host, port, timeout=WAIT_SECONDS)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=WAIT_SECONDS, context=context
            )
        try:
            shown = self.token(root) if token is None else token
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {shown}"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def scrape(self, root: Path) -> dict[str, float]:
        status, content = self.get(root)
        self.assertEqual(status, 200, content)
        return samples(content)

    def whole(self, lab: LabFixture, root: Path) -> bytes:
        """Scrape until every daemon's answer is there: one may come too late for a scrape."""

        def told() -> bytes | None:
            status, content = self.get(root)
            self.assertEqual(status, 200, content)
            ups = [v for name, v in samples(content).items() if name.startswith("qds_daemon_up{")]
            return content if ups and all(ups) else None

        content: bytes = lab.until(told, f"the daemons of {root.name} to answer")
        return content

    def write(self, lab: LabFixture, count: int) -> None:
        """Write so many blocks; every one is answered."""
        client = NbdClient.connect(lab.info()["ldsus"][0]["nbd_uri"])
        try:
            for number in range(count):
                client.write(number * BLOCK, os.urandom(BLOCK))
            client.flush()
        finally:
            client.close()


class MetricsTests(ConsoleCase):
    @in_thread
    def test_what_real_daemons_tell(self) -> None:
        lab = self.begin()
        before = time.time()
        self.write(lab, 100)
        lab.wait("drained")
        own = 'group="dsgrp000",role="primary"'
        ldsu = 'group="dsgrp000",ldsu="qds0",role="primary"'

        def told() -> dict[str, float] | None:
            found = samples(self.whole(lab, lab.primary))
            sent = found[f'qds_sent_bytes_total{{group="dsgrp000",kind="data",{ldsu[17:]}}}']
            return found if sent == 100 * BLOCK else None

        found = lab.until(told, "the console to see what was sent")
        self.assertEqual(found[f"qds_write_latency_seconds_count{{{ldsu}}}"], 100)
        self.assertGreater(found[f"qds_write_latency_seconds_sum{{{ldsu}}}"], 0)
        self.assertEqual(found[f"qds_coherent{{{own}}}"], 1)
        self.assertGreater(found[f"qds_last_commit_timestamp_seconds{{{own}}}"], before - 1)
        self.assertGreater(found[f"qds_wire_bytes_total{{{own}}}"], 100 * BLOCK)
        year = 365 * 86400
        self.assertGreater(
            found['qds_cert_expiry_timestamp_seconds{certificate="host"}'], before + year
        )
        self.assertEqual(found[f'qds_throttle_fired_total{{{own},throttle="busy"}}'], 0)
        far = samples(self.whole(lab, lab.secondary))
        self.assertEqual(far['qds_coherent{group="dsgrp000",role="secondary"}'], 1)
        self.assertEqual(far['qds_daemon_up{daemon="rmd",group="dsgrp000",role="secondary"}'], 1)
        self._all_there({name.partition("{")[0] for name in (*found, *far)})

    def _all_there(self, names: set[str]) -> None:
        """Check that what was promised, and what dashboard and rules use, is really told."""
        self.assertEqual(PROMISED - metrics_in(" ".join(names)), set())
        dashboard = " ".join(expressions(json.loads(DASHBOARD.read_text())))
        used = metrics_in(dashboard) | metrics_in(
            " ".join(line for line in RULES.read_text().splitlines() if "expr:" in line)
        )
        self.assertEqual(used - metrics_in(" ".join(names)), set())

    @in_thread
    def test_promtool_takes_a_real_scrape(self) -> None:
        if shutil.which("promtool") is None:
            raise SkipTest("promtool is missing")
        lab = self.begin("--groups", "2", "--crossed", "--ldsus", "2")
        scrapes = {}
        for root in (lab.primary, lab.secondary):
            scrapes[root.name] = self.whole(lab, root)
            done = subprocess.run(
                ["promtool", "check", "metrics"],
                input=scrapes[root.name],
                capture_output=True,
                timeout=WAIT_SECONDS,
            )
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
        self._dashboard_shows(scrapes)

    def _dashboard_shows(self, scrapes: dict[str, bytes]) -> None:
        """Evaluate every expression of the dashboard on what was scraped: each gives something."""
        series = []
        for site, content in scrapes.items():
            for name, value in samples(content).items():
                plain = name if "{" in name else f"{name}{{}}"
                labels = plain.replace("{", f'{{instance="{site}",', 1).replace(",}", "}")
                grows = 1 if re.search(r"_(total|bucket|sum|count)[{]", labels) else 0
                values = f"{min(value, 1e18):f}+{grows}x20"
                series.append({"series": labels, "values": values})
        tests = []
        for text in expressions(json.loads(DASHBOARD.read_text())):
            if text.startswith(("label_values(", "ALERTS")):
                # Names for a menu; and what there is of while an alert fires only.
                continue
            shown = text.replace("$__rate_interval", "5m")
            shown = shown.replace("$instance", ".*").replace("$group", ".*")
            # All is well here: what counts what is not must still find it.
            shown = re.sub(
                r" (== [01]|< [+]Inf)", " > bool -1", shown.removesuffix(" or vector(0)")
            )
            tests.append(
                {
                    "expr": f"count({shown}) > bool 0",
                    "eval_time": "15m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            )
        self.assertGreater(len(tests), 30)
        one = {"interval": "1m", "input_series": series, "promql_expr_test": tests}
        path = Path(self.mktemp())
        # JSON is YAML.
        path.write_text(json.dumps({"rule_files": [], "evaluation_interval": "1m", "tests": [one]}))
        done = subprocess.run(
            ["promtool", "test", "rules", str(path)],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @in_thread
    def test_daemons_that_hang_or_are_gone(self) -> None:
        lab = self.begin()
        up = 'qds_daemon_up{{daemon="{}",group="dsgrp000",role="primary"}}'
        stopped = lab.kill("dsgrp000.pmd", signal.SIGSTOP)

        def told() -> dict[str, float] | None:
            found = self.scrape(lab.primary)
            seen = (found[up.format("pmd")], found[up.format("driver")])
            return found if seen == (0, 1) else None

        try:
            found = lab.until(told, "the console to tell what hangs, and what does not")
        finally:
            os.kill(stopped, signal.SIGCONT)
        self.assertIn('qds_coherent{group="dsgrp000",role="primary"}', found)
        lab.until(lambda: self.scrape(lab.primary)[up.format("pmd")], "the pmd's answer")
        lab.tool("killpmds", "--root", str(lab.primary))
        lab.tool("killdriver", "--root", str(lab.primary))
        found = lab.until(
            lambda: (seen := self.scrape(lab.primary))[up.format("driver")] == 0 and seen,
            "the console to see that the driver is gone",
        )
        self.assertNotIn('qds_coherent{group="dsgrp000",role="primary"}', found)
        self.assertEqual(found['qds_group_state{group="dsgrp000",role="primary",state="setup"}'], 1)


class IndependenceTests(ConsoleCase):
    """A slow or dead scraper, or console, never delays the data."""

    @in_thread
    def test_slow_scrapers_and_a_console_that_stands_still(self) -> None:
        lab = self.begin()
        place = self.place(lab.primary)
        request = (
            "GET /metrics HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {self.token(lab.primary)}\r\n\r\n"
        ).encode()
        idle = []
        try:
            for _ in range(CONSOLE_CONNECTIONS_MAX + 20):
                one = socket.create_connection(place, timeout=30)
                idle.append(one)
                # They ask on and on, and take nothing; those that are too many are hung up on.
                try:
                    one.sendall(request * 50)
                except OSError:
                    pass
            self.write(lab, 200)
            lab.wait("drained")
            pid = int((lab.primary / "run" / "qdsconsole.pid").read_text())
            os.kill(pid, signal.SIGSTOP)
            try:
                self.write(lab, 200)
                lab.wait("drained")
                self.assertTrue(lab.info()["coherent"])
            finally:
                os.kill(pid, signal.SIGCONT)
        finally:
            for one in idle:
                one.close()
        # What it saw before it was stopped it tells for a second more.
        lab.until(lambda: self._written(lab) == 400, "the console to answer again")
        os.kill(pid, signal.SIGKILL)
        self.write(lab, 50)
        lab.wait("drained")
        # The launch takes over what the killed one left.
        lab.tool("launchconsole", "--root", str(lab.primary))
        self.scrape(lab.primary)

    def _written(self, lab: LabFixture) -> float | None:
        """Give how many writes the console tells of, if it tells."""
        name = 'qds_write_latency_seconds_count{group="dsgrp000",ldsu="qds0",role="primary"}'
        try:
            return self.scrape(lab.primary).get(name)
        except OSError:
            return None


class RefusalTests(ConsoleCase):
    @in_thread
    def test_tokens(self) -> None:
        lab = self.begin(start=False)
        root = str(lab.primary)
        lab.tool("launchconsole", "--root", root)
        self.assertEqual(self.get(lab.primary)[0], 200)
        self.assertEqual(self.get(lab.primary, "x" * 64)[0], 401)
        # Nothing runs here but the console, and it says so.
        self.assertEqual(
            self.scrape(lab.primary)[
                'qds_daemon_up{daemon="driver",group="dsgrp000",role="primary"}'
            ],
            0,
        )
        token = lab.primary / "etc" / "metrics.token"
        old = self.token(lab.primary)
        token.write_text("n" * 40 + "\n")
        self.assertEqual(self.get(lab.primary, old)[0], 401)
        self.assertEqual(self.get(lab.primary)[0], 200)
        token.chmod(0o644)
        self.assertEqual(self.get(lab.primary)[0], 503)
        lab.tool("killconsole", "--root", root)
        for break_it in (lambda: None, token.unlink):
            break_it()
            for command in ("launchconsole", "qdsconsole"):
                said = lab.tool(command, "--json", "--root", root, codes=(EXIT_CONFIG,))
                self.assertIn("metrics.token", json.loads(said)["error"]["message"])
        self.assertFalse((lab.primary / "run" / "qdsconsole.pid").exists())

    @in_thread
    def test_elsewhere_than_on_the_loopback_address_by_tls_only(self) -> None:
        lab = self.begin(start=False)
        config = lab.primary / "etc" / "qds.cfg"
        config.write_text(config.read_text().replace("127.0.0.1:", "0.0.0.0:"))
        said = lab.tool("launchconsole", "--root", str(lab.primary))
        self.assertIn("https://0.0.0.0:", said)
        context = ssl.create_default_context(cafile=str(lab.primary / "etc" / "ca.pem"))
        # The certificate is for the host's name, by which the server would be reached.
        context.check_hostname = False
        self.assertEqual(self.get(lab.primary, context=context)[0], 200)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        self.assertRaises(ssl.SSLError, self.get, lab.primary, None, context)
        with self.assertRaises((OSError, http.client.HTTPException)):
            self.get(lab.primary)

    @in_thread
    def test_a_unix_socket(self) -> None:
        lab = self.begin(start=False)
        config = lab.primary / "etc" / "qds.cfg"
        place = lab.primary / "run" / "metrics.sock"
        config.write_text(f"name = primary\nconsole = unix:{place}\n")
        lab.tool("launchconsole", "--root", str(lab.primary))
        self.assertEqual(place.stat().st_mode & 0o777, 0o660)
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(place))
            one.sendall(
                b"GET /metrics HTTP/1.0\r\nAuthorization: Bearer "
                + self.token(lab.primary).encode()
                + b"\r\n\r\n"
            )
            self.assertIn(b" 200 ", one.recv(100))
        lab.tool("killconsole", "--root", str(lab.primary))
        self.assertFalse(place.exists())
        # What is no socket is not taken for one.
        place.write_text("precious")
        lab.tool("launchconsole", "--root", str(lab.primary), codes=(1,))
        self.assertEqual(place.read_text(), "precious")
