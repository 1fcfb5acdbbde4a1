"""No wake-up is lost: whoever arms, looks and sleeps is woken by whoever publishes and rings."""

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broker.doorbell import Doorbell
from broker.pipeline import Pipeline
from sim.cxl import region as files
from sim.cxl.memory import MappedMemory, current_processor, leave_processor
from tests.manual_cluster import ManualCluster

BATCHES = 3_000
WAIT_SECONDS = 60


def publish_one_by_one(cluster: ManualCluster, session: Any, seed: int) -> None:
    """Publish when the last one is acknowledged: the pipeline sleeps in between, each time."""
    rng, at = random.Random(seed), cluster.layout.offset_of("topic_order", 0) + 8
    for sequence in range(BATCHES):
        assert cluster.publish(session, sequence, broker=rng.randrange(2)) == 0
        deadline = time.monotonic() + WAIT_SECONDS
        while cluster.memory.load_word(at) <= sequence:
            os.sched_yield()
            assert time.monotonic() < deadline, f"batch {sequence} was never ordered"


def test_a_sleeping_pipeline_is_woken_by_each_batch() -> None:
    # A lost wake-up costs a whole sleep (100 ms): of thousands of wake-ups only a few may last that long.
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    pipelines = [Pipeline(f"broker-{broker.number}", broker.in_turn(), cluster.doorbells[broker.number], broker.log, 0)
                 for broker in cluster.brokers]
    for pipeline in pipelines:
        pipeline.start()
    begun = time.monotonic()
    try:
        publish_one_by_one(cluster, session, seed)
    finally:
        for pipeline in pipelines:
            pipeline.stop()
    lost_at_most = (time.monotonic() - begun) / 0.1
    assert lost_at_most < BATCHES / 10, "a lost wake-up is a sleep of 100 ms"
    cluster.settle()
    assert cluster.reader(session.topic).frontiers()["committed_index"] == BATCHES


# ---- between processes ---------------------------------------------------------------------------------------------

BELL, PING, PONG, ROUNDS = 0, 4096, 8192, 2_000


@pytest.fixture
def region() -> Iterator[str]:
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_region_file(name, 1 << 20).close()
    yield name
    files.remove_region_file(name)


def answer(name: str) -> None:
    memory = MappedMemory(files.map_region_file(name))
    bell = Doorbell(memory, BELL)
    for number in range(1, ROUNDS + 1):
        seen = memory.load_word(BELL)
        memory.fetch_add_word(BELL + 8, 1)              # arm, look once more, and only then sleep
        while memory.load_word(PING) < number:
            bell.sleep_now(seen, 20_000_000_000)
            seen = memory.load_word(BELL)
        memory.fetch_add_word(BELL + 8, (1 << 64) - 1)
        memory.store_word(PONG, number)


def test_a_process_that_sleeps_is_woken_by_another(region: str) -> None:
    memory = MappedMemory(files.map_region_file(region))
    bell = Doorbell(memory, BELL)
    sleeper = multiprocessing.get_context("spawn").Process(target=answer, args=(region,))
    sleeper.start()
    try:
        for number in range(1, ROUNDS + 1):
            memory.store_word(PING, number)
            bell.ring_now()
            deadline = time.monotonic() + 15            # less than a sleep: a lost wake-up fails
            while memory.load_word(PONG) < number:
                os.sched_yield()
                assert time.monotonic() < deadline, f"round {number}: the sleeper was not woken"
        sleeper.join(WAIT_SECONDS)
        assert sleeper.exitcode == 0
    finally:
        if sleeper.is_alive():
            sleeper.kill()
        sleeper.join()


def test_a_ringer_makes_no_system_call_while_nobody_sleeps() -> None:
    cluster = ManualCluster()
    before = cluster.memory.load_word(cluster.layout.offset_of("doorbell", 0, 0))
    cluster.doorbells[0].ring_now()
    assert cluster.memory.load_word(cluster.layout.offset_of("doorbell", 0, 0)) == before


def test_a_thread_leaves_a_processor_to_others_and_may_come_back() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor")
    left = 0
    for _ in range(50):
        before = current_processor()
        leave_processor(before)
        left += current_processor() != before
        assert os.sched_getaffinity(0) == allowed
    assert left


def test_a_thread_that_may_use_one_processor_stays_there() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        leave_processor(min(allowed) + 1)
        assert (current_processor(), os.sched_getaffinity(0)) == (min(allowed) + 1, {min(allowed)})
    finally:
        os.sched_setaffinity(0, allowed)
