"""The topic table: topics are created and deleted by the head, looked up by everyone."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy

from broker.bank import Bank
from broker.config import TopicConfig, check_topic_name, topic_bytes
from broker.errors import (
    BrokerUnavailable,
    ClusterReplaced,
    CxlmqError,
    DuplicateTopic,
    TopicRecreated,
    TopicTableFull,
    UnknownTopic,
)
from broker.head import HeadView
from broker.layout import DIRECTORY_CHANGES, TOPIC_COUNT_LIMIT, Layout, TopicState
from broker.placement import durable_frontier
from broker.records import pack, record_bytes, unpack
from broker.replica_watch import replaced_replicas
from sim.cxl.memory import Memory

KEEP_FOREVER = (1 << 64) - 1
STEP_SECONDS = 0.001
ROUND_SECONDS = 10.0
DELETE_SECONDS = 2.0                    # that a deletion waits for brokers that stand still, before it is done without
WIPE_BYTES = 1 << 16


@dataclass(frozen=True)
class TopicEntry:
    """A topic as the table describes it."""

    number: int
    generation: int
    name: str
    order: int
    ack: int
    replication_factor: int
    retention_bytes: int
    created_ns: int
    alteration: int = 0             # how often its options were changed


Written = Callable[[TopicEntry], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def _memory_is_enough(_: TopicEntry) -> AsyncIterator[None]:
    yield


class TopicTable:
    """Reads the topic table of the serving head; at the head, `create` and `delete` change it, in its own bank.

    `announce` wakes all brokers after a change. Names are resolved from memory each time the table's version changed.
    """

    def __init__(self, memory: Memory, layout: Layout, announce: Callable[[], None], bank: Bank | None = None,
                 counters_start: int = 0) -> None:
        self._memory = memory
        self._layout = layout
        self._bank = bank or Bank(memory, layout)
        self._counters_start = counters_start   # where a new topic's positions and order indexes begin; 0 but in tests
        self._head = HeadView(memory, layout)
        self._control = 0
        self._announce = announce
        self._numbers = layout.numbers
        self._lock = asyncio.Lock()
        self._version = -1
        self._by_name: dict[str, TopicEntry] = {}
        self._unfinished = True             # whether there may be deletions that some broker has not noted
        self._by_number: dict[int, TopicEntry] = {}
        self._deleting = set[int]()
        self._taken_below = 0               # every number below this one has a topic

    # ---- reading ----------------------------------------------------------------------------------------------------

    def entries(self) -> list[TopicEntry]:
        """All active topics."""
        self._refresh()
        return list(self._by_name.values())

    def find(self, name: str) -> TopicEntry:
        """The active topic of that name. Raises `BadTopicName`, `UnknownTopic`."""
        check_topic_name(name)
        self._refresh()
        entry = self._by_name.get(name)
        if entry is None:
            raise UnknownTopic(topic=name)
        return entry

    def find_seen(self, name: str, seen: Any, run_id: int) -> TopicEntry:
        """As `find`, for a client that says which topic it had (a TopicIdentity); zeroes when it had none yet.

        Raises `TopicRecreated` when another topic has the name by now, `ClusterReplaced` when this cluster (`run_id`)
        is another one and has not that topic. One that was recovered has: a topic is made once, whatever runs it sees.
        """
        again, same_run = seen.created_ns != 0, seen.run_id == run_id
        try:
            entry = self.find(name)
        except UnknownTopic:
            if again and not same_run:
                raise ClusterReplaced(topic=name) from None
            raise
        if again and entry.created_ns != seen.created_ns:
            raise TopicRecreated(topic=name) if same_run else ClusterReplaced(topic=name)
        return entry

    def gone(self, name: str, created_ns: int) -> CxlmqError:
        """Why a client of a topic that is closed cannot go on: it was deleted, or another one has its name as well."""
        again = any(each.name == name and each.created_ns != created_ns for each in self.entries())
        return TopicRecreated(topic=name) if again else UnknownTopic(topic=name)

    def entry_of(self, number: int, generation: int) -> TopicEntry:
        """The active topic with this number. Raises `LookupError` when it is gone."""
        self._refresh()
        entry = self._by_number.get(number)
        if entry is not None and entry.generation == generation:
            return entry
        raise LookupError(f"there is no topic {number} of generation {generation}")

    def lead(self, layout: Layout) -> None:
        """This broker is head from now on, and writes the bank of `layout`."""
        self._bank.lead(layout)
        self.begin_term()

    def begin_term(self) -> None:
        """What the former head began to delete may be left."""
        self._unfinished = True

    def version(self) -> int:
        """Changes whenever a topic appears or goes. Raises `BrokerUnavailable` while no head serves, as `find` does."""
        return int(self._head.read("DirectoryLine", "directory")["topics_version"])

    def is_open(self, entry: TopicEntry) -> bool:
        """Whether this very topic (not a later one of its name) is still active."""
        return self._state(entry.number) == (entry.generation, TopicState.TOPIC_ACTIVE)

    def frontiers(self, entry: TopicEntry) -> dict[str, int]:
        """first_position, end_position, committed_batches, committed_bytes of a topic now."""
        order = self._head.read("TopicOrderLine", "topic_order", entry.number)
        reclaim = self._head.read("TopicReclaimLine", "topic_reclaim", entry.number)
        return {"first_position": reclaim["reclaimed_position"], "end_position": order["committed_position"],
                "committed_batches": order["committed_index"], "committed_bytes": order["committed_bytes"]}

    def durability(self, entry: TopicEntry) -> tuple[int, int, int]:
        """How far a topic is durable now, from where on a failed replica lacks it, and that one (`placement`).

        Raises `BrokerUnavailable` while no head serves.
        """
        while self._head.serving():
            found = durable_frontier(self._memory, self._head.layout, entry.number, entry.generation,
                                     entry.replication_factor)
            if self._head.unchanged():
                return found
        raise BrokerUnavailable("a new head is taking over: try again", address="head")

    def order_entries(self, entry: TopicEntry) -> bytes:
        """The whole order index of a topic, as the serving head has it."""
        return self._head.read_bytes(self._numbers["order_entry_count"] * record_bytes("OrderEntry"), "order_entry",
                                     entry.number, 0)

    def degraded(self, entry: TopicEntry) -> list[str]:
        """The replicas of a topic whose disk failed, in words: acks of level 2 are refused until they have healed."""
        brokers = range(self._numbers["broker_count"])
        place = self._layout.offset_of
        lines = [(source, replica, self._read("ReplicaLine", place("replica", entry.number, source, replica)))
                 for source in brokers for replica in brokers if entry.replication_factor > 1]
        return [f"broker {replica} cannot keep what came by broker {source}: {os.strerror(line['failed'])}; it has "
                f"everything below position {line['replicated_position']}"
                for source, replica, line in lines if line["failed"] and line["generation"] == entry.generation
                ] + self._replaced(entry)

    def _replaced(self, entry: TopicEntry) -> list[str]:
        """The replicas whose broker is away, in words, and who keeps them instead."""
        def position_of(source: int, replica: int) -> int:
            line = self._read("ReplicaLine", self._layout.offset_of("replica", entry.number, source, replica))
            return line["replicated_position"] if line["generation"] == entry.generation else 0

        return replaced_replicas(entry.number, entry.generation, entry.replication_factor,
                                 self._head.read("HeadLine", "head")["live_brokers"],
                                 self._numbers["broker_count"], position_of)

    def _read(self, record: str, offset: int) -> dict[str, int]:
        self._memory.invalidate_range(offset, 64)
        return unpack(record, self._memory.read_line_bytes(offset))

    def _state(self, number: int) -> tuple[int, int]:
        state = self._head.read("TopicLine", "topic", number)["state"]
        return state >> 8, state & 0xFF

    def _refresh(self) -> None:
        """Read the names anew when the table, or its head, has changed: only what changed, if that is known."""
        while True:
            line = self._head.read("DirectoryLine", "directory")
            version, control = line["topics_version"], self._head.control
            if (version, control) == (self._version, self._control):
                return
            known = control == self._control and 0 < version - self._version < DIRECTORY_CHANGES
            numbers = ([line["changed"][each % DIRECTORY_CHANGES] for each in range(self._version + 1, version + 1)]
                       if known else numpy.flatnonzero(self._states() & 0xFF).tolist())
            found = {number: self._entry(number) for number in numbers}
            if self._head.control == control:
                if not known:
                    self._by_name, self._by_number, self._deleting, self._taken_below = {}, {}, set(), 0
                for number, (state, entry) in found.items():
                    self._note(number, state, entry)
                self._version, self._control = version, control
                return

    def _note(self, number: int, state: int, entry: TopicEntry | None) -> None:
        """What a number stands for now."""
        before = self._by_number.pop(number, None)
        if before is not None and self._by_name.get(before.name) is before:
            del self._by_name[before.name]
        if entry is not None:
            self._by_number[number] = self._by_name[entry.name] = entry
        else:
            self._taken_below = min(self._taken_below, number)
        (self._deleting.add if state == TopicState.TOPIC_DELETING else self._deleting.discard)(number)

    def _states(self) -> Any:
        """The state words of all places for topics."""
        first, count = self._layout.offset_of("topic", 0), self._numbers["topic_count_max"]
        stride = self._layout.offset_of("topic", 1) - first
        data = self._head.read_bytes((count - 1) * stride + 64, "topic", 0)
        return numpy.ndarray((count,), "<u8", data, strides=(stride,))

    def _entry(self, number: int) -> tuple[int, TopicEntry | None]:
        """The state of a number, and its topic if it is active."""
        line = self._head.read("TopicLine", "topic", number)
        state = line["state"] & 0xFF
        if state != TopicState.TOPIC_ACTIVE:
            return state, None
        name = self._head.read("TopicName", "topic_name", number)
        retention = line["retention_bytes"]
        return state, TopicEntry(number, line["state"] >> 8, name["text"], line["order"], line["ack"],
                                 line["replication_factor"], -1 if retention == KEEP_FOREVER else retention,
                                 line["created_wall_ns"], line["alteration"])

    # ---- changing (head only) ---------------------------------------------------------------------------------------

    async def create(self, config: TopicConfig, lease_ns: int, live_brokers: Callable[[], list[int]],
                     written: Written = _memory_is_enough) -> TopicEntry:
        """Create a topic and wait until every live broker takes batches for it.

        It is made while it is `written` down, which is undone when it cannot be made. Raises `DuplicateTopic`,
        `TopicTableFull`, `BrokerUnavailable` when a broker takes no note of it, and what `written` raises. Nothing is
        changed when it raises.
        """
        async with self._lock:
            self._refresh()
            if config.name in self._by_name:
                raise DuplicateTopic(topic=config.name)
            self.finish_deletions(live_brokers())
            number = self._free_number()
            with self._bank.writing() as layout:
                generation = self._next_generation(layout, number)
            entry = TopicEntry(number, generation, config.name, config.order, config.ack, config.replication_factor,
                               config.retention_bytes, time.time_ns())
            async with written(entry):
                await self._make(entry, lease_ns, live_brokers)
            return self.find(config.name)

    async def _make(self, entry: TopicEntry, lease_ns: int, live_brokers: Callable[[], list[int]]) -> None:
        number = entry.number
        with self._bank.writing() as layout:
            self._wipe(layout, number)
            self._memory.write_bytes(layout.offset_of("topic_name", number), pack("TopicName", text=entry.name))
            line = pack(
                "TopicLine", state=entry.generation << 8 | TopicState.TOPIC_ACTIVE, order=entry.order, ack=entry.ack,
                replication_factor=entry.replication_factor, retention_bytes=_stored(entry.retention_bytes),
                created_wall_ns=entry.created_ns, message_bytes_max=self._numbers["message_bytes_max"],
                lease_ns=lease_ns)
            self._memory.store_fence()
            self._publish(layout, number, line)
        try:
            await self._every_broker(live_brokers, number, entry.generation)
        except BaseException:               # also when the caller goes away meanwhile
            with contextlib.suppress(BrokerUnavailable):    # of another head's bank it is for that one to say
                self._set_state(number, entry.generation, TopicState.TOPIC_DELETING)
            raise

    async def alter(self, name: str, changed: Callable[[TopicEntry], TopicConfig]) -> TopicEntry:
        """Give a topic other options, all in one line: readers see the old ones or the new ones.

        `changed` makes them from those that count now. Raises `BrokerUnavailable` when another head takes over.
        """
        async with self._lock:
            before = self.find(name)
            config = changed(before)
            with self._bank.writing() as layout:
                line = unpack("TopicLine", self._memory.read_line_bytes(layout.offset_of("topic", before.number)))
                line |= {"ack": config.ack, "retention_bytes": _stored(config.retention_bytes),
                         "alteration": line["alteration"] + 1}
                self._publish(layout, before.number, pack("TopicLine", **line))
            return self.find(name)

    async def delete(self, name: str, live_brokers: Callable[[], list[int]]) -> None:
        """Delete a topic: first every live broker stops serving it, then its segments are given back.

        It is deleted when it is marked: a broker that stands still takes note when it goes on, and then
        `complete_deletions` does the rest, as it does when the caller goes away.
        """
        async with self._lock:
            entry = self.find(name)
            self._set_state(entry.number, entry.generation, TopicState.TOPIC_DELETING)
            try:
                await self._every_broker(live_brokers, entry.number, 0, DELETE_SECONDS)
            except BrokerUnavailable:
                return
            self._set_state(entry.number, entry.generation, TopicState.TOPIC_FREE)

    async def complete_deletions(self, live_brokers: Callable[[], list[int]]) -> None:
        """Free what was deleted while some broker stood still (at the head)."""
        if self._unfinished and not self._lock.locked():        # else the next look does it
            async with self._lock:
                self._unfinished = self.finish_deletions(live_brokers())

    def _set_state(self, number: int, generation: int, state: TopicState) -> None:
        """Change a topic's state, if the number still has that topic. Raises `BrokerUnavailable` if we are not head."""
        self._unfinished |= state == TopicState.TOPIC_DELETING
        with self._bank.writing() as layout:
            line = unpack("TopicLine", self._memory.read_line_bytes(layout.offset_of("topic", number)))
            if line["state"] >> 8 == generation:
                line["state"] = generation << 8 | state
                self._publish(layout, number, pack("TopicLine", **line))

    def finish_deletions(self, live_brokers: list[int]) -> bool:
        """Free the numbers of topics whose deletion was left before every broker had stopped; whether some remain."""
        self._refresh()
        remain = False
        for number in sorted(self._deleting):
            generation, state = self._state(number)
            if state != TopicState.TOPIC_DELETING:
                continue
            if any(self._generation_at(number, broker) for broker in live_brokers):
                remain = True
            else:
                self._set_state(number, generation, TopicState.TOPIC_FREE)
        return remain

    def _free_number(self) -> int:
        """The lowest number that no topic has. Raises `TopicTableFull`."""
        numbers = self._numbers
        while self._taken_below in self._by_number:
            self._taken_below += 1
        for number in range(self._taken_below, numbers["topic_count_max"]):
            if number not in self._by_number and self._state(number)[1] == TopicState.TOPIC_FREE:
                return number
        raise TopicTableFull(
            topic_count_max=numbers["topic_count_max"], limit=TOPIC_COUNT_LIMIT, topic_bytes=topic_bytes(
                numbers["broker_count"], numbers["ring_slot_count"], numbers["order_entry_count"]))

    def _next_generation(self, layout: Layout, number: int) -> int:
        """Generations are 16 bits of every tag: they come round after 65,535 topics. One that a line of a broker which
        was away since then still names is passed over: it would take the new topic for the one that it knew."""
        at = layout.offset_of("directory") + 8
        brokers, named = range(self._numbers["broker_count"]), set[int]()
        for broker in brokers:
            named.add(self._generation_at(number, broker))
            named |= {self._read("ReplicaLine", layout.offset_of("replica", number, broker, each))["generation"]
                      for each in brokers}
        generation = self._memory.load_word(at) % 0xFFFF + 1
        while generation in named:
            generation = generation % 0xFFFF + 1
        self._memory.store_word(at, generation)
        self._memory.flush_range(at, 8)
        return generation

    def _wipe(self, layout: Layout, number: int) -> None:
        """Clear what the head writes of the topic. The brokers wipe their rings themselves, when they open it."""
        brokers = self._numbers["broker_count"]
        slots, entries = self._numbers["ring_slot_count"], self._numbers["order_entry_count"]
        first = layout.offset_of("topic_order", number)
        self._zero(first, layout.offset_of("offset_sequencer", number, brokers - 1) + 64 - first)
        self._zero(layout.offset_of("result", number, 0, 0), brokers * slots * record_bytes("BatchResult"))
        self._zero(layout.offset_of("order_entry", number, 0), entries * record_bytes("OrderEntry"))
        if start := self._counters_start:
            self._memory.write_line_bytes(
                first, pack("TopicOrderLine", committed_index=start, committed_position=start))
            at = layout.offset_of("topic_reclaim", number)
            self._memory.write_line_bytes(at, pack("TopicReclaimLine", reclaimed_index=start, reclaimed_position=start))
            self._memory.flush_range(first, 64)
            self._memory.flush_range(at, 64)
        self._memory.store_fence()

    def _zero(self, offset: int, count: int) -> None:
        zeroes = bytes(min(count, WIPE_BYTES))
        for at in range(offset, offset + count, WIPE_BYTES):
            self._memory.write_bytes(at, zeroes[:min(WIPE_BYTES, offset + count - at)])

    def _publish(self, layout: Layout, number: int, line: bytes) -> None:
        at = layout.offset_of("topic", number)
        self._memory.write_line_bytes(at, line)
        self._memory.flush_range(at, 64)
        self._memory.store_fence()
        directory = layout.offset_of("directory")
        changed = unpack("DirectoryLine", self._memory.read_line_bytes(directory))
        changed["topics_version"] += 1
        changed["changed"][changed["topics_version"] % DIRECTORY_CHANGES] = number
        self._memory.write_line_bytes(directory, pack("DirectoryLine", **changed))
        self._memory.flush_range(directory, 64)
        self._memory.store_fence()
        self._announce()

    async def _every_broker(self, live_brokers: Callable[[], list[int]], number: int, generation: int,
                            seconds: float = ROUND_SECONDS) -> None:
        """Wait until each live broker's line says that it serves this generation (0: that it has stopped).

        They were woken when the change was published; those that are late are woken again.
        """
        deadline = 0.0
        while True:
            late = [broker for broker in live_brokers() if self._generation_at(number, broker) != generation]
            if not late:
                return
            now = asyncio.get_running_loop().time()
            if not deadline:
                deadline = now + seconds
            elif now > deadline:
                raise BrokerUnavailable(f"broker {late[0]} did not take note of the topic within {seconds:.0f} s",
                                        address=f"broker {late[0]}")
            else:
                self._announce()
            await asyncio.sleep(STEP_SECONDS)

    def _generation_at(self, number: int, broker: int) -> int:
        at = self._layout.offset_of("offset_broker", number, broker)
        self._memory.invalidate_range(at, 64)
        return self._memory.load_word(at + 48)


def _stored(retention_bytes: int) -> int:
    return KEEP_FOREVER if retention_bytes < 0 else retention_bytes
