"""Splits an input into messages: lines, length-prefixed messages, or one for all of it.

Each function takes chunks of bytes as they arrive and yields lists of messages as soon as they are complete, so that
`tail -f file | cxlmq produce topic` sends each line at once.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from broker.errors import BadBatch, MessageTooBig

CHUNK_BYTES = 1 << 20
PREFIX_BYTES = (1, 2, 4, 8)
# A prefix beyond this is taken for the wrong kind of input rather than for a message to wait for.
MESSAGE_BYTES_MAX = 1 << 30


def read_chunks(descriptor: int, wait_for_input: Callable[[int], None] = lambda descriptor: None) -> Iterator[bytes]:
    """What comes from a file or pipe, as it comes. Only `wait_for_input` may end it before its end, by raising."""
    while True:
        wait_for_input(descriptor)
        if not (chunk := os.read(descriptor, CHUNK_BYTES)):
            return
        yield chunk


def split_lines(chunks: Iterable[bytes], keep_newline: bool = False) -> Iterator[list[bytes]]:
    """Messages are lines; a last line without a newline counts too. Only "\\n" ends a line."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, newline, others = chunk.partition(b"\n")
        rest.append(first)
        if not newline:
            continue
        lines = [b"".join(rest), *others.split(b"\n")]
        rest = [lines.pop()]
        yield [line + b"\n" for line in lines] if keep_newline else lines
    if last := b"".join(rest):
        yield [last]


def split_prefixed(chunks: Iterable[bytes], prefix_bytes: int = 4,
                   order: Literal["little", "big"] = "little") -> Iterator[list[bytes]]:
    """Each message follows its length. Raises `BadBatch` when the input ends inside a message."""
    buffer = bytearray()
    count = 0
    for chunk in chunks:
        buffer += chunk
        messages: list[bytes] = []
        at = 0
        while len(buffer) - at >= prefix_bytes:
            length = int.from_bytes(buffer[at:at + prefix_bytes], order)
            if length > MESSAGE_BYTES_MAX:
                raise MessageTooBig(
                    f"message {count + len(messages)} would have {length} bytes: is the input length-prefixed, with "
                    f"{prefix_bytes} bytes, {order}-endian?", message_bytes=length, message_bytes_max=MESSAGE_BYTES_MAX)
            if len(buffer) - at - prefix_bytes < length:
                break
            at += prefix_bytes
            messages.append(bytes(buffer[at:at + length]))
            at += length
        del buffer[:at]
        count += len(messages)
        if messages:
            yield messages
    if buffer:
        raise BadBatch(f"the input ends inside message {count}: {len(buffer)} bytes are left over",
                       reason="truncated input")


def whole(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """One message for all of the input."""
    yield [b"".join(chunks)]
