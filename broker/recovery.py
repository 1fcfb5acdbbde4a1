"""What the replicas' disks still have of a cluster whose memory is gone, and what they have not.

    files ──► records by topic and position ──► holes, sessions ──► RecoveryPlan ──► broker/restore.py ──► region

Level 2 was acknowledged only when everything below was on the disks, so it ends where the log has its first hole;
records say how far it had come (`durable_position`). A hole below that is damage: what follows is kept. Above is a tail
that no disk had yet: there, what comes behind a lost batch of its own session is given up too. Its publisher was never
told of it, sends it again, and must find neither a gap nor a duplicate.

Runs of a cluster over the same folder follow one another: DIR/recoveries/<number>.json says up to which position of
each topic earlier files count. Recovery changes nothing else there, so it can be killed and run again.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from broker.errors import RecoveryError
from broker.replica_files import (
    DELETED_SUFFIX,
    TOPIC_SUFFIX,
    Damage,
    Record,
    ReplicaFile,
    find_files,
    identity_of,
    read_records,
)

MANIFESTS = "recoveries"
_IDENTICAL = ("message_count", "payload_bytes", "payload_crc", "client_id", "session_epoch", "batch_sequence")


@dataclass(frozen=True)
class Range:
    """Messages from `first` up to `end` that are not there, and why."""

    first: int
    end: int
    reason: str         # "unsynced": no disk had them yet; "damaged"; "missing": nobody knows why; "no room"


@dataclass
class RecoveredBatch:
    """A batch as it will be in the log, and one place where its payload lies."""

    path: Path
    record: Record
    copies: int = 1     # disks that have it


@dataclass
class RecoveredSession:
    """A publisher's last session: everything below `expected` is in the log."""

    client_id: int
    epoch: int
    expected: int
    messages: int
    position: int       # behind its last message


@dataclass
class RecoveredTopic:
    """A topic, what is left of it, and what is lost."""

    options: dict[str, Any]
    first_position: int = 0
    durable_position: int = 0
    end_position: int = 0               # where new messages go
    batches: list[RecoveredBatch] = field(default_factory=list)
    sessions: list[RecoveredSession] = field(default_factory=list)
    lost: list[Range] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The topic's name."""
        return str(self.options["name"])

    @property
    def identity(self) -> str:
        """What tells it from other topics of its name."""
        return identity_of(self.name, self.options["created_ns"])


@dataclass
class DamagedFile:
    """A damaged range of a file; nothing is removed from it."""

    path: str
    offset: int
    nbytes: int
    what: str
    topic: str
    source: int
    replica: int
    first_position: int | None
    end_position: int | None


@dataclass
class RecoveryPlan:
    """Everything that the folder says."""

    folder: Path
    run_ids: list[int]
    topics: list[RecoveredTopic]
    damage: list[DamagedFile]
    ignored: list[str]                  # what is not restored on purpose, in words

    def report(self) -> dict[str, Any]:
        """The plan for people and programs, as JSON values."""
        return {
            "folder": str(self.folder), "runs": [f"{run:x}" for run in self.run_ids],
            "topics": [{
                "name": topic.name, "replication_factor": topic.options["replication_factor"],
                "first_position": topic.first_position, "end_position": topic.end_position,
                "messages": sum(each.record.end - each.record.position for each in topic.batches),
                "bytes": sum(each.record.fields["payload_bytes"] for each in topic.batches),
                "batches": len(topic.batches), "sessions": len(topic.sessions),
                "durable_position": topic.durable_position,
                "in_memory_only": topic.options["replication_factor"] == 1,
                "lost": [asdict(each) for each in topic.lost],
            } for topic in self.topics],
            "damage": [asdict(each) for each in self.damage], "ignored": self.ignored,
        }


# ---- manifests: which run counts where -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """One recovery that took place: the run that it began, and where each topic stood then."""

    number: int
    run_id: int
    ends: dict[str, int]                            # topic identity -> position at which the new run goes on
    lost: dict[str, list[tuple[int, int]]]


def read_manifests(folder: Path) -> list[Manifest]:
    """All earlier recoveries, oldest first. Raises `RecoveryError` for one that is damaged."""
    found = []
    for path in sorted((folder / MANIFESTS).glob("*.json")):
        try:
            values = json.loads(path.read_text())
            found.append(Manifest(
                int(path.stem), int(values["run_id"]),
                {key: int(each["end"]) for key, each in values["topics"].items()},
                {key: [(int(a), int(b)) for a, b in each["lost"]] for key, each in values["topics"].items()}))
        except (ValueError, KeyError, TypeError) as error:
            raise RecoveryError(folder=folder, reason=(
                f"{path} is damaged ({error}): restore it from a copy; without it nobody knows which batches "
                "count")) from error
    return found


def write_manifest(folder: Path, run_id: int, topics: Iterable[RecoveredTopic]) -> Path:
    """Write down that `run_id` goes on where these topics end; durable when this returns."""
    target = folder / MANIFESTS
    target.mkdir(mode=0o700, exist_ok=True)
    number = max((each.number for each in read_manifests(folder)), default=0) + 1
    text = json.dumps({"run_id": run_id, "topics": {
        topic.identity: {"end": topic.end_position, "lost": [[each.first, each.end] for each in topic.lost
                                                             if each.reason != "no room"]}
        for topic in topics}}, indent=1)
    path = target / f"{number:06d}.json"
    with open(path.with_suffix(".writing"), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".writing"), path)
    for each in (target, folder):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


class Runs:
    """The order of the runs over one folder."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self._manifests = manifests
        self._began_by = {each.run_id: number for number, each in enumerate(manifests)}

    def end(self, identity: str, run_id: int) -> int | None:
        """The position of a topic up to which a run's files count; None: there is no end.

        What a run has below the place where it began is a copy of what it was recovered from.
        """
        own = self._began_by.get(run_id)
        for later in self._manifests[0 if own is None else own + 1:]:
            if identity in later.ends:
                return later.ends[identity]
        return None

    def lost(self, identity: str) -> list[tuple[int, int]]:
        """What earlier recoveries have given up: it does not come back."""
        return [each for manifest in self._manifests for each in manifest.lost.get(identity, ())]


# ---- reading -------------------------------------------------------------------------------------------------------


def make_plan(folder: Path) -> RecoveryPlan:
    """Read every file below the folder. Raises `RecoveryError` when there is nothing to recover from."""
    if not folder.is_dir():
        raise RecoveryError(folder=folder, reason="there is no such folder")
    files, known, deleted = find_files(folder), _catalogue(folder), _deleted(folder)
    if not files and not known:
        raise RecoveryError(folder=folder, reason="it has neither replica files nor topics; the data_directory of the "
                                                  "cluster is wanted, with its folders broker-0, broker-1 ...")
    damage = [_damaged(file, Damage(0, 0, file.damage)) for file in files if file.damage]
    by_topic: dict[str, list[ReplicaFile]] = {}
    for file in files:
        if not file.damage:
            by_topic.setdefault(file.identity, []).append(file)
            known[file.identity] = _latest(known.get(file.identity), file.topic)
    runs = Runs(read_manifests(folder))
    chosen, ignored = _choose(known, deleted)
    topics = [_recover_topic(options, by_topic.get(identity, []), runs, damage)
              for identity, options in sorted(chosen.items(), key=lambda each: each[1]["created_ns"])]
    return RecoveryPlan(folder, sorted({file.run_id for file in files}), topics, damage, ignored)


def _catalogue(folder: Path) -> dict[str, dict[str, Any]]:
    """Topics that were written down, by identity."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*" + TOPIC_SUFFIX)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            options = json.loads(path.read_text())["topic"]
            identity = identity_of(options["name"], options["created_ns"])
            found[identity] = _latest(found.get(identity), options)
    return found


def _latest(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Of two descriptions of a topic, the one that was altered last: a broker may have been away then."""
    return other if one is None or other.get("alteration", 0) > one.get("alteration", 0) else one


def _deleted(folder: Path) -> set[str]:
    return {path.name.removesuffix(DELETED_SUFFIX) for path in folder.rglob("*" + DELETED_SUFFIX)}


def _choose(known: dict[str, dict[str, Any]], deleted: set[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The topics to restore: not the deleted ones, and of each name the latest."""
    chosen: dict[str, dict[str, Any]] = {}
    latest: dict[str, str] = {}
    ignored = []
    for identity, options in sorted(known.items(), key=lambda each: each[1]["created_ns"]):
        if identity in deleted:
            ignored.append(f"topic {options['name']!r} ({identity}) was deleted")
            continue
        if options["name"] in latest:
            older = latest[options["name"]]
            del chosen[older]
            ignored.append(f"an older topic {options['name']!r} ({older}): a later one has its name")
        latest[options["name"]] = identity
        chosen[identity] = options
    return chosen, ignored


def _damaged(file: ReplicaFile, damage: Damage) -> DamagedFile:
    return DamagedFile(str(file.path), damage.offset, damage.nbytes, damage.what, file.topic["name"], file.source,
                       file.replica, damage.first_position, damage.end_position)


@dataclass
class _Reading:
    """What the files of one topic say together."""

    batches: dict[int, RecoveredBatch] = field(default_factory=dict)
    holders: dict[int, set[int]] = field(default_factory=dict)     # position -> replicas that have it
    durable: int = 0
    committed: int = 0
    reclaimed: int = 0


def _recover_topic(options: dict[str, Any], files: list[ReplicaFile], runs: Runs,
                   damage: list[DamagedFile]) -> RecoveredTopic:
    topic, reading = RecoveredTopic(options), _Reading()
    given_up = runs.lost(topic.identity)
    for file in sorted(files, key=lambda each: each.created_ns):
        end = runs.end(topic.identity, file.run_id)
        for each in read_records(file):
            if isinstance(each, Damage):
                damage.append(_damaged(file, each))
            elif end is None or each.position < end:
                _take(reading, file, each, given_up, damage)
    for position, batch in reading.batches.items():
        batch.copies = len(reading.holders[position])
    topic.durable_position = reading.durable
    topic.first_position = reading.reclaimed
    _lay_out(topic, reading, [each for each in damage if each.topic == topic.name], given_up)
    return topic


def _take(reading: _Reading, file: ReplicaFile, record: Record, given_up: list[tuple[int, int]],
          damage: list[DamagedFile]) -> None:
    """Add one record to what is known of its topic."""
    fields = record.fields
    reading.durable = max(reading.durable, fields["durable_position"])
    reading.committed = max(reading.committed, fields["committed_position"], record.end)
    reading.reclaimed = max(reading.reclaimed, fields["first_position"])
    if record.end == record.position or any(first <= record.position < end for first, end in given_up):
        return
    other = reading.batches.get(record.position)
    if other is not None and any(other.record.fields[key] != fields[key] for key in _IDENTICAL):
        damage.append(_damaged(file, Damage(record.payload_offset, fields["payload_bytes"], (
            f"another batch than the one at the same position in {other.path}"), record.position, record.end)))
        return
    if other is None:
        reading.batches[record.position] = RecoveredBatch(file.path, record)
    reading.holders.setdefault(record.position, set()).add(file.replica)


def _lay_out(topic: RecoveredTopic, reading: _Reading, damage: list[DamagedFile],
             given_up: list[tuple[int, int]]) -> None:
    """Put the batches into their order, name the holes, follow the sessions."""
    kept = _without_gaps(topic, reading)
    position = topic.first_position
    for batch in kept:
        if batch.record.position < position:
            continue                            # reclaimed, or overlapping one that is there
        _lose(topic, position, batch.record.position, damage, given_up)
        topic.batches.append(batch)
        position = batch.record.end
    _lose(topic, position, reading.committed, damage, given_up)
    topic.end_position = max(position, reading.committed)
    topic.sessions = list(_sessions(topic))


def _lose(topic: RecoveredTopic, first: int, end: int, damage: list[DamagedFile],
          given_up: list[tuple[int, int]]) -> None:
    if first >= end:
        return
    hit = any(each.first_position is not None and each.first_position < end
              and (each.end_position is None or each.end_position > first) for each in damage)
    if any(a <= first and end <= b for a, b in given_up):
        reason = "lost before"
    elif first >= topic.durable_position:
        reason = "unsynced"
    else:
        reason = "damaged" if hit else "missing"
    topic.lost.append(Range(first, end, reason))


def _without_gaps(topic: RecoveredTopic, reading: _Reading) -> Iterator[RecoveredBatch]:
    """The batches by position; at order 5, above what was durable, none that comes behind a lost one of its session."""
    expected: dict[tuple[int, int], int] = {}
    for position in sorted(reading.batches):
        batch = reading.batches[position]
        fields = batch.record.fields
        session = fields["client_id"], fields["session_epoch"]
        if topic.options["order"] == 5:
            behind_gap = fields["batch_sequence"] > expected.get(session, fields["batch_sequence"])
            first_of_all = session not in expected and fields["batch_sequence"] > 0 and topic.first_position == 0
            if position >= topic.durable_position and (behind_gap or first_of_all):
                expected.setdefault(session, 0)
                continue
        expected[session] = fields["batch_sequence"] + 1
        yield batch


def _sessions(topic: RecoveredTopic) -> Iterator[RecoveredSession]:
    """The last session of each client, as far as the log tells."""
    latest: dict[int, list[dict[str, int]]] = {}
    for batch in topic.batches:
        fields = batch.record.fields
        seen = latest.setdefault(fields["client_id"], [])
        if seen and fields["session_epoch"] > seen[0]["session_epoch"]:
            seen.clear()
        if not seen or fields["session_epoch"] == seen[0]["session_epoch"]:
            seen.append(fields)
    for client, batches in latest.items():
        sequences = sorted({each["batch_sequence"] for each in batches})
        if topic.options["order"] == 5:
            expected = sequences[-1] + 1
        else:                                   # batches may be beyond a gap: those are found by looking into the log
            expected = next((at for at, each in enumerate(sequences, sequences[0]) if at != each), sequences[-1] + 1)
        yield RecoveredSession(client, batches[0]["session_epoch"], expected,
                               sum(each["message_count"] for each in batches),
                               max(each["position"] + each["message_count"] for each in batches))
