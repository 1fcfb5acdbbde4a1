"""Subscribers' batches: every message comes out as it went in, and damage is a typed error, never wrong bytes."""

import struct

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import DamagedData
from broker.proto import cxlmq_pb2 as pb
from client.received import parse_response

BATCHES = st.lists(st.lists(st.binary(max_size=70), min_size=1, max_size=12), min_size=0, max_size=6)


def framed(messages: list[bytes]) -> bytes:
    """Messages as they lie in a segment."""
    return b"".join(struct.pack("<II", len(each), (len(each) * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C) + each
                    + bytes(-len(each) % 8) for each in messages)


def response(batches: list[list[bytes]], first: int = 0) -> bytes:
    """A SubscribeResponse by protobuf itself."""
    out, position = pb.SubscribeResponse(), first
    for number, messages in enumerate(batches):
        out.batches.append(pb.Batch(position=position, message_count=len(messages), broker=number % 3,
                                    published_ns=1000 + number, payload=framed(messages)))
        position += len(messages)
    return out.SerializeToString()


@given(BATCHES, st.integers(0, 1 << 62))
def test_every_message_comes_back_with_its_position(batches: list[list[bytes]], first: int) -> None:
    received = parse_response(response(batches, first), "t")
    assert [batch.messages() for batch in received] == batches
    messages = [message for batch in received for message in batch.to_messages()]
    assert [each.payload for each in messages] == [each for batch in batches for each in batch]
    assert [each.position for each in messages] == list(range(first, first + len(messages)))
    assert [(batch.broker, batch.timestamp_ns, batch.topic) for batch in received] == [
        (number % 3, 1000 + number, "t") for number in range(len(batches))]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=40), st.lists(st.integers(1, 9), min_size=40, max_size=40))
def test_a_batch_can_be_taken_in_pieces(messages: list[bytes], pieces: list[int]) -> None:
    batch = parse_response(response([messages]), "t")[0]
    out = []
    for piece in pieces:
        taken = batch.to_messages(len(out), piece)
        assert len(taken) == min(piece, len(messages) - len(out))
        out += taken
    assert [each.payload for each in out] == messages
    assert [each.payload for each in batch.to_messages(0, 10**30)] == messages, "and from the start again"


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=20), st.integers(0, 30), st.integers(0, 25))
def test_what_lies_before_a_position_can_be_dropped(messages: list[bytes], position: int, taken: int) -> None:
    batch = parse_response(response([messages], 5), "t")[0]
    batch.to_messages(0, taken)
    batch.drop_before(position)
    kept = messages[max(0, position - 5):]
    assert (batch.count, batch.position) == (len(kept), min(max(position, 5), 5 + len(messages)))
    assert batch.messages() == kept
    assert [each.payload for each in batch.to_messages()] == kept
    assert bytes(batch.payload) == framed(kept)


@given(st.integers(1, 30), st.integers(0, 50))
def test_messages_of_one_size_are_an_array_without_a_copy(count: int, nbytes: int) -> None:
    messages = [bytes([number % 256]) * nbytes for number in range(count)]
    array = parse_response(response([messages]), "t")[0].array()
    assert array.shape == (count, nbytes)
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert [bytes(row) for row in array] == messages


def test_messages_of_several_sizes_are_no_array() -> None:
    for messages in ([b"a", b"bb"], [b"a" * 8, b"b" * 7], [b"", b"a" * 8, b""]):
        with pytest.raises(ValueError, match="differ in size"):
            parse_response(response([messages]), "t")[0].array()


def test_payload_is_a_read_only_view() -> None:
    batch = parse_response(response([[b"one"], [b"two", b"three"]]), "t")[1]
    assert batch.payload.readonly
    assert bytes(batch.payload) == framed([b"two", b"three"])
    assert numpy.frombuffer(batch.payload, numpy.uint8).size == batch.nbytes


def take_all(data: bytes) -> list[list[bytes]]:
    """Whatever a response holds, by every way to it."""
    batches = parse_response(data, "t")
    out = [batch.messages() for batch in batches]
    for batch in batches:
        assert [each.payload for each in batch.to_messages()] == out[0] or len(batches) > 1
    return out


@given(BATCHES.filter(bool), st.data())
def test_a_cut_response_is_damaged_and_never_wrong(batches: list[list[bytes]], data: st.DataObject) -> None:
    whole = response(batches)
    cut = data.draw(st.integers(1, len(whole) - 1))
    try:
        found = take_all(whole[:cut])
    except DamagedData:
        return
    assert found == batches[:len(found)], "a response that was cut between two batches is a shorter response"


@given(BATCHES.filter(bool), st.data())
def test_a_flipped_bit_crashes_nothing(batches: list[list[bytes]], data: st.DataObject) -> None:
    whole = bytearray(response(batches))
    at = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[at // 8] ^= 1 << at % 8
    try:
        take_all(bytes(whole))
        for batch in parse_response(bytes(whole), "t"):
            batch.drop_before(3)
            batch.array()
    except (DamagedData, ValueError, MemoryError, OverflowError):
        return


@given(st.binary(max_size=300))
def test_garbage_crashes_nothing(data: bytes) -> None:
    try:
        for batch in parse_response(data, "t"):
            batch.messages()
            bytes(batch.payload)
    except DamagedData:
        return


def batch_of(payload: bytes, count: int) -> bytes:
    return pb.SubscribeResponse(batches=[pb.Batch(position=4, message_count=count, payload=payload)]).SerializeToString()


@pytest.mark.parametrize(("payload", "count"), [
    (framed([b"abc"]), 2),                              # fewer messages than it says
    (framed([b"abc", b"d"]), 1),                        # more
    (framed([b"abc"])[:-1], 1),                         # ends within a message
    (struct.pack("<II", 0xFFFFFFF8, 0), 1),             # a size that nobody wrote
    (struct.pack("<II", 0xFFFFFFF8, (0xFFFFFFF8 * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C), 1),
    (b"", 1),
    (b"1234567", 1),
], ids=["too few", "too many", "cut", "no size", "huge size", "empty", "half a header"])
def test_a_count_that_does_not_add_up_names_the_position(payload: bytes, count: int) -> None:
    batch = parse_response(batch_of(payload, count), "t")[0]
    for look in (batch.messages, batch.to_messages):
        with pytest.raises(DamagedData, match="position 4"):
            look()


def test_a_batch_without_payload_is_empty() -> None:
    batch = parse_response(pb.SubscribeResponse(batches=[pb.Batch(position=4)]).SerializeToString(), "t")[0]
    assert (batch.messages(), bytes(batch.payload), batch.count) == ([], b"", 0)
    assert batch.array().shape == (0, 0)
