"""Every bound of the system, with its unit in its name; relations between them are asserted."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# -- groups and configuration (patent: "up to 512 logical groups") ---------------------------
GROUPS_MAX = 512
LDSUS_PER_GROUP_MAX = 4096
CONFIG_FILE_BYTES_MAX = MIB

# -- writelog and journal ---------------------------------------------------------------------
#: Records start on multiples of this, or of the physical block where that is larger.
RECORD_ALIGN_BYTES = 4096
#: Payload bytes of one frame; a smaller log lowers it (core.records.frame_cap).
FRAME_PAYLOAD_BYTES_MAX = MIB
FRAME_ENTRIES_MAX = 4096
#: Header, entry table and payload of one frame: what a reader may have to buffer.
FRAME_BYTES_MAX = FRAME_PAYLOAD_BYTES_MAX + 16 * FRAME_ENTRIES_MAX + 4096
#: One zero or trim entry covers at most this, though no payload travels (rules.md 25).
ZERO_ENTRY_BYTES_MAX = 64 * MIB
WRITELOG_BYTES_MIN = 150 * KIB
WRITELOG_BYTES_WARN = 2 * MIB
GENERATIONS_MAX = 16
#: Part of a ring that only control frames (void, break, refresh end) may use (rules.md 9).
CONTROL_RESERVE_BYTES = 32 * KIB
#: A refresh leaves at least this part of the ring to the application.
REFRESH_RING_SHARE = 0.5
REFRESH_READ_BYTES = FRAME_PAYLOAD_BYTES_MAX
METADATA_ENTRIES_DEFAULT = 4096
METADATA_SECONDS_DEFAULT = 1.0

# -- driver -----------------------------------------------------------------------------------
#: Answered or framed, not yet durable and applied; beyond it framing waits.
UNAPPLIED_BYTES_MAX = 32 * MIB
#: Payload and read bytes of unanswered requests, for all connections of one child.
REQUEST_BUDGET_BYTES = 32 * MIB
#: Without anyone waiting for durability, commits are at least this far apart.
COMMIT_INTERVAL_SECONDS = 0.001

# -- NBD (security.md 6) ------------------------------------------------------------------------
NBD_PAYLOAD_BYTES_MAX = 32 * MIB
NBD_OPTIONS_MAX = 32
NBD_NAME_BYTES_MAX = 4096
NBD_REQUESTS_MAX = 128
NBD_CONNECTIONS_MAX = 64
NBD_RECEIVE_BYTES = 256 * KIB
NBD_HANDSHAKE_SECONDS = 10.0

# -- link -------------------------------------------------------------------------------------
DEFAULT_PORT = 575
SEND_WINDOW_BYTES = 16 * MIB
#: One buffer read from the writelogs and sent as one write.
SEND_BUFFER_BYTES = MIB
STREAM_MESSAGE_BYTES_MAX = FRAME_BYTES_MAX + 64
HANDSHAKE_SECONDS = 10.0
HANDSHAKE_BOX_KEYS_MAX = 32
HANDSHAKE_BOX_BYTES_MAX = 64 * KIB
UNAUTHENTICATED_MAX = 16
UNAUTHENTICATED_PER_ADDRESS_MAX = 4
PING_SECONDS = 5.0
SILENT_PEER_SECONDS = 20.0
RECONNECT_SECONDS_MIN = 0.1
RECONNECT_SECONDS_MAX = 5.0
#: After a refusal (identity, configuration, divergence) the next try comes this late.
REFUSED_RETRY_SECONDS = 60.0
#: Frames received and not yet durable in the secondary journal; beyond it reading pauses.
RECEIVED_BYTES_MAX = 8 * MIB
#: Frames durable in the journal and not yet applied; beyond it reading pauses.
UNMIRRORED_BYTES_MAX = 32 * MIB

# -- control ----------------------------------------------------------------------------------
CONTROL_JSON_BYTES_MAX = 8 * MIB
CONTROL_CONNECTIONS_MAX = 64
CHILD_RESTART_SECONDS_MIN = 0.1
CHILD_RESTART_SECONDS_MAX = 5.0
STOP_SECONDS_MAX = 30.0

assert FRAME_PAYLOAD_BYTES_MAX <= SEND_BUFFER_BYTES <= SEND_WINDOW_BYTES
assert FRAME_BYTES_MAX < STREAM_MESSAGE_BYTES_MAX < RECEIVED_BYTES_MAX
assert CONTROL_RESERVE_BYTES * 3 <= WRITELOG_BYTES_MIN
assert PING_SECONDS * 2 < SILENT_PEER_SECONDS
assert NBD_PAYLOAD_BYTES_MAX <= REQUEST_BUDGET_BYTES
assert UNAUTHENTICATED_PER_ADDRESS_MAX <= UNAUTHENTICATED_MAX
