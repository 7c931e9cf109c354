"""Questions about the mirror devices, and their answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import questions
from qdsmirror.core.questions import (
    HASHES,
    READ,
    STANDING,
    Answer,
    Question,
    Standing,
    pack_question,
    pack_standing,
    parse_question,
    parse_standing,
)
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import KIB, MIB, QUESTION_DIGESTS_BYTES_MAX, QUESTION_READ_BYTES_MAX

INDEX = st.integers(0, (1 << 32) - 1)
OFFSET = st.integers(0, 1 << 62)


class QuestionTests(SynchronousTestCase):
    @given(
        st.one_of(
            st.builds(
                Question,
                INDEX,
                st.just(HASHES),
                INDEX,
                OFFSET,
                st.integers(1, 4 * MIB),
                st.integers(4 * KIB, MIB),
            ),
            st.builds(
                Question, INDEX, st.just(READ), INDEX, OFFSET, st.integers(1, MIB), st.just(0)
            ),
        )
    )
    def test_round_trip(self, question: Question) -> None:
        self.assertEqual(questions.parse_question(questions.pack_question(question)), question)

    def test_how_long_the_answer_is(self) -> None:
        self.assertEqual(Question(1, HASHES, 0, 0, 64 * KIB, 64 * KIB).answer_bytes, 32)
        self.assertEqual(Question(1, HASHES, 0, 0, 64 * KIB + 1, 64 * KIB).answer_bytes, 64)
        self.assertEqual(Question(1, READ, 0, 0, 512).answer_bytes, 512)

    def test_what_cannot_be_asked(self) -> None:
        most = QUESTION_DIGESTS_BYTES_MAX // 32 * 4 * KIB
        for wrong in (
            Question(1, 3, 0, 0, 512),
            Question(1, 9, 0, 0, 512),
            Question(1, HASHES, 0, 0, 512, 0),
            Question(1, HASHES, 0, 0, 512, 4 * KIB - 1),
            Question(1, HASHES, 0, 0, most + 1, 4 * KIB),
            Question(1, READ, 0, 0, 0),
            Question(1, READ, 0, 0, QUESTION_READ_BYTES_MAX + 1),
            Question(1, READ, 0, (1 << 63) - 512, 512),
        ):
            with self.assertRaises(ProtocolError):
                questions.parse_question(questions.pack_question(wrong))
        for length in (0, 24, 26):
            with self.assertRaises(ProtocolError):
                questions.parse_question(bytes(length))


class AnswerTests(SynchronousTestCase):
    @given(st.one_of(
        st.builds(Answer, INDEX, st.binary(max_size=99), st.just("")),
        st.builds(Answer, INDEX, st.just(b""), st.text(min_size=1, max_size=99)),
    ))  # fmt: skip
    def test_round_trip(self, answer: Answer) -> None:
        self.assertEqual(questions.parse_answer(questions.pack_answer(answer)), answer)

    def test_too_short(self) -> None:
        with self.assertRaises(ProtocolError):
            questions.parse_answer(bytes(4))


class StandingTests(SynchronousTestCase):
    def test_there_and_back(self) -> None:
        for standing in (
            Standing(True, False, b"g" * 16, 7, 3, b"c" * 16),
            Standing(False, True, b"", 1, 1, bytes(16)),
        ):
            body = pack_standing(standing)
            self.assertEqual(len(body), Question(1, STANDING, 0, 0, 0).answer_bytes)
            self.assertEqual(parse_standing(body), standing)

    def test_it_is_of_a_whole_ldsu(self) -> None:
        asked = Question(1, STANDING, 2, 0, 0)
        self.assertEqual(parse_question(pack_question(asked)), asked)
        for offset, length in ((512, 0), (0, 512)):
            with self.assertRaises(ProtocolError):
                parse_question(pack_question(Question(1, STANDING, 2, offset, length)))
