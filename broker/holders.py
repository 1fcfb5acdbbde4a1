"""Who keeps a topic's oldest data from being reclaimed, now, in words, and what helps.

The reclaimer writes down whom it met when it last needed room. That may be long ago: what is shown is looked up in the
cursors, groups and replicas as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy

from broker.errors import BrokerUnavailable, PoolFull
from broker.head import HeadView
from broker.layout import CursorState, GroupState, HolderKind, Layout, record_dtypes
from broker.placement import replica_brokers
from broker.records import record_bytes

NOBODY = HolderKind.HOLDER_NONE << 32
KEEP_FOREVER = (1 << 64) - 1
# A record by its name, its place and its index there; and so many of them as a numpy table.
Read = Callable[..., dict[str, Any]]
Table = Callable[[str, str, int], Any]
MaySee = Callable[[str], bool]          # whether somebody may see a topic of this name

_ADVICE = {
    HolderKind.HOLDER_NONE: "room is being made: publish again",
    HolderKind.HOLDER_PROTECTED: "let the group read and commit, or take its protection away with "
                                 "`cxlmq group reset {topic} {group} --no-protect`",
    HolderKind.HOLDER_REPLICA: "wait until it has caught up; `cxlmq cluster status` shows whether broker {replica} "
                               "lives",
    HolderKind.HOLDER_RETENTION: "let it drop messages (`cxlmq topic alter {topic} --retention SIZE`), delete it "
                                 "(`cxlmq topic delete {topic}`), or make region_bytes larger",
    HolderKind.HOLDER_UNCOMMITTED: "publish again: they are ordered when the batches before them come, or the lease of "
                                   "their session ends",
    HolderKind.HOLDER_OTHERS: "delete a topic, or make region_bytes larger",
}
_UNSEEN = {
    HolderKind.HOLDER_CURSOR: "a reader of another topic",
    HolderKind.HOLDER_PROTECTED: "a protected group of another topic",
    HolderKind.HOLDER_RETENTION: "another topic, which never drops data",
    HolderKind.HOLDER_UNCOMMITTED: "batches of another topic that wait for their order",
}
_READER_ADVICE = ("let it read on, or close it, or give the topic a retention (`cxlmq topic alter {topic} --retention "
                  "SIZE`): readers hold no more than that")
_VIEWER_ADVICE = "let it read on and release what it views, or close it"


@dataclass(frozen=True)
class Holder:
    """Somebody who holds data back: a word of the reclaimer (kind << 32 | number), the first entry that is kept."""

    word: int
    index: int
    text: str
    advice: str
    topic: str = ""         # whose reader, group or data it is

    def told_to(self, may_see: MaySee) -> "Holder":
        """The same for somebody who may not see every topic: what it is, and no names."""
        if not self.topic or may_see(self.topic):
            return self
        return replace(self, text=_UNSEEN.get(self.kind, "another topic"), topic="", advice=(
            "wait, or ask whoever may see that topic"))

    @property
    def kind(self) -> HolderKind:
        """What it is."""
        return HolderKind(self.word >> 32)


class Holders:
    """A look at all cursors and groups: who holds each topic. `read` and `table` read records, of the head's bank and
    others."""

    def __init__(self, read: Read, table: Table, numbers: dict[str, int]) -> None:
        self._read, self._table, self._numbers = read, table, numbers

    @cached_property
    def _cursors(self) -> dict[int, tuple[int, int]]:
        """By topic key: the lowest index of a reader, and its cursor."""
        return self._lowest("CursorLine", "cursor", self._numbers["cursor_count_max"], CursorState.CURSOR_LIVE)

    @cached_property
    def _groups(self) -> dict[int, tuple[int, int]]:
        return self._lowest("GroupLine", "group", self._numbers["group_count_max"], GroupState.GROUP_PROTECTED)

    def _lowest(self, record: str, place: str, count: int, state: int) -> dict[int, tuple[int, int]]:
        lines, found = self._table(record, place, count), dict[int, tuple[int, int]]()
        for number in numpy.flatnonzero(lines["state"] & 0xFF == state).tolist():
            topic, index = int(lines["topic"][number]), int(lines["index"][number])
            found[topic] = min(found.get(topic, (1 << 64, 0)), (index, number))
        return found

    def of(self, number: int) -> Holder:
        """Who holds a topic's oldest entry; nobody, when it may be reclaimed or nothing is there."""
        topic = self._read("TopicLine", "topic", number)
        first = self._read("TopicReclaimLine", "topic_reclaim", number)["reclaimed_index"]
        committed = self._read("TopicOrderLine", "topic_order", number)["committed_index"]
        key = topic["state"] >> 8 << 16 | number
        if first >= committed:
            return self._holder(NOBODY, committed)
        if topic["retention_bytes"] == KEEP_FOREVER:
            return self._holder(HolderKind.HOLDER_RETENTION << 32 | number, first)
        lowest, word = committed, NOBODY
        for kind, places in ((HolderKind.HOLDER_PROTECTED, self._groups), (HolderKind.HOLDER_CURSOR, self._cursors)):
            index, place = places.get(key, (committed, 0))
            if index < lowest:
                lowest, word = index, kind << 32 | place
        for index, replica in self._replicas(number, topic):
            if index < lowest:
                lowest, word = index, HolderKind.HOLDER_REPLICA << 32 | replica
        return self._holder(word, lowest)

    def _replicas(self, number: int, topic: dict[str, Any]) -> list[tuple[int, int]]:
        brokers, factor, generation = self._numbers["broker_count"], topic["replication_factor"], topic["state"] >> 8
        if factor < 2:
            return []
        live = self._read("HeadLine", "head")["live_brokers"] or (1 << brokers) - 1
        found = []
        for source in range(brokers):
            for replica in replica_brokers(number, generation, source, live, brokers, factor):
                line = self._read("ReplicaLine", "replica", number, source, replica)
                found.append((line["replicated_index"] if line["generation"] == generation else 0, replica))
        return found

    def answer(self, broker: int) -> Holder:
        """Whom the reclaimer met when this broker asked for room last."""
        return self._holder(self._read("ReclaimAnswerLine", "reclaim_answer", broker)["holder"], 0)

    def _topic_name(self, number: int) -> str:
        if number >= self._numbers["topic_count_max"]:
            return f"number {number}"
        return str(self._read("TopicName", "topic_name", number)["text"])

    def _holder(self, word: int, index: int) -> Holder:
        """The holder with its words."""
        number = word & 0xFFFFFFFF
        try:
            kind = HolderKind(word >> 32)
        except ValueError:
            return Holder(NOBODY, index, f"holder {word >> 32}:{number}", "run `cxlmq region verify`")
        names: dict[str, object] = {"topic": "", "group": "", "replica": number}
        advice = _ADVICE.get(kind, "")
        if kind == HolderKind.HOLDER_CURSOR:
            text, advice, names["topic"] = self._reader(number)
        elif kind == HolderKind.HOLDER_PROTECTED:
            line = self._read("GroupLine", "group", number)
            names.update(topic=self._topic_name(line["topic"] & 0xFFFF),
                         group=self._read("GroupName", "group_name", number)["text"])
            text = f"the protected group {names['group']} of topic {names['topic']}"
        elif kind == HolderKind.HOLDER_NONE:
            text = "nobody"
        elif kind == HolderKind.HOLDER_REPLICA:
            text = f"the replica at broker {number}"
        else:
            names["topic"] = self._topic_name(number)
            text = {HolderKind.HOLDER_RETENTION: f"topic {names['topic']}, which never drops data",
                    HolderKind.HOLDER_UNCOMMITTED: f"batches of topic {names['topic']} that wait for their order",
                    HolderKind.HOLDER_OTHERS: "other topics, none with more than its share"}[kind]
        return Holder(word, index, text, advice.format(**names), str(names["topic"]))

    def _reader(self, cursor: int) -> tuple[str, str, str]:
        line = self._read("CursorLine", "cursor", cursor)
        name = self._read("CursorName", "cursor_name", cursor)["text"]
        process = f"process {line['pid']}" if line["pid"] else "another machine"
        group = f", for group {name}" if name else ""
        broker = cursor // self._numbers["cursors_per_broker"]
        topic = self._topic_name(line["topic"] & 0xFFFF)
        text = f"the reader of topic {topic} in {process}{group} (through broker {broker})"
        return text, _READER_ADVICE if line["copies"] else _VIEWER_ADVICE, topic


def holders_of(head: HeadView, layout: Layout) -> Holders:
    """A look through the serving head. It raises `BrokerUnavailable` while there is none."""
    def table(record: str, place: str, count: int) -> Any:
        stride = layout.offset_of(place, 1) - layout.offset_of(place, 0)
        data = head.read_bytes((count - 1) * stride + record_bytes(record), place, 0)
        return numpy.ndarray((count,), record_dtypes()[record], data, strides=(stride,))

    return Holders(head.read, table, layout.numbers)


def who_stops(head: HeadView, layout: Layout, topic: int, may_see: MaySee = lambda _: True) -> str:
    """Why batches of a topic wait, when its order index is full: who is in the way, and what helps."""
    try:
        frontiers = head.read("TopicOrderLine", "topic_order", topic)["committed_index"], head.read(
            "TopicReclaimLine", "topic_reclaim", topic)["reclaimed_index"]
        holder = holders_of(head, layout).of(topic).told_to(may_see)
    except BrokerUnavailable:
        return "a new head is taking over: publish again"
    if frontiers[0] - frontiers[1] < layout.numbers["order_entry_count"] * 3 // 4 or holder.word == NOBODY or (
            holder.index > frontiers[1]):
        return "publish again"
    return (f"{holder.text} holds the oldest of {frontiers[0] - frontiers[1]} kept: {holder.advice}, or raise "
            "order_entry_count")


def in_the_way(head: HeadView, layout: Layout, broker: int, topic: int) -> Holder:
    """Who keeps a broker from giving a topic a segment: who holds the topic's oldest data, else whom the reclaimer met
    last. Raises `BrokerUnavailable` while no head serves."""
    holders = holders_of(head, layout)
    holder = holders.of(topic)
    first = head.read("TopicReclaimLine", "topic_reclaim", topic)["reclaimed_index"]
    return holder if holder.word != NOBODY and holder.index <= first else holders.answer(broker)


def pool_full(holder: Holder) -> PoolFull:
    """The error of a publisher whose topic gets no segment: who is in the way, and what helps."""
    text = holder.text + " holds the oldest"
    if holder.word == NOBODY:
        text = "its oldest messages are just being dropped"
    elif holder.kind == HolderKind.HOLDER_OTHERS:
        text = holder.text + ", have them all"
    return PoolFull(holder=text, advice=holder.advice)


def why_full(head: HeadView, layout: Layout, broker: int, topic: int,
             may_see: MaySee = lambda _: True) -> PoolFull:
    """Why a broker gives a topic no segment."""
    try:
        return pool_full(in_the_way(head, layout, broker, topic).told_to(may_see))
    except BrokerUnavailable:
        return PoolFull(holder="a new head is taking over", advice="publish again")
