"""The only code that touches a device: block devices, their I/O workers, the writelog."""
