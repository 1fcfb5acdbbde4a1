"""From the trails of a chaos run to a verdict per invariant, by the same checkers as the simulation."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from sim.chaos.faults import Fault
from sim.chaos.trail import Event, Kind, read_trail
from sim.cluster.history import CHECKERS, Entry, History, Operation, Read, Violation

RESUME_SECONDS_P99 = 2.0
STANDSTILL_SECONDS = 15.0
ALL_KILLED_NS = 10_000_000_000      # around the death of all brokers, heads' deaths are not measured

# What must hold, a line each; how A2, I, F and G are judged in a real run is in sim/chaos/run.py and below.
MEANINGS: dict[str, str] = {
    **{name: (check.__doc__ or "").strip() for name, check in CHECKERS.items()},
    "F": "A forked child gets a client or a typed error, and ends.",
    "G": "A consumer group begins again where it had read to, or before: it skips nothing.",
    "V": f"Nothing stands still: no message and no topic for more than {STANDSTILL_SECONDS:.0f} s, and acks resume "
         f"within {RESUME_SECONDS_P99:.0f} s of a head's death (p99).",
}

Epochs = Sequence[tuple[int, int]]      # (monotonic ns, epoch), ascending


@dataclass
class Trails:
    """The files of one topic's run."""

    publishers: list[Path]
    readers: list[Path]
    auditor: Path           # the reader that nobody disturbs
    last: Path              # reads everything that is kept, at the end
    level: int = 1
    groups: list[Path] = field(default_factory=list)    # readers that commit, of one group each


def history_of(trails: Trails, epochs: Epochs = ()) -> History:
    """One history. The log is what the auditor read; positions are its indexes, a message an entry."""
    history = History()
    for path in trails.publishers:
        _add_operations(history, read_trail(path), trails.level, epochs)
    for event in read_trail(trails.auditor):
        if event.kind in (Kind.READ, Kind.FOREIGN):
            history.log.append(Entry(event.position, event.client if event.kind == Kind.READ else -1, event.number, 1))
        elif event.kind == Kind.GAP:
            history.errors.append((f"the auditor lost what lies before position {event.position}", False))
    for number, path in enumerate(trails.readers):
        _add_reads(history, f"reader {number}", read_trail(path))
    for path in trails.groups:
        _add_reads(history, path.name, read_trail(path))
        history.cursors += [(path.name, event.position, len(history.log)) for event in read_trail(path)
                            if event.kind in (Kind.STARTED, Kind.COMMITTED)]
    for path in (trails.auditor, *trails.readers, *trails.groups, trails.last):
        history.errors += [(f"{path.name}: what lies at position {event.position} is damaged", False)
                           for event in read_trail(path) if event.kind == Kind.DAMAGED]
    history.final = [Read(event.position, event.position, 1, _sender(event)) for event in read_trail(trails.last)
                     if event.kind in (Kind.READ, Kind.FOREIGN)]
    history.reclaimed_index = history.final[0].index if history.final else len(history.log)
    return history


def _sender(event: Event) -> tuple[int, int] | None:
    return (event.client, event.number) if event.kind == Kind.READ else None


def _add_operations(history: History, events: Iterable[Event], level: int, epochs: Epochs) -> None:
    operations: dict[tuple[int, int], Operation] = {}
    for event in events:
        if event.kind == Kind.CHILD:
            continue
        if event.kind == Kind.SENT:
            operations[event.client, event.number] = Operation(event.client, event.number, 1, level, event.at_ns)
            continue
        operation = operations[event.client, event.number]
        operation.settled = event.at_ns
        if event.kind == Kind.ACKED:
            operation.outcome = "ok"
            operation.position = event.position if event.position >= 0 else None
            if event.epoch == 0:
                continue                # learned by reopening the session: no head said it
            # Of one broker: an ack of another may have been under way while that one was stopped.
            history.marks.append((f"the epoch of broker {event.broker}'s acks to client {event.client}", event.epoch))
            # What was sent when a new epoch had begun is never acknowledged under an older one.
            since = bisect.bisect_right(epochs, operation.invoked, key=lambda each: each[0])
            history.epochs.append((event.epoch, epochs[since - 1][1] if since else 0))
        elif event.kind == Kind.FAILED:
            operation.outcome = "failed"
    history.operations.extend(operations.values())


def _add_reads(history: History, name: str, events: Iterable[Event]) -> None:
    """A reader that was told of a gap, or began anew, goes on as another one."""
    part = 0
    for event in events:
        if event.kind in (Kind.GAP, Kind.STARTED):
            part += 1
        elif event.kind in (Kind.READ, Kind.FOREIGN):
            history.reads.setdefault(f"{name}, part {part}", []).append(
                Read(event.position, event.position, 1, _sender(event)))


def without_given_up(history: History) -> History:
    """The history as if nobody had sent what its publisher was told it may not count on, and is not in the log.

    Then the session ended, and the next one goes on behind it: each has a gap-free prefix of what is left.
    """
    there = {(entry.client, entry.first) for entry in history.log}
    given_up: dict[int, list[int]] = {}
    for operation in sorted(history.operations, key=lambda each: each.first):
        if operation.outcome != "ok" and operation.settled >= 0 and (operation.client, operation.first) not in there:
            given_up.setdefault(operation.client, []).append(operation.first)

    def rank(entry: Entry) -> int:
        return entry.first - bisect.bisect_left(given_up.get(entry.client, []), entry.first)

    return History(log=[replace(entry, first=rank(entry)) for entry in history.log])


Pauses = Sequence[tuple[int, int]]      # (from, until), monotonic ns, ascending: when the whole machine stood still


def awake(moments: Any, pauses: Pauses) -> Any:
    """Monotonic ns without the time in which the machine stood still; of one moment or an array of them."""
    lost = sum((numpy.clip(moments, begin, end) - begin for begin, end in pauses), numpy.int64(0))
    return moments - lost


def longest_wait(history: History, pauses: Pauses = ()) -> tuple[float, str]:
    """How long the slowest delivery took, seconds, and which it was."""
    waits = [((awake(operation.settled, pauses) - awake(operation.invoked, pauses)) / 1e9,
              f"message {operation.first} of client {operation.client}") for operation in history.operations
             if operation.settled - operation.invoked > 1_000_000_000]
    return max(waits, default=(0.0, ""))


def acks_of(trails: Iterable[Trails]) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]":
    """When acks arrived, monotonic ns, sorted."""
    return _moments((path for each in trails for path in each.publishers), Kind.ACKED)


def reads_of(trails: Iterable[Trails]) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]":
    """When the auditors read, monotonic ns, sorted."""
    return _moments((each.auditor for each in trails), Kind.READ)


def _moments(paths: Iterable[Path], kind: Kind) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]":
    times = [event.at_ns for path in paths for event in read_trail(path) if event.kind == kind]
    return numpy.sort(numpy.array(times, numpy.int64))


def resume_seconds(acks: "numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]", faults: Iterable[Fault],
                   what: str = "kill head", pauses: Pauses = ()) -> list[float]:
    """How long after each fault of a kind no ack came: the longest pause that began within a second of it."""
    found = []
    faults = list(faults)
    # When all brokers were killed nobody can take over: that is another wait.
    nobody = [fault.at_ns for fault in faults if fault.what == "kill all"]
    for fault in faults:
        if fault.what == what and not any(abs(fault.at_ns - each) < ALL_KILLED_NS for each in nobody):
            first, end = numpy.searchsorted(acks, (fault.at_ns, fault.at_ns + 1_000_000_000))
            around = numpy.concatenate(([fault.at_ns], acks[first:end + 1]))
            if len(around) > 1:
                found.append(float(numpy.diff(awake(around, pauses)).max()) / 1e9)
    return found


def judge_recovered(acked: dict[tuple[int, int], int], there: dict[tuple[int, int], int], kept_from: int) -> str:
    """What breaks A2, empty text: nothing. `acked`, `there`: positions of (client, message), at level 2 and on disk.

    What the topic kept no more, below `kept_from`, need not be on the disks; if it is, it is where it was.
    """
    for (client, number), position in acked.items():
        if position >= 0 and there.get((client, number), position if position < kept_from else None) != position:
            return (f"message {number} of client {client} was acknowledged at level 2 at position {position}; "
                    f"on the disks it is at {there.get((client, number))}")
    return ""


def judge_children(publishers: Iterable[Path]) -> str:
    """What breaks F, empty text: nothing. A forked child gets a client or a typed error, and ends."""
    for path in publishers:
        for event in read_trail(path):
            if event.kind == Kind.CHILD:
                return f"a forked child of {path.name} hung or died (wait status {event.number})"
    return ""


def judge_groups(groups: Iterable[Path]) -> str:
    """What breaks G, empty text: nothing. A group begins again where it had read to, or before: it skips nothing."""
    for path in groups:
        given: int | None = None
        for event in read_trail(path):
            if event.kind == Kind.STARTED and given is not None and event.position > given:
                return f"{path.name} had read to {given} and went on at {event.position}"
            if event.kind in (Kind.READ, Kind.FOREIGN, Kind.GAP):
                given = event.position + (event.kind != Kind.GAP)
            elif event.kind in (Kind.STARTED, Kind.COMMITTED):
                given = event.position
    return ""


def judge(trails: dict[str, Trails], faults: list[Fault], begun_ns: int, ended_ns: int,
          leftovers: list[str], epochs: Epochs = (), pauses: Pauses = ()) -> dict[str, str]:
    """What is broken, by invariant; empty text: it holds. `epochs`: when an epoch was seen first, monotonic ns."""
    broken = dict.fromkeys((*CHECKERS, "V"), "")
    del broken["A2"]                # judged by recovering, see run.py
    broken["F"] = judge_children(path for each in trails.values() for path in each.publishers)
    broken["G"] = judge_groups(path for each in trails.values() for path in each.groups)
    for topic, each in trails.items():
        history = history_of(each, epochs)
        history.leftovers = leftovers
        for name in broken:
            if name not in CHECKERS:
                continue
            try:
                CHECKERS[name](without_given_up(history) if name == "P" else history)
            except Violation as violation:
                broken[name] = broken[name] or f"topic {topic}: {violation.text}"
        seconds, which = longest_wait(history, pauses)
        if seconds > STANDSTILL_SECONDS:
            broken["V"] = broken["V"] or f"topic {topic}: {which} was not settled for {seconds:.1f} s"
    acks = acks_of(trails.values())
    silences = numpy.diff(awake(numpy.concatenate(([begun_ns], acks, [ended_ns])), pauses)) / 1e9
    if silences.max() > STANDSTILL_SECONDS:
        broken["V"] = broken["V"] or (f"nothing was acknowledged for {silences.max():.1f} s (at most "
                                      f"{STANDSTILL_SECONDS:.0f} s)")
    resumed = resume_seconds(acks, faults, pauses=pauses)
    if resumed and float(numpy.percentile(resumed, 99)) > RESUME_SECONDS_P99:
        broken["V"] = broken["V"] or (f"acks resumed {numpy.percentile(resumed, 99):.2f} s after a head's death (p99; "
                                      f"at most {RESUME_SECONDS_P99} s)")
    return broken
