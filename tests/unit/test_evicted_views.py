"""A reader that views memory itself is shut out before its place goes, and what it views is waited for."""

from dataclasses import dataclass
from typing import Any

import pytest

from broker.layout import AttachState
from broker.reader import ReadError, ReadStatus
from broker.stages.attach import AttachStage
from client.attached_reader import AttachedReader
from sim.cxl.memory import Role
from tests.manual_cluster import KIB, LEASE_NS, ManualCluster, Session, drive

CHECK_NS = 60_000_000


@dataclass
class Setting:
    """A cluster whose first broker serves one attached reader, and a topic with a small retention."""

    cluster: ManualCluster
    stage: AttachStage
    session: Session
    cursor: int
    slot: int
    reader: AttachedReader
    published: int = 0

    def publish(self, count: int) -> int:
        """Publish until one is refused; how many were received."""
        for done in range(count):
            for _ in range(8):
                status = self.cluster.publish(self.session, self.published, [b"%d" % self.published * 500])
                self.settle()
                if status == 0:
                    break
            else:
                return done
            self.published += 1
        return count

    def settle(self) -> None:
        """Let the stage look after its slots as well."""
        self.cluster.clock.advance(CHECK_NS)
        self.cluster.settle()

    @property
    def state(self) -> int:
        """Of the reader's slot."""
        return self.cluster.memory.load_word(self.cluster.layout.offset_of("attach_line", self.slot)) & 0xFF


def make(views: bool) -> Setting:
    cluster = ManualCluster(region_bytes=640 * KIB, order_entry_count=256, attach_slot_count=2)
    broker = cluster.brokers[0]
    stage = AttachStage(cluster.door(0, Role.ROLE_RECEIVER), broker.log, broker.acks, cluster.clock, LEASE_NS)
    cluster.stages.append(stage)
    topic = cluster.create(retention_bytes=8000)
    cursor, index = drive(broker.cursors.open(topic.generation << 16 | topic.number, 0, 1, presence=1))
    slot, generation = stage.open_subscriber(topic.number, topic.generation, cursor, index, 1, 1)
    own: Any = cluster.door(0, Role.ROLE_CLIENT)
    reader = AttachedReader(own, cluster.layout, own, cluster.layout.offset_of("attach_client", slot), slot, generation,
                            topic.number, topic.generation, index, topic.name, views)
    reader.beat()
    return Setting(cluster, stage, cluster.open_session(topic), cursor, slot, reader)


@pytest.mark.parametrize("views", [True, False])
def test_a_reader_that_stands_still_is_shut_out_and_its_topic_goes_on(views: bool) -> None:
    setting = make(views)
    assert setting.publish(500) == 500
    assert setting.state == AttachState.ATTACH_FENCED
    with pytest.raises(ReadError) as lost:
        setting.reader.take(10)
    assert lost.value.status == ReadStatus.READ_LOST and not setting.reader.is_open()


def test_what_is_viewed_is_waited_for_and_then_goes() -> None:
    setting = make(views=True)
    assert setting.publish(3) == 3
    seen = setting.reader.take(2)
    received = setting.publish(500)
    assert received < 300 and setting.state == AttachState.ATTACH_FENCED
    assert [bytes(each.payload)[8:9] for each in seen] == [b"0", b"1"]
    del seen[0]
    setting.settle()
    assert setting.publish(5) == 0, "one is still viewed"
    assert bytes(seen[0].payload)[8:9] == b"1"
    seen.clear()
    setting.settle()
    assert setting.publish(300) == 300


def test_what_is_about_to_be_viewed_when_the_slot_is_fenced_is_not_given_out() -> None:
    setting = make(views=True)
    setting.publish(5)
    at = setting.cluster.layout.offset_of("attach_line", setting.slot)
    state = setting.cluster.memory.load_word(at)
    setting.cluster.memory.store_word(at, state >> 8 << 8 | AttachState.ATTACH_FENCED)
    assert setting.reader.take(3) == []
    client = setting.cluster.record("AttachClientLine", "attach_client", setting.slot)
    assert client["released_index"] == client["using_lease"], "nothing has to be waited for"


def test_a_reader_that_copies_holds_nothing_of_what_it_was_given() -> None:
    setting = make(views=False)
    setting.publish(3)
    seen = setting.reader.take(3)
    assert setting.publish(500) == 500
    assert [bytes(each.payload)[8:9] for each in seen] == [b"0", b"1", b"2"]


def test_a_reader_that_leaves_when_it_is_free_leaves_with_its_last_view() -> None:
    setting = make(views=True)
    setting.publish(3)
    seen = setting.reader.take(3)
    setting.reader.leave_when_free()
    assert setting.cluster.record("AttachClientLine", "attach_client", setting.slot)["left"] == 0
    seen.clear()
    assert setting.cluster.record("AttachClientLine", "attach_client", setting.slot)["left"] == 1
