"""Real clusters over data directories: other settings, deletions that a broker missed, and starts over old data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.admin import Admin
from client.cluster import Cluster
from client.errors import CxlmqError, DataDirectoryUsed, RecoveryError
from client.publisher import Publisher
from client.subscriber import Subscriber
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, numbered, read_topic


def cluster_over(folder: Path, recover: bool = False, fresh: bool = False, **settings: Any) -> Cluster:
    config = small_config(**{"brokers": 2, "data_directory": str(folder), "waiting": "saver", **settings})
    return Cluster(config, recover=folder if recover else None, fresh=fresh)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_smaller_region_is_refused_and_what_the_refusal_names_works(tmp_path: Path) -> None:
    messages = [bytes([number]) * 3_800_000 for number in range(5)]
    with cluster_over(tmp_path, region_bytes="256MiB") as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)
        with Publisher("t", cluster=cluster.name) as publisher:
            assert {publisher.publish(each).result().level for each in messages} == {2}
    before = contents(tmp_path)
    smaller = cluster_over(tmp_path, recover=True, region_bytes="48MiB")
    with pytest.raises(RecoveryError, match="message_bytes_max = 3800000") as refused:
        smaller.start()
    assert contents(tmp_path) == before
    assert traces(smaller.name) == []
    for _ in range(2):                          # also when it is done again
        with cluster_over(tmp_path, recover=True, **{"region_bytes": "48MiB", **refused.value.settings}) as cluster:
            assert cluster.recovery is not None
            assert [each["lost"] for each in cluster.recovery["topics"]] == [[]]
            assert [bytes(each) for each in read_topic(cluster.name, "t")] == messages
    with cluster_over(tmp_path, recover=True, region_bytes="256MiB") as cluster:
        assert [bytes(each) for each in read_topic(cluster.name, "t")] == messages


@pytest.mark.parametrize(("setting", "value"), [("topic_count_max", 2), ("group_count_max", 1)])
def test_tables_that_are_too_small_are_refused_by_name(tmp_path: Path, setting: str, value: int) -> None:
    with cluster_over(tmp_path) as cluster, Admin(cluster=cluster.name) as admin:
        for name in ("a", "b", "c"):
            admin.create_topic(name, ack=2, replication_factor=2)
            with Publisher(name, cluster=cluster.name) as publisher:
                publisher.publish(b"message").result()
            with Subscriber(name, cluster=cluster.name, group="g") as subscriber:
                subscriber.fetch(1, 5.0)
                subscriber.commit()
    before = contents(tmp_path)
    with pytest.raises(RecoveryError, match=f"{setting} is {value}. Start it with {setting} = 3"):
        cluster_over(tmp_path, recover=True, **{setting: value}).start()
    assert contents(tmp_path) == before
    with cluster_over(tmp_path, recover=True, **{setting: 3}) as cluster, Admin(cluster=cluster.name) as admin:
        assert sorted((each["topic"], each["position"]) for each in admin.list_groups()) == [
            ("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "stays away"])
def test_what_was_deleted_while_a_broker_was_away_stays_deleted(tmp_path: Path, comes_back: bool) -> None:
    def files_of(name: str) -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(f"{name}*")
                      if path.suffix != ".deleted")

    with cluster_over(tmp_path, restart=comes_back) as cluster, Admin(cluster=cluster.name) as admin:
        for name in ("kept", "gone"):
            admin.create_topic(name, ack=2, replication_factor=2)
            with Publisher(name, cluster=cluster.name) as publisher:
                publisher.publish_many(numbered(100, 50)).result()
            for group in ("g", "h"):
                with Subscriber(name, cluster=cluster.name, group=group) as subscriber:
                    subscriber.fetch(90, 5.0)
                    subscriber.commit()
        assert eventually(lambda: len([each for each in files_of("kept") if each.endswith(".group")]) == 4)
        first = cluster.processes[1]
        cluster.kill(1)
        admin.delete_group("kept", "g")
        admin.delete_topic("gone")
        if comes_back:
            assert eventually(lambda: cluster.processes.get(1, first) != first)
            assert eventually(lambda: files_of("gone") == []), files_of("gone")
    with cluster_over(tmp_path, recover=True) as cluster, Admin(cluster=cluster.name) as admin:
        assert [each["name"] for each in admin.list_topics()] == ["kept"]
        assert [(each["group"], each["position"]) for each in admin.list_groups()] == [("h", 90)]
        assert eventually(lambda: files_of("gone") == []), files_of("gone")
        admin.create_topic("gone", ack=2, replication_factor=2)         # and a new one of that name is another
        with Publisher("gone", cluster=cluster.name) as publisher:
            assert publisher.publish(b"new").result().position == 0
    with cluster_over(tmp_path, recover=True) as cluster:
        assert read_topic(cluster.name, "gone") == [b"new"]


def test_nobody_begins_over_old_data_but_with_fresh(tmp_path: Path) -> None:
    with cluster_over(tmp_path) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)
        with Publisher("t", cluster=cluster.name) as publisher:
            publisher.publish(b"old").result()
    refused = cluster_over(tmp_path)
    with pytest.raises(DataDirectoryUsed, match=r"--recover .* or with --fresh"):
        refused.start()
    assert traces(refused.name) == []
    with pytest.raises(CxlmqError, match="either recovers"):
        cluster_over(tmp_path, recover=True, fresh=True).start()
    name = unique("fresh")
    started = subprocess.run(
        [sys.executable, "-m", "client.cli.main", "cluster", "up", "-d", "--name", name, "--region-bytes", "64MiB",
         "--brokers", "2", "--fresh", "--json"], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "CXLMQ_DATA_DIRECTORY": str(tmp_path)})
    assert started.returncode == 0, started.stderr
    try:
        (note,) = json.loads(started.stdout)["notes"]
        with Admin(cluster=name) as admin:
            assert admin.list_topics() == []
            admin.create_topic("t", ack=2, replication_factor=2)
            with Publisher("t", cluster=name) as publisher:
                publisher.publish(b"new").result()
    finally:
        assert subprocess.run([sys.executable, "-m", "client.cli.main", "cluster", "down", name], check=False,
                              capture_output=True, timeout=60).returncode == 0
    with cluster_over(tmp_path, recover=True) as cluster:
        assert read_topic(cluster.name, "t") == [b"new"]
    (aside,) = (tmp_path / "set-aside").iterdir()
    assert f"--recover {aside}" in note
    with cluster_over(aside, recover=True) as cluster:
        assert read_topic(cluster.name, "t") == [b"old"]
