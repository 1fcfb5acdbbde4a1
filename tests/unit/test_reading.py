"""A reader's protocol without I/O: what it asks for, what it gives out, and what it tells instead."""

from typing import Any

import pytest

from broker.errors import (
    AttachSlotsFull,
    BrokerUnavailable,
    ClosedError,
    CxlmqError,
    DamagedData,
    PositionLost,
    RangeLost,
    TopicRecreated,
    UnknownTopic,
)
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.received import parse_response
from client.start import Start
from client.subscribing.commands import AskBrokers, AskPlace, Follow, GoOn, HandOver, Leave, Place, Renew
from client.subscribing.reading import Reading, State
from client.subscribing.search import Search
from tests.unit.test_received import response

BROKERS = [BrokerAddress(number, f"broker {number}") for number in range(3)]


def batch(position: int, count: int) -> list[Any]:
    """A batch of messages that say their position."""
    return parse_response(response([[b"%d" % at for at in range(position, position + count)]], position), "t")


def place(position: int = 0, end: int = 0, run: int = 1, created: int = 7) -> Place:
    return Place(position, 0, end, pb.TopicIdentity(run_id=run, created_ns=created), object())


def asked(search: Search) -> AskPlace:
    """Whom a search asks for a place, once it knows the brokers."""
    if search.wants == AskBrokers():
        search.brokers_known(BROKERS)
    assert isinstance(search.wants, AskPlace)
    return search.wants


def opened(start: Start = "beginning", at: int = 0, broker: int | None = None) -> tuple[Reading, Place]:
    reading = Reading("t", start, broker, 0, BatchBuffer())
    search, found = reading.open(), place(at)
    asked(search)
    assert search.granted(found)
    reading.invariants()
    reading.commands.clear()
    return reading, found


def positions(reading: Reading) -> list[int]:
    reading.invariants()
    return [each.position for each in reading.take(lambda buffer: buffer.take_messages(99))]


def test_what_is_to_be_read_again_is_asked_for_also_when_a_search_for_what_follows_is_under_way() -> None:
    reading, found = opened()
    reading.received(found, batch(0, 5))
    reading.lost(found)
    search = reading.come_back()
    assert search is not None
    assert asked(search).request.position == 5
    reading.rewind(2)
    assert not search.granted(place(5)), "nobody wants it any more"
    assert reading.state is State.RETURNING
    again = reading.come_back()
    assert again is not None
    assert asked(again).request.position == 2
    back = place(2)
    assert again.granted(back)
    reading.received(back, batch(2, 3))
    assert positions(reading) == [2, 3, 4]


def test_it_asks_one_broker_after_the_other_and_a_chosen_one_alone_at_first() -> None:
    reading = Reading("t", 5, 1, 2, BatchBuffer())
    search = reading.open()
    assert asked(search).broker.id == 1
    assert asked(search).request.position == 5
    search.refused(AttachSlotsFull(broker=1))
    assert isinstance(search.error, AttachSlotsFull)
    assert (search.wants, reading.state) == (None, State.NEW)
    search = reading.open()
    asked(search)
    found = place()
    assert search.granted(found)
    reading.lost(found, BrokerUnavailable(address="it"))
    again = reading.come_back()
    assert again is not None
    order = []
    while again.wants is not None:
        order.append(asked(again).broker.id)
        again.refused(BrokerUnavailable(address="it"))
    assert order == [1, 2, 0], "a chosen one first, then in turn"
    assert reading.state is State.RETURNING, "an outage: it tries again"
    assert reading.come_back() is not None


def test_it_comes_back_to_the_message_that_is_due_and_gives_none_twice() -> None:
    reading, first = opened("end", at=40)
    reading.received(first, batch(40, 3))
    reading.lost(first)
    search = reading.come_back()
    assert search is not None
    assert reading.come_back() is None, "it is on the way"
    assert asked(search).request.position == 43
    second = place(40, 99)
    assert search.granted(second)
    assert reading.commands.pop() == GoOn(first, second)
    reading.received(first, batch(43, 9))       # of the place that it left
    reading.received(second, batch(40, 5))
    assert positions(reading) == [40, 41, 42, 43, 44]


def test_what_is_passed_over_is_told_and_not_skipped() -> None:
    reading, found = opened()
    reading.received(found, batch(0, 2))
    reading.received(found, batch(3, 2))
    assert positions(reading) == [0, 1]
    with pytest.raises(PositionLost) as told:
        positions(reading)
    assert told.value.details == {"position": 2, "first_available": 3}
    reading.received(found, batch(2, 2))
    with pytest.raises(PositionLost):
        positions(reading)
    assert reading.seek("beginning").granted(place())
    assert reading.state is State.READING


def test_a_start_that_is_to_come_stays_where_it_is() -> None:
    reading, found = opened(6, at=4)
    reading.received(found, batch(4, 1))
    assert (reading.position(), positions(reading)) == (6, [])
    reading.received(found, batch(5, 3))
    assert positions(reading) == [6, 7]


@pytest.mark.parametrize("run", [1, 2])
def test_an_end_behind_where_it_was_is_a_loss_in_another_run_only(run: int) -> None:
    reading, first = opened()
    reading.received(first, batch(0, 5))
    reading.lost(first)
    search = reading.come_back()
    assert search is not None
    asked(search)
    kept = search.granted(place(3, end=3, run=run))
    assert kept == (run == 1)
    assert positions(reading) == [0, 1, 2, 3, 4], "what it had is given out"
    if run == 2:
        with pytest.raises(RangeLost):
            positions(reading)


def test_a_seek_that_is_refused_or_given_up_changes_nothing() -> None:
    reading, found = opened()
    reading.received(found, batch(0, 3))
    search = reading.seek(100)
    asked(search)
    search.refused(PositionLost(position=100, first_available=200))
    assert isinstance(search.error, PositionLost)
    search = reading.seek(100)
    asked(search)
    reading.give_up(search)
    assert not search.granted(place(100))
    assert reading.place is found
    assert positions(reading) == [0, 1, 2]
    moved = place(100)
    search = reading.seek(100)
    asked(search)
    assert search.granted(moved)
    assert [each for each in reading.commands if isinstance(each, Follow | Leave)] == [Follow(moved), Leave(found)]
    assert positions(reading) == []


def test_a_seek_overtakes_who_comes_back() -> None:
    reading, first = opened()
    reading.lost(first)
    back, search = reading.come_back(), reading.seek(7)
    assert back is not None
    asked(back), asked(search)
    assert search.granted(place(7))
    assert not back.granted(place(0))
    assert reading.position() == 7


def test_in_another_topic_of_the_name_it_goes_on_by_its_own_wish_only() -> None:
    reading, first = opened()
    reading.lost(first, UnknownTopic(topic="t"))
    search = reading.come_back()
    assert search is not None
    assert asked(search).request.seen == first.seen
    search.refused(TopicRecreated(topic="t"))
    with pytest.raises(TopicRecreated):
        positions(reading)
    search = reading.seek("beginning")
    assert asked(search).request.seen == pb.TopicIdentity()
    assert search.granted(place(created=8))
    assert reading.seen.created_ns == 8


def test_what_does_not_come_back_ends_it_after_what_it_has() -> None:
    reading, found = opened()
    reading.received(found, batch(0, 1))
    reading.lost(found, DamagedData("damaged", topic="t"))
    assert positions(reading) == [0]
    with pytest.raises(DamagedData):
        positions(reading)
    assert reading.come_back() is None


@pytest.mark.parametrize("error", [AttachSlotsFull(broker=1), BrokerUnavailable(address="it")])
def test_what_stands_against_attaching_lets_another_transport_read(error: CxlmqError) -> None:
    reading, found = opened()
    reading.hands_over = True
    reading.lost(found)
    search = reading.come_back()
    assert search is not None
    while search.wants is not None:
        asked(search)
        search.refused(error)
    handed = [each for each in reading.commands if isinstance(each, HandOver)]
    assert len(handed) == isinstance(error, AttachSlotsFull)
    if handed:
        assert reading.come_back() is None, "somebody else is asked"
        reading.not_handed_over(search, BrokerUnavailable(address="it"))
    assert reading.come_back() is not None


def test_a_member_says_that_it_is_there_before_it_comes_back() -> None:
    reading, found = opened()
    reading.introduce = lambda request: setattr(request, "member", 5)
    reading.lost(found)
    search = reading.come_back()
    assert search is not None
    assert search.wants == Renew()
    search.renewed()
    assert asked(search).request.member == 5


def test_what_was_claimed_before_somebody_sought_is_not_put_back() -> None:
    reading, found = opened()
    reading.received(found, batch(0, 5))
    buffer = reading.buffer
    turn = buffer.turn
    claimed = reading.take(BatchBuffer.claim)
    search = reading.seek(3)
    asked(search)
    moved = place(3)
    assert search.granted(moved)
    buffer.put_back(claimed, turn)
    buffer.gave(5, turn)
    assert buffer.handed is None
    reading.received(moved, batch(3, 2))
    assert positions(reading) == [3, 4]


def test_a_place_that_comes_when_it_is_closed_is_left() -> None:
    reading = Reading("t", "end", None, 0, BatchBuffer())
    search = reading.open()
    asked(search)
    reading.close()
    assert not search.granted(place())
    assert isinstance(search.error, ClosedError)
    with pytest.raises(ClosedError):
        positions(reading)
