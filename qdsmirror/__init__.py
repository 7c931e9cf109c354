"""Ordered, journaled remote mirroring of block devices in user space."""

__version__ = "0.1.0"
