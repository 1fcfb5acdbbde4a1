"""Checks a region, live or dead, and replica files; names every damaged range. Nothing is changed or removed.

    superblock ──► brokers, segments ──► topics: frontiers, entries, payload, rings, replicas ──► sessions, cursors

A record that contradicts its own invariant, its neighbours or its checksum is a finding. A live region changes while it
is read: there a finding counts only when the same record contradicts itself again a moment later.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.config import check_topic_name
from broker.durable_files import FileDamaged
from broker.errors import BadTopicName, RecoveryError
from broker.group_files import damaged_group_files
from broker.inspection import with_head_bank
from broker.layout import (
    LAYOUT_MAGIC,
    LAYOUT_VERSION,
    LOST_BROKER_NUMBER,
    AttachState,
    BrokerState,
    ControlBits,
    CursorState,
    GroupState,
    Layout,
    SessionState,
    TopicState,
)
from broker.records import record_bytes, tag_of, unpack
from broker.recovery import make_plan, manifest_paths, read_manifest
from broker.region import layout_from, read_superblock
from broker.wire import payload_status
from sim.cxl.memory import MappedMemory, Memory, MemoryAccessError

SETTLE_SECONDS = 0.1
TRIES = 3
POSITION_MAX = 1 << 63               # none gets so far
_TEXT = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True)
class Finding:
    """One damaged range. `offset` counts from the start of the region or file."""

    kind: str                   # "damage", or "tail": what an interrupted write left, which nobody was promised
    where: str                  # the region or file
    record: str
    field: str
    offset: int
    nbytes: int
    what: str
    topic: str = ""
    broker: int | None = None
    first_position: int | None = None
    end_position: int | None = None

    def text(self) -> str:
        """In one line, for people."""
        place = [f"topic {self.topic!r}"] if self.topic else []
        place += [f"broker {self.broker}"] if self.broker is not None else []
        if self.first_position is not None:
            end = "the end" if self.end_position is None else self.end_position
            place.append(f"positions {self.first_position} to {end}")
        field = f".{self.field}" if self.field else ""
        return (f"{self.kind}: {self.where}, bytes {self.offset} to {self.offset + self.nbytes}: {self.record}{field}"
                f"{' (' + ', '.join(place) + ')' if place else ''}: {self.what}")


# ---- regions -------------------------------------------------------------------------------------------------------


def verify_region(mapping: Any, where: str, live: bool) -> list[Finding]:
    """Every finding in a mapped region file; with `live`, those that last."""
    found = _check_region(mapping, where)
    for _ in range(TRIES if live else 0):
        if not found:
            return []
        time.sleep(SETTLE_SECONDS)
        again = {(each.record, each.field, each.offset): each for each in _check_region(mapping, where)}
        found = [again[key] for each in found if (key := (each.record, each.field, each.offset)) in again]
    return found


def _check_region(mapping: Any, where: str) -> list[Finding]:
    superblock = read_superblock(mapping)
    problem = _superblock_problem(mapping, superblock)
    if problem is not None:
        field, what = problem
        return [Finding("damage", where, "Superblock", field, 0, record_bytes("Superblock"), what)]
    memory = MappedMemory(mapping)
    checks = RegionChecks(memory, with_head_bank(memory, layout_from(superblock)), where)
    try:
        checks.everything()
    except MemoryAccessError as error:
        checks.add("region", "", 0, 0, str(error))
    return checks.found


def _superblock_problem(mapping: Any, superblock: dict[str, Any]) -> tuple[str, str] | None:
    """(field, what is wrong with it), None when the rest can be found by it."""
    if not superblock:
        return "", f"the file has {len(mapping)} bytes: truncated"
    for field, wanted in (("magic", LAYOUT_MAGIC), ("version", LAYOUT_VERSION)):
        if superblock[field] != wanted:
            return field, f"it is {superblock[field]}, here it is {wanted}"
    if superblock["region_bytes"] != len(mapping):
        return "region_bytes", f"it says {superblock['region_bytes']}, the file has {len(mapping)}: truncated"
    if superblock["ready"] != 1:
        return "ready", "the region is not finished: its creator is at work, or died"
    try:
        layout = layout_from(superblock)
    except (ValueError, IndexError, OverflowError, ZeroDivisionError) as error:
        return "", f"its numbers make no region: {error}"
    if layout.hash() != superblock["layout_hash"]:
        return "layout_hash", "the records are laid out otherwise than its numbers say, or by another build"
    return None


class RegionChecks:
    """Goes through the records of one region."""

    def __init__(self, memory: Memory, layout: Layout, where: str) -> None:
        self.found: list[Finding] = []
        self._memory, self._layout, self._where, self._numbers = memory, layout, where, layout.numbers
        self._generations: int = self._read("DirectoryLine", "directory")[0]["topic_generations"]

    def add(self, record: str, field: str, offset: int, nbytes: int, what: str, **details: Any) -> None:
        """Note a finding."""
        self.found.append(Finding("damage", self._where, record, field, offset, nbytes, what, **details))

    def everything(self) -> None:
        """All records."""
        self._head()
        self._brokers()
        self._segments()
        topics = {}
        for number in range(self._numbers["topic_count_max"]):
            topic = self._topic(number)
            if topic is not None:
                topics[number] = topic
        self._sessions(topics)
        self._cursors(topics)
        self._groups(topics)
        self._attached()

    def _read(self, record: str, place: str, *index: int) -> tuple[dict[str, Any], int]:
        at, nbytes = self._layout.offset_of(place, *index), record_bytes(record)
        self._memory.invalidate_range(at, nbytes)
        return unpack(record, self._memory.read_bytes(at, nbytes)), at

    def _expect(self, record: str, at: int, line: dict[str, Any], **checks: tuple[bool, str]) -> bool:
        """Note every field whose check fails: field=(holds, what it should be)."""
        details = {key: line.pop(key) for key in ("_topic", "_broker") if key in line}
        well = True
        for field, (holds, wanted) in checks.items():
            if not holds:
                well = False
                self.add(record, field, at, record_bytes(record), f"it is {line.get(field)}, and should be {wanted}",
                         **{key[1:]: value for key, value in details.items()})
        return well

    def _head(self) -> None:
        """The control word names a broker and a bank that there are, and that bank is of the same epoch."""
        line, at = self._read("ControlLine", "control")
        control = line["control"]
        bank = control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF
        broker, epoch = control & ControlBits.CONTROL_BROKER, control >> ControlBits.CONTROL_EPOCH_SHIFT
        well = broker < self._numbers["broker_count"] and bank < self._numbers["bank_count"]
        if not well:
            self.add("ControlLine", "control", at, record_bytes("ControlLine"),
                     f"it is {control:#x}: there is no broker {broker} or no bank {bank}")
        head, at = self._read("HeadLine", "head")
        if control & ControlBits.CONTROL_SERVING and well:
            self._expect("HeadLine", at, {**head, "_broker": broker}, epoch=(head["epoch"] == epoch, f"{epoch}"),
                         broker=(head["broker"] == broker, f"{broker}, the head"))

    # ---- brokers and segments -------------------------------------------------------------------------------------

    def _brokers(self) -> None:
        for broker in range(self._numbers["broker_count"]):
            line, at = self._read("BrokerLine", "broker", broker)
            absent = line["state"] == BrokerState.BROKER_ABSENT
            self._expect("BrokerLine", at, {**line, "_broker": broker},
                         state=(line["state"] in list(BrokerState), "a state of a broker"),
                         pid=(absent or 0 < line["pid"] < 1 << 32, "a process"))
            address, at = self._read("BrokerAddress", "broker_address", broker)
            self._expect("BrokerAddress", at, {**address, "_broker": broker}, **{
                field: (_TEXT.fullmatch(address[field]) is not None, "an address")
                for field in ("tcp_address", "unix_address")})

    def _segments(self) -> None:
        self._owners = []
        bitmap = int.from_bytes(self._memory.read_bytes(
            self._layout.offset_of("bitmap"),
            self._layout.offset_of("warm_bitmap") - self._layout.offset_of("bitmap")), "little")
        brokers, count = self._numbers["broker_count"], self._numbers["segment_count"]
        share = -(-count // brokers)
        words = (self._layout.offset_of("warm_bitmap") - self._layout.offset_of("bitmap")) // 8 // brokers
        for segment in range(count):
            line, at = self._read("SegmentLine", "segment_line", segment)
            owner = line["owner"]
            self._owners.append(owner)
            bit = (segment // share * words + segment % share // 64) * 64 + segment % share % 64
            known = owner == 0 or (1 <= owner & 0xFFFF <= brokers and owner >> 16 & 0xFFFF < self._numbers[
                "topic_count_max"])
            self._expect("SegmentLine", at, {**line, "_broker": (owner & 0xFFFF) - 1 if owner and known else None},
                         owner=(known and (owner == 0 or bitmap >> bit & 1 == 1), (
                             "free, or a broker and topic of this cluster whose segment is taken in the bitmap")))

    # ---- topics -----------------------------------------------------------------------------------------------------

    def _topic(self, number: int) -> dict[str, Any] | None:
        line, at = self._read("TopicLine", "topic", number)
        state = line["state"] & 0xFF
        if line["state"] == 0:
            return None
        name = self._read("TopicName", "topic_name", number)
        text = name[0]["text"]
        well = self._expect(
            "TopicLine", at, {**line, "_topic": text if _TEXT.fullmatch(text) else ""},
            state=(state in list(TopicState), "a state of a topic"),
            order=(line["order"] in (0, 1, 2, 5), "0, 1, 2 or 5"),
            ack=(line["ack"] <= 2, "0, 1 or 2"),
            replication_factor=(1 <= line["replication_factor"] <= self._numbers["broker_count"], "1 to the brokers"),
            message_bytes_max=(line["message_bytes_max"] == self._numbers["message_bytes_max"], "that of the region"))
        try:
            check_topic_name(text)
        except BadTopicName:
            self.add("TopicName", "text", name[1], record_bytes("TopicName"), f"{text!r} is no name of a topic")
            well = False
        if not well or state != TopicState.TOPIC_ACTIVE:
            return None
        topic = {**line, "number": number, "name": text, "generation": line["state"] >> 8}
        self._frontiers(topic)
        self._entries(topic)
        for broker in range(self._numbers["broker_count"]):
            self._ring(topic, broker)
            self._replicas(topic, broker)
        return topic

    def _frontiers(self, topic: dict[str, Any]) -> None:
        order, at = self._read("TopicOrderLine", "topic_order", topic["number"])
        reclaim, reclaim_at = self._read("TopicReclaimLine", "topic_reclaim", topic["number"])
        topic["committed"], topic["reclaimed"] = order["committed_index"], reclaim["reclaimed_index"]
        topic["committed_position"] = order["committed_position"]
        topic["reclaimed_position"] = reclaim["reclaimed_position"]
        entries = self._numbers["order_entry_count"]
        kept = order["committed_index"] - reclaim["reclaimed_index"]
        topic["readable"] = self._expect(
            "TopicOrderLine", at, {**order, "_topic": topic["name"]},
            committed_index=(0 <= kept <= entries, (
                f"between {reclaim['reclaimed_index']}, what is reclaimed, and {entries} more")),
            committed_position=(reclaim["reclaimed_position"] <= order["committed_position"] < POSITION_MAX, (
                f"at least {reclaim['reclaimed_position']}, what is reclaimed")))
        self._expect("TopicReclaimLine", reclaim_at, {**reclaim, "_topic": topic["name"]},
                     reclaimed_bytes=(reclaim["reclaimed_bytes"] <= order["committed_bytes"], "at most the committed"))

    def _entries(self, topic: dict[str, Any]) -> None:
        """The order index: each entry continues the one before, and its payload holds its messages."""
        position: int = topic["reclaimed_position"]
        damaged_from: tuple[int, int, str, str] | None = None
        for index in range(topic["reclaimed"], topic["committed"]) if topic["readable"] else ():
            entry, at = self._read("OrderEntry", "order_entry", topic["number"], index)
            field, what = self._entry_problem(topic, entry, index, None if damaged_from else position)
            if field:
                damaged_from = damaged_from or (position, at, field, what)
                continue
            if damaged_from is not None:
                self._lost_entries(topic, damaged_from, entry["position"])
                damaged_from = None
            position = entry["position"] + entry["message_count"]
        if damaged_from is not None:
            self._lost_entries(topic, damaged_from, topic["committed_position"])
        elif topic["readable"] and position != topic["committed_position"]:
            self.add("TopicOrderLine", "committed_position", self._layout.offset_of("topic_order", topic["number"]),
                     record_bytes("TopicOrderLine"), topic=topic["name"],
                     what=f"it is {topic['committed_position']}, the entries end at {position}")

    def _lost_entries(self, topic: dict[str, Any], damaged: tuple[int, int, str, str], end: int) -> None:
        first, at, field, what = damaged
        self.add("OrderEntry", field, at, record_bytes("OrderEntry"), what, topic=topic["name"], first_position=first,
                 end_position=end)

    def _entry_problem(self, topic: dict[str, Any], entry: dict[str, Any], index: int,
                       position: int | None) -> tuple[str, str]:
        """(field, what is wrong with it), two empty texts for an entry that is well."""
        numbers, offset, nbytes = self._numbers, entry["payload_offset"], entry["payload_bytes"]
        if entry["commit"] != tag_of(topic["generation"], index):
            return "commit", f"its tag is {entry['commit']:#x}: torn, stale or damaged"
        if position is not None and entry["position"] != position:
            return "position", f"it is {entry['position']}, the entry before ends at {position}"
        if entry["broker"] == LOST_BROKER_NUMBER and nbytes == 0:
            return "", ""
        if entry["broker"] >= numbers["broker_count"]:
            return "broker", f"there is no broker {entry['broker']}"
        if nbytes > numbers["batch_bytes_max"] or nbytes == 0:
            return "payload_bytes", f"a batch has at most {numbers['batch_bytes_max']} bytes, not {nbytes}"
        if offset % 64 or not numbers["segments"] <= offset <= numbers["region_bytes"] - nbytes:
            return "payload_offset", f"{offset} is not in a segment"
        for segment in range((offset - numbers["segments"]) // numbers["segment_bytes"],
                             (offset + nbytes - 1 - numbers["segments"]) // numbers["segment_bytes"] + 1):
            owner = self._owners[segment]
            if owner >> 16 != topic["generation"] << 16 | topic["number"]:
                return "payload_offset", f"segment {segment} is not one of this topic"
        payload, count = self._memory.read_bytes(offset, nbytes), entry["message_count"]
        if payload_status(payload, count, topic["message_bytes_max"]):
            return "payload", f"the payload at {offset} does not hold {count} messages"
        return "", ""

    def _ring(self, topic: dict[str, Any], broker: int) -> None:
        line, at = self._read("OffsetBrokerLine", "offset_broker", topic["number"], broker)
        if line["generation"] != topic["generation"]:
            self._expect("OffsetBrokerLine", at, {**line, "_topic": topic["name"], "_broker": broker}, generation=(
                line["generation"] <= self._generations, f"{topic['generation']}, or an earlier one"))
            return
        slots = self._numbers["ring_slot_count"]
        scanned, scanned_at = self._read("OffsetSequencerLine", "offset_sequencer", topic["number"], broker)
        well = self._expect(
            "OffsetBrokerLine", at, {**line, "_topic": topic["name"], "_broker": broker},
            delegated=(0 <= line["delegated"] - line["reclaimed"] <= slots, (
                f"between {line['reclaimed']}, the slots that are free again, and {slots} more")),
            headers_start=(line["headers_start"] == self._layout.offset_of("ring", topic["number"], broker, 0), (
                "where its ring begins")))
        scanned.update(_topic=topic["name"], _broker=broker)
        self._expect("OffsetSequencerLine", scanned_at, scanned, scanned=(
            line["reclaimed"] <= scanned["scanned"] <= line["delegated"] or not well, (
                f"between {line['reclaimed']} and {line['delegated']}, as its broker says")))
        for slot in range(line["reclaimed"], line["delegated"]) if well else ():
            header, at = self._read("BatchHeader", "ring", topic["number"], broker, slot)
            self._expect("BatchHeader", at, {**header, "_topic": topic["name"], "_broker": broker}, complete=(
                header["complete"] == tag_of(topic["generation"], slot), f"the tag of slot {slot}"))

    def _replicas(self, topic: dict[str, Any], source: int) -> None:
        for replica in range(self._numbers["broker_count"]):
            line, at = self._read("ReplicaLine", "replica", topic["number"], source, replica)
            if line["generation"] != topic["generation"] and line["generation"] <= self._generations:
                continue                        # what an earlier topic of this number left
            self._expect(
                "ReplicaLine", at, {**line, "_topic": topic["name"], "_broker": replica},
                generation=(line["generation"] == topic["generation"], f"{topic['generation']}"),
                replicated_index=(line["replicated_index"] <= topic["committed"], f"at most {topic['committed']}"),
                replicated_position=(line["replicated_position"] <= topic["committed_position"], (
                    f"at most {topic['committed_position']}, what is committed")),
                failed=(line["failed"] < 4096, "an error number"))

    # ---- sessions, cursors, clients ---------------------------------------------------------------------------------

    def _of_topic(self, word: int, topics: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
        topic = topics.get(word & 0xFFFF)
        return topic if topic is not None and topic["generation"] == word >> 16 else None

    def _sessions(self, topics: dict[int, dict[str, Any]]) -> None:
        for slot in range(self._numbers["session_count_max"]):
            line, at = self._read("SessionLine", "session", slot)
            progress, progress_at = self._read("SessionProgressLine", "session_progress", slot)
            if line["state"] == 0:
                continue
            broker = slot // self._numbers["sessions_per_broker"]
            self._expect("SessionLine", at, {**line, "_broker": broker},
                         state=(line["state"] & 0xFF in list(SessionState), "a state of a session"),
                         topic=(line["topic"] & 0xFFFF < self._numbers["topic_count_max"], "a topic of the table"),
                         ack=(line["ack"] <= 2, "0, 1 or 2"))
            topic = self._of_topic(line["topic"], topics)
            self._expect(
                "SessionProgressLine", progress_at,
                {**progress, "_broker": broker, "_topic": topic["name"] if topic else ""},
                state=(progress["state"] & 0xFF in list(SessionState), "a state of a session"),
                committed_position=(topic is None or progress["committed_position"] < POSITION_MAX, "a position"),
                held=(progress["held"] <= 256, "at most 256, the window"))

    def _cursors(self, topics: dict[int, dict[str, Any]]) -> None:
        for number in range(self._numbers["cursor_count_max"]):
            line, at = self._read("CursorLine", "cursor", number)
            if line["state"] & 0xFF == CursorState.CURSOR_FREE:
                continue
            broker = number // self._numbers["cursors_per_broker"]
            topic = self._of_topic(line["topic"], topics)
            live = line["state"] & 0xFF == CursorState.CURSOR_LIVE
            self._expect(
                "CursorLine", at, {**line, "_broker": broker, "_topic": topic["name"] if topic else ""},
                state=(line["state"] & 0xFF in list(CursorState), "a state of a cursor"),
                topic=(line["topic"] & 0xFFFF < self._numbers["topic_count_max"], "a topic of the table"),
                index=(topic is None or not live or line["index"] <= topic["committed"], "at most what is committed"))

    def _groups(self, topics: dict[int, dict[str, Any]]) -> None:
        for number in range(self._numbers["group_count_max"]):
            line, at = self._read("GroupLine", "group", number)
            topic = self._of_topic(line["topic"], topics)
            if line["state"] & 0xFF and topic is not None:
                self._expect("GroupLine", at, {**line, "_topic": topic["name"]},
                             state=(line["state"] & 0xFF in list(GroupState), "a state of a group"),
                             position=(line["position"] <= topic["committed_position"], "at most what is committed"))

    def _attached(self) -> None:
        for slot in range(self._numbers["attach_slot_count"]):
            line, at = self._read("AttachLine", "attach_line", slot)
            broker = slot // max(1, self._numbers["attach_per_broker"])
            self._expect("AttachLine", at, {**line, "_broker": broker},
                         state=(line["state"] & 0xFF in list(AttachState), "a state of an attached client"))


# ---- replicas ------------------------------------------------------------------------------------------------------


def verify_replicas(folder: Path) -> list[Finding]:
    """Every damaged range of the files of a data directory, and every range of messages that no file has.

    Raises `RecoveryError` when there is nothing to check.
    """
    found = list(_check_small_files(folder))
    try:
        plan = make_plan(folder)
    except RecoveryError:
        if found:                               # what the rest depends on is damaged, and named
            return found
        raise
    durable = {topic.name: topic.durable_position for topic in plan.topics}
    for each in plan.damage:
        torn = each.end_position is None and each.first_position is not None
        tail = torn and (each.first_position or 0) >= durable.get(each.topic, 0)
        replica = each.path.endswith(".replica")
        record = "file" if not replica else "ReplicaRecord" if each.nbytes else "ReplicaSuperblock"
        found.append(Finding("tail" if tail else "damage", each.path, record, "", each.offset, each.nbytes, each.what,
                             each.topic, each.replica if replica else None, each.first_position, each.end_position))
    for topic in plan.topics:
        found += [Finding("tail" if lost.reason == "unsynced" else "damage", str(folder), "log", "", 0, 0,
                          f"no replica has these messages ({lost.reason})", topic.name, None, lost.first, lost.end)
                  for lost in topic.lost]
    return found


def _check_small_files(folder: Path) -> Iterator[Finding]:
    """Manifests and the files of groups: what a recovery plan does not read, or cannot go on without."""
    for path in manifest_paths(folder):
        try:
            read_manifest(path)
        except (FileDamaged, OSError) as error:
            yield Finding("damage", str(path), "file", "", 0, path.stat().st_size, str(error))
    for where, what in damaged_group_files(sorted({folder, *folder.glob("broker-*")})):
        yield Finding("damage", str(where), "file", "", 0, where.stat().st_size, what)
