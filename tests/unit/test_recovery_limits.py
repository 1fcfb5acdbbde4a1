"""Recovery into other settings brings back everything that the disks have, or is refused before anything is touched, and
the settings that the refusal names work."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.config import ClusterConfig, layout_of, load_config
from broker.errors import RecoveryError
from broker.layout import LOST_BROKER_NUMBER
from broker.payload_places import limits_of
from broker.records import record_bytes, unpack
from broker.recovery import RecoveredSession, RecoveryPlan, make_plan
from broker.recovery_check import check_limits
from broker.region import Region, create_region
from broker.restore import restore
from tests.manual_cluster import KIB, LEASE_NS, MIB, ManualCluster, decode_messages

GROUPS = 9
# Of the cluster whose disks are recovered.
WRITTEN = {"region_bytes": 8 * MIB, "segment_bytes": 16 * KIB, "message_bytes_max": 256 * KIB, "batch_bytes_max": 256 * KIB,
           "order_entry_count": 1024, "topic_count_max": 8, "session_count_max": 32}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disks of a cluster with six topics, one of which never drops anything; messages of up to 200 KiB."""
    folder = tmp_path_factory.mktemp("disks")
    cluster = ManualCluster(brokers=3, folder=folder, **WRITTEN)
    for number in range(6):
        session = cluster.open_session(cluster.create(f"t{number}", replication_factor=3 if number == 5 else 2, ack=2,
                                                      retention_bytes=-1 if number == 1 else 0), client=10 + number)
        for sequence in range(120 if number == 2 else 12):
            size = 200 * KIB if (number, sequence) == (3, 5) else 5000 if number != 2 else 100
            cluster.publish(session, sequence, [b"%d" % (sequence % 10) * size], broker=sequence % 3)
            cluster.settle()
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of them, which nothing may change but a manifest that is added."""
    copied = tmp_path / "data"
    shutil.copytree(written, copied)
    before = contents(copied)
    yield copied
    after = contents(copied)
    assert {path: data for path, data in after.items() if path.parent.name != "recoveries"} == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(**settings: Any) -> ClusterConfig:
    return load_config(environment={}, **{"name": f"limits-{os.getpid()}", "brokers": 3, **WRITTEN, **settings})


def log_of(region: Region, number: int) -> dict[int, list[bytes]]:
    """What a restored topic holds, read from its lines alone: position -> messages."""
    memory, place = region.memory(), region.layout.offset_of
    index = unpack("TopicOrderLine", memory.read_line_bytes(place("topic_order", number)))["committed_index"]
    found = {}
    for at in range(index):
        entry = unpack("OrderEntry", memory.read_bytes(place("order_entry", number, at), record_bytes("OrderEntry")))
        if entry["broker"] != LOST_BROKER_NUMBER:
            assert entry["payload_bytes"] <= region.layout.numbers["batch_bytes_max"]
            found[entry["position"]] = decode_messages(memory.read_bytes(entry["payload_offset"], entry["payload_bytes"]))
    return found


def log_on_disk(plan: RecoveryPlan, number: int) -> dict[int, list[bytes]]:
    found = {}
    for each in plan.topics[number].batches:
        data = each.path.read_bytes()[each.record.payload_offset:][:each.record.fields["payload_bytes"]]
        found[each.record.position] = decode_messages(data)
    return found


def recover(config: ClusterConfig, folder: Path, groups: int = GROUPS) -> list[dict[int, list[bytes]]]:
    """Recover as a broker does; every topic's log. Raises `RecoveryError`: then nothing was changed."""
    before = contents(folder)
    plan = make_plan(folder)
    try:
        check_limits(config, plan, groups)
    except RecoveryError:
        assert contents(folder) == before
        raise
    region = create_region(config, prepare=lambda created: restore(created, plan, LEASE_NS) and None)
    try:
        assert all(each.lost == [] for each in plan.topics)
        return [log_of(region, number) for number in range(len(plan.topics))]
    finally:
        region.unlink()
        region.close()


def settings_asked_for(config: ClusterConfig, plan: RecoveryPlan) -> dict[str, int]:
    """The settings that a refusal names, in its message too; none when there is no refusal."""
    try:
        check_limits(config, plan, GROUPS)
    except RecoveryError as error:
        refused = error
    else:
        return {}
    assert refused.settings
    assert all(f"{setting} = {value}" in refused.message for setting, value in refused.settings.items())
    return dict(refused.settings)


@pytest.mark.parametrize("settings", [
    {}, {"region_bytes": 16 * MIB}, {"region_bytes": 4 * MIB}, {"region_bytes": 2 * MIB}, {"region_bytes": 64 * MIB},
    {"message_bytes_max": 0, "batch_bytes_max": 0}, {"message_bytes_max": 100 * KIB},
    {"message_bytes_max": 100 * KIB, "batch_bytes_max": 64 * KIB}, {"message_bytes_max": MIB, "region_bytes": 32 * MIB},
    {"segment_bytes": 4 * KIB}, {"segment_bytes": 64 * KIB}, {"segment_bytes": 256 * KIB},
    {"order_entry_count": 128}, {"order_entry_count": 64}, {"order_entry_count": 16}, {"order_entry_count": 4096},
    {"topic_count_max": 6}, {"topic_count_max": 5}, {"topic_count_max": 1}, {"topic_count_max": 32},
    {"group_count_max": 9}, {"group_count_max": 8}, {"session_count_max": 3}, {"session_count_max": 256},
    {"cursor_count_max": 3}, {"ring_slot_count": 16}, {"ring_slot_count": 1024}, {"attach_slot_count": 0},
    {"brokers": 1}, {"brokers": 2}, {"brokers": 4}, {"brokers": 8}, {"pool": "partitioned"}, {"pool": "leader"},
    {"pool": "partitioned", "region_bytes": 4 * MIB}, {"brokers": 2, "topic_count_max": 3, "region_bytes": 2 * MIB},
    dict.fromkeys([*WRITTEN][1:], 0) | {"region_bytes": MIB}, dict.fromkeys([*WRITTEN][1:], 0) | {"region_bytes": 64 * MIB},
], ids=str)
def test_everything_is_there_or_the_refusal_names_what_works(folder: Path, settings: dict[str, Any]) -> None:
    plan = make_plan(folder)
    wanted = [log_on_disk(plan, number) for number in range(len(plan.topics))]
    assert sum(map(len, wanted)) == 180
    config = config_of(**settings)
    asked = settings_asked_for(config, plan)
    if asked:
        with pytest.raises(RecoveryError):
            recover(config, folder)
        # With all others as they were chosen, and as they follow from what is given now.
        assert recover(config_of(**{**settings, **asked}), folder) == wanted
    assert recover(msgspec.structs.replace(config, **asked), folder) == wanted


def test_what_the_same_settings_held_they_hold_again(tmp_path: Path) -> None:
    """A region that is full is recovered into one of its size; only the oldest part may go, and only if it may."""
    for retention in (0, -1):
        folder = tmp_path / f"{retention}"
        config = config_of(brokers=2, region_bytes=2 * MIB, message_bytes_max=8 * KIB, batch_bytes_max=8 * KIB,
                           attach_slot_count=0)
        numbers = {key: layout_of(config).numbers[key] for key in (*WRITTEN, "cursor_count_max", "group_count_max",
                                                                  "attach_slot_count", "ring_slot_count")}
        cluster = ManualCluster(brokers=2, folder=folder, limits=True, **numbers)
        session = cluster.open_session(cluster.create(replication_factor=2, retention_bytes=retention))
        for sequence in range(600):
            if cluster.publish(session, sequence, [bytes(6000)], broker=sequence % 2) and retention:
                break
            cluster.settle()
        end = cluster.reader(session.topic).frontiers()["committed_position"]
        for broker in cluster.brokers:
            assert broker.replication is not None
            broker.replication.close()
        plan = make_plan(folder)
        assert plan.limits == limits_of(cluster.layout.numbers)
        check_limits(config, plan)
        region = create_region(config, prepare=lambda created, plan=plan: restore(created, plan, LEASE_NS) and None)
        try:
            (topic,) = plan.topics
            assert topic.end_position == end
            assert {each.reason for each in topic.lost} <= ({"no room"} if retention == 0 else set())
            found = log_of(region, 0)
            assert sorted(found) == [each.record.position for each in topic.batches]
            assert len(found) > 100
        finally:
            region.unlink()
            region.close()


@pytest.mark.parametrize("settings", [{"segment_bytes": 16 * KIB}, {"brokers": 3}, {"segment_bytes": 8 * KIB, "pool": "leader"}],
                         ids=str)
def test_an_index_that_is_nearly_full_asks_for_a_larger_one_where_nothing_may_be_dropped(
        tmp_path: Path, settings: dict[str, Any]) -> None:
    """Segments that are larger, or more brokers, hold less of a log in as many bytes: no size of a region helps then."""
    folder = tmp_path / "data"
    numbers = {"region_bytes": 2 * MIB, "segment_bytes": 4 * KIB, "order_entry_count": 64, "topic_count_max": 2,
               "message_bytes_max": 8 * KIB, "batch_bytes_max": 8 * KIB, "session_count_max": 32}
    cluster = ManualCluster(brokers=2, folder=folder, limits=True, **numbers)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(56):
        cluster.publish(session, sequence, [b"x"], broker=sequence % 2)
        cluster.settle()
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    plan = make_plan(folder)
    assert len(plan.topics[0].batches) > 48
    config = config_of(**{"brokers": 2, "pool": "atomic", "group_count_max": GROUPS, **numbers, **settings})
    asked = settings_asked_for(config, plan)
    assert asked == {"order_entry_count": 128}
    check_limits(msgspec.structs.replace(config, **asked), plan)


def test_what_changes_while_it_is_copied_is_noticed(folder: Path) -> None:
    plan = make_plan(folder)
    path = plan.topics[0].batches[0].path
    data = path.read_bytes()
    path.write_bytes(data[:plan.topics[0].batches[0].record.payload_offset] + b"!!!!" + data[
        plan.topics[0].batches[0].record.payload_offset + 4:])
    with pytest.raises(RecoveryError, match="changed while it was read"):
        create_region(config_of(), prepare=lambda created: restore(created, plan, LEASE_NS) and None)
    path.write_bytes(data)
    assert not (folder / "recoveries").exists()


def test_sessions_go_on_where_the_plan_says_and_topics_share_the_slots(folder: Path) -> None:
    plan = make_plan(folder)
    for topic in plan.topics:
        topic.sessions = [RecoveredSession(100 * int(topic.name[1:]) + number, 3, 40, 7, 100 - number, 1 << 44 | 1 << 250)
                          for number in range(20)]
    region = create_region(config_of(), prepare=lambda created: restore(created, plan, LEASE_NS) and None)
    try:
        memory, place, found = region.memory(), region.layout.offset_of, {}
        for slot in range(region.layout.numbers["session_count_max"]):
            line = unpack("SessionLine", memory.read_line_bytes(place("session", slot)))
            if not line["state"]:
                continue
            progress = unpack("SessionProgressLine", memory.read_line_bytes(place("session_progress", slot)))
            window = unpack("SessionWindowLine", memory.read_line_bytes(place("session_window", slot)))
            assert (progress["expected"], window["base"], window["generation"]) == (40, 40, line["state"] >> 8)
            assert list(window["in_log"]) == [1 << 44, 0, 0, 1 << 250 - 192]
            found[line["client_id"]] = line["topic"] & 0xFFFF
        half = region.layout.numbers["session_count_max"] // 2
        assert len(found) == half
        assert {topic: sum(1 for each in found.values() if each == topic) for topic in range(6)} == {
            topic: half // 6 + (topic < half % 6) for topic in range(6)}
        assert all(client % 100 < -(-half // 6) for client in found), "the latest of each"
    finally:
        region.unlink()
        region.close()
