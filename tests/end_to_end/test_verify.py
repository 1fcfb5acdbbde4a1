"""`cxlmq region verify` and `inspect`: each damaged record of a dead region is named, a sound one has no finding, a live one
stays usable whatever is flipped in it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.inspection import layout_of_head, with_head_bank
from broker.layout import RECORDS
from broker.records import pack, record_bytes, unpack
from broker.region import attach_region, layout_from, read_superblock
from broker.verify import Finding, verify_region
from client.admin import Admin
from client.cluster import Cluster
from client.errors import CxlmqError
from client.publisher import Publisher
from client.subscriber import Subscriber
from sim.cxl.memory import MappedMemory
from sim.cxl.region import map_path
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import numbered, read_topic

SHARED = Path("/dev/shm")


def cxlmq(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "client.cli.main", *arguments], capture_output=True, text=True,
                          timeout=60, check=False)


def kill_brokers(cluster: Cluster) -> None:
    for process in cluster.processes.values():
        os.kill(process, signal.SIGKILL)
    for child in cluster._children.values():
        child.wait()


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A region whose brokers were killed in the middle of their work, and their data directory."""
    folder = tmp_path_factory.mktemp("dead")
    cluster = Cluster(small_config(brokers=3, restart=False, data_directory=str(folder / "data"))).start()
    try:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log", ack=2, replication_factor=2)
            admin.create_topic("other")
        with Publisher("log", cluster=cluster.name, batch_bytes=2048) as publisher, Subscriber(
                "log", cluster=cluster.name) as subscriber:
            publisher.publish_many(numbered(400, 200)).result()
            assert subscriber.fetch(1, timeout=10.0)
            time.sleep(1.2)
            kill_brokers(cluster)
        said = {"inspect": cxlmq("region", "inspect", cluster.name, "--json"),
                "verify": cxlmq("region", "verify", cluster.name, "--replicas", str(folder / "data"), "--json")}
        shutil.copy(SHARED / f"cxlmq-{cluster.name}", folder / "region")
        yield {"folder": folder, "region": folder / "region", "said": said}
    finally:
        cluster.stop()


def verified(path: Path) -> list[Finding]:
    mapping = map_path(path)
    try:
        return verify_region(mapping, str(path), live=False)
    finally:
        del mapping


def test_a_sound_dead_region_has_no_finding_and_shows_its_counters(dead: dict[str, Any]) -> None:
    inspected, verify = dead["said"]["inspect"], dead["said"]["verify"]
    assert inspected.returncode == 0, inspected.stderr
    values = json.loads(inspected.stdout)
    assert values["statistics"]["sequencer"]["messages_ordered"] == 400
    assert [each["broker"] for each in values["brokers"] if each["alive"]] == [], values["brokers"]
    assert verify.stdout, verify.stderr
    assert (verify.returncode, json.loads(verify.stdout)) == (0, {"damaged": False, "findings": []}), verify.stdout


# (place, index, record, field, change): what a stray store or a flipped bit may do; the finding names record and field.
DAMAGES: list[tuple[str, tuple[int, ...], str, str, Any]] = [
    ("superblock", (), "Superblock", "magic", 1), ("superblock", (), "Superblock", "version", 99),
    ("superblock", (), "Superblock", "layout_hash", 5), ("superblock", (), "Superblock", "segment_bytes", 12345),
    ("superblock", (), "Superblock", "region_bytes", 1 << 20), ("superblock", (), "Superblock", "ready", 0),
    ("broker", (1,), "BrokerLine", "state", 77), ("broker", (1,), "BrokerLine", "pid", 1 << 50),
    ("topic", (0,), "TopicLine", "order", 3), ("topic", (0,), "TopicLine", "replication_factor", 9),
    ("topic", (0,), "TopicLine", "ack", 7), ("topic", (0,), "TopicLine", "message_bytes_max", 1),
    ("topic_name", (0,), "TopicName", "text", b"\x01\x02"), ("topic_order", (0,), "TopicOrderLine", "committed_index", 1 << 40),
    ("topic_order", (0,), "TopicOrderLine", "committed_position", 399),
    ("topic_reclaim", (0,), "TopicOrderLine", "committed_index", {"reclaimed_index": 1 << 20}),
    ("offset_broker", (0, 1), "OffsetBrokerLine", "delegated", 1 << 33),
    ("offset_broker", (0, 1), "OffsetBrokerLine", "generation", 999),
    ("offset_sequencer", (0, 1), "OffsetSequencerLine", "scanned", 1 << 33),
    ("order_entry", (0, 5), "OrderEntry", "commit", 6), ("order_entry", (0, 5), "OrderEntry", "position", 1),
    ("order_entry", (0, 5), "OrderEntry", "payload_offset", 64), ("order_entry", (0, 5), "OrderEntry", "payload_bytes", 1 << 31),
    ("order_entry", (0, 5), "OrderEntry", "payload", {"message_count": 1}), ("order_entry", (0, 5), "OrderEntry", "broker", 40),
    ("session", (0,), "SessionLine", "state", 1 << 8 | 99), ("session", (0,), "SessionLine", "topic", 0xFFFF),
    ("session_progress", (0,), "SessionProgressLine", "held", 1 << 20),
    ("segment_line", (None,), "SegmentLine", "owner", 0xFFFF),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("place", "index", "record", "field", "value"), DAMAGES,
                         ids=[f"{each[2]}.{each[3]}" for each in DAMAGES])
def test_each_damaged_record_is_named(dead: dict[str, Any], tmp_path: Path, place: str, index: tuple[int, ...], record: str,
                                      field: str, value: Any) -> None:
    path = shutil.copy(dead["region"], tmp_path / "region")
    mapping = map_path(path)
    layout = with_head_bank(MappedMemory(mapping), layout_from(read_superblock(mapping)))
    data = bytes(mapping)
    del mapping
    own = {"topic_reclaim": "TopicReclaimLine"}.get(place, record)
    if place == "segment_line":
        index = (next(s for s in range(layout.numbers["segment_count"])
                      if data[layout.offset_of("segment_line", s)]),)
    if place.startswith("session"):
        index = (next(s for s in range(layout.numbers["session_count_max"]) if data[layout.offset_of("session", s)]),)
    at = layout.offset_of(place, *index)
    line = unpack(own, data[at:at + record_bytes(own)])
    line.update(value if isinstance(value, dict) else {field: value})
    with open(path, "r+b") as out:
        out.seek(at)
        out.write(pack(own, **line))
    found = verified(path)
    assert (record, field) in {(each.record, each.field) for each in found} or (place, field) == (
        "superblock", "segment_bytes"), found
    assert found
    if place == "order_entry":
        (each,) = (each for each in found if each.record == "OrderEntry")
        assert each.topic == "log"
        assert each.first_position is not None and each.end_position is not None
        assert each.first_position < each.end_position <= 400
    said = cxlmq("region", "verify", str(path))
    assert said.returncode == 1, said.stdout
    assert found[0].record in said.stdout


def test_a_torn_payload_and_a_zeroed_page_are_named_with_their_messages(dead: dict[str, Any], tmp_path: Path) -> None:
    path = shutil.copy(dead["region"], tmp_path / "region")
    mapping = map_path(path)
    layout = with_head_bank(MappedMemory(mapping), layout_from(read_superblock(mapping)))
    entry = unpack("OrderEntry", mapping[layout.offset_of("order_entry", 0, 3):][:64])
    del mapping
    with open(path, "r+b") as out:
        out.seek(entry["payload_offset"])
        out.write(bytes(200))
    found = [each for each in verified(path) if each.record == "OrderEntry"]
    assert found
    assert (found[0].topic, found[0].first_position) == ("log", entry["position"])


def test_a_truncated_region_is_refused_with_a_typed_error(dead: dict[str, Any], tmp_path: Path) -> None:
    for nbytes in (0, 100, 4096, 1 << 20):
        path = shutil.copy(dead["region"], SHARED / f"cxlmq-cut-{os.getpid()}")
        try:
            os.truncate(path, nbytes)
            verify = cxlmq("region", "verify", f"cut-{os.getpid()}")
            assert verify.returncode != 0, verify.stdout + verify.stderr
            assert "truncated" in verify.stdout or "empty" in verify.stderr
            inspect = cxlmq("region", "inspect", f"cut-{os.getpid()}")
            assert inspect.returncode != 0
            assert "Traceback" not in inspect.stderr + verify.stderr
            assert "region" in inspect.stderr
        finally:
            os.unlink(path)


def test_damaged_replicas_are_named_and_kept(dead: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dead["folder"] / "data", folder)
    files = sorted(folder.rglob("*.replica"), key=lambda path: -path.stat().st_size)
    random_ = random.Random(5)
    for path in files[:2]:
        with open(path, "r+b") as out:
            out.seek(random_.randrange(5000, path.stat().st_size - 500))
            out.write(bytes(300))
    before = {path: path.read_bytes() for path in files}
    said = cxlmq("region", "verify", "--replicas", str(folder), "--json")
    assert said.returncode == 1
    found = json.loads(said.stdout)["findings"]
    assert {each["where"] for each in found if each["record"] == "ReplicaRecord"} == {str(path) for path in files[:2]}
    assert all(each["topic"] == "log" and each["broker"] is not None and each["first_position"] is not None
               for each in found if each["record"] == "ReplicaRecord")
    assert any(each["record"] == "log" for each in found), "with one replica the messages are gone, and named"
    assert {path: path.read_bytes() for path in files} == before


# ---- live ----------------------------------------------------------------------------------------------------------


def test_a_live_region_under_load_has_no_finding(cluster: Cluster, topic: str) -> None:
    stop = threading.Event()
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)

    def publish() -> None:
        with Publisher(topic, cluster=cluster.name, batch_bytes=4096) as publisher:
            while not stop.is_set():
                publisher.publish_many(numbered(100, 100)).result()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        for _ in range(3):
            said = cxlmq("region", "verify", cluster.name)
            assert (said.returncode, said.stdout.strip()) == (0, "nothing is damaged"), said.stdout
    finally:
        stop.set()
        thread.join()


FUZZED = {"topic_order": "TopicOrderLine", "order_entry": "OrderEntry", "ring": "BatchHeader", "result": "BatchResult",
          "offset_broker": "OffsetBrokerLine", "offset_sequencer": "OffsetSequencerLine", "replica": "ReplicaLine",
          "topic_reclaim": "TopicReclaimLine", "session_progress": "SessionProgressLine", "session": "SessionLine",
          "cursor": "CursorLine", "segment_line": "SegmentLine", "broker": "BrokerLine", "directory": "DirectoryLine"}


def test_flipped_bits_in_a_live_region_crash_no_broker_no_reader_and_no_tool() -> None:
    cluster = Cluster(small_config(brokers=2, restart=False, session_lease_seconds=2.0)).start()
    random_ = random.Random("live")
    bits = {"B": 8, "H": 16, "I": 32, "Q": 64, "c": 8, "s": 8}
    try:
        with attach_region(cluster.name) as region:
            memory, layout = region.memory(), layout_of_head(region)
            for number, (place, record) in enumerate(list(FUZZED.items()) * 2):
                name = f"fuzz-{number}"
                try:
                    with Admin(cluster=cluster.name) as admin:
                        topic = admin.create_topic(name, replication_factor=2)["number"]
                    with Publisher(name, cluster=cluster.name, delivery_timeout=2.0, batch_bytes=512,
                                   transport="grpc") as publisher:
                        publisher.publish_many(numbered(30)).result()
                        index = {"order_entry": (topic, random_.randrange(8)), "ring": (topic, 0, random_.randrange(8)),
                                 "result": (topic, 0, random_.randrange(8)), "replica": (topic, 0, 1),
                                 "offset_broker": (topic, 0), "offset_sequencer": (topic, 0), "session": (0,),
                                 "session_progress": (0,), "cursor": (0,), "segment_line": (random_.randrange(20),),
                                 "broker": (1,), "directory": ()}.get(place, (topic,))
                        field, letter, count, offset = random_.choice(RECORDS[record])
                        bit = random_.randrange(bits[letter] * count)
                        at = layout.offset_of(place, *index) + offset
                        word, shift = (at + bit // 8) // 8 * 8, ((at + bit // 8) % 8) * 8 + bit % 8
                        memory.store_word(word, memory.load_word(word) ^ (1 << shift))
                        publisher.publish_many(numbered(5)).exception(3.0)
                    read_topic(cluster.name, name)
                except (CxlmqError, TimeoutError):
                    pass                        # typed, or bounded: either is allowed
                for tool in ("inspect", "verify"):
                    said = cxlmq("region", tool, cluster.name)
                    assert "Traceback" not in said.stderr, f"{place}.{field}: {said.stderr}"
                assert len(cluster.processes) == 2, f"{place}.{field} bit {bit}: {cluster.exit_codes}"
    finally:
        cluster.stop()


def test_a_region_that_is_unlinked_while_live_is_missed_by_tools_and_serves_on() -> None:
    cluster = Cluster(small_config(brokers=2)).start()
    try:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("log")
        with Publisher("log", cluster=cluster.name, transport="grpc") as publisher:
            publisher.publish(b"before").result()
            (SHARED / f"cxlmq-{cluster.name}").unlink()
            assert publisher.publish(b"after").result().position == 1
            said = cxlmq("region", "inspect", cluster.name)
            assert said.returncode != 0
            assert "there is no region" in said.stderr
    finally:
        cluster.stop()
