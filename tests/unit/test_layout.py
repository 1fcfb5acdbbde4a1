"""The records have the bytes that the protocol says, and no two of them overlap."""

import itertools
import struct

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.coherence import WRITERS
from broker.layout import (
    LAYOUT_MAGIC,
    POOL_STRATEGIES,
    RECORDS,
    Layout,
    LayoutError,
    record_dtypes,
)
from sim.cxl.memory import MappedMemory

MIB = 1 << 20
NUMBERS = {
    "broker_count": 4, "region_bytes": 64 * MIB, "topic_count_max": 16, "ring_slot_count": 256,
    "order_entry_count": 4096, "session_count_max": 128, "cursor_count_max": 64, "attach_slot_count": 64,
    "segment_bytes": 256 << 10, "message_bytes_max": 4 * MIB, "batch_bytes_max": 4 * MIB,
}
DTYPES = record_dtypes()

# place -> (record, the limits of its indexes)
PLACES = {
    "superblock": ("Superblock", ()), "control": ("ControlLine", ()), "directory": ("DirectoryLine", ()),
    "broker": ("BrokerLine", ("broker_count",)), "broker_address": ("BrokerAddress", ("broker_count",)),
    "pool_wish": ("PoolWishLine", ("broker_count",)), "pool_grant": ("PoolGrantLine", ("broker_count",)),
    "topic": ("TopicLine", ("topic_count_max",)), "topic_name": ("TopicName", ("topic_count_max",)),
    "topic_order": ("TopicOrderLine", ("topic_count_max",)),
    "topic_reclaim": ("TopicReclaimLine", ("topic_count_max",)),
    "offset_broker": ("OffsetBrokerLine", ("topic_count_max", "broker_count")),
    "offset_sequencer": ("OffsetSequencerLine", ("topic_count_max", "broker_count")),
    "replica": ("ReplicaLine", ("topic_count_max", "broker_count", "broker_count")),
    "ring": ("BatchHeader", ("topic_count_max", "broker_count", "ring_slot_count")),
    "result": ("BatchResult", ("topic_count_max", "broker_count", "ring_slot_count")),
    "order_entry": ("OrderEntry", ("topic_count_max", "order_entry_count")),
    "session": ("SessionLine", ("session_count_max",)),
    "session_progress": ("SessionProgressLine", ("session_count_max",)),
    "cursor": ("CursorLine", ("cursor_count_max",)), "cursor_grant": ("CursorGrantLine", ("cursor_count_max",)),
    "segment_line": ("SegmentLine", ("segment_count",)), "order_lock": ("LockLine", ()),
    "head": ("HeadLine", ()), "bank_owner": ("BankLine", ("bank_count",)),
    "broker_counters": ("BrokerCounters", ("broker_count",)), "sequencer_counters": ("SequencerCounters", ()),
}


def compute(**changes: object) -> Layout:
    return Layout.compute(**{**NUMBERS, **changes})


def places_of(layout: Layout) -> list[tuple[int, int, str]]:
    """(start, end, place) of the first, second and last record along every index."""
    found = []
    for place, (record, limits) in PLACES.items():
        choices = [sorted({0, min(1, layout.numbers[limit] - 1), layout.numbers[limit] - 1}) for limit in limits]
        for index in numpy.ndindex(*map(len, choices)):
            start = layout.offset_of(place, *(choice[i] for choice, i in zip(choices, index, strict=True)))
            found.append((start, start + DTYPES[record].itemsize, place))
    return sorted(found)


def test_every_record_is_made_of_whole_lines() -> None:
    for record, dtype in DTYPES.items():
        assert dtype.itemsize % 64 == 0 or record in ("BatchResult", "Lease"), record
    assert DTYPES["BatchResult"].itemsize == DTYPES["Lease"].itemsize == 16
    assert {record: DTYPES[record].itemsize for record in ("Superblock", "BatchHeader", "OrderEntry")} == {
        "Superblock": 512, "BatchHeader": 64, "OrderEntry": 64}


def test_every_record_names_its_writer() -> None:
    assert set(WRITERS) == set(RECORDS) == set(DTYPES)


def test_fields_are_aligned_to_their_size() -> None:
    for record, dtype in DTYPES.items():
        for field, (kind, offset, *_) in dtype.fields.items():
            assert offset % kind.base.itemsize == 0 or kind.base.kind == "S", f"{record}.{field}"


def test_a_batch_header_has_the_bytes_of_the_protocol() -> None:
    raw = struct.pack("<QQIIQIIQQII", (7 << 48) | 43, 1 << 20, 65536, 64, 99, 5, 2, 17, 123456789, 1, 77)
    header = numpy.frombuffer(raw, DTYPES["BatchHeader"])[0]
    assert len(raw) == 64
    assert (header["complete"], header["payload_offset"], header["payload_bytes"]) == ((7 << 48) | 43, 1 << 20, 65536)
    assert (header["message_count"], header["client_id"], header["session_slot"]) == (64, 99, 5)
    assert (header["session_epoch"], header["batch_sequence"]) == (2, 17)
    assert (header["received_wall_ns"], header["flags"], header["local_order"]) == (123456789, 1, 77)
    assert header.tobytes() == raw


def test_an_order_entry_has_the_bytes_of_the_protocol() -> None:
    raw = struct.pack("<QQQIIQQIHHQ", (7 << 48) | 12, 1000, 1 << 21, 4096, 4, 99, 17, 2, 3, 9, 123456789)
    entry = numpy.frombuffer(raw, DTYPES["OrderEntry"])[0]
    assert len(raw) == 64
    assert [entry[field].item() for field in DTYPES["OrderEntry"].names] == [
        (7 << 48) | 12, 1000, 1 << 21, 4096, 4, 99, 17, 2, 3, 9, 123456789]
    assert entry.tobytes() == raw


def test_the_magic_number_reads_as_the_product() -> None:
    assert struct.pack("<Q", LAYOUT_MAGIC).rstrip(b"\0") == b"CXLMQ"


@pytest.mark.parametrize("record", RECORDS)
def test_every_record_survives_the_way_through_memory(record: str) -> None:
    raw = bytes((17 * i + 3) % 251 for i in range(-(-DTYPES[record].itemsize // 64) * 64))
    memory = MappedMemory(bytearray(len(raw)))
    for start in range(0, len(raw), 64):
        memory.write_line_bytes(start, raw[start:start + 64])
    read = numpy.frombuffer(memory.read_bytes(0, len(raw)), DTYPES[record], 1)
    assert read.tobytes() == raw[:DTYPES[record].itemsize]


@pytest.mark.parametrize("brokers", [1, 3, 4, 8])
def test_no_two_records_overlap_and_all_lie_in_the_region(brokers: int) -> None:
    layout = compute(broker_count=brokers)
    places = places_of(layout)
    for (_, end, first), (start, _, second) in itertools.pairwise(places):
        assert end <= start, f"{first} and {second} overlap"
    assert places[-1][1] <= layout.numbers["segments"]
    for start, _, place in places:
        assert start % DTYPES[PLACES[place][0]].itemsize % 64 == 0, place


def test_sections_follow_each_other_without_a_gap_before_the_segments() -> None:
    layout = compute()
    for (_, start, nbytes), (name, following, _) in zip(layout.sections[:-1], layout.sections[1:-1], strict=False):
        if name in ("attached-client slots", "head", "further banks"):
            assert 0 <= following - start - nbytes < 4096       # they begin on a page of their own
        else:
            assert start + nbytes == following, name
    name, start, _ = layout.sections[-1]
    assert name == "segments"
    assert start % layout.numbers["segment_bytes"] == 0


def test_rings_wrap_around() -> None:
    layout = compute()
    for place, index, count in (("ring", (3, 2), 256), ("result", (3, 2), 256), ("order_entry", (3,), 4096)):
        assert layout.offset_of(place, *index, 5) == layout.offset_of(place, *index, 5 + 7 * count)


def test_the_region_ends_with_its_last_whole_segment() -> None:
    layout = compute(region_bytes=64 * MIB + 12345)
    numbers = layout.numbers
    assert numbers["region_bytes"] <= 64 * MIB + 12345
    last = layout.offset_of("segment", numbers["segment_count"] - 1)
    assert last + numbers["segment_bytes"] == numbers["region_bytes"]


@pytest.mark.parametrize("pool", POOL_STRATEGIES)
def test_the_bitmap_has_a_bit_for_every_segment(pool: str) -> None:
    for brokers in (1, 3, 7):
        layout = compute(pool_strategy=pool, broker_count=brokers)
        bitmap_bytes = layout.offset_of("warm_bitmap") - layout.offset_of("bitmap")
        share_words = bitmap_bytes // 8 // brokers
        assert share_words * 64 >= -(-layout.numbers["segment_count"] // brokers)
        assert layout.pool_strategy == pool


def test_a_region_too_small_names_the_smallest_that_works() -> None:
    with pytest.raises(LayoutError, match=r"needs at least \d+ bytes") as caught:
        compute(region_bytes=8 * MIB)
    smallest = int(str(caught.value).split("at least ")[1].split()[0])
    assert compute(region_bytes=smallest).numbers["region_bytes"] <= smallest
    with pytest.raises(LayoutError):
        compute(region_bytes=smallest - 2 * MIB)


@pytest.mark.parametrize("region_bytes", [0, 4096, MIB])
def test_a_region_that_does_not_even_hold_its_tables_is_refused(region_bytes: int) -> None:
    with pytest.raises(LayoutError, match="too small"):
        compute(region_bytes=region_bytes)


@given(st.integers(1, 16), st.sampled_from([16, 256, 1024]), st.sampled_from([4096, 65536, MIB]), st.integers(1, 64))
def test_every_layout_has_room_for_the_largest_batch(brokers: int, slots: int, segment: int, mebibytes: int) -> None:
    try:
        layout = compute(broker_count=brokers, ring_slot_count=slots, segment_bytes=segment,
                         region_bytes=mebibytes * MIB)
    except LayoutError:
        return
    numbers = layout.numbers
    assert numbers["segment_count"] * numbers["segment_bytes"] >= numbers["batch_bytes_max"]
    assert numbers["segment_count"] >= 2 * brokers
    assert numbers["segments"] + numbers["segment_count"] * numbers["segment_bytes"] == numbers["region_bytes"]


@pytest.mark.parametrize("changes", [
    {"broker_count": 0}, {"broker_count": 65}, {"topic_count_max": 0}, {"ring_slot_count": 100},
    {"order_entry_count": 8}, {"session_count_max": 3}, {"cursor_count_max": 3}, {"segment_bytes": 5000},
    {"pool_strategy": "magic"}, {"batch_bytes_max": 1},
])
def test_numbers_that_make_no_layout_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError, match=next(iter(changes)).replace("_strategy", "")):
        compute(**changes)


@pytest.mark.parametrize("changes", [
    {"broker_count": 3}, {"ring_slot_count": 512}, {"message_bytes_max": MIB - 1, "batch_bytes_max": MIB},
    {"segment_bytes": 128 << 10}, {"pool_strategy": "leader"}, {"session_count_max": 256},
])
def test_the_hash_tells_layouts_apart(changes: dict[str, object]) -> None:
    assert compute().hash() == compute().hash()
    assert compute(**changes).hash() != compute().hash()
    assert 0 < compute().hash() < 1 << 63
