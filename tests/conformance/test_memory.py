"""The contract of `Memory`, for every implementation. A new memory is one more line in MEMORIES."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cxl.host import Device, HostCache
from sim.cxl.memory import MappedMemory, Memory, MemoryAccessError, Role
from sim.cxl.noncoherent import NonCoherentMemory

MIB = 1 << 20
WORD_MAX = (1 << 64) - 1

# Doors opened one after the other to the same mapping are hosts of one device.
_last: list[tuple[object, Device]] = []


def noncoherent(mapping: object, line_bytes: int | None = None, eviction_period: int = 0) -> Memory:
    """A host of its own, with device atomics, over the device that the mapping is."""
    if not _last or _last[0][0] is not mapping:
        _last[:] = [(mapping, Device(mapping, line_bytes, device_atomics=True))]
    return NonCoherentMemory(HostCache(_last[0][1], eviction_period=eviction_period, seed=7), Role.ROLE_BROKER)


MEMORIES: dict[str, Callable[[object], Memory]] = {
    "mapped-coherent": lambda mapping: MappedMemory(mapping, Role.ROLE_BROKER, True),
    "mapped-noncoherent": lambda mapping: MappedMemory(mapping, Role.ROLE_BROKER, False),
    "noncoherent": noncoherent,
    "noncoherent-evicting": lambda mapping: noncoherent(mapping, eviction_period=2),
    "noncoherent-payload": lambda mapping: noncoherent(mapping, line_bytes=256),
}
Make = Callable[[object], Memory]


@pytest.fixture(params=list(MEMORIES.values()), ids=list(MEMORIES))
def make(request: pytest.FixtureRequest) -> Make:
    """Opens one host's door to a mapping."""
    kind: Make = request.param
    return kind


def publish(memory: Memory, offset: int, count: int) -> None:
    memory.flush_range(offset, count)
    memory.store_fence()


@pytest.mark.parametrize("value", [0, 1, 1 << 63, WORD_MAX])
def test_a_published_word_is_seen_by_another_host(make: Make, value: int) -> None:
    mapping = bytearray(4096)
    writer, reader = make(mapping), make(mapping)
    reader.load_word(64)
    writer.store_word(64, value)
    publish(writer, 64, 8)
    reader.invalidate_range(64, 8)
    assert reader.load_word(64) == value
    assert writer.load_word(64) == value
    assert reader.load_word(56) == reader.load_word(72) == 0


def test_a_published_line_is_seen_whole_by_another_host(make: Make) -> None:
    mapping = bytearray(4096)
    writer, reader = make(mapping), make(mapping)
    line = bytes(range(1, 65))
    reader.read_line_bytes(128)
    writer.write_line_bytes(128, line)
    publish(writer, 128, 64)
    reader.invalidate_range(128, 64)
    assert reader.read_line_bytes(128) == line
    assert reader.read_bytes(64, 64) == reader.read_bytes(192, 64) == bytes(64)


def test_a_host_sees_its_own_stores_at_once(make: Make) -> None:
    memory = make(bytearray(4096))
    memory.store_word(8, 5)
    memory.write_line_bytes(64, b"x" * 64)
    memory.write_bytes(130, b"payload")
    assert memory.load_word(8) == 5
    assert memory.read_line_bytes(64) == b"x" * 64
    assert memory.read_bytes(130, 7) == b"payload"


def test_bulk_data_needs_a_fence_and_no_flush(make: Make) -> None:
    mapping = bytearray(MIB)
    writer, reader = make(mapping), make(mapping)
    data = bytes(i % 251 for i in range(100_000))
    writer.write_bytes(77, data)
    writer.store_fence()
    reader.invalidate_range(77, len(data))
    assert reader.read_bytes(77, len(data)) == data
    assert writer.statistics_dict()["flushes"] == 0


def test_atomics_return_what_was_there(make: Make) -> None:
    memory = make(bytearray(4096))
    assert memory.fetch_add_word(64, 5) == 0
    assert memory.fetch_add_word(64, WORD_MAX) == 5
    assert memory.load_word(64) == 4
    assert memory.fetch_or_word(64, 3) == 4
    assert memory.fetch_and_word(64, 6) == 7
    assert memory.load_word(64) == 6
    assert memory.fetch_add_word(64, WORD_MAX - 5) == 6
    assert memory.load_word(64) == 0


def test_compare_and_swap_replaces_only_what_it_expects(make: Make) -> None:
    memory = make(bytearray(4096))
    assert memory.compare_and_swap_word(64, 0, 7) is True
    assert memory.compare_and_swap_word(64, 0, 9) is False
    assert memory.load_word(64) == 7


def test_atomics_act_on_what_other_hosts_did(make: Make) -> None:
    mapping = bytearray(4096)
    first, second = make(mapping), make(mapping)
    for host in (first, second, first, second):
        host.fetch_add_word(64, 1)
    assert first.fetch_or_word(64, 0) == second.fetch_or_word(64, 0) == 4


@pytest.mark.parametrize("offset", range(64))
def test_bulk_copies_touch_exactly_their_bytes_at_every_alignment(make: Make, offset: int) -> None:
    for count in range(301):
        background = b"\xaa" * 512
        memory = make(bytearray(background))
        data = bytes((i + count) % 255 for i in range(count))
        memory.write_bytes(offset, data)
        memory.store_fence()
        assert memory.read_bytes(0, 512) == background[:offset] + data + background[offset + count:]
        assert memory.read_bytes(offset, count) == data


@pytest.mark.parametrize("count", [16383, 16384, 16385, 3 * MIB + 17, 4 * MIB])
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 4095])
def test_bulk_copies_of_mebibytes_are_exact(make: Make, count: int, offset: int) -> None:
    data = (bytes(range(251)) * (count // 251 + 1))[:count]
    mapping = bytearray(count + 8192)
    memory = make(mapping)
    memory.write_bytes(offset, data)
    memory.store_fence()
    assert memory.read_bytes(offset, count) == data
    assert memory.read_bytes(offset + count, 64) == bytes(64)
    assert memory.read_bytes(0, offset) == bytes(offset)


@pytest.mark.parametrize("kind", MEMORIES.values(), ids=MEMORIES.keys())
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["word", "line", "bytes", "add", "or", "and"]), st.integers(0, 31),
                          st.binary(min_size=64, max_size=64), st.integers(0, 300)), max_size=40))
def test_a_single_host_sees_plain_memory(kind: Make, operations: list[tuple[str, int, bytes, int]]) -> None:
    """Any sequence of operations leaves the bytes that the same sequence on a plain array leaves."""
    model = bytearray(4096)
    memory = kind(bytearray(4096))
    for name, line, data, count in operations:
        start, value = line * 64, int.from_bytes(data[:8], "little")
        old = int.from_bytes(model[start:start + 8], "little")
        if name == "line":
            memory.write_line_bytes(start, data)
            model[start:start + 64] = data
            continue
        if name == "bytes":
            memory.write_bytes(start + count, data * 5)
            model[start + count:start + count + 320] = data * 5
            continue
        if name == "word":
            memory.store_word(start, value)
            new = value
        else:
            call = {"add": memory.fetch_add_word, "or": memory.fetch_or_word, "and": memory.fetch_and_word}[name]
            assert call(start, value) == old
            new = {"add": (old + value) & WORD_MAX, "or": old | value, "and": old & value}[name]
        model[start:start + 8] = new.to_bytes(8, "little")
    memory.store_fence()
    assert memory.read_bytes(0, 4096) == bytes(model)


ACCESSES: dict[str, tuple[Callable[[Memory, int], object], int, bool]] = {
    # name: (access at an offset, alignment, whether it writes)
    "load_word": (lambda m, at: m.load_word(at), 8, False),
    "store_word": (lambda m, at: m.store_word(at, 1), 8, True),
    "fetch_add_word": (lambda m, at: m.fetch_add_word(at, 1), 8, True),
    "fetch_or_word": (lambda m, at: m.fetch_or_word(at, 1), 8, True),
    "fetch_and_word": (lambda m, at: m.fetch_and_word(at, 1), 8, True),
    "compare_and_swap_word": (lambda m, at: m.compare_and_swap_word(at, 0, 1), 8, True),
    "read_line_bytes": (lambda m, at: m.read_line_bytes(at), 64, False),
    "write_line_bytes": (lambda m, at: m.write_line_bytes(at, bytes(64)), 64, True),
    "write_bytes": (lambda m, at: m.write_bytes(at, b"ab"), 1, True),
    "read_bytes": (lambda m, at: m.read_bytes(at, 2), 1, False),
    "flush_range": (lambda m, at: m.flush_range(at, 2), 1, False),
    "invalidate_range": (lambda m, at: m.invalidate_range(at, 2), 1, False),
    "touch_range": (lambda m, at: m.touch_range(at, 2), 1, False),
}


@pytest.mark.parametrize("name", ACCESSES)
def test_no_access_leaves_the_region(make: Make, name: str) -> None:
    memory = make(bytearray(4096))
    access = ACCESSES[name][0]
    for offset in (4096 + 64, 4096, (1 << 64) - 64, (1 << 63)):
        with pytest.raises(MemoryAccessError, match="outside the region of 4096 bytes"):
            access(memory, offset)


@pytest.mark.parametrize("name", [name for name in ACCESSES if ACCESSES[name][1] > 1])
def test_words_and_lines_are_aligned(make: Make, name: str) -> None:
    access, alignment, _ = ACCESSES[name]
    memory = make(bytearray(4096))
    access(memory, alignment)
    for offset in (1, alignment // 2, alignment + 1):
        with pytest.raises(MemoryAccessError, match=f"not aligned to {alignment} bytes"):
            access(memory, offset)


@pytest.mark.parametrize("name", [name for name in ACCESSES if ACCESSES[name][2]])
def test_a_read_only_attachment_cannot_write(make: Make, name: str) -> None:
    memory = make(bytes(4096))
    assert not memory.writable
    with pytest.raises(MemoryAccessError, match="read-only"):
        ACCESSES[name][0](memory, 64)
    assert memory.read_bytes(0, 4096) == bytes(4096)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_line_has_64_bytes(make: Make, length: int) -> None:
    with pytest.raises(MemoryAccessError, match="64 bytes"):
        make(bytearray(4096)).write_line_bytes(0, bytes(length))


def test_accesses_are_counted(make: Make) -> None:
    memory = make(bytearray(4096))
    memory.store_word(0, 1)
    memory.write_line_bytes(64, bytes(64))
    memory.read_line_bytes(64)
    memory.flush_range(60, 10)
    memory.invalidate_range(0, 129)
    memory.store_fence()
    memory.fetch_or_word(0, 1)
    memory.write_bytes(100, b"abc")
    memory.read_bytes(100, 5)
    assert memory.statistics_dict() == {
        "flushes": 2, "fences": 1, "lines_read": 1, "lines_written": 2, "invalidates": 3, "atomics": 1,
        "bytes_in": 3, "bytes_out": 5}


def test_counters_in_the_region_outlive_the_door(make: Make) -> None:
    mapping = bytearray(4096)
    memory = make(mapping).with_role(Role.ROLE_SEQUENCER, 1024)
    assert memory.role == Role.ROLE_SEQUENCER
    memory.store_fence()
    memory.store_fence()
    del memory
    assert int.from_bytes(mapping[1024 + 8:1024 + 16], "little") == 2
    again = make(mapping).with_role(Role.ROLE_SEQUENCER, 1024)
    again.store_fence()
    assert again.statistics_dict()["fences"] == 3


def test_a_door_for_another_role_opens_the_same_memory(make: Make) -> None:
    first = make(bytearray(4096))
    second = first.with_role(Role.ROLE_DELIVERY)
    first.store_word(0, 9)
    publish(first, 0, 8)
    second.invalidate_range(0, 8)
    assert second.load_word(0) == 9
    assert (first.bytes, first.writable) == (second.bytes, second.writable)
    assert second.statistics_dict()["lines_written"] == 0


def test_an_open_door_keeps_the_mapping() -> None:
    mapping = bytearray(4096)
    memory = MappedMemory(mapping)
    with pytest.raises(BufferError):
        mapping.clear()
    assert memory.load_word(0) == 0
