"""Small files that outlive everything: whole or not there, with a checksum, and damage is told.

    CXLMQFILE 1 <kind> <bytes of the body> <CRC-32C of all but itself, 8 hexadecimal digits>\\n
    body (JSON)

A new file is written beside its place, synced, and renamed; then its folder is synced, and each parent that was just
made. Whoever finds a file finds all of it. Files of earlier versions have no first line, and therefore no checksum:
`Content` says so, and where something else with a checksum says otherwise, that is believed.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.disk import sync, sync_names, write
from broker.replica_record import crc32c

VERSION = 1
_HEAD = re.compile(rb"CXLMQFILE (\d{1,9}) ([a-z]{1,20}) (\d{1,12}) ([0-9a-f]{8})\n")


class FileDamaged(Exception):
    """A file is not what was written. The message says why; the path is for the caller to name."""


@dataclass(frozen=True)
class Content:
    """What a file says; `checked` when a checksum vouches for it."""

    values: dict[str, Any]
    checked: bool


def write_durable(path: Path, kind: str, values: dict[str, Any]) -> None:
    """Make `values` the content of a file; durable when this returns. Raises OSError: then the old content is there."""
    write_whole(path, sealed(kind, values))


def sealed(kind: str, values: dict[str, Any]) -> bytes:
    """The bytes of a file."""
    body = json.dumps(values, indent=1).encode()
    head = b"CXLMQFILE %d %s %d " % (VERSION, kind.encode(), len(body))
    return head + b"%08x\n" % crc32c(body, crc32c(head)) + body


def read_durable(path: Path, kind: str) -> Content:
    """What a file says. Raises `FileDamaged`, OSError."""
    return opened(path.read_bytes(), kind)


def opened(data: bytes, kind: str) -> Content:
    """The inverse of `sealed`. Raises `FileDamaged`."""
    if data[:1] == b"{":
        return Content(_parsed(data), False)            # of an earlier version
    found = _HEAD.match(data)
    if found is None:
        raise FileDamaged("its first line is not that of a file of ours")
    version, other, nbytes, checksum = found.groups()
    body = data[found.end():]
    if b"%08x" % crc32c(body, crc32c(data[:found.start(4)])) != checksum or int(nbytes) != len(body):
        raise FileDamaged("its checksum is wrong")
    if int(version) != VERSION:
        raise FileDamaged(f"it has version {int(version)}, here it is {VERSION}")
    if other.decode() != kind:
        raise FileDamaged(f"it is a file of kind {other.decode()}, not {kind}")
    return Content(_parsed(body), True)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except ValueError as error:
        raise FileDamaged(f"it is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise FileDamaged("it holds no JSON object")
    return values


def write_whole(path: Path, data: bytes) -> None:
    """Make these bytes the content of a file; durable when this returns. Raises OSError: then the old one is there."""
    make_folder(path.parent)
    fresh = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[write(descriptor, rest):]
            sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        if isinstance(error, OSError) and error.filename is None:   # write(2) and fdatasync(2) do not say of which file
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, private to the user, and its parents: each is durable when this returns. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):      # several brokers make the same parent
            each.mkdir(mode=0o700)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_names(descriptor)
    finally:
        os.close(descriptor)


def forget_unfinished(folder: Path) -> None:
    """Remove what writers that died have left beside the places: nobody was told of it."""
    for pattern in (".*.new", "*.writing"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
