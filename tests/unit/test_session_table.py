"""Sessions of one broker: openings that meet, that are given up, and that look for where their batches are."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.errors import SessionFenced, SessionTableFull
from broker.layout import SessionState
from broker.own_line import SESSIONS_WORD
from broker.sessions import ENTRIES_AT_ONCE, UNKNOWN_POSITION, SessionTable
from sim.cxl.memory import Role
from tests.manual_cluster import ManualCluster

SECONDS = 15.0


class Table:
    """A session table of two slots whose openings have to wait for the sequencer, as in a broker."""

    def __init__(self) -> None:
        self.cluster = ManualCluster(brokers=1, session_count_max=2)
        topic = self.cluster.create()
        self.key = topic.generation << 16 | topic.number
        self.sessions = SessionTable(self.cluster.door(0, Role.ROLE_BROKER), self.cluster.layout, 0, self._announce)

    def _announce(self) -> None:
        at = self.cluster.layout.offset_of("broker", 0) + 8 * SESSIONS_WORD
        self.cluster.memory.store_word(at, self.cluster.memory.load_word(at) + 1)

    def open(self, client: int, epoch: int = 1) -> Awaitable[dict[str, int]]:
        return self.sessions.open(client, epoch, self.key, 1)

    def idle(self, slot: int) -> None:
        """The publisher of a session is long gone."""
        self.sessions._idle_since[slot] -= 60

    def owners(self) -> dict[int, int]:
        """client -> slot of the sessions that are open."""
        return {line["client_id"]: slot for slot in range(2)
                if (line := self.sessions.line(slot))["state"] & 0xFF == SessionState.SESSION_OPEN}


def with_a_sequencer(run: Callable[[Table], Awaitable[None]], stepping: bool = True) -> None:
    """Run a test beside the stages."""
    async def main() -> None:
        table = Table()

        async def step() -> None:
            while True:
                if stepping:
                    table.cluster.step()
                await asyncio.sleep(0.0003)

        stepper = asyncio.create_task(step())
        try:
            await asyncio.wait_for(run(table), SECONDS)
        finally:
            stepper.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("free", [0, 1])
def test_openings_that_meet_get_a_slot_each_or_are_refused(free: int) -> None:
    async def run(table: Table) -> None:
        for client in range(1, 3 - free):
            opened = await table.open(client)
            table.idle(opened["slot"])
        found: list[Any] = await asyncio.gather(*(table.open(client) for client in range(101, 106)), return_exceptions=True)
        opened_slots = [each["slot"] for each in found if isinstance(each, dict)]
        assert sorted(opened_slots) == [0, 1]
        assert [type(each) for each in found if not isinstance(each, dict)] == [SessionTableFull] * 3
        assert sorted(table.owners().values()) == [0, 1]
        for client, each in zip(range(101, 106), found, strict=True):
            if isinstance(each, dict):
                assert table.owners()[client] == each["slot"]

    with_a_sequencer(run)


def test_a_session_that_is_closed_twice_takes_no_later_one_with_it() -> None:
    async def run(table: Table) -> None:
        opened = await table.open(1)
        closing = [asyncio.create_task(table.sessions.close(opened["slot"])) for _ in range(3)]
        await closing[0]
        again = await table.open(2)
        await asyncio.gather(*closing)
        assert table.owners() == {2: again["slot"]}
        await table.sessions.close(again["slot"])       # still known: it can be closed
        assert table.owners() == {}

    with_a_sequencer(run)


def test_an_opening_that_is_cancelled_leaves_nothing_open() -> None:
    async def run(table: Table) -> None:
        for client in (1, 2):
            opening = asyncio.ensure_future(table.open(client))
            await asyncio.sleep(0)
            assert table.owners() == {client: client - 1}
            opening.cancel()
            await asyncio.wait([opening])
            assert table.owners() == {}
        # Their slots are used again at once, with the sequencer's answer this time.
        stepper = asyncio.ensure_future(_stepping(table))
        opened = [await table.open(client) for client in (11, 12)]
        stepper.cancel()
        assert table.owners() == {11: opened[0]["slot"], 12: opened[1]["slot"]}

    async def _stepping(table: Table) -> None:
        while True:
            table.cluster.step()
            await asyncio.sleep(0.0003)

    with_a_sequencer(run, stepping=False)


def test_a_refused_opening_leaves_its_slot_free() -> None:
    async def run(table: Table) -> None:
        first = await table.open(1, epoch=5)
        table.sessions.attach(first["slot"])
        for _ in range(3):
            with pytest.raises(SessionFenced) as refused:
                await table.open(1, epoch=4)
            assert refused.value.newest_epoch == 5
        assert table.owners() == {1: first["slot"]}
        assert (await table.open(2))["slot"] != first["slot"]

    with_a_sequencer(run)


def test_where_batches_are_is_found_in_one_pass_that_lets_others_run() -> None:
    cluster = ManualCluster(brokers=1, order_entry_count=1 << 13, ring_slot_count=1 << 13, region_bytes=8 << 20)
    topic = cluster.create()
    old, others = cluster.open_session(topic, client=7), cluster.open_session(topic, client=8)
    cluster.publish_all(old, range(3))
    for first in range(0, 2 * ENTRIES_AT_ONCE, 512):
        for sequence in range(first, first + 512):
            assert cluster.publish(others, sequence) == 0
        cluster.settle()
        cluster.take_acks(others)
    reader, looks = cluster.reader(topic), []

    class Counting:
        frontiers = staticmethod(reader.frontiers)

        def find_batches(self, *arguments: Any) -> int:
            looks.append(arguments[4])
            return int(reader.find_batches(*arguments))

    turns = 0

    async def main() -> list[int]:
        async def others_run() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.ensure_future(others_run())
        try:
            return await cluster.brokers[0].sessions.positions(
                Counting(), 7, topic.generation << 16 | topic.number, 1, range(256))    # type: ignore[arg-type]
        finally:
            beside.cancel()

    assert asyncio.run(main()) == [0, 1, 2] + [UNKNOWN_POSITION] * 253
    assert looks == [2 * ENTRIES_AT_ONCE + 3, ENTRIES_AT_ONCE + 3, 3]      # however many are looked for
    assert turns >= 2
