"""The NBD codec: negotiation, requests, replies, and what arbitrary bytes do to them."""

from __future__ import annotations

import errno
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core import nbd, nbd_options
from qdsmirror.core.nbd import Request
from qdsmirror.core.nbd_options import ExportInfo, Negotiation
from qdsmirror.core.nbd_requests import Budget, RequestParser
from qdsmirror.errors import LimitError, ProtocolError

SIZE = 1 << 20
INFO = ExportInfo("qds0", SIZE, 512, 4096)
HUGE = ExportInfo("huge", (1 << 63) - 512, 512, 4096)
COOKIE = b"cookie42"


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def go_data(name: bytes, *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def queries(name: bytes, *asked: bytes) -> bytes:
    return string(name) + struct.pack(">I", len(asked)) + b"".join(map(string, asked))


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Take option replies apart: (option, type, data)."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        found.append((number, kind, data[20 : 20 + length]))
        assert len(data) >= 20 + length
        data = data[20 + length :]
    return found


def negotiation(flags: int = 3) -> Negotiation:
    exports = {"qds0": INFO, "huge": HUGE, "n" * 4096: INFO, "m" * 256: INFO}
    made = Negotiation(lambda: ["qds0", "qds1"], exports.get)
    assert made.greeting() == b"NBDMAGICIHAVEOPT\0\3"
    assert made.receive(struct.pack(">I", flags)) == b""
    return made


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
    magic: int = nbd.REQUEST_MAGIC,
) -> bytes:
    return struct.pack(">IHH8sQI", magic, flags, command, COOKIE, offset, length) + payload


class Taker:
    def __init__(self) -> None:
        self.freed = 0

    def budget_freed(self) -> None:
        self.freed += 1

    def evict_if_stalled(self) -> None:
        raise AssertionError("not looked at here")


def parser(
    info: ExportInfo = INFO,
    budget: Budget | None = None,
    structured: bool = True,
    block_status: bool = True,
) -> RequestParser:
    connection: Any = object()
    return RequestParser(connection, info, Taker(), budget or Budget(), structured, block_status)


def parse(data: bytes, **how: Any) -> RequestParser:
    made = parser(**how)
    made.feed(data)
    made.parsed = made.parse(128)  # type: ignore[attr-defined]
    return made


class NegotiationTests(SynchronousTestCase):
    def test_go(self) -> None:
        talk = negotiation()
        infos = replies(talk.receive(option(7, go_data(b"qds0", 3, 1))))
        flags = 1 | 4 | 8 | 32 | 64 | 256
        self.assertEqual(
            infos,
            [
                (7, 3, struct.pack(">HQH", 0, SIZE, flags)),
                (7, 3, struct.pack(">HIII", 3, 512, 4096, 32 << 20)),
                (7, 3, b"\0\1qds0"),
                (7, 1, b""),
            ],
        )
        self.assertTrue(talk.finished)
        self.assertIs(talk.export, INFO)
        self.assertFalse(talk.structured or talk.block_status)

    def test_info_does_not_choose(self) -> None:
        talk = negotiation()
        self.assertEqual(replies(talk.receive(option(6, go_data(b"qds0"))))[-1], (6, 1, b""))
        self.assertFalse(talk.finished)

    def test_df_only_with_structured_replies(self) -> None:
        self.assertFalse(INFO.transmission_flags(False) & nbd.FLAG_SEND_DF)
        self.assertTrue(INFO.transmission_flags(True) & nbd.FLAG_SEND_DF)

    def test_multi_conn_is_the_servers_choice(self) -> None:
        alone = ExportInfo("x", 0, 1, 1, multi_conn=False)
        self.assertFalse(alone.transmission_flags(True) & nbd.FLAG_CAN_MULTI_CONN)

    def test_export_name(self) -> None:
        for flags, zeroes in ((3, 0), (1, 124)):
            talk = negotiation(flags)
            reply = talk.receive(option(1, b"qds0") + b"rest")
            self.assertEqual(len(reply), 10 + zeroes)
            self.assertEqual(struct.unpack_from(">Q", reply), (SIZE,))
            self.assertTrue(talk.finished)
            self.assertEqual(talk.rest, b"rest")

    def test_export_name_unknown_closes(self) -> None:
        for name in (b"", b"qds9", b"\xff", b"n" * 4097):
            self.assertRaises(ProtocolError, negotiation().receive, option(1, name))

    def test_unknown_name_is_an_error_and_negotiation_goes_on(self) -> None:
        talk = negotiation()
        for name in (b"", b"qds9", b"\xff\xfe", b"\x1b[2J"):
            ((number, kind, text),) = replies(talk.receive(option(7, go_data(name))))
            self.assertEqual((number, kind), (7, nbd_options.REP_ERR_UNKNOWN))
            self.assertNotIn(b"\x1b", text)
        self.assertEqual(len(replies(talk.receive(option(3)))), 3)

    def test_list(self) -> None:
        self.assertEqual(
            replies(negotiation().receive(option(3))),
            [(3, 2, string(b"qds0")), (3, 2, string(b"qds1")), (3, 1, b"")],
        )

    def test_abort(self) -> None:
        talk = negotiation()
        self.assertEqual(replies(talk.receive(option(2) + option(3))), [(2, 1, b"")])
        self.assertTrue(talk.aborted)

    def test_unsupported(self) -> None:
        talk = negotiation()
        for number in (4, nbd_options.OPT_STARTTLS, 11, 0xFFFFFFFF):
            self.assertEqual(
                replies(talk.receive(option(number, b"data")))[0][1], nbd_options.REP_ERR_UNSUP
            )

    def test_malformed_data(self) -> None:
        talk = negotiation()
        invalid = [
            option(3, b"x"),
            option(6),
            option(7, go_data(b"qds0") + b"x"),
            option(7, string(b"qds0") + b"\0\2\0\0"),
            option(7, struct.pack(">I", 5) + b"qds0\0\0"[:4]),
            option(8, b"x"),
            option(9, queries(b"qds0")),
            option(10, queries(b"qds0", b"base:allocation")),
        ]
        for data in invalid:
            self.assertEqual(replies(talk.receive(data))[0][1], nbd_options.REP_ERR_INVALID)
        self.assertFalse(talk.finished)

    def test_structured_once(self) -> None:
        talk = negotiation()
        self.assertEqual(replies(talk.receive(option(8))), [(8, 1, b"")])
        self.assertEqual(replies(talk.receive(option(8)))[0][1], nbd_options.REP_ERR_INVALID)
        self.assertTrue(talk.structured)

    def test_meta_context(self) -> None:
        talk = negotiation()
        talk.receive(option(8))
        context = b"base:allocation"
        for asked in ([], [b"base:"], [b"x:y", context]):
            self.assertEqual(
                replies(talk.receive(option(9, queries(b"qds0", *asked)))),
                [(9, 4, bytes(4) + context), (9, 1, b"")],
            )
        self.assertEqual(
            replies(talk.receive(option(10, queries(b"qds0", b"qemu:x", context)))),
            [(10, 4, b"\0\0\0\1" + context), (10, 1, b"")],
        )
        talk.receive(option(7, go_data(b"qds0")))
        self.assertTrue(talk.block_status)

    def test_meta_context_of_another_export_is_void(self) -> None:
        talk = negotiation()
        talk.receive(option(8) + option(10, queries(b"huge", b"base:allocation")))
        talk.receive(option(7, go_data(b"qds0")))
        self.assertFalse(talk.block_status)

    def test_meta_context_set_again_replaces(self) -> None:
        talk = negotiation()
        talk.receive(option(8) + option(10, queries(b"qds0", b"base:allocation")))
        self.assertEqual(replies(talk.receive(option(10, queries(b"qds0")))), [(10, 1, b"")])
        talk.receive(option(7, go_data(b"qds0")))
        self.assertFalse(talk.block_status)

    def test_byte_by_byte(self) -> None:
        talk = negotiation()
        out = b""
        for byte in option(8) + option(7, go_data(b"qds0")):
            out += talk.receive(bytes([byte]))
        self.assertEqual([kind for _, kind, _ in replies(out)], [1, 3, 3, 1])

    def test_client_flags(self) -> None:
        talk = Negotiation(list, lambda name: None)
        self.assertRaises(ProtocolError, talk.receive, b"\0\0\0\4")

    def test_option_magic(self) -> None:
        self.assertRaises(ProtocolError, negotiation().receive, b"IHAVEOPX" + bytes(8))

    def test_size_with_the_top_bit_set(self) -> None:
        self.assertRaises(ValueError, ExportInfo, "x", 1 << 63, 512, 4096)
        self.assertRaises(ValueError, ExportInfo, "x", -1, 512, 4096)
        self.assertRaises(ValueError, ExportInfo, "x", 512, 500, 4096)

    # -- what other servers were broken by ------------------------------------------------------

    def test_option_length_is_capped_before_it_is_buffered(self) -> None:
        for length in (0xFFFFFFFF, 0x80000000, limits.NBD_OPTION_BYTES_MAX + 1):
            talk = negotiation()
            header = b"IHAVEOPT" + struct.pack(">II", 7, length)
            self.assertRaises(LimitError, talk.receive, header)

    def test_name_length_that_overflows(self) -> None:
        for number in (6, 7):
            talk = negotiation()
            data = struct.pack(">I", 0xFFFFFFFF) + b"qds0\0\0"
            kind = replies(talk.receive(option(number, data)))[0][1]
            self.assertEqual(kind, nbd_options.REP_ERR_TOO_BIG)

    def test_names_around_255_and_4096_bytes(self) -> None:
        for length in (255, 256, 257, 4095, 4096, 4097):
            known = {256: b"m", 4096: b"n"}.get(length)
            name = (known or b"z") * length
            expected = nbd_options.REP_INFO if known else nbd_options.REP_ERR_UNKNOWN
            if length == 4097:
                expected = nbd_options.REP_ERR_TOO_BIG
            talk = negotiation()
            talk.receive(option(8))
            self.assertEqual(replies(talk.receive(option(6, go_data(name))))[0][1], expected)
            first = replies(talk.receive(option(10, queries(name, b"base:allocation"))))[0][1]
            if known:
                self.assertEqual(first, nbd_options.REP_META_CONTEXT)
            else:
                self.assertEqual(first, expected)
            long_query = replies(talk.receive(option(9, queries(b"qds0", b"q" * length))))[0][1]
            self.assertEqual(
                long_query, nbd_options.REP_ERR_TOO_BIG if length == 4097 else nbd_options.REP_ACK
            )

    def test_query_count_that_overflows(self) -> None:
        talk = negotiation()
        talk.receive(option(8))
        data = string(b"qds0") + b"\xff\xff\xff\xff"
        self.assertEqual(replies(talk.receive(option(10, data)))[0][1], nbd_options.REP_ERR_INVALID)

    def test_options_without_end(self) -> None:
        talk = negotiation()
        for _ in range(limits.NBD_OPTIONS_MAX):
            talk.receive(option(3))
        self.assertRaises(LimitError, talk.receive, option(3))

    @given(st.lists(st.binary(max_size=200), max_size=20))
    def test_arbitrary_bytes(self, pieces: list[bytes]) -> None:
        talk = Negotiation(lambda: ["qds0"], {"qds0": INFO}.get)
        self._survives(talk, pieces)

    @given(
        st.lists(
            st.one_of(
                st.builds(option, st.integers(0, 12), st.binary(max_size=64)),
                st.builds(
                    lambda n, data: option(n, string(b"qds0") + data),
                    st.sampled_from([6, 7, 9, 10]),
                    st.binary(max_size=40),
                ),
                st.just(option(8)),
            ),
            max_size=40,
        )
    )
    def test_arbitrary_options(self, pieces: list[bytes]) -> None:
        self._survives(Negotiation(lambda: ["qds0"], {"qds0": INFO}.get), [b"\0\0\0\3", *pieces])

    def _survives(self, talk: Negotiation, pieces: list[bytes]) -> None:
        bound = 16 + limits.NBD_OPTION_BYTES_MAX
        try:
            for piece in pieces:
                talk.receive(piece)
                if talk.finished or talk.aborted:
                    return
                self.assertLessEqual(len(talk.rest), bound)
        except ProtocolError:
            pass


class RequestTests(SynchronousTestCase):
    def assert_refused(self, data: bytes, code: int, **how: Any) -> None:
        made = parse(data, **how)
        self.assertEqual(made.parsed, [])  # type: ignore[attr-defined]
        self.assertEqual([refused[1] for refused in made.refused], [code], made.refused)
        self.assertIsNone(made.failure)

    def test_every_command(self) -> None:
        data = (
            request(0, 512, 1024)
            + request(1, 0, 512, 1, b"w" * 512)
            + request(3)
            + request(4, 0, 512)
            + request(6, 512, SIZE - 512, 3)
            + request(7, 0, SIZE, 8)
            + request(0, 0, 512, 4)
        )
        made = parse(data)
        parsed = made.parsed  # type: ignore[attr-defined]
        self.assertEqual(
            [(r.command, r.flags, r.offset, r.length) for r in parsed],
            [
                (0, 0, 512, 1024),
                (1, 1, 0, 512),
                (3, 0, 0, 0),
                (4, 0, 0, 512),
                (6, 3, 512, SIZE - 512),
                (7, 8, 0, SIZE),
                (0, 4, 0, 512),
            ],
        )
        self.assertEqual(bytes(parsed[1].payload), b"w" * 512)
        self.assertEqual({r.cookie for r in parsed}, {COOKIE})
        self.assertEqual([r.payload for r in parsed if r.command != 1], [None] * 6)
        self.assertEqual(made.refused, [])
        self.assertIn("offset=512", repr(parsed[0]))

    def test_wrong_magic(self) -> None:
        made = parse(request(0, 0, 512) + request(0, 0, 512, magic=nbd.SIMPLE_REPLY_MAGIC))
        self.assertEqual(len(made.parsed), 1)  # type: ignore[attr-defined]
        self.assertIsInstance(made.failure, ProtocolError)
        self.assertEqual(made.parse(128), [])

    def test_disconnect(self) -> None:
        made = parse(request(2) + request(0, 0, 512))
        self.assertTrue(made.disconnect)
        self.assertEqual(made.parsed, [])  # type: ignore[attr-defined]

    def test_unknown_commands_and_flags(self) -> None:
        for command in (5, 8, 9, 0xFFFF):
            self.assert_refused(request(command, 0, 512), errno.EINVAL)
        for command, flags in ((0, 2), (3, 2), (4, 2), (6, 4), (6, 16), (7, 4), (0, 0x8000)):
            length = 0 if command == 3 else 512
            self.assert_refused(request(command, 0, length, flags), errno.EINVAL)
        self.assert_refused(request(1, 0, 512, 2, bytes(512)), errno.EINVAL)

    def test_what_was_not_negotiated(self) -> None:
        self.assert_refused(request(7, 0, 512), errno.EINVAL, block_status=False)
        self.assert_refused(request(0, 0, 512, 4), errno.EINVAL, structured=False)

    def test_fua_is_allowed_everywhere(self) -> None:
        for command in (0, 3, 4, 6, 7):
            made = parse(request(command, 0, 0 if command == 3 else 512, 1))
            self.assertEqual(len(made.parsed), 1)  # type: ignore[attr-defined]

    def test_flush_with_a_range(self) -> None:
        self.assert_refused(request(3, 0, 512), errno.EINVAL)
        self.assert_refused(request(3, 512, 0), errno.EINVAL)

    def test_length_zero(self) -> None:
        for command in (0, 1, 4, 6, 7):
            self.assert_refused(request(command), errno.EINVAL)

    def test_misaligned(self) -> None:
        for command in (0, 1, 4, 6, 7):
            for offset, length in ((1, 512), (0, 511)):
                payload = bytes(length) if command == 1 else b""
                self.assert_refused(request(command, offset, length, 0, payload), errno.EINVAL)

    def test_beyond_the_end(self) -> None:
        for command in (0, 1, 4, 6, 7):
            code = errno.ENOSPC if command in (1, 6) else errno.EINVAL
            payload = bytes(1024) if command == 1 else b""
            self.assert_refused(request(command, SIZE - 512, 1024, 0, payload), code)

    def test_offset_and_length_that_overflow_64_bits(self) -> None:
        for info in (INFO, HUGE):
            for offset in ((1 << 64) - 512, 1 << 63, (1 << 63) - 512):
                for command in (0, 1, 4, 6, 7):
                    code = errno.ENOSPC if command in (1, 6) else errno.EINVAL
                    payload = bytes(512) if command == 1 else b""
                    self.assert_refused(request(command, offset, 512, 0, payload), code, info=info)

    def test_read_over_the_cap(self) -> None:
        self.assert_refused(request(0, 0, (32 << 20) + 512), errno.EINVAL, info=HUGE)
        self.assert_refused(request(0, 0, 0xFFFFFE00), errno.EINVAL, info=HUGE)
        self.assertEqual(len(parse(request(0, 0, 32 << 20), info=HUGE).parsed), 1)  # type: ignore[attr-defined]

    def test_write_over_the_cap_is_skipped(self) -> None:
        length = (32 << 20) + 512
        made = parse(request(1, 0, length) + bytes(1000), info=HUGE)
        self.assertEqual(len(made.refused), 1)
        for _ in range(length // 100000):
            made.feed(bytes(100000))
            self.assertEqual(made.parse(128), [])
        made.feed(bytes(length - 1000 - length // 100000 * 100000) + request(3))
        self.assertEqual([r.command for r in made.parse(128)], [3])

    def test_write_of_0xffffffff_closes(self) -> None:
        for length in (0xFFFFFFFF, (64 << 20) + 1):
            made = parse(request(1, 0, length), info=HUGE)
            self.assertIsInstance(made.failure, LimitError)
            self.assertIsNone(made.rest)

    def test_block_status_at_the_maximum(self) -> None:
        made = parse(request(7, 0, 0xFFFFFE00), info=HUGE)
        (asked,) = made.parsed  # type: ignore[attr-defined]
        many = [(512, index % 2) for index in range(100000)]
        reply = nbd.status_reply(asked, many)
        self.assertEqual(len(reply), 20 + 4 + 8 * limits.NBD_EXTENTS_MAX)
        whole = nbd.status_reply(asked, [(1 << 40, 3)])
        self.assertEqual(whole[-8:], struct.pack(">II", 0xFFFFFE00, 3))

    def test_zeroes_longer_than_a_payload_may_be(self) -> None:
        self.assertEqual(len(parse(request(6, 0, 1 << 31), info=HUGE).parsed), 1)  # type: ignore[attr-defined]

    def test_header_in_pieces(self) -> None:
        made = parser()
        data = request(1, 0, 512, 0, b"a" * 512) + request(0, 0, 512)
        found = []
        for position in range(0, len(data), 27):
            piece = data[position : position + 27]
            while piece and made.rest is not None:
                count = min(len(piece), len(made.rest))
                made.rest[:count] = piece[:count]
                made.filled(count)
                piece = piece[count:]
            if piece:
                made.feed(piece)
            found += made.parse(128)
        self.assertEqual([r.command for r in found], [1, 0])
        self.assertEqual(bytes(found[0].payload or b""), b"a" * 512)

    def test_payload_in_pieces_has_a_buffer_of_its_own(self) -> None:
        made = parser(HUGE)
        made.feed(request(3) + request(1, 0, 1 << 20, 0, b"x" * 1000))
        self.assertEqual([r.command for r in made.parse(128)], [3])
        rest = made.rest
        assert rest is not None
        self.assertEqual(len(rest), (1 << 20) - 1000)
        rest[:] = b"y" * len(rest)
        made.filled(len(rest) - 1)
        self.assertEqual(made.parse(128), [])
        made.filled(1)
        (write,) = made.parse(128)
        assert isinstance(write.payload, memoryview)
        self.assertTrue(write.payload.readonly)
        self.assertEqual(bytes(write.payload or b""), b"x" * 1000 + b"y" * ((1 << 20) - 1000))
        self.assertIsNone(made.rest)

    def test_payloads_are_not_copied_nor_writable(self) -> None:
        data = b"".join(request(1, 0, 4096, 0, bytes([n]) * 4096) for n in range(8))
        made = parse(data)
        for number, write in enumerate(made.parsed):  # type: ignore[attr-defined]
            self.assertIs(write.payload.obj, data)
            self.assertTrue(write.payload.readonly)
            self.assertEqual(write.payload[0], number)

    def test_a_small_payload_does_not_pin_a_large_buffer(self) -> None:
        data = request(1, 0, 512, 0, bytes(512)) + request(1, 1, 65536, 0, bytes(65536))
        made = parse(data)
        self.assertIsInstance(made.parsed[0].payload, bytes)  # type: ignore[attr-defined]

    def test_room(self) -> None:
        made = parser()
        made.feed(request(0, 0, 512) * 5)
        self.assertEqual(len(made.parse(3)), 3)
        self.assertTrue(made.blocked)
        self.assertEqual(len(made.parse(3)), 2)
        self.assertFalse(made.blocked)

    def test_budget(self) -> None:
        budget = Budget(1024)
        first, second = parser(budget=budget), parser(budget=budget)
        first.feed(request(0, 0, 512) * 3)
        second.feed(request(1, 0, 512, 0, bytes(512)))
        self.assertEqual(len(first.parse(128)), 2)
        self.assertTrue(first.blocked)
        self.assertEqual(second.parse(128), [])
        self.assertTrue(second.blocked)
        budget.give(512)
        # The one that came first is served first.
        self.assertEqual(second.parse(128), [])
        self.assertEqual(len(first.parse(128)), 1)
        self.assertEqual(budget.free_bytes, 0)
        budget.give(1024)
        self.assertEqual(len(second.parse(128)), 1)

    def test_nothing_is_allocated_beyond_the_budget(self) -> None:
        budget = Budget(32 << 20)
        taker = Taker()
        self.assertTrue(budget.take(1, taker))
        made = parse(request(1, 0, 32 << 20), info=HUGE, budget=budget)
        self.assertTrue(made.blocked)
        self.assertIsNone(made.rest)
        budget.give(1)
        made.parse(128)
        assert made.rest is not None
        self.assertEqual(len(made.rest), 32 << 20)
        self.assertEqual(made.abandon(), 32 << 20)
        self.assertIsNone(made.rest)

    def test_budget_tells_the_next(self) -> None:
        budget = Budget(10)
        holder, first, second = Taker(), Taker(), Taker()
        self.assertTrue(budget.take(10, holder))
        self.assertFalse(budget.take(4, first))
        self.assertFalse(budget.take(1, second))
        budget.give(2)
        self.assertEqual((first.freed, second.freed), (1, 0))
        self.assertFalse(budget.take(1, second))
        budget.forget(first)
        self.assertEqual(second.freed, 1)
        self.assertTrue(budget.take(1, second))
        self.assertFalse(budget.is_waiting(second))

    @given(st.lists(st.binary(max_size=300), max_size=10), st.integers(0, 4))
    def test_arbitrary_bytes(self, pieces: list[bytes], room: int) -> None:
        self._survives(pieces, room)

    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=30),
                st.builds(
                    request,
                    st.integers(0, 9),
                    st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 512, SIZE])),
                    st.one_of(st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 512, 1024])),
                    st.sampled_from([0, 1, 2, 4, 8, 16, 0xFFFF]),
                    st.binary(max_size=1024),
                ),
                st.builds(lambda n: request(1, 512 * n, 512, 0, bytes(512)), st.integers(0, 4096)),
            ),
            max_size=30,
        ),
        st.integers(1, 8),
    )
    def test_arbitrary_requests(self, pieces: list[bytes], room: int) -> None:
        self._survives(pieces, room)

    def _survives(self, pieces: list[bytes], room: int) -> None:
        budget = Budget(64 << 10)
        made = parser(budget=budget)
        for piece in pieces:
            while piece and made.rest is not None:
                count = min(len(piece), len(made.rest))
                made.rest[:count] = piece[:count]
                made.filled(count)
                piece = piece[count:]
            if made.blocked or made.failure or made.disconnect or made.rest is not None:
                break
            made.feed(piece)
            found = made.parse(room)
            self.assertLessEqual(len(found), room + 1)
            for one in found:
                self._is_valid(one)
                budget.give(nbd.request_cost(one))
            self.assertLessEqual(0 if made.rest is None else len(made.rest), 64 << 10)
        budget.give(sum(map(nbd.request_cost, made.parse(room))) + made.abandon())
        self.assertEqual(budget.free_bytes, 64 << 10)

    def _is_valid(self, one: Request) -> None:
        self.assertLessEqual(one.offset + one.length, SIZE)
        self.assertFalse((one.offset | one.length) % 512)
        self.assertIn(one.command, (0, 1, 3, 4, 6, 7))
        self.assertEqual(one.payload is not None, one.command == 1)
        if one.payload is not None:
            self.assertEqual(len(one.payload), one.length)


class ReplyTests(SynchronousTestCase):
    def made(self, command: int, length: int = 512, flags: int = 0) -> Request:
        connection: Any = None
        return Request(connection, COOKIE, command, flags, 1024, length)

    def test_success(self) -> None:
        one = struct.pack(">II", 0x67446698, 0) + COOKIE
        self.assertEqual(nbd.success_replies([self.made(1)]), one)
        self.assertEqual(nbd.success_replies([self.made(1), self.made(3)]), one * 2)

    def test_read(self) -> None:
        self.assertEqual(
            nbd.read_header(self.made(0), False), struct.pack(">II", 0x67446698, 0) + COOKIE
        )
        self.assertEqual(
            nbd.read_header(self.made(0), True),
            struct.pack(">IHH8sIQ", 0x668E33EF, 1, 1, COOKIE, 520, 1024),
        )

    def test_error(self) -> None:
        self.assertEqual(
            nbd.error_reply(self.made(1), errno.ENOSPC, "full", False),
            struct.pack(">II", 0x67446698, 28) + COOKIE,
        )
        self.assertEqual(
            nbd.error_reply(self.made(1), errno.EROFS, "full", True),
            struct.pack(">IHH8sIIH", 0x668E33EF, 1, 32769, COOKIE, 10, 1, 4) + b"full",
        )

    def test_error_unknown_to_nbd_is_eio(self) -> None:
        self.assertEqual(nbd.error_reply(self.made(1), errno.ENODEV, "", False)[4:8], b"\0\0\0\5")

    def test_error_message_is_cut_between_characters(self) -> None:
        reply = nbd.error_reply(self.made(1), errno.EIO, "x" + "é" * 5000 + "\0", True)
        self.assertLessEqual(len(reply), 26 + 1024)
        self.assertEqual(reply[26:].decode(), "x" + "é" * 511)

    def test_status(self) -> None:
        made = nbd.status_reply(self.made(7, 4096), [(512, 0), (512, 0), (1024, 3), (9999, 0)])
        self.assertEqual(
            made,
            struct.pack(">IHH8sII", 0x668E33EF, 1, 5, COOKIE, 28, 1)
            + struct.pack(">6I", 1024, 0, 1024, 3, 2048, 0),
        )

    def test_status_of_one_extent(self) -> None:
        made = nbd.status_reply(self.made(7, 4096, 8), [(512, 0), (512, 0), (1024, 3)])
        self.assertEqual(made[-12:], struct.pack(">III", 1, 1024, 0))

    def test_status_of_nothing(self) -> None:
        self.assertRaises(ValueError, nbd.status_reply, self.made(7), [(0, 1)])
