"""What the replicas' disks still have of a cluster whose memory is gone, and what they have not.

    files ──► records by topic and position ──► holes, sessions ──► RecoveryPlan ──► broker/restore.py ──► region

Level 2 was acknowledged only when everything below was on the disks, so it ends where the log has its first hole;
records say how far it had come (`durable_position`). A hole below that is damage: what follows is kept. Above is a tail
that no disk had yet: there, at order 5, a batch is kept only if all that its session sent before is known to be in the
log. The publisher of the others was never told of them, sends them again, and must find neither a gap nor a duplicate.
So nothing counts as committed because it was not found: of what was reclaimed `.sessions` files tell whose it was.

Runs of a cluster over the same folder follow one another: DIR/recoveries/<number>.json says up to which position of
each topic earlier files count. Recovery changes nothing else there, so it can be killed and run again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from broker.config import TopicConfig
from broker.durable_files import FileDamaged, read_durable, write_durable
from broker.errors import RecoveryError, TopicError
from broker.replica_files import (
    DELETED_SUFFIX,
    MANIFESTS,
    SESSIONS_SUFFIX,
    TOPIC_SUFFIX,
    Damage,
    Record,
    ReplicaFile,
    files_below,
    find_files,
    identity_of,
    names_of,
    read_records,
)
from broker.replica_folder import add_sessions
from broker.session_trail import TRAIL_WINDOW, SessionTrail

BROKERS_MAX = 64
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
    """A publisher's last session: everything below `expected` is, or was, in the log."""

    client_id: int
    epoch: int
    expected: int
    messages: int
    position: int       # behind its last message
    in_log: int = 0     # bit n % 256: batch n of those from `expected` on as well, at order levels below 5
    found_from: int = 0     # of those from here up to `expected` only what is found is in the log, at order 5


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
    """A damaged range of a file; nothing is removed from it. Small files have neither source nor replica: -1."""

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
    limits: dict[str, int] = field(default_factory=dict)    # the numbers of the region that wrote last; empty: unknown

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


def manifest_paths(folder: Path) -> list[Path]:
    """The files of all earlier recoveries, oldest first."""
    return sorted((folder / MANIFESTS).glob("*.json"))


def read_manifest(path: Path) -> Manifest:
    """One earlier recovery. Raises `FileDamaged`, OSError."""
    values = read_durable(path, "manifest").values
    try:
        return Manifest(int(path.stem), int(values["run_id"]),
                        {key: int(each["end"]) for key, each in values["topics"].items()},
                        {key: [(int(a), int(b)) for a, b in each["lost"]] for key, each in values["topics"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileDamaged(f"it does not say what it should: {error!r}") from error


def read_manifests(folder: Path) -> list[Manifest]:
    """All earlier recoveries, oldest first. Raises `RecoveryError` for one that is damaged or missing."""
    found: list[Manifest] = []
    for number, path in enumerate(manifest_paths(folder), 1):
        try:
            if path.stem != f"{number:06d}":
                raise FileDamaged(f"{number:06d}.json is missing before it")
            found.append(read_manifest(path))
        except FileDamaged as error:
            raise RecoveryError(folder=folder, file=str(path), reason=(
                f"{path} is damaged ({error}): restore it from a copy; without it nobody knows which batches "
                "count")) from error
    return found


def write_manifest(folder: Path, run_id: int, topics: Iterable[RecoveredTopic]) -> Path:
    """Write down that `run_id` goes on where these topics end; durable, and read back, when this returns.

    Raises OSError, `RecoveryError`: then the folder says what it said before.
    """
    number = max((each.number for each in read_manifests(folder)), default=0) + 1
    path = folder / MANIFESTS / f"{number:06d}.json"
    values = {"run_id": run_id, "topics": {
        topic.identity: {"end": topic.end_position, "lost": [[each.first, each.end] for each in topic.lost
                                                             if each.reason != "no room"]}
        for topic in topics}}
    write_durable(path, "manifest", values)
    try:
        well = read_durable(path, "manifest").values == values
    except FileDamaged:
        well = False
    if not well:
        path.unlink()
        raise RecoveryError(folder=folder, file=str(path), reason=(
            f"{path} does not hold what was written to it: this disk cannot be trusted"))
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

    def begins(self, identity: str) -> int:
        """The position from which on the last run wrote. Nothing new may lie below: it would count as given up."""
        return max((each.ends.get(identity, 0) for each in self._manifests), default=0)

    def lost(self, identity: str) -> list[tuple[int, int]]:
        """What earlier recoveries have given up: it does not come back."""
        return [each for manifest in self._manifests for each in manifest.lost.get(identity, ())]


# ---- reading -------------------------------------------------------------------------------------------------------


def make_plan(folder: Path) -> RecoveryPlan:
    """Read every file below the folder.

    Raises `RecoveryError` when there is nothing to recover from, or one that all depends on is damaged or unreadable.
    """
    if not folder.is_dir():
        raise RecoveryError(folder=folder, reason="there is no such folder")
    try:
        return _make_plan(folder)
    except OSError as error:
        raise RecoveryError(folder=folder, file=error.filename, reason=(
            f"{error.filename or 'a file'} cannot be read: {error.strerror or error}; nothing was changed, try again "
            "when it can")) from error


def _make_plan(folder: Path) -> RecoveryPlan:
    files, damage = find_files(folder), list[DamagedFile]()
    known, deleted = _catalogue(folder, files, damage), _deleted(folder, damage)
    if not files and not known:
        raise RecoveryError(folder=folder, reason="it has neither replica files nor topics; the data_directory of the "
                                                  "cluster is wanted, with its folders broker-0, broker-1 ...")
    damage += [_damaged(file, Damage(0, 0, file.damage)) for file in files if file.damage]
    by_topic: dict[str, list[ReplicaFile]] = {}
    for file in files:
        if not file.damage:
            by_topic.setdefault(file.identity, []).append(file)
    runs = Runs(read_manifests(folder))
    chosen, ignored = _choose(known, deleted)
    topics = [_recover_topic(options, by_topic.get(identity, []), runs, damage, _trail(folder, identity, damage))
              for identity, options in sorted(chosen.items(), key=lambda each: each[1]["created_ns"])]
    return RecoveryPlan(folder, sorted({file.run_id for file in files}), topics, damage, ignored,
                        _limits([file for file in files if not file.damage and file.identity in chosen]))


def _limits(files: list[ReplicaFile]) -> dict[str, int]:
    """The numbers of the region that wrote last: it held all there is, but for what it dropped. None when unknown."""
    return max(files, key=lambda each: each.created_ns).limits if files else {}


def _catalogue(folder: Path, files: list[ReplicaFile], damage: list[DamagedFile]) -> dict[str, dict[str, Any]]:
    """The options of every topic that is known, by identity: as they were written down last, with a checksum.

    Without one (files of an earlier version) the superblocks of replicas are believed.
    """
    found: dict[str, tuple[tuple[bool, int, int], dict[str, Any]]] = {}
    for file in files:
        age = True, int(file.topic.get("alteration", 0)), 0
        if not file.damage and (file.identity not in found or found[file.identity][0] < age):
            found[file.identity] = age, file.topic
    for path in files_below(folder, TOPIC_SUFFIX):
        try:
            content = read_durable(path, "topic")
            options = checked_options(content.values["topic"])
            # Of several descriptions the one counts that was altered last: a broker may have been away then.
            age = content.checked, int(options.get("alteration", 0)), int(content.values.get("written_ns", 0))
        except (FileDamaged, TopicError, KeyError, TypeError, ValueError) as error:
            damage.append(_small(path, error if isinstance(error, FileDamaged) else f"no topic: {error!r}"))
            continue
        identity = identity_of(options["name"], options["created_ns"])
        if path.name != identity + TOPIC_SUFFIX:
            damage.append(_small(path, f"it describes another topic: {identity}"))
            continue
        other = found.get(identity)
        if other is None or other[0] < age:
            found[identity] = age, options
        elif not age[0] and _promise(other[1]) != _promise(options):
            damage.append(_small(path, "it has no checksum, and those that have one say otherwise"))
    return {identity: options for identity, (_, options) in found.items()}


def _promise(options: dict[str, Any]) -> list[Any]:
    return [options[key] for key in _OPTIONS]


_OPTIONS = ("name", "created_ns", "order", "ack", "replication_factor", "retention_bytes")


def checked_options(options: Any) -> dict[str, Any]:
    """The options of a topic, if they can be any. Raises ValueError, KeyError, TypeError."""
    values = {key: options[key] for key in _OPTIONS}
    TopicConfig(**{key: values[key] for key in _OPTIONS if key != "created_ns"}).validate(BROKERS_MAX)
    if not all(isinstance(values[key], int) for key in _OPTIONS[1:]) or not 0 <= values["created_ns"] < 1 << 64:
        raise ValueError("its numbers are none")
    return dict(options)


def _deleted(folder: Path, damage: list[DamagedFile]) -> set[str]:
    """The topics that were deleted: a file says so by its name already, whatever became of what is in it."""
    paths = files_below(folder, DELETED_SUFFIX)
    for path in paths:
        if not path.stat().st_size:
            continue                            # of an earlier version
        try:
            read_durable(path, "deleted")
        except FileDamaged as error:
            damage.append(_small(path, error))
    return {path.name.removesuffix(DELETED_SUFFIX) for path in paths}


def _trail(folder: Path, identity: str, damage: list[DamagedFile]) -> SessionTrail:
    """Whose batches were in files of a topic that were removed behind the reclaimed frontier."""
    trail = SessionTrail()
    for path in files_below(folder, identity + SESSIONS_SUFFIX):
        if path.name != identity + SESSIONS_SUFFIX:
            continue                            # of a topic whose name ends so
        try:
            add_sessions(trail, read_durable(path, "sessions").values)
        except FileDamaged as error:
            damage.append(_small(path, error))
    return trail


def _small(path: Path, what: object) -> DamagedFile:
    try:
        name = names_of(path.stem)[0]
    except ValueError:
        name = path.name
    return DamagedFile(str(path), 0, path.stat().st_size, str(what), name, -1, -1, None, None)


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
    trail: SessionTrail = field(default_factory=SessionTrail)       # of what is reclaimed


def _recover_topic(options: dict[str, Any], files: list[ReplicaFile], runs: Runs, damage: list[DamagedFile],
                   trail: SessionTrail) -> RecoveredTopic:
    topic, reading = RecoveredTopic(options), _Reading(trail=trail)
    reading.committed = runs.begins(topic.identity)     # also when the last run has written nothing
    given_up = runs.lost(topic.identity)
    for file in sorted(files, key=lambda each: each.created_ns):
        end = runs.end(topic.identity, file.run_id)
        for each in read_records(file):
            if isinstance(each, Damage):
                damage.append(_damaged(file, each))
            elif end is None or each.end <= end:
                _take(reading, file, each, end, given_up, damage)
    for position, batch in reading.batches.items():
        batch.copies = len(reading.holders[position])
    topic.durable_position = reading.durable
    topic.first_position = reading.reclaimed
    _lay_out(topic, reading, [each for each in damage if each.topic == topic.name], given_up)
    return topic


def _take(reading: _Reading, file: ReplicaFile, record: Record, end: int | None, given_up: list[tuple[int, int]],
          damage: list[DamagedFile]) -> None:
    """Add one record to what is known of its topic. What it says of others counts up to the `end` of its run, too."""
    fields = record.fields
    durable, committed, reclaimed = (fields[name] if end is None else min(fields[name], end) for name in (
        "durable_position", "committed_position", "first_position"))
    reading.durable = max(reading.durable, durable)
    reading.committed = max(reading.committed, committed, record.end)
    reading.reclaimed = max(reading.reclaimed, reclaimed)
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
    position = topic.first_position
    for batch in _provable(topic, reading, given_up):
        _lose(topic, position, batch.record.position, damage, given_up)
        topic.batches.append(batch)
        position = batch.record.end
    _lose(topic, position, reading.committed, damage, given_up)
    topic.end_position = max(position, reading.committed)
    topic.sessions = list(_sessions(topic, reading))


def _is_given_up(first: int, end: int, given_up: list[tuple[int, int]]) -> bool:
    """Whether earlier recoveries have lost all of this already: together, for they may lie side by side."""
    for low, high in sorted(given_up):
        if low <= first < high:
            first = high
    return first >= end


def _lose(topic: RecoveredTopic, first: int, end: int, damage: list[DamagedFile],
          given_up: list[tuple[int, int]]) -> None:
    if first >= end:
        return
    hit = any(each.first_position is not None and each.first_position < end
              and (each.end_position is None or each.end_position > first) for each in damage)
    if _is_given_up(first, end, given_up):
        reason = "lost before"
    elif first >= topic.durable_position:
        reason = "unsynced"
    else:
        reason = "damaged" if hit else "missing"
    topic.lost.append(Range(first, end, reason))


def _provable(topic: RecoveredTopic, reading: _Reading, given_up: list[tuple[int, int]]) -> Iterator[RecoveredBatch]:
    """The batches by position; at order 5, behind the first hole that no disk had, only those of whose session nothing
    can have been in it: the one before was found, or the client had sent nothing before."""
    expected: dict[tuple[int, int], int] = {}
    position, holed = topic.first_position, False
    for at in sorted(reading.batches):
        batch = reading.batches[at]
        fields = batch.record.fields
        if batch.record.end <= topic.first_position:
            reading.trail.note(fields["client_id"], fields["session_epoch"], fields["batch_sequence"], batch.record.end)
        if at < position:
            continue                            # reclaimed, or overlapping one that is there
        first = max(position, topic.durable_position)
        holed = holed or (first < at and not _is_given_up(first, at, given_up))
        position = batch.record.end
        session = fields["client_id"], fields["session_epoch"]
        if holed and topic.options["order"] == 5:
            # What an earlier session of the client has lost in the hole, nobody knows.
            begins = 0 if fields["session_epoch"] <= 1 else -1
            if fields["batch_sequence"] != expected.get(session, begins):
                continue
        expected[session] = fields["batch_sequence"] + 1
        yield batch


def _sessions(topic: RecoveredTopic, reading: _Reading) -> Iterator[RecoveredSession]:
    """The last session of each client, as far as the log, and what was written down of its reclaimed part, tell."""
    kept: dict[int, list[dict[str, int]]] = {}
    for batch in topic.batches:
        kept.setdefault(batch.record.fields["client_id"], []).append(batch.record.fields)
    reclaimed = {each[0]: each for each in reading.trail.clients()}
    whole = all(each.reason == "no room" for each in topic.lost)
    for client in sorted({*kept, *reclaimed}):
        _, epoch, highest, position, bits = reclaimed.get(client, (client, 0, 0, 0, 0))
        latest = max([epoch, *(each["session_epoch"] for each in kept.get(client, ()))])
        batches = [each for each in kept.get(client, ()) if each["session_epoch"] == latest]
        # What is further back than the window was in the log before the highest was taken: reclaimed, as that is.
        floor, known = 0, {each["batch_sequence"] for each in batches}
        if epoch == latest and bits:
            floor = max(0, highest - TRAIL_WINDOW + 1)
            known |= {each for each in range(floor, highest + 1) if bits >> each % TRAIL_WINDOW & 1}
        expected, in_log, found_from = _frontier(known, floor, whole, topic.options["order"] == 5)
        yield RecoveredSession(client, latest, expected, sum(each["message_count"] for each in batches),
                               max([position, *(each["position"] + each["message_count"] for each in batches)]), in_log,
                               found_from)


def _frontier(known: set[int], floor: int, whole: bool, in_order: bool) -> tuple[int, int, int]:
    """The first batch of a session that may be sent again, a window of those beyond it that are in the log, and the
    first of those below it that may be lost.

    A batch that was in the log once may be lost, where there are holes: then only those count that are known. At order
    5 it cannot be sent again either, when one behind it was kept.
    """
    end = max(known) + 1
    expected = floor if not whole else end if in_order else max(floor, end - TRAIL_WINDOW)
    while expected in known:
        expected += 1
    if in_order:
        return end, 0, expected
    beyond = [each for each in known if expected < each < expected + TRAIL_WINDOW]
    return expected, sum(1 << each % TRAIL_WINDOW for each in beyond), expected
