"""A broker that was replaced as head while a call waited stores nothing into a bank that is another's by now."""

from typing import Any

import pytest

from broker.config import TopicConfig
from broker.errors import BrokerUnavailable
from broker.groups import GroupTable
from broker.layout import TopicState
from sim.cxl.memory import Role
from tests.manual_cluster import LEASE_NS, ManualCluster, drive


def bank_bytes(cluster: ManualCluster, bank: int) -> bytes:
    layout = cluster.layout.with_bank(bank)
    first = layout.offset_of("head")
    return cluster.memory.read_bytes(first, layout.offset_of("order_entry", 0, 0) - first)


class Replaced:
    """Two brokers; `now` makes broker 1 head, which is given the old bank for its next term."""

    def __init__(self) -> None:
        self.cluster = ManualCluster(brokers=2)
        self.table = self.cluster.table
        self.old_bank = self.cluster.layout.numbers["bank"]
        self.bytes = b""

    def now(self) -> None:
        self.cluster.take_over(1)
        self.cluster.table.lead(self.cluster.layout.with_bank(self.old_bank))       # broker 0 has not noticed
        self.bytes = bank_bytes(self.cluster, self.old_bank)

    def untouched(self) -> bool:
        return bank_bytes(self.cluster, self.old_bank) == self.bytes


def test_a_topic_that_could_not_be_made_is_taken_back_in_our_own_bank_alone() -> None:
    setting = Replaced()

    def live() -> list[int]:
        setting.now()
        raise BrokerUnavailable("broker 1 took no note of it", address="broker 1")

    config, _ = TopicConfig(name="topic").validate(2)
    with pytest.raises(BrokerUnavailable):
        drive(setting.table.create(config, LEASE_NS, live))
    assert setting.untouched()


def test_a_deletion_that_lost_its_head_says_so() -> None:
    setting = Replaced()
    setting.cluster.create("topic")

    def live() -> list[int]:
        setting.now()
        return []

    with pytest.raises(BrokerUnavailable, match="new head"):
        drive(setting.table.delete("topic", live))
    assert setting.untouched()


@pytest.mark.parametrize("error", [BrokerUnavailable("late", address="broker 1"), KeyboardInterrupt(), GeneratorExit()])
def test_a_creation_that_is_given_up_anywhere_leaves_no_topic(error: BaseException) -> None:
    cluster = ManualCluster(brokers=2)

    asked: list[int] = []

    def live() -> list[int]:
        asked.append(1)
        if len(asked) == 1:                 # whether other deletions are to be finished
            return [0, 1]
        raise error

    config, _ = TopicConfig(name="topic").validate(2)
    with pytest.raises(type(error)):
        drive(cluster.table.create(config, LEASE_NS, live))
    assert cluster.record("TopicLine", "topic", 0)["state"] & 0xFF == TopicState.TOPIC_DELETING
    cluster.settle()
    assert cluster.create("topic").name == "topic"


class Hooked:
    """A reader at whose answer something happens meanwhile."""

    def __init__(self, reader: Any, meanwhile: Any) -> None:
        self.reader, self.meanwhile = reader, meanwhile

    def find(self, position: int) -> int:
        return self.reader.find(position)

    def position_of(self, index: int) -> int:
        return self.reader.position_of(index)

    def frontiers(self) -> dict[str, int]:
        self.meanwhile()
        return self.reader.frontiers()


def groups(cluster: ManualCluster) -> GroupTable:
    return GroupTable(cluster.door(0, Role.ROLE_ADMIN), cluster.layout, cluster.clock.now, lambda: 0,
                      cluster.brokers[0].cursors, 1)


def test_a_group_is_not_placed_by_a_head_that_was_replaced_while_it_waited() -> None:
    setting = Replaced()
    topic, table = setting.cluster.create("topic"), groups(setting.cluster)
    reader = Hooked(setting.cluster.reader(topic), setting.now)
    with pytest.raises(BrokerUnavailable):
        drive(table.join(topic, reader, "g", 1, "one", LEASE_NS, False, lambda: (0, 0)))
    assert setting.untouched()


def test_a_group_that_changed_while_somebody_waited_keeps_the_change() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(10))
    topic, table = session.topic, groups(cluster)
    reader = cluster.reader(topic)
    group = drive(table.join(topic, reader, "g", 1, "one", LEASE_NS, False, lambda: (0, 0)))
    hooked = Hooked(reader, lambda: table.commit(topic, reader, "g", 1, group.member_epoch, 7, LEASE_NS))
    with pytest.raises(BrokerUnavailable, match="changed meanwhile"):
        drive(table.join(topic, hooked, "g", 1, "one", LEASE_NS, False, lambda: (0, 0)))
    assert table.find(topic, "g").position == 7
