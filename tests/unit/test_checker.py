"""The checker names each kind of mistake when it is planted, and is silent without it."""

import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from broker.coherence import explain, report_text
from broker.layout import Layout
from sim.cluster.hardware import CheckedHardware
from sim.cxl.checker import AGENTS_MAX, Checker, ClassFlag, Kind
from sim.cxl.host import Device, HostCache
from sim.cxl.memory import MappedMemory, MemoryFault, Role
from sim.cxl.noncoherent import NonCoherentMemory

DATA, FLAG, PAIR, OWNED, OTHER, COHERENT = 64, 128, 256, 512, 576, 640
FRONTIER, RING, RING_LINES = 1024, 2048, 4
PAYLOAD = 4096
REACHED, CONTINUES = int(ClassFlag.CLASS_REACHED), int(ClassFlag.CLASS_CONTINUES)
# Polled, reached, first and second line of a reached record of two lines, owned by role 4, a frontier over a ring.
TABLE = [("flag", 0xFFFF, 0), ("data", 0xFFFF, REACHED), ("pair", 0xFFFF, REACHED),
         ("pair", 0xFFFF, REACHED | CONTINUES), ("owned", 1 << 4, 0), ("frontier", 0xFFFF, 0)]
COVERS = [("frontier", FRONTIER, [], RING, [], 64, RING_LINES)]


class Bench:
    """A writer and a reader on different hosts, both checked."""

    def __init__(self) -> None:
        classes = bytearray(PAYLOAD // 64)
        classes[DATA // 64] = 1
        classes[PAIR // 64], classes[PAIR // 64 + 1] = 2, 3
        classes[OWNED // 64] = 4
        classes[FRONTIER // 64] = 5
        self.mapping = bytearray(3 * PAYLOAD)
        self.device = Device(self.mapping, PAYLOAD, coherent=[(COHERENT, 64)])
        self.checker = Checker(self.device, classes, TABLE, covers=COVERS)
        hosts = [HostCache(self.device, f"host {n}", observer=self.checker, number=n) for n in range(2)]
        self.writer = NonCoherentMemory(hosts[0], Role.ROLE_DELEGATION)
        self.reader = NonCoherentMemory(hosts[1], Role.ROLE_SEQUENCER)

    def put(self, offset: int, flush: bool = True, fence: bool = True, value: int = 1) -> None:
        """Store a word, and publish it unless told otherwise."""
        self.writer.store_word(offset, value)
        if flush:
            self.writer.flush_range(offset, 8)
        if fence:
            self.writer.store_fence()

    def get(self, offset: int, invalidate: bool = True) -> int:
        """Load a word as a reader does."""
        if invalidate:
            self.reader.invalidate_range(offset, 8)
        return self.reader.load_word(offset)

    def kinds(self) -> list[Kind]:
        """What was found."""
        return [Kind(each["kind"]) for each in self.checker.reports()]


def test_lines_of_a_host_that_is_gone_are_looked_at_and_nothing_else() -> None:
    # A broker that makes the region is a host of its own while it does, and another one from then on.
    bench = Bench()
    bench.put(FLAG, flush=False, fence=False)
    bench.get(FLAG)
    del bench.writer
    others = [HostCache(bench.device, f"host {n}") for n in range(3)]
    assert bench.checker.find_stranded(0) == 1, "what it stored and never flushed, found in memory that is still its own"
    del others                          # they lived until here


def correct(bench: Bench) -> None:
    bench.put(DATA)
    bench.put(FLAG)
    assert bench.get(FLAG) == 1 and bench.get(DATA) == 1


def unflushed(bench: Bench) -> None:
    bench.put(DATA, flush=False)
    bench.put(FLAG)
    bench.get(FLAG)
    bench.get(DATA)


def unfenced(bench: Bench) -> None:
    bench.writer.agent, other = 1, bench.writer.with_role(Role.ROLE_ACK)
    other.agent = 2
    bench.put(DATA, fence=False)
    other.load_word(DATA)               # the other thread of the host knows of it, and tells
    other.store_word(FLAG, 1)
    other.flush_range(FLAG, 8)
    other.store_fence()
    bench.get(FLAG)
    bench.get(DATA)


def payload_unfenced(bench: Bench) -> None:
    bench.writer.agent, other = 1, bench.writer.with_role(Role.ROLE_ACK)
    other.agent = 2
    bench.writer.write_bytes(PAYLOAD, b"x" * 256)
    bench.writer.store_word(DATA, 1)
    other.load_word(DATA)
    other.flush_range(DATA, 8)
    other.store_fence()
    bench.get(DATA)
    bench.reader.read_bytes(PAYLOAD, 256)


def stale(bench: Bench) -> None:
    bench.get(DATA)
    correct_without_reading(bench)
    bench.get(FLAG)
    bench.get(DATA, invalidate=False)


def stale_payload(bench: Bench) -> None:
    bench.reader.read_bytes(PAYLOAD, 64)
    bench.writer.write_bytes(PAYLOAD, b"x" * 64)
    bench.writer.store_fence()
    bench.put(FLAG)
    bench.get(FLAG)
    bench.reader.read_bytes(PAYLOAD, 64)


def correct_without_reading(bench: Bench) -> None:
    bench.put(DATA)
    bench.put(FLAG)


def polled_for_ever(bench: Bench) -> None:
    bench.get(FLAG)
    bench.put(FLAG)
    for _ in range(5000):
        bench.get(FLAG, invalidate=False)


def polled_by_a_stage(bench: Bench) -> None:
    bench.get(FLAG)
    bench.put(FLAG)
    for _ in range(40):                 # as often as a stage comes to run in some ms
        bench.get(FLAG, invalidate=False)


def wrong_role(bench: Bench) -> None:
    bench.put(OWNED)


def two_writers(bench: Bench) -> None:
    bench.put(OTHER, flush=False, fence=False)
    bench.reader.store_word(OTHER + 8, 1)


def late_write_back(bench: Bench) -> None:
    bench.writer.load_word(OTHER)
    bench.reader.store_word(OTHER + 8, 1)
    bench.reader.flush_range(OTHER, 8)
    bench.reader.store_fence()
    bench.put(OTHER)                    # of the copy from before


def own_dirty(bench: Bench) -> None:
    bench.put(OTHER, flush=False, fence=False)
    bench.writer.invalidate_range(OTHER, 8)


def wrong_flush(bench: Bench) -> None:
    bench.writer.store_word(DATA, 1)
    bench.writer.flush_range(OTHER, 8)
    bench.writer.store_fence()
    bench.put(FLAG)
    bench.get(FLAG)
    bench.get(DATA)


def published_unflushed(bench: Bench) -> None:
    """The frontier passes two lines, of which the first never got to memory; nobody has read it yet."""
    bench.put(RING, flush=False, fence=False)
    bench.put(RING + 64)
    bench.put(FRONTIER, value=2)


def published_unfenced(bench: Bench) -> None:
    bench.put(RING, fence=False)
    bench.writer.store_word(FRONTIER, 1)


def published_after_a_lap(bench: Bench) -> None:
    for number in range(6):
        bench.put(RING + 64 * (number % RING_LINES), value=number, fence=number != 5)
        bench.put(FRONTIER, value=number + 1)


def wrong_flush_in_a_ring(bench: Bench) -> None:
    bench.writer.store_word(RING, 1)
    bench.writer.flush_range(RING + 64, 8)
    bench.writer.store_fence()
    bench.put(FRONTIER)


def stranded(bench: Bench) -> None:
    bench.put(FLAG, flush=False)
    bench.get(FLAG)
    assert bench.checker.find_stranded() == 0, "its writer may be about to flush it"
    assert bench.checker.find_stranded(0) == 1


def torn(bench: Bench) -> None:
    """The second line is stored, the first tells of it, and only the first gets to memory."""
    bench.put(PAIR + 64, flush=False, fence=False)
    bench.put(PAIR)
    bench.reader.invalidate_range(PAIR, 128)
    bench.reader.read_bytes(PAIR, 128)


def atomic_outside(bench: Bench) -> None:
    with pytest.raises(MemoryFault):
        bench.writer.fetch_add_word(OTHER, 1)


def around_the_door(bench: Bench) -> None:
    bench.put(OTHER)
    MappedMemory(bench.mapping).store_word(OTHER, 99)
    bench.get(OTHER)


PLANTED: list[tuple[Callable[[Bench], None], Kind]] = [
    (unflushed, Kind.KIND_UNFLUSHED), (unfenced, Kind.KIND_UNFENCED), (payload_unfenced, Kind.KIND_UNFENCED),
    (stale, Kind.KIND_NO_INVALIDATE), (stale_payload, Kind.KIND_NO_INVALIDATE),
    (polled_for_ever, Kind.KIND_NO_INVALIDATE), (wrong_role, Kind.KIND_WRONG_ROLE),
    (two_writers, Kind.KIND_LOST_UPDATE), (late_write_back, Kind.KIND_LOST_UPDATE), (own_dirty, Kind.KIND_OWN_DIRTY),
    (published_unflushed, Kind.KIND_PUBLISHED), (published_unfenced, Kind.KIND_PUBLISHED),
    (published_after_a_lap, Kind.KIND_PUBLISHED), (wrong_flush_in_a_ring, Kind.KIND_WRONG_FLUSH),
    (polled_by_a_stage, Kind.KIND_NO_INVALIDATE),
    (wrong_flush, Kind.KIND_WRONG_FLUSH), (stranded, Kind.KIND_STRANDED), (torn, Kind.KIND_TORN),
    (atomic_outside, Kind.KIND_ATOMIC), (around_the_door, Kind.KIND_BYPASS),
]


@pytest.mark.parametrize(("mistake", "kind"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_mistake_is_named_once(mistake: Callable[[Bench], None], kind: Kind) -> None:
    bench = Bench()
    mistake(bench)
    assert set(bench.kinds()) == {kind}
    report = bench.checker.reports()[0]
    if kind not in (Kind.KIND_ATOMIC, Kind.KIND_BYPASS):
        assert "tests/unit/test_checker.py" in report["writer"]["site"] + report["reader"]["site"]


def test_every_kind_has_a_planted_mistake() -> None:
    assert {kind for _, kind in PLANTED} == set(Kind)


def ring(bench: Bench) -> None:
    """Many rounds of data and flag, the reader polling in between, as stages do."""
    for round_number in range(1, 200):
        bench.put(DATA, fence=False, value=round_number)
        bench.get(FLAG)                 # an old flag is no mistake
        bench.writer.store_fence()
        bench.put(FLAG, fence=False, value=round_number)
        bench.get(FLAG)
        bench.writer.store_fence()
        assert bench.get(FLAG) == round_number
        assert bench.get(DATA) == round_number


def frontiers(bench: Bench) -> None:
    """What lies at and beyond the frontier may be dirty, and what went back is no publication."""
    for number in range(20):
        bench.put(RING + 64 * (number % RING_LINES), value=number + 1)
        bench.put(RING + 64 * ((number + 1) % RING_LINES), value=number + 2, flush=False, fence=False)
        bench.put(FRONTIER, value=number + 1)
        assert bench.get(FRONTIER) == number + 1
        assert bench.get(RING + 64 * (number % RING_LINES)) == number + 1
    bench.put(FRONTIER, value=0)


def words_of_an_old_copy(bench: Bench) -> None:
    bench.get(FLAG)
    bench.put(FLAG)
    for word in range(16):              # a snapshot of the whole line, looked at twice
        bench.reader.load_word(FLAG + word % 8 * 8)


def pairs(bench: Bench) -> None:
    for value in range(1, 100):
        bench.writer.write_bytes(PAIR, bytes([value]) * 128)
        bench.writer.store_fence()
        bench.put(FLAG, value=value)
        assert bench.get(FLAG) == value
        bench.reader.invalidate_range(PAIR, 128)
        assert bench.reader.read_bytes(PAIR, 128) == bytes([value]) * 128


def payloads(bench: Bench) -> None:
    for value in range(1, 100):
        bench.writer.write_bytes(PAYLOAD + 64 * value, bytes([value]) * 100)
        bench.writer.store_fence()
        bench.put(FLAG, value=value)
        assert bench.get(FLAG) == value
        bench.reader.invalidate_range(PAYLOAD + 64 * value, 100)
        assert bench.reader.read_bytes(PAYLOAD + 64 * value, 100) == bytes([value]) * 100


def handed_over(bench: Bench) -> None:
    """Another host wipes a line that we still have; we write it whole, and read what we wrote."""
    bench.get(DATA)
    bench.put(DATA)
    bench.put(FLAG)
    bench.get(FLAG)
    bench.reader.write_line_bytes(DATA, bytes(64))
    assert bench.reader.load_word(DATA) == 0
    bench.reader.flush_range(DATA, 64)
    bench.reader.store_fence()


def coherent(bench: Bench) -> None:
    bench.writer.fetch_add_word(COHERENT, 1)
    assert bench.reader.load_word(COHERENT) == 1


@pytest.mark.parametrize("use", [correct, ring, frontiers, words_of_an_old_copy, pairs, payloads, handed_over, coherent],
                         ids=lambda each: each.__name__)
def test_correct_code_is_not_reported(use: Callable[[Bench], None]) -> None:
    bench = Bench()
    use(bench)
    assert bench.checker.find_stranded(0) == 0
    assert bench.kinds() == []


REGION = {"broker_count": 3, "topic_count_max": 2, "ring_slot_count": 16, "order_entry_count": 16, "session_count_max": 3,
          "cursor_count_max": 3, "attach_slot_count": 0, "segment_bytes": 4096, "message_bytes_max": 4096,
          "batch_bytes_max": 8192, "region_bytes": 1 << 20, "pool_strategy": "atomic"}


def dirty_and_pass(layout: Layout, frontier: int, role: Role, covered: int, index: int) -> list[dict[str, Any]]:
    """Store a line, flush nothing, and store a frontier over it: what the product's own checker says."""
    hardware = CheckedHardware(layout, 2, Random(1), evict=False)
    door = hardware.door(0, int(role))
    hardware.truth.store_word(frontier, index)
    door.store_word(covered, 7)
    door.store_word(frontier, index + 1)
    return list(explain(hardware.checker.reports(), [], layout)["reports"])


@pytest.mark.parametrize("index", [0, 5, 21])
def test_each_frontier_finds_what_it_passes(index: int) -> None:
    layout = Layout.compute(**REGION)
    numbers = layout.numbers
    for topic, broker in itertools.product(range(2), range(3)):
        report, = dirty_and_pass(layout, layout.offset_of("offset_broker", topic, broker), Role.ROLE_DELEGATION,
                                 layout.offset_of("ring", topic, broker, index % 16), index)
        assert report["kind"] == "published"
        assert report["line"] == f"BatchHeader.complete of topic {topic}, broker {broker}, slot {index % 16}"
        assert report["cause"] == f"passed by OffsetBrokerLine.delegated of topic {topic}, broker {broker}"
        assert (report["writer"]["role"], report["reader"]["role"]) == ("delegation", "delegation")
    for topic, bank in itertools.product(range(2), range(numbers["bank_count"])):
        base = bank * numbers["bank_stride"]
        report, = dirty_and_pass(layout, base + layout.offset_of("topic_order", topic), Role.ROLE_SEQUENCER,
                                 base + layout.offset_of("order_entry", topic, index % 16), index)
        assert report["line"] == f"OrderEntry.commit of bank {bank}, topic {topic}, index {index % 16}"


@pytest.mark.parametrize("head", [0, 1])
def test_what_a_replaced_head_reads_is_not_judged(head: int) -> None:
    # It holds a header from its own time, whose slot others have filled anew since: it was stopped, and does not know.
    layout = Layout.compute(**REGION)
    hardware = CheckedHardware(layout, 2, Random(1), evict=False)
    broker, scanner = hardware.door(1, int(Role.ROLE_DELEGATION)), hardware.door(0, int(Role.ROLE_SEQUENCER))
    header, frontier = layout.offset_of("ring", 0, 1, 0), layout.offset_of("offset_broker", 0, 1)
    hardware.truth.store_word(layout.offset_of("control"), head)
    for lap in (1, 2):
        for offset in (header, frontier):
            broker.store_word(offset, lap)
            broker.flush_range(offset, 64)
            broker.store_fence()
        scanner.invalidate_range(frontier, 64)
        assert scanner.load_word(frontier) == lap
        assert scanner.load_word(header) == 1
    assert [each["kind"] for each in hardware.checker.reports()] == [Kind.KIND_NO_INVALIDATE] * (head == 0)


def test_flushes_and_fences_in_vain_are_counted_by_place() -> None:
    bench = Bench()
    bench.writer.flush_range(DATA, 8)
    bench.writer.store_fence()
    wasted = bench.checker.wasted()
    assert [(each["flushes"], each["fences"]) for each in wasted] == [(1, 0), (0, 1)]
    assert all("test_checker.py" in each["site"] for each in wasted)


def test_threads_that_it_cannot_tell_apart_are_said_to_be_unwatched() -> None:
    bench = Bench()
    correct(bench)
    assert bench.checker.unwatched() == 0
    for agent in range(1, AGENTS_MAX + 10):
        bench.reader.agent = agent
        bench.reader.load_word(DATA)
    # The writer's thread and the reader's first one came before.
    assert bench.checker.unwatched() == AGENTS_MAX + 9 + 2 - AGENTS_MAX
    text = report_text(explain([], [], Layout.compute(**REGION), unwatched=bench.checker.unwatched()))
    assert "11 threads were not watched" in text
