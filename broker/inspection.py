"""What a region holds, as Python values: brokers, topics, sessions, cursors, clients, the pool. Works on a dead one."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy

from broker.holders import Holders
from broker.layout import (
    AttachState,
    BrokerState,
    ControlBits,
    CursorState,
    GroupState,
    Layout,
    SessionState,
    TopicState,
)
from broker.record_arrays import DTYPES, decoded, read_indexed, read_one
from broker.region import Region
from broker.unread import lost_from
from sim.cxl.memory import Memory, Role

ROLES = {role.name.removeprefix("ROLE_").lower(): int(role) for role in Role if role.name != "ROLE_COUNT"}


def _state_name(kind: Any, value: int) -> str:
    """BROKER_READY as "ready"; a value that no one should have written is shown as it is."""
    try:
        return str(kind(value).name).partition("_")[2].lower()
    except ValueError:
        return f"damaged ({value})"


def region_statistics(region: Region) -> dict[str, Any]:
    """Every counter of a region: brokers, sequencer, and the accesses by role (summed, and by broker)."""
    memory, layout = region.memory(), region.layout
    brokers = range(layout.numbers["broker_count"])
    by_broker = [{role: read_one(memory, layout, "AccessStatistics", "role_statistics", b, number)
                  for role, number in ROLES.items()} for b in brokers]
    counters = DTYPES["AccessStatistics"].names or ()
    share = layout.numbers["attach_per_broker"]
    for b, found in enumerate(by_broker):           # attached clients count in their slots
        slots = [read_one(memory, layout, "AccessStatistics", "attach_statistics", a)
                 for a in range(b * share, b * share + share)]
        found["client"] = {key: sum(each[key] for each in [found["client"], *slots]) for key in counters}
    roles = {role: {key: sum(each[role][key] for each in by_broker) for key in counters} for role in ROLES}
    return {
        "brokers": [read_one(memory, layout, "BrokerCounters", "broker_counters", b) for b in brokers],
        "sequencer": read_one(memory, layout, "SequencerCounters", "sequencer_counters"),
        "roles": roles,
        "roles_by_broker": by_broker,
        "total": {key: sum(each[key] for each in roles.values()) for key in counters},
    }


def inspect_region(region: Region) -> dict[str, Any]:
    """What a region holds: brokers, topics with their frontiers, sessions, cursors, pool. Works on a dead one."""
    memory, layout = region.memory(), layout_of_head(region)
    topics = list(_inspect_topics(memory, layout))
    holders = Holders(partial(read_one, memory, layout), partial(read_indexed, memory, layout), layout.numbers)
    for topic in topics:
        topic["holder"] = _holder_of(holders, topic)
    return {
        "name": region.name,
        "superblock": region.superblock,
        "control": _inspect_head(memory, layout),
        "brokers": _inspect_brokers(memory, region),
        "topics": topics,
        "sessions": _inspect_sessions(memory, layout),
        "cursors": _inspect_cursors(memory, layout),
        "attached": _inspect_attached(memory, layout),
        "groups": _inspect_groups(memory, layout, topics),
        "pool": _inspect_pool(memory, layout, topics),
    }


def layout_of_head(region: Region) -> Layout:
    """The region's layout with the bank of the head that serves, or served last."""
    return with_head_bank(region.memory(), region.layout)


def with_head_bank(memory: Memory, layout: Layout) -> Layout:
    """The layout with the bank that the control word names; a damaged one names the last bank."""
    control = memory.load_word(layout.offset_of("control"))
    source = control >> ControlBits.CONTROL_SOURCE_SHIFT & 0xFF
    bank = control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF
    if not control & ControlBits.CONTROL_SERVING and source:
        bank = source - 1
    return layout.with_bank(min(bank, layout.numbers["bank_count"] - 1))


def _inspect_head(memory: Memory, layout: Layout) -> dict[str, Any]:
    control = memory.load_word(layout.offset_of("control"))
    head = read_one(memory, layout, "HeadLine", "head")
    return {"epoch": control >> ControlBits.CONTROL_EPOCH_SHIFT,
            "sequencer_broker": control & ControlBits.CONTROL_BROKER,
            "serving": bool(control & ControlBits.CONTROL_SERVING), "bank": layout.numbers["bank"],
            **{key: head[key] for key in ("scanners", "lock_mode", "source_epoch", "adopted", "live_brokers")}}


def _inspect_brokers(memory: Memory, region: Region) -> list[dict[str, Any]]:
    layout, count = region.layout, region.layout.numbers["broker_count"]
    found = []
    for number, line in enumerate(read_indexed(memory, layout, "BrokerLine", "broker", count)):
        values = decoded(line)
        found.append({
            "broker": number, **values, "state": _state_name(BrokerState, values["state"]),
            "alive": region.broker_lives(number),
            **read_one(memory, layout, "BrokerAddress", "broker_address", number),
        })
    return found


def _inspect_topics(memory: Memory, layout: Layout) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(
            read_indexed(memory, layout, "TopicLine", "topic", layout.numbers["topic_count_max"])):
        line = decoded(row)
        generation, state = _versioned(TopicState, line.pop("state"))
        if state == "free":
            continue
        reclaim = read_one(memory, layout, "TopicReclaimLine", "topic_reclaim", number)
        yield {
            "topic": number, "name": read_one(memory, layout, "TopicName", "topic_name", number)["text"],
            "generation": generation, "state": state, **line,
            "retention_bytes": _signed(line["retention_bytes"]),
            **read_one(memory, layout, "TopicOrderLine", "topic_order", number),
            **reclaim,
            "brokers": [_inspect_offsets(memory, layout, number, b) for b in range(layout.numbers["broker_count"])],
        }


def _inspect_offsets(memory: Memory, layout: Layout, topic: int, broker: int) -> dict[str, Any]:
    """One offset entry of a TInode: what a broker delegated, what the sequencer did with it, and its replicas."""
    replicas = read_indexed(memory, layout, "ReplicaLine", "replica", layout.numbers["broker_count"], topic, broker)
    return {
        "broker": broker,
        **read_one(memory, layout, "OffsetBrokerLine", "offset_broker", topic, broker),
        **read_one(memory, layout, "OffsetSequencerLine", "offset_sequencer", topic, broker),
        "replicas": [{"replica": number, **decoded(row)} for number, row in enumerate(replicas)
                     if any(decoded(row).values())],
    }


def _inspect_sessions(memory: Memory, layout: Layout) -> list[dict[str, Any]]:
    count = layout.numbers["session_count_max"]
    lines = read_indexed(memory, layout, "SessionLine", "session", count)
    progress = read_indexed(memory, layout, "SessionProgressLine", "session_progress", count)
    found = []
    for number in numpy.nonzero(lines["state"])[0].tolist():
        line, seen = decoded(lines[number]), decoded(progress[number])
        seen["sequencer_generation"], seen["sequencer_state"] = _versioned(SessionState, seen.pop("state"))
        generation, state = _versioned(SessionState, line.pop("state"))
        found.append({"session": number, "generation": generation, "state": state, **line, **seen,
                      "topic": line["topic"] & 0xFFFF, "topic_generation": line["topic"] >> 16})
    return found


def _inspect_cursors(memory: Memory, layout: Layout) -> list[dict[str, Any]]:
    count = layout.numbers["cursor_count_max"]
    lines = read_indexed(memory, layout, "CursorLine", "cursor", count)
    found = []
    for number in numpy.nonzero(lines["state"] & 0xFF)[0].tolist():
        line = decoded(lines[number])
        request, state = _versioned(CursorState, line.pop("state"))
        grant = read_one(memory, layout, "CursorGrantLine", "cursor_grant", number)
        found.append({"cursor": number, "request": request, "state": state, **line,
                      "name": read_one(memory, layout, "CursorName", "cursor_name", number)["text"],
                      "granted": grant["granted"], "granted_index": grant["index"],
                      "topic": line["topic"] & 0xFFFF, "topic_generation": line["topic"] >> 16})
    return found


def _inspect_attached(memory: Memory, layout: Layout) -> list[dict[str, Any]]:
    """Slots of attached clients that are in use: at which broker, whose, and how many leases they hold."""
    found = []
    for number in range(layout.numbers["attach_slot_count"]):
        line, client = (read_one(memory, layout, record, place, number) for record, place in (
            ("AttachLine", "attach_line"), ("AttachClientLine", "attach_client")))
        generation, state = _versioned(AttachState, line["state"])
        if state in ("open", "fenced"):
            found.append({"slot": number, "broker": number // layout.numbers["attach_per_broker"], "state": state,
                          "generation": generation, "pid": client["pid"], "topic": line["topic"] & 0xFFFF,
                          "session": line["session_slot"], "client_id": line["client_id"],
                          "leases": line["granted"] - client["retired"]})
    return found


def _inspect_groups(memory: Memory, layout: Layout, topics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The consumer groups of the topics that are there; `topic` is a name."""
    count = layout.numbers["group_count_max"]
    lines = read_indexed(memory, layout, "GroupLine", "group", count)
    names = {each["generation"] << 16 | each["topic"]: each for each in topics}
    found = []
    for number in numpy.nonzero(lines["state"] & 0xFF)[0].tolist():
        line = decoded(lines[number])
        topic = names.get(line.pop("topic"))
        if topic is None:
            continue
        version, state = _versioned(GroupState, line.pop("state"))
        name = read_one(memory, layout, "GroupName", "group_name", number)["text"]
        found.append({"group": name, "topic": topic["name"], "state": state, "version": version, **line,
                      "lag": _lag(memory, layout, topic, line["position"]),
                      "holder": read_one(memory, layout, "GroupHolder", "group_holder", number)["text"]})
    return found


def _lag(memory: Memory, layout: Layout, topic: dict[str, Any], position: int) -> int:
    """What can be read from a position on."""
    end = topic["committed_position"]
    entries = read_indexed(memory, layout, "OrderEntry", "order_entry", layout.numbers["order_entry_count"],
                           topic["topic"])
    return max(0, end - position - lost_from(position, topic["reclaimed_position"], end, entries.tobytes(),
                                             topic["generation"]))


def _inspect_pool(memory: Memory, layout: Layout, topics: list[dict[str, Any]]) -> dict[str, Any]:
    """Usage from the bitmaps, owners from the segment table, and what keeps each topic's oldest data."""
    numbers = layout.numbers
    used, warm = _count_bits(memory, layout, "bitmap"), _count_bits(memory, layout, "warm_bitmap")
    owners = read_indexed(memory, layout, "SegmentLine", "segment_line", numbers["segment_count"])["owner"]
    values, counts = numpy.unique(owners[owners != 0], return_counts=True)
    return {
        "strategy": layout.pool_strategy, "segment_bytes": numbers["segment_bytes"],
        "segments": numbers["segment_count"], "used": used, "free": numbers["segment_count"] - used, "warm": warm,
        "owners": [{"broker": (owner & 0xFFFF) - 1, "topic": owner >> 16 & 0xFFFF, "generation": owner >> 32,
                    "segments": count} for owner, count in zip(values.tolist(), counts.tolist(), strict=True)],
        "holders": [{"topic": topic["name"], "holder": topic["holder"], "holder_index": topic["holder_index"]}
                    for topic in topics],
    }


def _count_bits(memory: Memory, layout: Layout, place: str) -> int:
    offset = layout.offset_of(place)
    nbytes = layout.offset_of("warm_bitmap") - layout.offset_of("bitmap")
    memory.invalidate_range(offset, nbytes)
    return int.from_bytes(memory.read_bytes(offset, nbytes), "little").bit_count()


def _versioned(kind: Any, word: int) -> tuple[int, str]:
    return word >> 8, _state_name(kind, word & 0xFF)


def _holder_of(holders: Holders, topic: dict[str, Any]) -> str:
    """Who holds the topic's oldest data now; also of a region that is damaged."""
    if topic["state"] != "active":
        return "nobody"
    try:
        return holders.of(topic["topic"]).text
    except (LookupError, ValueError, OverflowError) as error:
        return f"damaged ({error})"


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
