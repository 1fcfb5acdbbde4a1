"""Records as Python dictionaries: packing and unpacking derived from the compiled layout, for set-up and tools."""

import struct
from functools import cache
from typing import Any

from broker.layout import RECORDS

HOLDER_BYTES = 63                       # of a group's reader, in its record
_LETTERS = {"B": "B", "H": "H", "I": "I", "Q": "Q"}


@cache
def _format(record: str) -> tuple[struct.Struct, tuple[tuple[str, str, int], ...]]:
    fields = tuple((name, letter, count) for name, letter, count, _ in RECORDS[record])
    text = "".join(f"{count}s" if letter in "cs" else f"{count}{_LETTERS[letter]}" for _, letter, count in fields)
    return struct.Struct("<" + text), fields


def record_bytes(record: str) -> int:
    """Size of a record in bytes."""
    return _format(record)[0].size


def pack(record: str, **values: Any) -> bytes:
    """A record's bytes; fields that are not given are zero, text is encoded and padded."""
    shape, fields = _format(record)
    unknown = values.keys() - {name for name, _, _ in fields}
    assert not unknown, f"{record} has no fields {unknown}"
    flat: list[Any] = []
    for name, letter, count in fields:
        value = values.get(name, b"" if letter in "cs" else 0)
        if letter in "cs":
            flat.append(value.encode() if isinstance(value, str) else value)
        elif count == 1:
            flat.append(value)
        else:
            flat.extend(value or [0] * count)
    return shape.pack(*flat)


def unpack(record: str, data: bytes) -> dict[str, Any]:
    """A record's fields; text ends at its first zero byte, arrays become lists."""
    shape, fields = _format(record)
    flat = iter(shape.unpack(data))
    values: dict[str, Any] = {}
    for name, letter, count in fields:
        if letter in "cs":
            values[name] = next(flat).split(b"\0", 1)[0].decode(errors="replace")
        elif count == 1:
            values[name] = next(flat)
        else:
            values[name] = [next(flat) for _ in range(count)]
    return values


def tag_of(generation: int, sequence: int) -> int:
    """The commit word of a header, or an order entry (`make_tag` in broker/layout.pxd)."""
    return generation << 48 | (sequence + 1) % (1 << 48)


def fitted(text: str, bytes_max: int) -> str:
    """A text that fits into a record; where it is cut, it says so."""
    data = text.encode()
    return text if len(data) <= bytes_max else data[:bytes_max - 3].decode(errors="ignore") + "..."
