"""Lag is what can be read: what was reclaimed or lost counts for nobody."""

import pytest

from broker.layout import LOST_BROKER_NUMBER
from broker.records import pack
from broker.unread import lost_from

GENERATION = 3


def index_of(*ranges: tuple[int, int], generation: int = GENERATION) -> bytes:
    """An order index with lost ranges, between batches that are there."""
    entries = [pack("OrderEntry", commit=generation << 48 | number + 1, position=first, message_count=end - first,
                    broker=LOST_BROKER_NUMBER) for number, (first, end) in enumerate(ranges)]
    return b"".join([pack("OrderEntry", commit=generation << 48 | 77, position=0, message_count=5, payload_bytes=64),
                     *entries, pack("OrderEntry")])


@pytest.mark.parametrize(("position", "first", "lost"), [
    (0, 0, 0), (0, 40, 40), (40, 40, 0), (60, 40, 0), (0, 100, 100), (90, 100, 10), (100, 100, 0), (120, 100, 0)])
def test_what_was_reclaimed_is_lost(position: int, first: int, lost: int) -> None:
    assert lost_from(position, first, 100) == lost
    assert lost_from(position, first, 100, index_of(), GENERATION) == lost


@pytest.mark.parametrize(("position", "first", "lost"), [
    (0, 0, 15), (0, 12, 12 + 13), (15, 0, 10), (20, 0, 5), (25, 0, 5), (30, 0, 5), (0, 50, 55), (93, 0, 2), (99, 0, 0)])
def test_what_no_replica_had_is_lost(position: int, first: int, lost: int) -> None:
    assert lost_from(position, first, 100, index_of((10, 20), (90, 95)), GENERATION) == lost
    assert lost_from(position, first, 100, index_of((10, 20), (90, 95), generation=2), GENERATION) == max(0, first - position)
