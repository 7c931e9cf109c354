"""Every bound of the system, with its unit in its name; relations between them are asserted."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# -- groups and configuration (patent: "up to 512 logical groups") ---------------------------
GROUPS_MAX = 512
LDSUS_PER_GROUP_MAX = 4096
CONFIG_FILE_BYTES_MAX = MIB
#: An extension pool's devices stand in one line.
CONFIG_LINE_CHARS_MAX = 16 * KIB
#: Problems named for one file; more are counted, not listed.
CONFIG_PROBLEMS_MAX = 100
LDSU_NAME_CHARS_MAX = 64
HOST_NAME_CHARS_MAX = 253
DEVICE_PATH_BYTES_MAX = 4095
CHILDREN_DEFAULT = 8
#: Where the console daemon listens on the loopback address.
CONSOLE_PORT = 9575
SECRET_BYTES = 32
#: Network paths of a group.
PATHS_MAX = 8
CA_CERTIFICATE_DAYS = 3650
HOST_CERTIFICATE_DAYS = 825
CERTIFICATE_WARN_DAYS = 30
CERTIFICATE_ALARM_DAYS = 7
DAY_SECONDS = 86400.0
CERTIFICATE_LOOK_SECONDS = DAY_SECONDS
METADATA_ENTRIES_MIN = 1
METADATA_ENTRIES_MAX = 1_000_000
METADATA_SECONDS_MIN = 0.1
METADATA_SECONDS_MAX = 60.0
SEND_WINDOW_BYTES_MIN = MIB
SEND_WINDOW_BYTES_MAX = 64 * MIB
#: The range of the tunable reconnect_max; RECONNECT_SECONDS_MAX is its default.
RECONNECT_MAX_SECONDS_MIN = 0.1
RECONNECT_MAX_SECONDS_MAX = 300.0

# -- throttles (patent: "each throttle may have up to sixteen actions") --------------------------
THROTTLE_ACTIONS_MAX = 16
#: "In one exemplary implementation, throttles are evaluated every ten seconds by default".
THROTTLE_INTERVAL_SECONDS = 10.0
THROTTLE_INTERVAL_SECONDS_MIN = 1.0
THROTTLE_INTERVAL_SECONDS_MAX = 3600.0
THROTTLE_NAME_CHARS_MAX = 64
#: Before each entry is sent, and before a write is answered.
THROTTLE_SLEEP_USEC_MAX = 10_000_000
THROTTLE_LIMIT_KBPS_MAX = 100_000_000
#: Of one text, or of one word of a program's arguments; and how many of these.
THROTTLE_TEXT_CHARS_MAX = 1024
THROTTLE_WORDS_MAX = 64
#: Where the pauses before entries end late, the next ones count from the time at which they should
#: have, so much earlier at most.
PAUSE_BEHIND_SECONDS_MAX = 0.1
#: Under a limit, what it lets through in this time is sent at once, and saved at most.
LIMIT_BURST_SECONDS = 0.1

# -- writelog and journal ---------------------------------------------------------------------
#: Records start on multiples of this, or of the physical block where that is larger.
RECORD_ALIGN_BYTES = 4096
#: Payload bytes of one frame; a smaller log lowers it (core.records.frame_cap).
FRAME_PAYLOAD_BYTES_MAX = MIB
FRAME_ENTRIES_MAX = 4096
#: Header, entry table and payload of one frame: what a reader may have to buffer.
FRAME_BYTES_MAX = FRAME_PAYLOAD_BYTES_MAX + 16 * FRAME_ENTRIES_MAX + 4 * KIB
#: One zero or trim entry covers at most this, though no payload travels (rules.md 25).
ZERO_ENTRY_BYTES_MAX = 64 * MIB
WRITELOG_BYTES_MIN = 150 * KIB
WRITELOG_BYTES_WARN = 2 * MIB
#: What a memory writelog may take of the memory; the least holds a ring of WRITELOG_BYTES_MIN.
MEMORY_LOG_BYTES_MIN = 192 * KIB
MEMORY_LOG_BYTES_MAX = 1024 * GIB
#: The first page of a memory writelog's memory says whose it is.
MEMORY_HEADER_BYTES = 4 * KIB
#: A chunk that a memory writelog has not written for so long, and whose writes the secondary has,
#: counts as clean; up to twice as late.
MEMORY_SETTLE_SECONDS = 5.0
#: At an orderly stop a secondary that is connected gets so long to commit what stands in memory.
MEMORY_DRAIN_SECONDS = 5.0
GENERATIONS_MAX = 16
#: Devices of a group's extension pool; of these, chained to one writelog (both the patent's).
EXTENSIONS_PER_GROUP_MAX = 128
EXTENSIONS_PER_LOG_MAX = 15
#: Each one that is chained divides an extent at most, and is one itself; one that is being freed
#: may hold both ends of what is needed.
EXTENTS_MAX = 2 * EXTENSIONS_PER_LOG_MAX + 2
#: An extension holds at least so many records of the least size.
EXTENSION_RECORDS_MIN = 16
#: Part of a ring that only control frames (void, break, refresh end) may use (rules.md 9).
CONTROL_RESERVE_BYTES = 32 * KIB
#: It holds so many of them, however large the physical block.
CONTROL_RECORDS_MIN = 4
#: A refresh leaves at least this part of the ring to the application ...
REFRESH_RING_SHARE = 0.5
#: ... save that of a fuller one, too, it gets one byte of so many that become free.
REFRESH_TURN = 8
#: A failed read of a refresh is tried again this late, doubling, for as long as it goes on.
REFRESH_RETRY_SECONDS_MIN = 1.0
REFRESH_RETRY_SECONDS_MAX = 60.0
REFRESH_READ_BYTES = FRAME_PAYLOAD_BYTES_MAX
#: A comparison with the mirror goes by chunks (a power of two, by default the first), and by spans
#: of so many bytes ...
COMPARE_CHUNK_BYTES = 64 * KIB
COMPARE_CHUNK_BYTES_MIN = 4 * KIB
COMPARE_CHUNK_BYTES_MAX = MIB
COMPARE_SPAN_BYTES = 4 * MIB
#: ... so many of them in flight, of which so many are being hashed here: application reads have the
#: other read threads.
COMPARE_SPANS_MAX = 6
COMPARE_HASHES_MAX = 2
#: Ranges found to differ that wait to be sent.
COMPARE_RANGES_MAX = 4096
#: A verify compares hashes of so much each, and of so many in one frame ...
VERIFY_CHUNK_BYTES = 64 * KIB
VERIFY_ROWS_MAX = 16
#: ... so that it reads, and holds writes back from, so much at a time.
VERIFY_READ_BYTES = VERIFY_ROWS_MAX * VERIFY_CHUNK_BYTES
#: A hole is compared by this much, without a hash; for the pace it counts as one chunk.
VERIFY_ZERO_BYTES_MAX = 8 * MIB
#: Frames of a verify that the secondary has not reported on.
VERIFY_FRAMES_MAX = 16
#: Beside an application that is at work, or a log that is half full, a verify takes a turn this
#: late at most: so it reads 4 MiB in a second.
VERIFY_TURN_SECONDS = 0.25
#: So many requests in a second make an application that is at work.
VERIFY_BUSY_REQUESTS = 256
#: What the secondary has passed without a report, for so long, is sent again.
VERIFY_REPORT_SECONDS = 1.0
#: Of the ranges that differ, so many are kept of each LDSU; their bytes are counted on.
VERIFY_RANGES_MAX = 8
#: Of those that a secondary has found, it keeps so many, to tell of them again.
VERIFY_KEPT_MAX = 16
#: A scheduled run that was ended before its end is tried again this late at most.
VERIFY_RETRY_SECONDS_MAX = 3600.0
VERIFY_RATE_BYTES_MIN = 64 * KIB
VERIFY_RATE_BYTES_MAX = 16 * GIB
VERIFY_RATE_BYTES = 32 * MIB
VERIFY_EVERY_SECONDS_MIN = 1.0
VERIFY_EVERY_SECONDS_MAX = 366 * 86400.0
#: The dirty bitmap: a bit stands for so much at least; so many bits, and part of the log, at most.
BITMAP_CHUNK_BYTES_MIN = 64 * KIB
BITMAP_BITS_MAX = 1 << 20
BITMAP_LOG_SHARE = 16
#: It is written in such blocks.
BITMAP_BLOCK_BYTES = 4 * KIB
METADATA_ENTRIES_DEFAULT = 4096
METADATA_SECONDS_DEFAULT = 1.0

# -- backfresh ----------------------------------------------------------------------------------
#: It asks for so many blocks at once, and has so many spans (COMPARE_SPAN_BYTES) under way.
BACKFRESH_READ_BYTES = MIB
BACKFRESH_SPANS_MAX = 8
#: What it has done by then it records so often: a crash costs no more.
BACKFRESH_RECORD_SECONDS = 5.0
#: So long it waits for the link, and for the secondary to have all, before it begins.
BACKFRESH_DRAIN_SECONDS = 10.0
#: What fails on its way is tried again this late, doubling.
BACKFRESH_RETRY_SECONDS_MIN = 0.2
BACKFRESH_RETRY_SECONDS_MAX = 10.0
#: Of a path that superblocks keep.
KEEP_PATH_BYTES_MAX = 1024
#: What a file of kept blocks says of itself.
KEEP_HEADER_BYTES_MAX = MIB

# -- devices and workers ------------------------------------------------------------------------
#: Buffers of one pwritev: the kernel's UIO_MAXIOV.
DEVICE_IOV_MAX = 1024
DEVICE_ZERO_WRITE_BYTES = MIB
#: What the page cache keeps or forgets as one, at most: a huge page's.
DEVICE_FOLIO_BYTES_MAX = 2 * MIB
#: Longer reads are left to the read workers even when they are cached.
DEVICE_NOWAIT_BYTES_MAX = MIB
#: Extents told of one range; the rest counts as allocated.
DEVICE_EXTENTS_MAX = 4096
#: At an orderly stop both ends of a device, and so many chunks of those that its last writes
#: touched, are hashed (rules.md 24).
FINGERPRINT_END_BYTES = MIB
FINGERPRINT_CHUNK_BYTES = 64 * KIB
FINGERPRINT_CHUNKS_MAX = 64
FINGERPRINT_WRITES_MAX = 256
#: Of the ranges that somebody else changed, so many are named.
FINGERPRINT_RANGES_SHOWN = 3
#: Jobs run on the reactor thread while their moving average stays below this ...
INLINE_AVERAGE_SECONDS_MAX = 0.002
#: ... and each of them below this.
INLINE_JOB_SECONDS_MAX = 0.004
#: So long jobs go to the worker's thread after a slow one; doubled each time it happens again soon.
INLINE_RETRY_SECONDS_MIN = 0.05
INLINE_RETRY_SECONDS_MAX = 10.0
#: Jobs that follow one another inline may keep the reactor thread this long.
INLINE_BURST_SECONDS_MAX = 0.01

# -- driver -----------------------------------------------------------------------------------
#: Answered or framed, not yet durable and applied, by all groups of one child; beyond it framing
#: waits ...
UNAPPLIED_BYTES_MAX = 32 * MIB
#: ... but each group may have so much, whatever the others have.
UNAPPLIED_SHARE_BYTES = MIB
#: Behind the end of a scan, so far is looked for frames that were written later (rules.md 6).
SCAN_AHEAD_BYTES = 2 * UNAPPLIED_BYTES_MAX
#: While the link is up, or has just been given the chance to free the log by a refresh, a write
#: waits so long for room in a full writelog before that counts as an overflow.
OVERFLOW_WAIT_SECONDS = 1.0
OVERFLOW_AGAIN_SECONDS = 10.0
#: Of the reason that superblocks keep of a failed device.
FAILURE_REASON_CHARS_MAX = 200
#: Answered entries that the secondary may lack in near-synchronous operation.
NEAR_SYNC_ENTRIES_DEFAULT = 64
NEAR_SYNC_ENTRIES_MAX = 65536
#: Where more than so many must be caught up before answers can wait for the secondary again, that
#: is done step by step (on_disconnect = async).
CATCH_UP_ENTRIES = 1024
#: Uncommitted frames of a refresh, and of the group itself, that are told from the application's;
#: of more, all count as its own.
UNNUMBERED_MAX = 4096
#: At a stop, answers wait so long for the secondary that is connected.
STOP_ANSWER_SECONDS = 2.0
#: Payload and read bytes of unanswered requests, for all connections of one child.
REQUEST_BUDGET_BYTES = 32 * MIB
#: Without anyone waiting for durability, a commit follows a write this soon ...
COMMIT_DELAY_SECONDS = 0.001
#: ... but under load commits are this far apart: each one costs all three daemons a turn.
COMMIT_INTERVAL_SECONDS = 0.004

# -- NBD (security.md 6) ------------------------------------------------------------------------
NBD_PAYLOAD_BYTES_MAX = 32 * MIB
NBD_OPTIONS_MAX = 32
NBD_NAME_BYTES_MAX = 4096
NBD_REQUESTS_MAX = 128
NBD_CONNECTIONS_MAX = 64
NBD_RECEIVE_BYTES = 256 * KIB
NBD_HANDSHAKE_SECONDS = 10.0
#: Data of one option: two names (export, meta context query) and what stands around them.
NBD_OPTION_BYTES_MAX = 16 * KIB
#: A refused write's payload is read and dropped up to this; beyond it the connection is closed.
NBD_SKIP_BYTES_MAX = 64 * MIB
#: Replies a client has not read yet; beyond it its requests are not read either.
NBD_OUTGOING_BYTES_MAX = 4 * MIB
#: Extents in one block status reply: a client asks on for the rest.
NBD_EXTENTS_MAX = 4096
#: A client that makes others wait for the budget and itself does nothing is disconnected.
NBD_STALL_SECONDS = 10.0

# -- link -------------------------------------------------------------------------------------
DEFAULT_PORT = 575
#: Over a round trip of 100 ms as fast as TLS is without one.
SEND_WINDOW_BYTES = 48 * MIB
#: One buffer read from the writelogs and sent as one write.
SEND_BUFFER_BYTES = MIB
STREAM_MESSAGE_BYTES_MAX = FRAME_BYTES_MAX + 64
#: Letters that the peer has not said to have; all the questions' answers, and reports.
LETTERS_MAX = 4096
#: A shorter one goes over all paths at once; so does every report, for which ACKs wait.
LETTER_EVERYWHERE_BYTES_MAX = 65 * KIB
#: Questions about the mirror devices that wait for their answers.
QUESTIONS_MAX = 16
QUESTION_READ_BYTES_MAX = MIB
QUESTION_DIGESTS_BYTES_MAX = 32 * KIB
QUESTION_CHUNK_BYTES_MIN = 4 * KIB
#: Of a block, so many samples of this length tell whether compression shrinks it ...
COMPRESSION_SAMPLES = 4
COMPRESSION_SAMPLE_BYTES = 4 * KIB
#: ... by this part at least.
COMPRESSION_SHARE_SAVED = 1 / 16
#: After one that does not shrink so many bytes are not looked at; doubled each time.
COMPRESSION_BACKOFF_BYTES_MIN = 64 * KIB
COMPRESSION_BACKOFF_BYTES_MAX = 4 * MIB
#: Buffers of frames that are being compressed, and the threads for it: together as fast as TLS.
COMPRESSION_BUFFERS_MAX = 4
COMPRESSION_THREADS = 2
ZSTD_LEVEL_DEFAULT = 3
ZSTD_LEVEL_MAX = 19
#: A ClientHello longer than this is not read for its server name (RFC 8446: one record).
CLIENT_HELLO_BYTES_MAX = 16 * KIB
#: To authenticate; and again, to map the LDSUs and start.
HANDSHAKE_SECONDS = 10.0
HANDSHAKE_BOX_KEYS_MAX = 32
HANDSHAKE_BOX_BYTES_MAX = 64 * KIB
#: A certificate, key or CA file.
CERTIFICATE_FILE_BYTES_MAX = MIB
#: What is kept of an error text that the peer sent.
PEER_TEXT_CHARACTERS_MAX = 1024
#: What a secondary tells a visitor of a group, less its LDSUs: one value of one box.
PEER_FACTS_BYTES_MAX = 32 * KIB
assert PEER_FACTS_BYTES_MAX < HANDSHAKE_BOX_BYTES_MAX
#: Notes of a group that a visitor is told, the newest.
PEER_NOTES_MAX = 8
UNAUTHENTICATED_MAX = 16
UNAUTHENTICATED_PER_ADDRESS_MAX = 4
#: Of a log's end, and of any other text, so much goes into a support archive.
BUNDLE_LOG_BYTES = 4 * MIB
BUNDLE_TEXT_BYTES = MIB
#: Groups that a visiting process asks about at a time; the secondary counts its connections.
VISITS_AT_ONCE = 2
assert VISITS_AT_ONCE < UNAUTHENTICATED_PER_ADDRESS_MAX
#: A connection that has not sent its ClientHello by then makes room for another: well before the
#: deadline of one that waits in the backlog meanwhile, which counts from its own connecting.
HELLO_SECONDS = 4.0
#: Connections that are accepted and wait, untouched, for others of their address to end.
PARKED_CONNECTIONS_MAX = 64
PING_SECONDS = 5.0
SILENT_PEER_SECONDS = 20.0
RECONNECT_SECONDS_MIN = 0.1
RECONNECT_SECONDS_MAX = 5.0
#: After a refusal (identity, configuration, divergence) the next tries come so late: doubling, so
#: that none waits longer than has passed since the first, and at most this.
REFUSED_RETRY_SECONDS_MIN = 1.0
REFUSED_RETRY_SECONDS = 60.0
#: Frames received and not yet durable in the secondary journal; beyond it reading pauses.
RECEIVED_BYTES_MAX = 8 * MIB
#: Frames durable in the journal and not yet applied; beyond it reading pauses.
UNMIRRORED_BYTES_MAX = 32 * MIB
#: The primary learns this late at most what is on the mirror devices.
MIRRORED_TOLD_SECONDS = 0.01

# -- before-images (rules.md 15) -----------------------------------------------------------------
#: One is kept of a part of so much, once a refresh changes anything in it.
BEFORE_CHUNK_BYTES = 64 * KIB
#: Contents that are written and synced together.
BEFORE_BATCH_BYTES = 4 * MIB
#: Of a journal's device at most this part is for them, and less than this is of no use.
BEFORE_JOURNAL_SHARE = 0.5
BEFORE_AREA_BYTES_MIN = 256 * KIB
BEFORE_IMAGE_BYTES_DEFAULT = GIB
BEFORE_IMAGE_BYTES_MAX = 16 * 1024 * GIB

# -- checkpoint on the secondary ----------------------------------------------------------------
#: A checkpoint's name, and what a mark's frame has for it.
CHECKPOINT_NAME_BYTES_MAX = 64
#: A checkpoint that is not strict is released when so much of the journal is in use (rules.md 22):
#: what is left takes what arrives until the journal is freed.
CHECKPOINT_JOURNAL_SHARE = 0.75
#: Received, compressed or out of order, and not yet to be taken: all that a window lets come, twice
#: where a path was lost.
AHEAD_BYTES_MAX = 2 * (SEND_WINDOW_BYTES_MAX + SEND_BUFFER_BYTES + FRAME_BYTES_MAX)
#: With several paths a buffer is so short: what is behind a slow path's waits for it.
STRIPE_BYTES = 256 * KIB
#: And the kernel takes so much of it that it cannot send yet.
PATH_UNSENT_BYTES_MAX = 128 * KIB
#: A stripe goes over another path too when it was not acknowledged in so many times what stripes
#: need, but not before this time.
PATH_PATIENCE = 4
PATH_PATIENCE_SECONDS_MIN = 1.0
PATH_LOOK_SECONDS = 0.25
#: A path that needs longer for a stripe than this, and than another, is left out: all that comes
#: behind would wait.  What was measured is forgotten after some time.
PATH_STRIPE_SECONDS_MAX = 0.5
PATH_FORGET_SECONDS = 30.0

# -- statistics (performance tracking files, throttles) ----------------------------------------
PERF_INTERVAL_SECONDS = 10.0
PERF_INTERVAL_SECONDS_MIN = 1.0
PERF_INTERVAL_SECONDS_MAX = 3600.0
PRF_LIMIT_BYTES = 64 * KIB
PRF_LIMIT_BYTES_MIN = 16 * KIB
PRF_LIMIT_BYTES_MAX = 64 * MIB
#: Changes of modes are looked for this often at least.
MODES_INTERVAL_SECONDS = 10.0
#: A daemon that does not answer in this time is left out of a sample.
STATISTICS_ASK_SECONDS = 5.0
#: By so much, times its number, a group is looked at after the others.
STATISTICS_SPREAD_SECONDS = 0.01
#: Lines that may wait for the disk: more are dropped, and that is told.
TRACKING_LINES_MAX = 1024
EVENT_LINE_CHARS_MAX = 2048
#: Texts for the console, and errors, that are kept for whoever asks.
CONSOLE_TEXTS_KEPT = 64
#: Actions of throttles: how long one may take, how many of a kind may wait, and what is kept of
#: what a program says.
EXEC_SECONDS_MAX = 60.0
MAIL_SECONDS_MAX = 60.0
#: A mail that was not taken is tried again, so often in all, the first time after this, doubling.
MAIL_ATTEMPTS = 5
MAIL_RETRY_SECONDS = 10.0
#: The end of the process that mails waits so long for those that the relay does not have yet.
MAIL_END_SECONDS = 10.0
ORDER_SECONDS_MAX = 20.0
#: An action that keeps failing for the same reason is told again after this.
FAILURE_AGAIN_SECONDS = 3600.0
ACTIONS_WAITING_MAX = 64
EXEC_OUTPUT_BYTES_MAX = 1024
#: Changes of a group's modes that its driver keeps for whoever asks now and then.
MODE_CHANGES_KEPT = 32

# -- console ----------------------------------------------------------------------------------
#: Of the token that whoever reads the metrics shows (RFC 6750), without its padding.
TOKEN_CHARS_MIN = 32
TOKEN_CHARS_MAX = 256
#: The daemons are asked no more often than this, so many at once; one that does not answer in time
#: counts as down.
CONSOLE_LOOK_SECONDS = 1.0
CONSOLE_ASKS_MAX = 64
CONSOLE_ASK_SECONDS = 2.0
CONSOLE_CONNECTIONS_MAX = 64
#: A client that sends nothing, or does not take its answer, for so long is cut off.
CONSOLE_IDLE_SECONDS = 60.0
#: Of what comes behind a request's headers; nobody has anything to send.
CONSOLE_BODY_BYTES_MAX = 4096

# -- control ----------------------------------------------------------------------------------
CONTROL_JSON_BYTES_MAX = 8 * MIB
#: How long qdsconfigtool waits for a daemon to take up changed files.
APPLY_SECONDS = 60.0
CONTROL_CONNECTIONS_MAX = 64
CHILD_RESTART_SECONDS_MIN = 0.1
CHILD_RESTART_SECONDS_MAX = 5.0
#: A child that ran this long was healthy: its back-off starts anew.
CHILD_HEALTHY_SECONDS = 30.0
STOP_SECONDS_MAX = 30.0
#: Children are asked whether they live so often within a watchdog's time; the rest is for those
#: that are slow.
WATCHDOG_SHARE = 1 / 4
#: A child that has left so many questions unanswered is killed: one that has answered before, and
#: one that still loads its program.
UNANSWERED_MAX = 2
UNANSWERED_AT_START_MAX = 8
#: What systemctl shows of a daemon.
STATUS_TEXT_CHARACTERS_MAX = 240
#: A launch command waits so long for its daemon and that one's groups ...
LAUNCH_SECONDS_MAX = 120.0
#: ... and so long for a group whose start failed and is tried again.
LAUNCH_RETRY_SECONDS_MAX = 10.0
#: Messages between a master and a child: length, how many may wait, descriptors in one.
CHANNEL_MESSAGE_BYTES_MAX = 64 * KIB
CHANNEL_MESSAGES_MAX = 1024
CHANNEL_DESCRIPTORS_MAX = 4
#: Lines of the log that may wait for it; and how long an ending process waits for them.
LOG_QUEUE_BYTES = 256 * KIB
LOG_END_SECONDS = 3.0
#: An entry's longest field: a datagram must fit the socket's buffer (208 KiB by default).
LOG_ENTRY_BYTES_MAX = 64 * KIB
#: Of a text in the audit log.
AUDIT_TEXT_CHARACTERS_MAX = 1024
#: Of lines that are alike so many pass within a period, of all together so many; the kinds known.
LOG_PERIOD_SECONDS = 30.0
LOG_ALIKE_LINES_MAX = 20
LOG_LINES_MAX = 1000
LOG_KINDS_MAX = 1024
#: What is kept of the reason for a failure that travels from a child to its master.
REASON_CHARACTERS_MAX = 1024

assert COMPARE_CHUNK_BYTES_MAX <= BACKFRESH_READ_BYTES <= QUESTION_READ_BYTES_MAX
assert COMPARE_CHUNK_BYTES_MIN >= QUESTION_CHUNK_BYTES_MIN
assert COMPARE_SPAN_BYTES % COMPARE_CHUNK_BYTES_MAX == 0
assert BACKFRESH_SPANS_MAX < QUESTIONS_MAX
assert FRAME_PAYLOAD_BYTES_MAX <= SEND_BUFFER_BYTES <= SEND_WINDOW_BYTES
assert FRAME_BYTES_MAX < STREAM_MESSAGE_BYTES_MAX < RECEIVED_BYTES_MAX
assert PATH_LOOK_SECONDS < PATH_PATIENCE_SECONDS_MIN < SILENT_PEER_SECONDS
assert STRIPE_BYTES <= SEND_BUFFER_BYTES
assert 8 + FRAME_BYTES_MAX <= STREAM_MESSAGE_BYTES_MAX
assert COMPRESSION_BUFFERS_MAX >= COMPRESSION_THREADS
assert CONTROL_RESERVE_BYTES * 3 <= WRITELOG_BYTES_MIN
assert SEND_BUFFER_BYTES <= SEND_WINDOW_BYTES_MIN <= SEND_WINDOW_BYTES <= SEND_WINDOW_BYTES_MAX
assert RECONNECT_SECONDS_MIN <= RECONNECT_MAX_SECONDS_MIN <= RECONNECT_SECONDS_MAX
assert CHILDREN_DEFAULT <= GROUPS_MAX
assert CHILD_RESTART_SECONDS_MAX < CHILD_HEALTHY_SECONDS
# A launch sees the next try of a group whose trouble is over, and that it starts.
assert 2 * CHILD_RESTART_SECONDS_MAX <= LAUNCH_RETRY_SECONDS_MAX < LAUNCH_SECONDS_MAX
assert MEMORY_LOG_BYTES_MIN >= WRITELOG_BYTES_MIN + MEMORY_HEADER_BYTES
assert MEMORY_DRAIN_SECONDS < STOP_SECONDS_MAX
#: Who is being asked, and the log, may each take their time too; the rest is the disk's.
assert MAIL_END_SECONDS + STATISTICS_ASK_SECONDS + LOG_END_SECONDS < STOP_SECONDS_MAX
#: JSON writes a character as up to 12 bytes.
assert 12 * (REASON_CHARACTERS_MAX + DEVICE_PATH_BYTES_MAX) < CHANNEL_MESSAGE_BYTES_MAX
assert PING_SECONDS * 2 < SILENT_PEER_SECONDS
assert NBD_PAYLOAD_BYTES_MAX <= REQUEST_BUDGET_BYTES
assert NBD_PAYLOAD_BYTES_MAX <= NBD_SKIP_BYTES_MAX
assert 2 * NBD_NAME_BYTES_MAX < NBD_OPTION_BYTES_MAX < NBD_RECEIVE_BYTES
assert INLINE_AVERAGE_SECONDS_MAX < INLINE_JOB_SECONDS_MAX < INLINE_BURST_SECONDS_MAX
assert UNAUTHENTICATED_PER_ADDRESS_MAX <= UNAUTHENTICATED_MAX
assert 2 * HELLO_SECONDS < HANDSHAKE_SECONDS
