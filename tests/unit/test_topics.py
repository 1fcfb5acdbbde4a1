"""Topics come and go while traffic runs; a number that is used again knows nothing of its earlier topic."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator

import pytest

from broker.config import TopicConfig
from broker.errors import (
    BadTopicName,
    BadTopicOptions,
    BrokerUnavailable,
    ClusterReplaced,
    DuplicateTopic,
    TopicRecreated,
    TopicTableFull,
    UnknownTopic,
)
from broker.layout import ResultStatus, TopicState
from broker.proto import cxlmq_pb2 as pb
from broker.reader import ReadError, ReadStatus
from broker.stages.receiver import RECEIVED, TOPIC_CLOSED
from broker.topics import TopicEntry
from tests.manual_cluster import KIB, LEASE_NS, ManualCluster, drive

GOOD = ("a", "A.b-c_9", "x" * 120, "_private", "9", "a..b")
BAD = ("", ".hidden", "__system", "a b", "a/b", "../x", "x" * 121, "ü", "a\n", "a\0", "*", "topic:1", None, 7)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_kept_as_it_is(name: str) -> None:
    cluster = ManualCluster()
    assert cluster.create(name).name == name
    assert cluster.table.find(name).name == name


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_a_bad_name_is_refused_wherever_it_comes(name: str) -> None:
    cluster = ManualCluster()
    with pytest.raises(BadTopicName):
        cluster.create(name)
    with pytest.raises(BadTopicName):
        cluster.table.find(name)
    assert cluster.table.entries() == []


@pytest.mark.parametrize("options", [{"order": 3}, {"ack": 3}, {"ack": 2}, {"ack": 2, "replication_factor": 1},
                                     {"replication_factor": 3}, {"replication_factor": 0}, {"retention_bytes": -2}])
def test_options_that_do_not_fit_together_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(BadTopicOptions):
        ManualCluster(brokers=2).create(**options)


def test_options_are_read_back_as_they_were_given() -> None:
    cluster = ManualCluster()
    cluster.create("kept", order=4, ack=2, replication_factor=2, retention_bytes=-1)
    entry = cluster.table.find("kept")
    assert (entry.order, entry.ack, entry.replication_factor, entry.retention_bytes) == (5, 2, 2, -1)


def test_a_name_is_there_once_and_can_be_used_again_after_deletion() -> None:
    cluster = ManualCluster()
    first = cluster.create("name")
    with pytest.raises(DuplicateTopic):
        cluster.create("name")
    cluster.delete("name")
    with pytest.raises(UnknownTopic):
        cluster.table.find("name")
    with pytest.raises(UnknownTopic):
        cluster.delete("name")
    second = cluster.create("name")
    assert second.number == first.number
    assert second.generation != first.generation
    assert not cluster.table.is_open(first)
    assert cluster.table.is_open(second)


def test_a_full_table_says_so_and_has_room_again_after_a_deletion() -> None:
    cluster = ManualCluster(topic_count_max=4)
    for number in range(4):
        cluster.create(f"t{number}")
    with pytest.raises(TopicTableFull):
        cluster.create("one-more")
    cluster.delete("t2")
    assert cluster.create("one-more").number == 2


def test_topics_of_one_cluster_do_not_see_each_other() -> None:
    cluster = ManualCluster()
    sessions = [cluster.open_session(cluster.create(f"t{number}"), client=number + 1) for number in range(4)]
    for sequence in range(6):
        for session in sessions:
            cluster.publish(session, sequence, broker=sequence % 2)
    cluster.settle()
    for session in sessions:
        assert cluster.order_of(session.topic) == [(session.client, 1, sequence) for sequence in range(6)]


def test_each_topic_of_a_number_begins_at_nothing() -> None:
    cluster = ManualCluster(region_bytes=256 * KIB)
    for client in range(1, 40):
        topic = cluster.create("again")
        session = cluster.open_session(topic, client=client, broker=client % 2)
        cluster.publish_all(session, range(client % 20), broker=client % 2)
        cluster.publish(session, 100, broker=1)             # held
        cluster.publish(session, client % 20, broker=0)     # not delegated yet
        assert cluster.table.frontiers(topic)["end_position"] == client % 20
        cluster.delete("again")
        cluster.close_session(session)
        cluster.close_streams(session)
        cluster.check_invariants()
    cluster.settle()
    assert cluster.free_segments() == cluster.layout.numbers["segment_count"]
    assert cluster.counters()["damaged"] == 0
    assert cluster.counters()["held_now"] == 0


def test_a_topic_is_closed_to_publishers_and_readers_from_its_deletion_on() -> None:
    cluster = ManualCluster()
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish_all(session, range(3))
    reader = cluster.reader(topic)
    cluster.delete()
    assert cluster.publish(session, 3) == TOPIC_CLOSED
    for attempt in ("deleted", "replaced"):
        with pytest.raises(ReadError) as raised:
            reader.read_frame(1000)
        assert raised.value.status == ReadStatus.READ_CLOSED
        if attempt == "deleted":
            cluster.create("next")


def test_a_gap_of_a_deleted_topic_touches_nothing_of_the_next_topic_of_its_number() -> None:
    cluster = ManualCluster()
    old = cluster.open_session(cluster.create("old"), client=1)
    cluster.publish_all(old, [1, 2, 3])
    cluster.delete("old")
    new = cluster.open_session(cluster.create("new"), client=2, broker=1)
    for sequence in range(4):
        assert cluster.publish(new, sequence) == RECEIVED   # in the slots that the held batches had
    cluster.clock.advance(2 * LEASE_NS)
    for scanner in cluster.scanners:                        # fences the old session before the new batches are scanned
        scanner.step_once()
    cluster.settle()
    assert [(ack.sequence, ack.status) for ack in cluster.take_acks(new)] == [
        (sequence, ResultStatus.RESULT_COMMITTED) for sequence in range(4)]
    assert cluster.counters()["held_now"] == 0


def test_a_broker_that_takes_no_note_leaves_no_half_made_topic() -> None:
    cluster = ManualCluster()
    deaf = cluster.brokers[1].directory
    cluster.stages.remove(deaf)
    config, _ = TopicConfig(name="half").validate(2)

    async def create() -> None:
        from broker import topics

        kept, topics.ROUND_SECONDS = topics.ROUND_SECONDS, 0.01
        try:
            await cluster.table.create(config, LEASE_NS, lambda: [0, 1])
        finally:
            topics.ROUND_SECONDS = kept

    with pytest.raises(BrokerUnavailable):
        asyncio.run(create())
    assert cluster.table.entries() == []
    cluster.stages.append(deaf)
    cluster.settle()
    assert cluster.create("half").generation > 1
    states = [cluster.record("TopicLine", "topic", number)["state"] & 0xFF for number in range(4)]
    assert states.count(TopicState.TOPIC_DELETING) == 0


# ---- identity, and what remains of a deletion ------------------------------------------------------------------------


def test_who_comes_back_is_told_when_another_topic_has_the_name() -> None:
    cluster = ManualCluster()
    first = cluster.create("name")
    seen = pb.TopicIdentity(run_id=7, created_ns=first.created_ns)
    assert cluster.table.find_seen("name", pb.TopicIdentity(), 7) == first, "the first look"
    assert cluster.table.find_seen("name", seen, 7) == first
    assert cluster.table.find_seen("name", seen, 8) == first, "a cluster that was recovered has the same topics"
    cluster.delete("name")
    with pytest.raises(UnknownTopic) as raised:
        cluster.table.find_seen("name", seen, 7)
    assert type(raised.value) is UnknownTopic
    with pytest.raises(ClusterReplaced):
        cluster.table.find_seen("name", seen, 8)
    cluster.create("name")
    with pytest.raises(TopicRecreated):
        cluster.table.find_seen("name", seen, 7)
    with pytest.raises(ClusterReplaced):
        cluster.table.find_seen("name", seen, 8)


def test_a_topic_is_deleted_also_while_a_broker_stands_still_and_the_rest_is_done_when_it_goes_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ManualCluster(brokers=2)
    entry, other = cluster.create("name"), cluster.create("other")
    assert asyncio.run(told_of_deletion(cluster, monkeypatch)) is None
    with pytest.raises(UnknownTopic):
        cluster.table.find("name")
    state = cluster.record("TopicLine", "topic", entry.number)["state"] & 0xFF
    assert state == TopicState.TOPIC_DELETING, "the broker that stands still may use it yet"
    drive(cluster.table.complete_deletions(lambda: [0, 1]))
    assert cluster.record("TopicLine", "topic", entry.number)["state"] & 0xFF == TopicState.TOPIC_FREE
    assert cluster.table.find("other") == other


async def told_of_deletion(cluster: ManualCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete while broker 1 takes no note."""
    monkeypatch.setattr("broker.topics.DELETE_SECONDS", 0.02)
    served = cluster.table._generation_at
    with monkeypatch.context() as stopped:
        stopped.setattr(cluster.table, "_generation_at", lambda number, broker: 1 if broker else served(number, broker))
        await cluster.table.delete("name", lambda: [0, 1])


def test_a_creation_whose_caller_goes_away_leaves_no_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ManualCluster(brokers=2)
    config, _ = TopicConfig(name="name").validate(2)

    async def gone(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as cancelled:
        cancelled.setattr(cluster.table, "_every_broker", gone)
        with pytest.raises(asyncio.CancelledError):
            drive(cluster.table.create(config, LEASE_NS, lambda: [0, 1]))
    with pytest.raises(UnknownTopic):
        cluster.table.find("name")
    cluster.settle()
    drive(cluster.table.complete_deletions(lambda: [0, 1]))
    assert cluster.create("name").number == 0, "its place is free again"
# ---- other options while a topic is in use ----------------------------------------------------------------------------


def test_an_altered_topic_has_the_new_options_and_everything_else_as_it_was() -> None:
    cluster = ManualCluster(brokers=2)
    before = cluster.create("name", order=2, replication_factor=2, ack=1, retention_bytes=100)
    for number, options in enumerate(({"ack": 2}, {"retention_bytes": -1}, {"retention_bytes": 0, "ack": 0}), 1):
        cluster.alter("name", **options)
        after = cluster.table.find("name")
        assert after.alteration == number
        assert all(getattr(after, option) == value for option, value in options.items())
        assert (after.number, after.generation, after.order, after.created_ns) == (
            before.number, before.generation, before.order, before.created_ns)


def test_a_topic_that_is_not_there_or_changes_its_mind_is_not_altered() -> None:
    cluster = ManualCluster()
    with pytest.raises(UnknownTopic):
        cluster.alter("name", ack=0)
    cluster.create("name", retention_bytes=100)

    def refuse(entry: object) -> TopicConfig:
        raise BadTopicOptions(topic="name", option="ack", value=2, allowed="0 or 1")

    with pytest.raises(BadTopicOptions):
        asyncio.run(cluster.table.alter("name", refuse))
    assert (cluster.table.find("name").alteration, cluster.table.find("name").retention_bytes) == (0, 100)


class Disk:
    """What a topic is written down on while it is made."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.written, self.log = refuses, set[str](), list[str]()

    @contextlib.asynccontextmanager
    async def __call__(self, entry: TopicEntry) -> AsyncIterator[None]:
        if self.refuses:
            raise OSError(errno.ENOSPC, "full")
        self.written.add(entry.name)
        self.log.append(f"{entry.name} {entry.number} {entry.generation} {entry.created_ns}")
        try:
            yield
        except BaseException:
            self.written.discard(entry.name)
            raise


def test_a_topic_that_no_disk_takes_is_not_made() -> None:
    cluster = ManualCluster()
    config, _ = TopicConfig(name="a").validate(2)
    for _ in range(3):
        with pytest.raises(OSError, match="full"):
            drive(cluster.table.create(config, LEASE_NS, lambda: [0, 1], Disk(refuses=True)))
        assert cluster.table.entries() == []
        assert all(cluster.record("TopicLine", "topic", number)["state"] & 0xFF == TopicState.TOPIC_FREE
                   for number in range(cluster.layout.numbers["topic_count_max"]))
    disk = Disk()
    made = drive(cluster.table.create(config, LEASE_NS, lambda: [0, 1], disk))
    assert disk.log == [f"a {made.number} {made.generation} {made.created_ns}"]
    assert disk.written == {"a"}


def test_a_topic_that_cannot_be_made_is_not_written_down() -> None:
    cluster = ManualCluster()
    cluster.create("a")
    disk = Disk()
    with pytest.raises(DuplicateTopic):
        drive(cluster.table.create(TopicConfig(name="a").validate(2)[0], LEASE_NS, lambda: [0, 1], disk))
    with pytest.raises(AssertionError, match="waited"):     # a broker that takes no note of it
        drive(cluster.table.create(TopicConfig(name="b").validate(2)[0], LEASE_NS, lambda: [0, 1, 99 % 2 + 2], disk))
    assert disk.written == set()
    assert [each.name for each in cluster.table.entries()] == ["a"]
