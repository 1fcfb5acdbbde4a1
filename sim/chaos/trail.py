"""What clients of a chaos run leave: messages that name their sender, and files of what was sent, acked and read.

    message:  magic u32 | client u32 | number u64 | bytes u32 | CRC-32 u32 | body
    event:    kind u16 | broker u16 | client u32 | number u64 | position i64 | epoch i64 | monotonic ns i64

Each event is appended by one write, before what it announces (sending) or after what it reports (acks, reads): a client
that is killed loses nothing of it.
"""

import enum
import os
import random
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NO_BROKER = 0xFFFF
_MAGIC = 0x4F414843
_MESSAGE = struct.Struct("<IIQII")
_EVENT = struct.Struct("<HHIQqqq")
_BLOCK = random.Random(1).randbytes(8 << 20)
BODY_BYTES_MAX = len(_BLOCK) // 2


class Kind(enum.IntEnum):
    """What happened."""

    SENT = 1
    ACKED = 2
    FAILED = 3          # the client was told that it is not in the log
    UNKNOWN = 4
    READ = 5
    FOREIGN = 6         # read, and nobody's message
    GAP = 7             # a reader was told of a range that is gone; position: where it goes on
    STARTED = 8         # a reader; of a group: where its place was
    COMMITTED = 9       # a group's place
    DAMAGED = 10        # a reader was told of damage
    CHILD = 11          # a forked child hung or died; number: its wait status


class Event(NamedTuple):
    """One line of a trail."""

    kind: Kind
    client: int
    number: int
    position: int
    epoch: int
    at_ns: int
    broker: int             # that acknowledged; NO_BROKER


def make_message(client: int, number: int, body_bytes: int) -> bytes:
    """A message of `client`, with a body that depends on its number."""
    start = (client * 7919 + number * 104729) % BODY_BYTES_MAX
    body = _BLOCK[start:start + min(body_bytes, BODY_BYTES_MAX)]
    head = _MESSAGE.pack(_MAGIC, client, number, len(body), 0)
    return _MESSAGE.pack(_MAGIC, client, number, len(body), zlib.crc32(body, zlib.crc32(head))) + body


def sender_of(message: bytes | memoryview) -> tuple[int, int] | None:
    """(client, number) of a whole, undamaged message; None for anything else."""
    if len(message) < _MESSAGE.size:
        return None
    magic, client, number, nbytes, check = _MESSAGE.unpack_from(message)
    body = memoryview(message)[_MESSAGE.size:]
    head = _MESSAGE.pack(magic, client, number, nbytes, 0)
    if magic != _MAGIC or nbytes != len(body) or zlib.crc32(body, zlib.crc32(head)) != check:
        return None
    return client, number


class Trail:
    """Appends events to a file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def write(self, kind: Kind, client: int, number: int = 0, position: int = -1, epoch: int = 0,
              broker: int | None = None) -> None:
        """Append one event, stamped with the present."""
        os.write(self._descriptor, _EVENT.pack(kind, NO_BROKER if broker is None else broker, client, number, position,
                                               epoch, time.monotonic_ns()))

    def write_reads(self, reads: list[tuple[tuple[int, int] | None, int]]) -> None:
        """Append what was read: (sender, position) of each message."""
        now = time.monotonic_ns()
        os.write(self._descriptor, b"".join(
            _EVENT.pack(Kind.FOREIGN, NO_BROKER, 0, 0, position, 0, now) if sender is None
            else _EVENT.pack(Kind.READ, NO_BROKER, *sender, position, 0, now) for sender, position in reads))


def read_trail(path: Path) -> Iterator[Event]:
    """The events of a file; half an event at its end, of a writer that was killed, is left out."""
    data = path.read_bytes() if path.exists() else b""     # killed before it could begin one
    for kind, broker, *rest in _EVENT.iter_unpack(data[:len(data) // _EVENT.size * _EVENT.size]):
        client, number, position, epoch, at_ns = rest
        yield Event(Kind(kind), client, number, position, epoch, at_ns, broker)
