"""Thin Twisted shells: TLS and identity, NBD server, control channel, handshake, link."""
