"""A publisher that outlives memory and damaged disks gets no receipt for a message that nobody has, at any order level."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker.config import ClusterConfig, load_config
from broker.errors import SessionFenced
from broker.layout import ControlBits
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader
from broker.recovery import RecoveredSession, make_plan
from broker.region import Region, create_region
from broker.replica_files import SESSIONS_SUFFIX, Record, ReplicaFile, find_files, read_records
from broker.restore import restore
from broker.session_service import SessionService
from broker.sessions import LOST_POSITION, UNKNOWN_POSITION, UNPLACED_POSITION, UNSURE_POSITION, SessionTable
from sim.cxl.memory import Role
from tests.manual_cluster import KIB, LEASE_NS, MIB, ManualCluster

CLIENT, BATCHES = 7, 12
ORDERS = [0, 1, 2, 5]
LEADING, MIDDLE, SEVERAL = [0, 1], [4, 5], [0, 3, 4, 9]


def written(folder: Path, order: int, batches: int = BATCHES, **settings: int) -> None:
    """The disks of a cluster in which a publisher sent some batches; all are durable."""
    cluster = ManualCluster(brokers=2, folder=folder, limits=True, **settings)
    session = cluster.open_session(cluster.create(order=order, replication_factor=2, ack=2, **(
        {"retention_bytes": 4096} if settings else {})), client=CLIENT)
    for sequence in range(batches):
        cluster.publish(session, sequence, [b"message %d" % sequence])
        cluster.settle()
    cluster.settle()
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()


def records_of(folder: Path) -> list[tuple[ReplicaFile, Record]]:
    return [(file, each) for file in find_files(folder) for each in read_records(file)
            if isinstance(each, Record) and each.end > each.position]


def destroy(folder: Path, sequences: list[int]) -> None:
    """Flip a bit in each of these batches on every disk."""
    for file, record in records_of(folder):
        if record.fields["batch_sequence"] in sequences:
            with open(file.path, "r+b") as out:
                out.seek(record.payload_offset)
                first = out.read(1)[0]
                out.seek(record.payload_offset)
                out.write(bytes([first ^ 4]))


def session_of(folder: Path) -> RecoveredSession:
    (topic,) = make_plan(folder).topics
    (found,) = [each for each in topic.sessions if each.client_id == CLIENT]
    return found


def config_of() -> ClusterConfig:
    return load_config(environment={}, name=f"lost-{os.getpid()}", brokers=2, region_bytes=8 * MIB, segment_bytes=16 * KIB,
                       message_bytes_max=16 * KIB, batch_bytes_max=16 * KIB, order_entry_count=1024, topic_count_max=8,
                       session_count_max=16)


@contextmanager
def recovered(folder: Path) -> Iterator[tuple[Region, SessionTable, int]]:
    """A region that was filled from these disks, its sessions, and their topic."""
    def prepare(region: Region) -> None:
        restore(region, make_plan(folder), LEASE_NS)

    region = create_region(config_of(), prepare=prepare)
    try:
        memory, control = region.memory(Role.ROLE_BROKER), region.layout.offset_of("control")
        # As when the head has taken over from what was restored: bank 0 counts.
        memory.store_word(control, memory.load_word(control) | ControlBits.CONTROL_SERVING)
        sessions = SessionTable(memory, region.layout, 0, lambda: None)
        (key,) = {line["topic"] for slot in range(16) if (line := sessions.line(slot))["state"]}
        yield region, sessions, key
    finally:
        region.unlink()


def answers(folder: Path) -> tuple[int, list[int]]:
    """What a publisher hears that opens its session anew in the recovered cluster: high-water mark, positions."""
    with recovered(folder) as (region, sessions, key):
        memory = region.memory(Role.ROLE_BROKER)
        reader = OrderReader(memory, region.layout, key & 0xFFFF, key >> 16)
        high_water = sessions.committed(CLIENT, key, 1)
        assert high_water is not None
        found = asyncio.run(sessions.positions(reader, CLIENT, key, 1, range(BATCHES)))
        return high_water, found


def test_what_may_be_reclaimed_since_the_recovery_is_not_called_lost(tmp_path: Path) -> None:
    written(tmp_path, 5)
    destroy(tmp_path, MIDDLE)
    with recovered(tmp_path) as (region, sessions, key):
        memory = region.memory(Role.ROLE_BROKER)
        reader = OrderReader(memory, region.layout, key & 0xFFFF, key >> 16)
        before = asyncio.run(sessions.positions(reader, CLIENT, key, 1, range(BATCHES)))
        assert {before[sequence] for sequence in MIDDLE} == {LOST_POSITION}
        kept = MIDDLE[-1] + 2               # the first batch that is kept, when one behind the hole is reclaimed, too
        memory.store_word(region.layout.offset_of("topic_reclaim", key & 0xFFFF), reader.find(before[kept]))
        after = asyncio.run(sessions.positions(reader, CLIENT, key, 1, range(BATCHES)))
        assert set(after[MIDDLE[0]:kept]) == {UNSURE_POSITION}
        assert after[kept:] == before[kept:]


@pytest.mark.parametrize("gone", [[], MIDDLE, [11]], ids=str)
def test_a_session_that_lost_batches_has_to_be_opened_anew(tmp_path: Path, gone: list[int]) -> None:
    """On the old one the sequencer would take what was lost for duplicates of what is there."""
    written(tmp_path, 5)
    destroy(tmp_path, gone)
    with recovered(tmp_path) as (region, sessions, key):
        topic = SimpleNamespace(name="topic", generation=key >> 16, number=key & 0xFFFF, replication_factor=2)
        broker: Any = SimpleNamespace(layout=region.layout, sessions=sessions, settings=SimpleNamespace(run_id=1),
                                      topics=SimpleNamespace(find_seen=lambda *_: topic))
        service = SessionService(broker)
        (slot,) = [slot for slot in range(16) if sessions.line(slot)["client_id"] == CLIENT]
        opened = pb.PublishOpen(client_id=CLIENT, session_slot=slot, session_epoch=1, ack=2)
        if gone == MIDDLE:
            with pytest.raises(SessionFenced, match="recovered"):
                service.check(opened)
        else:
            assert service.check(opened).name == "topic"


@pytest.mark.parametrize("gone", [[], LEADING, MIDDLE, SEVERAL], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_nobody_is_told_that_a_batch_is_there_which_nobody_has(tmp_path: Path, order: int, gone: list[int]) -> None:
    written(tmp_path, order)
    destroy(tmp_path, gone)
    high_water, positions = answers(tmp_path)
    for sequence, position in enumerate(positions):
        there = position < LOST_POSITION or position == UNPLACED_POSITION
        counts = there or (sequence < high_water and position != LOST_POSITION)     # as the publisher takes it
        assert counts == (sequence not in gone), f"batch {sequence}"
        if there:
            assert position == sequence
    # At order 5 what comes before something that was kept cannot be sent again; elsewhere it is.
    assert {positions[each] for each in gone} <= {LOST_POSITION if order == 5 else UNKNOWN_POSITION}
    assert high_water == (BATCHES if order == 5 or not gone else min(gone))


@pytest.mark.parametrize("gone", [[10, 11], [11]], ids=str)
def test_lost_batches_at_the_end_of_a_session_are_sent_again(tmp_path: Path, gone: list[int]) -> None:
    written(tmp_path, 5)
    destroy(tmp_path, gone)
    assert answers(tmp_path) == (min(gone), [*range(min(gone)), *(UNKNOWN_POSITION for _ in gone)])


@pytest.mark.parametrize("trail", [True, False], ids=["trail", "no trail"])
def test_what_was_reclaimed_counts_only_if_that_was_written_down(tmp_path: Path, trail: bool) -> None:
    written(tmp_path, 5, batches=200, replica_file_bytes=8 << 10, order_entry_count=64)
    kept = sorted({record.fields["batch_sequence"] for _, record in records_of(tmp_path)})
    assert kept[0] > 0, "the first are reclaimed"
    destroy(tmp_path, [150, 190])
    if not trail:
        for path in tmp_path.rglob("*" + SESSIONS_SUFFIX):
            path.unlink()
    found = session_of(tmp_path)
    assert found.expected == 200
    first_known = 0 if trail else kept[0]
    assert found.found_from == (min(each for each in (150, 190) if each >= kept[0]) if trail else 0), first_known


def test_a_whole_log_leaves_no_doubt(tmp_path: Path) -> None:
    written(tmp_path, 5, batches=80, replica_file_bytes=8 << 10, order_entry_count=64)
    found = session_of(tmp_path)
    assert (found.expected, found.found_from) == (80, 80)


def test_a_second_recovery_says_the_same(tmp_path: Path) -> None:
    written(tmp_path / "data", 5)
    destroy(tmp_path / "data", SEVERAL)
    first = answers(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "again")
    assert answers(tmp_path / "again") == first
