"""A reader gets what is committed, in order, and a typed error for what is lost, gone or damaged."""

import asyncio
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import reading_service
from broker.proto import cxlmq_pb2 as pb
from broker.reader import ReadError, ReadStatus
from tests.manual_cluster import KIB, ManualCluster, Session, payload_of

SIZES = (1, 3, 2, 5, 1, 4)                      # messages of the batches: positions 0, 1, 4, 6, 11, 12, 16
STARTS = [sum(SIZES[:index]) for index in range(len(SIZES) + 1)]


def filled(**numbers: int) -> tuple[ManualCluster, Session]:
    cluster = ManualCluster(**numbers)
    session = cluster.open_session(cluster.create())
    for sequence, count in enumerate(SIZES):
        cluster.publish(session, sequence, [f"{sequence}.{each}".encode() for each in range(count)],
                        broker=sequence % 2, published_ns=1000 * (sequence + 1))
        cluster.settle()
    return cluster, session


def status_of(raised: pytest.ExceptionInfo[ReadError]) -> ReadStatus:
    return ReadStatus(raised.value.status)


@pytest.mark.parametrize("position", range(STARTS[-1] + 3))
def test_a_position_is_found_in_the_batch_that_holds_it(position: int) -> None:
    cluster, session = filled()
    wanted = max((index for index, start in enumerate(STARTS[:-1]) if start <= position), default=0)
    if position >= STARTS[-1]:
        wanted = len(SIZES)
    assert cluster.reader(session.topic).find(position) == wanted


def test_a_time_is_found_at_the_first_batch_published_then_or_later() -> None:
    cluster, session = filled()
    reader = cluster.reader(session.topic)
    assert [reader.find_time(ns) for ns in (0, 1000, 1001, 3000, 6000, 6001)] == [0, 0, 1, 2, 5, 6]


@pytest.mark.parametrize("entries_max", [1, 2, 3, 100])
def test_a_time_is_found_a_piece_at_a_time_and_others_run_in_between(
        entries_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_service, "ENTRIES_AT_ONCE", entries_max)
    cluster, session = filled()
    reader, turns = cluster.reader(session.topic), 0

    async def find(ns: int) -> int:
        async def others_run() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.ensure_future(others_run())
        try:
            return await reading_service.time_index(pb.SubscribeRequest(published_ns=ns), reader)
        finally:
            beside.cancel()

    assert [asyncio.run(find(ns)) for ns in (0, 1000, 1001, 3000, 6000)] == [0, 0, 1, 2, 5]
    turns = 0
    assert asyncio.run(find(6001)) == 6
    assert turns >= len(SIZES) // entries_max
    assert asyncio.run(reading_service.time_index(pb.SubscribeRequest(position=3), reader)) == 0


def test_a_time_that_is_to_come_is_not_run_after() -> None:
    """However fast others publish meanwhile."""
    class Growing:
        end = 1000

        def frontiers(self) -> dict[str, int]:
            return {"committed_index": self.end, "reclaimed_index": 0}

        def find_time(self, _: int, at: int, entries_max: int) -> int:
            self.end += 2 * entries_max
            return min(at + entries_max, self.end)

    reader: Any = Growing()
    assert 1000 <= asyncio.run(reading_service.time_index(pb.SubscribeRequest(published_ns=9), reader)) < 1000 + 2 * (
        reading_service.ENTRIES_AT_ONCE)


@pytest.mark.parametrize("entries_max", [1, 2, 4, 100])
def test_batches_are_found_by_their_session_and_sequence_a_piece_at_a_time(entries_max: int) -> None:
    cluster, session = filled()
    reader = cluster.reader(session.topic)

    def find(client: int, epoch: int, first: int, end: int) -> dict[int, int]:
        found: dict[int, int] = {}
        at = 1 << 40
        for _ in range(len(SIZES) + 1):
            if not (at := reader.find_batches(client, epoch, first, end, at, entries_max, found)):
                return found
        raise AssertionError("it never came to an end")

    assert find(7, 1, 0, 100) == {sequence: STARTS[sequence] for sequence in range(6)}
    assert find(7, 1, 2, 4) == {2: STARTS[2], 3: STARTS[3]}
    assert find(7, 2, 0, 100) == find(8, 1, 0, 100) == {}


@pytest.mark.parametrize("frame_bytes", [1, 60, 100, 150, 64 * KIB])
def test_frames_of_any_size_carry_the_same_messages_once(frame_bytes: int) -> None:
    cluster, session = filled()
    read = cluster.read(cluster.reader(session.topic), frame_bytes)
    assert [each.position for each in read] == STARTS[:-1]
    assert [each.broker for each in read] == [0, 1] * 3
    assert [message for each in read for message in each.messages] == [
        f"{sequence}.{each}".encode() for sequence, count in enumerate(SIZES) for each in range(count)]


def test_nothing_is_read_before_it_is_committed() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    reader = cluster.reader(session.topic)
    cluster.publish(session, 0)
    cluster.brokers[0].delegation.step_once()
    assert reader.read_frame(1000) == b""
    assert not reader.has_news()
    cluster.settle()
    assert reader.has_news()
    assert [each.messages for each in cluster.read(reader)] == [[payload_of(session, 0)]]


def test_what_was_reclaimed_is_lost_with_the_first_position_that_is_kept() -> None:
    cluster = ManualCluster(order_entry_count=64)
    session = cluster.open_session(cluster.create())
    reader = cluster.reader(session.topic)
    cluster.publish_all(session, range(200))
    first = reader.frontiers()["reclaimed_position"]
    assert first > 0
    with pytest.raises(ReadError, match=f"first position kept is {first}") as raised:
        reader.read_frame(1000)
    assert status_of(raised) == ReadStatus.READ_LOST
    assert reader.find(0) == reader.frontiers()["reclaimed_index"]
    reader.move_to(reader.find(first + 5))
    assert cluster.read(reader)[0].position == first + 5


DAMAGE = {
    "commit word of another entry": {"commit": 1 << 48 | 9},
    "no commit word": {"commit": 0},
    "payload before the segments": {"payload_offset": 64},
    "payload behind the region": {"payload_offset": 1 << 50},
    "payload wraps around": {"payload_offset": (1 << 64) - 64, "payload_bytes": 64},
    "payload off its line": {"payload_offset": 0x100001},
    "payload too long": {"payload_bytes": 0xFFFFFFFF},
    "no message": {"message_count": 0},
    "more messages than bytes": {"message_count": 0xFFFF},
    "a broker that is none": {"broker": 60},
    "a position that does not follow": {"position": 7},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_typed_error_and_neither_followed_nor_skipped(damage: str) -> None:
    cluster, session = filled()
    cluster.poke("OrderEntry", "order_entry", 0, 2, **DAMAGE[damage])
    reader = cluster.reader(session.topic)
    with pytest.raises(ReadError, match="entry 2 of topic 0 is damaged") as raised:
        cluster.read(reader)
    assert status_of(raised) == ReadStatus.READ_DAMAGED
    assert reader.index == 2, "what lies before the damage was read"
    with pytest.raises(ReadError):
        reader.read_frame(64 * KIB)


def test_a_search_that_meets_damage_says_so() -> None:
    cluster, session = filled()
    cluster.poke("OrderEntry", "order_entry", 0, 3, commit=0)
    with pytest.raises(ReadError, match="entry 3 of topic 0 is damaged"):
        cluster.reader(session.topic).find(5)


@given(line=st.binary(min_size=64, max_size=64), index=st.integers(0, 5))
def test_garbage_in_the_order_index_is_never_dereferenced(line: bytes, index: int) -> None:
    cluster, session = CLUSTER
    at = cluster.layout.offset_of("order_entry", 0, index)
    kept = cluster.memory.read_line_bytes(at)
    tagged = struct.pack("<Q", session.topic.generation << 48 | index + 1) + line[8:]
    try:
        for garbage in (line, tagged):
            cluster.memory.write_line_bytes(at, garbage)
            reader = cluster.reader(session.topic)
            with pytest.raises(ReadError) as raised:
                cluster.read(reader)
            assert status_of(raised) == ReadStatus.READ_DAMAGED
    finally:
        cluster.memory.write_line_bytes(at, kept)


CLUSTER = filled()


@pytest.mark.parametrize("word", range(8))
def test_a_frontier_ahead_of_its_entries_shows_no_entry_that_is_not_complete(word: int) -> None:
    # An entry of which only some words have arrived: whatever is missing, its commit word is stored last.
    cluster, session = filled()
    cluster.publish(session, 6)
    cluster.brokers[0].delegation.step_once()
    at = cluster.layout.offset_of("order_entry", 0, 6)
    before = cluster.memory.read_line_bytes(at)
    cluster.scanners[0].step_once()
    after = cluster.memory.read_line_bytes(at)
    torn = before[:8] + after[8:8 + 8 * word] + before[8 + 8 * word:]
    cluster.memory.write_line_bytes(at, torn)
    reader = cluster.reader(session.topic, 6)
    with pytest.raises(ReadError):
        reader.read_frame(1000)
