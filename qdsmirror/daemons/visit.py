"""A visit to the secondaries of groups: ``python -m qdsmirror.daemons.visit [--root DIR] N...``.

Prints one JSON object on standard output: for each group and each of its network paths what the
secondary says, or why it was not to be asked.  ``qdsdoctor --peer`` runs it: a process of its own,
since the commands themselves do without Twisted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults, maybeDeferred
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.task import react

from qdsmirror.config import GroupConfig, HostConfig, load_group, load_host, load_secret
from qdsmirror.configvalues import NetworkPath
from qdsmirror.errors import ProtocolError, QdsError
from qdsmirror.groups.network_paths import unanswered
from qdsmirror.groups.runtime import tls_endpoint
from qdsmirror.limits import VISITS_AT_ONCE
from qdsmirror.net.handshake_visit import Visited, VisitHandshake, VisitorsPass
from qdsmirror.paths import Paths


async def visit(
    reactor: Any, host: HostConfig, config: GroupConfig, way: NetworkPath, secret: bytes
) -> Visited:
    """Visit a group's secondary over one network path.

    :raises QdsError: nobody answers there, or either end refused the other.
    """
    endpoint = tls_endpoint(reactor, host, config, way)
    handshake = VisitHandshake(VisitorsPass(config.number, secret, time.time), reactor)
    try:
        await connectProtocol(endpoint, handshake)  # type: ignore[no-untyped-call]
    except (ConnectError, DNSLookupError, OSError) as error:
        handshake.done.addErrback(lambda _: None)
        raise unanswered(config, way, error) from None
    found: Visited = await handshake.done
    return found


async def _visit_way(
    reactor: Any, paths: Paths, host: HostConfig, config: GroupConfig, way: NetworkPath
) -> dict[str, Any]:
    """Visit on one path; an error becomes part of the answer."""
    place = {"local": way.local or None, "remote": way.remote, "port": way.port}
    try:
        found = await visit(reactor, host, config, way, load_secret(paths, config.number))
    except QdsError as error:
        return {**place, "error": described(error)}
    return {**place, "error": None, **asdict(found)}


def described(error: QdsError) -> dict[str, Any]:
    """Give an error as the parent process reads it."""
    return {
        "code": error.code,
        "exit_code": error.exit_code,
        # What breaks off in the middle says nothing of who is to blame.
        "passing": type(error) is ProtocolError,
        "message": error.message,
        "hint": error.hint,
    }


def visit_all(reactor: Any, paths: Paths, numbers: Sequence[int]) -> Deferred[dict[str, Any]]:
    """Visit the secondaries of groups, on every network path.

    :raises QdsError: a configuration cannot be read.
    """
    host = load_host(paths)
    turns = DeferredSemaphore(VISITS_AT_ONCE)

    async def group(number: int) -> dict[str, Any]:
        config = load_group(paths, number)
        ways = [
            await turns.run(_as_deferred, reactor, paths, host, config, way) for way in config.ways
        ]
        return {"group": number, "ways": ways}

    found = gatherResults([Deferred.fromCoroutine(group(one)) for one in numbers])
    return found.addCallback(lambda groups: {"groups": groups})


def _as_deferred(*given: Any) -> Deferred[dict[str, Any]]:
    return Deferred.fromCoroutine(_visit_way(*given))


def main(reactor: Any, *argv: str) -> Deferred[None]:
    """Visit, and print what was found, or the error that kept all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root")
    parser.add_argument("groups", type=int, nargs="+")
    arguments = parser.parse_args(argv)

    def failed(failure: Any) -> dict[str, Any]:
        failure.trap(QdsError)
        return {"groups": [], "error": described(failure.value)}

    def tell(told: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(told) + "\n")

    found = maybeDeferred(visit_all, reactor, Paths.of(arguments.root), arguments.groups)
    return found.addErrback(failed).addCallback(tell)


if __name__ == "__main__":
    react(main, sys.argv[1:])
