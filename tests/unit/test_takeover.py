"""Takeover of the sequencer, stepped by hand: nothing lost, nothing twice, no hole, whatever the old head still stores."""

import itertools

import pytest

from broker.head import epoch_of
from broker.layout import ControlBits, ResultStatus, SessionState
from tests.manual_cluster import SECOND, ManualCluster, Session, payload_of, step_head

COMMITTED, DUPLICATE = ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE


def messages_of(cluster: ManualCluster, session: Session) -> list[bytes]:
    return [message for each in cluster.read(cluster.reader(session.topic)) for message in each.messages]


def expected_of(session: Session, count: int) -> list[bytes]:
    return [payload_of(session, sequence) for sequence in range(count)]


def check(cluster: ManualCluster, session: Session, count: int) -> None:
    """Everything published is there once, in order; positions have no hole; frontiers did not go back."""
    assert messages_of(cluster, session) == expected_of(session, count)
    assert [each["position"] for each in cluster.entries(session.topic)] == list(range(count))
    cluster.check_invariants()


def order_without_acks(cluster: ManualCluster) -> None:
    """Delegate and order what was received; nobody takes a result."""
    for broker in cluster.brokers:
        broker.delegation.step_once()
    step_head(cluster.term)


@pytest.mark.parametrize("scanners", [1, 2])
@pytest.mark.parametrize("order", [0, 5])
def test_a_new_head_goes_on_where_the_last_one_stood(scanners: int, order: int) -> None:
    cluster = ManualCluster(brokers=3, scanners=scanners, order_entry_count=256)
    session = cluster.open_session(cluster.create(order=order))
    for head, first in ((1, 0), (2, 20), (0, 40), (1, 60)):
        for sequence in range(first, first + 20):
            cluster.publish_all(session, [sequence], broker=sequence % 3)
        cluster.check_invariants()
        cluster.take_over(head)
        assert epoch_of(cluster.control) == first // 20 + 2
    cluster.publish_all(session, range(80, 90))
    acks = [ack for broker in range(3) for ack in cluster.take_acks(session, broker)]
    assert sorted(ack.sequence for ack in acks) == list(range(90))
    assert {ack.status for ack in acks} == {COMMITTED}
    assert all(ack.position == ack.sequence for ack in acks) or order == 0
    check(cluster, session, 90)


def test_what_was_received_and_not_ordered_is_ordered_by_the_next_head() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(5))
    for sequence in (9, 5, 7, 8, 6):
        assert cluster.publish(session, sequence, broker=sequence % 2) == 0
    order_without_acks(cluster)             # some are committed, none is acknowledged
    cluster.take_over(1)
    cluster.settle()
    acks = [*cluster.take_acks(session, 0), *cluster.take_acks(session, 1)]
    assert sorted((ack.sequence, ack.position) for ack in acks) == [(each, each) for each in range(10)]
    check(cluster, session, 10)


def test_a_broker_that_fills_its_ring_anew_before_the_next_head_looks_at_it_is_followed() -> None:
    # What the last head had answered is released meanwhile: the ring may be one lap beyond where the scanner begins.
    cluster = ManualCluster(brokers=2, ring_slot_count=16)
    session = cluster.open_session(cluster.create())
    for sequence in range(16):
        assert cluster.publish(session, sequence, broker=1) == 0
    order_without_acks(cluster)
    cluster.take_over(0)
    broker = cluster.brokers[1]
    while broker.acks.step_once() + broker.release.step_once():
        pass
    for sequence in range(16, 32):
        assert cluster.publish(session, sequence, broker=1) == 0
    broker.delegation.step_once()
    cluster.settle()
    assert cluster.counters()["damaged"] == 0
    check(cluster, session, 32)


def stopped_in_mid_step(frontier_back: int, progress_back: int, entries_gone: int) -> tuple[ManualCluster, Session]:
    """Ten batches of which the last were not committed when the head ended, put back to what had been stored."""
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(4))
    for sequence in range(4, 10):
        assert cluster.publish(session, sequence, broker=sequence % 2) == 0
    order_without_acks(cluster)
    step_head(cluster.term)
    number = session.topic.number
    assert cluster.record("TopicOrderLine", "topic_order", number)["committed_index"] == 10
    committed = 10 - frontier_back
    cluster.poke("TopicOrderLine", "topic_order", number, committed_index=committed, committed_position=committed)
    cluster.poke("SessionProgressLine", "session_progress", session.slot, expected=10 - progress_back)
    for index in range(10 - entries_gone, 10):
        cluster.poke("OrderEntry", "order_entry", number, index, commit=0)
    return cluster, session


@pytest.mark.parametrize(("frontier_back", "progress_back", "entries_gone"), [
    (3, 0, 0),          # sessions were written, the frontier was not
    (3, 3, 0),          # entries were written, sessions were not
    (3, 3, 1), (6, 6, 3), (6, 6, 6),    # the last entries were not whole
    (6, 4, 4),
])
def test_what_was_written_and_not_committed_is_completed_or_voided(
        frontier_back: int, progress_back: int, entries_gone: int) -> None:
    cluster, session = stopped_in_mid_step(frontier_back, progress_back, entries_gone)
    takeover = cluster.take_over(1)
    assert takeover.adopted == frontier_back - entries_gone
    cluster.settle()
    acks = [*cluster.take_acks(session, 0), *cluster.take_acks(session, 1)]
    assert sorted((ack.sequence, ack.position, ack.status) for ack in acks) == [
        (each, each, COMMITTED) for each in range(10)]
    check(cluster, session, 10)
    cluster.publish_all(session, range(10, 14))
    check(cluster, session, 14)


def test_an_adopted_batch_whose_result_was_lost_is_no_duplicate_of_itself() -> None:
    # As a duplicate it would not hold its payload: the segment came back, and was filled anew.
    cluster, session = stopped_in_mid_step(3, 3, 0)
    for broker, slot in itertools.product(range(2), range(cluster.layout.numbers["ring_slot_count"])):
        at = cluster.layout.offset_of("result", 0, broker, slot)
        if cluster.memory.load_word(at) and cluster.memory.load_word(at + 8) >= 7:
            cluster.memory.store_word(at, 0)
    assert cluster.take_over(1).adopted == 3
    cluster.settle()
    acks = [*cluster.take_acks(session, 0), *cluster.take_acks(session, 1)]
    assert sorted((ack.sequence, ack.position, ack.status) for ack in acks) == [
        (each, each, COMMITTED) for each in range(10)]
    check(cluster, session, 10)


def test_an_entry_behind_one_that_is_missing_is_voided_and_ordered_again() -> None:
    cluster, session = stopped_in_mid_step(6, 6, 0)
    cluster.poke("OrderEntry", "order_entry", session.topic.number, 6, commit=0)
    assert cluster.take_over(1).adopted == 2
    cluster.settle()
    check(cluster, session, 10)


def test_a_resent_batch_of_before_is_a_duplicate_at_the_next_head() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(6))
    cluster.take_acks(session)
    cluster.take_over(1)
    cluster.publish_all(session, [3, 5, 6], broker=1)
    acks = cluster.take_acks(session, 1)
    assert [(ack.sequence, ack.status) for ack in acks] == [(3, DUPLICATE), (5, DUPLICATE), (6, COMMITTED)]
    check(cluster, session, 7)


def test_nothing_that_a_replaced_head_stores_is_read_or_acknowledged() -> None:
    cluster = ManualCluster(brokers=3)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(8))
    cluster.take_acks(session)
    zombie = cluster.term
    takeover = cluster.takeover(1)
    for sequence in range(8, 12):
        cluster.publish(session, sequence, broker=sequence % 3)
    for broker in cluster.brokers:
        broker.delegation.step_once()
    # It orders all of them, moves its frontier, writes results: under an epoch that has ended.
    assert step_head(zombie) > 0
    for broker in cluster.brokers:
        broker.acks.step_once()
        broker.release.step_once()
        assert cluster.take_acks(session, broker.number) == []
    assert cluster.reader(session.topic).read_frame(1 << 20) == b"", "nobody serves: nothing is there to read"
    cluster.finish(takeover)
    cluster.settle()
    step_head(zombie)
    cluster.settle()
    acks = [ack for broker in range(3) for ack in cluster.take_acks(session, broker)]
    assert sorted((ack.sequence, ack.position) for ack in acks) == [(each, each) for each in range(8, 12)]
    check(cluster, session, 12)


def test_a_zombie_that_orders_otherwise_changes_nothing() -> None:
    cluster = ManualCluster(brokers=3)
    first = cluster.open_session(cluster.create(), client=1)
    second = cluster.open_session(first.topic, client=2)
    zombie = cluster.term
    cluster.take_over(1)
    for sequence in range(6):
        cluster.publish(first, sequence, broker=0)
        cluster.publish(second, sequence, broker=1)
    for broker in cluster.brokers:
        broker.delegation.step_once()
    step_head(zombie)
    before = cluster.memory.read_bytes(0, cluster.layout.numbers["region_bytes"])
    step_head(zombie)
    cluster.settle()
    assert len(cluster.order_of(first.topic)) == 12
    for client in (1, 2):
        assert [each[2] for each in cluster.order_of(first.topic) if each[0] == client] == list(range(6))
    assert before != b""
    cluster.check_invariants()


def test_a_zombie_reclaims_nothing_that_the_next_head_copies() -> None:
    cluster = ManualCluster(brokers=3, order_entry_count=32)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(24))
    zombie, takeover = cluster.term, cluster.takeover(1)
    takeover.step_once()                                # it knows which entries there are, and has copied none of them
    for sequence in range(24, 40):
        cluster.publish(session, sequence, broker=1)
    cluster.brokers[1].delegation.step_once()
    for _ in range(20):
        step_head(zombie)
    cluster.finish(takeover)
    assert messages_of(cluster, session)[:24] == expected_of(session, 24)
    cluster.settle()
    cluster.check_invariants()
    assert cluster.entries(session.topic)[-1]["position"] == 39


@pytest.mark.parametrize("index", [0, 7, 18, 19])
def test_no_damaged_entry_is_believed_by_the_next_heads(index: int) -> None:
    """Its readers are told of it; positions, sessions and what is kept come from records that agree with each other."""
    for bit in range(0, 512, 3):
        cluster = ManualCluster(brokers=2, order_entry_count=64)
        session = cluster.open_session(cluster.create())
        cluster.publish_all(session, range(20))
        at = cluster.layout.with_bank(0).offset_of("order_entry", 0, index) + bit // 64 * 8
        cluster.memory.store_word(at, cluster.memory.load_word(at) ^ 1 << bit % 64)
        cluster.take_over(1)
        cluster.publish_all(session, range(20, 40))
        cluster.take_over(0)
        cluster.publish_all(session, range(40, 50))
        acks = [ack for broker in range(2) for ack in cluster.take_acks(session, broker)]
        assert sorted((ack.sequence, ack.position, ack.status) for ack in acks) == [
            (each, each, COMMITTED) for each in range(50)], f"bit {bit}"
        reader = cluster.reader(session.topic, index + 2)
        assert [message for each in cluster.read(reader) for message in each.messages] == expected_of(
            session, 50)[index + 2:], f"bit {bit}"
        cluster.publish_all(session, range(50, 90))     # more than the index has: the damaged one is reclaimed
        frontiers = cluster.reader(session.topic).frontiers()
        assert frontiers["committed_position"] == 90
        assert frontiers["reclaimed_index"] == frontiers["reclaimed_position"] > index, f"bit {bit}"


def test_recovery_may_be_killed_after_each_of_its_steps_and_begun_anew() -> None:
    for killed_after in itertools.count():
        cluster, session = stopped_in_mid_step(6, 4, 2)
        takeover = cluster.takeover(1)
        for _ in range(killed_after):
            takeover.step_once()
        if takeover.done:
            break
        second = cluster.takeover(0)
        second.step_once()
        takeover.step_once()                # and if it is not dead, it notices
        assert takeover.lost
        cluster.take_over(1)
        second.step_once()
        assert second.lost
        cluster.settle()
        check(cluster, session, 10)
    assert killed_after > 4, "there were steps to be killed in"


def test_sessions_stay_fenced_and_keep_their_high_water_mark() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(5))
    later = cluster.open_session(session.topic, epoch=2, broker=1)
    assert later.predecessor_expected == 5
    cluster.take_over(1)
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_FENCED
    assert cluster.order.session_state(session.slot)["expected"] == 5
    cluster.publish_all(session, [5])
    assert cluster.take_acks(session)[-1].status == ResultStatus.RESULT_FENCED
    third = cluster.open_session(session.topic, epoch=3)
    assert third.predecessor_expected == 0, "the second session has committed nothing"
    cluster.check_invariants()


def test_held_batches_survive_and_a_gap_still_fences_only_by_its_lease() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [0, 2, 3])
    cluster.take_over(1)
    cluster.settle()
    assert cluster.order.session_state(session.slot) == {
        "state": SessionState.SESSION_OPEN, "expected": 1, "held": 2, "epoch": 1}
    cluster.clock.advance(29 * SECOND)
    cluster.settle()
    assert cluster.order.session_state(session.slot)["state"] == SessionState.SESSION_OPEN
    cluster.publish_all(session, [1], broker=1)
    check(cluster, session, 4)


def test_results_left_in_a_bank_by_an_earlier_head_are_not_taken() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    cluster.publish(session, 0)
    order_without_acks(cluster)             # bank 0 has a result, and its frontier has moved
    cluster.poke("TopicOrderLine", "topic_order", 0, committed_index=0, committed_position=0)
    cluster.poke("OrderEntry", "order_entry", 0, 0, commit=0)
    cluster.poke("SessionProgressLine", "session_progress", session.slot, expected=0)
    cluster.take_over(1)
    takeover = cluster.takeover(0)          # bank 0 again
    for _ in range(20):
        takeover.step_once()
    for broker in cluster.brokers:
        broker.acks.step_once()
    assert cluster.take_acks(session) == [], "the next head has not answered yet"
    cluster.finish(takeover)
    cluster.settle()
    check(cluster, session, 1)


def test_topics_come_and_go_under_any_head_and_every_segment_comes_back() -> None:
    cluster = ManualCluster(brokers=2)
    free = cluster.free_segments()
    for head in (1, 0, 1):
        session = cluster.open_session(cluster.create("first"))
        cluster.publish_all(session, range(10), broker=1 - head)
        cluster.take_over(head)
        cluster.settle()
        cluster.publish_all(session, range(10, 20), broker=head)
        check(cluster, session, 20)
        cluster.close_session(session)
        cluster.delete("first")
        cluster.settle()
        assert cluster.free_segments() == free
    cluster.check_invariants()


def test_a_reader_keeps_its_place_and_its_protection() -> None:
    cluster = ManualCluster(brokers=2, order_entry_count=64)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(30))
    cursor, granted = cluster.open_cursor(session.topic, 10)
    assert granted == 10
    reader = cluster.reader(session.topic, 10)
    cluster.take_over(1)
    cluster.publish_all(session, range(30, 64))
    assert cluster.reader(session.topic).frontiers()["reclaimed_index"] <= 10
    found = [message for each in cluster.read(reader) for message in each.messages]
    assert found == expected_of(session, 64)[10:]
    cluster.brokers[0].cursors.close(cursor)
    cluster.publish_all(session, range(64, 150))
    assert cluster.reader(session.topic).frontiers()["reclaimed_index"] > 10
    cluster.check_invariants()


def test_the_control_word_says_who_serves_from_which_bank() -> None:
    cluster = ManualCluster(brokers=3)
    takeover = cluster.takeover(2)
    control = cluster.control
    assert control & ControlBits.CONTROL_BROKER == 2
    assert not control & ControlBits.CONTROL_SERVING
    assert control >> ControlBits.CONTROL_SOURCE_SHIFT & 0xFF == 1, "bank 0, plus one"
    cluster.finish(takeover)
    assert cluster.control & ControlBits.CONTROL_SERVING
    assert cluster.control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF == 1


def test_heads_come_and_go_while_the_log_is_reclaimed() -> None:
    cluster = ManualCluster(brokers=3, order_entry_count=64)
    session = cluster.open_session(cluster.create())
    for number in range(12):
        cluster.publish_all(session, range(25 * number, 25 * number + 25), broker=number % 3)
        cluster.take_over((number + 1) % 3)
        cluster.settle()
        cluster.check_invariants()
    acks = [ack for broker in range(3) for ack in cluster.take_acks(session, broker)]
    assert sorted((ack.sequence, ack.position, ack.status) for ack in acks) == [
        (each, each, COMMITTED) for each in range(300)]
    first = cluster.reader(session.topic).frontiers()
    reader = cluster.reader(session.topic, first["reclaimed_index"])
    assert [message for each in cluster.read(reader) for message in each.messages] == expected_of(
        session, 300)[first["reclaimed_position"]:]
