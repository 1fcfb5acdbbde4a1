"""Litmus tests of the atomics: real processes on one shared mapping, many rounds, every outcome checked.

Each test names the outcome that must never be seen. Rounds are bounded, and so is every wait.
"""

import multiprocessing
import os
import random
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from sim.cxl import region as files
from sim.cxl.memory import MappedMemory, Memory

MIB = 1 << 20
REGION_BYTES = 8 * MIB
WAIT_SECONDS = 60.0
spawn = multiprocessing.get_context("spawn")

Worker = Callable[..., None]


@pytest.fixture
def shared() -> Iterator[str]:
    """Name of a shared mapping of zeros."""
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_region_file(name, REGION_BYTES).close()
    yield name
    files.remove_region_file(name)


def open_memory(name: str) -> Memory:
    return MappedMemory(files.map_region_file(name))


def run_together(*workers: tuple[Worker, tuple[object, ...]]) -> None:
    """Run each worker in a process of its own; all must end well."""
    processes = [spawn.Process(target=worker, args=arguments) for worker, arguments in workers]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(WAIT_SECONDS)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def wait_for(memory: Memory, offset: int, at_least: int) -> int:
    """Spin until a word reaches a value; the waiting of a test, not of the product."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (seen := memory.load_word(offset)) < at_least:
        os.sched_yield()
        if time.monotonic() > deadline:
            raise TimeoutError(f"word {offset} stayed at {seen}, wanted {at_least}")
    return seen


def meet(memory: Memory, offset: int, who: int, count: int, round_number: int) -> None:
    """All of `count` workers arrive at the round before one of them goes on."""
    memory.store_word(offset + who * 64, round_number)
    for other in range(count):
        wait_for(memory, offset + other * 64, round_number)


# ---- message passing: a reader that sees the flag sees the payload -------------------------------------------------

SLOTS, SLOT_BYTES, PAYLOADS = 64, 1024, 8_000
FLAG, TAKEN, RING = 0, 64, 4096


def payload_of(number: int) -> bytes:
    return struct.pack("<Q", number) * (1 + number % 100)


def send_payloads(name: str) -> None:
    memory = open_memory(name)
    for number in range(1, PAYLOADS + 1):
        if number > SLOTS:
            wait_for(memory, TAKEN, number - SLOTS)
        memory.write_bytes(RING + number % SLOTS * SLOT_BYTES + number % 7, payload_of(number))
        memory.store_fence()
        memory.store_word(FLAG, number)
        memory.flush_range(FLAG, 8)


def take_payloads(name: str) -> None:
    memory, taken = open_memory(name), 0
    while taken < PAYLOADS:
        published = wait_for(memory, FLAG, taken + 1)
        for number in range(taken + 1, published + 1):
            wanted = payload_of(number)
            assert memory.read_bytes(RING + number % SLOTS * SLOT_BYTES + number % 7, len(wanted)) == wanted
        taken = published
        memory.store_word(TAKEN, taken)


def test_a_flag_is_never_seen_before_its_payload(shared: str) -> None:
    run_together((send_payloads, (shared,)), (take_payloads, (shared,)))


# ---- store buffering: two who announce themselves and then look cannot both miss the other ------------------------

ROUNDS = 4_000
MEETING, STORES, SEEN = 0, 4096, 4 * MIB


def announce_and_look(name: str, who: int) -> None:
    memory = open_memory(name)
    for number in range(ROUNDS):
        mine, other = STORES + (2 * number + who) * 64, STORES + (2 * number + 1 - who) * 64
        meet(memory, MEETING, who, 2, number + 1)
        # The read-modify-write is the store and the fence: it is complete before the load begins. (The interpreter's
        # own time between two calls hides most reordering; a native litmus with full_fence has to back this up.)
        memory.fetch_or_word(mine, 1)
        seen = memory.load_word(other)
        memory.store_word(SEEN + (2 * number + who) * 64, seen + 1)


def test_two_who_announce_themselves_never_both_miss_the_other(shared: str) -> None:
    run_together((announce_and_look, (shared, 0)), (announce_and_look, (shared, 1)))
    memory = open_memory(shared)
    outcomes = [tuple(memory.load_word(SEEN + (2 * number + who) * 64) - 1 for who in (0, 1))
                for number in range(ROUNDS)]
    assert set(outcomes) <= {(0, 1), (1, 0), (1, 1)}, "both looked before either had announced itself"


# ---- lines: what the commit word promises is there ---------------------------------------------------------------

LINE, DONE, ACK, LINES = 4096, 64, 128, 30_000


def rewrite_line(name: str, handshake: bool) -> None:
    memory = open_memory(name)
    for number in range(1, LINES + 1):
        memory.write_line_bytes(LINE, struct.pack("<8Q", *[number] * 8))
        memory.flush_range(LINE, 64)
        if handshake:
            wait_for(memory, ACK, number)
    memory.store_word(DONE, 1)


def watch_line(name: str, handshake: bool) -> None:
    memory, last = open_memory(name), 0
    deadline = time.monotonic() + WAIT_SECONDS
    while last < LINES:
        assert time.monotonic() < deadline
        words = struct.unpack("<8Q", memory.read_line_bytes(LINE))
        assert words[0] >= last, "the commit word went back"
        if handshake and words[0] > last:
            assert set(words) == {words[0]}, "a line that stands still is torn"
            memory.store_word(ACK, words[0])
        # A writer that is already at the next value has stored it first in the words behind the commit word.
        assert min(words) == words[0], "a word is older than the commit word says"
        if words[0] == last:
            os.sched_yield()
        last = words[0]


@pytest.mark.parametrize("handshake", [False, True], ids=["rewritten-at-will", "rewritten-when-read"])
def test_no_word_of_a_line_is_older_than_its_commit_word(shared: str, handshake: bool) -> None:
    run_together((rewrite_line, (shared, handshake)), (watch_line, (shared, handshake)))
    words = struct.unpack("<8Q", open_memory(shared).read_line_bytes(LINE))
    assert set(words) == {LINES}


# ---- atomics: each bit has one winner, no addition is lost ---------------------------------------------------------

TAKERS, BITMAP, WINS, BITS = 3, 4096, 65536, 8192
COUNTER, UNIQUE, ADDITIONS = 1024, 1 * MIB, 4_000


def take_bits(name: str, who: int) -> None:
    memory, order = open_memory(name), random.Random(who)
    bits = list(range(BITS))
    order.shuffle(bits)
    meet(memory, MEETING, who, TAKERS, 1)
    for bit in bits:
        word, mask = bit // 64 * 8, 1 << bit % 64
        if not memory.fetch_or_word(BITMAP + word, mask) & mask:
            wins = WINS + who * BITS // 8 + word
            memory.store_word(wins, memory.load_word(wins) | mask)


def test_every_bit_has_exactly_one_taker(shared: str) -> None:
    run_together(*((take_bits, (shared, who)) for who in range(TAKERS)))
    memory = open_memory(shared)
    wins = [int.from_bytes(memory.read_bytes(WINS + who * BITS // 8, BITS // 8), "little") for who in range(TAKERS)]
    assert sum(won.bit_count() for won in wins) == BITS
    assert wins[0] | wins[1] | wins[2] == (1 << BITS) - 1


def add(name: str, who: int) -> None:
    memory, last = open_memory(name), -1
    meet(memory, MEETING, who, TAKERS, 1)
    for _ in range(ADDITIONS):
        ticket = memory.fetch_add_word(COUNTER, 1)
        assert ticket > last, "tickets go up"
        last = ticket
        mask = 1 << ticket % 64
        assert not memory.fetch_or_word(UNIQUE + ticket // 64 * 8, mask) & mask, f"ticket {ticket} was given out twice"
        memory.fetch_add_word(COUNTER + 64, who + 1)


def test_no_addition_is_lost_and_no_ticket_given_twice(shared: str) -> None:
    run_together(*((add, (shared, who)) for who in range(TAKERS)))
    memory = open_memory(shared)
    assert memory.load_word(COUNTER) == TAKERS * ADDITIONS
    assert memory.load_word(COUNTER + 64) == ADDITIONS * sum(range(1, TAKERS + 1))


def swap_upwards(name: str, who: int) -> None:
    memory, done = open_memory(name), 0
    meet(memory, MEETING, who, TAKERS, 1)
    while done < ADDITIONS:
        old = memory.load_word(COUNTER)
        done += memory.compare_and_swap_word(COUNTER, old, old + 1)


def test_only_one_swap_of_each_value_succeeds(shared: str) -> None:
    run_together(*((swap_upwards, (shared, who)) for who in range(TAKERS)))
    assert open_memory(shared).load_word(COUNTER) == TAKERS * ADDITIONS


def clear_and_set(name: str, who: int) -> None:
    memory, mask = open_memory(name), 1 << who
    meet(memory, MEETING, who, TAKERS, 1)
    for _ in range(ADDITIONS):
        assert not memory.fetch_or_word(COUNTER, mask) & mask, "somebody else set my bit"
        assert memory.fetch_and_word(COUNTER, ~mask & (1 << 64) - 1) & mask, "somebody else cleared my bit"


def test_bits_of_one_word_do_not_disturb_each_other(shared: str) -> None:
    run_together(*((clear_and_set, (shared, who)) for who in range(TAKERS)))
    assert open_memory(shared).load_word(COUNTER) == 0
