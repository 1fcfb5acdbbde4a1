"""Where a broker lets a reader begin: at what it asked for, or with a word about what is gone."""

from typing import Any

import pytest

from broker.errors import BrokerUnavailable, TopicRecreated
from broker.proto import cxlmq_pb2 as pb
from tests.manual_cluster import ManualCluster, drive


@pytest.mark.parametrize("start", [{"position": 2}, {"beginning": True}])
@pytest.mark.parametrize("copies", [False, True])
def test_a_place_that_is_granted_further_on_is_no_place(
        start: dict[str, Any], copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a head that gives away more than its frontier says: what lies between must not be passed over in silence."""
    cluster = ManualCluster()
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish_all(session, range(5))
    cluster.settle()
    broker = cluster.brokers[0]
    cursors, service = broker.cursors, broker.reading_service
    free, opening = len(cursors._free), cursors.open
    monkeypatch.setattr(cursors, "open", lambda key, index, *rest: opening(key, index + 1, *rest))
    request = pb.SubscribeRequest(topic=topic.name, **start)
    if "position" in start:
        with pytest.raises(BrokerUnavailable) as told:
            drive(service.place(request, topic, (1, 0), copies))
        assert told.value.comes_back
        assert len(cursors._free) == free, "who is refused holds nothing"
        monkeypatch.undo()
    cursor, reader = drive(service.place(request, topic, (1, 0), copies))
    assert reader.position_of(reader.index) <= service.described(topic, reader).position
    cursors.close(cursor)


def test_a_reader_of_another_topic_of_the_name_is_told_so() -> None:
    cluster = ManualCluster()
    topic = cluster.create()
    request = pb.SubscribeRequest(topic=topic.name, seen=pb.TopicIdentity(run_id=1, created_ns=topic.created_ns + 1))
    with pytest.raises(TopicRecreated):
        cluster.brokers[0].reading_service.topic_of(request)
