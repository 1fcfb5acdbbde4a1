"""Brokers and heads that are killed at the boundaries of the stages, stopped and woken up: exactly once, without a hole.

Each test publishes numbered messages through the fault, and then looks at every byte, every position and every segment.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import psutil
import pytest

from broker.region import attach_region
from client.cluster import Cluster
from client.errors import CxlmqError
from cxlmq import Admin, Publisher, Subscriber
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import SECONDS, eventually, inspected

MESSAGES = 600
AT = 200                                # the fault comes at this message


def head_of(cluster: Cluster) -> int:
    return int(inspected(cluster.name)["control"]["sequencer_broker"])


def epoch_of(cluster: Cluster) -> int:
    return int(inspected(cluster.name)["control"]["epoch"])


def died(cluster: Cluster) -> list[int]:
    """The brokers that ended and were started anew, in this order."""
    return [broker for broker, _ in cluster.endings]


def numbered(count: int) -> list[bytes]:
    return [f"message {number} ".encode() * 20 for number in range(count)]


def publish_through(cluster: Cluster, transport: str, fault: Callable[[], None] | None = None) -> None:
    """Publish messages one by one, some in bursts, with a fault in between; then everything is there, once, in order."""
    messages = numbered(MESSAGES)
    events: list[CxlmqError] = []
    with Publisher("t", cluster=cluster.name, transport=transport, batch_bytes=2000, on_event=events.append) as publisher:
        deliveries = []
        for number, message in enumerate(messages):
            if number == AT and fault is not None:
                fault()
            deliveries.append(publisher.publish(message))
            if number % 50 == 49:
                deliveries[-1].result(SECONDS)
        publisher.flush(SECONDS)
        receipts = [delivery.result() for delivery in deliveries]
    known = [(number, receipt.position) for number, receipt in enumerate(receipts) if receipt.position is not None]
    assert all(number == position for number, position in known), "positions have neither holes nor repeats"
    assert read_all(cluster, len(messages)) == messages
    assert not [event for event in events if "fence" not in event.code and "session" not in event.code], events


def read_all(cluster: Cluster, count: int) -> list[bytes]:
    found: list[bytes] = []
    with Subscriber("t", cluster=cluster.name, start="beginning") as subscriber:
        while len(found) < count and (some := subscriber.fetch(count, timeout=SECONDS)):
            found += [message.payload for message in some]
        assert subscriber.fetch(1, timeout=0.2) == [], "and nothing more"
    return found


def assert_base_line(cluster: Cluster, free: int) -> None:
    """When the topic is gone every segment is free again, whoever had it."""
    with Admin(cluster=cluster.name) as admin:
        def deleted() -> bool:
            with contextlib.suppress(CxlmqError):
                admin.delete_topic("t")
            return not admin.list_topics()
        assert eventually(deleted)
    assert eventually(lambda: len(cluster.processes) == cluster.config.brokers)
    assert eventually(lambda: inspected(cluster.name)["pool"]["free"] == free), inspected(cluster.name)["pool"]


def run(points: str, transport: str, fault: Callable[[Cluster], None] | None = None, **settings: object) -> None:
    """A cluster with crash points, through which messages are published. Each of them ends its broker once, and nobody else
    ends; a fault looks by itself at whom it ends."""
    with Cluster(small_config(brokers=3, crash_points=points, **settings)) as cluster:
        with Admin(cluster=cluster.name) as admin:
            eventually(lambda: inspected(cluster.name)["pool"]["warm"] >= inspected(cluster.name)["pool"]["segments"])
            free = inspected(cluster.name)["pool"]["free"]
            admin.create_topic("t")
        publish_through(cluster, transport, None if fault is None else lambda: fault(cluster))
        armed = [int(each.split(":")[0]) for each in points.split(",") if each]
        assert fault is not None or eventually(lambda: died(cluster) == armed), cluster.notes
        assert_base_line(cluster, free)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("point", ["before-number", "number-taken", "mid-entry", "entry-written", "progress-written",
                                   "committed"])
def test_the_sequencer_is_killed(point: str, transport: str) -> None:
    run(f"0:{point}:8", transport)          # steps are fewer than batches


@pytest.mark.parametrize(("point", "transport"), [
    ("reserved", "grpc"), ("mid-payload", "grpc"), ("slot-claimed", "grpc"), ("slot-valid", "grpc"),
    ("before-ack", "grpc"), ("reserved", "attached"), ("slot-claimed", "attached"), ("slot-valid", "attached"),
    ("before-ack", "attached")])
def test_a_broker_is_killed(point: str, transport: str) -> None:
    run(f"1:{point}:10", transport)


@pytest.mark.parametrize("pool", ["leader", "partitioned"])
@pytest.mark.parametrize("points", ["1:reserved:10", "1:slot-valid:10", "0:entry-written:20", "0:reserved:10"])
def test_segments_of_a_killed_broker_come_back(points: str, pool: str) -> None:
    run(points, "grpc", pool=pool)


@pytest.mark.parametrize("point", ["epoch-raised", "half-recovered", "recovered"])
def test_recovery_is_killed_and_the_next_one_begins_anew(point: str) -> None:
    # Broker 1 is next in turn, broker 2 after it: who takes over dies of it. One that came back takes over in the end.
    def a_takeover_died(cluster: Cluster) -> bool:
        return not {1, 2}.isdisjoint(died(cluster))

    def took_over(cluster: Cluster, epoch: int) -> bool:
        return a_takeover_died(cluster) or (
            epoch_of(cluster) != epoch and inspected(cluster.name)["control"]["serving"])

    def kill_heads_until_a_takeover_dies(cluster: Cluster) -> None:
        while not a_takeover_died(cluster):
            epoch = epoch_of(cluster)
            with contextlib.suppress(ProcessLookupError):
                cluster.kill(head_of(cluster))
            assert eventually(partial(took_over, cluster, epoch))

    run(f"1:{point}:1,2:{point}:1", "grpc", kill_heads_until_a_takeover_dies)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_stopped_head_is_replaced_and_changes_nothing_when_it_wakes_up(transport: str) -> None:
    def stop_and_wake(cluster: Cluster) -> None:
        head, epoch = head_of(cluster), epoch_of(cluster)
        cluster.kill(head, signal.SIGSTOP)
        try:
            assert eventually(lambda: head_of(cluster) != head and inspected(cluster.name)["control"]["serving"])
        finally:
            cluster.kill(head, signal.SIGCONT)
        assert epoch_of(cluster) == epoch + 1

    run("", transport, stop_and_wake)


def run_stopped(broker: int, point: str, transport: str, until: Callable[[Cluster], bool]) -> None:
    """Broker `broker` is stopped at its 10th visit of a point, and goes on when `until` says so."""
    with Cluster(small_config(brokers=3, crash_points=f"{broker}:{point}:10:stop")) as cluster, Admin(cluster=cluster.name) as admin:
        eventually(lambda: inspected(cluster.name)["pool"]["warm"] >= inspected(cluster.name)["pool"]["segments"])
        free = inspected(cluster.name)["pool"]["free"]
        admin.create_topic("t")
        seen: list[bool] = []

        def wake() -> None:
            stopped = psutil.Process(cluster.processes[broker])
            seen.append(eventually(lambda: stopped.status() == psutil.STATUS_STOPPED) and eventually(lambda: until(cluster)))
            cluster.kill(broker, signal.SIGCONT)

        waking = threading.Thread(target=wake)
        waking.start()
        publish_through(cluster, transport)
        waking.join()
        assert seen == [True]
        assert cluster.restarts == 0
        assert_base_line(cluster, free)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("point", ["before-number", "number-taken", "mid-entry", "entry-written", "progress-written", "committed"])
def test_a_head_stopped_at_a_boundary_is_replaced_and_what_it_stores_later_counts_for_nobody(point: str, transport: str) -> None:
    run_stopped(0, point, transport, lambda cluster: head_of(cluster) != 0 and inspected(cluster.name)["control"]["serving"])


@pytest.mark.parametrize(("point", "transport"), [
    ("slot-claimed", "grpc"), ("slot-valid", "grpc"), ("before-ack", "grpc"), ("slot-claimed", "attached")])
def test_a_broker_stopped_with_a_slot_in_its_hands_goes_on_with_it(point: str, transport: str) -> None:
    def long_enough(_: Cluster) -> bool:
        time.sleep(3.0)                 # three times the lease of a head
        return True

    run_stopped(1, point, transport, long_enough)


def test_a_stopped_replica_delays_level_2_alone() -> None:
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=3)        # every broker is a replica
        stopped = (head_of(cluster) + 1) % 3
        cluster.kill(stopped, signal.SIGSTOP)
        with Publisher("t", cluster=cluster.name, ack=1) as first, Publisher("t", cluster=cluster.name, ack=2) as second:
            waiting = second.publish(b"on all disks")
            for _ in range(20):
                first.publish(b"in memory").result(SECONDS)
            with pytest.raises(TimeoutError):
                waiting.result(1.0)
            cluster.kill(stopped, signal.SIGCONT)
            assert waiting.result(SECONDS).level == 2


def test_a_reader_that_went_on_elsewhere_holds_nothing_at_the_broker_that_came_back() -> None:
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        with Publisher("t", cluster=cluster.name) as publisher, \
                Subscriber("t", cluster=cluster.name, transport="attached") as subscriber:
            publisher.publish(b"before").result(SECONDS)
            assert [bytes(each.payload) for each in subscriber.fetch(1, timeout=SECONDS)] == [b"before"]
            with attach_region(cluster.name, writable=False) as region:
                share = region.layout.numbers["cursors_per_broker"]
            cluster.kill(inspected(cluster.name)["cursors"][0]["cursor"] // share)
            assert eventually(lambda: cluster.restarts == 1)
            publisher.publish(b"after").result(SECONDS)
            assert [bytes(each.payload) for each in subscriber.fetch(1, timeout=SECONDS)] == [b"after"]
            # It asks for more as every reader does; what it held under the place that was lost is given up.
            assert eventually(lambda: subscriber.fetch(1, timeout=0.1) == [] and
                              [each["index"] for each in inspected(cluster.name)["cursors"]] == [2], 10), inspected(cluster.name)["cursors"]


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_what_a_stopped_broker_has_goes_to_others_and_is_in_the_log_once(transport: str) -> None:
    # At order 5 everything behind a batch that it has would wait for as long as it stands still.
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        sent = numbered(300)
        with Publisher("t", cluster=cluster.name, transport=transport, batch_bytes=256, delivery_timeout=SECONDS) as publisher:
            publisher.publish_many(sent[:100])
            publisher.flush()
            stopped = next(broker for broker in range(3) if broker != head_of(cluster))
            cluster.kill(stopped, signal.SIGSTOP)
            try:
                publisher.publish_many(sent[100:200])
                publisher.flush()               # it still stands still
            finally:
                cluster.kill(stopped, signal.SIGCONT)
            publisher.publish_many(sent[200:])
            publisher.flush()
            # Several at once: one that is alone goes to the head.
            assert eventually(lambda: stopped in [
                each.result(SECONDS).broker for each in [publisher.publish(b"back" * 32) for _ in range(12)]])
        with Subscriber("t", cluster=cluster.name, transport=transport, start="beginning") as subscriber:
            found: list[bytes] = []
            while len(found) < 300:
                found += [bytes(each.payload) for each in subscriber.fetch(300 - len(found), timeout=SECONDS)]
        assert found == sent


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_publisher_that_opened_while_a_broker_was_away_uses_it_when_it_is_back(transport: str) -> None:
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        cluster.kill(2)
        with Publisher("t", cluster=cluster.name, transport=transport, batch_bytes=256) as publisher:
            publisher.publish(b"without it").result(SECONDS)
            assert eventually(lambda: cluster.restarts == 1)
            # Several at once: one that is alone goes to the head.
            assert eventually(lambda: {0, 1, 2} == {
                each.result(SECONDS).broker for each in [publisher.publish(b"again" * 32) for _ in range(12)]})


def slots_held(cluster: Cluster) -> tuple[list[int], int]:
    """The brokers at which publishers hold slots, once for each slot, and how many slots readers hold."""
    slots = inspected(cluster.name)["attached"]
    return sorted(each["broker"] for each in slots if each["client_id"]), sum(not each["client_id"] for each in slots)


def test_attached_clients_that_outlive_many_brokers_hold_one_slot_a_broker() -> None:
    # Slots are few: who keeps those at brokers that died takes them from everybody who comes later.
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        with Publisher("t", cluster=cluster.name, transport="attached") as publisher, \
                Subscriber("t", cluster=cluster.name, transport="attached", start="beginning") as subscriber:
            for turn in range(6):
                cluster.kill(turn % 3)
                assert eventually(lambda turn=turn: cluster.restarts == turn + 1)
                publisher.publish(b"%d" % turn).result(SECONDS)
                assert [bytes(each.payload) for each in subscriber.fetch(1, timeout=SECONDS)] == [b"%d" % turn]

            def held() -> tuple[list[int], int]:
                # With something to send it asks all brokers again, also those that it had lost.
                for delivery in [publisher.publish(b"more" * 32) for _ in range(12)]:
                    delivery.result(SECONDS)
                subscriber.fetch(12, timeout=0.1)
                return slots_held(cluster)

            # The publisher one at each broker, the reader one: nothing is viewed under its former places.
            assert eventually(lambda: held() == ([0, 1, 2], 1)), inspected(cluster.name)["attached"]


@pytest.mark.parametrize("lock", ["mutex", "semaphore"])
def test_a_head_that_is_killed_leaves_no_lock_behind(lock: str) -> None:
    run("0:number-taken:20", "grpc", sequencer_lock=lock, scanners=2)


def test_all_brokers_are_killed_at_once_and_the_region_is_still_there() -> None:
    def kill_all(cluster: Cluster) -> None:
        for broker in range(3):
            cluster.kill(broker)

    run("", "grpc", kill_all)


def test_heads_are_killed_one_after_the_other_under_two_publishers() -> None:
    with Cluster(small_config(brokers=3)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        with Publisher("t", cluster=cluster.name, transport="grpc", batch_bytes=1000) as first, \
                Publisher("t", cluster=cluster.name, transport="attached", batch_bytes=1000) as second:
            deliveries = []
            for number in range(600):
                deliveries += [first.publish(b"first %d" % number), second.publish(b"second %d" % number)]
                if number % 100 == 50:
                    eventually(lambda: len(cluster.processes) == 3)
                    cluster.kill(head_of(cluster))
                if number % 20 == 0:
                    for delivery in deliveries[-2:]:
                        delivery.result(SECONDS)
            first.flush(SECONDS)
            second.flush(SECONDS)
        found = read_all(cluster, 1200)
        for name in (b"first", b"second"):
            assert [each for each in found if each.startswith(name)] == [name + b" %d" % number for number in range(600)]
        assert epoch_of(cluster) >= 6
        assert eventually(lambda: cluster.restarts >= 5)
