"""Litmus tests at full speed: native loops without the GIL, in threads and in processes. See sim/cxl/litmus.pyx."""

import multiprocessing
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from sim.cxl import litmus
from sim.cxl import region as files
from sim.cxl.memory import MappedMemory

BASE, REGION_BYTES = 4096, 8 << 20
ROUNDS, PAYLOADS, SLOTS, LINES, BITS, SIDES = 40_000, 60_000, 8, 300_000, 1 << 16, 3
WAIT_SECONDS = 60


@pytest.fixture
def region() -> Iterator[str]:
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_region_file(name, REGION_BYTES).close()
    yield name
    files.remove_region_file(name)


@pytest.fixture(params=["threads", "processes"])
def sides(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(SIDES) as pool:
            yield pool
    else:
        with ProcessPoolExecutor(SIDES, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool


def one_side(name: str, side: str, *arguments: Any) -> Any:
    """Run one side of a litmus over its own mapping of the region."""
    return getattr(litmus, side)(MappedMemory(files.map_region_file(name)), BASE, *arguments)


def run(sides: Executor, name: str, *calls: tuple[Any, ...]) -> list[Any]:
    running = [sides.submit(one_side, name, *call) for call in calls]
    return [each.result(WAIT_SECONDS) for each in running]


def test_two_who_store_fence_and_look_never_both_miss_the_other(sides: Executor, region: str) -> None:
    assert run(sides, region, *(("store_buffering", who, ROUNDS) for who in (0, 1))) == [ROUNDS, ROUNDS]
    outcomes = MappedMemory(files.map_region_file(region)).read_bytes(BASE + 4096, 16 * ROUNDS)
    seen = set(struct.iter_unpack("<2Q", outcomes))
    assert seen <= {(1, 2), (2, 1), (2, 2)}, "both looked before they saw the other's store"


def test_a_flag_is_never_seen_before_its_payload(sides: Executor, region: str) -> None:
    results = run(sides, region, ("send_payloads", PAYLOADS, SLOTS), ("take_payloads", PAYLOADS, SLOTS))
    assert results == [PAYLOADS, 0]


def test_no_word_of_a_line_is_older_than_its_commit_word(sides: Executor, region: str) -> None:
    written, (reads, older, back) = run(sides, region, ("write_lines", LINES), ("read_lines", LINES))
    assert written == LINES
    assert reads > 0
    assert (older, back) == (0, 0)


def test_every_bit_has_exactly_one_taker(sides: Executor, region: str) -> None:
    taken = run(sides, region, *(("take_bits", who, SIDES, BITS) for who in range(SIDES)))
    assert sum(taken) == BITS
    memory = MappedMemory(files.map_region_file(region))
    wins = [int.from_bytes(memory.read_bytes(BASE + 4096 + (who + 1) * (BITS // 8 + 64), BITS // 8), "little")
            for who in range(SIDES)]
    assert [won.bit_count() for won in wins] == taken
    assert wins[0] | wins[1] | wins[2] == (1 << BITS) - 1


