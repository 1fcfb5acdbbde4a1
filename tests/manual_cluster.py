"""All stages of a cluster over one private region, in one thread, stepped by hand.

    publish ──► receiver ──► delegation ──► scanners ──► acks, release, reclaim, replication ──► read

The stages are the product's own objects, put together by `Assembly`; nothing stands in for them. Time is a
`ManualClock`. Whatever waits in the product (a session for the sequencer, a topic for the brokers) is answered here by
stepping, so every call returns at once or fails.
"""

import struct
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from broker.assembly import Assembly, HeadStages, Settings, TopicOf
from broker.config import TopicConfig
from broker.head import epoch_of
from broker.layout import BrokerState, ControlBits, Layout, ResultStatus
from broker.payload_places import limits_of
from broker.placement import live_brokers, replica_brokers
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader
from broker.records import pack, unpack
from broker.replica_folder import ReplicaFolder
from broker.replica_watch import ReplicaWatch
from broker.stages.receiver import RECEIVED
from broker.stages.reclaim import Reclaim
from broker.stages.sequencer import OrderState, Scanner
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from broker.topics import TopicEntry, TopicTable
from sim.cluster.door import HostControl, SimDoor
from sim.cxl.clock import ManualClock
from sim.cxl.memory import MappedMemory, Memory
from sim.cxl.region import private_mapping

KIB, MIB = 1 << 10, 1 << 20
SECOND = 1_000_000_000
LEASE_NS = 30 * SECOND
STEPS_MAX, RETRIES = 10_000, 5

# The smallest numbers at which everything still happens: rings wrap, segments end, tables fill.
TINY = {
    "topic_count_max": 4, "ring_slot_count": 16, "order_entry_count": 64, "session_count_max": 16,
    "cursor_count_max": 8, "attach_slot_count": 0, "segment_bytes": 4 * KIB, "message_bytes_max": 8 * KIB,
    "batch_bytes_max": 8 * KIB, "region_bytes": MIB,
}

T = TypeVar("T")


def message_check(nbytes: int) -> int:
    """The check word of a message header, as cxlmq.proto says."""
    return (nbytes * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C


def encode_messages(messages: Iterable[bytes]) -> bytes:
    """A payload: size, check, bytes, zeroes up to a multiple of 8."""
    return b"".join(struct.pack("<II", len(each), message_check(len(each))) + each + bytes(-len(each) % 8)
                    for each in messages)


def decode_messages(payload: bytes) -> list[bytes]:
    """The inverse of `encode_messages`."""
    found, at = [], 0
    while at < len(payload):
        nbytes, check = struct.unpack_from("<II", payload, at)
        assert check == message_check(nbytes), f"no message at byte {at} of a payload"
        found.append(payload[at + 8:at + 8 + nbytes])
        at += 8 + (nbytes + 7) // 8 * 8
    assert at == len(payload)
    return found


def encode_request(sequence: int, messages: Sequence[bytes], published_ns: int = 0) -> bytes:
    """A PublishRequest."""
    return pb.PublishRequest(batch_sequence=sequence, message_count=len(messages), published_ns=published_ns,
                             payload=encode_messages(messages)).SerializeToString()


@dataclass(frozen=True)
class Ack:
    """The answer to one batch."""

    sequence: int
    position: int
    status: ResultStatus


@dataclass
class Session:
    """A publisher's session: its slot, and its stream at each broker."""

    client: int
    epoch: int
    slot: int
    topic: TopicEntry
    ack: int
    predecessor_expected: int = 0
    streams: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """One batch as a reader gets it."""

    position: int
    broker: int
    messages: list[bytes]


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run what never has to wait here. Raises AssertionError when it would."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    except RuntimeError as error:               # asyncio.sleep found no loop
        raise AssertionError("nobody answered: this would have waited") from error
    raise AssertionError("nobody answered: this would have waited")


class ManualBroker(Assembly):
    """The stages of one broker."""

    def __init__(self, cluster: "ManualCluster", number: int, control: HostControl | None = None) -> None:
        self.cluster, self.number = cluster, number

        def door(role: int) -> Memory:
            return SimDoor(cluster.door(number, role), control) if control else cluster.door(number, role)

        super().__init__(cluster.layout, number, door, cluster.clock, cluster.settings,
                         disk=self._folder if cluster.folder else None, lives=lambda presence: presence in cluster.alive,
                         announced=cluster.step)
        self.line.say(BrokerState.BROKER_READY)     # attached clients leave who is not

    def _folder(self, topic_of: TopicOf) -> ReplicaFolder:
        assert self.cluster.folder
        return ReplicaFolder(self.cluster.folder / f"broker-{self.number}", self.number, 1, "manual", self.cluster.count,
                             topic_of, limits=self.cluster.limits)

    def in_turn(self) -> list[Stage]:
        """All that it runs now, as the fused thread plan has it; replication last."""
        head = self.cluster.term.stages() if self.number == self.cluster.term.order.head_broker else {}
        disk: list[Stage] = [self.replication] if self.replication else []
        return [*chain(*self.threads("fused", head)), *disk]


def step_head(head: HeadStages) -> int:
    """Each of its stages once: also of a head that was replaced and does not know it yet."""
    return sum(stage.step_once() for stage in head.stages().values())


class ManualCluster:
    """N brokers, the head among them, over a private region. See the module."""

    def __init__(self, brokers: int = 2, scanners: int = 1, lock: str = "atomic", pool: str = "atomic",
                 folder: Path | None = None, semaphore: str | None = None, mapping: Any = None,
                 replica_file_bytes: int = 64 * MIB, counters_start: int = 0, limits: bool = False,
                 **numbers: int) -> None:
        self.layout = Layout.compute(broker_count=brokers, pool_strategy=pool, **{**TINY, **numbers})
        self.mapping = private_mapping(self.layout.numbers["region_bytes"]) if mapping is None else mapping
        self.count = brokers
        self.folder = folder
        self.limits = limits_of(self.layout.numbers) if limits else None
        self.clock = ManualClock(SECOND)
        self.memory = MappedMemory(self.mapping)
        self.settings = Settings(session_lease_ns=LEASE_NS, replica_grace_ns=LEASE_NS, scanners=scanners, lock=lock,
                                 semaphore=semaphore, replica_file_bytes=replica_file_bytes,
                                 counters_start=counters_start)
        self.alive: set[int] = set()        # presences of attached clients whose process is there
        self.stages: list[Stage] = []
        self.brokers = [ManualBroker(self, number) for number in range(brokers)]
        self.doorbells, self.replication_bells = self.brokers[0].doorbells, self.brokers[0].replication_bells
        self.term = self.brokers[0].found()
        self.dead: set[int] = set()         # brokers that run no longer
        self.watch: ReplicaWatch | None = None
        self.replaced: list[HeadStages] = []        # heads that were; nothing steps them
        self._arrange()
        self._highest: dict[tuple[Any, ...], int] = {}

    # ---- heads ------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> OrderState:
        """The serving head's."""
        return self.term.order

    @property
    def scanners(self) -> list[Scanner]:
        """The serving head's."""
        return self.term.scanners

    @property
    def reclaim(self) -> Reclaim:
        """The serving head's."""
        return self.term.reclaim

    @property
    def control(self) -> int:
        """The control word."""
        return self.memory.load_word(self.layout.offset_of("control"))

    @property
    def table(self) -> TopicTable:
        """The serving head's."""
        return self.brokers[self.order.head_broker].topics

    def _arrange(self) -> None:
        """Put the stages together."""
        self.stages = [stage for broker in self.brokers if broker.number not in self.dead for stage in broker.in_turn()]

    def takeover(self, broker: int) -> Takeover:
        """A takeover by a broker that has raised the epoch and done nothing else."""
        found = self.brokers[broker].new_takeover()
        control = self.control
        used = {control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF}
        if not control & ControlBits.CONTROL_SERVING:
            used = {(control >> ControlBits.CONTROL_SOURCE_SHIFT & 0xFF) - 1}
        bank = next(bank for bank in range(self.layout.numbers["bank_count"]) if bank not in used)
        assert found.begin(control, bank)
        return found

    def finish(self, takeover: Takeover) -> None:
        """Step a takeover to its end; its broker is head."""
        while not takeover.done:
            assert not takeover.lost
            takeover.step_once()
        self.replaced.append(self.term)
        self.brokers[self.order.head_broker].resign()
        self.term = self.brokers[takeover.broker].lead(takeover)
        self._arrange()

    def take_over(self, broker: int) -> Takeover:
        """Let a broker become head."""
        takeover = self.takeover(broker)
        self.finish(takeover)
        return takeover

    def restart(self, number: int, control: HostControl | None = None) -> ManualBroker:
        """A broker that is not head was killed; its next process is built, and knows nothing yet (`learn`). `control`
        counts what it does."""
        assert number != self.order.head_broker
        self.brokers[number].close()
        broker = self.brokers[number] = ManualBroker(self, number, control)
        broker.keep_leases()
        self._arrange()
        return broker

    # ---- parts ------------------------------------------------------------------------------------------------------

    def door(self, broker: int, role: int) -> Memory:
        """A door to the region for one role of one broker."""
        return MappedMemory(self.mapping, int(role), True, self.layout.offset_of("role_statistics", broker, int(role)))

    def bump(self, broker: int, word: int) -> None:
        """Change a version word of a broker's line, and let everybody look."""
        self.brokers[broker].bump(word)

    def record(self, record: str, place: str, *index: int) -> dict[str, Any]:
        """A one-line record, as it lies in memory: what heads write, in the bank of the one that serves."""
        return unpack(record, self.memory.read_line_bytes(self.order.layout.offset_of(place, *index)))

    def poke(self, record: str, place: str, *index: int, **changes: int) -> None:
        """Overwrite fields of a one-line record: damage, on purpose."""
        at = self.order.layout.offset_of(place, *index)
        self.memory.write_line_bytes(at, pack(record, **{**unpack(record, self.memory.read_line_bytes(at)), **changes}))

    def counters(self) -> dict[str, int]:
        """The sequencer's counters."""
        return unpack("SequencerCounters", self.memory.read_bytes(self.layout.offset_of("sequencer_counters"), 192))

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Every stage once; the work done."""
        return sum(stage.step_once() for stage in self.stages)

    def settle(self) -> None:
        """Step until there is nothing left to do, hints or not."""
        for _ in range(STEPS_MAX):
            if self.step():
                continue
            for stage in self.stages:
                stage.look_everywhere()
            if not self.step():
                return
        raise AssertionError(f"still at work after {STEPS_MAX} rounds")

    # ---- topics, sessions, cursors ----------------------------------------------------------------------------------

    def create(self, name: str = "topic", **options: Any) -> TopicEntry:
        """Create a topic; all brokers serve it when this returns."""
        config, _ = TopicConfig(name=name, **options).validate(self.count)
        return drive(self.table.create(config, LEASE_NS, lambda: list(range(self.count))))

    def alter(self, name: str = "topic", **options: Any) -> TopicEntry:
        """Give a topic other options while it is in use."""
        def changed(entry: TopicEntry) -> TopicConfig:
            return TopicConfig(**{"name": entry.name, "order": entry.order, "ack": entry.ack, "replication_factor":
                                  entry.replication_factor, "retention_bytes": entry.retention_bytes, **options})

        return drive(self.table.alter(name, changed))

    def delete(self, name: str = "topic") -> None:
        """Delete a topic; its segments come back with the next steps."""
        drive(self.table.delete(name, lambda: list(range(self.count))))

    def open_session(self, topic: TopicEntry, client: int = 7, epoch: int = 1, broker: int = 0,
                     ack: int = 1) -> Session:
        """Open a session at a broker, with a stream to every broker."""
        opened = drive(self.brokers[broker].sessions.open(client, epoch, topic.generation << 16 | topic.number, ack))
        session = Session(client, epoch, opened["slot"], topic, ack, opened["predecessor_expected"])
        for each in self.brokers:
            session.streams[each.number] = each.acks.open_stream(topic.number, topic.generation, ack,
                                                                 topic.replication_factor)
        return session

    def close_session(self, session: Session) -> None:
        """Close a session where it was opened."""
        share = self.layout.numbers["sessions_per_broker"]
        drive(self.brokers[session.slot // share].sessions.close(session.slot))

    def close_streams(self, session: Session) -> None:
        """End the session's streams, as a publisher does that goes away."""
        for broker, number in session.streams.items():
            self.brokers[broker].acks.close_stream(number)
        session.streams.clear()

    def open_cursor(self, topic: TopicEntry, index: int = 0, broker: int = 0) -> tuple[int, int]:
        """Protect a topic from an order entry on; (cursor, first entry that is kept)."""
        return drive(self.brokers[broker].cursors.open(topic.generation << 16 | topic.number, index, 1))

    def replicas(self, topic: TopicEntry, source: int) -> list[int]:
        """The brokers that keep a replica of what comes by `source`."""
        return replica_brokers(topic.number, topic.generation, source, live_brokers(self.memory, self.layout),
                               self.count, topic.replication_factor)

    # ---- publishing and reading -------------------------------------------------------------------------------------

    def publish(self, session: Session, sequence: int, messages: Sequence[bytes] | None = None, broker: int = 0,
                published_ns: int = 0) -> int:
        """Hand a batch to a broker's receiver; its status (0: received)."""
        messages = [payload_of(session, sequence)] if messages is None else messages
        frame = encode_request(sequence, messages, published_ns)
        return self.brokers[broker].receiver.receive(frame, session.streams[broker], session.topic.number,
                                                     session.client, session.slot, session.epoch)

    def publish_all(self, session: Session, sequences: Iterable[int], broker: int = 0) -> None:
        """Publish one-message batches, stepping so that rings do not fill."""
        for sequence in sequences:
            for _ in range(RETRIES):
                status = self.publish(session, sequence, broker=broker)
                if status == RECEIVED:
                    break
                self.clock.advance(SECOND // 10)
                self.settle()
            assert status == RECEIVED, f"batch {sequence} was not received: status {status}"
        self.settle()

    def take_acks(self, session: Session, broker: int = 0) -> list[Ack]:
        """The acks that came since the last call."""
        epoch = epoch_of(self.memory.load_word(self.layout.offset_of("control")))
        response = pb.PublishResponse.FromString(self.brokers[broker].acks.take_acks(session.streams[broker], epoch))
        return [Ack(*each[:2], ResultStatus(each[2])) for each in
                zip(response.batch_sequences, response.positions, response.statuses, strict=True)]

    def reader(self, topic: TopicEntry, index: int = 0) -> OrderReader:
        """A reader at an order entry."""
        return OrderReader(self.memory, self.layout, topic.number, topic.generation, index)

    def read(self, reader: OrderReader, frame_bytes: int = 64 * KIB) -> list[Read]:
        """Everything that is there for a reader."""
        found: list[Read] = []
        while frame := reader.read_frame(frame_bytes):
            for batch in pb.SubscribeResponse.FromString(frame).batches:
                found.append(Read(batch.position, batch.broker, decode_messages(batch.payload)))
                assert len(found[-1].messages) == batch.message_count
        return found

    def entries(self, topic: TopicEntry) -> list[dict[str, int]]:
        """The order entries that are committed and not reclaimed."""
        frontiers = self.reader(topic).frontiers()
        return [self.record("OrderEntry", "order_entry", topic.number, index)
                for index in range(frontiers["reclaimed_index"], frontiers["committed_index"])]

    def order_of(self, topic: TopicEntry) -> list[tuple[int, int, int]]:
        """(client, session epoch, batch sequence) in the total order."""
        return [(each["client_id"], each["session_epoch"], each["batch_sequence"]) for each in self.entries(topic)]

    def free_segments(self) -> int:
        """Free segments of the whole region."""
        counts = [broker.log.pool.free_count() for broker in self.brokers]
        return counts[0] if self.layout.pool_strategy == "atomic" else sum(counts)

    # ---- invariants -------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """reclaimed <= replicated, acked <= ordered <= delegated <= published, and nothing ever goes back."""
        self._check_owners()
        for topic in self.table.entries():
            self._check_topic(topic)

    def _grows(self, value: int, *name: Any) -> int:
        assert value >= self._highest.get(name, 0), f"{name} went back to {value}"
        self._highest[name] = value
        return value

    def _check_topic(self, topic: TopicEntry) -> None:
        key = (topic.number, topic.generation)
        frontiers = self.reader(topic).frontiers()
        for name, value in frontiers.items():
            self._grows(value, *key, name)
        assert frontiers["reclaimed_index"] <= frontiers["committed_index"]
        assert frontiers["reclaimed_position"] <= frontiers["committed_position"]
        assert frontiers["committed_index"] - frontiers["reclaimed_index"] <= self.layout.numbers["order_entry_count"]
        position = frontiers["reclaimed_position"]
        for entry in self.entries(topic):
            assert entry["position"] == position, "positions are contiguous"
            position += entry["message_count"]
        assert position == frontiers["committed_position"]
        for broker in self.brokers:
            log = broker.log.topic_state(topic.number)
            line = self.record("OffsetBrokerLine", "offset_broker", topic.number, broker.number)
            scanned = self.record("OffsetSequencerLine", "offset_sequencer", topic.number, broker.number)["scanned"]
            self._grows(line["delegated"], *key, broker.number, "delegated")
            self._grows(scanned, *key, broker.number, "scanned")
            assert log["tail"] <= scanned <= line["delegated"] == log["delegated"] <= log["head"]
            assert log["head"] - log["tail"] <= self.layout.numbers["ring_slot_count"]
            for other in range(self.count):
                replica = self.record("ReplicaLine", "replica", topic.number, broker.number, other)
                assert replica["replicated_index"] <= frontiers["committed_index"]

    def _check_owners(self) -> None:
        held = [broker.log.topic_state(t)["segments"] for broker in self.brokers
                for t in range(self.layout.numbers["topic_count_max"])]
        owned = sum(1 for segment in range(self.layout.numbers["segment_count"])
                    if self.record("SegmentLine", "segment_line", segment)["owner"])
        assert sum(held) == owned, "every held segment has an owner, and no other"


def payload_of(session: Session, sequence: int) -> bytes:
    """A message that names its sender: what nobody sent is noticed."""
    return f"client {session.client} epoch {session.epoch} batch {sequence}".encode()
