from __future__ import annotations

import dataclasses
import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.authentication import Role, Transcript

SECRET = bytes(range(32))
ONE = Transcript(3, 1, b"d" * 32, b"p" * 32, b"s" * 32, b"e" * 32)


class ProofTests(SynchronousTestCase):
    def test_good(self) -> None:
        for role in Role:
            self.assertTrue(ONE.verify(SECRET, role, ONE.proof(SECRET, role)))

    def test_known_answer(self) -> None:
        """Written out once more, so that a change of the construction is noticed."""
        fields = [
            b"qdsmirror proof of the group's secret, 1",
            b"primary",
            b"\0\0\0\x03",
            b"\0\0\0\x01",
            b"d" * 32,
            b"p" * 32,
            b"s" * 32,
            b"e" * 32,
        ]
        text = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        expected = hmac.new(SECRET, text, hashlib.sha256).digest()
        self.assertEqual(ONE.proof(SECRET, Role.PRIMARY), expected)

    def assert_worthless(self, other: Transcript) -> None:
        for role in Role:
            self.assertFalse(other.verify(SECRET, role, ONE.proof(SECRET, role)))

    def test_relay_over_another_connection(self) -> None:
        self.assert_worthless(dataclasses.replace(ONE, exporter=b"x" * 32))

    def test_replay(self) -> None:
        self.assert_worthless(dataclasses.replace(ONE, secondary_nonce=b"n" * 32))
        self.assert_worthless(dataclasses.replace(ONE, primary_nonce=b"n" * 32))

    def test_reflection(self) -> None:
        proof = ONE.proof(SECRET, Role.PRIMARY)
        self.assertFalse(ONE.verify(SECRET, Role.SECONDARY, proof))

    def test_role_swap(self) -> None:
        swapped = dataclasses.replace(
            ONE, primary_nonce=ONE.secondary_nonce, secondary_nonce=ONE.primary_nonce
        )
        self.assert_worthless(swapped)
        proof = ONE.proof(SECRET, Role.PRIMARY)
        self.assertFalse(swapped.verify(SECRET, Role.SECONDARY, proof))

    def test_another_group_version_or_configuration(self) -> None:
        self.assert_worthless(dataclasses.replace(ONE, group=4))
        self.assert_worthless(dataclasses.replace(ONE, version=2))
        self.assert_worthless(dataclasses.replace(ONE, digest=b"x" * 32))

    def test_another_secret(self) -> None:
        proof = ONE.proof(bytes(32), Role.PRIMARY)
        self.assertFalse(ONE.verify(SECRET, Role.PRIMARY, proof))

    def test_cut_or_empty_proofs(self) -> None:
        proof = ONE.proof(SECRET, Role.PRIMARY)
        for bad in (b"", proof[:-1], proof + b"\0"):
            self.assertFalse(ONE.verify(SECRET, Role.PRIMARY, bad))

    @given(st.binary(min_size=32, max_size=32))
    def test_no_other_proof(self, proof: bytes) -> None:
        good = proof == ONE.proof(SECRET, Role.PRIMARY)
        self.assertEqual(ONE.verify(SECRET, Role.PRIMARY, proof), good)

    @given(st.binary(max_size=40), st.binary(max_size=40))
    def test_field_borders_count(self, one: bytes, other: bytes) -> None:
        proofs = [
            dataclasses.replace(ONE, digest=digest).proof(SECRET, Role.PRIMARY)
            for digest in (one, other)
        ]
        self.assertEqual(proofs[0] == proofs[1], one == other)

    def test_wrong_lengths(self) -> None:
        for field in ("primary_nonce", "secondary_nonce", "exporter"):
            for value in (b"", b"x" * 31, b"x" * 33):
                self.assertRaises(ValueError, dataclasses.replace, ONE, **{field: value})
        self.assertRaises(ValueError, ONE.proof, b"short", Role.PRIMARY)

    def test_equal_nonces(self) -> None:
        self.assertRaises(ValueError, dataclasses.replace, ONE, secondary_nonce=ONE.primary_nonce)
