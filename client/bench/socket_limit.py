"""Baseline: plain stream sockets, received straight into a warm mapping.

    python -m client.bench.socket_limit --batch-bytes 1048576 --total-bytes 1000000000

What a transport costs when nobody frames, copies or schedules more than the kernel does. Set up and measured like
`client.bench.grpc_limit`: same frame header, same ring, same window and acks, same processes.
"""

import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from broker import grpc_options
from client.bench.harness import (
    ACK,
    HEADER,
    Limit,
    Settings,
    Transport,
    WarmRing,
    answer,
    limit_command,
    make_payload,
    measure,
)

MODULE = "client.bench.socket_limit"

# Above the kernel's default, so that sender and receiver work on both cores at once; the kernel caps it quietly.
SOCKET_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class SocketLimit(Limit):
    """The limit of plain stream sockets."""


# --- Servers ---


def serve(address: str, settings: Settings) -> None:
    """Run one server until standard input ends; print its address once it listens."""
    ring = WarmRing()
    listener = _listen(address)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=receive, args=(connection, ring, settings.ack_interval), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    answer(address if address.startswith("unix:") else f"127.0.0.1:{listener.getsockname()[1]}")
    sys.stdin.read()


def receive(connection: socket.socket, ring: WarmRing, ack_interval: int) -> None:
    """Serve one connection: each payload goes from the kernel into the ring, without a stop between."""
    received = acked = 0
    header = bytearray(HEADER.size)
    with connection:
        while True:
            if received - acked >= ack_interval or (received > acked and not _has_more(connection)):
                connection.sendall(ACK.pack(received))
                acked = received
            if not receive_exactly(connection, memoryview(header)):
                return
            length, _number = HEADER.unpack(header)
            if not receive_exactly(connection, ring.reserve(length)):
                return
            received += 1


def _has_more(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def receive_exactly(connection: socket.socket, target: memoryview) -> bool:
    """Fill `target`; False when the peer closed first."""
    while target:
        count = connection.recv_into(target, 0, socket.MSG_WAITALL)
        if not count:
            return False
        target = target[count:]
    return True


# --- Publishers ---


class StreamWindow:
    """Batches in flight on one connection, and how long each took to be acknowledged."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self._connection = connection
        self._size = size
        self._sent_at: list[float] = []
        self._acked = 0
        self._ack = memoryview(bytearray(ACK.size))
        self.latencies: list[float] = []

    def enter(self) -> int:
        """Take the acks that have come, wait for room; the number of the batch that may go now, its time taken."""
        while self._acked < len(self._sent_at) and _has_more(self._connection):
            self._take_ack()
        self.drain(self._size - 1)
        self._sent_at.append(time.perf_counter())
        return len(self._sent_at) - 1

    def drain(self, in_flight: int) -> None:
        """Wait until at most `in_flight` batches are not acknowledged."""
        while len(self._sent_at) - self._acked > in_flight:
            self._take_ack()

    def _take_ack(self) -> None:
        if not receive_exactly(self._connection, self._ack):
            raise ConnectionError("the server closed the connection before the last ack")
        count = ACK.unpack(self._ack)[0]
        now = time.perf_counter()
        self.latencies.extend(now - sent for sent in self._sent_at[self._acked : count])
        self._acked = count


def publish_stream(address: str, settings: Settings, payload: bytes) -> list[float]:
    """Send one round's batches on one new connection; their ack latencies in seconds."""
    with _connect(address) as connection:
        window = StreamWindow(connection, settings.window)
        for _ in range(settings.batches_per_stream):
            header = HEADER.pack(len(payload), window.enter())
            # The kernel gathers header and payload: joining them first would be one more copy.
            sent = connection.sendmsg((header, payload))
            if sent < len(header) + len(payload):
                connection.sendall((header + payload)[sent:])
        window.drain(0)
    return window.latencies


def publish(addresses: list[str], settings: Settings) -> None:
    """Answer every line on standard input with one round over all servers, until it ends."""
    payload = make_payload(settings.batch_bytes)
    with ThreadPoolExecutor(len(addresses)) as threads:
        answer("ready")
        while sys.stdin.readline():
            streams = [threads.submit(publish_stream, address, settings, payload) for address in addresses]
            latencies = [latency for stream in streams for latency in stream.result()]
            answer(str(statistics.median(latencies) * 1e6))


# --- Addresses ---


def _listen(address: str) -> socket.socket:
    if address.startswith("unix:"):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _enlarge_buffers(listener)
        listener.bind(address.removeprefix("unix:"))
        listener.listen()
        return listener
    host, port = address.rsplit(":", 1)
    return socket.create_server((host, int(port)))


def _connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _enlarge_buffers(connection)
        connection.connect(address.removeprefix("unix:"))
        return connection
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)))


def _enlarge_buffers(unix_socket: socket.socket) -> None:
    unix_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    unix_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)


def measure_sockets(
    batch_bytes: int,
    total_bytes: int,
    servers: int = 4,
    window: int = grpc_options.RECOMMENDED_WINDOW_BATCHES,
    transport: Transport = "unix",
    runs: int = 3,
    publishers: int = 1,
) -> SocketLimit:
    """Measure plain sockets, with the arguments of `client.bench.grpc_limit.measure_grpc`.

    Raises `ValueError` for arguments that make no sense and `LimitError` when a process fails.
    """
    settings = Settings(batch_bytes, total_bytes, servers, window, transport, runs, publishers)
    return measure(MODULE, settings, SocketLimit)


main = limit_command(
    "Measure plain stream sockets, received straight into a warm mapping.",
    lambda settings: measure(MODULE, settings, SocketLimit),
    serve,
    publish,
)

if __name__ == "__main__":
    main()
