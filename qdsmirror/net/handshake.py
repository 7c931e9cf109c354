"""The patent's handshake between pmd and rmd, over mutual TLS, up to the frame stream.

::

    primary (TLS client)                         secondary (TLS server)
    Hello(version, group, digest, nonce)    ->   compare
                                            <-   version, digest, nonce
    Authenticate(proof as primary)          ->   verify
                                            <-   proof as secondary
    MapLDSU(index, name, size), each        ->   match with the mirror device
                                            <-   ACK: where its history ends, or ERR and reason
    [Rebase(...), each: a full refresh      ->   replace the history]
    Start(session)                          ->   switch
    frame stream                           <->   frame stream

A connection that is to be a further path of a session says ``Join(session)`` once it has
authenticated, instead of all that follows; only the session that there is can be joined.

A side that refuses says why: the secondary by an error answer, the primary by ``Refuse``.  Before
TLS is complete the reason travels as a TLS alert (``net.tls.why_lost``).

Source: architecture.md "Protocol", security.md 1-4, rules.md 7, 8 and 17.
"""

from qdsmirror.net.handshake_commands import RebasePosition, UnitPosition
from qdsmirror.net.handshake_primary import PrimaryHandshake, PrimaryOffer, UnitOffer
from qdsmirror.net.handshake_remote import IRemoteAuthority, RemoteHandshake

__all__ = [
    "IRemoteAuthority",
    "PrimaryHandshake",
    "PrimaryOffer",
    "RebasePosition",
    "RemoteHandshake",
    "UnitOffer",
    "UnitPosition",
]
