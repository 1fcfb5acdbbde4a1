"""What a subscriber has received is given out once and in order, in whatever mix it is asked for; damage hides nothing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import DamagedData
from client.buffer import BatchBuffer
from client.received import parse_response
from tests.unit.test_received import framed, response

STEPS = st.lists(st.one_of(
    st.tuples(st.just("messages"), st.integers(1, 9)), st.tuples(st.just("message"), st.just(1)),
    st.tuples(st.just("batches"), st.just(1)), st.tuples(st.just("ahead"), st.just(1)), st.tuples(st.just("refused"), st.integers(0, 4)),
), max_size=60)


def numbered(sizes: list[int]) -> tuple[list[Any], int]:
    """Batches of so many messages, each of which says its position."""
    at, batches = 0, []
    for size in sizes:
        batches.append([b"%d" % number for number in range(at, at + size)])
        at += size
    return parse_response(response(batches), "t"), at


@given(st.lists(st.integers(1, 8), max_size=20), STEPS, st.booleans())
def test_any_mix_gives_every_message_once(sizes: list[int], steps: list[tuple[str, int]], pulled: bool) -> None:
    batches, end = numbered(sizes)
    source = list(batches)

    def refill(limit: int) -> None:
        for batch in source[:limit]:
            buffer.add(batch)
        del source[:limit]

    buffer = BatchBuffer(refill) if pulled else BatchBuffer()
    if not pulled:
        refill(len(source))
    got: list[bytes] = []
    for kind, limit in [*steps, *[("messages", 3)] * 60]:
        if kind == "messages":
            taken = [each.payload for each in buffer.take_messages(limit)]
            assert len(taken) <= limit
        elif kind == "message":
            taken = [each.payload for each in buffer.take_message()]
        elif kind == "ahead":
            at_hand = buffer.next_ahead()
            taken = [] if at_hand is None else [at_hand.payload]
        elif kind == "batches":
            taken = [each for batch in buffer.take_batches() for each in batch.messages()]
        else:                               # somebody claims, and then takes none of it; others take what comes behind
            claimed = buffer.claim()
            buffer.put_back(claimed, buffer.turn)
            taken = []
        got += taken
        assert buffer.position() in (None, len(got))
        assert (buffer.handed or 0) == len(got), "what counts as given out is what was given out"
    assert got == [b"%d" % number for number in range(len(got))]
    assert len(got) == end


def test_what_lies_before_damage_is_given_out_first_message_by_message_too() -> None:
    whole = framed([b"0", b"1"])
    broken = framed([b"2", b"3", b"4"])[:-16] + bytes(16)
    for take in (lambda buffer: buffer.take_messages(9), BatchBuffer.take_message):
        buffer = BatchBuffer()
        for position, count, payload in ((0, 2, whole), (2, 3, broken)):
            (batch,) = parse_response(_response(position, count, payload), "t")
            buffer.add(batch)
        got: list[int] = []
        with pytest.raises(DamagedData):
            while True:
                got += [each.position for each in take(buffer)]
        assert got[:2] == [0, 1]
        assert (buffer.handed, buffer.position()) == (len(got), len(got))
        with pytest.raises(DamagedData):
            take(buffer)


def _response(position: int, count: int, payload: bytes) -> bytes:
    from broker.proto import cxlmq_pb2 as pb

    return pb.SubscribeResponse(batches=[pb.Batch(
        position=position, message_count=count, payload=payload)]).SerializeToString()


def test_a_seek_never_makes_more_count_as_given_out() -> None:
    batches, _ = numbered([5, 5])
    buffer = BatchBuffer()
    for batch in batches:
        buffer.add(batch)
    buffer.handed = 0
    buffer.take_messages(6)
    buffer.moved(50)
    assert (buffer.handed, buffer.position()) == (6, None)
    buffer.moved(2)
    assert buffer.handed == 2
