"""Peers' addresses as people write them."""

from __future__ import annotations

import ipaddress


def plain_address(text: str) -> str:
    """Give an address without its IPv6 wrapping: ``::ffff:192.0.2.1`` is ``192.0.2.1``.

    A socket that takes IPv4 and IPv6 alike shows IPv4 peers that way (RFC 4291, 2.5.5.2).  Anything
    else is given back as it is.
    """
    try:
        mapped = ipaddress.IPv6Address(text).ipv4_mapped
    except ValueError:
        return text
    return text if mapped is None else str(mapped)
