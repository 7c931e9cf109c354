"""The console daemon as a twistd plugin: ``twistd -n qdsconsole [--root DIR]``.

It serves the metrics of all groups of this host.  It has nothing to do with the way of the data: it
asks the other daemons for their status, as ``qdsinfo`` does, and may be absent, slow or killed.

It listens on the loopback address or a Unix socket, or elsewhere with TLS only, for what is shown
there is a token (security.md 10).  Without a token it does not start.
"""

# Twisted's Service has no annotations.
# mypy: disable-error-code="no-untyped-call,misc"

from __future__ import annotations

import errno
import os
import pwd
import socket
import time
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import CannotListenError
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory

from qdsmirror import __version__
from qdsmirror.config import HostConfig, load_host, load_token
from qdsmirror.console.looking import Look, Looking
from qdsmirror.console.metrics import CONTENT_TYPE, render
from qdsmirror.console.site import Console, make_site
from qdsmirror.daemons.notify import Notifier
from qdsmirror.daemons.service import (
    Daemon,
    Options,
    apply_at_hang_up,
    become_user,
    ignore_hang_up,
    make_service,
)
from qdsmirror.daemons.vigil import OwnVigil
from qdsmirror.errors import ConfigError, QdsError
from qdsmirror.net.asking import ask
from qdsmirror.net.control import ControlServer, Status
from qdsmirror.net.https import HttpsServer
from qdsmirror.paths import Paths, make_directories
from qdsmirror.pidfile import PidFile

_log = Logger()
#: Of a Unix socket.
_SOCKET_MODE = 0o660


class ConsoleDaemon(Daemon):
    """Serves the console of one host.

    :cvar daemon: the name of its pid file, control socket and log.
    """

    daemon = "qdsconsole"

    def __init__(self, reactor: Any, paths: Paths) -> None:
        self.reactor = reactor
        self.paths = paths
        self._pid_file = PidFile(paths.pid_file(self.daemon))
        self._control = ControlServer(reactor, paths.control_socket(self.daemon), self)
        self._looking = Looking(reactor, paths)
        self._notifier = Notifier()
        self._vigil = OwnVigil(reactor, self._notifier, self._ask_self)
        self._since = time.time()
        self._tls: HttpsServer | None = None
        self._socket: socket.socket | None = None
        self._port: Any = None
        self._host: HostConfig

    # -- life -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Claim the name, load the configuration and look for the token; still on stderr.

        :raises QdsError: another console runs, or a directory cannot be made.
        :raises ConfigError: there is no token, or no certificate for TLS.
        """
        make_directories(self.paths)
        self._host = load_host(self.paths)
        load_token(self._host.metrics_token_file, self._owners())
        if not self._host.console.is_local:
            self._tls = HttpsServer(self._host)
        self._pid_file.acquire()

    def _owners(self) -> tuple[int, ...]:
        """Give who may own the token: whom we become."""
        try:
            return (pwd.getpwnam(self._host.user).pw_uid,) if self._host.user else ()
        except KeyError:
            return ()

    def open_privileged(self) -> None:
        """Open the port, which may need root.

        :raises QdsError: that is not possible.
        """
        listen = self._host.console
        if listen.path:
            # It belongs to the user whom we become.
            return
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        try:
            self._socket = socket.create_server((listen.host, listen.port), family=family)
        except OSError as error:
            raise self._cannot_listen(error.strerror or "") from None
        self._socket.setblocking(False)

    def _cannot_listen(self, why: str) -> QdsError:
        self._pid_file.release()
        return QdsError(
            f"{self.paths.host_config}: console: {self._host.console}: {why}",
            hint="choose another place to listen, or free that one; who has it: ss -ltnp",
        )

    def begin(self) -> None:
        """Become the user, and serve.

        :raises QdsError: that is not possible.
        """
        become_user(self._host, self.paths, self._pid_file)
        self._pid_file.write()
        self._control.start()
        factory: Any = make_site(Console(self._token, self._metrics), self.reactor)
        if self._tls is not None:
            factory = TLSMemoryBIOFactory(self._tls, False, factory)
        factory.noisy = False
        self._port = self._listen(factory)
        _log.info(
            "{daemon} {version} on {host}: metrics at {url}",
            daemon=self.daemon, version=__version__, host=self._host.name, url=self.url,
        )  # fmt: skip
        self._notifier.status(f"metrics at {self.url}")
        self._notifier.ready()
        self._vigil.begin()
        apply_at_hang_up(self.reactor, self.apply, self._vigil)

    def _listen(self, factory: Any) -> Any:
        """Serve; on a Unix socket with mode 0660, in place of what a killed console has left."""
        if self._socket is not None:
            return self.reactor.adoptStreamPort(self._socket.fileno(), self._socket.family, factory)
        path = Path(self._host.console.path)
        if path.is_socket():
            path.unlink()
        mask = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            return self.reactor.listenUNIX(os.fspath(path), factory, mode=_SOCKET_MODE)
        except CannotListenError as error:
            why = os.strerror(getattr(error.socketError, "errno", 0) or errno.EADDRINUSE)
            raise self._cannot_listen(why) from None
        finally:
            os.umask(mask)

    @inlineCallbacks
    def stopService(self) -> Any:  # noqa: N802
        """Stop serving; part of IService."""
        ignore_hang_up()
        _log.info("{daemon} is told to end", daemon=self.daemon)
        self._notifier.stopping()
        super().stopService()
        self._vigil.end()
        if self._port is not None:
            yield self._port.stopListening()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        yield self._control.stop()
        self._pid_file.release()

    # -- what it serves -------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the metrics are."""
        listen = self._host.console
        if listen.path:
            return str(listen)
        return f"{'http' if self._tls is None else 'https'}://{listen}/metrics"

    def _token(self) -> bytes:
        """Give the token as its file has it now.

        :raises ConfigError: there is none.
        """
        return load_token(self._host.metrics_token_file)

    def _metrics(self) -> Deferred[tuple[bytes, str]]:
        def rendered(look: Look) -> tuple[bytes, str]:
            return render(look), CONTENT_TYPE

        return self._looking.look().addCallback(rendered)

    def _ask_self(self, seconds: float) -> Deferred[Any]:
        asked: Deferred[Any] = ask(self.reactor, self._control.path, Status, seconds)
        return asked

    # -- control channel and signals ------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Give the console's Status."""
        return {
            "name": self.daemon,
            "role": "console",
            "host": self._host.name,
            "pid": os.getpid(),
            "since": self._since,
            "url": self.url,
            "groups": [],
        }

    def apply(self) -> dict[str, list[Any]]:
        """Take up another token file or certificate; the configuration is looked at anyway.

        :raises ConfigError: what is configured cannot be used; nothing was changed.
        """
        host = load_host(self.paths)
        if host.console != self._host.console:
            raise ConfigError(
                f"{self.paths.host_config}: console: changed from {self._host.console} to "
                f"{host.console}",
                hint="restart qdsconsole",
            )
        load_token(host.metrics_token_file)
        if self._tls is not None:
            self._tls.reload(host)
        self._host = host
        return {"errors": []}


def makeService(options: Any) -> ConsoleDaemon:  # noqa: N802
    """Make the service for twistd."""
    return make_service(ConsoleDaemon, options)


__all__ = ["ConsoleDaemon", "Options", "makeService"]
