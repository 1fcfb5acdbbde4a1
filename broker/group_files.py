"""The durable side of consumer groups: one small file a group, beside the replicas of its topic.

    CXLMQGRP | crc32 of what follows, 8 hexadecimal digits | JSON

Each change is a new file that is synced and then takes the place of the old one: a file is whole, or it is not there.
"""

import json
import os
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

MAGIC = b"CXLMQGRP"
SUFFIX = ".group"


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A group as it is on disk. Of several with one `key`, that with the highest version counts."""

    topic: str
    created_ns: int
    group: str
    version: int
    position: int
    protected: bool
    committed_wall_ns: int

    @property
    def key(self) -> tuple[str, int, str]:
        """What there is one record of, through all runs of a cluster."""
        return self.topic, self.created_ns, self.group

    @property
    def file_name(self) -> str:
        """Names of topics and groups have no character that a file's cannot have."""
        return f"{self.topic}-{self.created_ns:x}.{self.group}{SUFFIX}"


class GroupFiles:
    """The group files of one broker. Calls may come from several threads."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._stored: dict[str, int] = {}       # file name -> version
        self._lock = threading.Lock()

    def store(self, record: GroupRecord) -> None:
        """Make a record durable; an older one than was stored is passed over. Raises `OSError`."""
        with self._lock:
            if self._stored.get(record.file_name, -1) >= record.version:
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            body = msgspec.json.encode(record)
            fresh = self._folder / f".{record.file_name}.new"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                data = MAGIC + b"%08x" % zlib.crc32(body) + body
                while data:
                    data = data[os.write(descriptor, data):]
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            fresh.replace(self._folder / record.file_name)
            self._sync_folder()
            self._stored[record.file_name] = record.version

    def stored(self) -> dict[str, int]:
        """Versions of what is stored, by file name."""
        with self._lock:
            return dict(self._stored)

    def keep(self, records: Iterable[GroupRecord], known: Iterable[str]) -> None:
        """Make the files say what there was when `known` was stored: store what changed, remove what went.

        What others have stored since then stays. Raises `OSError`.
        """
        records = list(records)
        for record in records:
            self.store(record)
        for name in set(known) - {record.file_name for record in records}:
            self._remove(name)

    def _remove(self, name: str) -> None:
        with self._lock:
            (self._folder / name).unlink(missing_ok=True)
            self._sync_folder()
            self._stored.pop(name, None)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_group_files(folders: Iterable[str | Path]) -> tuple[list[GroupRecord], list[str]]:
    """The newest record of each group in the brokers' replica folders, and what is damaged (nothing is removed)."""
    newest: dict[Any, GroupRecord] = {}
    damaged = []
    for folder in folders:
        for file in sorted(Path(folder).glob(f"*{SUFFIX}")):
            try:
                record = _parse(file.read_bytes())
            except (ValueError, msgspec.DecodeError, OSError) as error:
                damaged.append(f"{file}: {error}")
                continue
            if record.key not in newest or newest[record.key].version < record.version:
                newest[record.key] = record
    return list(newest.values()), damaged


def _parse(data: bytes) -> GroupRecord:
    if data[:8] != MAGIC:
        raise ValueError("this is no group file")
    if b"%08x" % zlib.crc32(data[16:]) != data[8:16]:
        raise ValueError("its checksum is wrong")
    return msgspec.convert(json.loads(data[16:]), GroupRecord)
