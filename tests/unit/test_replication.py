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
from broker.stages.replication import (
    REPLICA_RECORD_HEADER_BYTES,
    REPLICA_RECORD_MAGIC,
    REPLICA_SUPERBLOCK_BYTES,
)
from tests.manual_cluster import KIB, ManualCluster, Session, decode_messages, payload_of


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit: what the file format promises, computed without the code under test."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def records_of(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    data = path.read_bytes()
    at = REPLICA_SUPERBLOCK_BYTES
    while at < len(data):
        header = data[at:at + REPLICA_RECORD_HEADER_BYTES]
        entry = unpack("OrderEntry", header[:64])
        magic, payload_crc, header_crc, padding = struct.unpack("<4I", header[64:])
        payload = data[at + len(header):at + len(header) + entry["payload_bytes"]]
        assert magic == REPLICA_RECORD_MAGIC
        assert header_crc == crc32c(header[:72])
        assert payload_crc == crc32c(payload)
        assert padding == -len(payload) % 8
        yield entry, payload
        at += len(header) + len(payload) + padding
    assert at == len(data)


def replica_file(folder: Path, broker: int) -> Path:
    (found,) = (folder / f"broker-{broker}").iterdir()
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
    for replica in range(4):
        sources = {(replica - 1) % 4, (replica - 2) % 4}
        records = list(records_of(replica_file(tmp_path, replica)))
        assert [entry["batch_sequence"] for entry, _ in records] == [s for s in range(40) if s % 4 in sources]
        for entry, payload in records:
            assert decode_messages(payload) == [payload_of(session, entry["batch_sequence"])]
            assert entry == next(each for each in cluster.entries(session.topic)
                                 if each["position"] == entry["position"])
        assert {replica_line(cluster, source, replica)["replicated_index"] for source in sources} == {40}


def test_payloads_that_fill_no_word_are_padded(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(8):
        cluster.publish(session, sequence, [b"x" * sequence, b"", b"y" * (sequence + 3)])
    cluster.settle()
    records = list(records_of(replica_file(tmp_path, 1)))
    assert [decode_messages(payload) for _, payload in records] == [
        [b"x" * sequence, b"", b"y" * (sequence + 3)] for sequence in range(8)]


def test_the_frontier_moves_only_after_the_data_is_on_the_disk(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    disk = cluster.brokers[1].replication
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
    assert len(list(records_of(replica_file(tmp_path, 1)))) == 3


def test_a_topic_without_replicas_has_no_file(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    stripe(cluster, cluster.open_session(cluster.create()), 4)
    assert not any(tmp_path.iterdir())


def test_the_next_topic_of_a_number_has_a_file_of_its_own(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    for generation in (1, 2):
        session = cluster.open_session(cluster.create(f"t{generation}", replication_factor=2), client=generation)
        stripe(cluster, session, 6)
        cluster.delete(f"t{generation}")
        cluster.settle()
    files = sorted((tmp_path / "broker-0").iterdir())
    assert [[entry["client_id"] for entry, _ in records_of(path)] for path in files] == [[1] * 3, [2] * 3]


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


def assert_failed_for_good(cluster: ManualCluster, session: Session, first: int, frontier: int) -> None:
    """The replica at broker 1 says that it failed, and nothing moves its frontier any more."""
    line = replica_line(cluster, 0, 1)
    assert line["failed"] != 0
    assert line["replicated_index"] == frontier
    stripe(cluster, session, 4, first)
    assert replica_line(cluster, 0, 1) == line


def test_a_disk_that_is_full_fails_the_replica_for_good(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    path = replica_file(tmp_path, 1)
    full, mine = os.open("/dev/full", os.O_WRONLY), descriptor_of(path)
    kept = os.dup(mine)
    os.dup2(full, mine)
    stripe(cluster, session, 2, 4)
    os.dup2(kept, mine)                         # the disk has room again: too late
    assert_failed_for_good(cluster, session, 6, 4)
    assert len(list(records_of(path))) == 2
    os.close(full)
    os.close(kept)


def test_a_sync_that_fails_once_is_final(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    mine = descriptor_of(replica_file(tmp_path, 1))
    kept = os.dup(mine)
    reading, writing = os.pipe()                # takes writes, cannot be synced
    os.dup2(writing, mine)
    stripe(cluster, session, 2, 4)
    os.dup2(kept, mine)
    assert_failed_for_good(cluster, session, 6, 4)
    for descriptor in (kept, reading, writing):
        os.close(descriptor)


def test_a_short_write_fails_the_replica_and_leaves_only_a_torn_tail(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    stripe(cluster, session, 4)
    path = replica_file(tmp_path, 1)
    whole = path.stat().st_size
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 100, hard))
    try:
        cluster.publish(session, 4, [bytes(KIB)], broker=0)
        cluster.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert whole < path.stat().st_size < whole + KIB
    assert_failed_for_good(cluster, session, 5, 4)
    os.truncate(path, whole)
    assert len(list(records_of(path))) == 2


@pytest.mark.parametrize("error", [KeyError("topic"), StopIteration(), OSError(5, "no"), ValueError("no")])
def test_a_replica_that_cannot_begin_writes_to_no_descriptor_at_all(tmp_path: Path, error: Exception) -> None:
    def refuse(topic: int, generation: int) -> tuple[str, bytes]:
        raise error

    cluster = ManualCluster(folder=tmp_path)
    cluster.brokers[1].replication.__init__(        # type: ignore[misc]
        cluster.door(1, 5), cluster.layout, 1, str(tmp_path / "broker-1"), refuse)
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(writing, 0)                         # whoever writes to descriptor 0 is noticed
    try:
        session = cluster.open_session(cluster.create(replication_factor=2))
        stripe(cluster, session, 6)
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
    assert len(list(records_of(replica_file(tmp_path, 1)))) == 1


def test_a_record_header_is_an_order_entry_and_four_words() -> None:
    assert sum({"Q": 8, "I": 4, "H": 2}[letter] * count for _, letter, count, _ in RECORDS["OrderEntry"]) == 64
    assert REPLICA_RECORD_HEADER_BYTES == 64 + 16
