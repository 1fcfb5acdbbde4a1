"""The checker of the benchmarks must be shown to fail: every kind of damage is planted and has to be found."""

import struct

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.errors import CxlmqError
from client.bench.load import Load, LoadSettings, period_of
from client.bench.pattern import STAMP_BYTES, Difference, Verifier, fill, restamp

SIZES = [0, 1, 7, 8, 15, 16, 17, 24, 100, 1000, 1024, 4096, 4097, 4111, 4112, 9001]
Rows = NDArray[numpy.uint8]


def rows_of(message_bytes: int, count: int, publisher: int = 1, first: int = 0, period: int = 0) -> Rows:
    rows = numpy.zeros((count, message_bytes), numpy.uint8)
    fill(rows, publisher, first, period)
    return rows


def framed(*parts: Rows) -> bytearray:
    """Messages as they lie in a segment; written here a second time, from the contract."""
    out = bytearray()
    for rows in parts:
        for row in rows:
            size = len(row)
            check = (size * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C
            out += struct.pack("<II", size, check) + row.tobytes() + bytes(-size % 8)
    return out


def verifier_for(message_bytes: int, *counts: int, ordered: bool = True, period: int = 0) -> Verifier:
    verifier = Verifier(len(counts), message_bytes, ordered, period)
    for publisher, count in enumerate(counts, 1):
        verifier.expect(publisher, count)
    return verifier


def differs(payload: bytes | bytearray, count: int, verifier: Verifier, position: int = 0) -> Difference:
    with pytest.raises(Difference) as caught:
        verifier.check(payload, count, position)
    return caught.value


# ---- what is right passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("period", [0, 3])
def test_what_was_published_is_accepted(size: int, ordered: bool, period: int) -> None:
    verifier = verifier_for(size, 10, ordered=ordered, period=period)
    payload = framed(rows_of(size, 10, period=period))
    assert verifier.check(bytes(payload), 10, 0) == 10 * size
    verifier.finish()
    assert (verifier.position, verifier.messages, verifier.missing) == (10, 10, 0)
    assert verifier.verified_bytes == 10 * size


def test_publishers_may_interleave_and_batches_follow_one_another() -> None:
    verifier = verifier_for(100, 4, 3)
    one, two = rows_of(100, 4, 1), rows_of(100, 3, 2)
    verifier.check(framed(one[:1], two[:2]), 3, 0)
    verifier.check(framed(one[1:3]), 2, 3)
    verifier.check(framed(two[2:], one[3:]), 2, 5)
    verifier.finish()


def test_rounds_go_on_where_the_last_one_ended() -> None:
    verifier = verifier_for(64, 5)
    verifier.check(framed(rows_of(64, 5)), 5, 0)
    verifier.expect(1, 3)
    assert verifier.missing == 3
    verifier.check(framed(rows_of(64, 3, first=5)), 3, 5)
    verifier.finish()


def test_messages_differ_everywhere_between_publishers_and_sequences() -> None:
    one, other = rows_of(1024, 2, 1), rows_of(1024, 2, 2)
    for left, right in ((one[0], one[1]), (one[0], other[0])):
        assert numpy.mean(left[STAMP_BYTES:] != right[STAMP_BYTES:]) > 0.9


@pytest.mark.parametrize("size", [0, 5, 16, 1024, 9001])
def test_new_stamps_on_old_rows_are_what_a_fresh_fill_gives(size: int) -> None:
    period = 7
    rows = rows_of(size, period, period=period)
    restamp(rows, 1, 3 * period)
    assert numpy.array_equal(rows, rows_of(size, period, first=3 * period, period=period))


def test_the_period_is_prime_and_its_rows_fit_a_block() -> None:
    for size in (1, 64, 1000, 1024, 65536, 1 << 20, 16 << 20):
        period = period_of(size)
        assert period >= 3
        assert all(period % divisor for divisor in range(2, int(period ** 0.5) + 1))
        assert period * size <= max(1 << 20, 3 * size)


class FakePublisher:
    """Keeps what is published, as a copy: rows are used again."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.failed = 0

    def publish_array(self, rows: Rows) -> "FakePublisher":
        self.rows.append(rows.copy())
        return self

    def statistics(self) -> dict[str, int]:
        return {"batches": len(self.rows), "retries": 0, "reopened": 0, "failed": self.failed}

    def take_latencies(self) -> NDArray[numpy.int64]:
        return numpy.arange(len(self.rows), dtype=numpy.int64)

    def flush(self) -> None:
        self.failed += sum(len(rows) == 13 for rows in self.rows)

    def exception(self) -> Exception | None:
        return None


def load_of(message_bytes: int, publisher: FakePublisher) -> Load:
    return Load(LoadSettings("topic", "cluster", None, "grpc", 1, message_bytes, None, 1), publisher)


@pytest.mark.parametrize("size", [64, 1000, 300_000])
def test_a_publisher_process_publishes_every_message_once_over_many_rounds(size: int) -> None:
    fake = FakePublisher()
    load, period = load_of(size, fake), period_of(size)
    counts = [1, period - 1, period + 2, 3 * period, 5]
    verifier = Verifier(1, size, True, period)
    for count in counts:
        answer = load.run(count, 0)
        verifier.expect(1, count)
        assert answer["ended_ns"] >= answer["started_ns"]
    for rows in fake.rows:
        verifier.check(framed(rows), len(rows), verifier.position)
    verifier.finish()


def test_a_publisher_process_says_when_messages_were_not_delivered() -> None:
    with pytest.raises(CxlmqError, match="1 messages were not delivered"):
        load_of(64, FakePublisher()).run(13, 0)


# ---- what is wrong is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [size for size in SIZES if size])
@pytest.mark.parametrize("period", [0, 3])
def test_a_flipped_byte_is_found_wherever_it_is(size: int, period: int) -> None:
    rows = rows_of(size, 3, period=period)
    stride = 8 + (size + 7) // 8 * 8
    for index in {0, 7, 8, 15, 16, 17, size // 2, 4095, 4096, 4100, 4111, size - 8, size - 1} & set(range(size)):
        payload = framed(rows)
        payload[stride + 8 + index] ^= 0x40
        found = differs(payload, 3, verifier_for(size, 3, period=period))
        assert found.position == 1
        if index >= STAMP_BYTES or size < STAMP_BYTES <= 8 + index:
            assert (found.publisher, found.sequence, found.byte_index) == (1, 1, index)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 300), at=st.integers(0, 10**6), bit=st.integers(0, 7), ordered=st.booleans())
def test_any_flipped_bit_is_found(size: int, at: int, bit: int, ordered: bool) -> None:
    payload = framed(rows_of(size, 4))
    at %= len(payload)
    payload[at] ^= 1 << bit
    in_message = at % (len(payload) // 4) - 8
    if not ordered and size < STAMP_BYTES and 8 <= in_message < size:
        return                      # documented: only the publisher of such a message is checked without order
    with pytest.raises(Difference):
        verifier_for(size, 4, ordered=ordered).check(payload, 4, 0)


@pytest.mark.parametrize("size", [16, 100, 1024, 5000])
def test_lost_repeated_and_swapped_messages_are_found(size: int) -> None:
    rows = rows_of(size, 6)
    for order, position, sequence in (([0, 1, 3, 4, 5], 2, 3), ([0, 1, 1, 2, 3], 2, 1), ([0, 2, 1, 3, 4], 1, 2)):
        found = differs(framed(rows[order]), 5, verifier_for(size, 6))
        assert (found.position, found.publisher, found.sequence) == (position, 1, sequence)


def test_a_swap_of_messages_shorter_than_a_stamp_is_found() -> None:
    rows = rows_of(12, 4)
    assert differs(framed(rows[[0, 2, 1, 3]]), 4, verifier_for(12, 4)).position == 1


def test_messages_that_never_came_are_missed_at_the_end() -> None:
    verifier = verifier_for(64, 5, 2)
    verifier.check(framed(rows_of(64, 5, 1), rows_of(64, 1, 2)), 6, 0)
    with pytest.raises(Difference, match="1 messages were published and did not come") as caught:
        verifier.finish()
    assert (caught.value.publisher, caught.value.sequence) == (2, 1)


def test_empty_messages_are_counted() -> None:
    verifier = verifier_for(0, 3)
    verifier.check(framed(rows_of(0, 2)), 2, 0)
    with pytest.raises(Difference, match="1 messages"):
        verifier.finish()


def test_a_batch_at_a_wrong_position_is_found() -> None:
    verifier = verifier_for(64, 5)
    assert "expected was 0" in str(differs(framed(rows_of(64, 5)), 5, verifier, position=1))


def test_a_stranger_and_an_unpublished_message_are_found() -> None:
    assert "publisher that does not exist (9)" in str(differs(framed(rows_of(64, 1, 9)), 1, verifier_for(64, 1)))
    found = differs(framed(rows_of(64, 3)), 3, verifier_for(64, 2))
    assert (found.position, found.reason) == (2, "this message was not published")


def test_leftovers_of_another_message_are_found_line_by_line() -> None:
    """A line that was never written holds what lay there before: the same place of an older message."""
    size, period = 8192, 3
    old, new = rows_of(size, 1, first=0, period=period), rows_of(size, 1, first=1, period=period)
    for line in range(1, size // 64):
        mixed = new.copy()
        mixed[0, 64 * line:64 * line + 64] = old[0, 64 * line:64 * line + 64]
        verifier = Verifier(1, size, True, period)
        verifier.expect(1, 2)
        verifier.check(framed(old), 1, 0)
        assert differs(framed(mixed), 1, verifier, position=1).byte_index in range(64 * line, 64 * line + 64)


def test_damaged_framing_is_found() -> None:
    payload = framed(rows_of(60, 3))
    assert "no well-formed message" in str(differs(payload[:-1], 3, verifier_for(60, 3)))
    assert "behind its last message" in str(differs(payload, 2, verifier_for(60, 3)))
    for at, text in ((0, "a message of 61 bytes"), (4, "no well-formed message"), (8 + 60, "the padding")):
        damaged = bytearray(payload)
        damaged[at] ^= 1
        assert text in str(differs(damaged, 3, verifier_for(60, 3)))


def test_without_order_any_order_is_right_and_damage_is_found_all_the_same() -> None:
    rows = rows_of(100, 5)
    verifier = verifier_for(100, 5, ordered=False)
    verifier.check(framed(rows[[3, 1, 4, 0, 2]]), 5, 0)
    verifier.finish()
    assert "came before" in str(differs(framed(rows[[3, 1, 3, 0, 2]]), 5, verifier_for(100, 5, ordered=False)))
    payload = framed(rows[[3, 1, 4, 0, 2]])
    payload[8 + 50] ^= 1
    found = differs(payload, 5, verifier_for(100, 5, ordered=False))
    assert (found.position, found.sequence, found.byte_index) == (0, 3, 50)


def test_without_order_a_message_of_an_earlier_round_is_found() -> None:
    rows = rows_of(100, 6)
    verifier = verifier_for(100, 3, ordered=False)
    verifier.check(framed(rows[:3]), 3, 0)
    verifier.expect(1, 3)
    assert "came before" in str(differs(framed(rows[[3, 1, 4]]), 3, verifier, position=3))


def test_publishers_are_numbered_from_one() -> None:
    for publisher in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            fill(numpy.zeros((1, 8), numpy.uint8), publisher, 0)
