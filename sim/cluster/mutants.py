"""Planted bugs: one for each class of bugs that this kind of system really had and that our design can have.

A bug of visibility is planted at the door: one role leaves out, or sends astray, one operation on one kind of record.
A bug of logic is a switch in the stage (broker/planted.pxd), or another method of a client's protocol. The stages
themselves are the product's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from broker import recovery
from broker.layout import Layout
from broker.planted import Planted, plant
from broker.replica_folder import ReplicaFolder
from client.buffer import BatchBuffer
from client.subscribing.reading import Reading, State
from sim.cluster.door import Mutation, Operation, SimDoor
from sim.cxl.memory import Role

Target = tuple[int, int, int, int, int]     # start, end, stride, first, last: see door.pxd
WHOLE = 1 << 50


def section(name: str) -> Callable[[Layout, int], Target]:
    """Everything in one section of the region."""
    def target(layout: Layout, _: int) -> Target:
        start = next(at for each, at, _ in layout.sections if each == name)
        end = min((at for _, at, _ in layout.sections if at > start), default=WHOLE)
        return start, end, WHOLE, 0, WHOLE

    return target


def topic_line(place: str, nbytes: int = 64) -> Callable[[Layout, int], Target]:
    """One of a topic's own lines, of all topics."""
    def target(layout: Layout, _: int) -> Target:
        start = layout.offset_of(place, 0)
        stride = layout.offset_of(place, 1) - start
        return start, start + stride * layout.numbers["topic_count_max"], stride, 0, nbytes

    return target


def offset_line(place: str, first: int = 0, last: int = 64) -> Callable[[Layout, int], Target]:
    """A line of the offset entries, of all brokers and of topic 0."""
    def target(layout: Layout, _: int) -> Target:
        start = layout.offset_of(place, 0, 0)
        stride = layout.offset_of(place, 0, 1) - start
        return start, start + stride * layout.numbers["broker_count"], stride, first, last

    return target


def slot_line(place: str, nbytes: int = 64, *indices: int, first: int = 0) -> Callable[[Layout, int], Target]:
    """From a line of an attached client's slot on, of all slots."""
    def target(layout: Layout, _: int) -> Target:
        start, slots = layout.offset_of(place, 0, *indices), layout.numbers["attach_slot_count"]
        stride = layout.offset_of("attach_line", 1) - layout.offset_of("attach_line", 0) if slots else WHOLE
        return start, start + stride * slots, stride, first, nbytes

    return target


def _epoch_of_frontier(layout: Layout, _: int) -> Target:
    """Where the sequencer notes its epoch whenever the frontier moves."""
    at = layout.offset_of("topic_order", 0) + 16
    return at, at + 8, WHOLE, 0, WHOLE


def _to_broker_line(layout: Layout, _: int) -> int:
    """From there to a word of broker 1's own line that only people read."""
    return int(layout.offset_of("offset_broker", 0, 1) + 8 - layout.offset_of("topic_order", 0) - 16)


@dataclass(frozen=True)
class Astray:
    """An operation of one role that is left out or goes elsewhere."""

    role: Role
    mutation: Mutation
    operation: Operation
    target: Callable[[Layout, int], Target]
    distance: Callable[[Layout, int], int] = lambda layout, host: 64


@dataclass(frozen=True)
class Patch:
    """A function or method that is replaced: `instead` gets the one that it replaces, and then its arguments."""

    owner: Any                              # a class or module
    name: str
    instead: Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """One planted bug: `number` is its class in reference/bug-classes.md."""

    name: str
    number: int
    what: str
    door: Astray | None = None
    switch: int = 0
    patch: Patch | None = None              # of a client's protocol: what does otherwise
    needs: frozenset[str] | None = None     # kinds of faults under which it shows soonest; None: all
    tests: tuple[str, ...] = ()             # those that fail as well when the switch is on
    checker: bool = False                   # whether the coherence checker names it, too
    shape: tuple[tuple[str, int], ...] = ()         # numbers of the run under which it shows soonest
    twice: bool = False                     # it takes two crashes in one run: sim/cluster/crashes.py shows it
    unsynced: str = ""                      # what disks are not asked for: "sync" of replicas, or "names" of folders

    @property
    def on_disk(self) -> bool:
        """Whether only a recovery can show it."""
        return self.needs is not None and "loss" in self.needs


DROP, MOVE, SOMETIMES, FENCE_AFTER, HALF = (
    Mutation.MUTATE_DROP, Mutation.MUTATE_MOVE, Mutation.MUTATE_SOMETIMES, Mutation.MUTATE_FENCE_AFTER,
    Mutation.MUTATE_HALF)
FLUSH, INVALIDATE, STORE, COPY_IN = (
    Operation.OP_FLUSH, Operation.OP_INVALIDATE, Operation.OP_STORE, Operation.OP_COPY_IN)
ATTACHED = (("attached", 2), ("publishers", 4), ("region_bytes", 3 << 20))
MOST_ATTACHED = (("attached", 3), ("publishers", 4), ("region_bytes", 3 << 20))       # who dies has likely written
CALM = frozenset({"net"})                   # nothing that would write a forgotten line back by itself
STREAMS = (("subscribers", 3), ("attached_readers", 0), ("attached", 0))
STALLS = frozenset({"stall"})
CRASHES = frozenset({"crash"})
LOSSES = frozenset({"loss", "crash"})
DAMAGE = frozenset({"loss", "disk"})


def _everything_found(topic: Any, reading: Any, given_up: Any) -> Iterator[Any]:
    """In place of `recovery._provable`."""
    position = topic.first_position
    for at in sorted(reading.batches):
        if at >= position:
            position = reading.batches[at].record.end
            yield reading.batches[at]


def _to_reclaim_line(layout: Layout, host: int) -> int:
    """From where a broker notes its freed slots to a spare word of the reclaimer's line."""
    return int(layout.offset_of("topic_reclaim", 0) + 48 - layout.offset_of("offset_broker", 0, host) - 56)


def _one_further(come_back: Callable[..., Any], reading: Reading) -> Any:
    before = reading.next_position
    if before is not None and reading.state is State.RETURNING:
        reading.next_position = before + 1
    search, reading.next_position = come_back(reading), before
    return search


def _put_back_last(_: Callable[..., Any], buffer: BatchBuffer, batches: Any, __: int) -> None:
    for batch in batches:
        buffer.add(batch)


MUTANTS: tuple[Mutant, ...] = (
    Mutant("wrong-line-flushed", 1, "the sequencer flushes the line behind an order entry",
           Astray(Role.ROLE_SEQUENCER, MOVE, FLUSH, section("order indexes")), needs=CALM, checker=True),
    Mutant("topic-not-flushed", 2, "the line of a new topic is never flushed",
           Astray(Role.ROLE_ADMIN, DROP, FLUSH, topic_line("topic")), needs=CALM, checker=True),
    Mutant("offsets-not-flushed", 3, "a broker does not flush the line that says it serves a topic",
           Astray(Role.ROLE_RECEIVER, DROP, FLUSH, offset_line("offset_broker")), needs=CALM, checker=True),
    Mutant("released-not-flushed", 3, "an attached reader does not flush what it has released",
           Astray(Role.ROLE_CLIENT, DROP, FLUSH, slot_line("attach_client", 48, first=40)), needs=CALM,
           shape=(*ATTACHED, ("attached_readers", 1), ("subscribers", 1), ("entries", 32), ("batches", 150)),
           checker=True),
    Mutant("seldom-invalidated", 4, "the sequencer invalidates a batch header one time in eight",
           Astray(Role.ROLE_SEQUENCER, SOMETIMES, INVALIDATE, section("batch-header rings")), checker=True),
    Mutant("frontier-stale", 4, "a reader looks at the committed frontier in its own cache",
           Astray(Role.ROLE_DELIVERY, DROP, INVALIDATE, topic_line("topic_order")), needs=CALM,
           shape=(("earlier_life", True), ("entries", 32), ("batches", 150), ("publishers", 4), ("subscribers", 3),
                  ("attached", 0), ("attached_readers", 0)), checker=True),
    Mutant("header-prefetched", 5, "the sequencer takes a batch header that was prefetched before it was written",
           Astray(Role.ROLE_SEQUENCER, DROP, INVALIDATE, section("batch-header rings")), checker=True),
    Mutant("entry-prefetched", 5, "a reader takes an order entry that was prefetched before it was written",
           Astray(Role.ROLE_DELIVERY, DROP, INVALIDATE, section("order indexes")), checker=True),
    Mutant("header-not-flushed", 6, "delegation does not flush headers",
           Astray(Role.ROLE_DELEGATION, DROP, FLUSH, section("batch-header rings")), checker=True),
    Mutant("result-not-flushed", 6, "the sequencer does not flush results",
           Astray(Role.ROLE_SEQUENCER, DROP, FLUSH, section("results")), needs=CALM, checker=True),
    Mutant("entry-not-flushed", 6, "the sequencer does not flush order entries",
           Astray(Role.ROLE_SEQUENCER, DROP, FLUSH, section("order indexes")), checker=True),
    Mutant("descriptor-not-flushed", 6, "an attached publisher does not flush descriptors",
           Astray(Role.ROLE_CLIENT, DROP, FLUSH, slot_line("attach_descriptor", 4096, 0)), needs=CALM,
           shape=ATTACHED, checker=True),
    Mutant("completion-not-flushed", 6, "a broker does not flush what it tells attached publishers",
           Astray(Role.ROLE_ACK, DROP, FLUSH, slot_line("attach_completion", 1024, 0)), needs=CALM,
           shape=ATTACHED, checker=True),
    Mutant("lease-not-flushed", 6, "a broker does not flush leases",
           Astray(Role.ROLE_RECEIVER, DROP, FLUSH, slot_line("attach_lease", 512, 0)), needs=CALM,
           shape=ATTACHED, checker=True),
    Mutant("leased-fence-missing", 7, "no fence between a leased payload and its descriptor",
           Astray(Role.ROLE_CLIENT, FENCE_AFTER, COPY_IN, section("segments")), shape=MOST_ATTACHED),
    Mutant("header-fence-weak", 7, "no fence between headers and the frontier that covers them",
           Astray(Role.ROLE_DELEGATION, FENCE_AFTER, FLUSH, section("batch-header rings")), checker=True),
    Mutant("payload-fence-missing", 7, "no fence between a payload and its header",
           Astray(Role.ROLE_RECEIVER, FENCE_AFTER, COPY_IN, section("segments")), checker=True),
    Mutant("done-before-fence", 7, "entries count as done before they are fenced",
           switch=Planted.PLANT_DONE_BEFORE_FENCE, checker=True),
    Mutant("payload-half-invalidated", 8, "a reader forgets the first line of a payload alone",
           Astray(Role.ROLE_DELIVERY, HALF, INVALIDATE, section("segments")), checker=True),
    Mutant("name-torn", 8, "a topic's name of two lines is read with one of them stale",
           Astray(Role.ROLE_ADMIN, HALF, INVALIDATE, topic_line("topic_name", 128))),
    Mutant("payload-stale", 9, "a reader takes a payload from its cache",
           Astray(Role.ROLE_DELIVERY, DROP, INVALIDATE, section("segments")), checker=True),
    Mutant("leftovers-kept", 10, "a topic begins with the lines of the one that was there before",
           Astray(Role.ROLE_ADMIN, DROP, COPY_IN, topic_line("topic_order", WHOLE))),
    Mutant("two-writers", 11, "the sequencer writes into a broker's line",
           Astray(Role.ROLE_SEQUENCER, MOVE, STORE, _epoch_of_frontier, _to_broker_line), checker=True),
    Mutant("slot-kept", 11, "an attached publisher goes on with the lines of the slot's earlier use",
           Astray(Role.ROLE_CLIENT, DROP, INVALIDATE, slot_line("attach_client", 64)), needs=STALLS,
           shape=ATTACHED, checker=True),
    Mutant("dirty-invalidated", 12, "a broker writes into the reclaimer's line before it invalidates it",
           Astray(Role.ROLE_RECLAIM, MOVE, STORE, offset_line("offset_broker", 56, 64), _to_reclaim_line),
           checker=True),
    Mutant("tail-unflushed", 13, "delegation waits for a full group", switch=Planted.PLANT_TAIL_UNFLUSHED,
           tests=("tests/unit/test_delegation.py", "tests/unit/test_acks.py", "tests/unit/test_sequencer.py")),
    Mutant("ordered-overwritten", 14, "a broker's ordered count is set, not advanced",
           switch=Planted.PLANT_ORDERED_OVERWRITTEN),
    Mutant("level-ignored", 15, "level 2 looks at what level 1 looks at", switch=Planted.PLANT_LEVEL_IGNORED,
           tests=("tests/unit/test_acks.py",)),
    Mutant("ack-early", 15, "a result is taken for the committed frontier", switch=Planted.PLANT_ACK_EARLY,
           shape=ATTACHED),
    Mutant("skipped-numbered", 16, "a duplicate takes an order number", switch=Planted.PLANT_SKIPPED_NUMBERED,
           tests=("tests/unit/test_sequencer.py",)),
    Mutant("old-head-acks", 18, "acks go on reading what a replaced head says", switch=Planted.PLANT_OLD_HEAD_ACKS,
           needs=STALLS, tests=("tests/unit/test_takeover.py",)),
    Mutant("ring-overrun", 19, "the ring goes round over slots that are in use", switch=Planted.PLANT_RING_OVERRUN,
           tests=("tests/unit/test_sequencer.py", "tests/unit/test_delegation.py")),
    Mutant("index-overrun", 19, "order entries that are not reclaimed are overwritten",
           switch=Planted.PLANT_INDEX_OVERRUN, tests=("tests/unit/test_sequencer.py",)),
    Mutant("void-blocks", 20, "an empty slot is taken for one that is still to come", switch=Planted.PLANT_VOID_BLOCKS,
           tests=("tests/unit/test_sequencer.py",)),
    Mutant("result-not-awaited", 21, "a slot is reused before its result was taken",
           switch=Planted.PLANT_RESULT_NOT_AWAITED, tests=("tests/unit/test_acks.py",), needs=STALLS,
           shape=(("window", 24), ("publishers", 4), ("ring_slots", 16), ("batches", 150))),
    Mutant("held-freed", 23, "a slot is reused when it was scanned, held or not", switch=Planted.PLANT_HELD_FREED,
           tests=("tests/unit/test_sequencer.py",)),
    Mutant("stray-payload", 24, "a payload is written over the end of the one before it",
           Astray(Role.ROLE_RECEIVER, MOVE, COPY_IN, section("segments"), lambda *_: -64)),
    Mutant("reader-ignored", 25, "readers do not hold reclaiming back", switch=Planted.PLANT_READER_IGNORED,
           tests=("tests/unit/test_reclaim.py",)),
    Mutant("replica-ignored", 25, "replicas do not hold reclaiming back", switch=Planted.PLANT_REPLICA_IGNORED,
           tests=("tests/unit/test_reclaim.py",), needs=STALLS,
           shape=(("replication_factor", 2), ("entries", 32), ("batches", 150))),
    Mutant("segment-early", 25, "segments come back before their messages are reclaimed",
           switch=Planted.PLANT_SEGMENT_EARLY, tests=("tests/unit/test_reclaim.py",)),
    Mutant("ends-unknown", 25, "a broker that is started again takes ends of segments that it does not know for zero",
           switch=Planted.PLANT_ENDS_UNKNOWN, tests=("tests/unit/test_restart.py",), needs=CRASHES,
           shape=(("entries", 256), ("batches", 150), ("publishers", 4), ("segment_bytes", 16 << 10),
                  ("region_bytes", 1 << 20), ("attached", 0), ("attached_readers", 0))),
    Mutant("leases-forgotten", 25, "a broker that is started again forgets what living clients may still write into",
           switch=Planted.PLANT_LEASES_FORGOTTEN, needs=CRASHES | STALLS, tests=("tests/unit/test_restart.py",),
           shape=(("attached", 3), ("publishers", 4), ("region_bytes", 3 << 20), ("batches", 150),
                  ("segment_bytes", 4 << 10))),
    Mutant("gap-skipped", 28, "a missing batch is not waited for", switch=Planted.PLANT_GAP_SKIPPED,
           tests=("tests/unit/test_sequencer.py",)),
    Mutant("duplicate-twice", 28, "a batch that is in the log is ordered again", switch=Planted.PLANT_DUPLICATE_TWICE,
           tests=("tests/unit/test_sequencer.py",)),
    Mutant("return-skips", 28, "a reader that comes back begins behind the message that is due",
           patch=Patch(Reading, "come_back", _one_further), needs=CALM, shape=STREAMS),
    Mutant("start-ignored", 28, "a batch that a reader begins in the middle of is given out from its first message",
           patch=Patch(Reading, "_wanted", lambda _, reading: reading.next_position or 0), needs=CALM, shape=STREAMS),
    Mutant("seek-keeps", 28, "what was received before a seek is given out behind it",
           patch=Patch(BatchBuffer, "moved", lambda *_: None), needs=CALM, shape=STREAMS),
    Mutant("late-frame-taken", 28, "what a stream brings after the reader left it is taken for what comes next",
           patch=Patch(Reading, "received", lambda real, reading, _, batches: real(reading, reading.place, batches)),
           needs=CALM, shape=STREAMS),
    Mutant("given-up-moves", 28, "a seek that was cancelled takes place all the same",
           patch=Patch(Reading, "give_up", lambda *_: None), needs=CALM, shape=STREAMS),
    Mutant("put-back-last", 28, "what was claimed and put back comes behind what came meanwhile",
           patch=Patch(BatchBuffer, "put_back", _put_back_last), needs=CALM, shape=STREAMS),
    Mutant("zombie-followed", 29, "whoever was head first is followed, also when it was replaced and goes on",
           switch=Planted.PLANT_ZOMBIE_FOLLOWED, needs=STALLS, tests=("tests/unit/test_takeover.py",)),
    Mutant("half-bank", 29, "what a takeover that fell had filled is taken for what the last head left",
           switch=Planted.PLANT_HALF_BANK, twice=True),
    Mutant("replica-unsynced", 31, "what a replica has written counts without a sync", unsynced="sync", needs=LOSSES),
    Mutant("names-unsynced", 31, "the folder of a new file is not synced", unsynced="names", needs=LOSSES),
    Mutant("trimmed-early", 31, "a replica's file is removed before what it holds is reclaimed", needs=LOSSES,
           patch=Patch(ReplicaFolder, "_trim", lambda real, self, identity, reclaimed: real(self, identity, WHOLE)),
           shape=(("batches", 150),)),
    Mutant("payload-unchecked", 31, "recovery does not look at the checksums of payloads", needs=DAMAGE,
           patch=Patch(recovery, "read_records", lambda real, file: real(file, False))),
    Mutant("hole-ignored", 31, "recovery keeps what a session sent behind a batch that is lost", needs=LOSSES,
           patch=Patch(recovery, "_provable", lambda real, *found: _everything_found(*found)),
           shape=(("publishers", 4), ("batches", 100))),
    Mutant("loss-forgotten", 31, "what an earlier recovery gave up comes back", needs=LOSSES,
           patch=Patch(recovery.Runs, "lost", lambda real, self, identity: [])),
)

# Classes that have no mutant here: why.
RULED_OUT: dict[int, str] = {
    17: "no stage has a time-out: an ack follows frontiers and nothing else",
    22: "there is no export path: readers follow the order index, and nothing but the sequencer reads the rings",
    26: "no descriptors here; tests/end_to_end/test_library_faults.py counts them over reconnects",
    27: "no connections here; a full ring is pushed back, which tests/end_to_end/test_bad_input.py sees over gRPC",
    30: "the simulation measures nothing; the benchmarks leave the warm-up out and say how long it was",
}

# Mistakes that neither the simulation nor a test has shown: what was tried, and what speaks for the right way.
NOT_SHOWN: dict[str, str] = {
    "small files are believed whose checksum is wrong":
        "a flipped bit makes JSON unreadable more often than it makes it lie: 200 seeds; "
        "tests/unit/test_durable_files.py flips every bit",
    "files of a run count to their end, whatever the manifests of later recoveries say":
        "what an earlier run has behind the end of a recovery was named as lost then, and does not come back for that "
        "reason: 200 seeds; tests/unit/test_recovery_plan.py",
    "no full fence between two scanners that open sessions of one client at the same moment":
        "the words that they look at are the head's own, and here one thread steps all stages; half a million pairs of "
        "openings by two real threads, without the fence and with unclaimed reads, went well. That two who store, "
        "fence and look never both miss the other is in tests/stress/test_native_litmus.py",
}

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def planter(mutant: Mutant) -> Callable[[SimDoor, Layout, int, int], None] | None:
    """What plants a mutant of the door into each door that a host makes."""
    astray = mutant.door
    if astray is None:
        return None

    def put(door: SimDoor, layout: Layout, host: int, role: int) -> None:
        if role == int(astray.role):
            door.plant(int(astray.mutation), int(astray.operation), astray.target(layout, host),
                       astray.distance(layout, host))

    return put


_replaced: list[tuple[Any, str, Any]] = []


def switch_on(mutant: Mutant | None) -> None:
    """Turn a mutant's switch on, and replace its method; None turns all off."""
    plant(mutant.switch if mutant is not None else Planted.PLANT_NOTHING)
    while _replaced:
        setattr(*_replaced.pop())
    if mutant is not None and mutant.patch is not None:
        patch, before = mutant.patch, getattr(mutant.patch.owner, mutant.patch.name)
        _replaced.append((patch.owner, patch.name, before))
        setattr(patch.owner, patch.name, lambda *args, **named: patch.instead(before, *args, **named))


def planted_bugs_markdown() -> str:
    """memory-bank/planted_bugs.md."""
    lines = ["# Planted bugs", "",
             "Written by `cxlmq sim --mutants --output memory-bank/planted_bugs.md`. `cxlmq sim --mutants` runs",
             "them all and says which invariant sees each, and within how many seeds; tests/simulation/test_mutants.py",
             "fails when one is not seen. The classes are those of bugs that systems of this kind really had. A bug of",
             "the door leaves out or misdirects one operation of one role; a switch makes one mistake in a stage",
             "(broker/planted.pxd); one of the disk leaves a sync out, or replaces a function of its code.",
             "The tests of the last column fail with `pytest --plant NAME`.",
             "What takes two crashes in one run is seen where pairs of crashes are tried (sim/cluster/crashes.py).",
             "The checker's column says whether `memory=checked` names it within a dozen seeds without crashes.", "",
             "| class | planted bug | what is wrong | where | simulation | checker | tests that see it too |",
             "|---|---|---|---|---|---|---|"]
    for mutant in MUTANTS:
        where = "disk" if mutant.on_disk else "library" if mutant.patch else "switch"
        if mutant.door is not None:
            where = f"door of {mutant.door.role.name[5:].lower()}"
        tests = ", ".join(each.rpartition("/")[2] for each in mutant.tests) or "-"
        lines.append(f"| {mutant.number} | `{mutant.name}` | {mutant.what} | {where} | "
                     f"{'two crashes' if mutant.twice else 'yes'} | {'yes' if mutant.checker else '-'} | {tests} |")
    lines += ["", "## Classes without a planted bug here", "", "| class | why |", "|---|---|"]
    lines += [f"| {number} | {why} |" for number, why in sorted(RULED_OUT.items())]
    lines += ["", "## Not shown", "", "| mistake | what was tried |", "|---|---|"]
    lines += [f"| {mistake} | {tried} |" for mistake, tried in NOT_SHOWN.items()]
    return "\n".join(lines) + "\n"
