"""Who looks at two things of different writers looks in the order that makes the pair true, whatever comes between."""

import os
import threading

import pytest

from broker.layout import AttachState, SessionState
from broker.records import pack
from sim.cluster.door import HostControl
from tests.manual_cluster import ManualCluster, drive

SESSIONS, TURNS = 64, 100


def follow_with_news(operation: int) -> bool:
    """Before its `operation`-th operation batches are committed, and the reader has released all of them already."""
    cluster = ManualCluster(attach_slot_count=8)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(5))
    control = HostControl(1)
    broker = cluster.restart(1, control)
    while not broker.learn():
        pass
    topic = session.topic
    cursor, index = drive(broker.cursors.open(topic.generation << 16 | topic.number, 0, os.getpid(), presence=1))
    slot, _ = broker.attach.open_subscriber(topic.number, topic.generation, cursor, index, os.getpid(), 1)
    broker.attach.step_once()

    def news() -> None:
        before, cluster.stages = cluster.stages, [each for each in cluster.stages if each is not broker.attach]
        cluster.publish_all(session, range(5, 10))
        cluster.stages = before
        at = cluster.layout.offset_of("attach_client", slot) + 40
        cluster.memory.store_word(at, cluster.reader(topic).frontiers()["committed_index"])

    called: list[int] = []
    control.call, control.call_at = lambda: (called.append(1), news()), control.operations + operation
    broker.attach.step_once()
    control.call_at = 0
    assert control.raised is None
    for _ in range(3):
        broker.attach.step_once()
    assert cluster.record("AttachLine", "attach_line", slot)["state"] & 0xFF == AttachState.ATTACH_OPEN, operation
    return bool(called)


def test_a_reader_that_is_faster_than_its_broker_looks_is_not_fenced() -> None:
    operation = 1
    while follow_with_news(operation):
        operation += 1
    assert operation > 5


@pytest.mark.parametrize("lock", ["atomic", "mutex"])
def test_of_two_sessions_of_a_client_that_two_scanners_open_at_once_the_later_epoch_stays(lock: str) -> None:
    """Each scanner opens many in one step, of the same clients, one from the first to the last and one from the last to the
    first, to meet on the way. It looks at the outcome: that the fence between the two is needed, no run has shown."""
    cluster = ManualCluster(brokers=2, scanners=2, lock=lock, session_count_max=SESSIONS)
    topic = cluster.create()
    key, share = topic.generation << 16 | topic.number, cluster.layout.numbers["sessions_per_broker"]
    meet = threading.Barrier(3)

    def scan(number: int) -> None:
        for _ in range(TURNS):
            meet.wait(60)                   # the lines are there
            cluster.scanners[number].step_once()
            meet.wait(60)                   # both have looked

    threads = [threading.Thread(target=scan, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    both_open = []
    for turn in range(TURNS):
        pairs = [(i, share + share - 1 - i) for i in range(share)]
        for i, pair in enumerate(pairs):
            for slot, epoch in zip(pair, (1, 2) if (i + turn) % 2 else (2, 1), strict=True):
                at = cluster.layout.offset_of("session", slot)
                state = ((cluster.memory.load_word(at) >> 8) + 1) << 8 | SessionState.SESSION_OPEN
                cluster.memory.write_line_bytes(at, pack(
                    "SessionLine", state=state, client_id=1000 + turn * share + i, session_epoch=epoch, topic=key, ack=1))
        for broker in range(2):
            version = cluster.layout.offset_of("broker", broker) + 40
            cluster.memory.store_word(version, cluster.memory.load_word(version) + 1)
        meet.wait(60)
        meet.wait(60)
        for pair in pairs:
            states = [cluster.order.session_state(slot) for slot in pair]
            if (open_now := [each["epoch"] for each in states if each["state"] == SessionState.SESSION_OPEN]) != [2]:
                both_open.append((turn, pair, open_now))
    for thread in threads:
        thread.join()
    assert both_open == []
