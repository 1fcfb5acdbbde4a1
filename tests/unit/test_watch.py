"""A reader that waits is told of news; one that looks once more after asking misses none."""

import select

from broker.notifier import Notifier
from tests.manual_cluster import ManualCluster


def is_readable(notifier: Notifier) -> bool:
    poll = select.poll()
    poll.register(notifier.fd, select.POLLIN)
    return bool(poll.poll(0))


def test_only_topics_that_are_wanted_fire_and_each_request_once() -> None:
    cluster = ManualCluster()
    quiet, busy = cluster.create("quiet"), cluster.create("busy")
    session, watch = cluster.open_session(busy), cluster.brokers[1].watch
    cluster.publish_all(session, [0])
    assert watch.take_fired() == []
    watch.want(busy.number)
    cluster.publish_all(session, [1])
    cluster.publish_all(session, [2])
    assert watch.take_fired() == [busy.number]
    assert watch.take_fired() == []
    cluster.publish_all(session, [3])
    assert watch.take_fired() == []
    assert quiet.number not in watch.take_fired()


def test_news_rings_the_event_loop_of_the_broker_that_wants_it() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    notifier = cluster.brokers[1].notifier
    assert not is_readable(notifier)
    cluster.brokers[1].watch.want(0)
    cluster.publish_all(session, [0])
    assert is_readable(notifier)


def test_a_commit_between_looking_and_asking_is_seen_by_looking_again() -> None:
    cluster = ManualCluster()
    topic = cluster.create()
    session, reader, watch = cluster.open_session(topic), cluster.reader(topic), cluster.brokers[0].watch
    assert not reader.has_news()
    cluster.publish_all(session, [0])
    watch.want(topic.number)                    # too late for this commit
    assert watch.take_fired() == []
    assert reader.has_news()


def test_256_commits_between_two_looks_are_found_by_a_look_at_everything() -> None:
    cluster = ManualCluster(ring_slot_count=512, order_entry_count=1024)
    topic = cluster.create()
    session, watch = cluster.open_session(topic), cluster.brokers[1].watch
    watch.want(topic.number)
    others = [stage for stage in cluster.stages if stage is not watch]
    for sequence in range(256):
        cluster.publish(session, sequence)
        for stage in others:
            stage.step_once()
    assert watch.step_once() == 0, "the byte came round"
    watch.look_everywhere()
    watch.step_once()
    assert watch.take_fired() == [topic.number]


def test_a_notifier_writes_once_until_it_is_armed_again() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    notifier = cluster.brokers[0].notifier
    for sequence in range(3):
        cluster.publish_all(session, [sequence])
        assert is_readable(notifier)
    notifier.arm()
    assert not is_readable(notifier)
    cluster.publish_all(session, [3])
    assert is_readable(notifier)


def test_a_notifier_gives_its_descriptor_back() -> None:
    import os

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        Notifier()
    notifier = Notifier()
    notifier.close()
    notifier.close()
    assert len(os.listdir("/proc/self/fd")) == before
