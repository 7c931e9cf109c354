"""What is configured: a host, a logical group, its LDSUs and tunables."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from qdsmirror.configvalues import Listen, NetworkPath, Relay, memory_bytes, parse_relay
from qdsmirror.core.throttles import Throttle
from qdsmirror.limits import (
    BEFORE_IMAGE_BYTES_DEFAULT,
    CHILDREN_DEFAULT,
    COMPARE_CHUNK_BYTES,
    CONSOLE_PORT,
    METADATA_ENTRIES_DEFAULT,
    METADATA_SECONDS_DEFAULT,
    NEAR_SYNC_ENTRIES_DEFAULT,
    PERF_INTERVAL_SECONDS,
    PRF_LIMIT_BYTES,
    RECONNECT_SECONDS_MAX,
    SEND_WINDOW_BYTES,
    THROTTLE_INTERVAL_SECONDS,
    VERIFY_RATE_BYTES,
)

Role = Literal["primary", "secondary"]

#: Where the devices of the extension pool stand.
POOL_KEY = ("pool", "devices")


@dataclass(frozen=True)
class HostConfig:
    """``qds.cfg``.

    :ivar name: this host's identity, in lower case; its certificate bears it.
    :ivar certificate: PEM file; default ``host.pem`` beside ``qds.cfg``.
    :ivar key: PEM file; default ``host.key``.
    :ivar ca: PEM file; default ``ca.pem``.
    :ivar user: whom the daemons run as; empty: whoever starts them.
    :ivar children: child processes per daemon at most; more groups share them (rules.md 18).
    :ivar mail_relay: ``HOST`` or ``HOST:PORT`` that takes what throttles mail; empty: none does.
    :ivar allow_exec: whether throttles may run programs; honoured only where the file is safe
        (:func:`qdsmirror.configsafety.why_unsafe`).
    :ivar console: where the console daemon listens.
    :ivar metrics_token_file: the token that whoever reads the metrics shows; default
        ``metrics.token``.
    """

    name: str
    certificate: Path
    key: Path
    ca: Path
    user: str = ""
    children: int = CHILDREN_DEFAULT
    mail_relay: str = ""
    allow_exec: bool = False
    console: Listen = Listen("127.0.0.1", CONSOLE_PORT)
    metrics_token_file: Path = Path("metrics.token")

    @property
    def relay(self) -> Relay | None:
        """The mail relay, taken apart."""
        return parse_relay(self.mail_relay) if self.mail_relay else None


@dataclass(frozen=True)
class Tunables:
    """The ``[tunables]`` of a group.

    :ivar metadata_entries: superblocks are updated at least every so many entries.
    :ivar metadata_seconds: and at least this often while there is something to record.
    :ivar send_window: bytes sent and not yet acknowledged.
    :ivar reconnect_max: longest pause between two attempts to connect, seconds.
    :ivar verify_every: seconds from the end of a verify to the next; 0: none begins by itself.
    :ivar verify_rate: bytes that a verify reads in a second at most.
    :ivar chunk_size: bytes by which refresh and backfresh compare, a power of two.
    :ivar auto_refresh: whether a group leaves the bypass of an overflow by itself.
    :ivar checkpoint_hold: whether a checkpoint on the secondary is released before its journal is
        full (``release``), or makes the primary wait (``strict``).
    :ivar compression: on the wire: ``none``, ``lz4``, ``zstd`` or ``zstd:LEVEL``.
    :ivar before_image_bytes: of a journal's device, at most, for what a refresh overwrites.
    :ivar before_images_full: what happens when they are used up: rolling back is given up
        (``give-up``), or the refresh stops (``stop``).
    :ivar perf_interval: seconds between two rows of the performance tracking file.
    :ivar prf_limit: bytes up to which that file grows.
    :ivar throttle_interval: seconds between two evaluations of the throttles.
    """

    metadata_entries: int = METADATA_ENTRIES_DEFAULT
    metadata_seconds: float = METADATA_SECONDS_DEFAULT
    send_window: int = SEND_WINDOW_BYTES
    reconnect_max: float = RECONNECT_SECONDS_MAX
    auto_refresh: bool = False
    verify_every: float = 0.0
    verify_rate: int = VERIFY_RATE_BYTES
    chunk_size: int = COMPARE_CHUNK_BYTES
    checkpoint_hold: str = "release"
    compression: str = "none"
    before_image_bytes: int = BEFORE_IMAGE_BYTES_DEFAULT
    before_images_full: str = "give-up"
    perf_interval: float = PERF_INTERVAL_SECONDS
    prf_limit: int = PRF_LIMIT_BYTES
    throttle_interval: float = THROTTLE_INTERVAL_SECONDS


@dataclass(frozen=True)
class LdsuConfig:
    """A local data storage unit.

    :ivar index: its position in the file, from 0; the two sides' positions agree.
    :ivar name: unique on the host; the name of its NBD export.
    :ivar data_device: absolute path at the primary.
    :ivar writelog_device: likewise, or ``memory:SIZE``.
    :ivar bitmap_device: absolute path at the primary, for a writelog in memory; else empty.
    :ivar mirror_device: absolute path at the secondary.
    """

    index: int
    name: str
    data_device: str
    writelog_device: str
    mirror_device: str
    bitmap_device: str = ""

    @property
    def memory_bytes(self) -> int:
        """What the writelog takes of the memory; 0 where it is a device."""
        return memory_bytes(self.writelog_device)

    @property
    def log_device(self) -> str:
        """The device on which the writelog, or what of it is not in memory, is kept."""
        return self.bitmap_device or self.writelog_device


@dataclass(frozen=True)
class GroupConfig:
    """``dsgrpNNN.cfg``: a logical group.

    :ivar number: NNN; ``name`` is ``dsgrpNNN``; ``path`` is the file.
    :ivar primary_host: the primary's name, in lower case; likewise ``secondary_host``.
    :ivar primary_address: IP address or host name; default: the host's name.
    :ivar secondary_address: where the rmd is reached, at ``port``.
    :ivar journal_device: absolute path at the secondary.
    :ivar paths: the network paths that were configured, none where the one that the addresses
        give is the only one.
    :ivar pool: absolute paths, at the primary, of the devices by which writelogs are extended.
    :ivar operation: ``async``, ``sync`` or ``near-sync``: when a write is answered with regard to
        the secondary.
    :ivar on_disconnect: ``block`` or ``async``: what happens then to writes that the secondary
        cannot commit.
    :ivar near_sync_entries: answered entries that it may lack in near-synchronous operation.
    :ivar throttles: in the file's order; they may differ on the two systems.
    """

    number: int
    name: str
    path: Path
    operation: str
    durability: str
    on_overflow: str
    primary_host: str
    primary_address: str
    secondary_host: str
    secondary_address: str
    port: int
    journal_device: str
    tunables: Tunables
    ldsus: tuple[LdsuConfig, ...]
    pool: tuple[str, ...] = ()
    on_disconnect: str = "block"
    near_sync_entries: int = NEAR_SYNC_ENTRIES_DEFAULT
    paths: tuple[NetworkPath, ...] = ()
    throttles: tuple[Throttle, ...] = ()

    @property
    def ways(self) -> tuple[NetworkPath, ...]:
        """All network paths to the secondary, each with its port; one at least."""
        paths = self.paths or (NetworkPath("", self.secondary_address),)
        return tuple(path._replace(port=path.port or self.port) for path in paths)

    @property
    def in_memory(self) -> bool:
        """Whether its writelogs are in memory: all of them are, or none."""
        return any(ldsu.memory_bytes for ldsu in self.ldsus)

    def of_data_path(self) -> GroupConfig:
        """Give what matters to who moves data, without what only those go by who watch."""
        others = Tunables()
        plain = replace(
            self.tunables,
            throttle_interval=others.throttle_interval,
            perf_interval=others.perf_interval,
            prf_limit=others.prf_limit,
        )
        return replace(self, throttles=(), tunables=plain)

    def role_of(self, host: str) -> Role | None:
        """Tell which part a host plays in this group, by its configured name."""
        if host == self.primary_host:
            return "primary"
        return "secondary" if host == self.secondary_host else None

    def identity_digest(self) -> bytes:
        """Give the 32 bytes that must be equal on both systems (handshake, ``Hello``).

        They cover identity only: hosts, group, LDSU names in order, mirror devices and journal;
        addresses and tunables may differ, and sizes are checked when LDSUs are mapped.
        """
        fields = ["qdsmirror group 1", self.name, self.primary_host, self.secondary_host]
        fields.append(self.journal_device)
        for ldsu in self.ldsus:
            fields += [ldsu.name, ldsu.mirror_device]
        digest = blake3()
        for text in fields:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        return digest.digest()

    def comparable(self) -> dict[str, Any]:
        """Give the keys that both systems' files have, less the LDSUs, as plain values.

        Those of :meth:`identity_digest` must be equal; others may differ.
        """
        return {
            "primary.host": self.primary_host,
            "secondary.host": self.secondary_host,
            "secondary.journal_device": self.journal_device,
            "secondary.port": self.port,
            "operation": self.operation,
            "durability": self.durability,
            "on_overflow": self.on_overflow,
            "on_disconnect": self.on_disconnect,
            "near_sync_entries": self.near_sync_entries,
            **{f"tunables.{key}": value for key, value in asdict(self.tunables).items()},
        }

    def devices(self) -> list[tuple[tuple[str, ...], str, str]]:
        """Give (key, host, path) of every device that the group uses, the path normalised."""
        found: list[tuple[tuple[str, ...], str, str]] = []
        journal = ("secondary", "journal_device")
        found.append((journal, self.secondary_host, self.journal_device))
        found += [(POOL_KEY, self.primary_host, path) for path in self.pool]
        for ldsu in self.ldsus:
            for key, host in (
                ("data_device", self.primary_host),
                ("bitmap_device" if ldsu.memory_bytes else "writelog_device", self.primary_host),
                ("mirror_device", self.secondary_host),
            ):
                found.append((("ldsus", ldsu.name, key), host, getattr(ldsu, key)))
        return [
            (key, host, os.path.normpath("/" + path.lstrip("/")))
            for key, host, path in found
            if path
        ]
