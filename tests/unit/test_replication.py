"""What a replica says is durable is on its disk, in records that prove themselves; what failed once stays failed."""

import os
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.layout import RECORDS
from broker.records import unpack
from broker.replica_files import Damage, find_files, read_records, read_superblock
from broker.replica_record import RECORD_BYTES, RECORD_MAGIC, SUPERBLOCK_BYTES
from tests.manual_cluster import KIB, SECOND, ManualCluster, Session, decode_messages, payload_of


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit: what the file format promises, computed without the code under test."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def records_of(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The batches of a file: read by the format's text alone, and in the same way by the product."""
    data = path.read_bytes()
    tag, = struct.unpack_from("<I", data, 16)
    assert crc32c(data[:16] + bytes(4) + data[20:SUPERBLOCK_BYTES]) == tag
    found, at = [], SUPERBLOCK_BYTES
    while at < len(data):
        header = data[at:at + RECORD_BYTES]
        entry = unpack("OrderEntry", header[:64])
        magic, file_tag, payload_crc = struct.unpack_from("<3I", header, 96)
        payload = data[at + len(header):at + len(header) + entry["payload_bytes"]]
        assert (magic, file_tag) == (RECORD_MAGIC, tag)
        assert struct.unpack_from("<I", header, 124)[0] == crc32c(header[:124])
        assert payload_crc == crc32c(payload)
        at += len(header) + (len(payload) + 63) // 64 * 64
        if entry["message_count"]:
            found.append((entry, payload))
    assert at == len(data)
    again = list(read_records(read_superblock(path)))
    assert not [each for each in again if isinstance(each, Damage)]
    assert [each.position for each in again if each.end > each.position] == [entry["position"] for entry, _ in found]
    yield from found


def replica_files(folder: Path, broker: int) -> list[Path]:
    return sorted((folder / f"broker-{broker}").glob("*.replica"))


def replica_file(folder: Path, source: int, broker: int) -> Path:
    (found,) = (folder / f"broker-{broker}").glob(f"*.s{source}.*.replica")
    return found


def replica_line(cluster: ManualCluster, source: int, replica: int) -> dict[str, int]:
    return cluster.record("ReplicaLine", "replica", 0, source, replica)


def stripe(cluster: ManualCluster, session: Session, count: int, first: int = 0) -> None:
    for sequence in range(first, first + count):
        cluster.publish_all(session, [sequence], broker=sequence % cluster.count)


def test_the_checksum_of_the_test_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_each_replica_holds_the_batches_of_its_sources_in_the_total_order(tmp_path: Path) -> None:
    cluster = ManualCluster(brokers=4, folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=3))
    stripe(cluster, session, 40)
    for source in range(4):
        assert len(cluster.replicas(session.topic, source)) == 2
        for replica in cluster.replicas(session.topic, source):
            assert replica != source
            records = list(records_of(replica_file(tmp_path, source, replica)))
            assert [entry["batch_sequence"] for entry, _ in records] == list(range(source, 40, 4))
            for entry, payload in records:
                assert decode_messages(payload) == [payload_of(session, entry["batch_sequence"])]
                assert entry == next(each for each in cluster.entries(session.topic)
                                     if each["position"] == entry["position"])
            assert replica_line(cluster, source, replica)["replicated_index"] == 40
    assert len(find_files(tmp_path)) == 8


def test_the_superblock_says_what_recovery_needs_to_know(tmp_path: Path) -> None:
    cluster = ManualCluster(brokers=3, folder=tmp_path)
    topic = cluster.create("orders", order=5, ack=2, replication_factor=2, retention_bytes=-1)
    cluster.settle()
    for file in find_files(tmp_path):
        assert not file.damage
        assert (file.run_id, file.broker_count, file.first_position) == (1, 3, 0)
        assert cluster.replicas(topic, file.source) == [file.replica]
        assert file.path.parent.name == f"broker-{file.replica}"
        assert {key: file.topic[key] for key in ("name", "order", "ack", "replication_factor", "retention_bytes",
                                                 "generation")} == {
            "name": "orders", "order": 5, "ack": 2, "replication_factor": 2, "retention_bytes": -1,
            "generation": topic.generation}


def test_payloads_that_fill_no_line_are_padded(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(8):
        cluster.publish(session, sequence, [b"x" * sequence, b"", b"y" * (sequence + 3)])
    cluster.settle()
    records = list(records_of(replica_file(tmp_path, 0, 1)))
    assert [decode_messages(payload) for _, payload in records] == [
        [b"x" * sequence, b"", b"y" * (sequence + 3)] for sequence in range(8)]


def test_the_frontier_moves_only_after_the_data_is_on_the_disk(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    disk = cluster.brokers[1].replication
    assert disk is not None
    others = [stage for stage in cluster.stages if stage is not disk]
    for sequence in range(3):
        cluster.publish(session, sequence)
    for _ in range(4):
        for stage in others:
            stage.step_once()
    assert replica_line(cluster, 0, 1)["replicated_index"] == 0
    assert disk.step_once() == 3
    line = replica_line(cluster, 0, 1)
    assert (line["replicated_index"], line["replicated_position"], line["failed"]) == (3, 3, 0)
    assert len(list(records_of(replica_file(tmp_path, 0, 1)))) == 3


def test_files_end_at_their_size_and_the_chain_has_no_hole(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path, replica_file_bytes=8 * KIB)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(40):
        cluster.publish_all(session, [sequence])
    files = replica_files(tmp_path, 1)
    assert len(files) > 2
    assert all(path.stat().st_size <= 8 * KIB + KIB for path in files)
    found = [entry["batch_sequence"] for path in files for entry, _ in records_of(path)]
    assert found == list(range(40))
    firsts = [read_superblock(path).first_position for path in files]
    assert firsts == [next(entry["position"] for entry, _ in records_of(path)) for path in files]


def test_files_below_the_reclaimed_frontier_go_away_and_no_other(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path, replica_file_bytes=8 * KIB)
    session = cluster.open_session(cluster.create(replication_factor=2, retention_bytes=4 * KIB))
    for sequence in range(120):
        cluster.publish_all(session, [sequence])
    kept = cluster.reader(session.topic).frontiers()["reclaimed_position"]
    assert kept > 60
    files = [read_superblock(path) for path in replica_files(tmp_path, 1)]
    found = [entry["position"] for file in files for entry, _ in records_of(file.path)]
    assert found == list(range(found[0], 120))
    assert found[0] <= kept
    assert found[0] > 0, "the first files are gone"


def test_a_topic_without_replicas_has_no_file(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    stripe(cluster, cluster.open_session(cluster.create()), 4)
    assert not any(tmp_path.iterdir())


def test_a_deleted_topic_takes_its_files_along_and_the_next_one_has_its_own(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    for generation in (1, 2):
        session = cluster.open_session(cluster.create("again", replication_factor=2), client=generation)
        stripe(cluster, session, 6)
        assert [[entry["client_id"] for entry, _ in records_of(path)] for path in replica_files(tmp_path, 0)] == [
            [generation] * 3]
        cluster.delete("again")
        cluster.settle()
        assert replica_files(tmp_path, 0) == replica_files(tmp_path, 1) == []


def test_descriptors_come_back_with_their_topics(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        cluster.create(f"t{number}", replication_factor=2)
        cluster.delete(f"t{number}")
        cluster.settle()
    cluster.create("last", replication_factor=2)
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- failures ------------------------------------------------------------------------------------------------------


def descriptor_of(path: Path) -> int:
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.path.samefile(f"/proc/self/fd/{number}", path):
                return int(number)
        except OSError:
            continue
    raise AssertionError(f"nobody has {path} open")


def assert_failed_until_written_anew(cluster: ManualCluster, folder: Path, session: Session, first: int,
                                     frontier: int) -> None:
    """The replica of broker 0 stands still, whatever its file would take now, until another file has what it lacks."""
    failed = replica_file(folder, 0, 1)
    before = failed.stat()
    line = replica_line(cluster, 0, 1)
    assert line["failed"] != 0
    assert line["replicated_index"] == frontier
    stripe(cluster, session, 4, first)
    assert replica_line(cluster, 0, 1) == line
    cluster.clock.advance(SECOND)
    cluster.settle()
    line = replica_line(cluster, 0, 1)
    assert (line["failed"], line["replicated_index"]) == (0, first + 4)
    assert (failed.stat().st_size, failed.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    (anew,) = set(replica_files(folder, 1)) - {failed}
    assert read_superblock(anew).first_position == frontier
    # Not one of them is there twice, and none is missing.
    assert [entry["position"] for entry, _ in records_of(anew)] == [
        each["position"] for each in cluster.entries(session.topic) if each["broker"] == 0 and each["position"] >= frontier]


def test_a_disk_that_is_full_fails_the_file_for_good(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    path = replica_file(tmp_path, 0, 1)
    full, mine = os.open("/dev/full", os.O_WRONLY), descriptor_of(path)
    os.dup2(full, mine)
    stripe(cluster, session, 2, 4)
    assert len(list(records_of(path))) == 2
    assert_failed_until_written_anew(cluster, tmp_path, session, 6, 4)
    os.close(full)


def test_a_sync_that_fails_once_is_final_for_the_file(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    mine = descriptor_of(replica_file(tmp_path, 0, 1))
    # Takes writes, and cannot be synced.
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, mine)
    stripe(cluster, session, 2, 4)
    assert_failed_until_written_anew(cluster, tmp_path, session, 6, 4)
    os.close(null)


def test_a_short_write_fails_the_file_and_leaves_only_a_torn_tail(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    path = replica_file(tmp_path, 0, 1)
    whole = path.stat().st_size
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 300, hard))
    try:
        cluster.publish(session, 4, [bytes(KIB)], broker=0)
        cluster.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert whole < path.stat().st_size < whole + KIB
    assert_failed_until_written_anew(cluster, tmp_path, session, 5, 4)
    *_, last = read_records(read_superblock(path))
    assert isinstance(last, Damage)
    os.truncate(path, whole)
    assert len(list(records_of(path))) == 2


@pytest.mark.parametrize("error", [KeyError("topic"), StopIteration(), OSError(5, "no"), ValueError("no")])
def test_a_replica_that_cannot_begin_writes_to_no_descriptor_at_all(tmp_path: Path, error: Exception) -> None:
    class Refusing:
        def topic_appeared(self, topic: int, generation: int) -> None:
            pass

        def create(self, *_: object) -> None:
            raise error

    cluster = ManualCluster(folder=tmp_path)
    cluster.brokers[1].replication.__init__(        # type: ignore[misc]
        cluster.door(1, 5), cluster.layout, 1, Refusing(), cluster.clock)
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(writing, 0)                         # whoever writes to descriptor 0 is noticed
    try:
        session = cluster.open_session(cluster.create(replication_factor=2))
        stripe(cluster, session, 6)
        cluster.clock.advance(SECOND)
        cluster.settle()
    finally:
        os.dup2(kept, 0)
    os.close(writing)
    assert os.read(reading, 1) == b""
    assert replica_line(cluster, 0, 1)["failed"] != 0
    assert replica_line(cluster, 0, 1)["replicated_index"] == 0
    for descriptor in (reading, kept):
        os.close(descriptor)


def test_a_damaged_order_entry_fails_the_replica_instead_of_leaving_a_hole(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    disk = cluster.brokers[1].replication
    others = [stage for stage in cluster.stages if stage is not disk]
    for sequence in range(3):
        cluster.publish(session, sequence)
    for _ in range(4):
        for stage in others:
            stage.step_once()
    cluster.poke("OrderEntry", "order_entry", 0, 1, commit=99)
    cluster.settle()
    line = replica_line(cluster, 0, 1)
    assert line["failed"] != 0
    assert line["replicated_index"] == 1
    assert len(list(records_of(replica_file(tmp_path, 0, 1)))) == 1


def test_a_record_begins_with_an_order_entry_and_is_two_lines() -> None:
    assert sum({"Q": 8, "I": 4, "H": 2}[letter] * count for _, letter, count, _ in RECORDS["OrderEntry"]) == 64
    assert RECORD_BYTES == 128
