"""The checker of the kill tests catches what it is there for."""

from __future__ import annotations

from random import Random

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.order import (
    SLOT_BYTES,
    Layout,
    NotAPrefixError,
    check,
    parse,
    payload,
)

LAYOUT = Layout(devices=3, slots=8)
DEPTH = 5


class History:
    """Writes 1 to ``count`` with up to DEPTH unanswered, and images of any subset of them."""

    def __init__(self, count: int, seed: int = 1) -> None:
        random = Random(seed)
        waiting: set[int] = set()
        self.payloads: dict[int, bytes] = {}
        self.concurrent: dict[int, set[int]] = {}
        for number in range(1, count + 1):
            place = LAYOUT.place(number)
            waiting = {n for n in waiting if LAYOUT.place(n) != place}
            while len(waiting) >= DEPTH or (waiting and random.random() < 0.4):
                waiting.remove(random.choice(sorted(waiting)))
            self.payloads[number] = payload(number, waiting)
            self.concurrent[number] = set(waiting)
            waiting.add(number)

    def images(self, numbers: list[int]) -> list[bytearray]:
        images = [bytearray(LAYOUT.slots * SLOT_BYTES) for _ in range(LAYOUT.devices)]
        for number in numbers:
            device, slot = LAYOUT.place(number)
            images[device][slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = self.payloads[number]
        return images


class OrderTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.history = History(100)

    def test_nothing_is_a_prefix(self) -> None:
        self.assertEqual(check(self.history.images([]), LAYOUT), 0)

    def test_every_prefix_passes(self) -> None:
        for end in range(1, 101):
            images = self.history.images(list(range(1, end + 1)))
            self.assertEqual(check(images, LAYOUT), end)

    def test_concurrent_writes_may_change_places(self) -> None:
        passed = 0
        for number in range(2, 101):
            for other in self.history.concurrent[number]:
                if all(other in self.history.concurrent[n] for n in range(other + 1, number + 1)):
                    there = [n for n in range(1, number + 1) if n != other]
                    self.assertEqual(check(self.history.images(there), LAYOUT), number)
                    passed += 1
        self.assertGreater(passed, 50)

    def test_swapped_pair_is_caught(self) -> None:
        caught = 0
        for number in range(2, 101):
            before = number - 1
            if before in self.history.concurrent[number]:
                continue
            # The order "number, before" was carried out up to its first write.
            there = [*range(1, before), number]
            self.assertRaises(NotAPrefixError, check, self.history.images(there), LAYOUT)
            caught += 1
        self.assertGreater(caught, 20)

    def test_lost_write_is_caught_unless_overwritten(self) -> None:
        count = 100
        for lost in range(count - LAYOUT.period + 1, count + 1):
            followers = range(lost + 1, count + 1)
            if all(lost in self.history.concurrent[n] for n in followers):
                continue
            there = [n for n in range(1, count + 1) if n != lost]
            self.assertRaises(NotAPrefixError, check, self.history.images(there), LAYOUT)

    def test_write_of_an_older_turn_that_came_late_is_caught(self) -> None:
        there = [*range(1, 61), 50 - LAYOUT.period]
        self.assertRaises(NotAPrefixError, check, self.history.images(there), LAYOUT)

    def test_torn_foreign_and_misplaced_slots_are_caught(self) -> None:
        for change in (
            lambda image: image.__setitem__(slice(3000, 3004), b"torn"),
            lambda image: image.__setitem__(slice(0, 4), b"text"),
            lambda image: image.__setitem__(
                slice(0, SLOT_BYTES), image[SLOT_BYTES : 2 * SLOT_BYTES]
            ),
            lambda image: image.__setitem__(slice(0, 2048), bytes(2048)),
        ):
            images = self.history.images(list(range(1, 51)))
            change(images[1])
            self.assertRaises(NotAPrefixError, check, images, LAYOUT)

    def test_payload_says_what_was_unanswered(self) -> None:
        self.assertEqual(parse(payload(77, {70, 71, 76})), (77, {70, 71, 76}))
        self.assertEqual(len(payload(77, range(1, 33))), SLOT_BYTES)
        self.assertIsNone(parse(bytes(SLOT_BYTES)))
