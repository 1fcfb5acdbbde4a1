"""The sequencer: one total order, first in first out per session, each batch once; held, fenced and refused as told."""

import itertools
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from broker.layout import ResultStatus, SessionState
from broker.records import pack
from broker.sessions import UNKNOWN_POSITION, UNPLACED_POSITION
from broker.stages.receiver import RECEIVED, RING_FULL
from sim.cxl import region as files
from tests.manual_cluster import LEASE_NS, SECOND, ManualCluster, Session, drive, payload_of

COMMITTED, DUPLICATE = ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE
FENCED, REFUSED = ResultStatus.RESULT_FENCED, ResultStatus.RESULT_REFUSED
VOID, DAMAGED = ResultStatus.RESULT_VOID, ResultStatus.RESULT_DAMAGED

WAYS = [(lock, scanners) for lock in ("atomic", "mutex", "semaphore") for scanners in (1, 2, 4)]


@pytest.fixture
def semaphore() -> Iterator[str]:
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_semaphore(name).close()
    yield "/" + name
    files.remove_semaphore(name)


@pytest.fixture(params=WAYS, ids=[f"{lock}-{scanners}" for lock, scanners in WAYS])
def cluster(request: pytest.FixtureRequest, semaphore: str) -> ManualCluster:
    """Every test of this fixture holds for each lock and each number of scanners."""
    lock, scanners = request.param
    return ManualCluster(brokers=4, lock=lock, scanners=scanners, semaphore=semaphore)


def statuses(cluster: ManualCluster, session: Session, broker: int = 0) -> dict[int, ResultStatus]:
    return {ack.sequence: ack.status for ack in cluster.take_acks(session, broker)}


def result_of(cluster: ManualCluster, broker: int, slot: int) -> int:
    at = cluster.layout.offset_of("result", 0, broker, slot)
    return cluster.memory.load_word(at) >> 40 & 0xFF


# ---- order 5: first in, first out, per session ---------------------------------------------------------------------


def test_a_session_that_stripes_over_all_brokers_is_in_the_log_in_its_own_order(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    for sequence in range(40):
        cluster.publish_all(session, [sequence], broker=sequence % 4)
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == list(range(40))
    cluster.check_invariants()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_batches_that_come_in_any_order_are_committed_in_theirs(order: tuple[int, ...]) -> None:
    cluster = ManualCluster(brokers=4)
    session = cluster.open_session(cluster.create())
    for broker, sequence in enumerate(order):
        cluster.publish(session, sequence, broker=broker)
        cluster.settle()
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == [0, 1, 2, 3]


def test_a_batch_beyond_a_gap_takes_no_position_until_the_gap_is_closed(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [2], broker=1)
    cluster.publish_all(session, [1], broker=2)
    assert cluster.order_of(session.topic) == []
    assert cluster.order.session_state(session.slot)["held"] == 2
    assert statuses(cluster, session, 1) == {}
    cluster.publish_all(session, [0], broker=3)
    assert [entry["position"] for entry in cluster.entries(session.topic)] == [0, 1, 2]
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == [0, 1, 2]
    assert statuses(cluster, session, 1) == {2: COMMITTED}
    assert statuses(cluster, session, 2) == {1: COMMITTED}
    counters = cluster.counters()
    assert (counters["held_now"], counters["held_peak"]) == (0, 2)


def test_held_batches_keep_their_slots_until_they_commit(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(1, 13))
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 0
    assert cluster.order.session_state(session.slot)["held"] == 12
    cluster.publish_all(session, [0], broker=1)
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 12
    assert statuses(cluster, session) == dict.fromkeys(range(1, 13), COMMITTED)


def test_a_gap_does_not_stop_the_others_at_its_broker(cluster: ManualCluster) -> None:
    topic = cluster.create()
    waiting, going = cluster.open_session(topic, client=1), cluster.open_session(topic, client=2, broker=1)
    cluster.publish_all(waiting, [1])
    cluster.publish_all(going, range(60))               # the ring has 16 slots
    assert statuses(cluster, going) == dict.fromkeys(range(60), COMMITTED)
    cluster.settle()
    assert statuses(cluster, waiting) == {1: REFUSED}, "sent again when its publisher can"
    assert cluster.order.session_state(waiting.slot)["state"] == SessionState.SESSION_OPEN
    cluster.publish_all(waiting, [0, 1])
    assert statuses(cluster, waiting) == {0: COMMITTED, 1: COMMITTED}
    assert cluster.counters()["held_now"] == 0


def test_what_held_batches_wait_for_still_gets_into_their_ring(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    for sequence in range(1, 40):
        cluster.publish(session, sequence)
        cluster.settle()
    assert cluster.publish(session, 0) == RING_FULL
    cluster.publish_all(session, range(40))
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == list(range(40))


def test_two_sessions_do_not_wait_for_each_other(cluster: ManualCluster) -> None:
    topic = cluster.create()
    waiting, going = cluster.open_session(topic, client=1), cluster.open_session(topic, client=2, broker=1)
    cluster.publish_all(waiting, [1])
    cluster.publish_all(going, range(3))
    assert cluster.order_of(topic) == [(2, 1, 0), (2, 1, 1), (2, 1, 2)]


def test_what_was_ordered_is_told_for_each_broker_also_when_another_one_closed_the_gap(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [1], broker=1)
    cluster.publish_all(session, [2], broker=2)
    cluster.publish_all(session, [0], broker=3)
    ordered = [cluster.record("OffsetSequencerLine", "offset_sequencer", 0, broker)["ordered"] for broker in range(4)]
    assert ordered == [0, 1, 1, 1]


# ---- duplicates ----------------------------------------------------------------------------------------------------


def test_what_is_below_the_expected_sequence_is_a_duplicate_through_any_broker(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(3))
    for broker in range(4):
        cluster.publish_all(session, [0, 2, 1], broker=broker)
    assert len(cluster.order_of(session.topic)) == 3
    assert statuses(cluster, session, 3) == {0: DUPLICATE, 1: DUPLICATE, 2: DUPLICATE}
    assert cluster.counters()["duplicates"] == 12


def test_a_second_copy_of_a_held_batch_is_refused_and_the_first_commits_once(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [1], broker=0)
    cluster.publish_all(session, [1], broker=1)
    assert statuses(cluster, session, 1) == {1: REFUSED}
    cluster.publish_all(session, [0], broker=2)
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == [0, 1]
    assert statuses(cluster, session, 0) == {1: COMMITTED}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_without_session_order_batches_commit_as_they_come_and_each_once(order: int, cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create(order=order))
    for sequence in (3, 0, 3, 2, 0, 1, 2, 4, 1):
        cluster.publish_all(session, [sequence], broker=sequence % 4)
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == [3, 0, 2, 1, 4]
    assert cluster.order.session_state(session.slot)["expected"] == 5
    assert cluster.counters()["held_now"] == 0


@pytest.mark.parametrize("order", [2, 5])
def test_deduplication_survives_the_window_coming_round(order: int) -> None:
    cluster = ManualCluster(order_entry_count=1024)
    session = cluster.open_session(cluster.create(order=order))
    cluster.publish_all(session, range(600))
    cluster.take_acks(session)
    cluster.publish_all(session, [0, 255, 256, 344, 599])
    assert set(statuses(cluster, session).values()) == {DUPLICATE}
    assert len(cluster.order_of(session.topic)) == 600


def test_what_lies_beyond_a_gap_is_known_to_be_in_the_log_also_when_it_was_reclaimed() -> None:
    # Whoever opens the session anew would send it again, and it would be there twice.
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create(order=1))
    cluster.publish_all(session, [0, 2, 3])
    key = session.topic.generation << 16 | session.topic.number

    def positions(reader: Any) -> list[int]:
        return drive(cluster.brokers[0].sessions.positions(reader, session.client, key, session.epoch, range(1, 5)))

    assert positions(cluster.reader(session.topic)) == [UNKNOWN_POSITION, 1, 2, UNKNOWN_POSITION]
    reclaimed = SimpleNamespace(frontiers=cluster.reader(session.topic).frontiers, find_batches=lambda *_: 0)
    assert positions(reclaimed) == [UNKNOWN_POSITION, UNPLACED_POSITION, UNPLACED_POSITION, UNKNOWN_POSITION]


def test_a_batch_beyond_the_window_is_refused_and_leaves_no_trace(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [256, 255])
    assert statuses(cluster, session) == {256: REFUSED}
    assert cluster.order.session_state(session.slot)["held"] == 1
    cluster.publish_all(session, [2**64 - 1])
    assert statuses(cluster, session) == {}, "refused as well, but behind a held batch of its stream"
    cluster.publish_all(session, [2**64 - 1], broker=1)
    assert statuses(cluster, session, 1) == {2**64 - 1: REFUSED}


# ---- fences --------------------------------------------------------------------------------------------------------


def test_only_a_gap_that_outlives_the_lease_fences_a_session(cluster: ManualCluster) -> None:
    topic = cluster.create()
    session, other = cluster.open_session(topic), cluster.open_session(topic, client=8, broker=1)
    cluster.publish_all(session, [0])
    cluster.clock.advance(10 * LEASE_NS)
    cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN, "silence is no gap"
    cluster.publish_all(session, [2])
    cluster.clock.advance(LEASE_NS - 1)
    cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN
    cluster.clock.advance(SECOND // 100)            # it looks at gaps now and then, not at each step
    cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_FENCED
    assert cluster.order.session_state(other.slot)["state"] == SessionState.SESSION_OPEN
    assert statuses(cluster, session) == {0: COMMITTED, 2: FENCED}
    progress = cluster.record("SessionProgressLine", "session_progress", session.slot)
    assert (progress["state"] & 0xFF, progress["expected"], progress["held"]) == (SessionState.SESSION_FENCED, 1, 0)
    assert cluster.counters()["held_now"] == 0
    cluster.publish_all(session, [1, 0])
    assert statuses(cluster, session) == {1: FENCED, 0: DUPLICATE}, "what is in the log is still said to be there"


def test_full_rings_never_fence_however_long_they_last(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    waiting = list(range(1, 40))                        # the ring has 16 slots, and 0 does not get in between them
    for _ in range(16):
        while waiting and cluster.publish(session, waiting[0]) == RECEIVED:
            waiting.pop(0)
        cluster.clock.advance(LEASE_NS // 4)
        cluster.settle()
        waiting = sorted({*waiting, *statuses(cluster, session)})
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN
    cluster.publish_all(session, range(40))
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == list(range(40))


def test_every_step_forward_starts_the_gap_clock_anew(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [1, 3])
    cluster.clock.advance(LEASE_NS - 1)
    cluster.publish_all(session, [0])                   # 0 and 1 commit; 3 still waits for 2
    cluster.clock.advance(LEASE_NS - 1)
    cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN
    cluster.publish_all(session, [2])
    assert [sequence for _, _, sequence in cluster.order_of(session.topic)] == [0, 1, 2, 3]


def test_a_full_order_index_never_fences_however_long_it_lasts(cluster: ManualCluster) -> None:
    topic = cluster.create()
    cursor, _ = cluster.open_cursor(topic)
    filler, session = cluster.open_session(topic, client=1), cluster.open_session(topic, client=2, broker=1)
    entries = cluster.layout.numbers["order_entry_count"]
    for sequence in range(entries):
        cluster.publish(filler, sequence)
        cluster.settle()
    for sequence in (2, 3, 1):
        cluster.publish(session, sequence, broker=sequence)
        cluster.settle()
    cluster.publish(session, 0, broker=1)               # it is there, but there is no room for it
    for _ in range(4):
        cluster.clock.advance(LEASE_NS)
        cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN
    assert cluster.counters()["order_full"] > 0
    cluster.brokers[0].cursors.close(cursor)
    cluster.settle()
    order = [sequence for client, _, sequence in cluster.order_of(topic) if client == 2]
    assert order == [0, 1, 2, 3]
    cluster.check_invariants()


def test_a_reopened_session_is_told_its_high_water_mark_and_its_predecessor_is_fenced(cluster: ManualCluster) -> None:
    topic = cluster.create()
    first = cluster.open_session(topic)
    cluster.publish_all(first, [0, 1, 3])
    second = cluster.open_session(topic, epoch=2, broker=1)
    assert second.predecessor_expected == 2
    assert cluster.order.session_state(first.slot)["state"] == SessionState.SESSION_FENCED
    cluster.publish_all(first, [2])
    cluster.publish_all(second, [0, 1])
    assert cluster.order_of(topic) == [(7, 1, 0), (7, 1, 1), (7, 2, 0), (7, 2, 1)]
    assert statuses(cluster, first) == {0: COMMITTED, 1: COMMITTED, 3: FENCED, 2: FENCED}


def test_a_session_fenced_by_its_lease_resumes_behind_what_was_committed(cluster: ManualCluster) -> None:
    topic = cluster.create()
    first = cluster.open_session(topic)
    cluster.publish_all(first, [0, 1, 2, 5])
    cluster.clock.advance(LEASE_NS + 1)
    cluster.settle()
    assert cluster.open_session(topic, epoch=2, broker=3).predecessor_expected == 3


def test_an_epoch_that_is_too_old_is_fenced_at_once(cluster: ManualCluster) -> None:
    from broker.errors import SessionFenced

    topic = cluster.create()
    cluster.open_session(topic, epoch=5)
    with pytest.raises(SessionFenced):
        cluster.open_session(topic, epoch=4, broker=1)


def test_closing_a_session_answers_what_it_held_and_frees_the_slots(cluster: ManualCluster) -> None:
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish_all(session, [1, 2])
    cluster.close_session(session)
    cluster.settle()
    assert statuses(cluster, session) == {1: FENCED, 2: FENCED}
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 2
    assert cluster.counters()["held_now"] == 0


def test_a_slot_given_to_another_client_answers_what_the_earlier_session_held(cluster: ManualCluster) -> None:
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish_all(session, [1, 2])
    line = cluster.record("SessionLine", "session", session.slot)       # taken over without a close, as when idle
    line.update(state=(line["state"] >> 8) + 1 << 8 | SessionState.SESSION_OPEN, client_id=99)
    cluster.memory.write_line_bytes(cluster.layout.offset_of("session", session.slot), pack("SessionLine", **line))
    cluster.bump(0, 5)
    cluster.settle()
    assert statuses(cluster, session) == {1: FENCED, 2: FENCED}
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 2
    assert cluster.counters()["held_now"] == 0


def test_batches_of_a_session_that_nobody_opened_are_fenced(cluster: ManualCluster) -> None:
    topic = cluster.create()
    session = cluster.open_session(topic)
    for changed in (Session(8, 1, session.slot, topic, 1, 0, session.streams),
                    Session(7, 2, session.slot, topic, 1, 0, session.streams),
                    Session(7, 1, session.slot + 1, topic, 1, 0, session.streams)):
        cluster.publish_all(changed, [0])
        assert statuses(cluster, session) == {0: FENCED}
    assert cluster.order_of(topic) == []


def test_a_session_of_one_topic_cannot_write_to_another(cluster: ManualCluster) -> None:
    first, second = cluster.create("first"), cluster.create("second")
    session, other = cluster.open_session(first), cluster.open_session(second, client=9, broker=1)
    cluster.publish_all(Session(7, 1, session.slot, second, 1, 0, other.streams), [0])
    assert cluster.order_of(second) == []
    assert statuses(cluster, other) == {0: FENCED}


# ---- headers that are no batch -------------------------------------------------------------------------------------


def test_a_void_slot_takes_no_position_and_frees_itself(cluster: ManualCluster) -> None:
    session = cluster.open_session(cluster.create())
    cluster.publish(session, 0)
    cluster.brokers[0].receiver.abandon(0)
    cluster.publish(session, 1)
    cluster.settle()
    assert [entry["position"] for entry in cluster.entries(session.topic)] == [0, 1]
    assert [result_of(cluster, 0, slot) for slot in range(3)] == [COMMITTED, VOID, COMMITTED]
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 3


DAMAGE = {
    "payload before the segments": {"payload_offset": 64},
    "payload behind the region": {"payload_offset": 1 << 40},
    "payload wraps around": {"payload_offset": (1 << 64) - 64, "payload_bytes": 128},
    "payload off its line": {"payload_offset": 0x100001},
    "payload too long": {"payload_bytes": 1 << 31},
    "no message": {"message_count": 0},
    "more messages than bytes": {"message_count": 1 << 20},
    "no such session": {"session_slot": 1 << 20},
    "other commit word": {"complete": 12345},
    "no commit word": {"complete": 0},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_answered_as_damaged_and_does_not_stop_its_broker(damage: str) -> None:
    cluster = ManualCluster()
    topic = cluster.create(order=2)
    session = cluster.open_session(topic)
    for sequence in range(3):
        cluster.publish(session, sequence)
    cluster.brokers[0].delegation.step_once()
    cluster.poke("BatchHeader", "ring", 0, 0, 1, **DAMAGE[damage])
    cluster.settle()
    assert statuses(cluster, session) == {0: COMMITTED, 1: DAMAGED, 2: COMMITTED}
    assert [sequence for _, _, sequence in cluster.order_of(topic)] == [0, 2]
    cluster.publish_all(session, [1])
    assert statuses(cluster, session) == {1: COMMITTED}
    assert cluster.counters()["damaged"] == 1
    cluster.check_invariants()


@pytest.mark.parametrize("delegated", [(1 << 63) + 5, 1 << 40, 100])
def test_a_frontier_beyond_the_ring_is_not_followed(delegated: int) -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [0])
    cluster.poke("OffsetBrokerLine", "offset_broker", 0, 0, delegated=delegated)
    for scanner in cluster.scanners:
        scanner.look_everywhere()
        scanner.step_once()
    assert cluster.record("OffsetSequencerLine", "offset_sequencer", 0, 0)["scanned"] == 1
    cluster.publish_all(session, [1])
    assert statuses(cluster, session) == {0: COMMITTED, 1: COMMITTED}


# ---- back-pressure -------------------------------------------------------------------------------------------------


def test_a_full_order_index_pushes_back_and_resumes_when_it_is_read(cluster: ManualCluster) -> None:
    topic = cluster.create()
    cursor, _ = cluster.open_cursor(topic)
    session = cluster.open_session(topic)
    entries, sequence = cluster.layout.numbers["order_entry_count"], 0
    for _ in range(2 * entries):
        if cluster.publish(session, sequence, broker=sequence % 4) == RECEIVED:
            sequence += 1
        cluster.settle()
    committed = cluster.reader(topic).frontiers()["committed_index"]
    assert entries - 8 <= committed < entries
    assert sequence > committed, "what was received waits in the rings"
    reader, read = cluster.reader(topic), []
    while news := cluster.read(reader):
        read += news
        cluster.brokers[0].cursors.move(cursor, reader.index)
        cluster.settle()
    assert [each.messages for each in read] == [[payload_of(session, each)] for each in range(sequence)]
    cluster.check_invariants()


def test_held_batches_that_found_the_order_index_full_commit_when_there_is_room() -> None:
    cluster = ManualCluster(brokers=2)
    topic = cluster.create()
    cursor, _ = cluster.open_cursor(topic)
    filler, session = cluster.open_session(topic, client=1), cluster.open_session(topic, client=2, broker=1)
    entries = cluster.layout.numbers["order_entry_count"]
    for sequence in range(entries - 4):
        cluster.publish(filler, sequence)
        cluster.settle()
    for sequence in range(1, 13):
        cluster.publish(session, sequence, broker=1)
    cluster.settle()
    cluster.publish_all(session, [0])                   # some of the held ones fit, the others wait
    assert cluster.order.session_state(session.slot)["held"] > 0
    cluster.clock.advance(5 * LEASE_NS)
    cluster.settle()
    cluster.brokers[0].cursors.close(cursor)
    cluster.settle()
    assert [sequence for client, _, sequence in cluster.order_of(topic) if client == 2] == list(range(13))
    assert cluster.order.session_state(session.slot)["held"] == 0
    assert cluster.counters()["held_now"] == 0


# ---- any schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_any_interleaving_of_stages_gives_one_gap_free_order(cluster: ManualCluster, seed: int) -> None:
    rng = random.Random(seed)
    topic = cluster.create()
    sessions = [cluster.open_session(topic, client=client, broker=client % 4) for client in range(1, 4)]
    sent = {session.client: 0 for session in sessions}
    for _ in range(400):
        session = rng.choice(sessions)
        if sent[session.client] < 15 and cluster.publish(session, sent[session.client], broker=rng.randrange(4)) == 0:
            sent[session.client] += 1
        rng.choice(cluster.stages).step_once()
        cluster.check_invariants()
    cluster.settle()
    order = cluster.order_of(topic)
    for session in sessions:
        own = [sequence for client, _, sequence in order if client == session.client]
        assert own == list(range(sent[session.client])), f"seed {seed}"
    assert len(order) == sum(sent.values())


