"""What clients saw, and what must hold of it. The checkers read a history and nothing else.

An operation has one of three outcomes: ok, failed, unknown. What is unknown may or may not be in the log, once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

NOBODY = 0                                  # the client of a range that a recovery has named as lost


class Violation(Exception):
    """An invariant of reference/faults.md does not hold. `invariant` is its letter."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"invariant {invariant}: {text}")
        self.invariant, self.text = invariant, text


@dataclass
class Operation:
    """One batch of a publisher: messages `first` to `first + count - 1` of `client`."""

    client: int
    first: int
    count: int
    level: int
    invoked: int                            # step at which it was sent first
    outcome: str = "unknown"                # ok, failed, unknown
    position: int | None = None             # as acknowledged
    settled: int = -1                       # step
    replicas: int = 0                       # disks that had to have it, at level 2


@dataclass(frozen=True)
class Entry:
    """One batch in the log."""

    position: int
    client: int
    first: int
    count: int
    broker: int = 0
    epoch: int = 1


@dataclass(frozen=True)
class Read:
    """One batch as a reader got it: where it was, and who its bytes say sent it (None: nobody did)."""

    index: int
    position: int
    count: int
    sender: tuple[int, int] | None


@dataclass
class History:
    """All that happened, in the order in which it did."""

    order: int = 5
    operations: list[Operation] = field(default_factory=list)
    log: list[Entry] = field(default_factory=list)
    reads: dict[str, list[Read]] = field(default_factory=dict)
    final: list[Read] = field(default_factory=list)             # a last reader, of all that was not reclaimed
    reclaimed_index: int = 0
    marks: list[tuple[str, int]] = field(default_factory=list)  # what somebody was told that must never go back
    cursors: list[tuple[str, int, int]] = field(default_factory=list)       # (cursor, index, committed index then)
    epochs: list[tuple[int, int]] = field(default_factory=list)             # (epoch of an ack, the control block's)
    errors: list[tuple[str, bool]] = field(default_factory=list)            # (what a reader was told, was it due)
    leftovers: list[str] = field(default_factory=list)          # what did not return to its base line
    replicated: dict[tuple[int, int], int] = field(default_factory=dict)    # (client, number): disks that have it
    before: list[Entry] = field(default_factory=list)           # reclaimed before the region was lost and filled anew
    lost: set[tuple[int, int]] = field(default_factory=set)     # (client, number): named as lost by a recovery

    @property
    def everything(self) -> list[Entry]:
        """What is, or was, in the log over all regions; without ranges that a recovery has named as lost."""
        return [entry for entry in (*self.before, *self.log) if entry.client != NOBODY]


def _where(history: History) -> dict[tuple[int, int], Entry]:
    return {(entry.client, number): entry for entry in history.everything
            for number in range(entry.first, entry.first + entry.count)}


def check_a1(history: History) -> None:
    """What was acknowledged is in the log where the ack said, and readable unless it was reclaimed."""
    where = _where(history)
    readable = {read.position for read in history.final}
    kept = {entry.position for entry in history.log[history.reclaimed_index:] if entry.client != NOBODY}
    for operation in history.operations:
        if operation.outcome != "ok" or operation.level == 0:
            continue
        entry = where.get((operation.client, operation.first))
        if entry is None and (operation.client, operation.first) in history.lost:
            continue
        if entry is None:
            raise Violation("A1", f"message {operation.first} of client {operation.client} was acknowledged at step "
                                  f"{operation.settled} and is not in the log")
        if operation.position is not None and operation.position != entry.position:
            raise Violation("A1", f"message {operation.first} of client {operation.client} was acknowledged at "
                                  f"position {operation.position} and is at {entry.position}")
    if missing := kept - readable:
        raise Violation("A1", f"the batch at position {min(missing)} is committed and cannot be read")


def check_a2(history: History) -> None:
    """What was acknowledged at level 2 is on the disks of all replicas."""
    for operation in history.operations:
        if operation.outcome == "ok" and operation.level == 2 and operation.replicas and (
                operation.client, operation.first) not in history.lost:
            have = history.replicated.get((operation.client, operation.first), 0)
            if have < operation.replicas:
                raise Violation("A2", f"message {operation.first} of client {operation.client} was acknowledged at "
                                      f"level 2 and is on {have} of {operation.replicas} disks")


def check_u(history: History) -> None:
    """Each message is in the log at most once."""
    seen: dict[tuple[int, int], int] = {}
    for entry in history.everything:
        for number in range(entry.first, entry.first + entry.count):
            if (entry.client, number) in seen:
                raise Violation("U", f"message {number} of client {entry.client} is in the log at positions "
                                     f"{seen[entry.client, number]} and {entry.position}")
            seen[entry.client, number] = entry.position


def check_p(history: History) -> None:
    """At order 5, what a client has in the log is what it submitted, in its order, without gaps but for what it was
    told had failed, or may have."""
    due: dict[int, int] = {}
    given_up = {(each.client, each.first): each.first + each.count for each in history.operations
                if each.outcome != "ok" and each.settled >= 0}
    for entry in history.everything if history.order == 5 else ():
        while (number := due.get(entry.client, 0)) < entry.first:
            if (entry.client, number) in given_up:
                due[entry.client] = given_up[entry.client, number]
            elif (entry.client, number) in history.lost:
                due[entry.client] = number + 1
            else:
                break
        if entry.first != due.get(entry.client, 0):
            raise Violation("P", f"position {entry.position} holds message {entry.first} of client {entry.client}, "
                                 f"{due.get(entry.client, 0)} was due")
        due[entry.client] = entry.first + entry.count


def _follows(log: list[Entry], previous: int, index: int) -> bool:
    """Whether nothing lies between two order entries but what a recovery has named as lost."""
    return previous < index and all(each.client == NOBODY for each in log[previous + 1:index])


def check_t(history: History) -> None:
    """All readers see the same sequence of bytes, without holes."""
    position = history.log[0].position if history.before and history.log else 0
    for index, entry in enumerate(history.log):
        if entry.position != position:
            raise Violation("T", f"order entry {index} is at position {entry.position}, {position} was due")
        position += entry.count
    for reader, reads in (*history.reads.items(), ("the last reader", history.final)):
        previous: int | None = None
        for read in reads:
            if read.index >= len(history.log):
                raise Violation("T", f"{reader} read order entry {read.index} before it was committed")
            entry = history.log[read.index]
            if (read.position, read.count) != (entry.position, entry.count) or (
                    read.sender is not None and read.sender != (entry.client, entry.first)):
                raise Violation("T", f"{reader} read {read} where others read {entry}")
            if previous is not None and not _follows(history.log, previous, read.index):
                raise Violation("T", f"{reader} went from order entry {previous} to {read.index}")
            previous = read.index


def check_r(history: History) -> None:
    """A batch that was sent after another's ack had arrived has a higher position."""
    where = _where(history)
    # What happened at the same step is not ordered: sending comes first.
    moments = [(operation.invoked, 0, operation) for operation in history.operations]
    moments += [(operation.settled, 1, operation) for operation in history.operations
                if operation.outcome == "ok" and operation.level > 0]
    highest = -1
    for step, kind, operation in sorted(moments, key=lambda each: each[:2]):
        entry = where.get((operation.client, operation.first))
        if entry is None:
            continue
        if kind == 1:
            highest = max(highest, entry.position)
        elif entry.position <= highest:
            raise Violation("R", f"message {operation.first} of client {operation.client} was sent at step {step} "
                                 f"and is at position {entry.position}, behind one acknowledged before at {highest}")


def check_n(history: History) -> None:
    """Nothing is read that nobody sent, and nothing that definitely failed."""
    sent = {(operation.client, operation.first): operation for operation in history.operations}
    for reader, reads in (*history.reads.items(), ("the last reader", history.final)):
        for read in reads:
            operation = sent.get(read.sender) if read.sender else None
            if operation is None:
                raise Violation("N", f"{reader} read at position {read.position} what nobody sent")
            if operation.outcome == "failed":
                raise Violation("N", f"{reader} read at position {read.position} what its client was told had failed")


def check_m(history: History) -> None:
    """Epochs, frontiers and high-water marks never go back."""
    highest: dict[str, int] = {}
    for name, value in history.marks:
        if value < highest.get(name, value):
            raise Violation("M", f"{name} went back from {highest[name]} to {value}")
        highest[name] = value


def check_z(history: History) -> None:
    """Nothing made under an old epoch becomes visible or acknowledged."""
    newest = 0
    for entry in history.log:
        if entry.epoch < newest:
            raise Violation("Z", f"position {entry.position} was ordered under epoch {entry.epoch}, behind one of "
                                 f"epoch {newest}")
        newest = entry.epoch
    for epoch, current in history.epochs:
        if epoch < current:
            raise Violation("Z", f"an ack of epoch {epoch} was delivered under epoch {current}")


def check_i(history: History) -> None:
    """Readers are told of damage by a typed error, and only then."""
    for text, due in history.errors:
        if not due:
            raise Violation("I", f"a reader was told: {text}")


def check_b(history: History) -> None:
    """Blocks, slots and cursors return to their base line; every wait is bounded."""
    if history.leftovers:
        raise Violation("B", "; ".join(history.leftovers))


def check_c(history: History) -> None:
    """A cursor never goes back and never passes the tail."""
    places: dict[str, int] = {}
    for cursor, index, committed in history.cursors:
        if index > committed:
            raise Violation("C", f"{cursor} is at {index}, behind the tail {committed}")
        if index < places.get(cursor, 0):
            raise Violation("C", f"{cursor} went back from {places[cursor]} to {index}")
        places[cursor] = index


CHECKERS: dict[str, Callable[[History], None]] = {
    "A1": check_a1, "A2": check_a2, "U": check_u, "P": check_p, "T": check_t, "R": check_r, "N": check_n,
    "M": check_m, "Z": check_z, "I": check_i, "B": check_b, "C": check_c,
}


def check(history: History, invariants: Iterable[str] = CHECKERS) -> None:
    """Run the checkers. Raises `Violation`."""
    for name in invariants:
        CHECKERS[name](history)
