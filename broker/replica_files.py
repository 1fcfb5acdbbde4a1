"""The files of replicas: made and removed here for the stage that fills them, and read back for recovery and verify.

    DIR/broker-<replica>/<topic>.<created>.<run>.s<source>.<number>.replica     batches of one source, in order
                         <topic>.<created>.sessions                             whose batches were in files that went
                         <topic>.<created>.topic                                a topic that exists
                         <topic>.<created>.deleted                              one that was deleted, with all files

A topic is told from a later one of its name by when it was created. Bytes: broker/replica_record.pxd; of the small
files, broker/durable_files.py. They are written by broker/replica_folder.py.
"""

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.replica_record import (
    RECORD_ALIGNMENT,
    RECORD_BYTES,
    SUPERBLOCK_BYTES,
    crc32c,
    parse_record,
)

MAGIC, FORMAT = b"CXLMQREP", 2
_HEAD = struct.Struct("<8sIII")                 # magic, format, bytes of JSON, checksum of the superblock with 0 here
_NAME = re.compile(r"(?P<topic>.+)\.(?P<created>[0-9a-f]+)\.(?P<run>[0-9a-f]+)\.s(?P<source>\d+)\.\d+\.replica")
_SEARCH_BYTES = 1 << 20
MANIFESTS = "recoveries"                        # a folder: what earlier recoveries decided (broker/recovery.py)
SET_ASIDE = "set-aside"                         # a folder: data of clusters that were to begin anew
TOPIC_SUFFIX, DELETED_SUFFIX, SESSIONS_SUFFIX = ".topic", ".deleted", ".sessions"


class ReplicaFileError(Exception):
    """A file is no replica of ours, or its superblock is damaged. The message says which and why."""


def identity_of(topic: str, created_ns: int) -> str:
    """What tells a topic from every other, in file names."""
    return f"{topic}.{created_ns:x}"


def names_of(identity: str) -> tuple[str, int]:
    """The name of a topic and when it was created: the inverse of `identity_of`. Raises ValueError."""
    name, _, created = identity.rpartition(".")
    return name, int(created, 16)


def identity_in(file_name: str) -> str | None:
    """The topic that a file belongs to by its name; None when it is no file of a topic."""
    for suffix in (TOPIC_SUFFIX, DELETED_SUFFIX, SESSIONS_SUFFIX):
        if file_name.endswith(suffix):
            return file_name.removesuffix(suffix)
    found = _NAME.fullmatch(file_name)
    return f"{found['topic']}.{found['created']}" if found else None


# ---- superblock ----------------------------------------------------------------------------------------------------


def encode_superblock(described: dict[str, Any]) -> tuple[bytes, int]:
    """The first bytes of a file, and the tag of its records."""
    text = json.dumps(described, separators=(",", ":")).encode()
    assert len(text) <= SUPERBLOCK_BYTES - _HEAD.size, "a superblock holds one topic"
    blank = (_HEAD.pack(MAGIC, FORMAT, len(text), 0) + text).ljust(SUPERBLOCK_BYTES, b"\0")
    tag = crc32c(blank)
    return _HEAD.pack(MAGIC, FORMAT, len(text), tag) + blank[_HEAD.size:], tag


def decode_superblock(data: bytes) -> tuple[dict[str, Any], int]:
    """The inverse of `encode_superblock`. Raises `ReplicaFileError`."""
    if len(data) < SUPERBLOCK_BYTES:
        raise ReplicaFileError(f"it has {len(data)} bytes, the superblock alone has {SUPERBLOCK_BYTES}")
    magic, version, nbytes, tag = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ReplicaFileError("its magic number is not that of a replica")
    if version != FORMAT:
        raise ReplicaFileError(f"it has format {version}, here it is {FORMAT}")
    blank = _HEAD.pack(magic, version, nbytes, 0) + data[_HEAD.size:SUPERBLOCK_BYTES]
    if nbytes > SUPERBLOCK_BYTES - _HEAD.size or crc32c(blank) != tag:
        raise ReplicaFileError("the checksum of its superblock is wrong")
    described: dict[str, Any] = json.loads(data[_HEAD.size:_HEAD.size + nbytes])
    return described, tag


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class ReplicaFile:
    """A replica file as its superblock describes it; `damage` says why it cannot be used, when it cannot."""

    path: Path
    topic: dict[str, Any]
    run_id: int
    source: int
    replica: int
    broker_count: int
    first_position: int
    created_ns: int
    tag: int = 0
    damage: str = ""
    limits: dict[str, int] = field(default_factory=dict)    # the numbers of the region that it was written from

    @property
    def identity(self) -> str:
        """Which topic it belongs to."""
        return identity_of(self.topic["name"], self.topic["created_ns"])


@dataclass(frozen=True)
class Record:
    """A record of a file: the order entry it was made from, and where its payload lies."""

    fields: dict[str, int]
    payload_offset: int

    @property
    def position(self) -> int:
        """Of its first message."""
        return self.fields["position"]

    @property
    def end(self) -> int:
        """Position behind its last message."""
        return self.fields["position"] + self.fields["message_count"]


@dataclass(frozen=True)
class Damage:
    """A range of a file that is no record, or whose payload is not what was written."""

    offset: int
    nbytes: int
    what: str
    first_position: int | None = None       # messages that it may have held
    end_position: int | None = None


def read_superblock(path: Path) -> ReplicaFile:
    """Describe a file; when its superblock is damaged, by its name, with `damage` set. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(SUPERBLOCK_BYTES)
    try:
        described, tag = decode_superblock(data)
        return ReplicaFile(path, described["topic"], described["run_id"], described["source"], described["replica"],
                           described["broker_count"], described["first_position"], described["created_ns"], tag,
                           limits=described.get("limits", {}))
    except (ReplicaFileError, ValueError, KeyError, TypeError) as error:
        found = _NAME.fullmatch(path.name)
        topic = {"name": found["topic"], "created_ns": int(found["created"], 16)} if found else {
            "name": path.name, "created_ns": 0}
        run_id, source = (int(found["run"], 16), int(found["source"])) if found else (0, 0)
        return ReplicaFile(path, topic, run_id, source, 0, 0, 0, 0, damage=str(error) or "its superblock is damaged")


def files_below(folder: Path, suffix: str) -> list[Path]:
    """The files of that kind in a data directory, or in one broker's folder. What was set aside counts no more."""
    return [path for path in sorted(folder.rglob("*" + suffix)) if SET_ASIDE not in path.relative_to(folder).parts] \
        if folder.is_dir() else []


def find_files(folder: Path, identity: str | None = None) -> list[ReplicaFile]:
    """The replica files below a folder, by path: all, or those that are called as files of a topic are.

    Files that go away meanwhile are left out.
    """
    found = []
    for path in files_below(folder, ".replica"):
        if identity is not None and identity_in(path.name) != identity:
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append(read_superblock(path))
    return found


def read_records(file: ReplicaFile, check_payloads: bool = True) -> Iterator[Record | Damage]:
    """The records of a file in order, and what lies between them and is none. Notes (no messages) are records too.

    The zeroes, or the torn record, behind the last record are the file's tail: an unsynced write ends so, and
    damage does. It comes last, as a `Damage` whose positions are unknown at the end, unless it is empty or all zero.
    """
    with path_descriptor(file.path) as descriptor:
        size = os.fstat(descriptor).st_size
        at, position = SUPERBLOCK_BYTES, file.first_position
        while at < size:
            header = os.pread(descriptor, RECORD_BYTES, at)
            fields = parse_record(header, file.tag)
            reason = _unusable(fields, at, size) if fields else "no record"
            if fields and not reason:
                nbytes, record = fields["payload_bytes"], Record(fields, at + RECORD_BYTES)
                payload = os.pread(descriptor, nbytes, record.payload_offset) if check_payloads else b""
                if check_payloads and crc32c(payload) != fields["payload_crc"]:
                    yield Damage(at, RECORD_BYTES + nbytes, "the payload's checksum is wrong", record.position,
                                 record.end)
                else:
                    yield record
                position = record.end
                at += _stride(nbytes)
                continue
            following = _next_record(descriptor, file.tag, at + RECORD_ALIGNMENT, size)
            if following is None:
                if any(_chunks(descriptor, at, size)):
                    yield Damage(at, size - at, f"{reason} from here to the end of the file", position)
                return
            offset, found = following
            yield Damage(at, offset - at, f"{reason}, though records follow", position, found["position"])
            at = offset


@contextlib.contextmanager
def path_descriptor(path: Path) -> Iterator[int]:
    """A file opened for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stride(payload_bytes: int) -> int:
    return RECORD_BYTES + -(-payload_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def _unusable(fields: dict[str, int], at: int, size: int) -> str:
    """Why a header that proves itself cannot be followed."""
    if at + RECORD_BYTES + fields["payload_bytes"] > size:
        return "the record is cut off"
    return ""


def _next_record(descriptor: int, tag: int, start: int, size: int) -> tuple[int, dict[str, int]] | None:
    """The first record at or behind `start`; None when there is none."""
    overlap = RECORD_BYTES
    for base in range(start, size, _SEARCH_BYTES):
        data = os.pread(descriptor, _SEARCH_BYTES + overlap, base)
        for offset in range(0, min(len(data), _SEARCH_BYTES), RECORD_ALIGNMENT):
            if data[offset + 96:offset + 100] == b"MXQL":
                fields = parse_record(data[offset:offset + RECORD_BYTES], tag)
                if fields and not _unusable(fields, base + offset, size):
                    return base + offset, fields
    return None


def _chunks(descriptor: int, start: int, size: int) -> Iterator[bool]:
    """Whether each piece holds anything but zeroes."""
    for base in range(start, size, _SEARCH_BYTES):
        yield bool(os.pread(descriptor, min(_SEARCH_BYTES, size - base), base).strip(b"\0"))
