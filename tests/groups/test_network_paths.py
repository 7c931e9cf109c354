"""Several paths and compression between two sites: real TLS and files, links that are cut."""

from __future__ import annotations

import random
from typing import Any

from twisted.internet.defer import inlineCallbacks
from twisted.internet.endpoints import connectProtocol
from twisted.internet.protocol import ClientFactory, Protocol
from twisted.trial.unittest import TestCase

from qdsmirror.errors import ProtocolError
from qdsmirror.groups.runtime import tls_endpoint
from qdsmirror.net.handshake import PrimaryHandshake, PrimaryOffer
from tests.groups.site import MIB, Sites, Steps, reactor


class PathTests(TestCase):
    timeout = 300

    @inlineCallbacks
    def start(self, **how: Any) -> Steps:
        self.sites = sites = Sites(self, **{"paths": 2, "size": 4 * MIB, **how})
        yield sites.start()
        yield sites.refresh()
        yield self.all_up()
        return sites

    def wire(self) -> dict[str, Any]:
        assert self.sites.pmd is not None
        return self.sites.pmd.status()["wire"]

    def states(self) -> list[str]:
        return [path["state"] for path in self.wire()["paths"]]

    def all_up(self) -> Any:
        return self.sites.until(lambda: set(self.states()) == {"connected"}, "all paths")

    def write(self, count: int, length: int = 64 * 1024) -> None:
        for _ in range(count):
            offset = random.randrange(0, self.sites.size - length + 1) // 512 * 512
            self.sites.write(random.randrange(2), offset, random.randbytes(length))

    def sent(self) -> list[int]:
        return [path["sent_bytes"] for path in self.wire()["paths"]]

    @inlineCallbacks
    def test_frames_go_over_all_of_them(self) -> Steps:
        sites = yield self.start(paths=3, ldsus=2)
        before = self.sent()
        for _ in range(20):
            self.write(10)
            yield sites.drained()
        for was, now in zip(before, self.sent(), strict=True):
            self.assertGreater(now - was, MIB)
        sites.assert_equal()
        paths = sites.rmd.status()["wire"]["paths"]
        self.assertEqual([path["state"] for path in paths], ["connected"] * 3)

    @inlineCallbacks
    def test_one_may_fail_and_return_and_the_session_goes_on(self) -> Steps:
        sites = yield self.start()
        session = sites.rmd._link
        for cable in (*sites.cables, sites.cables[0]):
            self.write(20)
            cable.pull()
            self.write(20)
            yield sites.drained()
            self.assertEqual(sorted(self.states()), ["connected", "connecting"])
            self.assertTrue(any(path["reason"] for path in self.wire()["paths"]))
            cable.pulled = False
            yield self.all_up()
            self.assertIs(sites.rmd._link, session)
            self.assertIn("connected", sites.modes())
        sites.assert_equal()

    @inlineCallbacks
    def test_cut_at_any_byte_loses_and_doubles_nothing(self) -> Steps:
        sites = yield self.start()
        session = sites.rmd._link
        for _ in range(12):
            cable = random.choice(sites.cables)
            cable.budget = random.randrange(1, 300_000)
            made = cable.made
            while cable.made == made:
                self.write(3, 16 * 1024)
                yield sites.drained()
            yield self.all_up()
        self.assertIs(sites.rmd._link, session)
        sites.assert_equal()

    @inlineCallbacks
    def test_all_of_them_lost_is_a_lost_link(self) -> Steps:
        sites = yield self.start()
        session = sites.rmd._link
        for cable in sites.cables:
            cable.pull()
        self.write(20)
        yield sites.until(lambda: "accumulating" in sites.modes(), "the loss")
        self.assertIsNone(self.wire()["compression"])
        sites.cables[1].pulled = False
        yield sites.drained()
        self.assertIsNot(sites.rmd._link, session)
        self.assertEqual(self.states()[1], "connected")
        sites.cables[0].pulled = False
        yield self.all_up()
        sites.assert_equal()

    @inlineCallbacks
    def test_session_begins_over_a_path_that_answers(self) -> Steps:
        sites = self.sites = Sites(self, paths=3)
        for cable in sites.cables[:2]:
            yield cable.port.stopListening()
        yield sites.start()
        yield sites.refresh()
        yield sites.until(lambda: self.states() == ["connecting"] * 2 + ["connected"], "a path")
        self.write(5)
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_pmd_and_rmd_come_and_go(self) -> Steps:
        sites = yield self.start()
        for stop, start in ((sites.stop_pmd, sites.start_pmd), (sites.stop_rmd, sites.start_rmd)):
            self.write(10)
            yield stop()
            self.write(10)
            yield start()
            yield sites.drained()
            yield self.all_up()
        sites.assert_equal()

    @inlineCallbacks
    def test_a_path_for_another_session_is_refused_and_harms_nothing(self) -> Steps:
        sites = yield self.start()
        session = sites.rmd._link
        offer = PrimaryOffer(
            group=0,
            digest=sites.config.identity_digest(),
            secret=sites.rmd.secret,
            units=[],
            decide=lambda _: None,  # type: ignore[arg-type,return-value]
            session=b"x" * 16,
            stream_factory=ClientFactory.forProtocol(Protocol),
            joins=True,
        )
        handshake = PrimaryHandshake(offer, reactor)
        endpoint = tls_endpoint(reactor, sites.pmd.host, sites.config, sites.config.ways[0])
        yield connectProtocol(endpoint, handshake)  # type: ignore[no-untyped-call]
        yield self.assertFailure(handshake.done, ProtocolError)
        self.write(10)
        yield sites.drained()
        self.assertIs(sites.rmd._link, session)
        sites.assert_equal()


class CompressionTests(PathTests):
    """The same, compressed, and what compression does."""

    @inlineCallbacks
    def start(self, **how: Any) -> Steps:
        sites = yield super().start(tunables="compression = zstd:1", **how)
        return sites

    @inlineCallbacks
    def test_less_is_sent_of_what_shrinks(self) -> Steps:
        for paths, name in ((1, "lz4"), (2, "zstd:3")):
            sites = self.sites = Sites(self, paths=paths, tunables=f"compression = {name}")
            yield sites.start()
            yield sites.refresh()
            before = self.wire()
            for number in range(16):
                sites.write(0, number * 65536, (b"%06d as it was" % number) * 4096)
            yield sites.drained()
            wire = self.wire()
            self.assertEqual((wire["compression"], wire["wanted"]), (name, name))
            frames = wire["frame_bytes"] - before["frame_bytes"]
            self.assertGreater(frames, MIB)
            self.assertLess(wire["wire_bytes"] - before["wire_bytes"], 0.05 * frames)
            told = sites.rmd.status()["wire"]
            self.assertEqual(told["frame_bytes"], wire["frame_bytes"])
            self.assertEqual(told["wire_bytes"], wire["wire_bytes"])
            sites.assert_equal()

    @inlineCallbacks
    def test_a_secondary_that_does_not_know_it(self) -> Steps:
        from qdsmirror.net import handshake_remote

        self.patch(handshake_remote, "known", lambda _name: "none")
        sites = yield self.start(paths=1)
        self.write(10)
        yield sites.drained()
        wire = self.wire()
        self.assertEqual((wire["compression"], wire["wanted"]), ("none", "zstd:1"))
        sites.assert_equal()
