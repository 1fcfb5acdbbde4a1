"""A host's private cache behaves as the contract of memory without coherence says, and fails as hardware fails."""

import time
from collections.abc import Callable

import pytest

from sim.cxl.cachelines import LineState
from sim.cxl.host import Device, HostCache
from sim.cxl.memory import MemoryFault, Role
from sim.cxl.noncoherent import NonCoherentMemory
from sim.cxl.profiles import load_profile

LINE = 64
NONE = bytes(LINE)


class Pair:
    """A writer and a reader on different hosts of one small device."""

    def __init__(self, line_bytes: int | None = None, nbytes: int = 8192, **device: object) -> None:
        self.mapping = bytearray(nbytes)
        self.device = Device(self.mapping, line_bytes, **device)
        self.hosts = [HostCache(self.device, name) for name in ("writer", "reader")]
        self.writer, self.reader = (NonCoherentMemory(host) for host in self.hosts)

    def seen(self, offset: int) -> int:
        """What the reader gets when it does everything right."""
        self.reader.invalidate_range(offset, 8)
        return self.reader.load_word(offset)


def test_a_store_is_private_until_it_is_flushed_and_fenced() -> None:
    pair = Pair()
    pair.writer.store_word(64, 7)
    assert pair.seen(64) == 0 and pair.hosts[0].state_of(64) == LineState.LINE_DIRTY
    pair.writer.flush_range(64, 8)
    assert pair.seen(64) == 0 and pair.hosts[0].state_of(64) == LineState.LINE_PENDING
    pair.writer.store_fence()
    assert pair.seen(64) == 7 and pair.hosts[0].state_of(64) == LineState.LINE_CLEAN


def test_a_load_is_stale_until_the_line_is_invalidated() -> None:
    pair = Pair()
    pair.reader.load_word(64)
    pair.writer.store_word(64, 7)
    pair.writer.flush_range(64, 8)
    pair.writer.store_fence()
    assert pair.reader.load_word(64) == 0
    assert pair.seen(64) == 7


def test_a_load_fence_completes_no_flush_and_a_full_fence_does() -> None:
    pair = Pair()
    pair.writer.store_word(64, 7)
    pair.writer.flush_range(64, 8)
    pair.writer.load_fence()
    assert pair.seen(64) == 0
    pair.writer.order_all()
    assert pair.seen(64) == 7


def test_a_fence_completes_the_flushes_of_its_own_thread_alone() -> None:
    pair = Pair()
    other = pair.writer.with_role(Role.ROLE_ACK)
    pair.writer.agent, other.agent = 1, 2
    pair.writer.store_word(64, 7)
    pair.writer.flush_range(64, 8)
    other.store_fence()
    assert pair.seen(64) == 0
    pair.writer.store_fence()
    assert pair.seen(64) == 7


def test_doors_of_one_host_share_its_cache() -> None:
    pair = Pair()
    pair.writer.store_word(64, 7)
    assert pair.writer.with_role(Role.ROLE_ACK).load_word(64) == 7


def test_a_store_to_a_flushed_line_is_a_new_store() -> None:
    pair = Pair()
    pair.writer.store_word(64, 1)
    pair.writer.flush_range(64, 8)
    pair.writer.store_word(64, 2)
    pair.writer.store_fence()
    assert pair.seen(64) == 1
    assert pair.hosts[0].state_of(64) == LineState.LINE_DIRTY


def test_a_late_write_back_takes_a_neighbours_bytes_along() -> None:
    pair = Pair()
    pair.writer.load_word(64)
    pair.reader.store_word(72, 5)
    pair.reader.flush_range(72, 8)
    pair.reader.store_fence()
    pair.writer.store_word(64, 1)               # of its old copy of the line
    pair.writer.flush_range(64, 8)
    pair.writer.store_fence()
    assert pair.seen(64) == 1 and pair.seen(72) == 0, "the loss of an update is what the hardware would do"


def test_invalidating_a_dirty_line_writes_it_back() -> None:
    pair = Pair()
    pair.writer.store_word(64, 7)
    pair.writer.invalidate_range(64, 8)
    assert pair.hosts[0].state_of(64) == LineState.LINE_ABSENT
    assert pair.seen(64) == 7


def test_a_bulk_copy_is_pending_and_uncached() -> None:
    pair = Pair()
    pair.reader.read_bytes(0, 256)
    pair.writer.write_bytes(0, b"x" * 256)
    assert pair.hosts[0].state_of(128) == LineState.LINE_STREAMED
    pair.reader.invalidate_range(0, 256)
    assert pair.reader.read_bytes(0, 256) == bytes(256)
    pair.writer.store_fence()
    assert pair.hosts[0].state_of(128) == LineState.LINE_ABSENT
    assert pair.reader.read_bytes(0, 256) == bytes(256)
    pair.reader.invalidate_range(0, 256)
    assert pair.reader.read_bytes(0, 256) == b"x" * 256


def test_payload_is_stale_until_invalidated_line_by_line() -> None:
    pair = Pair(line_bytes=1024)
    pair.writer.write_bytes(1024, b"a" * 128)
    pair.writer.store_fence()
    assert pair.reader.read_bytes(1024, 128) == b"a" * 128
    pair.writer.write_bytes(1024 + 64, b"b" * 128)
    pair.writer.store_fence()
    read = pair.reader.read_bytes(1024, 192)
    assert read[:64] == b"a" * 64, "a line that did not change is not stale"
    assert read[64:128] == b"\xdb" * 64 and read[128:] == b"b" * 64
    assert pair.hosts[1].stale_payload == 1
    pair.reader.invalidate_range(1024, 192)
    assert pair.reader.read_bytes(1024, 192) == b"a" * 64 + b"b" * 128


def test_things_happen_by_themselves_and_follow_from_the_seed() -> None:
    def run(seed: int) -> tuple[bytes, list[int]]:
        pair = Pair()
        pair.hosts[0].reset(seed)
        for offset in range(0, 2048, 64):
            pair.writer.store_word(offset, offset + 1)
        pair.hosts[0].step_evictions(20)
        return bytes(pair.mapping), pair.hosts[0].dirty_lines()

    assert run(5) == run(5)
    assert len({run(seed)[0] for seed in range(8)}) > 1
    memory, dirty = run(5)
    assert any(memory) and dirty, "some lines were written back, and not all"


def test_prefetch_makes_a_neighbour_stale() -> None:
    for seed in range(200):
        pair = Pair()
        pair.hosts[1].reset(seed)
        pair.reader.load_word(64)
        pair.hosts[1].step_evictions(60)        # fills line 0 on some seeds
        pair.writer.store_word(0, 9)
        pair.writer.flush_range(0, 8)
        pair.writer.store_fence()
        if pair.reader.load_word(0) == 0:
            return
    pytest.fail("no seed prefetched the neighbour")


def test_atomics_work_in_the_coherent_area_and_are_refused_outside() -> None:
    pair = Pair(coherent=[(128, 64)])
    assert pair.writer.fetch_add_word(128, 3) == 0
    assert pair.reader.load_word(128) == 3, "the coherent area is not cached"
    with pytest.raises(MemoryFault, match="role 5 to the line at offset 256") as raised:
        pair.writer.with_role(Role.ROLE_REPLICATION).fetch_add_word(256, 1)
    assert raised.value.kind == "atomic"
    with pytest.raises(ValueError, match="takes 64 bytes, the hardware has 32"):
        Device(bytearray(4096), coherent=[(0, 64)], coherent_bytes_max=32)


def test_device_atomics_act_on_the_device() -> None:
    pair = Pair(device_atomics=True)
    pair.writer.store_word(64, 5)
    assert pair.writer.fetch_add_word(64, 1) == 5
    assert pair.reader.fetch_add_word(64, 1) == 6
    assert pair.writer.load_word(64) == 7


@pytest.mark.parametrize(("policy", "choice", "survivors"), [
    ("never", 0, []), ("immediate", 0, [0, 64, 128]), ("inversion", 0, [128]), ("exhaustive", 0b101, [0, 128])])
def test_a_crash_keeps_what_was_fenced_and_decides_about_the_rest(
        policy: str, choice: int, survivors: list[int]) -> None:
    pair = Pair()
    pair.writer.store_word(512, 9)
    pair.writer.flush_range(512, 8)
    pair.writer.store_fence()
    for offset in (0, 64, 128):
        pair.writer.store_word(offset, 1)
    pair.writer.flush_range(64, 8)
    found = pair.hosts[0].crash(policy, choice=choice)
    assert sorted(found["survived"]) == survivors
    assert [offset for offset in (0, 64, 128) if pair.seen(offset)] == survivors
    assert pair.seen(512) == 9
    pair.writer.store_word(512, 10)
    assert pair.writer.load_word(512) == 0, "a crashed host does nothing"
    pair.hosts[0].restart()
    assert pair.writer.load_word(512) == 9


def test_random_crashes_follow_from_the_seed() -> None:
    def lost(seed: int) -> tuple[int, ...]:
        pair = Pair()
        for offset in range(0, 640, 64):
            pair.writer.store_word(offset, 1)
        return tuple(pair.hosts[0].crash("random", seed)["lost"])

    assert lost(3) == lost(3)
    assert len({lost(seed) for seed in range(20)}) > 10


def test_a_host_crashes_at_any_access_and_then_has_no_effect() -> None:
    for after in range(4):
        pair = Pair()
        pair.hosts[0].crash_after(after)
        for offset in (0, 64, 128):
            pair.writer.store_word(offset, 1)
        assert pair.hosts[0].crashed == (after < 3)
        pair.hosts[0].crash("immediate")
        assert [pair.seen(offset) for offset in (0, 64, 128)] == [int(i < after) for i in range(3)]


def test_the_trace_says_whether_two_runs_were_the_same() -> None:
    def run(value: int) -> tuple[int, int]:
        pair = Pair()
        pair.hosts[0].trace()
        pair.writer.store_word(64, value)
        pair.writer.flush_range(64, 8)
        pair.writer.store_fence()
        return pair.hosts[0].operations, pair.hosts[0].trace_hash

    assert run(1) == run(1)
    assert run(1)[0] == 3
    assert run(1)[1] != run(2)[1]


@pytest.mark.parametrize("kind", ["link", "device"])
def test_a_lost_link_or_device_is_a_fault_that_stays(kind: str) -> None:
    pair = Pair()
    if kind == "link":
        pair.hosts[0].lose_link()
    else:
        pair.device.lose()
    with pytest.raises(MemoryFault, match=kind) as raised:
        pair.writer.load_word(64)
    assert raised.value.kind == kind
    with pytest.raises(MemoryFault):
        pair.writer.store_fence()
    if kind == "link":
        assert pair.reader.load_word(64) == 0, "others still reach it"


def test_garbage_follows_from_the_seed() -> None:
    first, second, third = (bytearray(4096) for _ in range(3))
    Device(first).fill_garbage(1)
    Device(second).fill_garbage(1)
    Device(third).fill_garbage(2)
    assert first == second != third
    assert first.count(0) < 100


def test_processes_may_be_one_host() -> None:
    device = Device(bytearray(4096))
    store = bytearray(HostCache.store_bytes(device))
    first, second = (NonCoherentMemory(HostCache(device, store=store)) for _ in range(2))
    first.store_word(64, 7)
    assert second.load_word(64) == 7
    assert NonCoherentMemory(HostCache(device)).load_word(64) == 0


def test_a_profile_makes_accesses_take_its_time() -> None:
    pair = Pair(line_bytes=4096)
    pair.device.use_profile(load_profile("local-dram,load_ns=200000,peer_load_ns=400000,fence_ns=300000,write_gb_s=0.01"))

    def took(access: Callable[[], object]) -> float:
        begun = time.perf_counter_ns()
        access()
        return time.perf_counter_ns() - begun

    assert took(lambda: pair.reader.load_word(64)) >= 200_000
    assert min(took(lambda: pair.reader.load_word(64)) for _ in range(20)) < 100_000, "it is cached"
    pair.writer.store_word(64, 1)
    pair.writer.flush_range(64, 8)
    assert took(pair.writer.store_fence) >= 300_000
    assert took(lambda: pair.seen(64)) >= 400_000, "a peer has written it"
    assert took(lambda: pair.writer.write_bytes(4096, bytes(4096))) >= 409_000, "10 MB/s"
    assert Device.delay_accuracy(20_000) >= 20_000
