"""What the coherence checker has to know of the layout, and what its reports say to people.

    layout ──► class of every line: its record, who may store to it, whether it is polled ──► checker
    checker ──► offsets, roles, places in code ──► "which line, who wrote it where, who read it where, what is missing"
"""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from broker.errors import CxlmqError
from broker.layout import RECORDS, Layout
from broker.records import record_bytes
from sim.cxl.checker import AGENTS_MAX, ClassFlag, Kind
from sim.cxl.memory import Role

ROOT = Path(__file__).resolve().parent.parent
LINE_BYTES = 64
_ROLES = {role.name.removeprefix("ROLE_").lower(): int(role) for role in Role if role.name != "ROLE_COUNT"}


@dataclass(frozen=True)
class Owned:
    """A record: where it lies, the roles of the host that may store to it, and whether its readers poll it.

    Several roles of one broker may write one line: within a host caches are coherent. Whoever creates or wipes a
    record (admin) hands it over before it is used. A record that is not polled is read because another line said so.
    """

    record: str
    place: str
    indexes: tuple[str, ...]
    roles: str
    polled: bool = True
    nbytes: int = 0                 # where the place holds less than the record


OWNED = (
    Owned("Superblock", "superblock", (), "", False),
    Owned("HeadLine", "head", (), "sequencer"),
    Owned("DirectoryLine", "directory", (), ""),
    Owned("BrokerLine", "broker", ("broker",), "broker"),
    Owned("BrokerAddress", "broker_address", ("broker",), "broker", False),
    Owned("ActivityLine", "broker_activity", ("broker",), "delegation"),
    Owned("PoolWishLine", "pool_wish", ("broker",), "receiver reclaim broker"),
    Owned("PoolGrantLine", "pool_grant", ("broker",), "sequencer"),
    Owned("ReclaimAnswerLine", "reclaim_answer", ("broker",), "reclaim"),
    Owned("TopicLine", "topic", ("topic",), "", False),
    Owned("TopicName", "topic_name", ("topic",), "", False),
    Owned("TopicOrderLine", "topic_order", ("topic",), "sequencer"),
    Owned("TopicReclaimLine", "topic_reclaim", ("topic",), "reclaim"),
    Owned("OffsetBrokerLine", "offset_broker", ("topic", "broker"), "delegation receiver reclaim"),
    Owned("OffsetSequencerLine", "offset_sequencer", ("topic", "broker"), "sequencer"),
    Owned("ReplicaLine", "replica", ("topic", "broker", "replica"), "replication"),
    Owned("BatchHeader", "ring", ("topic", "broker", "slot"), "receiver delegation", False),
    Owned("BatchResult", "result", ("topic", "broker", "slot"), "sequencer"),
    Owned("OrderEntry", "order_entry", ("topic", "index"), "sequencer", False),
    Owned("SessionLine", "session", ("session",), "broker", False),
    Owned("SessionProgressLine", "session_progress", ("session",), "sequencer"),
    Owned("SessionWindowLine", "session_window", ("session",), "sequencer", False),
    Owned("CursorLine", "cursor", ("cursor",), "delivery receiver", False),
    Owned("CursorGrantLine", "cursor_grant", ("cursor",), "reclaim"),
    Owned("CursorName", "cursor_name", ("cursor",), "delivery"),
    Owned("GroupLine", "group", ("group",), ""),
    Owned("GroupName", "group_name", ("group",), ""),
    Owned("GroupHolder", "group_holder", ("group",), ""),
    Owned("AttachLine", "attach_line", ("attached client",), "receiver"),
    Owned("Lease", "attach_lease", ("attached client", "lease"), "receiver", False),
    Owned("BatchResult", "attach_completion", ("attached client", "completion"), "ack"),
    Owned("AttachClientLine", "attach_client", ("attached client",), "client receiver"),
    Owned("Descriptor", "attach_descriptor", ("attached client", "descriptor"), "client"),
    Owned("SegmentLine", "segment_line", ("segment",), "receiver reclaim"),
)
_COUNTS = {"broker": "broker_count", "replica": "broker_count", "topic": "topic_count_max", "slot": "ring_slot_count",
           "index": "order_entry_count", "session": "session_count_max", "cursor": "cursor_count_max",
           "group": "group_count_max", "attached client": "attach_slot_count", "segment": "segment_count"}
_FIXED_COUNTS = {"lease": 16, "completion": 64, "descriptor": 64}

# Frontiers and what they pass: (record of the frontier, its place, place of what lies below its first word).
COVERS = (("OffsetBrokerLine", "offset_broker", "ring"), ("TopicOrderLine", "topic_order", "order_entry"))

# What is not looked at: words that atomics change, counters, and what is judged by the line that announces it.
UNWATCHED = {
    "ControlLine": "whoever becomes head", "BankLine": "whoever takes the bank", "LockLine": "who shares it",
    "DoorbellLine": "whoever rings", "PoolRing": "sequencer (grants), broker (returns)", "BrokerCounters": "broker",
    "SequencerCounters": "sequencer", "AccessStatistics": "the role that counts",
}


def _writers() -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for owned in OWNED:
        found.setdefault(owned.record, []).extend(owned.roles.split() or ["admin"])
    return {record: ", ".join(roles) for record, roles in found.items()} | UNWATCHED


WRITERS = _writers()                # record -> the roles of one host that store to it, for people

MISSING = {
    Kind.KIND_UNFLUSHED: ("read of data that its writer published and did not flush",
                          "a flush of this line by the writer, before the fence that publishes it"),
    Kind.KIND_UNFENCED: ("read of data that its writer flushed and did not fence",
                         "a fence by the writer, between the flush or bulk copy and the store that publishes it"),
    Kind.KIND_NO_INVALIDATE: ("read of an old copy after the data was published",
                              "an invalidate by the reader, between learning of it and reading it"),
    Kind.KIND_WRONG_ROLE: ("store by a role that does not own the line",
                           "nothing: move the word into a line of this role, or declare the hand-over (OWNED)"),
    Kind.KIND_LOST_UPDATE: ("two hosts write one line: the late write-back takes the other's bytes back",
                            "a hand-over: the earlier owner's fence before the later owner's first store"),
    Kind.KIND_OWN_DIRTY: ("invalidate of a line that the same thread has stored to and not flushed",
                          "a flush and a fence before the invalidate, or an invalidate before the store"),
    Kind.KIND_WRONG_FLUSH: ("the wrong line was flushed", "a flush of this line instead of, or besides, the other"),
    Kind.KIND_STRANDED: ("a line that a peer polls stays dirty, and its writer does no more",
                         "a flush and a fence at the end of the writer's step"),
    Kind.KIND_TORN: ("a record of several lines was read half old and half new",
                     "the data of all its lines before its commit word, each flushed and fenced"),
    Kind.KIND_ATOMIC: ("atomic access to a line outside the coherent area",
                       "a pool that needs no atomics (partitioned, leader), or coherent memory for this word"),
    Kind.KIND_PUBLISHED: ("a frontier passed data that its writer had not flushed and fenced",
                          "a flush of this line and a fence, both before the store that moves the frontier"),
    Kind.KIND_BYPASS: ("the line changed in memory and nobody wrote it back: somebody goes around the door",
                       "access by Memory alone"),
}


# ---- classes of lines -----------------------------------------------------------------------------------------------


class LineMap:
    """Which record lies where, for one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._places = [(owned, *self._dimensions(owned)) for owned in OWNED]

    def _dimensions(self, owned: Owned) -> tuple[int, list[tuple[int, int]], int]:
        """(first offset, (stride, count) of each index, bytes) of a record."""
        zero = [0] * len(owned.indexes)
        first = self.layout.offset_of(owned.place, *zero)
        numbers, dimensions = self.layout.numbers, []
        if first >= numbers["head"]:            # what a head writes is there once for each bank
            dimensions.append((numbers["bank_stride"], numbers["bank_count"]))
        for number, name in enumerate(owned.indexes):
            one = [*zero[:number], 1, *zero[number + 1:]]
            count = _FIXED_COUNTS.get(name) or self.layout.numbers[_COUNTS[name]]
            dimensions.append((self.layout.offset_of(owned.place, *one) - first, int(count)))
        return first, dimensions, record_bytes(owned.record)

    def classes(self) -> tuple[bytearray, list[tuple[str, int, int]]]:
        """A byte for every line, and the table that these bytes are numbers of; class 0 is not looked at."""
        lines = bytearray(self.layout.numbers["segments"] // LINE_BYTES)
        table = [("", 0xFFFF, int(ClassFlag.CLASS_IGNORED))]
        for owned, first, dimensions, nbytes in self._places:
            mask = 1 << _ROLES["admin"]
            for role in owned.roles.split():
                mask |= 1 << _ROLES[role]
            flags = 0 if owned.polled else int(ClassFlag.CLASS_REACHED)
            table.append((owned.record, mask, flags))
            head = len(table) - 1
            if nbytes > LINE_BYTES:
                table.append((owned.record, mask, flags | int(ClassFlag.CLASS_CONTINUES)))
            for steps in itertools.product(*(range(count) for _, count in dimensions[:-1])):
                start = first + sum(step * stride for step, (stride, _) in zip(steps, dimensions, strict=False))
                stride, count = dimensions[-1] if dimensions else (LINE_BYTES, 1)
                _mark(lines, start, max(stride, 16), count, nbytes, head)
        return lines, table

    def rules(self) -> dict[str, Any]:
        """What else `Checker` takes: which frontiers pass which lines, and where it stands who is head."""
        return {"covers": self._covers(), "head": (int(self.layout.offset_of("control")), _ROLES["sequencer"])}

    def _covers(self) -> list[tuple[str, int, list[int], int, list[int], int, int]]:
        places, found = {owned.place: (first, dimensions) for owned, first, dimensions, _ in self._places}, []
        for record, frontier, place in COVERS:
            (first, indexes), (covered, dimensions) = places[frontier], places[place]
            *others, (ring_stride, ring_count) = dimensions
            found.append((record, first, [stride for stride, _ in indexes], covered, [stride for stride, _ in others],
                          ring_stride, ring_count))
        return found

    def describe(self, offset: int) -> str:
        """The record, field and indexes at an offset, for people."""
        for owned, first, dimensions, nbytes in self._places:
            rest, found = offset - first, []
            for stride, count in dimensions:
                index = min(rest // stride, count - 1) if rest >= 0 and stride else 0
                found.append(index)
                rest -= index * stride
            if 0 <= rest < max(nbytes, LINE_BYTES if nbytes >= LINE_BYTES else nbytes):
                names = owned.indexes if len(found) == len(owned.indexes) else ("bank", *owned.indexes)
                where = ", ".join(f"{name} {index}" for name, index in zip(names, found, strict=True))
                field = next((name for name, letter, count, at in reversed(RECORDS[owned.record]) if at <= rest), "")
                return f"{owned.record}.{field}" + (f" of {where}" if where else "")
        numbers = self.layout.numbers
        if offset >= numbers["segments"]:
            return f"payload in segment {(offset - numbers['segments']) // numbers['segment_bytes']}"
        section = next((name for name, start, count in self.layout.sections if start <= offset < start + count), "?")
        return f"a line of the section {section}"


def _mark(lines: bytearray, start: int, stride: int, count: int, nbytes: int, head: int) -> None:
    """Give `count` records their class; what follows the first line of each is of the next class."""
    span = (nbytes + LINE_BYTES - 1) // LINE_BYTES
    if stride <= LINE_BYTES:                    # lines of them, several to a line or one a line
        first, last = start // LINE_BYTES, (start + stride * count - 1) // LINE_BYTES
        lines[first:last + 1] = bytes([head]) * (last + 1 - first)
        return
    for number in range(count):
        line = (start + number * stride) // LINE_BYTES
        lines[line] = head
        lines[line + 1:line + span] = bytes([head + 1]) * (span - 1)


# ---- reports --------------------------------------------------------------------------------------------------------


def resolve(sites: Iterable[str]) -> dict[str, str]:
    """Places in the code for people: native ones by addr2line where it is installed, by their module where not."""
    wanted: dict[str, list[str]] = {}
    found = {}
    for site in set(sites):
        module, _, offset = site.rpartition("+")
        if module.endswith(".so"):
            wanted.setdefault(module, []).append(offset)
        found[site] = _short(site) or "an unknown place"
    tool = shutil.which("addr2line")
    for module, offsets in wanted.items() if tool else ():
        addresses = [hex(int(offset, 16) - 1) for offset in offsets]       # the call lies before where it returns to
        answer = subprocess.run([str(tool), "-e", module, *addresses], capture_output=True, text=True, check=False)
        for offset, line in zip(offsets, answer.stdout.splitlines(), strict=False):
            if not line.startswith("?"):
                found[f"{module}+{offset}"] = _short(re.sub(r" \(discriminator.*", "", line))
    return found


def _short(place: str) -> str:
    return place.replace(f"{ROOT}/", "")


@cache
def _role_names() -> dict[int, str]:
    return {number: name for name, number in _ROLES.items()}


def explain(found: list[dict[str, Any]], wasted: list[dict[str, Any]], layout: Layout,
            prices: tuple[float, float] | None = None, unwatched: int = 0) -> dict[str, Any]:
    """The checker's findings with lines, roles and places named; `prices` are ns of a flush and of a fence, `unwatched`
    counts the threads that it could not follow."""
    lines = LineMap(layout)
    places = resolve([each[side]["site"] for each in found for side in ("writer", "reader")]
                     + [each["other_site"] for each in found] + [each["site"] for each in wasted])

    def side(each: dict[str, Any]) -> dict[str, Any] | None:
        if not each["site"]:
            return None
        return {"host": each["host"], "role": _role_names().get(each["role"], "?"), "place": places[each["site"]]}

    reports = []
    for each in found:
        what, missing = MISSING[Kind(each["kind"])]
        report = {"kind": Kind(each["kind"]).name.removeprefix("KIND_").lower(), "what": what, "missing": missing,
                  "count": each["count"], "line": lines.describe(each["offset"]), "offset": each["offset"],
                  "writer": side(each["writer"]), "reader": side(each["reader"]), "cause": ""}
        if each["kind"] == Kind.KIND_PUBLISHED:
            report["cause"] = f"passed by {lines.describe(each['other_offset'])}"
        elif each["other_offset"] and each["kind"] in (Kind.KIND_WRONG_FLUSH, Kind.KIND_STRANDED):
            report["cause"] = (f"flushed {lines.describe(each['other_offset'])} at {places[each['other_site']]}, "
                               f"dirtied {report['line']}")
        reports.append(report)
    table = [{"place": places[each["site"]], "flushes": each["flushes"], "fences": each["fences"],
              "ns": None if prices is None else each["flushes"] * prices[0] + each["fences"] * prices[1]}
             for each in wasted]
    table.sort(key=lambda each: -(each["flushes"] + each["fences"]))
    return {"reports": reports, "redundant": table, "unwatched_threads": unwatched}


def report_text(report: dict[str, Any], redundant_max: int = 12) -> str:
    """An explained report as people read it."""
    out = []
    for each in report["reports"]:
        out.append(f"coherence: {each['what']} ({each['kind']}, {each['count']} times)")
        out.append(f"  line     {each['line']}, region offset {each['offset']}")
        second = "passed" if each["kind"] == "published" else "accessed"
        for label, who in (("written", each["writer"]), (second, each["reader"])):
            if who is not None:
                out.append(f"  {label:8} by host {who['host']}, role {who['role']}, at {who['place']}")
        out.append(f"  missing  {each['missing']}")
        if each["cause"]:
            out.append(f"  likely   {each['cause']}")
    count = len(report["reports"])
    out.append(f"coherence: {count} findings" if count else "coherence: nothing found")
    if report.get("unwatched_threads"):
        out.append(f"coherence: {report['unwatched_threads']} threads were not watched, the last ones to come: one run "
                   f"can tell {AGENTS_MAX} apart; take fewer brokers, scanners or attached clients")
    if report["redundant"]:
        out.append("redundant flushes and fences, by place:")
        for each in report["redundant"][:redundant_max]:
            price = "" if each["ns"] is None else f"{each['ns']:12,.0f} ns"
            out.append(f"  {each['flushes']:9,} flushes {each['fences']:9,} fences {price}  {each['place']}")
    return "\n".join(out)


class CoherenceBroken(CxlmqError):
    """The checker found mistakes; details: count, path (the whole report)."""

    code = "coherence"
    status = "FAILED_PRECONDITION"
    template = "the coherence checker found {count} mistakes; the report is {path}"


def load(path: Path) -> dict[str, Any] | None:
    """A report that was kept, None when there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except OSError:
        return None


def save(report: dict[str, Any], path: Path) -> None:
    """Keep an explained report as JSON."""
    path.write_text(json.dumps(report, indent=1))
