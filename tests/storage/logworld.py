"""Logs on memory devices, filled frame by frame as the driver and the rmd fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self
from unittest import mock

from qdsmirror.config import GroupConfig, LdsuConfig, Tunables
from qdsmirror.core import frames
from qdsmirror.core.frames import ENTRIES, WITH_PAYLOAD, Buffer, Entry, build_header, entry_table
from qdsmirror.core.records import BEGINNING, BoundUnit, Generation, Point
from qdsmirror.core.superblock import Superblock
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage import writelog as writelog_module
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice

KIB = 1024
GENERATION = bytes(range(16))
OTHER_GENERATION = bytes(range(16, 32))
LOG = bytes(range(100, 116))
TIME_NS = 1_700_000_000_000_000_000


def write(offset: int, payload: bytes) -> Entry:
    return Entry(offset, len(payload), frames.WRITE, payload)


class FrameMaker:
    """Makes the frames of a group in the order of their GSNs."""

    def __init__(self, generation: bytes = GENERATION) -> None:
        self.generation = generation
        self.gsn = 1
        self.points: dict[int, Point] = {}

    def make(
        self,
        ldsu: int,
        entries: Sequence[Entry] = (),
        *,
        kind: int = ENTRIES,
        control: bytes = b"",
        durable: int = 0,
        gsns: int = 0,
        **changes: Any,
    ) -> bytes:
        """Make the next frame of an LDSU.

        :param gsns: numbers that a void takes.
        :param changes: of the header, against what would be right.
        """
        sequence, chain = self.points.get(ldsu, BEGINNING)
        body: list[Buffer] = [entry_table(entries)]
        body += [e.payload for e in entries if e.kind in WITH_PAYLOAD and e.payload is not None]
        if control:
            body.append(control)
        fields: dict[str, Any] = {
            "kind": kind,
            "ldsu": ldsu,
            "generation": self.generation,
            "sequence": sequence,
            "gsn_first": self.gsn,
            "gsn_count": gsns or len(entries) or 1,
            "durable_gsn": durable,
            "time_ns": TIME_NS,
            "previous_chain": chain,
            "entry_count": len(entries),
            "body": body,
        }
        fields.update(changes)
        header, chain = build_header(**fields)
        self.gsn = fields["gsn_first"] + fields["gsn_count"]
        self.points[ldsu] = Point(fields["sequence"] + 1, chain)
        return header + b"".join(body)


def initialise(
    device: IBlockDevice,
    *,
    role: str = "writelog",
    sizes: Sequence[int] = (64 * KIB,),
    first: int = 0,
    generations: Sequence[Generation] = (Generation(GENERATION, 1),),
    log: bytes = LOG,
    before_bytes: int = 0,
) -> Writelog:
    """Initialise a log with a known UUID, for LDSUs of these sizes from index ``first`` on."""
    units = [
        BoundUnit(index, f"qds{index}", size, f"/data{index}")
        for index, size in enumerate(sizes, first)
    ]
    with mock.patch.object(writelog_module.os, "urandom", lambda length: log[:length]):
        return Writelog.initialise(
            device,
            role=role,
            group=0,
            units=units,
            generations=generations,
            before_bytes=before_bytes,
        )


def append(log: Writelog, frame: bytes, *, control: bool = False, durable: int = 0) -> int:
    """Append a frame, unsynced; give the position of its record.

    :param durable: the position up to which the log is durable, as the record says.
    """
    placement = log.place(len(frame), control=control)
    assert placement is not None, "the log is full"
    log.write(log.record(placement, len(frame), [frame], durable))
    return placement.position


def config(
    units: int = 1, *, number: int = 0, names: Mapping[int, str] | None = None
) -> GroupConfig:
    """A group of LDSUs with devices /dataN, /logN and /mirrorN and the journal /journal."""
    return GroupConfig(
        number=number,
        name=f"dsgrp{number:03d}",
        path=Path(f"/etc/qds/dsgrp{number:03d}.cfg"),
        operation="async",
        durability="flush",
        on_overflow="block",
        primary_host="primary",
        primary_address="127.0.0.1",
        secondary_host="secondary",
        secondary_address="127.0.0.1",
        port=575,
        journal_device="/journal",
        tunables=Tunables(),
        ldsus=tuple(
            LdsuConfig(
                index=index,
                name=(names or {}).get(index, f"qds{index}"),
                data_device=f"/data{index}",
                writelog_device=f"/log{index}",
                mirror_device=f"/mirror{index}",
            )
            for index in range(units)
        ),
    )


def opener(devices: Mapping[str, MemoryDevice]) -> Callable[..., IBlockDevice]:
    """Give an ``open_device`` over memory devices, by path."""

    def open_device(path: str, *, writable: bool, role: str, **_: Any) -> IBlockDevice:
        device = devices[path]
        device.role = role
        return device

    return open_device


class MirrorSite:
    """A secondary of two LDSUs, on memory devices.

    :ivar devices: ``/journal``, ``/mirror0`` and ``/mirror1``.
    """

    def __init__(self, config: GroupConfig, devices: dict[str, MemoryDevice]) -> None:
        self.config = config
        self.devices = devices
        self.maker = FrameMaker()

    def open(self) -> Mirror:
        return Mirror.open(self.config, opener(self.devices))

    def crash(self, choose: Any) -> None:
        self.devices = {path: device.crash(choose) for path, device in self.devices.items()}

    def copy(self) -> Self:
        """Give one with devices of its own, that hold what is durable here."""
        other = copy(self)
        other.devices = {
            path: MemoryDevice(device.size, path=path, content=device.durable())
            for path, device in self.devices.items()
        }
        return other

    def contents(self) -> list[bytes]:
        return [self.devices[f"/mirror{index}"].durable() for index in range(2)]

    @property
    def superblock(self) -> Superblock:
        return read_superblock(self.devices["/journal"])
