"""One topic's pace is its own: what stands still stops itself, and leaves the others their share of the segments."""

import pytest

from broker.head import HeadView
from broker.holders import holders_of, who_stops, why_full
from broker.layout import GroupState, HolderKind
from broker.reader import ReadError, ReadStatus
from broker.stages.receiver import POOL_EMPTY, RECEIVED
from broker.topics import TopicEntry
from tests.manual_cluster import KIB, ManualCluster, Session, drive

POOLS = ["atomic", "partitioned", "leader"]
SMALL = {"region_bytes": 520 * KIB, "order_entry_count": 256}


def fill(cluster: ManualCluster, session: Session, batches: int, nbytes: int = 2000, first: int = 0,
         broker: int = 0, tries: int = 40) -> int:
    """Publish batches until one is refused again and again; how many were received."""
    for sequence in range(first, first + batches):
        for _ in range(tries):
            status = cluster.publish(session, sequence, [bytes(nbytes)], broker=broker)
            cluster.settle()
            if status == RECEIVED:
                break
        else:
            assert status == POOL_EMPTY
            return sequence - first
    return batches


def stand(cluster: ManualCluster, topic: TopicEntry, copies: bool = True, broker: int = 0) -> int:
    """A reader at the beginning that never reads on; its cursor."""
    return drive(cluster.brokers[broker].cursors.open(topic.generation << 16 | topic.number, 0, 4711, copies=copies))[0]


def kept(cluster: ManualCluster, topic: TopicEntry) -> int:
    line = cluster.record("TopicReclaimLine", "topic_reclaim", topic.number)
    return int(cluster.record("TopicOrderLine", "topic_order", topic.number)["committed_index"] - line["reclaimed_index"])


def view(cluster: ManualCluster) -> HeadView:
    found = HeadView(cluster.door(0, 0), cluster.layout)
    assert found.serving()
    return found


# ---- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", [0, -1])
@pytest.mark.parametrize("pool", POOLS)
def test_a_topic_that_stands_still_leaves_the_others_their_share(pool: str, retention: int) -> None:
    cluster = ManualCluster(pool=pool, **SMALL)
    held, free = cluster.create("held", retention_bytes=retention), cluster.create("free")
    stand(cluster, held)
    session = cluster.open_session(held, client=1)
    received = fill(cluster, session, 400)
    assert 10 < received < 250
    other = cluster.open_session(free, client=2)
    assert fill(cluster, other, 200) == 200
    assert fill(cluster, other, 100, 100, first=200) == 100
    assert fill(cluster, other, 20, 7000, first=300) == 20, "a batch that takes several segments"
    assert kept(cluster, held) == received, "and nothing of the other was taken"
    cluster.check_invariants()


@pytest.mark.parametrize("pool", POOLS)
def test_several_topics_that_stand_still_leave_the_others_their_share(pool: str) -> None:
    cluster = ManualCluster(pool=pool, **SMALL)
    topics = [cluster.create(name) for name in "abcd"]
    for number, topic in enumerate(topics[:3]):
        stand(cluster, topic, broker=number % 2)
        fill(cluster, cluster.open_session(topic, client=number + 1), 400, broker=number % 2)
    for broker in range(2):
        session = cluster.open_session(topics[3], client=10 + broker, broker=broker)
        assert fill(cluster, session, 100, broker=broker) == 100


def test_alone_a_topic_may_have_everything() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create()
    stand(cluster, topic)
    fill(cluster, cluster.open_session(topic), 400)
    assert cluster.free_segments() <= 1


def test_a_noisy_topic_whose_reader_is_slow_takes_nothing_from_quiet_ones() -> None:
    cluster = ManualCluster(**SMALL)
    quiet, noisy = cluster.create("quiet"), cluster.create("noisy")
    assert fill(cluster, cluster.open_session(quiet, client=1), 20) == 20
    stand(cluster, noisy)
    fill(cluster, cluster.open_session(noisy, client=2), 400)
    assert kept(cluster, quiet) == 20


def test_a_noisy_topic_drops_its_own_before_that_of_topics_that_keep_less_than_their_share() -> None:
    cluster = ManualCluster(**SMALL)
    quiet, noisy = cluster.create("quiet"), cluster.create("noisy")
    assert fill(cluster, cluster.open_session(quiet, client=1), 20) == 20
    assert fill(cluster, cluster.open_session(noisy, client=2), 600) == 600
    assert kept(cluster, quiet) == 20


@pytest.mark.parametrize("pool", POOLS)
def test_a_noisy_topic_whose_batches_are_not_committed_yet_takes_nothing_from_quiet_ones(pool: str) -> None:
    cluster = ManualCluster(pool=pool, region_bytes=300 * KIB, order_entry_count=256)
    quiet, noisy = cluster.create("quiet"), cluster.create("noisy")
    assert fill(cluster, cluster.open_session(quiet, client=1), 5) == 5
    session = cluster.open_session(noisy, client=2)
    seen = set()
    for sequence in range(200):
        seen.add(cluster.publish(session, sequence, [bytes(7000)]))
        for _ in range(4):
            for stage in (cluster.reclaim, *(broker.release for broker in cluster.brokers)):
                stage.step_once()
    assert POOL_EMPTY in seen
    assert kept(cluster, quiet) == 5
    cluster.settle()
    assert kept(cluster, quiet) == 5


def test_a_leader_that_had_no_time_to_answer_takes_nothing_from_anybody() -> None:
    cluster = ManualCluster(pool="leader", **SMALL)
    quiet, new = cluster.create("quiet"), cluster.create("new")
    assert fill(cluster, cluster.open_session(quiet, client=1), 5) == 5
    session = cluster.open_session(new, client=2)
    before = cluster.record("PoolWishLine", "pool_wish", 0)["pressure"]
    for _ in range(200):
        cluster.publish(session, 0, [bytes(7000)])
    assert cluster.record("PoolWishLine", "pool_wish", 0)["pressure"] > before
    cluster.settle()
    assert kept(cluster, quiet) == 5
    assert fill(cluster, session, 3) == 3


def test_a_run_that_lies_open_and_holds_nothing_goes_back_when_room_is_short() -> None:
    sizes = {"order_entry_count": 32, "topic_count_max": 16, "session_count_max": 40}
    numbers = ManualCluster(region_bytes=600 * KIB, **sizes).layout.numbers
    cluster = ManualCluster(region_bytes=numbers["segments"] + 12 * numbers["segment_bytes"], **sizes)
    topics = cluster.layout.numbers["segment_count"] - 1
    for number in range(topics):
        session = cluster.open_session(cluster.create(f"t{number}"), client=number + 1)
        assert fill(cluster, session, 1, 10) == 1
    assert cluster.free_segments() == 1
    busy = cluster.create("busy")
    assert fill(cluster, cluster.open_session(busy, client=99), 100) == 100, "in the one segment that is left"
    assert [kept(cluster, topic) for topic in cluster.table.entries() if topic.name != "busy"] == [1] * topics


# ---- eviction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", [1, 8000, 40_000])
def test_a_reader_that_copies_holds_no_more_than_the_retention_when_room_is_needed(retention: int) -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create(retention_bytes=retention)
    stand(cluster, topic)
    reader = cluster.reader(topic)
    assert fill(cluster, cluster.open_session(topic), 500) == 500
    with pytest.raises(ReadError) as lost:
        reader.read_frame(1 << 16)
    assert lost.value.status == ReadStatus.READ_LOST
    sizes = sum(each["payload_bytes"] for each in cluster.entries(topic))
    assert sizes >= retention or retention > sizes > 0 == len(cluster.entries(topic))


def test_a_reader_that_copies_is_passed_over_when_the_index_is_full() -> None:
    cluster = ManualCluster(order_entry_count=64)
    topic = cluster.create(retention_bytes=100)
    stand(cluster, topic)
    cluster.publish_all(cluster.open_session(topic), range(300))
    assert cluster.reader(topic).frontiers()["committed_index"] == 300


def test_a_reader_that_views_holds_and_is_asked_to_let_go() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create(retention_bytes=8000)
    cursor = drive(cluster.brokers[0].cursors.open(topic.generation << 16 | topic.number, 0, 4711, presence=1))[0]
    received = fill(cluster, cluster.open_session(topic), 500)
    assert received < 250 and kept(cluster, topic) == received
    grant = cluster.record("CursorGrantLine", "cursor_grant", cursor)
    assert grant["evicted"] == cluster.record("CursorLine", "cursor", cursor)["state"] >> 8


def evictions(cluster: ManualCluster, cursor: int) -> bool:
    """Whether a reader was asked to let go."""
    grant = cluster.record("CursorGrantLine", "cursor_grant", cursor)
    return bool(grant["evicted"] == cluster.record("CursorLine", "cursor", cursor)["state"] >> 8)


def test_a_reader_that_views_and_keeps_up_is_not_asked_to_let_go() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create(retention_bytes=8000)
    cursors = cluster.brokers[0].cursors
    key = topic.generation << 16 | topic.number
    near, far = (drive(cursors.open(key, 0, 4711, presence=1))[0] for _ in range(2))
    session = cluster.open_session(topic)
    for published in range(300):
        if not fill(cluster, session, 1, first=published):
            break
        cursors.move(near, max(0, published - 2))
    assert not evictions(cluster, near) and evictions(cluster, far)


def test_a_reader_of_a_protected_group_is_not_asked_to_let_go_for_nothing() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create(retention_bytes=8000)
    key = topic.generation << 16 | topic.number
    cursor = drive(cluster.brokers[0].cursors.open(key, 0, 4711, "g", presence=1))[0]
    cluster.poke("GroupLine", "group", 0, state=1 << 8 | GroupState.GROUP_PROTECTED, topic=key, position=0, index=0)
    received = fill(cluster, cluster.open_session(topic), 500)
    assert received < 250 and not evictions(cluster, cursor)
    error = why_full(view(cluster), cluster.layout, 0, topic.number)
    assert "the protected group" in error.message and "--no-protect" in error.message


@pytest.mark.parametrize("copies", [True, False])
def test_a_reader_within_the_retention_holds_while_there_is_room(copies: bool) -> None:
    cluster = ManualCluster(region_bytes=2 << 20, order_entry_count=1024)
    topic = cluster.create(retention_bytes=8000)
    stand(cluster, topic, copies)
    assert fill(cluster, cluster.open_session(topic), 100) == 100
    assert kept(cluster, topic) == 100


# ---- words ---------------------------------------------------------------------------------------------------------


def test_the_error_of_a_full_pool_names_the_reader_and_what_helps() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create("held")
    cursor = stand(cluster, topic)
    session = cluster.open_session(topic)
    received = fill(cluster, session, 400)
    error = why_full(view(cluster), cluster.layout, 0, topic.number)
    assert "the reader of topic held in process 4711 (through broker 0) holds the oldest" in error.message
    assert "let it read on, or close it" in error.message
    cluster.brokers[0].cursors.move(cursor, received)               # it reads on
    assert fill(cluster, session, 20, first=received) == 20


def test_closing_the_reader_helps_as_well() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create("held")
    cursor = stand(cluster, topic)
    session = cluster.open_session(topic)
    received = fill(cluster, session, 400)
    cluster.brokers[0].cursors.close(cursor)
    assert fill(cluster, session, 300, first=received) == 300


def test_a_full_index_names_the_reader() -> None:
    cluster = ManualCluster(order_entry_count=64)
    topic = cluster.create("held")
    stand(cluster, topic)
    session = cluster.open_session(topic)
    for sequence in range(100):
        cluster.publish(session, sequence, [b"x"])
        cluster.settle()
    text = who_stops(view(cluster), cluster.layout, topic.number)
    assert "the reader of topic held in process 4711" in text and "order_entry_count" in text


def test_who_holds_is_looked_up_now() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create("held")
    head = view(cluster)

    def holder() -> tuple[HolderKind, str]:
        found = holders_of(head, cluster.layout).of(topic.number)
        return found.kind, found.text

    assert holder() == (HolderKind.HOLDER_NONE, "nobody")
    cursor = stand(cluster, topic)
    fill(cluster, cluster.open_session(topic), 3)
    assert holder() == (HolderKind.HOLDER_CURSOR, "the reader of topic held in process 4711 (through broker 0)")
    cluster.brokers[0].cursors.close(cursor)
    assert holder() == (HolderKind.HOLDER_NONE, "nobody")


def test_every_holder_has_words_and_says_what_helps() -> None:
    cluster = ManualCluster(**SMALL)
    cluster.create("held")
    holders = holders_of(view(cluster), cluster.layout)
    for kind in HolderKind:
        found = holders._holder(kind << 32, 0)
        assert found.text and found.advice and "{" not in found.advice
    assert "held" in holders._holder(HolderKind.HOLDER_RETENTION << 32, 0).text
