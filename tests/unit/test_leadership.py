"""Who becomes head: one of those that try at once, and whoever lost or was replaced lets go of its bank, in time."""

from collections.abc import Callable

import pytest

from broker.leadership import Leadership
from broker.records import record_bytes, unpack
from broker.stages.seat import Seat
from broker.stages.takeover import Takeover
from sim.cxl.memory import Role
from tests.manual_cluster import ManualCluster, payload_of


class Eager:
    """A membership that wants to whenever it is asked; it counts beats."""

    def __init__(self, cluster: ManualCluster) -> None:
        self.cluster, self.beats, self.eager = cluster, 0, True

    def beat(self) -> None:
        self.beats += 1

    def wanted(self) -> int | None:
        return self.cluster.control if self.eager else None

    def close(self) -> None:
        pass


class Trying:
    """One broker's leadership over real seats; its takeovers are stepped by hand."""

    def __init__(self, cluster: ManualCluster, broker: int, is_gone: Callable[[int], bool] = lambda owner: False) -> None:
        self.broker, self.membership, self.said = cluster.brokers[broker], Eager(cluster), list[str]()
        self.seats = [Seat(cluster.door(broker, Role.ROLE_SEQUENCER), cluster.layout) for _ in range(2)]
        self.takeovers: list[Takeover] = []
        self.leadership = Leadership(self.broker, self.membership, is_gone, self.seats, run=self.takeovers.append,
                                     say=self.said.append)

    def step(self) -> None:
        for seat in self.seats:
            seat.step_once()


def owners(cluster: ManualCluster) -> dict[int, int]:
    """bank -> broker of those that are held."""
    words = {bank: cluster.memory.load_word(cluster.layout.offset_of("bank_owner", bank))
             for bank in range(cluster.layout.numbers["bank_count"])}
    return {bank: (word & 0xFF) - 1 for bank, word in words.items() if word}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_that_try_at_once_one_serves_and_the_other_lets_go(order: tuple[int, int]) -> None:
    cluster = ManualCluster(brokers=3)
    tries = [Trying(cluster, broker) for broker in (1, 2)]
    for each in tries:
        each.leadership.tick()
    assert [each.leadership.tries for each in tries] == [True, True]
    assert sorted(owners(cluster).values()) == [1, 2]
    for _ in range(1000):
        for which in order:
            (takeover,) = tries[which].takeovers
            if not takeover.done and not takeover.lost:
                takeover.step_once()
    for each in tries:
        each.membership.eager = False
        each.leadership.tick()
    (head,) = [each for each in tries if each.leadership.serves]
    assert not any(each.leadership.tries for each in tries)
    assert list(owners(cluster).values()) == [head.broker.broker]
    assert not any(seat.free for seat in head.seats)
    assert all(seat.free for each in tries if each is not head for seat in each.seats)


def fences(cluster: ManualCluster, broker: int, role: int) -> int:
    """How many one role of a broker has made."""
    at = cluster.layout.offset_of("role_statistics", broker, int(role))
    return int(unpack("AccessStatistics", cluster.memory.read_bytes(at, record_bytes("AccessStatistics")))["fences"])


def test_what_a_lost_takeover_flushed_is_in_memory_before_its_bank_is_for_others() -> None:
    # Else it may come there when the next one has filled the bank: a committed frontier went back.
    cluster = ManualCluster(brokers=3)
    first, second = Trying(cluster, 1), Trying(cluster, 2)
    first.leadership.tick()
    first.takeovers[0].step_once()          # it has begun to fill its bank
    second.leadership.tick()
    before = fences(cluster, 1, Role.ROLE_ADMIN)
    first.takeovers[0].step_once()
    assert first.takeovers[0].lost
    assert fences(cluster, 1, Role.ROLE_ADMIN) == before + 1


def test_what_a_replaced_heads_stages_flushed_is_in_memory_before_its_seats_are_free() -> None:
    cluster = ManualCluster(brokers=3)
    cluster.create()
    first, second = Trying(cluster, 1), Trying(cluster, 2)
    for each in (first, second):
        each.leadership.tick()
        while not each.takeovers[-1].done:
            each.takeovers[-1].step_once()
        each.leadership.tick()
    for seat, role in zip(first.seats, (Role.ROLE_SEQUENCER, Role.ROLE_RECLAIM), strict=True):
        before = fences(cluster, 1, role)
        seat.step_once()
        assert seat.free
        assert fences(cluster, 1, role) == before + 1


def test_a_takeover_is_waited_for_and_not_begun_twice() -> None:
    cluster = ManualCluster(brokers=2)
    trying = Trying(cluster, 1)
    for _ in range(3):
        trying.leadership.tick()
    assert len(trying.takeovers) == 1
    assert trying.membership.beats == 3
    assert trying.leadership.term is None


def test_a_replaced_head_keeps_its_bank_until_its_seats_are_free() -> None:
    cluster = ManualCluster(brokers=3)
    session = cluster.open_session(cluster.create())
    first, second = Trying(cluster, 1), Trying(cluster, 2)
    for each in (first, second):
        each.leadership.tick()
        while not each.takeovers[-1].done:
            each.takeovers[-1].step_once()
        each.leadership.tick()
    assert second.leadership.serves
    assert not first.leadership.serves
    assert sorted(owners(cluster).values()) == [1, 2]           # its stages may still be in a step
    first.membership.eager = False
    first.leadership.tick()
    assert first.leadership.term is not None
    assert first.broker.leading is not None
    first.step()                                                # they look, and stop
    first.leadership.tick()
    assert first.leadership.term is None
    assert first.broker.leading is None
    assert list(owners(cluster).values()) == [2]
    assert any("is over" in each for each in first.said)
    cluster.term = second.broker.leading
    assert cluster.publish(session, 0, [payload_of(session, 0)], broker=0) == 0
    cluster.stages = [stage for broker in cluster.brokers for stage in (*broker.stages().values(),)] + [*second.seats]
    cluster.settle()
    assert [ack.position for ack in cluster.take_acks(session)] == [0]


def test_a_bank_of_a_process_that_may_wake_up_is_not_taken() -> None:
    cluster = ManualCluster(brokers=2)
    for bank in range(cluster.layout.numbers["bank_count"]):
        cluster.memory.store_word(cluster.layout.offset_of("bank_owner", bank), 77 << 8 | 1)
    trying = Trying(cluster, 1)
    trying.leadership.tick()
    assert not trying.takeovers
    gone = Trying(cluster, 1, lambda owner: owner == 77 << 8 | 1)
    gone.leadership.tick()
    assert len(gone.takeovers) == 1
