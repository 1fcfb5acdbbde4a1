"""Attached clients: the same results as over gRPC, and what happens when they break their word or die."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy
import pytest

from broker.errors import ClosedError, ConfigError, MessageTooBig, PoolFull, SessionFenced, UnknownTopic
from broker.inspection import inspect_region
from broker.region import attach_region
from client import Admin, Publisher, Subscriber
from client.cluster import Cluster
from sim.cxl.memory import Role
from tests.end_to_end.library_support import eventually

ROOT = Path(__file__).resolve().parents[2]


def read_all(cluster: Cluster, topic: str, count: int, transport: str = "attached") -> list[bytes]:
    """The first `count` messages of a topic."""
    out: list[bytes] = []
    with Subscriber(topic, cluster=cluster.name, transport=transport) as subscriber:
        while len(out) < count:
            got = subscriber.fetch(count - len(out), timeout=10)
            assert got, f"only {len(out)} of {count} messages came"
            out += [bytes(message.payload) for message in got]
    return out


def leased_segments(cluster: Cluster) -> int:
    """Segments in use, as the bitmap says."""
    with attach_region(cluster.name, writable=False) as region:
        return int(inspect_region(region)["pool"]["used"])


@pytest.fixture
def fresh(cluster, topic):
    """A topic that exists."""
    with Admin(cluster.name) as admin:
        admin.create_topic(topic)
        yield topic


def test_messages_arrive_in_order_and_byte_identical_over_both_transports(cluster, fresh):
    messages = [os.urandom(i % 700) for i in range(5000)]
    with Publisher(fresh, cluster=cluster.name, transport="attached", batch_bytes=4096) as publisher:
        deliveries = [publisher.publish(message) for message in messages]
        publisher.flush()
        assert [delivery.result().position for delivery in deliveries] == list(range(5000))
    assert read_all(cluster, fresh, 5000, "attached") == messages
    assert read_all(cluster, fresh, 5000, "grpc") == messages


def test_all_kinds_of_buffers_and_sizes_go_in(cluster, fresh):
    rows = numpy.arange(300, dtype=numpy.uint8).reshape(30, 10)
    big = os.urandom(1 << 20)
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"")
        publisher.publish(bytearray(b"array"))
        publisher.publish(memoryview(b"view"))
        publisher.publish(big)
        publisher.publish_many([b"one", bytearray(b"two"), b""])
        publisher.publish_array(rows)
    expected = [b"", b"array", b"view", big, b"one", b"two", b"", *(row.tobytes() for row in rows)]
    assert read_all(cluster, fresh, len(expected)) == expected


def test_a_message_larger_than_a_segment_gets_a_lease_of_its_own(cluster, fresh):
    with attach_region(cluster.name, writable=False) as region:
        size = region.layout.numbers["segment_bytes"] * 3 + 17
        limit = region.layout.numbers["message_bytes_max"]
    big = os.urandom(size)
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"before")
        publisher.publish(big)
        publisher.publish(b"after")
        with pytest.raises(MessageTooBig):
            publisher.publish(bytes(limit + 1))
    assert read_all(cluster, fresh, 3) == [b"before", big, b"after"]


def test_a_loan_is_published_on_a_clean_exit_and_given_back_on_an_exception(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        with publisher.loan(1000) as view:
            numpy.frombuffer(view, numpy.uint8)[:] = 7
        with pytest.raises(ZeroDivisionError), publisher.loan(1000) as view:
            view[:] = b"x" * 1000
            raise ZeroDivisionError
        publisher.publish(b"next").result()
    assert read_all(cluster, fresh, 2) == [b"\x07" * 1000, b"next"]


def test_a_loan_whose_view_is_still_held_is_not_published(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        with pytest.raises(BufferError), publisher.loan(10) as view:
            kept = numpy.frombuffer(view, numpy.uint8)
        del kept
        publisher.publish(b"only").result()
    assert read_all(cluster, fresh, 1) == [b"only"]


@pytest.mark.parametrize("call", [
    lambda publisher, message: publisher.publish(message),
    lambda publisher, message: publisher.publish_many([message]),
    lambda publisher, message: publisher.publish_array(numpy.frombuffer(message, numpy.uint8).reshape(1, -1)),
])
def test_what_spilled_stays_before_what_comes_later(cluster, fresh, call, monkeypatch):
    # The client loop finds private memory empty, and ends the spilling, while a message is just about to be put there.
    with Publisher(fresh, cluster=cluster.name, transport="attached", linger_ms=1000) as publisher:
        engine = publisher._engine

        def make_room(nbytes: int, make_room=engine.make_room) -> None:
            make_room(nbytes)
            engine.core.end_spilling()

        monkeypatch.setattr(engine, "make_room", make_room)
        engine.core.spill()
        call(publisher, b"spilled")
        publisher.publish(b"later").result(20)
    assert read_all(cluster, fresh, 2) == [b"spilled", b"later"]


def test_what_a_session_had_in_flight_stays_before_what_comes_later(cluster, fresh, monkeypatch):
    # The new session has slots again, and the user's thread is faster than the one that sends what was in flight.
    with Publisher(fresh, cluster=cluster.name, transport="attached", linger_ms=10_000) as publisher:
        engine = publisher._engine

        later = [b"later"]

        async def attach(*arguments: object, attach=engine._attach) -> None:
            await attach(*arguments)
            if later:                       # it connects again where a slot was not free yet
                await asyncio.to_thread(publisher.publish, later.pop())

        monkeypatch.setattr(engine, "_attach", attach)
        publisher.publish(b"in flight")
        engine.loop.call_soon_threadsafe(engine.end_session, SessionFenced(reason="a test", committed=0))
        assert eventually(lambda: publisher.statistics()["reopened"] == 1 and publisher.statistics()["messages"] == 2, 15.0)
        publisher.flush()
    assert read_all(cluster, fresh, 2) == [b"in flight", b"later"]


@pytest.mark.parametrize("nbytes", [-1, 2.5, True, None, "10", 1 << 70])
def test_a_loan_of_no_size_is_refused(cluster, fresh, nbytes):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        with pytest.raises(ConfigError, match="nbytes"):
            publisher.loan(nbytes)
        with publisher.loan(numpy.int64(3)) as view:
            view[:] = b"abc"
    assert read_all(cluster, fresh, 1) == [b"abc"]


def test_a_loan_that_is_forgotten_in_its_block_is_given_back_by_the_collector(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        loan = publisher.loan(100)
        loan.__enter__()[:1] = b"x"         # the loan and its view hold each other
        del loan
        gc.collect()
        publisher.publish(b"goes on").result()
    assert read_all(cluster, fresh, 1) == [b"goes on"]


def test_a_loan_that_the_collector_takes_with_its_closed_publisher_harms_nobody(cluster, fresh):
    for _ in range(20):
        publisher = Publisher(fresh, cluster=cluster.name, transport="attached").open()
        loan = publisher.loan(100)
        everything = [loan.__enter__(), loan, publisher, publisher._engine]
        everything.append(everything)
        publisher.close()
        del loan, publisher, everything
        gc.collect()


def test_loans_are_refused_over_grpc(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="grpc") as publisher, pytest.raises(ConfigError):
        publisher.loan(10)


def test_a_closed_publisher_writes_no_more(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"a").result()
    with pytest.raises(ClosedError):
        publisher.publish(b"b")


def test_a_deleted_topic_ends_its_attached_publisher_and_gives_everything_back(cluster, topic):
    before = leased_segments(cluster)
    with Admin(cluster.name) as admin:
        admin.create_topic(topic)
        with Publisher(topic, cluster=cluster.name, transport="attached") as publisher:
            publisher.publish(b"a").result()
            admin.delete_topic(topic)
            with pytest.raises(UnknownTopic):
                for _ in range(1000):
                    publisher.publish(b"b" * 1000).result()
    assert eventually(lambda: leased_segments(cluster) <= before, 15.0)


def test_views_hold_their_segments_and_show_as_the_holder(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"first" * 100).result()
        with Subscriber(fresh, cluster=cluster.name, transport="attached") as subscriber:
            held = subscriber.fetch(1, timeout=5)[0].payload
            chunk = os.urandom(60_000)
            with attach_region(cluster.name, writable=False) as region:
                rounds = region.layout.numbers["segment_count"] * region.layout.numbers["segment_bytes"] // 60_000
            with Publisher(fresh, cluster=cluster.name, transport="attached", delivery_timeout=2) as other:
                deliveries = [other.publish(chunk) for _ in range(rounds * 2)]
                refused = next(each.exception() for each in deliveries if each.exception() is not None)
            assert isinstance(refused, PoolFull)
            assert f"the reader of topic {fresh} in process {os.getpid()}" in refused.message
            assert bytes(held) == b"first" * 100
            del held
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"goes on").result()


PUBLISH_FOR_EVER = """
    import os, signal, sys
    from client import Publisher
    with Publisher({topic!r}, cluster={cluster!r}, transport="attached", client_id=77, batch_bytes=8192) as publisher:
        for i in range(10**9):
            publisher.publish(b"%012d" % i + b"." * 500)
            if i == 2000:
                publisher.flush()
                {action}
"""


def run_publisher(cluster: Cluster, topic: str, action: str) -> "subprocess.Popen[str]":
    """A publisher process that does something nasty in the middle."""
    program = textwrap.dedent(PUBLISH_FOR_EVER).format(topic=topic, cluster=cluster.name, action=action)
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("action", [
    "loan = publisher.loan(1000); loan.__enter__(); os.kill(os.getpid(), signal.SIGKILL)",
    "print('up', flush=True)",
], ids=["holding a loan", "in mid-stream"])
def test_a_killed_publisher_leaves_nothing_and_another_goes_on(cluster, topic, action):
    before = leased_segments(cluster)
    with Admin(cluster.name) as admin:
        admin.create_topic(topic)
        victim = run_publisher(cluster, topic, action)
        if "print" in action:
            assert victim.stdout is not None
            victim.stdout.readline()
            victim.kill()
        victim.wait(20)
        with Publisher(topic, cluster=cluster.name, transport="attached", client_id=77) as publisher:
            last = publisher.publish(b"the end").result()
        got = read_all(cluster, topic, last.position + 1)
        numbers = [int(message[:12]) for message in got[:-1]]
        assert numbers == list(range(len(numbers)))             # a gap-free prefix of what was sent, once
        assert len(numbers) >= 2001 and got[-1] == b"the end"
        admin.delete_topic(topic)
    assert eventually(lambda: leased_segments(cluster) <= before, 15.0)


def test_garbage_descriptors_fence_their_session_and_touch_nobody_else(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as honest, \
            Publisher(fresh, cluster=cluster.name, transport="attached", delivery_timeout=10) as hostile:
        hostile.publish(b"honest so far").result()
        slot = next(iter(hostile._engine.flights.slots.values()))
        with attach_region(cluster.name) as region:
            memory, layout = region.memory(Role.ROLE_CLIENT), region.layout
            client_line = layout.offset_of("attach_client", slot.number)
            taken = memory.load_word(layout.offset_of("attach_line", slot.number) + 48)
            for number in range(taken, taken + 64):
                at = layout.offset_of("attach_descriptor", slot.number, number)
                tag = slot.generation << 48 | (number + 1)
                memory.write_line_bytes(at, tag.to_bytes(8, "little") + os.urandom(56))
            memory.store_word(client_line + 16, 1 << 60)
            del memory
        assert [honest.publish(b"%d" % i).result().position is not None for i in range(20)] == [True] * 20
        assert eventually(lambda: hostile.statistics()["reopened"] >= 1, 15.0)
        receipt = hostile.publish(b"again").result()            # fenced, opened anew, and in the log once
        assert receipt.position is not None
    got = read_all(cluster, fresh, 22)
    assert sorted(got) == sorted([b"honest so far", b"again", *(b"%d" % i for i in range(20))])


def test_a_second_publisher_of_the_same_client_fences_the_first(cluster, fresh):
    events = []
    first = Publisher(fresh, cluster=cluster.name, transport="attached", client_id=5, on_event=events.append).open()
    first.publish(b"a").result()
    with Publisher(fresh, cluster=cluster.name, transport="attached", client_id=5) as second:
        second.publish(b"b").result()
    first.publish(b"c").result()
    assert eventually(lambda: events, 15.0)
    first.close()
    assert isinstance(events[0], SessionFenced)
    assert read_all(cluster, fresh, 3) == [b"a", b"b", b"c"]


def test_a_stopped_publisher_does_not_stop_others_and_goes_on_later(cluster, fresh):
    victim = run_publisher(cluster, fresh, "print('up', flush=True)")
    assert victim.stdout is not None
    victim.stdout.readline()
    victim.send_signal(signal.SIGSTOP)
    try:
        with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
            for i in range(50):
                publisher.publish(b"other %d" % i).result()
    finally:
        victim.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        victim.kill()
        victim.wait()


def test_seek_position_and_end_work_on_views(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached", batch_bytes=4096) as publisher:
        publisher.publish_many([b"%d" % i for i in range(3000)])
        publisher.flush()
        with Subscriber(fresh, cluster=cluster.name, transport="attached", start=1234) as subscriber:
            assert bytes(subscriber.fetch(1, timeout=5)[0].payload) == b"1234"
            subscriber.seek("end")
            assert subscriber.position == 3000
            assert subscriber.fetch(1, timeout=0.1) == []
            publisher.publish(b"new").result()
            assert bytes(subscriber.fetch(1, timeout=5)[0].payload) == b"new"
            subscriber.seek(7)
            batch = subscriber.fetch_batches(timeout=5)[0]
            assert batch.position == 7 and batch.messages()[0] == b"7"


def test_a_view_cannot_be_written(cluster, fresh):
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        publisher.publish(b"constant").result()
    with Subscriber(fresh, cluster=cluster.name, transport="attached") as subscriber:
        payload = subscriber.fetch(1, timeout=5)[0].payload
        assert payload.readonly
        with pytest.raises(TypeError):
            payload[0] = 1
        del payload


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_only_who_has_news_is_woken_and_at_most_once_for_each_batch(cluster, fresh):
    def bells() -> list[int]:
        """How often each slot's client was woken so far."""
        slots = range(region.layout.numbers["attach_slot_count"])
        return [region.memory().load_word(region.layout.offset_of("attach_doorbell", slot)) for slot in slots]

    options = {"cluster": cluster.name, "transport": "attached"}
    with attach_region(cluster.name, writable=False) as region, Publisher(fresh, **options) as busy, \
            Publisher(fresh, **options) as idle, Subscriber(fresh, start="end", **options) as reader:
        idle.publish(b"there").result()
        before = bells()
        for _ in range(300):
            busy.publish(b"news").result()
        rung = [after - earlier for after, earlier in zip(bells(), before, strict=True)]
        assert sum(1 for each in rung if each) <= cluster.config.brokers, "others than the busy publisher were woken"
        assert sum(rung) <= 300
        assert len(reader.fetch(300, timeout=10)) > 0
