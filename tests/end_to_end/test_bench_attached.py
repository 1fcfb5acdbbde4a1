"""`cxlmq bench publish|subscribe|copies`: what they measure is verified, stands beside its limit, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from broker.errors import CxlmqError
from client import Publisher
from client.admin import Admin
from client.bench.attached import Loop, _crossover
from client.bench.report import plot_costs
from client.bench.workload import TOPIC
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config

SHARED = Path("/dev/shm")
SMALL = ("--brokers", "2", "--region-bytes", "128MiB", "--runs", "1")


def measured(*arguments: str) -> Any:
    """What a command of `cxlmq bench` measures."""
    said = subprocess.run([sys.executable, "-m", "client.cli.main", "bench", *arguments, "--json", "-"],
                          capture_output=True, text=True, timeout=110, check=False)
    assert said.returncode == 0, said.stderr
    assert not list(SHARED.glob("*cxlmq-bench-*"))
    return json.loads(said.stdout)


def test_every_call_is_measured_beside_a_copy_and_compared_with_what_was_published() -> None:
    found = measured("publish", *SMALL, "--message-bytes", "4KiB")
    assert {row["call"] for row in found["rows"]} == {"publish", "publish_many", "publish_array"}
    for row in found["rows"]:
        assert row["messages_per_second"] * row["nanoseconds_per_message"] == pytest.approx(1e9)
        assert row["verified_bytes"] > 0
        assert 0 < row["of_nontemporal"] < 2


def test_a_subscriber_that_follows_and_one_alone_are_measured() -> None:
    found = measured("subscribe", *SMALL, "--total-bytes", "256MiB", "--batch-bytes", "256KiB")
    assert found["following"]["ratio"] > 0
    assert found["alone"]["ratio"] > 0


def test_every_copy_this_processor_has_is_measured_and_the_chosen_one_is_among_them() -> None:
    found = measured("copies", "--runs", "1")
    for row in found["rows"]:
        assert found["chosen"] in row["gigabytes_per_second"]
        assert 0 < row["chosen_of_best"] <= 1


def test_a_message_that_is_not_what_was_published_fails_the_measurement() -> None:
    with Cluster(small_config(brokers=2)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic(TOPIC)
        with Loop(cluster.name, "attached", 1 << 16) as loop:
            loop.run("publish", loop.count)
            assert loop.verify() == loop.count << 16
            with Publisher(TOPIC, cluster=cluster.name) as other:
                other.publish(numpy.zeros(1 << 16, numpy.uint8)).result()
            loop.published += 1
            with pytest.raises(CxlmqError, match="not what was published"):
                loop.verify()


def test_costs_are_drawn_with_the_size_from_which_copying_is_most_of_it(tmp_path: Path) -> None:
    rows = [{"call": "publish", "message_bytes": size, "nanoseconds_per_message": 100 + size / 20,
             "of_nontemporal": (size / 20) / (100 + size / 20)} for size in (64, 1024, 4096, 1 << 20)]
    assert _crossover(rows) == 4096
    assert _crossover(rows[:2]) is None
    found = {"rows": rows, "nontemporal_gigabytes_per_second": 20.0, "crossovers": {"publish": _crossover(rows)}}
    assert plot_costs(tmp_path / "costs.png", found)
    assert (tmp_path / "costs.png").stat().st_size > 10_000
