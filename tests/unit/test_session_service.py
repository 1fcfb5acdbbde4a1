"""What a broker answers to publishers: sessions that go on where the last one ended, and nobody uses another one's."""

import pytest

from broker.errors import (
    AttachSlotsFull,
    BadRequest,
    BadTopicOptions,
    CxlmqError,
    SessionFenced,
    SessionUnknown,
    TopicRecreated,
    UnknownTopic,
)
from broker.proto import cxlmq_pb2 as pb
from broker.session_service import SessionService
from broker.topics import TopicEntry
from tests.manual_cluster import ManualCluster, Session, drive

SLOTS = 4


def cluster_of_two() -> tuple[ManualCluster, TopicEntry, SessionService]:
    cluster = ManualCluster(attach_slot_count=2 * SLOTS, region_bytes=4 << 20)
    return cluster, cluster.create(), cluster.brokers[0].session_service


def request_of(topic: TopicEntry, epoch: int = 1, **changes: int) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(**{"topic": topic.name, "client_id": 7, "session_epoch": epoch, "ack": 1,     # type: ignore[arg-type]
                                    "seen": pb.TopicIdentity(run_id=1, created_ns=topic.created_ns), **changes})


def opened_by(entry: TopicEntry, session: pb.Session, **changes: int | str) -> pb.PublishOpen:
    return pb.PublishOpen(**{"topic": entry.name, "client_id": 7, "session_slot": session.session_slot, "ack": 1,      # type: ignore[arg-type]
                             "session_epoch": session.session_epoch, "seen": session.topic, **changes})


def published(cluster: ManualCluster, topic: TopicEntry, session: pb.Session, sequences: range) -> None:
    streams = {broker.number: broker.session_service.open_stream(opened_by(topic, session))[1]
               for broker in cluster.brokers}
    cluster.publish_all(Session(7, session.session_epoch, session.session_slot, topic, 1, streams=streams), sequences)
    for broker in cluster.brokers:
        broker.session_service.close_stream(opened_by(topic, session), streams[broker.number])


@pytest.mark.parametrize("broker", [0, 1])
def test_a_session_says_where_the_last_one_ended(broker: int) -> None:
    cluster, topic, service = cluster_of_two()
    first = drive(service.open(request_of(topic)))
    assert (first.high_water, list(first.positions), first.topic_number) == (0, [], topic.number)
    published(cluster, topic, first, range(9))
    again = drive(cluster.brokers[broker].session_service.open(request_of(topic, 2, resume_epoch=1, resume_from=4)))
    assert again.high_water == 9
    assert list(again.positions) == [4, 5, 6, 7, 8]
    assert again.resumed_position == 9
    with pytest.raises(SessionFenced):
        service.check(opened_by(topic, first))


def test_sessions_between_that_the_client_never_heard_of_change_nothing() -> None:
    cluster, topic, service = cluster_of_two()
    first = drive(service.open(request_of(topic)))
    published(cluster, topic, first, range(5))
    drive(service.open(request_of(topic, 2, resume_epoch=1)))           # its answer was lost
    again = drive(service.open(request_of(topic, 3, resume_epoch=1)))
    assert (again.high_water, list(again.positions), again.resumed_position) == (5, [0, 1, 2, 3, 4], 5)


def test_a_session_serves_only_whose_it_is() -> None:
    cluster, topic, service = cluster_of_two()
    session = drive(service.open(request_of(topic)))
    other = cluster.create("other")
    refused: list[tuple[type[CxlmqError], dict[str, int | str]]] = [
        (SessionUnknown, {"client_id": 8}), (SessionUnknown, {"session_epoch": 2}),
        (SessionUnknown, {"session_slot": 1 << 20}), (BadTopicOptions, {"ack": 2}), (UnknownTopic, {"topic": "none"})]
    for error, changes in refused:
        with pytest.raises(error):
            service.check(opened_by(topic, session, **changes))
    with pytest.raises(SessionUnknown):
        service.check(pb.PublishOpen(topic=other.name, client_id=7, session_slot=session.session_slot, ack=1,
                                     session_epoch=1))
    assert service.check(opened_by(topic, session)) == topic
    drive(service.close(pb.CloseSessionRequest(client_id=8, session_slot=session.session_slot, session_epoch=1)))
    assert service.check(opened_by(topic, session)) == topic
    drive(service.close(pb.CloseSessionRequest(client_id=7, session_slot=session.session_slot, session_epoch=1)))
    with pytest.raises(SessionFenced):
        service.open_stream(opened_by(topic, session))


def test_nobody_closes_a_session_without_leave() -> None:
    _, topic, service = cluster_of_two()
    session = drive(service.open(request_of(topic)))

    def refuse(entry: TopicEntry) -> None:
        assert entry == topic
        raise BadRequest(reason="no")

    with pytest.raises(BadRequest):
        drive(service.close(pb.CloseSessionRequest(client_id=7, session_slot=session.session_slot, session_epoch=1),
                            refuse))
    assert service.check(opened_by(topic, session)) == topic


def test_a_client_has_a_number_and_the_topic_that_it_saw() -> None:
    cluster, topic, service = cluster_of_two()
    with pytest.raises(BadRequest):
        drive(service.open(request_of(topic, client_id=0)))
    cluster.delete()
    cluster.create()
    with pytest.raises(TopicRecreated):
        drive(service.open(request_of(topic)))


def test_slots_are_handed_out_until_there_is_none() -> None:
    cluster, topic, service = cluster_of_two()
    session = drive(service.open(request_of(topic)))
    request = pb.AttachPublisherRequest(open=opened_by(topic, session), pid=1, presence=1)
    slots = {service.attach(request).slot for _ in range(SLOTS)}
    assert len(slots) == SLOTS
    with pytest.raises(AttachSlotsFull):
        service.attach(request)
    cluster.alive.add(1)
    cluster.brokers[0].attached_clients.tend()
    cluster.settle()
    with pytest.raises(AttachSlotsFull):
        service.attach(request)
    cluster.alive.clear()
    cluster.brokers[0].attached_clients.tend()          # its process died
    cluster.settle()
    assert service.attach(request).slot in slots
