"""Real scanner threads without the GIL, together with threads of brokers and publishers: the order has no hole.

Nothing here depends on a timing: threads run as they like, and only the outcome is checked.
"""

import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest

from broker.pipeline import Pipeline
from broker.stages.receiver import RECEIVED
from sim.cxl import region as files
from tests.manual_cluster import KIB, MIB, ManualCluster, Session, payload_of

BROKERS, SESSIONS, BATCHES = 4, 4, 1500
WAIT_SECONDS = 60


@pytest.fixture
def semaphore() -> Iterator[str]:
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_semaphore(name).close()
    yield "/" + name
    files.remove_semaphore(name)


def pipelines_of(cluster: ManualCluster, yield_ns: int) -> list[Pipeline]:
    """A thread for each scanner, one for each broker's other stages, one for reclaim."""
    head = [*cluster.scanners, cluster.reclaim]
    log, bells = cluster.brokers[0].log, cluster.doorbells
    plans = [Pipeline(f"head-{i}", [stage], bells[0], log, yield_ns) for i, stage in enumerate(head)]
    for broker in cluster.brokers:
        stages = [stage for stage in broker.in_turn() if stage not in head]
        plans.append(Pipeline(f"broker-{broker.number}", stages, bells[broker.number], broker.log, yield_ns))
    return plans


def feed(cluster: ManualCluster, sessions: list[Session], seed: int, failures: list[BaseException]) -> None:
    """Publish every session's batches over all brokers, some twice, some late, as a publisher would."""
    rng = random.Random(seed)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        left = {session.client: list(range(BATCHES)) for session in sessions}
        again: dict[int, list[int]] = defaultdict(list)
        while any(left.values()):
            session = rng.choice([each for each in sessions if left[each.client]])
            waiting = left[session.client]
            if again[session.client] and rng.random() < 0.1:
                sequence = again[session.client].pop()
                cluster.publish(session, sequence, broker=rng.randrange(BROKERS))
                continue
            # Within the window, not always the next one: some are held.
            place = min(rng.choice((0, 0, 0, 1, 2)), len(waiting) - 1)
            if cluster.publish(session, waiting[place], broker=rng.randrange(BROKERS)) == RECEIVED:
                again[session.client].append(waiting.pop(place))
            else:
                place = 0
                time.sleep(0)
            assert time.monotonic() < deadline, f"seed {seed}: publishers got stuck"
    except BaseException as error:
        failures.append(error)


@pytest.mark.parametrize("yield_ns", [-1, 0], ids=["never-sleeps", "always-sleeps"])
@pytest.mark.parametrize("scanners", [1, 2, 4])
@pytest.mark.parametrize("lock", ["atomic", "mutex", "semaphore"])
def test_threads_of_scanners_give_one_order_without_hole_or_double(
        lock: str, scanners: int, yield_ns: int, semaphore: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    cluster = ManualCluster(brokers=BROKERS, lock=lock, scanners=scanners, semaphore=semaphore, ring_slot_count=64,
                            order_entry_count=8192, region_bytes=32 * MIB, segment_bytes=64 * KIB)
    topic = cluster.create()
    sessions = [cluster.open_session(topic, client=client + 1, broker=client % BROKERS) for client in range(SESSIONS)]
    failures: list[BaseException] = []
    pipelines = pipelines_of(cluster, yield_ns)
    for pipeline in pipelines:
        pipeline.start()
    try:
        feeder = threading.Thread(target=feed, args=(cluster, sessions, seed, failures))
        feeder.start()
        feeder.join(WAIT_SECONDS + 5)
        assert not feeder.is_alive()
        assert not failures, failures
        reader, total = cluster.reader(topic), SESSIONS * BATCHES
        deadline = time.monotonic() + WAIT_SECONDS
        while reader.frontiers()["committed_index"] < total:
            assert time.monotonic() < deadline, f"seed {seed}: {reader.frontiers()} {cluster.counters()}"
            time.sleep(0.001)
    finally:
        for pipeline in pipelines:
            pipeline.stop()
    cluster.settle()
    check_outcome(cluster, sessions, seed)


def check_outcome(cluster: ManualCluster, sessions: list[Session], seed: int) -> None:
    topic = sessions[0].topic
    read = cluster.read(cluster.reader(topic), MIB)
    assert [each.position for each in read] == list(range(SESSIONS * BATCHES)), f"seed {seed}"
    by_client = {session.client: session for session in sessions}
    order = cluster.order_of(topic)
    assert [each.messages for each in read] == [[payload_of(by_client[client], sequence)]
                                                for client, _, sequence in order]
    for session in sessions:
        assert [sequence for client, _, sequence in order if client == session.client] == list(range(BATCHES))
    counters = cluster.counters()
    assert counters["batches_ordered"] == SESSIONS * BATCHES
    assert counters["held_now"] == 0
    ordered = [cluster.record("OffsetSequencerLine", "offset_sequencer", 0, broker)["ordered"]
               for broker in range(BROKERS)]
    assert sum(ordered) == SESSIONS * BATCHES
    cluster.check_invariants()
