"""The tuned gRPC configuration, shared by brokers and clients.

The figures behind every choice are in memory-bank/decisions/0003-grpc-configuration.md. This module never imports grpc:
`apply_process_tuning` has to run before grpc is imported, because grpc reads its experiments only once.
"""

import contextlib
import ctypes
import os

Option = tuple[str, int | str]

# What a publisher keeps in flight on one stream: this many batches, and no more than this many bytes (but always two
# batches). More adds latency and memory, and no throughput.
RECOMMENDED_WINDOW_BATCHES = 8
RECOMMENDED_WINDOW_BYTES = 16 << 20
# A broker answers one cumulative ack per this many batches, and at once when nothing more has come. At most half the
# window, so that the other half keeps the pipe full while the ack travels.
RECOMMENDED_ACK_INTERVAL_BATCHES = 4

# The user agent of a client's calls: this, a slash, and its process.
PROCESS_AGENT = "cxlmq-process"
# Room for what frames a batch (its header, the protobuf tags and lengths around it).
MESSAGE_HEADROOM_BYTES = 64 * 1024

# The older poller needs less processor time per byte than the event engine, which pays off as long as gRPC offers it.
EXPERIMENTS_VARIABLE = "GRPC_EXPERIMENTS"
EXPERIMENTS = "-event_engine_client,-event_engine_listener,-event_engine_callback_cq"
FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
# Batches must come from the heap: a block from mmap is given back when freed, and its pages fault in again next time.
# 32 MiB is the most that every glibc accepts.
_MMAP_THRESHOLD_BYTES = 32 << 20
# What a process may keep after a burst. Together with the pad it bounds the memory a broker holds for nothing.
_TRIM_THRESHOLD_BYTES = 32 << 20
_TOP_PAD_BYTES = 8 << 20

_KEEPALIVE_TIME_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000
# A peer may ping this often without being cut off for "too many pings": half the sender's period, for clock slack.
_PING_INTERVAL_MIN_MS = _KEEPALIVE_TIME_MS // 2


def apply_process_tuning() -> None:
    """Tune this process for gRPC; call it before the first `import grpc`. Calling it again changes nothing.

    `GRPC_EXPERIMENTS` and `GRPC_ENABLE_FORK_SUPPORT` are kept when the user has set them. On a C library
    without `mallopt` the allocator stays as it is.
    """
    os.environ.setdefault(EXPERIMENTS_VARIABLE, EXPERIMENTS)
    # Its handlers stop and start gRPC's threads around every fork, and print when they cannot. They do not help the
    # asyncio API, which works in no child: children are refused (client/fork.py), and parents go on undisturbed.
    os.environ.setdefault(FORK_VARIABLE, "0")
    # numpy is used for a few tables; its thread pool would cost every broker a tenth of a second.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _tune_allocator()


def _tune_allocator() -> None:
    """Keep freed batches in the heap, so that their pages need not fault in again for the next batch."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def server_options(message_bytes_max: int) -> list[Option]:
    """Options for a broker's server. `message_bytes_max` is the largest framed batch, without gRPC's own framing."""
    return [
        *_common_options(message_bytes_max),
        # Two brokers that listen on one port by mistake must fail, not share the connections.
        ("grpc.so_reuseport", 0),
        # gRPC would inflate whatever comes, before we know who sent it. Batches have compression of their own.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MIN_MS),
    ]


def channel_options(message_bytes_max: int) -> list[Option]:
    """Options for a client's channel. `message_bytes_max` is the largest framed batch, without gRPC's own framing."""
    return [
        *_common_options(message_bytes_max),
        # Brokers name readers by their process, for people.
        ("grpc.primary_user_agent", f"{PROCESS_AGENT}/{os.getpid()}"),
        # Channels of one process to the same broker get a connection each.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy from the environment would break local brokers, and carry every batch of remote ones.
        ("grpc.enable_http_proxy", 0),
        # A restarted broker is found again within a second; the default waits up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def _common_options(message_bytes_max: int) -> list[Option]:
    limit = message_bytes_max + MESSAGE_HEADROOM_BYTES
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        # A batch is sent again by session and sequence; a second, hidden resend would only keep copies of it.
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # A stream may be idle for hours: pings must not stop after the first two.
        ("grpc.http2.max_pings_without_data", 0),
    ]
