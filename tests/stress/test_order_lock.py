"""The order lock between processes: it excludes, and the mutex outlives the process that died with it."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from broker.order_lock import OrderLock
from sim.cxl import region as files
from sim.cxl.memory import MappedMemory, Memory

WAIT_SECONDS = 60.0
ROUNDS = 20_000
LOCK, COUNT = 0, 4096
spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def shared() -> Iterator[str]:
    """Name of a shared mapping of zeros."""
    name = f"cxlmq-test-{os.getpid()}-{os.urandom(4).hex()}"
    files.create_region_file(name, 1 << 16).close()
    yield name
    files.remove_region_file(name)


def open_memory(name: str) -> Memory:
    return MappedMemory(files.map_region_file(name))


def count_under_the_lock(name: str) -> None:
    memory = open_memory(name)
    lock = OrderLock.at(memory, LOCK, "mutex")
    for _ in range(ROUNDS):
        with lock:
            memory.store_word(COUNT, memory.load_word(COUNT) + 1)


def die_with_the_lock(name: str) -> None:
    lock = OrderLock.at(open_memory(name), LOCK, "mutex")
    lock.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def run(*workers: object) -> list[int | None]:
    """Run each worker in a process; their exit codes, None for one that hangs."""
    processes = [spawn.Process(target=worker, args=arguments) for worker, *arguments in workers]  # type: ignore[misc]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def test_the_mutex_excludes_other_processes(shared: str) -> None:
    memory = open_memory(shared)
    OrderLock.at(memory, LOCK, "mutex", initialise=True)
    assert run((count_under_the_lock, shared), (count_under_the_lock, shared)) == [0, 0]
    assert memory.load_word(COUNT) == 2 * ROUNDS


def test_the_mutex_survives_its_owners_death(shared: str) -> None:
    memory = open_memory(shared)
    lock = OrderLock.at(memory, LOCK, "mutex", initialise=True)
    for _ in range(3):
        assert run((die_with_the_lock, shared)) == [-signal.SIGKILL]
        assert run((count_under_the_lock, shared)) == [0], "the next owner takes it"
    with lock:
        assert memory.load_word(COUNT) == 3 * ROUNDS
