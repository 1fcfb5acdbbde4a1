"""A running cluster for each module that wants one, and names that nobody else has."""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import ClusterConfig, load_config
from broker.errors import UnknownTopic
from client.admin import Admin
from client.cluster import Cluster

SHARED = Path("/dev/shm")


def unique(prefix: str) -> str:
    """A name that no other test, run or user has."""
    return f"{prefix}-{os.getpid()}-{os.urandom(3).hex()}"


def small_config(**settings: object) -> ClusterConfig:
    """A cluster that starts fast: 64 MiB, a name of its own."""
    return load_config(environment={}, **{"name": unique("test"), "region_bytes": "64MiB", **settings})


def traces(name: str) -> list[str]:
    """What is left of a cluster: shared memory, semaphores, its folder, its processes."""
    folder = load_config(environment={}, name=name).folder
    left = [str(each) for each in (*SHARED.glob(f"*cxlmq-{name}*"), folder) if each.exists()]
    gc.collect()                        # mappings of closed clients that only a reference cycle keeps
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                maps = (process / "maps").read_text()
            except OSError:
                continue
            if f"cxlmq-{name}\n" in maps or f"cxlmq-{name} (deleted)" in maps:
                left.append(f"process {process.name}")
    return left


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four brokers with a 64 MiB region."""
    with Cluster(small_config(brokers=4)) as running:
        yield running
    assert traces(running.name) == []


@pytest.fixture
def topic(cluster: Cluster) -> Iterator[str]:
    """A name for a new topic of the cluster; if the test creates it, it is deleted again."""
    name = unique("topic")
    yield name
    with Admin(cluster=cluster.name) as admin, contextlib.suppress(UnknownTopic):
        admin.delete_topic(name)


@pytest.fixture
def runtime_folder() -> Iterator[Path]:
    """A runtime directory with a path short enough for unix sockets."""
    folder = Path("/tmp") / unique("cx")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
