"""One broker's folder of replica files: makes and removes them for the stage that fills them.

A file is removed only when it is proven that nobody needs it: all its batches lie below what is reclaimed, and whose
they were is on the disk (`.sessions`); or its topic was deleted. That it is deleted is on the disk first (`.deleted`),
and a broker that was away meanwhile compares its folder with what there is when it comes back. What each file is, is in
broker/replica_files.py.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broker.disk import sync, write
from broker.durable_files import FileDamaged, forget_unfinished, make_folder, read_durable, sync_folder, write_durable
from broker.group_files import remove_groups_of
from broker.replica_files import (
    DELETED_SUFFIX,
    SESSIONS_SUFFIX,
    TOPIC_SUFFIX,
    encode_superblock,
    find_files,
    identity_in,
    identity_of,
    names_of,
    path_descriptor,
)
from broker.replica_record import SUPERBLOCK_BYTES
from broker.session_trail import SessionTrail
from broker.topics import TopicEntry

CLIENTS_MAX = 16384         # whose last batches are kept in mind for each topic, the latest


@dataclass
class _ChainFile:
    """A file of a chain; `end` is the position behind its last batch, once somebody looked."""

    first: int
    path: Path
    tag: int
    end: int | None = None


class ReplicaFolder:
    """One broker's folder of replica files. Calls may come from several threads.

    `topic_of` finds the entry of an active topic by (number, generation). With `catalogue`, topics are written down
    even when they have no replicas, so that recovery can say what it cannot bring back. `limits` are the region's
    numbers, which recovery compares with those of the next one.
    """

    def __init__(self, folder: Path, broker: int, run_id: int, cluster: str, broker_count: int,
                 topic_of: Callable[[int, int], TopicEntry], catalogue: bool = False,
                 limits: dict[str, int] | None = None) -> None:
        self._folder = folder
        self._described = {"run_id": run_id, "cluster": cluster, "replica": broker, "broker_count": broker_count,
                           "limits": limits or {}}
        self._topic_of = topic_of
        self._catalogue = catalogue
        self._lock = threading.RLock()
        self._topics: dict[tuple[int, int], TopicEntry] = {}
        self._numbers: dict[str, int] = {}
        self._open: dict[tuple[str, int], Path] = {}            # the file of each chain that is being written
        self._chains: dict[str, dict[int, list[_ChainFile]]] = {}       # identity -> source -> files in order
        self._announced: set[str] = set()                       # written down before they are made
        self._unwritten: dict[str, TopicEntry] = {}             # topics that no disk could be told of yet
        self._unremoved: set[str] = set()                       # deleted ones whose files are not all gone yet
        forget_unfinished(folder)

    # ---- files of batches -------------------------------------------------------------------------------------------

    def create(self, topic: int, generation: int, source: int, position: int, reclaimed: int) -> tuple[int, int]:
        """Begin the next file of a chain at `position`; its descriptor and the tag of its records.

        Files of the topic whose batches all lie below `reclaimed` are removed. Raises OSError.
        """
        with self._lock:
            entry = self._entry(topic, generation)
            identity = identity_of(entry.name, entry.created_ns)
            make_folder(self._folder)
            first, tag = encode_superblock({
                **self._described, "source": source, "topic": asdict(entry), "first_position": position,
                "created_ns": time.time_ns()})
            chains = self._files_of(identity)
            descriptor, path = self._new_file(f"{identity}.{self._described['run_id']:x}.s{source}")
            try:
                if write(descriptor, first) < SUPERBLOCK_BYTES:
                    raise OSError(errno.ENOSPC, "the superblock was not written")
                sync(descriptor)
                sync_folder(self._folder)
            except BaseException:
                os.close(descriptor)
                with contextlib.suppress(OSError):
                    path.unlink()               # it holds nothing
                raise
            chains.setdefault(source, []).append(_ChainFile(position, path, tag))
            self._open[identity, source] = path
            with contextlib.suppress(OSError):  # what could not be removed now is removed with the next file
                self._trim(identity, reclaimed)
            return descriptor, tag

    def discard(self, tag: int) -> None:
        """Remove a file that failed before anything in it was durable."""
        with self._lock:
            for chains in self._chains.values():
                for chain in chains.values():
                    for each in [each for each in chain if each.tag == tag]:
                        each.path.unlink(missing_ok=True)
                        chain.remove(each)

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

    def _files_of(self, identity: str) -> dict[int, list[_ChainFile]]:
        """A topic's files that are there and whole, those of earlier runs too, by source and first position."""
        if identity not in self._chains:
            chains: dict[int, list[_ChainFile]] = {}
            found = find_files(self._folder, identity)
            for each in sorted(found, key=lambda each: (each.first_position, each.created_ns)):
                if not each.damage and each.identity == identity:
                    chains.setdefault(each.source, []).append(_ChainFile(each.first_position, each.path, each.tag))
            self._chains[identity] = chains
        return self._chains[identity]

    def trim(self, reclaimed: dict[str, int]) -> None:
        """Remove the files below what is reclaimed of each topic (by identity), also where no next file begins: this
        broker was away, or is no replica any more. Raises OSError."""
        with self._lock:
            for identity, position in reclaimed.items():
                self._trim(identity, position)

    def _trim(self, identity: str, reclaimed: int) -> None:
        """Remove the files whose batches are all reclaimed. Whose they were is on the disk before. Raises OSError."""
        trail = SessionTrail()
        spent = []
        for source, chain in self._files_of(identity).items():
            for number, each in enumerate(chain):
                following = chain[number + 1].first if number + 1 < len(chain) else 0
                if each.path == self._open.get((identity, source)) or max(each.first, following) > reclaimed:
                    continue
                if each.end is None or each.end <= reclaimed:
                    each.end = max(following, self._note(each, trail, reclaimed))
                if each.end <= reclaimed:
                    spent.append((chain, each))
        if not spent:
            return
        self._remember(identity, trail)
        for chain, each in spent:
            each.path.unlink(missing_ok=True)
            chain.remove(each)

    @staticmethod
    def _note(file: _ChainFile, trail: SessionTrail, reclaimed: int) -> int:
        """Note whose batches of a file are reclaimed; the position behind its last one.

        What is not reclaimed is not noted: it may have been read from a file whose sync failed, and be on no disk.
        """
        try:
            with path_descriptor(file.path) as descriptor:
                return int(trail.scan(descriptor, file.tag, os.fstat(descriptor).st_size, reclaimed)[0])
        except FileNotFoundError:
            return 0

    def _remember(self, identity: str, trail: SessionTrail) -> None:
        """Add to the clients that were told of before. Raises OSError."""
        path = self._folder / (identity + SESSIONS_SUFFIX)
        with contextlib.suppress(FileNotFoundError, FileDamaged):       # a damaged one says nothing that could be kept
            add_sessions(trail, read_durable(path, "sessions").values)
        latest = sorted(trail.clients(), key=lambda each: -each[3])[:CLIENTS_MAX]
        write_durable(path, "sessions", {"clients": [[*each[:4], f"{each[4]:x}"] for each in latest]})

    # ---- topics -----------------------------------------------------------------------------------------------------

    def topic_appeared(self, topic: int, generation: int) -> None:
        """Note a topic. Raises OSError: `tend` tries again."""
        with self._lock:
            try:
                entry = self._entry(topic, generation)
            except LookupError:
                return                          # it is being deleted again
            identity = identity_of(entry.name, entry.created_ns)
            if self._catalogue and identity not in self._announced:
                self._unwritten[identity] = entry
                self._write_topics()
            self._announced.discard(identity)

    def announce(self, entry: TopicEntry) -> None:
        """Write down a topic that is about to be made; durable when this returns. Raises OSError: nothing is there."""
        with self._lock:
            if self._catalogue:
                identity = identity_of(entry.name, entry.created_ns)
                self._write_topic(identity, entry)
                self._announced.add(identity)

    def retract(self, entry: TopicEntry) -> None:
        """It was not made after all."""
        with self._lock:
            identity = identity_of(entry.name, entry.created_ns)
            self._announced.discard(identity)
            if self._catalogue:
                with contextlib.suppress(OSError):      # `compare` finds it, and that this run has no such topic
                    (self._folder / (identity + TOPIC_SUFFIX)).unlink(missing_ok=True)
                    sync_folder(self._folder)

    def topic_altered(self, entry: TopicEntry) -> None:
        """Note that a topic has other options. Raises OSError: `tend` tries again."""
        with self._lock:
            known = self._topics.get((entry.number, entry.generation))
            if known is not None and known.alteration < entry.alteration:
                self._topics[entry.number, entry.generation] = entry
                if self._catalogue:
                    self._unwritten[identity_of(entry.name, entry.created_ns)] = entry
            self._write_topics()

    def _write_topics(self) -> None:
        for identity, entry in list(self._unwritten.items()):
            self._write_topic(identity, entry)
            del self._unwritten[identity]

    def _write_topic(self, identity: str, entry: TopicEntry) -> None:
        write_durable(self._folder / (identity + TOPIC_SUFFIX), "topic", {
            **self._described, "topic": asdict(entry), "written_ns": time.time_ns()})

    def topic_deleted(self, topic: int, generation: int) -> None:
        """Remove a deleted topic's files, those of earlier runs too. Raises OSError: `tend` tries again."""
        with self._lock:
            entry = self._topics.pop((topic, generation), None)
            if entry is not None:
                self.forget(identity_of(entry.name, entry.created_ns))

    def forget(self, identity: str) -> None:
        """Write down that a topic is deleted, then remove its files. Raises OSError: `tend` tries again."""
        with self._lock:
            self._unwritten.pop(identity, None)
            self._unremoved.add(identity)
            self._remove()

    def say_deleted(self, name: str, created_ns: int) -> None:
        """Write down that a topic is deleted; durable when this returns. Raises OSError."""
        path = self._folder / (identity_of(name, created_ns) + DELETED_SUFFIX)
        with self._lock:
            if self._catalogue and not path.exists():
                write_durable(path, "deleted", {**self._described, "topic": name, "created_ns": created_ns,
                                                "deleted_ns": time.time_ns()})

    def _remove(self) -> None:
        for identity in list(self._unremoved):
            # First that it is deleted: whoever finds what an interrupted removal left must not take it for a topic.
            self.say_deleted(*names_of(identity))
            for path in list(self._folder.glob("*")) if self._folder.is_dir() else ():
                if identity_in(path.name) == identity and not path.name.endswith(DELETED_SUFFIX):
                    path.unlink(missing_ok=True)
            if self._folder.is_dir():
                remove_groups_of(self._folder, *names_of(identity))
                sync_folder(self._folder)
            self._unremoved.discard(identity)
            self._chains.pop(identity, None)
            self._open = {key: path for key, path in self._open.items() if key[0] != identity}

    # ---- what was missed --------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether a disk failed when something had to be written down or removed."""
        return bool(self._unwritten or self._unremoved)

    def tend(self) -> None:
        """Try again what a disk refused. Raises OSError."""
        with self._lock:
            self._remove()
            self._write_topics()

    def found(self) -> set[str]:
        """The topics that have files here."""
        return {identity for path in self._folder.glob("*") if (identity := identity_in(path.name)) is not None
                and not path.name.endswith(DELETED_SUFFIX)} if self._folder.is_dir() else set()

    def compare(self, found: set[str], active: Collection[TopicEntry]) -> None:
        """Forget the topics that were deleted while this broker was away. Raises OSError: `tend` tries again.

        `active` are those that there were after the folder was read: of one that was created meanwhile nothing was
        `found`. That a topic is not there proves nothing, it may be one that was not recovered. It was deleted when
        some broker wrote that down, or when it was there in this very run.
        """
        with self._lock:
            there = {identity_of(each.name, each.created_ns) for each in active}
            told = {path.name.removesuffix(DELETED_SUFFIX) for path in self._folder.parent.glob(
                f"broker-*/*{DELETED_SUFFIX}")} if self._catalogue else set()
            for identity in sorted(found - there):
                if identity in told or self._is_of_this_run(identity):
                    self._unremoved.add(identity)
            self._remove()

    def _is_of_this_run(self, identity: str) -> bool:
        with contextlib.suppress(OSError, FileDamaged):
            content = read_durable(self._folder / (identity + TOPIC_SUFFIX), "topic")
            if content.values.get("run_id") == self._described["run_id"]:
                return True
        return any(each.run_id == self._described["run_id"] for each in find_files(self._folder, identity)
                   if not each.damage)


def add_sessions(trail: SessionTrail, values: dict[str, Any]) -> None:
    """Take in what a `.sessions` file says. Raises `FileDamaged`."""
    try:
        for client, epoch, highest, position, bits in values["clients"]:
            trail.add(client, epoch, highest, position, int(bits, 16))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileDamaged(f"it does not say what it should: {error!r}") from error
