"""The segment pool: each segment has one holder, runs are contiguous, and what comes back can be given out again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.layout import ControlBits, Layout, LayoutError
from broker.segments import PoolLeader, SegmentPool, make_pool
from sim.cxl.memory import MappedMemory
from sim.cxl.region import private_mapping
from tests.manual_cluster import KIB, MIB, ManualCluster

STRATEGIES = ("atomic", "partitioned", "leader")
NUMBERS = {
    "broker_count": 3, "topic_count_max": 1, "ring_slot_count": 16, "order_entry_count": 16, "session_count_max": 3,
    "cursor_count_max": 3, "attach_slot_count": 0, "segment_bytes": 4 * KIB, "message_bytes_max": 16 * KIB,
    "batch_bytes_max": 16 * KIB, "region_bytes": 160 * KIB,
}


class Pools:
    """The pools of all brokers over one region, and who holds which segment."""

    def __init__(self, strategy: str, **changes: int) -> None:
        self.layout = Layout.compute(pool_strategy=strategy, **{**NUMBERS, **changes})
        self.memory = MappedMemory(private_mapping(self.layout.numbers["region_bytes"]))
        self.count = self.layout.numbers["segment_count"]
        self.memory.store_word(self.layout.offset_of("control"), 1 << 32 | ControlBits.CONTROL_SERVING)
        self.leader = PoolLeader(self.memory, self.layout, 0) if strategy == "leader" else None
        self.brokers: list[SegmentPool] = [
            make_pool(self.memory, self.layout, broker) for broker in range(self.layout.numbers["broker_count"])]
        self.held: dict[int, int] = {}

    def allocate(self, broker: int, run: int) -> int:
        first = self.brokers[broker].allocate_segments(run)
        if first < 0 and self.leader:
            self.leader.step_once()
            first = self.brokers[broker].allocate_segments(run)
        for segment in range(first, first + run) if first >= 0 else ():
            assert 0 <= segment < self.count
            assert segment not in self.held, f"segment {segment} was given to {self.held[segment]} and to {broker}"
            self.held[segment] = broker
        return first

    def release(self, segment: int) -> None:
        self.brokers[self.held.pop(segment)].release_segment(segment)

    def taken_bits(self) -> int:
        words = self.layout.offset_of("warm_bitmap") - self.layout.offset_of("bitmap")
        bits = self.memory.read_bytes(self.layout.offset_of("bitmap"), words)
        return int.from_bytes(bits, "little").bit_count()

    def settle(self) -> None:
        for _ in range(4):
            if self.leader:
                self.leader.step_once()
            for pool in self.brokers:
                pool.poll_grants()


steps = st.lists(st.tuples(st.integers(0, 2), st.sampled_from((0, 0, 1, 1, 1, 2, 3, 5)), st.integers(0, 1 << 16)),
                 max_size=120)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60)
@given(steps=steps)
def test_each_segment_has_one_holder_and_none_is_lost(strategy: str, steps: list[tuple[int, int, int]]) -> None:
    pools = Pools(strategy)
    for broker, run, choice in steps:
        if run:
            pools.allocate(broker, run)
        elif pools.held:
            pools.release(sorted(pools.held)[choice % len(pools.held)])
        if strategy != "leader":
            assert pools.taken_bits() == len(pools.held)
    for segment in sorted(pools.held):
        pools.release(segment)
    pools.settle()
    private = sum(pool.free_count() for pool in pools.brokers) if pools.leader else 0
    assert pools.taken_bits() == private, "what nobody holds is free"
    free = sum(pool.free_count() for pool in pools.brokers)
    assert strategy != "partitioned" or free == pools.count
    assert sum(pool.allocated for pool in pools.brokers) == sum(pool.released for pool in pools.brokers)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_pool_of_many_words_says_so_and_finds_what_comes_back(strategy: str) -> None:
    pools = Pools(strategy, region_bytes=4 * MIB)
    assert pools.count > 3 * 128
    for _ in range(2):
        for broker in range(3):
            while pools.allocate(broker, 1) >= 0:
                pass
        assert len(pools.held) == pools.count
        assert pools.allocate(0, 1) == -1
        for segment in sorted(pools.held)[::3]:
            pools.release(segment)
        pools.settle()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pool_gives_out_everything_it_has(strategy: str) -> None:
    pools = Pools(strategy)
    for broker in range(3):
        while pools.allocate(broker, 1) >= 0:
            pass
    assert len(pools.held) == pools.count


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_the_largest_size_fits_into_the_smallest_region(strategy: str) -> None:
    sizes = {"batch_bytes_max": 2 * MIB, "message_bytes_max": 2 * MIB - 64, "segment_bytes": 64 * KIB}
    with pytest.raises(LayoutError) as error:
        Pools(strategy, region_bytes=MIB, **sizes)
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    pools = Pools(strategy, region_bytes=smallest, **sizes)
    run = 2048 // 64
    for broker in range(3):
        assert pools.allocate(broker, run) >= 0, f"broker {broker} finds no run of {run} in {pools.count} segments"
        for segment in list(pools.held):
            pools.release(segment)
        pools.settle()


def test_a_run_too_long_for_the_leaders_ring_is_refused_with_the_segment_size_that_works() -> None:
    with pytest.raises(LayoutError, match="segment_bytes at least 16384"):
        Pools("leader", region_bytes=16 * MIB, batch_bytes_max=MIB)
    pools = Pools("leader", region_bytes=16 * MIB, batch_bytes_max=MIB, segment_bytes=32 * KIB)
    assert pools.allocate(2, 32) >= 0


def test_brokers_that_share_a_bitmap_begin_in_different_words() -> None:
    pools = Pools("atomic", region_bytes=4 * MIB)
    firsts = [pools.allocate(broker, 1) for broker in range(3)]
    share = -(-pools.count // 3)
    assert firsts == [0, share, 2 * share]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_warm_segments_are_preferred_to_cold_ones(strategy: str) -> None:
    pools = Pools(strategy)
    first = pools.allocate(1, 1)
    pools.release(first)
    pools.settle()
    others = [pools.allocate(1, 1) for _ in range(3)]
    if strategy != "leader":
        assert others[0] == first
        assert pools.brokers[1].cold == 3


@pytest.mark.parametrize("strategy", ["atomic", "partitioned"])
def test_a_claim_takes_the_whole_run_or_nothing(strategy: str) -> None:
    pools = Pools(strategy)
    first = pools.allocate(0, 1)
    assert pools.brokers[0].claim_segments(first + 1, 2)
    before = pools.taken_bits()
    assert not pools.brokers[0].claim_segments(first, 2)
    assert not pools.brokers[0].claim_segments(pools.count - 1, 2)
    assert pools.taken_bits() == before


@pytest.mark.parametrize("brokers", range(1, 14))
def test_every_part_of_a_partitioned_pool_has_room_for_the_largest_batch(brokers: int) -> None:
    # 48 segments for nine brokers were six each for eight of them, and none for the last.
    counts = {"broker_count": brokers, "session_count_max": brokers, "cursor_count_max": brokers}
    for kilobytes in range(64, 1024, 4):
        try:
            pools = Pools("partitioned", **counts, region_bytes=kilobytes * KIB)
        except LayoutError:
            continue                        # too small for any
        largest = -(-pools.layout.numbers["batch_bytes_max"] // pools.layout.numbers["segment_bytes"])
        for broker in range(brokers):
            assert pools.allocate(broker, largest) >= 0, (kilobytes, broker)


def test_a_lone_wish_is_granted_once_however_often_it_is_repeated() -> None:
    pools = Pools("leader")
    for _ in range(5):
        assert pools.brokers[1].allocate_segments(3) == -1
    assert pools.leader is not None
    pools.leader.step_once()
    pools.leader.step_once()
    assert pools.taken_bits() == 3
    assert pools.allocate(1, 3) >= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_brokers_with_any_pool_carry_traffic_many_times_the_region(strategy: str) -> None:
    cluster = ManualCluster(pool=strategy, region_bytes=328 * KIB, order_entry_count=256)
    session = cluster.open_session(cluster.create())
    received = 0
    for _ in range(3000):
        received += cluster.publish(session, received, [bytes(3000)], broker=received % 2) == 0
        cluster.settle()
        if received == 300:
            break
    assert received == 300
    assert cluster.reader(session.topic).frontiers()["committed_index"] == 300
    cluster.check_invariants()


def test_the_leader_warms_every_free_segment_and_gives_it_back() -> None:
    pools = Pools("leader")
    assert pools.leader is not None
    first = pools.allocate(0, 1)
    taken = pools.taken_bits()
    warmed = 0
    while pools.leader.warm_segment():
        warmed += 1
    assert warmed == pools.count - taken, "whatever is free"
    assert pools.taken_bits() == taken, "and all of it is free again"
    assert first >= 0 and not pools.leader.warm_segment()
