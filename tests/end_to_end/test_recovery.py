"""After kill -9 of everything and removal of the memory, every level-2 ack is there, at its position, byte for byte; the rest
is named as a range."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.recovery import make_plan
from broker.replica_files import Record, find_files, read_records
from broker.sessions import LOST_POSITION, UNKNOWN_POSITION
from client.admin import Admin
from client.cluster import Cluster
from client.errors import CxlmqError, RangeLost, RecoveryError
from client.publisher import Publisher
from client.subscriber import Subscriber
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, inspected, numbered

SHARED = Path("/dev/shm")
CLIENT = 4711


def kill_everything(cluster: Cluster) -> None:
    """kill -9 of all brokers at once, then their memory is removed."""
    cluster._stopping.set()             # or those that ended first are started anew
    with cluster._changing:
        processes = cluster.processes
    for process in processes.values():
        os.kill(process, signal.SIGKILL)
    for broker in processes:
        cluster._children[broker].wait()
    for path in SHARED.glob(f"*cxlmq-{cluster.name}*"):
        path.unlink()
    cluster.stop()


def recovered(folder: Path, **settings: Any) -> Cluster:
    return Cluster(small_config(restart=False, **settings), recover=folder)


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Cluster]:
    cluster = Cluster(small_config(data_directory=str(folder), restart=False, **settings)).start()
    try:
        yield cluster
    finally:
        with contextlib.suppress(CxlmqError):
            cluster.stop()


def read_with_positions(cluster: str, topic: str, start: Any = "beginning", transport: str = "grpc") -> dict[int, bytes]:
    """Every message that can be read, by position; lost ranges are passed over, as a user would."""
    found: dict[int, bytes] = {}
    with Admin(cluster=cluster) as admin:
        end = admin.describe_topic(topic)["end_position"]
    with Subscriber(topic, cluster=cluster, start=start, transport=transport) as subscriber:
        while (subscriber.position or 0) < end:
            try:
                messages = subscriber.fetch(1000, timeout=10.0)
                assert messages, f"nothing came at position {subscriber.position} of {end}"
                found.update((each.position, bytes(each.payload)) for each in messages)
            except RangeLost as lost:
                subscriber.seek(lost.end)
    return found


def replica_state_settles(cluster: Cluster) -> None:
    """Until every replica has noted how far the topic is durable: nothing of that is needed, but it makes damage provable."""
    time.sleep(1.2)
    assert cluster.processes


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_every_level_2_ack_is_there_after_a_kill_in_full_flight(tmp_path: Path, order: int) -> None:
    acked: dict[int, bytes] = {}
    sent: set[bytes] = set()
    with running(tmp_path, brokers=4) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("orders", order=order, ack=2, replication_factor=2, retention_bytes=1 << 40)
            admin.create_topic("memory", ack=1)

        def note(delivery: Any) -> None:
            with contextlib.suppress(CxlmqError):
                receipt = delivery.result(0)
                if receipt.position is not None:
                    acked[receipt.position] = messages[delivery]

        messages: dict[Any, bytes] = {}
        stop = threading.Event()

        def publish() -> None:
            with contextlib.suppress(CxlmqError), Publisher(
                    "orders", cluster=cluster.name, client_id=CLIENT, batch_bytes=4096, delivery_timeout=2.0,
                    transport="grpc") as publisher:
                for number in range(100_000):
                    if stop.is_set():
                        break
                    message = f"message {number} ".encode() * (1 + number % 40)
                    sent.add(message)
                    delivery = publisher.publish(message)
                    messages[delivery] = message
                    delivery.add_done_callback(note)

        with Publisher("memory", cluster=cluster.name) as other:
            other.publish(b"gone with the memory").result()
        thread = threading.Thread(target=publish)
        thread.start()
        assert eventually(lambda: len(acked) > 2000)
        kill_everything(cluster)
        stop.set()
        thread.join()
    with recovered(tmp_path, brokers=4) as cluster:
        report = cluster.recovery
        assert report is not None
        topics = {each["name"]: each for each in report["topics"]}
        assert topics["memory"]["in_memory_only"]
        assert report["damage"] == [] or all("end of the file" in each["what"] for each in report["damage"])
        there = read_with_positions(cluster.name, "orders")
        missing = {position for position, message in acked.items() if there.get(position) != message}
        assert not missing
        assert set(there.values()) <= sent, "nothing that nobody sent"
        assert len(set(there.values())) == len(there), "nothing twice"
        lost = topics["orders"]["lost"]
        gone = {position for each in lost for position in range(each["first"], each["end"])}
        assert all(each["reason"] == "unsynced" for each in lost)
        assert set(there) | gone == set(range(topics["orders"]["end_position"]))
        assert read_with_positions(cluster.name, "memory") == {}
        if order == 5:
            numbers = [int(message.split()[1]) for _, message in sorted(there.items())]
            assert numbers == list(range(len(numbers))), "a prefix of what its publisher submitted"
        # Positions go on, and the next session of the client continues.
        with Publisher("orders", cluster=cluster.name, client_id=CLIENT) as publisher:
            assert publisher.publish(b"afterwards").result().position == topics["orders"]["end_position"]
    assert traces(cluster.name) == []


def test_topics_options_and_the_end_of_an_orderly_stop(tmp_path: Path) -> None:
    options = {"first": {"order": 2, "ack": 2, "replication_factor": 3, "retention_bytes": -1},
               "second": {"order": 5, "ack": 1, "replication_factor": 2, "retention_bytes": 1 << 30},
               "third": {"order": 0, "ack": 0, "replication_factor": 1, "retention_bytes": 0}}
    with running(tmp_path, brokers=4) as cluster, Admin(cluster=cluster.name) as admin:
        for name, values in options.items():
            admin.create_topic(name, **values)
        admin.create_topic("deleted", replication_factor=2)
        with Publisher("deleted", cluster=cluster.name) as publisher:
            publisher.publish(b"to be deleted").result()
        admin.delete_topic("deleted")
        with Publisher("second", cluster=cluster.name) as publisher:
            publisher.publish_many(numbered(500, 100)).result()
        cluster.stop()                          # level 1 only, but orderly: what is ordered goes to the disks
    with recovered(tmp_path, brokers=4) as cluster, Admin(cluster=cluster.name) as admin:
        found = {each["name"]: each for each in admin.list_topics()}
        assert {name: {key: found[name][key] for key in values} for name, values in options.items()} == options
        assert set(found) == set(options)
        assert list(read_with_positions(cluster.name, "second").values()) == numbered(500, 100)
        assert list(read_with_positions(cluster.name, "second", transport="attached").values()) == numbered(500, 100)
        # What is restored is reclaimed and deleted like everything else.
        assert inspected(cluster.name)["pool"]["owners"]
        admin.delete_topic("second")
        assert eventually(lambda: inspected(cluster.name)["pool"]["owners"] == [])


def test_recovery_again_and_again_and_killed_in_between(tmp_path: Path) -> None:
    expected: dict[int, bytes] = {}
    with running(tmp_path, brokers=3) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log", ack=2, replication_factor=2)
        with Publisher("log", cluster=cluster.name) as publisher:
            for delivery in [(publisher.publish(each), each) for each in numbered(300, 200, "run 0")]:
                expected[delivery[0].result().position] = delivery[1]
        kill_everything(cluster)
    for run in range(1, 4):
        # A recovery that is killed at some moment leaves nothing that matters.
        for delay in (0.15, 0.4, 0.7):
            killed = small_config(brokers=3, data_directory=str(tmp_path))
            process = subprocess.Popen([sys.executable, "-m", "broker.node", "--id", "0", "--recover"],
                                       stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            assert process.stdin
            process.stdin.write(killed.to_json().encode())
            process.stdin.close()
            time.sleep(delay * run)
            process.kill()
            process.wait()
        with recovered(tmp_path, brokers=3) as cluster:
            assert cluster.recovery is not None
            assert [each["lost"] for each in cluster.recovery["topics"]] == [[]]
            assert read_with_positions(cluster.name, "log") == expected
            with Publisher("log", cluster=cluster.name) as publisher:
                for delivery in [(publisher.publish(each), each) for each in numbered(100, 200, f"run {run}")]:
                    expected[delivery[0].result().position] = delivery[1]
            assert sorted(expected) == list(range(300 + 100 * run))
            kill_everything(cluster)


@pytest.mark.parametrize("lost", [[], [7], [0, 6, 8]], ids=str)
def test_a_publisher_that_reopens_after_recovery_neither_duplicates_nor_loses(tmp_path: Path, lost: list[int]) -> None:
    """It has no answer for the last batches, though some are in the log: it is told where its session ended, and what
    no disk has any more."""
    from broker.proto import cxlmq_pb2 as pb
    from client.connection import Connection

    with running(tmp_path, brokers=2) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log", ack=2, replication_factor=2)
        with Publisher("log", cluster=cluster.name, client_id=CLIENT, batch_bytes=256) as publisher:
            positions = [publisher.publish(each).result().position for each in numbered(10, 200)]
            kill_everything(cluster)
    for file in find_files(tmp_path):
        for record in list(read_records(file)):
            if isinstance(record, Record) and record.position in [positions[each] for each in lost] and (
                    record.end > record.position):
                with open(file.path, "r+b") as out:
                    out.seek(record.payload_offset)
                    out.write(b"\xff" * 8)
    with recovered(tmp_path, brokers=2) as cluster:
        async def reopen() -> pb.Session:
            connection = Connection(cluster.name, None)
            brokers = await connection.brokers()
            try:
                return await connection.unary(brokers[0].target, "Admin/OpenSession", pb.OpenSessionRequest(
                    topic="log", client_id=CLIENT, session_epoch=2, ack=2, resume_from=6, resume_epoch=1, earlier=[
                        pb.EarlierBatches(session_epoch=1, first=4, end=12),
                        pb.EarlierBatches(session_epoch=9, first=0, end=1)]), pb.Session)
            finally:
                await connection.close()

        session = asyncio.run(reopen())
        assert session.high_water == 10
        assert list(session.earlier_positions) == [*(
            LOST_POSITION if each in lost else positions[each] for each in range(4, 10)), *[UNKNOWN_POSITION] * 3]
        assert session.first_position == 0
        assert list(session.positions) == [LOST_POSITION if each in lost else positions[each] for each in range(6, 10)]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a cluster that was killed after 400 level-2 acks."""
    folder = tmp_path_factory.mktemp("whole")
    with running(folder, brokers=4) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log", ack=2, replication_factor=2)
        with Publisher("log", cluster=cluster.name, batch_bytes=1024, client_id=CLIENT) as publisher:
            publisher.publish_many(numbered(400, 250)).result()
            publisher.flush()
        replica_state_settles(cluster)
        kill_everything(cluster)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", folder, target], check=True)
    return target / folder.name


def damage_file(kind: str, folder: Path) -> tuple[int, int]:
    """Damage one file; the messages of its source in the damaged part, from and up to."""
    file = max((each for each in find_files(folder)), key=lambda each: each.path.stat().st_size)
    records = [each for each in read_records(file) if each.end > each.position]     # type: ignore[union-attr]
    victim = records[len(records) // 2]
    start = victim.payload_offset - 128         # type: ignore[union-attr]
    with open(file.path, "r+b") as out:
        if kind == "truncated":
            out.truncate(start + 100)
            return victim.position, 400         # type: ignore[union-attr]
        size = {"header bit": 1, "payload bit": 1, "zeroed page": 4096, "torn record": 96}[kind]
        at = start + {"header bit": 20, "payload bit": 200, "zeroed page": 0, "torn record": 32}[kind]
        out.seek(at)
        old = out.read(size)
        out.seek(at)
        out.write(bytes([old[0] ^ 4]) if size == 1 else bytes(size))
    return victim.position, next((each.position for each in records if each.payload_offset - 128 >= at + size), 400)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["header bit", "payload bit", "zeroed page", "torn record", "truncated"])
def test_damage_of_what_was_durable_is_named_and_the_rest_is_kept(damaged: Path, tmp_path: Path, kind: str) -> None:
    folder = copy_of(damaged, tmp_path)
    first, end = damage_file(kind, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.replica")}
    with recovered(folder, brokers=4) as cluster:
        report = cluster.recovery
        assert report is not None
        (topic,) = report["topics"]
        assert topic["end_position"] == 400
        assert topic["lost"]
        gone = {position for each in topic["lost"] for position in range(each["first"], each["end"])}
        assert first in gone
        assert all(first <= position < end for position in gone)
        assert {each["reason"] for each in topic["lost"]} == {"damaged"}
        there = read_with_positions(cluster.name, "log")
        assert there == {position: message for position, message in enumerate(numbered(400, 250)) if position not in gone}
        assert there == read_with_positions(cluster.name, "log", transport="attached")
        with pytest.raises(RangeLost) as lost, Subscriber("log", cluster=cluster.name, start=first) as subscriber:
            subscriber.get_next(timeout=10.0)
        assert (lost.value.first, lost.value.topic) == (min(gone), "log")
    assert {path: path.read_bytes() for path in before} == before, "nothing of what was there is changed"


def test_with_two_replicas_damage_of_one_loses_nothing_and_is_repaired(tmp_path: Path) -> None:
    with running(tmp_path, brokers=3) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log", ack=2, replication_factor=3)
        with Publisher("log", cluster=cluster.name, batch_bytes=1024) as publisher:
            publisher.publish_many(numbered(400, 250)).result()
            publisher.flush()
        replica_state_settles(cluster)
        kill_everything(cluster)
    damage_file("zeroed page", tmp_path)
    with recovered(tmp_path, brokers=3) as cluster:
        assert cluster.recovery is not None
        (topic,) = cluster.recovery["topics"]
        assert (topic["lost"], topic["messages"], len(cluster.recovery["damage"])) == ([], 400, 1)
        assert list(read_with_positions(cluster.name, "log").values()) == numbered(400, 250)
        # Level 2 means both disks: what lacked a copy has to get it before anything behind it is acknowledged.
        with Publisher("log", cluster=cluster.name) as publisher:
            assert publisher.publish(b"more").result().level == 2
        replica_state_settles(cluster)
        kill_everything(cluster)
    plan = make_plan(tmp_path)
    assert {batch.copies for topic in plan.topics for batch in topic.batches} == {2}
    assert sum(len(topic.batches) > 0 for topic in plan.topics) == 1


@pytest.mark.parametrize(("prepare", "says"), [
    (lambda folder: folder.rmdir(), "there is no such folder"), (lambda folder: None, "neither replica files nor topics")])
def test_nothing_to_recover_from_is_said(tmp_path: Path, prepare: Any, says: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    cluster = recovered(folder, brokers=2)
    with pytest.raises(RecoveryError, match=says):
        cluster.start()
    assert traces(cluster.name) == []


def test_the_command_line_recovers_and_says_what_was_lost(damaged: Path, tmp_path: Path) -> None:
    folder = copy_of(damaged, tmp_path)
    damage_file("truncated", folder)
    name = unique("cli")

    def cxlmq(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "client.cli.main", *arguments], capture_output=True, text=True,
                              timeout=60, check=False)

    started = cxlmq("cluster", "up", "-d", "--name", name, "--region-bytes", "64MiB", "--recover", str(folder))
    try:
        assert started.returncode == 0, started.stderr
        assert "lost: positions" in started.stdout
        assert "topic 'log'" in started.stdout
    finally:
        assert cxlmq("cluster", "down", name).returncode == 0
    again = cxlmq("cluster", "up", "-d", "--name", name, "--region-bytes", "64MiB", "--recover", str(folder), "--json")
    try:
        report = json.loads(again.stdout)["recovery"]
        assert report["topics"][0]["lost"]
    finally:
        assert cxlmq("cluster", "down", name).returncode == 0
