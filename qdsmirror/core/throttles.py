"""The language of throttles: a window of time, a test, and up to sixteen actions.

The patent: "throttles are user-defined tests and actions evaluated by the primary mirror daemon
periodically"; "not a general purpose macro language".  Page qdsthrottle(5) has the grammar.  What
is written here is read again as the same throttle.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import time
from typing import NamedTuple

from qdsmirror.errors import ConfigError
from qdsmirror.limits import (
    THROTTLE_ACTIONS_MAX,
    THROTTLE_LIMIT_KBPS_MAX,
    THROTTLE_SLEEP_USEC_MAX,
    THROTTLE_TEXT_CHARS_MAX,
    THROTTLE_WORDS_MAX,
)

#: What a window is where a throttle works always.
ALWAYS = "--"
#: What is tested, and the greatest value that a test may name.
MEASURES = {"netkbps": 10**9, "pctcpu": 10**6, "pctwl": 100, "lag": 10**9}
RELATIONS = (">=", "<=", "==", "!=", ">", "<")
#: Transitional operators: true only where the relation has just become so.
TRANSITIONS = tuple(f"T{one}" for one in RELATIONS)

SLEEP, WRITESLEEP, LIMIT = "sleep", "writesleep", "limit"
EXTEND, FREE = "extend", "free"
SYSLOG, CONSOLE, MAIL, EXEC = "syslog", "console", "mail", "exec"
ACTIONS = (SLEEP, WRITESLEEP, LIMIT, EXTEND, FREE, SYSLOG, CONSOLE, MAIL, EXEC)
SET, INC, DEC = "set", "inc", "dec"
OFF = "off"

_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])", re.ASCII)
_OPERATOR = re.compile(r"T?(?:>=|<=|==|!=|>|<)")
_NAME = re.compile(r"[A-Za-z_]+", re.ASCII)
_VALUE = re.compile(r"[^\s<>=!]+")
_BLANKS = re.compile(r"[ \t]*")
_BARE = re.compile(r"""[^\s"'#][^\s"']*""")
_ADDRESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._%+=-]{0,63}(@[A-Za-z0-9][A-Za-z0-9.-]{0,252})?")
_ESCAPES = {"\\": "\\", '"': '"'}


class ThrottleError(ConfigError):
    """A throttle's text says something else than it may.

    :ivar line: from 1, among the lines of what was read.
    :ivar column: from 1, where the word begins; behind the line's end where one is missing.
    :ivar word: what stands there; empty where nothing does.
    :ivar expected: what may stand there.
    """

    code = "throttle"

    def __init__(self, column: int, word: str, expected: str, line: int = 1) -> None:
        self.line = line
        self.column = column
        self.word = word
        self.expected = expected
        super().__init__(self.at(column), "see qdsthrottle(5)")

    def at(self, column: int) -> str:
        """Say what is wrong, and in which column of a whole line."""
        found = f'"{_shown(self.word)}"' if self.word else "nothing more"
        return f"column {column}: expected {self.expected}, found {found}"


def _shown(word: str) -> str:
    short = word if len(word) <= 40 else word[:37] + "..."
    return "".join(one if one.isprintable() else "?" for one in short)


def _one_of(names: Iterable[str], word: str) -> str:
    known = list(names)
    near = difflib.get_close_matches(word[:40], known, n=1, cutoff=0.6)
    return f"one of {' '.join(known)}" + (f' (did you mean "{near[0]}"?)' if near else "")


# -- the window ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """When a throttle works: from one time of day to another, behind midnight perhaps.

    :ivar start: first second; ``stop``: first one that is no longer in it.
    """

    start: time
    stop: time

    def shows(self, now: time) -> bool:
        """Tell whether a clock that shows ``now`` is in the window."""
        if self.start < self.stop:
            return self.start <= now < self.stop
        return now >= self.start or now < self.stop


def parse_time(text: str) -> time | None:
    """Read ``HH:MM:SS``, or ``--``: ``None``.

    :raises ThrottleError: it is neither.
    """
    if text == ALWAYS:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ThrottleError(1, text, f"a time as HH:MM:SS, or {ALWAYS}")
    return time(int(match[1]), int(match[2]), int(match[3]))


def window(start: time | None, stop: time | None) -> Window | None:
    """Make a window of the two ends that were read; ``None`` for always.

    :raises ThrottleError: only one is given, or they are equal.
    """
    if start is None and stop is None:
        return None
    if start is None or stop is None:
        raise ThrottleError(1, ALWAYS, f"a time (from and to are times both, or {ALWAYS} both)")
    if start == stop:
        raise ThrottleError(1, f"{stop}", f"another time than from (always is {ALWAYS} in both)")
    return Window(start, stop)


# -- the test --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """What must be so for a throttle to fire.

    :ivar measure: one of MEASURES.
    :ivar relation: one of RELATIONS.
    :ivar transition: whether it must have become so just now.
    :ivar value: a whole number; of ``lag`` seconds, which may have three places.
    """

    measure: str
    relation: str
    value: float
    transition: bool = False

    def holds(self, measured: float) -> bool:
        """Tell whether the relation is true of a measured value.

        It is rounded as the test's own value is: to a whole number, ``lag`` to milliseconds.
        """
        found = round(measured, 3 if self.measure == "lag" else None)
        return {
            ">": found > self.value,
            ">=": found >= self.value,
            "<": found < self.value,
            "<=": found <= self.value,
            "==": found == self.value,
            "!=": found != self.value,
        }[self.relation]

    def __str__(self) -> str:
        mark = "T" if self.transition else ""
        return f"{self.measure} {mark}{self.relation} {number(self.value)}"


def number(value: float) -> str:
    """Write a test's value: no point where nothing is behind it."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def parse_test(text: str) -> Test:
    """Read a test such as ``netkbps T> 200``.

    :raises ThrottleError: it is none.
    """
    place = _blank(text, 0)
    measure, place = _take(_NAME, text, place)
    if measure not in MEASURES:
        raise _wrong(text, place - len(measure), measure, _one_of(MEASURES, measure))
    place = _blank(text, place)
    operator, place = _take(_OPERATOR, text, place)
    if not operator:
        raise _wrong(text, place, "", f"a relation: {_one_of((*RELATIONS, *TRANSITIONS), '')}")
    place = _blank(text, place)
    word, place = _take(_VALUE, text, place)
    value = _test_value(measure, word)
    if value is None:
        places = " (three places at most)" if measure == "lag" else ""
        expected = f"a{'' if places else ' whole'} number from 0 to {MEASURES[measure]}{places}"
        raise _wrong(text, place - len(word), word, expected)
    place = _blank(text, place)
    if place < len(text):
        raise _wrong(text, place, "", "the end of the test")
    return Test(measure, operator.removeprefix("T"), value, operator.startswith("T"))


def _test_value(measure: str, word: str) -> float | None:
    places = r"(\.[0-9]{1,3})?" if measure == "lag" else ""
    if not re.fullmatch(rf"[0-9]{{1,10}}{places}", word, re.ASCII):
        return None
    value = float(word) if "." in word else int(word)
    return value if value <= MEASURES[measure] else None


def _blank(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    return found.end() if found else place


def _take(pattern: re.Pattern[str], text: str, place: int) -> tuple[str, int]:
    """Take what matches at a place; nothing, if nothing does."""
    found = pattern.match(text, place)
    return (found[0], found.end()) if found else ("", place)


def _wrong(text: str, place: int, word: str, expected: str) -> ThrottleError:
    """Complain about a word, or about whatever stands at a place."""
    return ThrottleError(place + 1, word or next(iter(text[place:].split()), ""), expected)


# -- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """What a throttle does when it fires.

    :ivar kind: one of ACTIONS.
    :ivar how: ``set``, ``inc`` or ``dec`` of a sleep.
    :ivar amount: microseconds of a sleep; KB a second of a limit, ``None``: off.
    :ivar address: of a mail.
    :ivar text: what is told.
    :ivar argv: program and arguments of ``exec``.
    """

    kind: str
    how: str = ""
    amount: int | None = None
    address: str = ""
    text: str = ""
    argv: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [self.kind]
        if self.kind == LIMIT:
            words.append(OFF if self.amount is None else str(self.amount))
        elif self.how:
            words += [self.how, str(self.amount)]
        words += [self.address] if self.address else []
        words += [quoted(self.text)] if self.text else []
        return " ".join([*words, *map(_bare_or_quoted, self.argv)])


class _Word(NamedTuple):
    """A word of an action's line, and the column (from 1) where it begins."""

    text: str
    column: int


def quoted(text: str) -> str:
    """Put a text between quotes, so that it is read as one word."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _bare_or_quoted(word: str) -> str:
    return word if _BARE.fullmatch(word) else quoted(word)


def _words(line: str) -> list[_Word]:
    """Cut a line into words; a comment ends it.

    :raises ThrottleError: a quote is not closed, or stands in a word.
    """
    words: list[_Word] = []
    place = _blank(line, 0)
    while place < len(line) and line[place] != "#":
        begin = place
        if line[place] in "\"'":
            text, place = _quoted_word(line, place)
        else:
            text, place = _take(_BARE, line, place)
        words.append(_Word(text, begin + 1))
        after = _blank(line, place)
        if place == after < len(line):
            raise _wrong(line, place, "", "a blank between words")
        place = after
    return words


def _quoted_word(line: str, begin: int) -> tuple[str, int]:
    quote, place = line[begin], begin + 1
    made: list[str] = []
    while place < len(line) and line[place] != quote:
        if quote == '"' and line[place] == "\\":
            place += 1
            escaped = _ESCAPES.get(line[place : place + 1])
            if escaped is None:
                raise ThrottleError(place, line[place - 1 : place + 1], 'a text (\\" or \\\\)')
            made.append(escaped)
        else:
            made.append(line[place])
        place += 1
    if place == len(line):
        raise ThrottleError(begin + 1, line[begin:], f"a text that ends with {quote}")
    return "".join(made), place + 1


def parse_actions(lines: Sequence[str]) -> tuple[Action, ...]:
    """Read the actions of a throttle, one a line; empty lines and comments count for nothing.

    :raises ThrottleError: one cannot be read, there are none, or more than sixteen.
    """
    actions: list[Action] = []
    for number_, line in enumerate(lines, 1):
        try:
            words = _words(line)
            if words:
                actions.append(_action(line, words))
        except ThrottleError as error:
            raise ThrottleError(error.column, error.word, error.expected, number_) from None
        if len(actions) > THROTTLE_ACTIONS_MAX:
            raise ThrottleError(
                words[0].column, words[0].text,
                f"the end ({THROTTLE_ACTIONS_MAX} actions at most)", number_,
            )  # fmt: skip
    if not actions:
        raise ThrottleError(1, "", f"an action: {_one_of(ACTIONS, '')}", max(1, len(lines)))
    return tuple(actions)


def parse_action(line: str) -> Action:
    """Read one action.

    :raises ThrottleError: it is none.
    """
    return parse_actions([line])[0]


def _action(line: str, words: Sequence[_Word]) -> Action:
    arguments = _Arguments(line, words)
    kind = arguments.take(f"an action: {_one_of(ACTIONS, words[0].text)}", ACTIONS)
    if kind in (SLEEP, WRITESLEEP):
        how = arguments.take("set, inc or dec", (SET, INC, DEC))
        action = Action(kind, how, arguments.number(THROTTLE_SLEEP_USEC_MAX, "microseconds"))
    elif kind == LIMIT:
        action = Action(kind, amount=arguments.limit())
    elif kind in (SYSLOG, CONSOLE):
        action = Action(kind, text=arguments.text())
    elif kind == MAIL:
        address = arguments.address()
        action = Action(kind, address=address, text=arguments.text())
    elif kind == EXEC:
        action = Action(kind, argv=arguments.program())
    else:
        action = Action(kind)
    arguments.end()
    return action


class _Arguments:
    """Takes the words of one action in their order."""

    def __init__(self, line: str, words: Sequence[_Word]) -> None:
        self._words = list(words)
        self._after = len(line.rstrip()) + 1

    def _next(self, expected: str) -> _Word:
        if not self._words:
            raise ThrottleError(self._after, "", expected)
        return self._words.pop(0)

    def take(self, expected: str, allowed: Sequence[str]) -> str:
        """Take one of some words."""
        word = self._next(expected)
        if word.text not in allowed:
            raise ThrottleError(word.column, word.text, expected)
        return word.text

    def number(self, most: int, unit: str, other: str = "") -> int:
        """Take a whole number."""
        expected = f"a whole number of {unit} from {1 if other else 0} to {most}{other}"
        word = self._next(expected)
        plain = re.fullmatch(r"[0-9]{1,15}", word.text, re.ASCII)
        if plain is None or not (1 if other else 0) <= int(word.text) <= most:
            raise ThrottleError(word.column, word.text, expected)
        return int(word.text)

    def limit(self) -> int | None:
        """Take KB a second, or ``off``."""
        if self._words and self._words[0].text == OFF:
            self._words.pop(0)
            return None
        return self.number(THROTTLE_LIMIT_KBPS_MAX, "KB a second", f", or {OFF}")

    def address(self) -> str:
        """Take a mail's address."""
        expected = "a mail's address (NAME@HOST, or NAME)"
        word = self._next(expected)
        if not _ADDRESS.fullmatch(word.text):
            raise ThrottleError(word.column, word.text, expected)
        return word.text

    def text(self) -> str:
        """Take all that is left as a text."""
        first = self._next('a text, such as "over 200 KB/s"')
        text = " ".join([first.text, *(word.text for word in self._words)])
        self._words.clear()
        _check_text(first.column, text)
        if not text.strip():
            raise ThrottleError(first.column, text, "a text that says something")
        return text

    def program(self) -> tuple[str, ...]:
        """Take a program and its arguments."""
        expected = "a program's absolute path"
        first = self._next(expected)
        if not first.text.startswith("/") or first.text.endswith("/"):
            raise ThrottleError(first.column, first.text, expected)
        words = [first, *self._words]
        self._words.clear()
        if len(words) > THROTTLE_WORDS_MAX:
            word = words[THROTTLE_WORDS_MAX]
            expected = f"the end ({THROTTLE_WORDS_MAX} words at most)"
            raise ThrottleError(word.column, word.text, expected)
        for word in words:
            _check_text(word.column, word.text)
        return tuple(word.text for word in words)

    def end(self) -> None:
        """Complain about what is left."""
        if self._words:
            raise ThrottleError(self._words[0].column, self._words[0].text, "the line's end")


def _check_text(column: int, text: str) -> None:
    if len(text) > THROTTLE_TEXT_CHARS_MAX:
        raise ThrottleError(column, text, f"a text of {THROTTLE_TEXT_CHARS_MAX} characters at most")
    if not text.isprintable():
        raise ThrottleError(column, text, "a text without control characters")


# -- the whole -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Throttle:
    """A throttle: when, if what, what then.

    :ivar name: of its section, unique in the group.
    :ivar window: when it works; ``None``: always.
    """

    name: str
    test: Test
    actions: tuple[Action, ...]
    window: Window | None = None

    @property
    def limit(self) -> Action | None:
        """Its last action that limits what is sent; ``None``: it has none."""
        return next((one for one in reversed(self.actions) if one.kind == LIMIT), None)

    @property
    def condition(self) -> str:
        """Its name, and when and if what it fires: another one has another past."""
        start, stop = self._ends
        return f"{self.name} {start} {stop} {self.test}"

    @property
    def _ends(self) -> tuple[time | str, time | str]:
        return (self.window.start, self.window.stop) if self.window else (ALWAYS, ALWAYS)

    def lines(self) -> list[str]:
        """Give it as the lines of a configuration file, below ``[throttles]``."""
        start, stop = self._ends
        return [
            f"[[{self.name}]]",
            f"from = {start}",
            f"to = {stop}",
            f"test = {self.test}",
            'actions = """',
            *(f"  {action}" for action in self.actions),
            '"""',
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())
