"""A flipped bit in any record of the region: every stage, reader and tool gives a typed error or goes on. None crashes, and
none reads or writes outside the region: that lies between pages that nobody may touch.

    pytest ──{place}──► a process of its own, without threads ──fork──► one flip, and everything that a cluster does
"""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import CxlmqError
from broker.inspection import inspect_region, region_statistics
from broker.layout import RECORDS, Layout
from broker.reader import ReadError
from broker.region import Region
from sim.cxl.region import host_identity
from tests.manual_cluster import SECOND, TINY, ManualCluster, Session

ROOT = Path(__file__).parents[2]
GUARD_BYTES = 64 << 30
FLIPS = 12                      # of each record
SECONDS = 20
BROKERS = 3
FIELD_BYTES = {"B": 1, "c": 1, "s": 1, "H": 2, "I": 4, "Q": 8}
# place -> (record, how many of each index there are, as numbers of the layout or counts)
PLACES: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "control": ("ControlLine", ()), "head": ("HeadLine", ()), "directory": ("DirectoryLine", ()), "broker": ("BrokerLine", ("broker_count",)),
    "broker_activity": ("ActivityLine", ("broker_count",)), "pool_wish": ("PoolWishLine", ("broker_count",)),
    "pool_grant": ("PoolGrantLine", ("broker_count",)), "reclaim_answer": ("ReclaimAnswerLine", ("broker_count",)),
    "topic": ("TopicLine", (2,)), "topic_name": ("TopicName", (2,)), "topic_order": ("TopicOrderLine", (2,)),
    "topic_reclaim": ("TopicReclaimLine", (2,)), "offset_broker": ("OffsetBrokerLine", (2, "broker_count")),
    "offset_sequencer": ("OffsetSequencerLine", (2, "broker_count")),
    "replica": ("ReplicaLine", (2, "broker_count", "broker_count")), "ring": ("BatchHeader", (2, "broker_count", 16)),
    "result": ("BatchResult", (2, "broker_count", 16)), "order_entry": ("OrderEntry", (2, 40)),
    "session": ("SessionLine", (6,)), "session_progress": ("SessionProgressLine", (6,)), "cursor": ("CursorLine", (6,)),
    "session_window": ("SessionWindowLine", (6,)),
    "group": ("GroupLine", (3,)), "group_name": ("GroupName", (3,)), "group_holder": ("GroupHolder", (3,)),
    "cursor_grant": ("CursorGrantLine", (6,)), "cursor_name": ("CursorName", (6,)), "segment_line": ("SegmentLine", (12,)),
    "pool_grants": ("PoolRing", ("broker_count",)), "pool_returns": ("PoolRing", ("broker_count",)),
    "broker_counters": ("BrokerCounters", ("broker_count",)), "sequencer_counters": ("SequencerCounters", ()),
}


def guarded_mapping(nbytes: int) -> Any:
    """Zeroed memory of this process between two areas that nobody may touch."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    nbytes = -(-nbytes // 4096) * 4096
    private_anonymous_noreserve = 0x02 | 0x20 | 0x4000
    base = libc.mmap(None, 2 * GUARD_BYTES + nbytes, 0, private_anonymous_noreserve, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), "the address space has no room for the guards"
    assert libc.mprotect(base + GUARD_BYTES, nbytes, 3) == 0
    return (ctypes.c_ubyte * nbytes).from_address(base + GUARD_BYTES)


class Subject:
    """A cluster in the middle of its work, over guarded memory."""

    def __init__(self, folder: Path, pool: str) -> None:
        layout = Layout.compute(broker_count=BROKERS, pool_strategy=pool, **TINY)
        mapping = guarded_mapping(layout.numbers["region_bytes"])
        self.cluster = ManualCluster(brokers=BROKERS, folder=folder, mapping=mapping, pool=pool)
        self.topics = [self.cluster.create("plain"), self.cluster.create("kept", replication_factor=2, ack=2)]
        self.sessions = [self.cluster.open_session(topic, client=number + 7, ack=topic.ack)
                         for number, topic in enumerate(self.topics)]
        self.cursors = [self.cluster.open_cursor(topic)[0] for topic in self.topics]
        self.next = [0, 0]
        for _ in range(12):
            self.publish(3)

    def publish(self, count: int) -> None:
        for number, session in enumerate(self.sessions):
            for _ in range(count):
                sequence = self.next[number]
                status = self.cluster.publish(session, sequence, [bytes(200), b"x" * (sequence % 64)],
                                              broker=sequence % BROKERS)
                self.next[number] += status == 0
        settle(self.cluster)

    def exercise(self) -> None:
        """What a cluster does, with every error that is a typed one."""
        for attempt in (
                lambda: self.publish(4), self.read, self.tools, lambda: self.publish(30), self.read,
                lambda: self.cluster.take_acks(self.sessions[0]), lambda: self.cluster.take_acks(self.sessions[1], 1),
                self.open_more, lambda: self.cluster.clock.advance(40 * SECOND), lambda: self.publish(4), self.read,
                lambda: self.cluster.delete("plain"), lambda: settle(self.cluster),
                lambda: self.cluster.create("next"), lambda: settle(self.cluster), self.tools):
            typed(attempt)

    def open_more(self) -> None:
        session: Session = self.cluster.open_session(self.topics[1], client=99, broker=1)
        self.cluster.publish_all(session, range(3), broker=2)
        self.cluster.open_cursor(self.topics[1], broker=2)

    def read(self) -> None:
        for topic in self.topics:
            reader = self.cluster.reader(topic)
            for step in (lambda reader=reader: self.cluster.read(reader), lambda reader=reader: reader.find(20),
                         lambda reader=reader: reader.find_time(1),
                         lambda reader=reader: reader.find_batches(7, 1, 5, 6, 1 << 62, 1 << 16, {}),
                         lambda reader=reader: reader.frontiers()):
                typed(step)

    def tools(self) -> None:
        layout = self.cluster.layout
        superblock = {"boot_id": host_identity(), "owner_pid": 1, "folder": "/nowhere", "memory": 0}
        region = Region("fuzzed", self.cluster.mapping, layout, superblock, True, Path("/nowhere"))
        typed(lambda: inspect_region(region))
        typed(lambda: region_statistics(region))


def settle(cluster: ManualCluster) -> None:
    """Step for a while: with damaged frontiers some stage may find work for ever."""
    for _ in range(60):
        if not cluster.step():
            for stage in cluster.stages:
                stage.look_everywhere()


def typed(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except (CxlmqError, ReadError):
        pass
    except AssertionError as error:
        # Nobody answered: in the product a wait that ends with a typed error. A payload that holds no messages: the
        # product's client raises DamagedData where this one asserts.
        last = traceback.extract_tb(error.__traceback__)[-1].name
        if "nobody answered" not in str(error) and "was not received" not in str(error) and last != "decode_messages":
            raise


def flip(subject: Subject, place: str, random_: random.Random) -> str:
    """Flip one bit of one record; what was flipped."""
    record, shape = PLACES[place]
    layout = subject.cluster.layout
    index = [random_.randrange(layout.numbers[each] if isinstance(each, str) else each) for each in shape]
    name, letter, count, offset = random_.choice(RECORDS[record])
    bit = random_.randrange(8 * count * FIELD_BYTES[letter])
    subject.cluster.mapping[layout.offset_of(place, *index) + offset + bit // 8] ^= 1 << bit % 8
    return f"{place}{index}: bit {bit} of {name}"


def outcome(work: Callable[[], None]) -> str:
    """Run in a copy of this process; "" when it ended well, else what happened."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-1500:].encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return said or ("" if os.WEXITSTATUS(status) == 0 else f"exit code {os.WEXITSTATUS(status)}")


def flips(subject: Subject, place: str) -> list[str]:
    """What went wrong with flips of one record."""
    failures = []
    for number in range(FLIPS):
        seed = f"{place} {number}"

        def work(seed: str = seed) -> None:
            flip(subject, place, random.Random(seed))
            subject.exercise()

        begun = time.monotonic()
        if said := outcome(work):
            failures.append(f"seed {seed!r} ({time.monotonic() - begun:.0f} s): {said}")
    return failures


def beyond(subject: Subject) -> list[str]:
    """What becomes of an access behind the region, and of none."""
    end = ctypes.addressof(subject.cluster.mapping) + len(subject.cluster.mapping)
    return [outcome(lambda: print(ctypes.string_at(end, 1))), outcome(subject.exercise)]


def main(pool: str, folder: str) -> None:
    """Answer each line of standard input: a place, or "beyond". Others here have threads, and must not fork."""
    subject = Subject(Path(folder), pool)
    for line in sys.stdin:
        place = line.strip()
        print(json.dumps(beyond(subject) if place == "beyond" else flips(subject, place)), flush=True)


class Fuzzer:
    """A process that does it."""

    def __init__(self, pool: str, folder: Path) -> None:
        self.pool = pool
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.test_region_fuzz", pool, str(folder)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what: str) -> list[str]:
        """What it found."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has ended"
        found: list[str] = json.loads(answer)
        return found


@pytest.fixture(scope="module", params=["atomic", "leader"])
def fuzzer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    if sys.maxsize < 1 << 32:
        pytest.skip("the guards need 64-bit addresses")
    made = Fuzzer(request.param, tmp_path_factory.mktemp("replicas"))
    yield made
    made.process.communicate()


def test_the_guard_catches_an_access_outside_the_region(fuzzer: Fuzzer) -> None:
    """The checker of this file, shown to fail: bytes right behind the region cannot be read."""
    assert fuzzer.ask("beyond") == ["ended by SIGSEGV", ""]


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_crashes_nobody(fuzzer: Fuzzer, place: str) -> None:
    if fuzzer.pool == "leader" and not place.startswith(("pool_", "segment_")):
        pytest.skip("the pool makes no difference here")
    failures = fuzzer.ask(place)
    assert not failures, "\n".join(failures)


def test_every_record_is_fuzzed() -> None:
    there = {record for record, _ in PLACES.values()}
    left_out = {
        "Superblock": "tests/unit/test_region.py", "BrokerAddress": "text",
        "AttachLine": "descriptors are fuzzed by the attached clients' tests", "Lease": "", "AttachClientLine": "",
        "Descriptor": "", "DoorbellLine": "a hint", "BankLine": "changed by compare-and-swap alone", "LockLine": "the system's mutex", "AccessStatistics": "counters",
    }
    assert there | set(left_out) >= set(RECORDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
