"""Taking secrets out of what leaves a host: by what is known of them, and by what they look like.

What is known is certain: the very bytes of every key, group secret and token file of the host.
What they look like catches what came from elsewhere: a key that somebody pasted into a
configuration, another host's secret in a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What stands in a secret's place.
REMOVED = b"[removed]"
#: A shorter part of a known secret is not looked for: it would be found everywhere.
_KNOWN_BYTES_MIN = 8

#: A word as shells know it, with its quotes; what closes the quotes or brackets around stays.
_WORD = (
    rb"(?!" + re.escape(REMOVED) + rb")(?:\\\"[^\n]*?\\\"|\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'|\S)+?"
    rb"(?=[\\\"',;)}\]]{0,6}(?:\s|\Z))"
)
_NAMES = rb"password|passphrase|passwd|secret|token|api[_-]?key"
#: An option whose value is a secret, as far as its name goes.
_OPTION = rb"(?<![\w-])--?[\w-]*?(?:" + _NAMES + rb"|key|pass|credentials?)"

#: What is removed whole.
_PATTERNS = (
    # Private keys in PEM, whole or broken off.
    re.compile(
        rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)",
        re.DOTALL,
    ),
    # The end of one that began before the text does.
    re.compile(rb"\A.*-----END [A-Z0-9 ]*PRIVATE KEY-----", re.DOTALL),
    # 256 bits in hexadecimal, as a group's secret is written, perhaps longer.
    re.compile(rb"(?<![0-9A-Za-z])[0-9A-Fa-f]{64,}(?![0-9A-Za-z])"),
    # user:password@host in an address.
    re.compile(rb"(?<=://)[^\s/@]+:[^\s/@]+(?=@)"),
)
#: What follows a word that gives it away; that word stays.
_TOLD = (
    re.compile(rb"(?i)(\bbearer[ \t]+)[A-Za-z0-9._~+/=-]{8,}"),
    # Base64, and not a word of a sentence.
    re.compile(rb"((?i:\bbasic)[ \t]+)(?=.[a-z]*[A-Z0-9+/=])[A-Za-z0-9+/]{4,}=*"),
    re.compile(
        rb"(?i)((?:" + _OPTION + rb")(?:=|[\"']?,?[ \t]+))"
        rb"(?!" + _OPTION + rb"[\"']?[=, \t])" + _WORD
    ),
    re.compile(rb"(?i)((?:" + _NAMES + rb")[\"']?[ \t]*[=:][ \t]*)" + _WORD),
    # curl -u user:password
    re.compile(
        rb"((?<![\w-])(?:-[uU]|--(?:proxy-)?user)[\"']?[=,]?[ \t]*[\"']?[^\s:\"'/]+:)" + _WORD
    ),
)


def parts_of(secret: bytes) -> list[bytes]:
    """Give what a secret file's content may be found by elsewhere: its lines that are long enough.

    :param secret: the content of a key, secret or token file.
    """
    lines = (line.strip() for line in secret.splitlines())
    return [
        line for line in lines if len(line) >= _KNOWN_BYTES_MIN and not line.startswith(b"-----")
    ]


def redact(text: bytes, known: Iterable[bytes]) -> bytes:
    """Take known secrets, and what looks like one, out of a text.

    :param known: parts of secrets (:func:`parts_of`).
    """
    for part in sorted(set(known), key=len, reverse=True):
        for form in {part, part.lower(), part.upper()}:
            text = text.replace(form, REMOVED)
    for pattern in _PATTERNS:
        text = pattern.sub(REMOVED, text)
    for pattern in _TOLD:
        text = pattern.sub(rb"\1" + REMOVED, text)
    return text
