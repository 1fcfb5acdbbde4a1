"""Nonsense for brokers: random bytes as requests of random methods, and on the bare socket. Nobody awaits an answer."""

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

import grpc

from broker.proto import cxlmq_pb2 as pb

ANSWER_SECONDS = 1.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def send_garbage(address: str, seed: int) -> None:
    """Send some to a broker's unix socket, in the background."""
    chance = random.Random(seed)
    do = _call if chance.random() < 0.6 else _bytes
    threading.Thread(target=do, args=(address, chance), daemon=True).start()


def _call(address: str, chance: random.Random) -> None:
    service = chance.choice(list(pb.DESCRIPTOR.services_by_name.values()))
    method = chance.choice(list(service.methods))

    def requests() -> Iterator[bytes]:
        for _ in range(chance.randrange(4)):
            yield chance.randbytes(chance.choice((0, 1, 10, 300, 100_000)))

    with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{service.full_name}/{method.name}")
        for _ in call(requests(), timeout=ANSWER_SECONDS):
            pass


def _bytes(address: str, chance: random.Random) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(address.removeprefix("unix:"))
        if chance.random() < 0.7:
            connection.sendall(_PREFACE)
        connection.sendall(chance.randbytes(chance.randrange(1, 100_000)))
