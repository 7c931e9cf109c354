"""Mail: one message to the relay (RFC 5321), under TLS where that offers it."""

# Twisted's smtp has no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import io
from email.message import EmailMessage
from email.policy import default
from email.utils import formatdate, make_msgid
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.threads import deferToThreadPool

from qdsmirror.configvalues import Relay
from qdsmirror.errors import QdsError

_CONNECT_SECONDS = 30


def compose(sender: str, recipient: str, subject: str, body: str) -> bytes:
    """Give a message; no text can add a header or another recipient.

    :param sender: an address; ``recipient``: likewise, or a name that the relay knows.
    """
    message = EmailMessage(policy=default.clone(cte_type="7bit"))
    message["From"] = sender
    message["To"] = recipient
    message["Subject"] = " ".join(subject.split())
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=sender.partition("@")[2])
    # RFC 3834: nobody's absence note shall answer.
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(body)
    return message.as_bytes()


@inlineCallbacks
def send_mail(
    reactor: Any, relay: Relay, sender: str, recipient: str, message: bytes, seconds: float
) -> Any:
    """Give a message to the relay; fires when that has it.

    Cancelled, it ends the session with the relay.

    :param seconds: for the whole.
    :raises QdsError: the relay was not reached, refuses it, or did not answer in time.
    :raises CancelledError: it was cancelled.
    """
    # On its first import Twisted's module asks the resolver for this host's name, and waits.
    smtp = yield deferToThreadPool(reactor, reactor.getThreadPool(), _load)

    def cancel(_sent: Deferred[Any]) -> None:
        # Else it would tell of the session's end, too.
        factory.sendFinished = True
        _give_up(factory, connector)

    sent: Deferred[Any] = Deferred(cancel)
    factory = smtp.ESMTPSenderFactory(
        None,
        None,
        sender,
        [recipient],
        io.BytesIO(message),
        sent,
        retries=0,
        timeout=seconds,
        # As between mail servers (RFC 7435): the alternative is no encryption at all.
        contextFactory=_encryption(),
        heloFallback=True,
        requireAuthentication=False,
        requireTransportSecurity=False,
    )
    factory.noisy = False
    connector = reactor.connectTCP(relay.host, relay.port, factory, timeout=_CONNECT_SECONDS)
    timer = reactor.callLater(seconds, _give_up, factory, connector)
    try:
        yield sent
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - Twisted's tree of errors, and the system's
        text = " ".join(str(error).split())
        raise QdsError(
            f"the mail relay {relay.host} port {relay.port}: {text}", "see mail_relay in qds.cfg(5)"
        ) from None
    finally:
        if timer.active():
            timer.cancel()


def _load() -> Any:
    from twisted.mail import smtp

    return smtp


def _encryption() -> Any:
    from twisted.internet.ssl import CertificateOptions

    return CertificateOptions()


def _give_up(factory: Any, connector: Any) -> None:
    """End an attempt that takes too long; it fails then as a connection that was lost."""
    if factory.currentProtocol is not None and factory.currentProtocol.transport is not None:
        factory.currentProtocol.transport.abortConnection()
    else:
        connector.disconnect()
