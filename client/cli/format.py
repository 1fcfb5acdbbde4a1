r"""Message formats as in kcat's `-f`, compiled once and applied to whole batches.

    %s payload   %S its length   %R its length as 4 bytes, big-endian   %o position   %t topic   %p broker
    %T timestamp in ms   %k key (always empty)   %K its length (always -1)   %h headers (always empty)   %% a percent
    \n \r \t \0 \\ \xNN   the byte
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from broker.errors import ConfigError

DEFAULT_FORMAT = "%s\\n"
_TOKEN = re.compile(r"%(.?)|\\(x[0-9A-Fa-f]{1,2}|.?)|([^%\\]+)", re.DOTALL)
_ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "0": b"\0", "\\": b"\\"}
_LENGTH = struct.Struct(">I")


class Batch(Protocol):
    """What is formatted: a batch of messages with consecutive positions (`client.subscriber.ReceivedBatch`)."""

    position: int
    broker: int
    timestamp_ns: int

    def messages(self) -> list[bytes]:
        """The messages, in order."""
        ...


# What differs from message to message: its place in a %-template, and its values for a batch.
_COLUMNS: dict[str, tuple[bytes, Callable[[list[bytes], int], Iterable[Any]]]] = {
    "s": (b"%b", lambda messages, position: messages),
    "S": (b"%d", lambda messages, position: map(len, messages)),
    "R": (b"%b", lambda messages, position: map(_LENGTH.pack, map(len, messages))),
    "o": (b"%d", lambda messages, position: range(position, position + len(messages))),
}
# What a whole batch shares.
_SHARED: dict[str, Callable[[Batch, bytes], bytes]] = {
    "t": lambda batch, topic: topic,
    "p": lambda batch, topic: b"%d" % batch.broker,
    "T": lambda batch, topic: b"%d" % (batch.timestamp_ns // 1_000_000),
}
_CONSTANTS = {"k": b"", "K": b"-1", "h": b"", "%": b"%"}


class Formatter:
    """A compiled format: one template a batch, filled for each message without a loop in Python."""

    def __init__(self, parts: Sequence[bytes | str], topic: str) -> None:
        """`parts`: literal bytes, or the letter of a field."""
        self._topic = topic.encode()
        self._parts = list(parts)
        self._columns = [_COLUMNS[part][1] for part in parts if isinstance(part, str) and part in _COLUMNS]
        # With the payload alone between literals, a batch is one join.
        self._around: tuple[bytes, bytes] | None = None
        if [part for part in parts if isinstance(part, str)] == ["s"]:
            at = self._parts.index("s")
            before, after = parts[:at], parts[at + 1:]
            self._around = b"".join(map(_literal, before)), b"".join(map(_literal, after))

    def render(self, batch: Batch, limit: int | None = None) -> tuple[bytes, int]:
        """The bytes for a batch, and how many messages they are (at most `limit`)."""
        messages = batch.messages()
        if limit is not None and limit < len(messages):
            messages = messages[:limit]
        if not messages:
            return b"", 0
        if self._around is not None:
            before, after = self._around
            return before + (after + before).join(messages) + after, len(messages)
        template = b"".join(self._template(batch))
        if not self._columns:
            return (template % ()) * len(messages), len(messages)
        rows = zip(*(column(messages, batch.position) for column in self._columns), strict=True)
        return b"".join(map(template.__mod__, rows)), len(messages)

    def _template(self, batch: Batch) -> Iterator[bytes]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part.replace(b"%", b"%%")
            elif part in _COLUMNS:
                yield _COLUMNS[part][0]
            else:
                yield _SHARED[part](batch, self._topic).replace(b"%", b"%%")


def _literal(part: bytes | str) -> bytes:
    assert isinstance(part, bytes)
    return part


def compile_format(text: str, topic: str = "") -> Formatter:
    """Compile a format. Raises `ConfigError` for a token that is not known."""
    parts: list[bytes | str] = []

    def literal(data: bytes) -> None:
        if parts and isinstance(parts[-1], bytes):
            parts[-1] += data
        elif data:
            parts.append(data)

    for match in _TOKEN.finditer(text):
        field, escape, plain = match.groups()
        if plain is not None:
            literal(plain.encode(errors="surrogateescape"))
        elif escape is not None:
            literal(_escape(escape, text))
        elif field in _COLUMNS or field in _SHARED:
            parts.append(field)
        elif field in _CONSTANTS:
            literal(_CONSTANTS[field])
        else:
            allowed = " ".join(f"%{each}" for each in (*_COLUMNS, *_SHARED, *_CONSTANTS))
            raise ConfigError(f"the format {text!r} has %{field}, which is not known: allowed are {allowed}",
                              setting="format", value=text, allowed=allowed)
    return Formatter(parts, topic)


def _escape(escape: str, text: str) -> bytes:
    if escape.startswith("x") and len(escape) > 1:
        return bytes([int(escape[1:], 16)])
    if escape not in _ESCAPES:
        raise ConfigError(f"the format {text!r} has \\{escape}, which is not known: allowed are "
                          r"\n \r \t \0 \\ and \xNN", setting="format", value=text)
    return _ESCAPES[escape]


def message_json(payload: bytes, position: int, topic: str, broker: int, timestamp_ns: int) -> dict[str, Any]:
    """A message as JSON values: `payload` when it is UTF-8, else `payload_base64`."""
    values: dict[str, Any] = {"position": position, "topic": topic, "broker": broker,
                              "timestamp_ms": timestamp_ns // 1_000_000}
    try:
        values["payload"] = payload.decode()
    except UnicodeDecodeError:
        from base64 import b64encode

        values["payload_base64"] = b64encode(payload).decode()
    return values
