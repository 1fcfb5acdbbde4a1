"""A replica's disk fails under running brokers: level 2 never covers what is not durable, and says which disk it was.

The brokers are real; a preloaded library (faulty_disk.c) lets chosen writes and syncs fail while they run.
"""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.group_files import read_group_files
from broker.proto import cxlmq_pb2 as pb
from broker.replica_files import Damage, Record, find_files, read_records
from client.admin import Admin
from client.cluster import Cluster
from client.connection import Connection
from client.errors import (
    BadRequest,
    DeletionNotDurable,
    GroupNotDurable,
    MessageLost,
    RangeLost,
    ReplicaFailed,
    SessionFenced,
    TopicNotDurable,
)
from client.publisher import Publisher
from client.subscriber import Subscriber
from sim.chaos.disk import SOURCE
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, inspected, numbered, read_topic
from tests.end_to_end.test_recovery import kill_everything

SECONDS = 20.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library, built here."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler to build the library that makes disks fail")
    built = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", built, SOURCE, "-ldl", "-lpthread"], check=True)
    return built


class FaultyCluster:
    """Four brokers whose disks can be told to fail."""

    def __init__(self, cluster: Cluster, folder: Path, control: Path) -> None:
        self.cluster, self.folder, self._control = cluster, folder, control

    def fail(self, *rules: str) -> None:
        """Rules as in faulty_disk.c; none: all disks are well."""
        writing = self._control.with_suffix(".new")
        writing.write_text("".join(rule + "\n" for rule in rules))
        writing.replace(self._control)

    def replica_lines(self, topic: str) -> list[dict[str, int]]:
        """(source, replica) lines of a topic's replicas."""
        (found,) = [each for each in inspected(self.cluster.name)["topics"] if each["name"] == topic]
        return [{"source": place["broker"], **line} for place in found["brokers"] for line in place["replicas"]
                if line["generation"] == found["generation"]]       # else left by an earlier topic of this number

    def payload_bytes(self, topic: str) -> int:
        return sum(record.fields["payload_bytes"] for file in find_files(self.folder) if file.topic["name"] == topic
                   for record in read_records(file) if not isinstance(record, Damage))


@pytest.fixture(scope="module")
def faulty(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCluster]:
    folder = tmp_path_factory.mktemp("data")
    control = tmp_path_factory.mktemp("control") / "rules"
    control.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("FAULTY_DISK", str(control))
        with Cluster(small_config(brokers=4, data_directory=str(folder))) as cluster:
            patch.undo()
            yield FaultyCluster(cluster, folder, control)


@pytest.fixture
def topic(faulty: FaultyCluster) -> Iterator[str]:
    name = unique("topic")
    with Admin(cluster=faulty.cluster.name) as admin:
        admin.create_topic(name, ack=2, replication_factor=2)
        yield name
        faulty.fail()
        admin.delete_topic(name)


def publisher(faulty: FaultyCluster, topic: str, transport: str = "grpc", ack: int = 2, **options: object) -> Publisher:
    return Publisher(topic, cluster=faulty.cluster.name, ack=ack, transport=transport, delivery_timeout=SECONDS,
                     batch_bytes=4096, **options)


def is_well(faulty: FaultyCluster, topic: str, end: int) -> Callable[[], bool]:
    def look() -> bool:
        lines = faulty.replica_lines(topic)
        return bool(lines) and all(not line["failed"] and line["replicated_position"] == end for line in lines)

    return look


def refused_by_a_disk(out: Publisher, tries: int = 100) -> tuple[list[bytes], list[ReplicaFailed]]:
    """Publish until a disk refused some of it, for it is the brokers' load that says who gets a batch: all that was
    published, and the refusals. Nothing may fail for another reason."""
    published: list[bytes] = []
    for number in range(tries):
        some = numbered(20, 200, f"during {number}")
        published += some
        deliveries = [out.publish(message) for message in some]
        errors = [error for each in deliveries if (error := each.exception()) is not None]
        assert all(isinstance(error, ReplicaFailed) for error in errors), errors
        if errors:
            return published, [error for error in errors if isinstance(error, ReplicaFailed)]
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize(("rule", "reason"), [
    ("write enospc -1", "No space left"), ("write eio -1", "Input/output error"), ("write short 1", "No space left"),
    ("sync eio 1", "Input/output error"), ("sync enospc 1", "No space left"),
])
def test_level_2_is_refused_for_what_a_disk_did_not_take_and_level_1_goes_on(
        faulty: FaultyCluster, topic: str, transport: str, rule: str, reason: str) -> None:
    before, after = numbered(40, 200, "before"), numbered(40, 200, "after")
    with publisher(faulty, topic, transport) as out:
        out.publish_many(before)
        out.flush()
        broker = faulty.replica_lines(topic)[0]["replica"]
        faulty.fail(f"{rule} broker-{broker}/{topic}.")
        during, failed = refused_by_a_disk(out)
        assert {(error.replica, error.reason.startswith(reason)) for error in failed} == {(broker, True)}
        # Level 1 is not concerned.
        with publisher(faulty, topic, transport, ack=1) as other:
            assert other.publish(b"level 1").result().level == 1
        # The disk is well again: what it lacks is written anew, into another file, and level 2 goes on.
        faulty.fail()
        assert eventually(is_well(faulty, topic, len(before) + len(during) + 1))
        out.publish_many(after).result()
    assert sorted(read_topic(faulty.cluster.name, topic)) == sorted([*before, *during, b"level 1", *after])
    on_disk = sorted({record.position for file in find_files(faulty.folder) if file.topic["name"] == topic
                      for record in read_records(file) if not isinstance(record, Damage) and record.end > record.position})
    assert on_disk[0] == 0


def test_a_sync_that_failed_is_not_believed_when_the_next_one_succeeds(faulty: FaultyCluster, topic: str) -> None:
    with publisher(faulty, topic) as out:
        out.publish(b"first").result()
        faulty.fail(*(f"sync eio 1 broker-{replica}/{topic}." for replica in range(4)))
        with pytest.raises(ReplicaFailed):
            for number in range(100):           # until one comes by each broker
                out.publish(b"%d" % number).result()
        failed = [each for each in faulty.replica_lines(topic) if each["failed"]]
        assert failed
        files = {file.path: file.path.stat().st_size for file in find_files(faulty.folder)
                 if any((file.source, file.replica) == (each["source"], each["replica"]) for each in failed)
                 and file.topic["name"] == topic}
        faulty.fail()
        assert eventually(lambda: not any(each["failed"] for each in faulty.replica_lines(topic)))
        out.publish(b"last").result()
        for each, size in files.items():        # nobody wrote into, or synced, what had failed
            assert not each.exists() or each.stat().st_size == size


def test_a_degraded_topic_says_so(faulty: FaultyCluster, topic: str) -> None:
    with Admin(cluster=faulty.cluster.name) as admin, publisher(faulty, topic) as out:
        out.publish(b"first").result()
        assert admin.describe_topic(topic)["degraded"] == []
        faulty.fail(f"write enospc -1 {topic}.")
        deliveries = [out.publish(bytes(4000)) for _ in range(8)]
        assert all(isinstance(each.exception(), ReplicaFailed) for each in deliveries)
        (line, *_) = admin.describe_topic(topic)["degraded"]
        assert "No space left on device" in line
        faulty.fail()
        assert eventually(lambda: admin.describe_topic(topic)["degraded"] == [])


def test_a_deletion_that_no_disk_took_is_told_and_written_down_later(faulty: FaultyCluster) -> None:
    name = unique("topic")
    with Admin(cluster=faulty.cluster.name) as admin:
        admin.create_topic(name, ack=2, replication_factor=2)
        with publisher(faulty, name) as out:
            out.publish(b"message").result()
        with Subscriber(name, cluster=faulty.cluster.name, group="g") as reader:
            reader.fetch(1, SECONDS)
            reader.commit()
        faulty.fail(f"sync eio -1 {name}-")             # the files of its groups
        with pytest.raises(GroupNotDurable, match=r"group g of topic .* is deleted, but no disk"):
            admin.delete_group(name, "g")
        faulty.fail()
        assert eventually(lambda: name not in {each.topic for each in read_group_files(
            faulty.folder.glob("broker-*"))[0]})
        faulty.fail(f"sync eio -1 {name}.")
        with pytest.raises(DeletionNotDurable, match="is deleted, but that could not be written down"):
            admin.delete_topic(name)
        assert name not in {each["name"] for each in admin.list_topics()}
        assert list(faulty.folder.rglob(f"{name}.*.replica")), "nothing is removed before that is on a disk"
        faulty.fail()
        assert eventually(lambda: not list(faulty.folder.rglob(f"{name}.*.replica")))
        assert eventually(lambda: len(list(faulty.folder.rglob(f"{name}.*.deleted"))) == 4)


def test_a_slow_disk_slows_level_2_alone(faulty: FaultyCluster, topic: str) -> None:
    with publisher(faulty, topic) as durable, publisher(faulty, topic, ack=1) as quick:
        durable.publish(b"warm").result()
        quick.publish(b"warm").result()
        faulty.fail(f"sync delay=3000 -1 {topic}.")
        begun = time.monotonic()
        waiting = durable.publish(b"slow")
        for number in range(20):
            quick.publish(b"%d" % number).result()
        level_1 = time.monotonic() - begun
        assert not waiting.done(), "20 acks of level 1 came, one after the other, while one sync was under way"
        waiting.result()
        assert time.monotonic() - begun >= 3.0 > level_1


@pytest.mark.parametrize("rule", ["sync eio -1", "sync enospc -1"])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_topic_that_the_heads_disk_does_not_take_is_not_made(faulty: FaultyCluster, rule: str, factor: int) -> None:
    name = unique("topic")
    with Admin(cluster=faulty.cluster.name) as admin:
        faulty.fail(f"{rule} {name}")
        try:
            with pytest.raises(TopicNotDurable, match="is not created"):
                admin.create_topic(name, replication_factor=factor)
            assert name not in {each["name"] for each in admin.list_topics()}
            assert list(faulty.folder.rglob(f"*{name}*")) == []
        finally:
            faulty.fail()
        admin.create_topic(name, replication_factor=factor)
        assert len(list(faulty.folder.rglob(f"{name}.*.topic"))) >= 1
        admin.delete_topic(name)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("lost", [False, True])
def test_what_waited_for_its_level_over_a_recovery_settles_as_it_is(
        library: Path, tmp_path: Path, transport: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session had ended before the memory went, and the disks were slow: what they have is there at its position,
    and no receipt is given for the rest."""
    control = tmp_path / "rules"
    control.write_text("")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAULTY_DISK", str(control))
    cluster = Cluster(small_config(brokers=2, data_directory=str(tmp_path / "data"), restart=False)).start()
    monkeypatch.delenv("LD_PRELOAD")
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)
    with Publisher("t", cluster=cluster.name, ack=2, transport=transport, delivery_timeout=60.0, batch_bytes=256) as out:
        first = out.publish(b"first").result().position
        control.write_text("sync delay=60000 -1 .replica\n")
        engine: Any = out._engine
        waiting = [out.publish(each) for each in numbered(6, 200)]
        assert eventually(lambda: inspected(cluster.name)["topics"][0]["committed_position"] == 7)
        engine.loop.call_soon_threadsafe(engine.end_session, SessionFenced(reason="the test ends it", committed=0))
        assert eventually(lambda: len(engine.session.awaited._places) == 6)
        kill_everything(cluster)
        if lost:
            for file in find_files(tmp_path / "data"):
                for record in list(read_records(file)):
                    if isinstance(record, Record) and record.position in (3, 4) and record.end > record.position:
                        with open(file.path, "r+b") as damaged:
                            damaged.seek(record.payload_offset)
                            damaged.write(b"\xff" * 8)
        with Cluster(small_config(brokers=2, name=cluster.name, data_directory=str(tmp_path / "data")),
                     recover=tmp_path / "data"):
            errors = {first + 1 + number: error for number, each in enumerate(waiting)
                      if (error := each.exception(50)) is not None}
            assert {type(each) for each in errors.values()} <= {MessageLost}
            there = {each.receipt().position for each in waiting if each.exception(1) is None}
            kept = dict(enumerate([b"first", *numbered(6, 200)]))
            with Subscriber("t", cluster=cluster.name, transport="grpc") as reader:
                got = dict[int, bytes]()
                while len(got) < 7 - len(errors):
                    try:
                        got |= {each.position: bytes(each.payload) for each in reader.fetch(10, 10)}
                    except RangeLost as gone:
                        reader.seek(gone.end)
            assert got == {position: kept[position] for position in {first, *there}}
            assert errors or not lost
            assert out.publish(b"later").result().level == 2


def test_nobody_asks_for_more_earlier_sessions_than_are_looked_for(faulty: FaultyCluster, topic: str) -> None:
    async def ask(*earlier: pb.EarlierBatches) -> pb.Session:
        connection = Connection(faulty.cluster.name, None)
        try:
            return await connection.any("Admin/OpenSession", pb.OpenSessionRequest(
                topic=topic, client_id=77, session_epoch=2, ack=1, resume_epoch=1, earlier=earlier), pb.Session)
        finally:
            await connection.close()

    for wrong in ([pb.EarlierBatches(session_epoch=1, first=0, end=257)], [pb.EarlierBatches(first=2, end=1)],
                  [pb.EarlierBatches(end=1)] * 5):
        with pytest.raises(BadRequest):
            asyncio.run(ask(*wrong))
