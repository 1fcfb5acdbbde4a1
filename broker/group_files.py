"""The durable side of consumer groups: one small file a group, beside the replicas of its topic.

    CXLMQGRP | crc32 of what follows, 8 hexadecimal digits | JSON

Each change is a new file that is synced and then takes the place of the old one: a file is whole, or it is not there. A
group that is deleted leaves a record that says so: a disk that was away meanwhile still has an older one.
"""

import contextlib
import json
import threading
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from broker.durable_files import sync_folder, write_whole

MAGIC = b"CXLMQGRP"
SUFFIX = ".group"


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A group as it is on disk. Of several with one `key`, the last run's with the highest version counts."""

    topic: str
    created_ns: int
    group: str
    version: int
    position: int
    protected: bool
    committed_wall_ns: int
    deleted: bool = False
    run_id: int = 0             # 0: written by a version that did not say

    @property
    def key(self) -> tuple[str, int, str]:
        """What there is one record of, through all runs of a cluster."""
        return self.topic, self.created_ns, self.group

    @property
    def file_name(self) -> str:
        """Names of topics and groups have no character that a file's cannot have."""
        return f"{self.topic}-{self.created_ns:x}.{self.group}{SUFFIX}"


class GroupFiles:
    """The group files of one broker in one run of a cluster. Calls may come from several threads."""

    def __init__(self, folder: str | Path, run_id: int = 0) -> None:
        self._folder = Path(folder)
        self._run_id = run_id
        self._stored: dict[str, GroupRecord] = {}       # by file name; groups that are there
        self.loaded = False
        self._lock = threading.Lock()

    def load(self) -> None:
        """Know what an earlier process of this broker stored in this run, and what was deleted while it was away.

        Raises `OSError`. What is damaged is left as it is, for recovery to name.
        """
        for file in sorted(self._folder.glob(f"*{SUFFIX}")):
            record = _read_or_none(file)
            if record is None or record.deleted:
                continue
            others = [_read_or_none(each) for each in self._folder.parent.glob(f"broker-*/{file.name}")]
            told = [each for each in others if each is not None and each.deleted and each.key == record.key
                    and each.run_id == record.run_id and each.version >= record.version]
            with self._lock:
                if record.file_name in self._stored:
                    continue                    # stored by us meanwhile
                if told:
                    self._write(told[0])
                elif record.run_id == self._run_id != 0:
                    self._stored[record.file_name] = record
        self.loaded = True

    def store(self, record: GroupRecord) -> None:
        """Make a record durable; an older one than was stored is passed over. Raises `OSError`."""
        with self._lock:
            known = self._stored.get(record.file_name)
            if known is None or known.version < record.version:
                self._write(record)
                self._stored[record.file_name] = record

    def _write(self, record: GroupRecord) -> None:
        body = msgspec.json.encode(msgspec.structs.replace(record, run_id=record.run_id or self._run_id))
        write_whole(self._folder / record.file_name, MAGIC + b"%08x" % zlib.crc32(body) + body)

    def delete(self, record: GroupRecord) -> None:
        """Write down that a group is deleted; durable when this returns. Raises `OSError`."""
        with self._lock:
            self._write(msgspec.structs.replace(record, deleted=True))
            self._stored.pop(record.file_name, None)

    def stored(self) -> dict[str, int]:
        """Versions of what is stored, by file name."""
        with self._lock:
            return {name: record.version for name, record in self._stored.items()}

    def keep(self, records: Iterable[GroupRecord], known: Iterable[str],
             topics: Collection[tuple[str, int]] | None = None) -> None:
        """Make the files say what there was when `known` was stored: store what changed, write down what was deleted.

        What others have stored since then stays. `topics` (name, created) are those that there are: groups of
        others went with them. Raises `OSError`.
        """
        records = list(records)
        for record in records:
            self.store(record)
        for name in set(known) - {record.file_name for record in records}:
            with self._lock:
                record = self._stored.get(name)         # type: ignore[assignment]
                if record is None:
                    continue
                if topics is None or (record.topic, record.created_ns) in topics:
                    self._write(msgspec.structs.replace(record, deleted=True))
                else:
                    (self._folder / name).unlink(missing_ok=True)
                    sync_folder(self._folder)
                del self._stored[name]


def remove_groups_of(folder: Path, topic: str, created_ns: int) -> None:
    """Remove the group files of a topic that was deleted from a broker's folder. Raises `OSError`."""
    for file in folder.glob(f"{topic}-{created_ns:x}.*{SUFFIX}"):
        record = _read_or_none(file)
        if record is not None and record.key[:2] == (topic, created_ns):
            file.unlink(missing_ok=True)


def read_group_files(folders: Iterable[str | Path],
                     run_number: Callable[[int], int] = lambda _: 0) -> tuple[list[GroupRecord], list[str]]:
    """The newest record of each group in the brokers' replica folders, and what is damaged (nothing is removed).

    `run_number` says which of the runs of a cluster is which, by their ids. Deleted groups are left out.
    """
    newest: dict[Any, tuple[tuple[int, int, bool], GroupRecord]] = {}
    damaged = []
    for folder in folders:
        for file in sorted(Path(folder).glob(f"*{SUFFIX}")):
            try:
                record = _parse(file.read_bytes())
            except (ValueError, msgspec.DecodeError, OSError) as error:
                damaged.append(f"{file}: {error}")
                continue
            age = run_number(record.run_id), record.version, record.deleted
            if record.key not in newest or newest[record.key][0] < age:
                newest[record.key] = age, record
    return [record for _, record in newest.values() if not record.deleted], damaged


def damaged_group_files(folders: Iterable[Path]) -> list[tuple[Path, str]]:
    """The group files in these folders that are damaged, and why."""
    found = []
    for file in (file for folder in folders for file in sorted(folder.glob(f"*{SUFFIX}"))):
        try:
            _parse(file.read_bytes())
        except (ValueError, msgspec.DecodeError, OSError) as error:
            found.append((file, str(error)))
    return found


def _read_or_none(file: Path) -> GroupRecord | None:
    with contextlib.suppress(ValueError, msgspec.DecodeError, FileNotFoundError):
        return _parse(file.read_bytes())
    return None


def _parse(data: bytes) -> GroupRecord:
    if data[:8] != MAGIC:
        raise ValueError("this is no group file")
    if b"%08x" % zlib.crc32(data[16:]) != data[8:16]:
        raise ValueError("its checksum is wrong")
    return msgspec.convert(json.loads(data[16:]), GroupRecord)
