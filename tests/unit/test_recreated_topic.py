"""A topic that was deleted and made again has a ring of its own: what was meant for the first one takes no place in it."""

import pytest

from broker.layout import AttachState
from broker.records import pack
from broker.stages.attach import AttachStage
from broker.stages.receiver import RECEIVED, TOPIC_CLOSED
from sim.cxl.memory import Role
from tests.manual_cluster import LEASE_NS, MIB, ManualCluster, encode_messages
from tests.stress.test_attach_fuzz import Attached

RING = 16


def submitted(cluster: ManualCluster, stage: AttachStage, count: int) -> Attached:
    """A client that wrote `count` descriptors which its broker has not seen."""
    client = Attached(cluster, stage, 1, 0)
    client.open(cluster.table.find("topic"))
    stage.step_once()                       # its leases
    for number in range(count):
        fields = client.descriptor(encode_messages([b"meant for the first one"]))
        assert fields is not None
        client.used += -(-fields["payload_bytes"] // 64) * 64
        cluster.memory.write_line_bytes(client.at("attach_descriptor", number), pack(
            "Descriptor", commit=client.generation << 48 | number + 1, **fields))
        client.sequence += 1
    return client


@pytest.mark.parametrize("count", [0, 1, RING // 2, RING])
def test_a_client_of_the_first_topic_takes_no_slot_and_no_segment_of_the_second(count: int) -> None:
    cluster = ManualCluster(brokers=1, attach_slot_count=4, region_bytes=2 * MIB, ring_slot_count=RING, order_entry_count=256)
    stage = AttachStage(cluster.door(0, Role.ROLE_RECEIVER), cluster.brokers[0].log, cluster.brokers[0].acks,
                        cluster.clock, LEASE_NS)
    cluster.create()
    client = submitted(cluster, stage, count)
    cluster.delete()                        # the attach stage looks only when both has happened
    topic = cluster.create()
    if count == 0:
        client.word("using", 1)             # it has begun its second lease, so one more is due
    stage.step_once()
    assert cluster.brokers[0].log.topic_state(topic.number)["segments"] == 0
    cluster.clock.advance(60_000_000)
    stage.step_once()
    cluster.settle()
    assert client.state == AttachState.ATTACH_FENCED
    assert cluster.brokers[0].log.topic_state(topic.number)["head"] == 0
    session = cluster.open_session(topic, client=9)
    cluster.publish_all(session, range(5 * RING))
    assert [sequence for _, _, sequence in cluster.order_of(topic)] == list(range(5 * RING))


def test_a_stream_of_the_first_topic_takes_no_slot_of_the_second() -> None:
    cluster = ManualCluster(brokers=1, ring_slot_count=RING, order_entry_count=256)
    old = cluster.open_session(cluster.create(), client=7)
    cluster.delete()
    topic = cluster.create()
    assert [cluster.publish(old, sequence) for sequence in range(RING)] == [TOPIC_CLOSED] * RING
    session = cluster.open_session(topic, client=9)
    assert cluster.publish(session, 0) == RECEIVED
    cluster.publish_all(session, range(1, 5 * RING))
    assert len(cluster.order_of(topic)) == 5 * RING
