"""What counts as being in the log after a recovery was there for certain: nothing counts because it was not found."""

from pathlib import Path

import pytest

from broker.recovery import RecoveredTopic, make_plan
from broker.replica_files import SESSIONS_SUFFIX, find_files
from tests.manual_cluster import ManualCluster, Session

CLIENT, OTHER = 7, 5


def cluster_with(folder: Path, order: int, **settings: int) -> tuple[ManualCluster, Session, int, int]:
    """A cluster, a session, and the replicas of what comes by brokers 0 and 1: two brokers."""
    cluster = ManualCluster(brokers=3, folder=folder, order_entry_count=64, **settings)
    for number in range(8):
        topic = cluster.create(f"topic-{number}", order=order, replication_factor=2)
        cluster.settle()
        (first,), (second,) = cluster.replicas(topic, 0), cluster.replicas(topic, 1)
        if first != second:
            return cluster, cluster.open_session(topic, client=CLIENT), first, second
        cluster.delete(f"topic-{number}")
        cluster.settle()
    raise AssertionError("no topic had two replicas")


def recovered(cluster: ManualCluster, folder: Path) -> RecoveredTopic:
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    (topic,) = [each for each in make_plan(folder).topics if each.batches or each.lost]
    return topic


def expected_of(topic: RecoveredTopic, client: int = CLIENT) -> list[int]:
    return [each.expected for each in topic.sessions if each.client_id == client]


def sequences_of(topic: RecoveredTopic, client: int = CLIENT) -> list[int]:
    return sorted(each.record.fields["batch_sequence"] for each in topic.batches
                  if each.record.fields["client_id"] == client)


@pytest.mark.parametrize("before", [0, 20, 80], ids=["nothing before", "something before", "much reclaimed before"])
@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_a_batch_that_no_disk_had_is_not_committed(tmp_path: Path, order: int, before: int) -> None:
    cluster, session, silent, _ = cluster_with(tmp_path, order)
    if before:
        other = cluster.open_session(session.topic, client=OTHER)
        cluster.publish_all(other, range(before))
    cluster.stages.remove(cluster.brokers[silent].replication)      # nothing that comes by broker 0 is on a disk now
    cluster.publish(session, 0, [b"first"], broker=0)
    cluster.publish(session, 1, [b"second"], broker=1)
    cluster.settle()
    topic = recovered(cluster, tmp_path)
    assert (before == 80) == (topic.first_position > 0)
    if order == 5:
        assert (sequences_of(topic), expected_of(topic)) == ([], []), "what comes behind a lost batch is given up"
    else:
        assert (sequences_of(topic), expected_of(topic)) == ([1], [0])
        (found,) = [each for each in topic.sessions if each.client_id == CLIENT]
        assert found.in_log == 1 << 1, "found beyond the gap: it is not published again"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_lost_batch_far_behind_the_window_is_not_committed_either(tmp_path: Path, order: int) -> None:
    """The sequencer took what is 300 batches further only because it had the first in its memory."""
    cluster, session, silent, _ = cluster_with(tmp_path, order, ring_slot_count=512, region_bytes=4 << 20)
    cluster.stages.remove(cluster.brokers[silent].replication)
    cluster.publish(session, 0, broker=0)
    cluster.settle()
    for sequence in range(1, 40):
        cluster.publish(session, sequence, broker=1)
        cluster.settle()
    topic = recovered(cluster, tmp_path)
    assert expected_of(topic) == [0]


@pytest.mark.parametrize("order", [0, 5])
def test_a_whole_log_says_that_all_before_is_committed(tmp_path: Path, order: int) -> None:
    cluster, session, _, _ = cluster_with(tmp_path, order)
    cluster.publish_all(session, range(80), broker=1)
    topic = recovered(cluster, tmp_path)
    assert topic.first_position > 0
    assert (expected_of(topic), topic.lost) == ([80], [])


@pytest.mark.parametrize("epoch", [1, 2])
def test_behind_a_hole_a_session_begins_only_if_the_client_had_sent_nothing_before(tmp_path: Path, epoch: int) -> None:
    cluster, session, silent, _ = cluster_with(tmp_path, 5)
    cluster.stages.remove(cluster.brokers[silent].replication)
    cluster.publish(session, 0, [b"lost"], broker=0)
    cluster.settle()
    another = OTHER if epoch == 1 else CLIENT
    later = cluster.open_session(session.topic, client=another, epoch=epoch)
    cluster.publish(later, 0, [b"later"], broker=1)
    cluster.settle()
    topic = recovered(cluster, tmp_path)
    assert sequences_of(topic, another) == ([0] if epoch == 1 else [])


# ---- what is reclaimed is written down -------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 2, 5])
def reclaimed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ManualCluster, Session, Path]:
    """A log whose files were trimmed; client 7 sent 0, 2, 3 first (order below 5), or 0, 1, 2, and then no more."""
    cluster = ManualCluster(brokers=2, folder=tmp_path, replica_file_bytes=8 << 10, order_entry_count=64)
    session = cluster.open_session(cluster.create(order=request.param, replication_factor=2, retention_bytes=4096),
                                   client=CLIENT)
    cluster.publish_all(session, [0, 1, 2] if request.param == 5 else [0, 2, 3])
    other = cluster.open_session(session.topic, client=OTHER)
    cluster.publish_all(other, range(200))
    return cluster, session, tmp_path


def test_whose_batches_were_in_files_that_went_is_known(reclaimed: tuple[ManualCluster, Session, Path]) -> None:
    cluster, session, folder = reclaimed
    topic = recovered(cluster, folder)
    assert all(file.first_position > 0 for file in find_files(folder) if file.source == 0), "the first file is gone"
    assert sequences_of(topic) == []
    (found,) = [each for each in topic.sessions if each.client_id == CLIENT]
    if session.topic.order == 5:
        assert (found.expected, found.in_log) == (3, 0)
    else:
        assert (found.expected, found.in_log) == (1, 1 << 2 | 1 << 3)
    assert expected_of(topic, OTHER) == [200]


def test_without_that_nothing_is_taken_for_committed(reclaimed: tuple[ManualCluster, Session, Path]) -> None:
    cluster, session, folder = reclaimed
    for path in folder.rglob("*" + SESSIONS_SUFFIX):
        path.unlink()
    topic = recovered(cluster, folder)
    assert expected_of(topic) == []
    (other,) = [each for each in topic.sessions if each.client_id == OTHER]
    if session.topic.order == 5:
        assert other.expected == 200, "its log is whole, and in order"
    else:                                       # the others are found one by one
        assert other.expected == 0
        kept = sum(1 << each for each in sequences_of(topic, OTHER))
        assert other.in_log & kept == kept
