"""Configuration files as text: bounded reading, ConfigObj, configspec checks, lines of errors.

What this module adds around ConfigObj closes its traps: lines are taken apart here and handed
over in one canonical form, because its regular expressions take time that grows with the cube of
a line's length, and cut an unquoted value at any ``#``; ``[DEFAULT]`` is never validated; a
missing key is reported as ``False``; unknown keys pass.  Man page dsgrp.cfg(5) describes the files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configobj import ConfigObj, ConfigObjError
from configobj.validate import Validator, VdtMissingValue

from qdsmirror.configvalues import CHECKS, nearest, shown
from qdsmirror.errors import ConfigError
from qdsmirror.limits import CONFIG_FILE_BYTES_MAX, CONFIG_LINE_CHARS_MAX, CONFIG_PROBLEMS_MAX

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
#: A throttle's name may have blanks in it, and its actions stand on several lines.
_TITLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]*")
_TITLED = "throttles"
_LONG_KEY = "actions"
_LONG_QUOTES = ('"""', "'''")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    :ivar file: where.
    :ivar line: from 1; 0 where the problem is not a line's.
    :ivar key: sections and key joined by dots, e.g. ``secondary.port``; may be empty.
    :ivar message: what is wrong, with the nearest valid name where there is one.
    :ivar severity: ``error``, or ``warning`` for what works today and deserves a look.
    :ivar hint: the next command; empty: the file is to be corrected.
    """

    file: Path
    line: int
    key: str
    message: str
    severity: str = "error"
    hint: str = ""

    def __str__(self) -> str:
        place = str(self.file) + (f":{self.line}" if self.line else "")
        mark = "warning: " if self.severity == "warning" else ""
        told = f"{place}: {mark}" + (f"{self.key}: " if self.key else "") + self.message
        return f"{told}; {self.hint}" if self.hint else told


class ProblemsError(ConfigError):
    """A configuration with problems; the message is the first of them.

    :ivar problems: all of them, never empty.
    """

    def __init__(self, problems: Sequence[Problem], hint: str = "qdsconfigtool check") -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}", hint)
        self.problems = tuple(problems)


@dataclass
class Source:
    """A configuration file taken apart and checked against its configspec.

    :ivar values: sections as dictionaries in file order, values converted, defaults filled in.
        Only complete when there are no problems.
    :ivar lines: where each section and key stands, by its path, e.g. ``("secondary", "port")``.
    :ivar columns: of keys, how many characters stand in the line before the value.
    :ivar blocks: values of several lines, joined by line ends; the first stands behind the quotes.
    """

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    columns: dict[tuple[str, ...], int] = field(default_factory=dict)
    blocks: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def complain(self, path: tuple[str, ...], message: str, line: int | None = None) -> None:
        """Record a problem at a section or key; a missing one is placed at its section."""
        if line is None:
            known = [path[:size] for size in range(len(path), 0, -1) if path[:size] in self.lines]
            line = self.lines[known[0]] if known else 1
        if len(self.problems) < CONFIG_PROBLEMS_MAX:
            self.problems.append(Problem(self.file, line, ".".join(path), message))


# -- text ----------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a configuration file, at most 1 MiB of UTF-8.

    :raises ConfigError: it is missing, not a regular file, unreadable, too large or not UTF-8.
    """
    try:
        # Non-blocking, so that a FIFO under this name cannot hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path}: not a regular file", f"ls -l {path}")
            raw = file.read(CONFIG_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno == errno.ENOENT
        reason = error.strerror if isinstance(error, OSError) else str(error)
        page = "qds.cfg(5)" if path.name == "qds.cfg" else "dsgrp.cfg(5)"
        hint = f"write it, see {page}; then: qdsconfigtool check" if missing else f"ls -l {path}"
        raise ConfigError(f"{path}: {reason}", hint) from error
    if len(raw) > CONFIG_FILE_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {CONFIG_FILE_BYTES_MAX} bytes", "shorten it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ProblemsError([Problem(path, line, "", "not UTF-8 text")]) from error


def parse(path: Path, text: str, spec: str) -> Source:
    """Take a configuration file's text apart and check it against a configspec.

    :param spec: the configspec's file name in this package, e.g. ``dsgrp.ini``.
    :returns: the source, with every problem found; never raises for what the text holds.
    """
    source = Source(path)
    lines = _canonical_lines(source, text)
    if source.problems:
        return source
    try:
        parsed = ConfigObj(lines, interpolation=False, list_values=False, raise_errors=True)
    except ConfigObjError as error:
        where = error.line_number or 1
        reason = str(error.msg).removesuffix(".").replace(f" at line {where}", "").lower()
        source.complain((), f"{reason}: {shown(lines[where - 1])}", where)
        return source
    _unquote(parsed)
    _put_blocks(source, parsed)
    specification = ConfigObj(
        Path(__file__).with_name(spec).read_text("utf-8").splitlines(),
        interpolation=False,
        list_values=False,
        raise_errors=True,
        _inspec=True,
    )
    _drop_unknown(source, parsed, specification, ())
    parsed.configspec = specification
    results = parsed.validate(Validator(CHECKS), preserve_errors=True)
    _collect(source, parsed, specification, results, ())
    source.values = parsed.dict()
    source.problems.sort(key=lambda problem: problem.line)
    return source


def _canonical_lines(source: Source, text: str) -> list[str]:
    """Take each line apart; give it back as ``[[name]]``, ``key = "value"`` or nothing."""
    canonical: list[str] = []
    section: tuple[str, ...] = ()
    raw_lines = enumerate(text.split("\n"), 1)
    for number, raw in raw_lines:
        canonical.append("")
        line = raw.strip(" \t\r")
        if not line or (line.startswith("#") and len(line) <= CONFIG_LINE_CHARS_MAX):
            continue
        try:
            _refuse_strange(line)
            if line.startswith("["):
                depth, name = _section_line(line, section)
                section = (*section[: depth - 1], name)
                path, made = section, "[" * depth + name + "]" * depth
            elif (quotes := _long_quotes(line, section)) is not None:
                path, made = (*section, _LONG_KEY), f'{_LONG_KEY} = "-"'
                source.lines.setdefault(path, number)
                source.columns[path] = raw.index(quotes) + len(quotes)
                source.blocks[path] = _block(source, raw, quotes, raw_lines, canonical)
            else:
                key, value = _key_line(line)
                quote = "'" if '"' in value else '"'
                path, made = (*section, key), f"{key} = {quote}{value}{quote}"
                source.columns[path] = raw.index(value, raw.index("=") + 1)
        except ValueError as error:
            source.complain((), str(error), number)
            continue
        source.lines.setdefault(path, number)
        canonical[number - 1] = made
    return canonical


def _long_quotes(line: str, section: tuple[str, ...]) -> str | None:
    """Give the quotes of a value that may go on in the lines below; ``None`` where it has none."""
    key, _, rest = line.partition("=")
    if section[:1] != (_TITLED,) or key.strip() != _LONG_KEY:
        return None
    return rest.strip()[:3] if rest.strip()[:3] in _LONG_QUOTES else None


def _block(
    source: Source,
    raw: str,
    quotes: str,
    following: Iterator[tuple[int, str]],
    canonical: list[str],
) -> str:
    """Take the lines up to the closing quotes.

    :param canonical: gets an empty line for each.
    :raises ValueError: they are not closed, or more than a comment stands behind them.
    """
    lines = [raw[raw.index(quotes) + len(quotes) :].rstrip("\r")]
    while quotes not in lines[-1]:
        number, line = next(following, (0, ""))
        if not number:
            raise ValueError(f"{_LONG_KEY}: the {quotes} that begin here are not closed")
        canonical.append("")
        lines.append(line.rstrip("\r"))
        try:
            _refuse_strange(lines[-1])
        except ValueError as error:
            source.complain((), str(error), number)
    lines[-1], _, rest = lines[-1].partition(quotes)
    if rest.strip() and not rest.strip().startswith("#"):
        raise ValueError(f"{_LONG_KEY}: {shown(rest.strip())} stands behind the closing {quotes}")
    return "\n".join(lines)


def _refuse_strange(line: str) -> None:
    if len(line) > CONFIG_LINE_CHARS_MAX:
        raise ValueError(f"the line is longer than {CONFIG_LINE_CHARS_MAX} characters")
    for character in line:
        if character != "\t" and unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"a control character (U+{ord(character):04X}) stands in the line")


def _section_line(line: str, section: tuple[str, ...]) -> tuple[int, str]:
    inner = line.lstrip("[")
    depth = len(line) - len(inner)
    name, bracket, rest = inner.partition("]")
    closing = (bracket + rest).lstrip("]")
    closed = len(bracket + rest) - len(closing)
    name, closing = name.strip(), closing.strip()
    if closed != depth or (closing and not closing.startswith("#")):
        raise ValueError(f"{shown(line)} is not a section: write [name] or [[name]]")
    named = _TITLE if depth == 2 and section[:1] == (_TITLED,) else _NAME
    if not named.fullmatch(name):
        raise ValueError(f"{shown(name)} is not a section's name (letters, digits, -_.)")
    return depth, name


def _key_line(line: str) -> tuple[str, str]:
    key, equals, rest = line.partition("=")
    key, rest = key.strip(), rest.strip()
    if not equals:
        raise ValueError(f"{shown(line)} is neither [section] nor key = value")
    if not _NAME.fullmatch(key):
        raise ValueError(f"{shown(key)} is not a key's name")
    if rest[:1] in ("'", '"'):
        if rest[:3] in ("'''", '"""'):
            raise ValueError(f"{key}: a value must stand on one line")
        value, quote, rest = rest[1:].partition(rest[0])
        rest = rest.strip()
        if not quote or (rest and not rest.startswith("#")):
            raise ValueError(f"{key}: the quotes around the value are not closed as they should be")
    else:
        value, mark, _comment = rest.partition("#")
        if mark and value and not value[-1].isspace():
            raise ValueError(f"{key}: quote a value with # in it, or put a space before a comment")
        value = value.strip()
    if not value:
        raise ValueError(f"{key}: the value is empty; give one or leave the key out")
    if "'" in value and '"' in value:
        raise ValueError(f"{key}: a value cannot hold both kinds of quotes")
    return key, value


def _unquote(section: Any) -> None:
    # With list_values=False ConfigObj leaves the quotes on; _canonical_lines put them there.
    for key in section.scalars:
        section[key] = section[key][1:-1]
    for name in section.sections:
        _unquote(section[name])


def _put_blocks(source: Source, parsed: Any) -> None:
    """Put the values of several lines where something stands for them."""
    for path, value in source.blocks.items():
        place = parsed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value


def _drop_unknown(source: Source, section: Any, spec: Any, path: tuple[str, ...]) -> None:
    """Complain about what the configspec does not name, and take it out before validation.

    ``get_extra_values`` would name most of it, but neither ``[DEFAULT]`` nor a key given as a
    section, over which ``validate`` stumbles.
    """
    many = "__many__" in spec.sections
    for key in list(section.scalars):
        if key in spec.sections:
            source.complain((*path, key), f"this is a section: write [{key}]")
        elif key not in spec.scalars:
            valid = [] if many else [*spec.scalars, *spec.sections]
            source.complain((*path, key), f"unknown key{nearest(key, valid)}")
        else:
            continue
        del section[key]
    for name in list(section.sections):
        if name in spec.scalars:
            source.complain((*path, name), f"this is a key: write {name} = VALUE")
        elif many and not name.startswith("__"):
            _drop_unknown(source, section[name], spec["__many__"], (*path, name))
            continue
        elif not many and name in spec.sections:
            _drop_unknown(source, section[name], spec[name], (*path, name))
            continue
        else:
            valid = [] if many else [*spec.sections, *spec.scalars]
            source.complain((*path, name), f"unknown section{nearest(name, valid)}")
        del section[name]


def _collect(source: Source, section: Any, spec: Any, results: Any, path: tuple[str, ...]) -> None:
    """Turn ``validate``'s results into problems; ``False`` means missing.

    ``flatten_errors`` would sort exceptions, which cannot be compared.
    """
    if results is True:
        return
    if path and path not in source.lines and any(_required(spec)):
        needed = ", ".join(_required(spec))
        source.complain(path, f"the section [{path[-1]}] is missing (it needs {needed})")
        return
    for key in spec.scalars:
        result = results if isinstance(results, bool) else results[key]
        if isinstance(result, Exception):
            source.complain((*path, key), str(result))
        elif result is False and key in _required(spec):
            source.complain((*path, key), "missing")
    for name in section.sections:
        inner = spec["__many__"] if "__many__" in spec.sections else spec[name]
        result = results if isinstance(results, bool) else results[name]
        _collect(source, section[name], inner, result, (*path, name))


def _required(spec: Any) -> list[str]:
    validator = Validator(CHECKS)
    required = []
    for key in spec.scalars:
        try:
            validator.check(spec[key], None, missing=True)
        except VdtMissingValue:
            required.append(key)
    return required
