"""Publishers' batches: what is packed is what the contract says, every message has its own delivery."""

import gc
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BufferFull, MessageTooBig
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch, Dropped, Packer

MESSAGES = st.lists(st.binary(max_size=200), min_size=1, max_size=60)
MESSAGE_MAX = 1000


class Owner:
    """A publisher as far as a packer knows it: takes full batches, applies a policy."""

    def __init__(self, target: int = 256, message_bytes_max: int = MESSAGE_MAX) -> None:
        self.batches: list[Batch] = []
        self.refuse: Exception | None = None
        self.urged: list[Batch] = []
        self.packer = Packer(self, self.take, target, message_bytes_max)

    def take(self) -> None:
        """Seal what is packed."""
        batch = self.packer.take()
        if batch is not None:
            batch.seal(7)
            self.batches.append(batch)

    def make_room(self, nbytes: int) -> None:
        """The policy for a full buffer."""
        if self.refuse is not None:
            raise self.refuse

    def too_big(self, nbytes: int) -> None:
        """Refuse."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=MESSAGE_MAX)

    def urge(self, batch: Batch) -> None:
        """Somebody waits."""
        self.urged.append(batch)

    def wait_for_batch(self, batch: Batch, timeout: float | None) -> None:
        """Nothing ever comes here."""
        raise TimeoutError


def unpacked(batch: Batch) -> list[bytes]:
    """The messages of a sealed batch, taken apart by protobuf and by hand."""
    request = pb.PublishRequest.FromString(batch.frame)
    found, at = [], 0
    for _ in range(request.message_count):
        size, check = (int.from_bytes(request.payload[at + k:at + k + 4], "little") for k in (0, 4))
        assert check == (size * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C
        found.append(request.payload[at + 8:at + 8 + size])
        padding = request.payload[at + 8 + size:at + 8 + (size + 7) // 8 * 8]
        assert padding == bytes(len(padding)), "padding has to be zero: no memory of ours may leak"
        at += 8 + (size + 7) // 8 * 8
    assert at == len(request.payload)
    return found


@given(MESSAGES, st.integers(8, 2000))
def test_batches_hold_what_was_published_in_order(messages: list[bytes], target: int) -> None:
    owner = Owner(target)
    deliveries = [owner.packer.append(message) for message in messages]
    owner.take()
    assert [each for batch in owner.batches for each in unpacked(batch)] == messages
    assert [unpacked(delivery.batch)[delivery.index] for delivery in deliveries] == messages
    assert (owner.packer.messages, owner.packer.nbytes) == (len(messages), sum(map(len, messages)))
    for batch in owner.batches:
        assert batch.nbytes <= max(target, 8 + 208), "a batch is larger than its target only for one large message"


@given(MESSAGES, st.integers(8, 2000))
def test_publish_many_packs_as_single_messages_do(messages: list[bytes], target: int) -> None:
    one, many, generated = Owner(target), Owner(target), Owner(target)
    for message in messages:
        one.packer.append(message)
    for owner, given_messages in ((many, messages), (generated, (each for each in messages))):
        delivery = owner.packer.append_many(given_messages)
        owner.take()
        assert unpacked(delivery.batch)[delivery.index] == messages[-1]
    one.take()
    assert [each.frame for each in one.batches] == [each.frame for each in many.batches]
    assert [each.frame for each in one.batches] == [each.frame for each in generated.batches]


@given(st.integers(1, 70), st.integers(0, 40), st.integers(8, 2000))
def test_rows_of_an_array_are_messages(rows: int, width: int, target: int) -> None:
    array = numpy.arange(rows * width, dtype=numpy.uint64).astype(numpy.uint8).reshape(rows, width)
    owner = Owner(target)
    delivery = owner.packer.append_array(array)
    owner.take()
    assert [each for batch in owner.batches for each in unpacked(batch)] == [bytes(row) for row in array]
    assert unpacked(delivery.batch)[delivery.index] == bytes(array[-1])
    assert (owner.packer.messages, owner.packer.nbytes) == (rows, rows * width)


@given(st.integers(0, 1 << 63), MESSAGES)
def test_sequence_can_be_given_again(sequence: int, messages: list[bytes]) -> None:
    owner = Owner(100_000)
    owner.packer.append_many(messages)
    owner.take()
    batch = owner.batches[0]
    for number in (3, sequence):            # another session's first, then this one's
        batch.stamp(number)
        assert batch.sequence == number
        assert pb.PublishRequest.FromString(batch.frame).batch_sequence == number
    assert unpacked(batch) == messages
    assert pb.PublishRequest.FromString(batch.frame).published_ns == 7


def test_sealing_keeps_only_what_is_used() -> None:
    owner = Owner(1 << 20)
    owner.packer.append(b"x" * 24)
    owner.take()
    assert len(owner.batches[0].frame) == 29 + 32


@pytest.mark.parametrize("data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), numpy.frombuffer(b"bytes", "u1")])
def test_anything_with_the_buffer_protocol_is_a_message(data: Any) -> None:
    owner = Owner()
    owner.packer.append(data)
    owner.packer.append_many([data])
    owner.take()
    assert unpacked(owner.batches[0]) == [b"bytes", b"bytes"]


@pytest.mark.parametrize("data", ["text", 5, None, [1, 2]])
def test_what_is_no_buffer_is_refused_and_packs_nothing(data: Any) -> None:
    owner = Owner()
    with pytest.raises(TypeError):
        owner.packer.append(data)
    assert owner.packer.messages == 0


@pytest.mark.parametrize("target", [256, 100_000])
def test_a_message_that_is_too_big_is_refused_whatever_the_batch_has_room_for(target: int) -> None:
    owner = Owner(target)
    owner.packer.append(b"before")
    big = b"x" * (MESSAGE_MAX + 1)
    for publish in (lambda: owner.packer.append(big), lambda: owner.packer.append_many([b"fits", big]),
                    lambda: owner.packer.append_array(numpy.zeros((2, MESSAGE_MAX + 1), numpy.uint8))):
        with pytest.raises(MessageTooBig):
            publish()
    owner.packer.append(b"x" * MESSAGE_MAX)
    owner.take()
    assert [each for batch in owner.batches for each in unpacked(batch)] == [b"before", b"fits", b"x" * MESSAGE_MAX]


def test_empty_calls_are_refused() -> None:
    owner = Owner()
    with pytest.raises(ValueError, match="at least one message"):
        owner.packer.append_many([])
    with pytest.raises(ValueError, match="at least one row"):
        owner.packer.append_array(numpy.zeros((0, 4), numpy.uint8))


def test_dropped_messages_settle_and_the_rest_goes_on() -> None:
    owner = Owner(64)
    owner.packer.append_many([b"x" * 20, b"y" * 20])
    owner.refuse = Dropped(BufferFull(buffer_bytes=64))
    for delivery in (owner.packer.append(b"z"), owner.packer.append_many([b"z", b"z"]),
                     owner.packer.append_array(numpy.zeros((3, 30), numpy.uint8))):
        assert delivery.done()
        assert isinstance(delivery.exception(), BufferFull)
        with pytest.raises(BufferFull):
            delivery.result()
    owner.refuse = None
    owner.packer.append(b"after")
    owner.take()
    assert [each for batch in owner.batches for each in unpacked(batch)] == [b"x" * 20, b"y" * 20, b"after"]
    assert owner.packer.messages == 3


def test_receipts_count_from_the_batch() -> None:
    owner = Owner(100_000)
    deliveries = [owner.packer.append(b"m") for _ in range(3)]
    owner.packer.take().settle(40, 2, 1, False, None)
    assert [each.result().position for each in deliveries] == [40, 41, 42]
    assert (deliveries[0].result().epoch, deliveries[0].result().broker) == (2, 1)


def test_only_the_first_outcome_counts() -> None:
    owner = Owner()
    delivery = owner.packer.append(b"m")
    batch = owner.packer.take()
    batch.settle(None, 0, 1, False, None)
    batch.settle(9, 1, 1, False, BufferFull())
    assert delivery.exception() is None
    assert delivery.result().position is None


def test_settling_and_releasing_are_two_things() -> None:
    owner = Owner()
    owner.packer.append(b"m")
    owner.take()
    batch = owner.batches[0]
    batch.settle(None, 0, 1, False, None)
    batch.stamp(5)
    assert unpacked(batch) == [b"m"], "a batch of level 0 may have to be sent again after it is settled"
    batch.release()
    assert batch.frame is None
    with pytest.raises(AssertionError):
        batch.stamp(6)


def test_callbacks_come_once_each_and_a_failing_one_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    owner, called = Owner(), []
    first, second = owner.packer.append(b"1"), owner.packer.append(b"2")
    first.add_done_callback(lambda _: 1 / 0)
    first.add_done_callback(called.append)
    second.add_done_callback(called.append)
    batch = owner.packer.take()
    batch.settle(0, 1, 0, False, None)
    batch.settle(0, 1, 0, False, None)
    assert called == [first, second]
    second.add_done_callback(called.append)
    assert called == [first, second, second]
    assert "callback failed" in caplog.text


def test_deliveries_do_not_keep_the_bytes() -> None:
    owner = Owner(1 << 20)
    delivery = owner.packer.append(bytes(MESSAGE_MAX))
    batch = owner.packer.take()
    batch.settle(0, 1, 0, False, None)
    batch.release()
    gc.collect()
    assert delivery.batch.frame is None
