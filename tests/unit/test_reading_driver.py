"""What drives a reading: whoever tells it something holds the lock, for threads take out of its buffer meanwhile."""

from typing import Any

import pytest

from broker.errors import AttachSlotsFull, BrokerUnavailable, CxlmqError
from client.attached_subscriber import AttachedSubscriberEngine
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.grpc_subscriber import SubscriberEngine
from client.subscribing.commands import HandOver
from client.subscribing.driver import ReadingDriver
from client.subscribing.reading import Reading
from client.subscribing.search import Search

TOLD = ("search_ended", "give_up", "not_handed_over", "fail", "open", "come_back")


def watched(engine: ReadingDriver, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of its reading is told, and that the lock is held then."""
    told: list[str] = []

    def held(name: str) -> Any:
        call = getattr(engine.reading, name)

        def told_it(*arguments: Any, **options: Any) -> Any:
            told.append(name)
            assert engine.lock._is_owned(), f"{name} without the lock"  # type: ignore[attr-defined]
            return call(*arguments, **options)

        return told_it

    for name in TOLD:
        monkeypatch.setattr(engine.reading, name, held(name))
    return told


def engines() -> list[ReadingDriver]:
    return [SubscriberEngine("t", "nowhere", None, "beginning", None, 1 << 20),
            AttachedSubscriberEngine("t", "nowhere", None, "beginning", None, 1 << 20)]


@pytest.mark.parametrize("which", [0, 1])
def test_that_there_is_no_broker_is_told_under_the_lock(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()[which]
    told = watched(engine, monkeypatch)

    async def nobody() -> list[BrokerAddress]:
        return []

    monkeypatch.setattr(engine, "_brokers", nobody)
    with pytest.raises(BrokerUnavailable):
        engine.client_loop.run(engine.open())
    assert "search_ended" in told
    assert not engine.opened


def test_that_nobody_else_reads_is_told_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()[1]
    told = watched(engine, monkeypatch)
    monkeypatch.setattr(AttachedSubscriberEngine, "slot", object())
    search = Search(Reading("t", "beginning", None, 0, BatchBuffer()), "beginning", engine.reading.seen, "the cluster")
    error: CxlmqError = AttachSlotsFull(broker=1)
    engine.client_loop.run(engine._hand_over(HandOver(search, error)))
    assert told == ["not_handed_over"]
