"""One tree of exceptions; the class says what to do next, and how a command exits.

Every message names what is wrong and where; ``hint`` is the next command to run.
The exit codes are the stable contract with scripts (man page qdsmirror(7), EXIT STATUS).
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DEGRADED = 3
EXIT_BROKEN = 4
EXIT_CONFIG = 10
EXIT_UNREACHABLE = 11
EXIT_IDENTITY = 12
EXIT_INTERRUPTED = 130


class QdsError(Exception):
    """The world's fault, told to a user: a one-line message and the next command to run.

    :ivar exit_code: what a command that ends with this error exits with.
    :ivar code: a short stable name for ``--json`` errors and for the wire.
    """

    exit_code = EXIT_FAILED
    code = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(QdsError):
    """The command line asks for something that does not exist."""

    exit_code = EXIT_USAGE
    code = "usage"


class ConfigError(QdsError):
    """A configuration file is missing, unreadable or wrong; names file, line and key."""

    exit_code = EXIT_CONFIG
    code = "configuration"


class MismatchError(ConfigError):
    """The two sides' configurations do not describe the same group: do not retry blindly."""

    code = "mismatch"


class IdentityError(QdsError):
    """Certificate, name or secret refused: do not retry blindly."""

    exit_code = EXIT_IDENTITY
    code = "identity"


class UnreachableError(QdsError):
    """A daemon does not answer: start it, or retry."""

    exit_code = EXIT_UNREACHABLE
    code = "unreachable"


class DegradedError(QdsError):
    """A predicate is false or a wait timed out."""

    exit_code = EXIT_DEGRADED
    code = "degraded"


class BrokenError(QdsError):
    """Data cannot be used or continued as it is: a refresh or an operator's decision is needed."""

    exit_code = EXIT_BROKEN
    code = "broken"


class CorruptError(BrokenError):
    """What a device holds contradicts what was durably written there (rules.md 6)."""

    code = "corrupt"


class DivergedError(BrokenError):
    """The two sides' histories do not continue each other (rules.md 8)."""

    code = "diverged"


class DeviceError(QdsError):
    """A device is missing, in use, too small, foreign, or failed."""

    code = "device"


class DeviceFailedError(DeviceError):
    """An I/O error was latched: nothing is acknowledged on this device any more (LOUD).

    :ivar path: the device, where one of ours has failed.
    """

    code = "device-failed"

    def __init__(self, message: str, hint: str = "", path: str = "") -> None:
        super().__init__(message, hint)
        self.path = path


class ProtocolError(QdsError):
    """The peer broke the protocol: abort the connection, reconnect with back-off."""

    code = "protocol"


class LimitError(ProtocolError):
    """The peer asked for more than limits.py allows."""

    code = "limit"
