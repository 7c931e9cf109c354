"""Addresses as people write them."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.net.addresses import plain_address


class PlainAddressTests(SynchronousTestCase):
    def test_mapped(self) -> None:
        for text in ("::ffff:192.0.2.1", "::FFFF:c000:201"):
            self.assertEqual(plain_address(text), "192.0.2.1")

    def test_everything_else_stays(self) -> None:
        for text in ("192.0.2.1", "2001:db8::1", "fe80::1%eth0", "::1", "host.example", "", "None"):
            self.assertEqual(plain_address(text), text)
