"""What a broker looks after goes on whatever happens around it."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from broker import server
from broker.errors import BrokerUnavailable
from broker.server import BrokerServer


def looking_after(versions: list[int | Exception], monkeypatch: pytest.MonkeyPatch) -> tuple[BrokerServer, list[str]]:
    """A server whose topics' version is read as given, and a list of what it did."""
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.001)
    found, done = BrokerServer.__new__(BrokerServer), list[str]()

    def version() -> int:
        now = versions.pop(0) if len(versions) > 1 else versions[0]
        if isinstance(now, Exception):
            raise now
        return now

    async def note(what: str) -> None:
        done.append(what)

    made: Any = found
    made.node = SimpleNamespace(is_head=False, topics=SimpleNamespace(version=version, entries=list),
                                config=SimpleNamespace(session_lease_seconds=1))
    made._places = set()
    made.sessions = SimpleNamespace(end_idle=lambda seconds: note("sessions"))
    made.groups = SimpleNamespace(look_after=lambda: note("groups"))
    monkeypatch.setattr("broker.server.Removals", lambda node: SimpleNamespace(look_after=lambda: note("removals")))
    made._tell_of_deletions = lambda: done.append("deletions")
    made._write_down_alterations = lambda: note("alterations")
    return found, done


async def _until(found: BrokerServer, there: Callable[[], bool]) -> None:
    """Look after things until something is there, or nobody looks any more."""
    found._caretaker = asyncio.create_task(found._look_after())
    try:
        async with asyncio.timeout(60):
            while not there() and not found._caretaker.done():
                await asyncio.sleep(0.001)
        found.raise_if_failed()
    finally:
        found._caretaker.cancel()


def test_a_takeover_stops_nothing_that_is_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = looking_after([1, BrokerUnavailable(address="head"), 2, 2], monkeypatch)
    asyncio.run(_until(found, lambda: len(done) >= 8))
    assert done[:8] == ["deletions", "alterations", "sessions", "groups", "removals", "deletions", "alterations",
                        "sessions"]


def test_what_ends_the_looking_after_is_not_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = looking_after([1, ValueError("a mistake")], monkeypatch)
    with pytest.raises(ValueError, match="a mistake"):
        asyncio.run(_until(found, lambda: False))
