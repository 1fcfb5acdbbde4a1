r"""Message formats as in kcat's `-f`, compiled once and applied to whole batches.

    %s payload   %S its length   %R its length as 4 bytes, big-endian   %o position   %t topic   %p broker
    %T timestamp in ms   %k key (always empty)   %K its length (always -1)   %h headers (always empty)   %% a percent
    \n \r \t \0 \\ \xNN   the byte
"""

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


class _Place(NamedTuple):
    """What of a message is not its payload."""

    position: int
    topic: bytes
    broker: int
    timestamp_ns: int


_Part = Callable[[bytes, _Place], bytes]

_FIELDS: dict[str, _Part] = {
    "s": lambda payload, place: payload,
    "S": lambda payload, place: b"%d" % len(payload),
    "R": lambda payload, place: _LENGTH.pack(len(payload)),
    "o": lambda payload, place: b"%d" % place.position,
    "t": lambda payload, place: place.topic,
    "p": lambda payload, place: b"%d" % place.broker,
    "T": lambda payload, place: b"%d" % (place.timestamp_ns // 1_000_000),
}
_CONSTANTS = {"k": b"", "K": b"-1", "h": b"", "%": b"%"}


class Formatter:
    """A compiled format."""

    def __init__(self, parts: Sequence[bytes | str], topic: str) -> None:
        """`parts`: literal bytes, or the letter of a field."""
        self._topic = topic.encode()
        self._parts = list(parts)
        literals = [part for part in parts if isinstance(part, bytes)]
        fields = [part for part in parts if isinstance(part, str)]
        # With the payload alone between literals, a batch is one join.
        self._around: tuple[bytes, bytes] | None = None
        if fields == ["s"] and len(literals) == len(parts) - 1 and len(parts) <= 3:
            at = parts.index("s")
            self._around = b"".join(literals[:at]), b"".join(literals[at:])

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
        out = bytearray()
        constant = self._parts
        for position, payload in enumerate(messages, batch.position):
            place = _Place(position, self._topic, batch.broker, batch.timestamp_ns)
            for part in constant:
                out += part if isinstance(part, bytes) else _FIELDS[part](payload, place)
        return bytes(out), len(messages)


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
        elif field in _FIELDS:
            parts.append(field)
        elif field in _CONSTANTS:
            literal(_CONSTANTS[field])
        else:
            allowed = " ".join(f"%{each}" for each in (*_FIELDS, *_CONSTANTS))
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
