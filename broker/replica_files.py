"""The files of replicas: made and removed here for the stage that fills them, and read back for recovery and verify.

    DIR/broker-<replica>/<topic>.<created>.<run>.s<source>.<number>.replica     batches of one source, in order
                         <topic>.<created>.topic                                a topic that exists
                         <topic>.<created>.deleted                              one that was deleted, with all files

A topic is told from a later one of its name by when it was created. Bytes: broker/replica_record.pxd.
"""

import contextlib
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broker.replica_record import (
    RECORD_ALIGNMENT,
    RECORD_BYTES,
    SUPERBLOCK_BYTES,
    crc32c,
    parse_record,
)
from broker.topics import TopicEntry

MAGIC, FORMAT = b"CXLMQREP", 2
_HEAD = struct.Struct("<8sIII")                 # magic, format, bytes of JSON, checksum of the superblock with 0 here
_NAME = re.compile(r"(?P<topic>.+)\.(?P<created>[0-9a-f]+)\.(?P<run>[0-9a-f]+)\.s(?P<source>\d+)\.\d+\.replica")
_SEARCH_BYTES = 1 << 20
TOPIC_SUFFIX, DELETED_SUFFIX = ".topic", ".deleted"


class ReplicaFileError(Exception):
    """A file is no replica of ours, or its superblock is damaged. The message says which and why."""


def identity_of(topic: str, created_ns: int) -> str:
    """What tells a topic from every other, in file names."""
    return f"{topic}.{created_ns:x}"


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


# ---- writing: for the replication stage ----------------------------------------------------------------------------


class ReplicaFolder:
    """One broker's folder of replica files.

    `topic_of` finds the entry of an active topic by (number, generation). With `catalogue`, topics are written down
    even when they have no replicas, so that recovery can say what it cannot bring back.
    """

    def __init__(self, folder: Path, broker: int, run_id: int, cluster: str, broker_count: int,
                 topic_of: Callable[[int, int], TopicEntry], catalogue: bool = False) -> None:
        self._folder = folder
        self._described = {"run_id": run_id, "cluster": cluster, "replica": broker, "broker_count": broker_count}
        self._topic_of = topic_of
        self._catalogue = catalogue
        self._topics: dict[tuple[int, int], TopicEntry] = {}
        self._numbers: dict[str, int] = {}
        self._by_tag: dict[int, Path] = {}
        self._chains: dict[tuple[str, int], list[tuple[int, Path]]] = {}    # (first position, file) of each chain

    def create(self, topic: int, generation: int, source: int, position: int, reclaimed: int) -> tuple[int, int]:
        """Begin the next file of a chain at `position`; its descriptor and the tag of its records.

        Files whose messages all lie below `reclaimed` are removed. Raises OSError.
        """
        entry = self._entry(topic, generation)
        identity = identity_of(entry.name, entry.created_ns)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        chain = self._chain(identity, source)
        first, tag = encode_superblock({
            **self._described, "source": source, "topic": asdict(entry), "first_position": position,
            "created_ns": time.time_ns()})
        descriptor, path = self._new_file(f"{identity}.{self._described['run_id']:x}.s{source}")
        try:
            if os.write(descriptor, first) < SUPERBLOCK_BYTES:
                raise OSError(28, "the superblock was not written")
            os.fdatasync(descriptor)
            self._sync_folder()
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()               # it holds nothing
            raise
        chain.append((position, path))
        self._trim(chain, reclaimed)
        self._by_tag[tag] = path
        return descriptor, tag

    def discard(self, tag: int) -> None:
        """Remove a file that failed before anything in it was durable."""
        path = self._by_tag.pop(tag, None)
        if path is not None:
            path.unlink(missing_ok=True)
            for chain in self._chains.values():
                chain[:] = [each for each in chain if each[1] != path]

    def _new_file(self, stem: str) -> tuple[int, Path]:
        while True:
            number = self._numbers[stem] = self._numbers.get(stem, -1) + 1      # never one that was there before
            path = self._folder / f"{stem}.{number:06d}.replica"
            with contextlib.suppress(FileExistsError):
                return os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600), path

    def _entry(self, topic: int, generation: int) -> TopicEntry:
        if (topic, generation) not in self._topics:
            self._topics[topic, generation] = self._topic_of(topic, generation)
        return self._topics[topic, generation]

    def _chain(self, identity: str, source: int) -> list[tuple[int, Path]]:
        """The files of a chain that are there, those of earlier runs too, by their first position."""
        if (identity, source) not in self._chains:
            found = [each for each in find_files(self._folder) if not each.damage
                     and each.identity == identity and each.source == source]
            self._chains[identity, source] = sorted((each.first_position, each.path) for each in found)
        return self._chains[identity, source]

    @staticmethod
    def _trim(chain: list[tuple[int, Path]], reclaimed: int) -> None:
        """A file ends where the next one begins: nobody needs it when that place is reclaimed."""
        while len(chain) > 1 and chain[1][0] <= reclaimed:
            _, path = chain.pop(0)
            with contextlib.suppress(OSError):
                path.unlink()

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def topic_appeared(self, topic: int, generation: int) -> None:
        """Note a topic. Raises OSError."""
        try:
            entry = self._entry(topic, generation)
        except LookupError:
            return                          # it is being deleted again
        self._write_down(entry)

    def topic_altered(self, entry: TopicEntry) -> None:
        """Note that a topic has other options. Raises OSError."""
        known = self._topics.get((entry.number, entry.generation))
        if known is not None and known.alteration < entry.alteration:
            self._write_down(entry)
            self._topics[entry.number, entry.generation] = entry

    def _write_down(self, entry: TopicEntry) -> None:
        if not self._catalogue:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / (identity_of(entry.name, entry.created_ns) + TOPIC_SUFFIX)
        path.with_suffix(".writing").write_text(json.dumps({**self._described, "topic": asdict(entry)}))
        os.replace(path.with_suffix(".writing"), path)

    def topic_deleted(self, topic: int, generation: int) -> None:
        """Remove a deleted topic's files, those of earlier runs too. Raises OSError."""
        entry = self._topics.pop((topic, generation), None)
        if entry is None or not self._folder.is_dir():
            return
        identity = identity_of(entry.name, entry.created_ns)
        # First that it is deleted: whoever finds what an interrupted removal left must not take it for a topic.
        if self._catalogue:
            (self._folder / (identity + DELETED_SUFFIX)).touch(mode=0o600)
        for path in self._folder.glob("*.replica"):
            if path.name.startswith(identity + "."):
                path.unlink(missing_ok=True)
        (self._folder / (identity + TOPIC_SUFFIX)).unlink(missing_ok=True)
        self._sync_folder()
        self._chains = {key: chain for key, chain in self._chains.items() if key[0] != identity}


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
                           described["broker_count"], described["first_position"], described["created_ns"], tag)
    except (ReplicaFileError, ValueError, KeyError, TypeError) as error:
        found = _NAME.fullmatch(path.name)
        topic = {"name": found["topic"], "created_ns": int(found["created"], 16)} if found else {
            "name": path.name, "created_ns": 0}
        run_id, source = (int(found["run"], 16), int(found["source"])) if found else (0, 0)
        return ReplicaFile(path, topic, run_id, source, 0, 0, 0, 0, damage=str(error) or "its superblock is damaged")


def find_files(folder: Path) -> list[ReplicaFile]:
    """The replica files below a folder, by path. Files that go away meanwhile are left out."""
    found = []
    for path in sorted(folder.rglob("*.replica")) if folder.is_dir() else ():
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
