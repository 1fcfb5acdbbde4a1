"""Splits an input into messages: lines, length-prefixed messages, or one for all of it.

Each function takes chunks of bytes as they arrive and yields lists of messages as soon as they are complete, so that
`tail -f file | cxlmq produce topic` sends each line at once. What has come of a message that is not complete yet is
kept in `pending`, where the caller finds it when the input breaks off.
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


def split_lines(chunks: Iterable[bytes], pending: bytearray, keep_newline: bool = False) -> Iterator[list[bytes]]:
    """Messages are lines; a last line without a newline counts too. Only "\\n" ends a line."""
    for chunk in chunks:
        first, newline, others = chunk.partition(b"\n")
        pending += first
        if not newline:
            continue
        lines = [bytes(pending), *others.split(b"\n")]
        pending[:] = lines.pop()
        yield [line + b"\n" for line in lines] if keep_newline else lines
    if last := bytes(pending):
        pending.clear()
        yield [last]


def split_prefixed(chunks: Iterable[bytes], pending: bytearray, prefix_bytes: int = 4,
                   order: Literal["little", "big"] = "little") -> Iterator[list[bytes]]:
    """Each message follows its length. Raises `BadBatch` when the input ends inside a message."""
    count = 0
    for chunk in chunks:
        pending += chunk
        messages: list[bytes] = []
        at = 0
        while len(pending) - at >= prefix_bytes:
            length = int.from_bytes(pending[at:at + prefix_bytes], order)
            if length > MESSAGE_BYTES_MAX:
                raise MessageTooBig(
                    f"message {count + len(messages)} would have {length} bytes: is the input length-prefixed, with "
                    f"{prefix_bytes} bytes, {order}-endian?", message_bytes=length, message_bytes_max=MESSAGE_BYTES_MAX)
            if len(pending) - at - prefix_bytes < length:
                break
            at += prefix_bytes
            messages.append(bytes(pending[at:at + length]))
            at += length
        del pending[:at]
        count += len(messages)
        if messages:
            yield messages
    if pending:
        raise BadBatch(f"the input ends inside message {count}: {len(pending)} bytes are left over",
                       reason="truncated input")


def whole(chunks: Iterable[bytes], pending: bytearray) -> Iterator[list[bytes]]:
    """One message for all of the input."""
    for chunk in chunks:
        pending += chunk
    everything = bytes(pending)
    pending.clear()
    yield [everything]
