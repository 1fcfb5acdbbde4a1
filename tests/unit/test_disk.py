"""What puts bytes on a disk does so in the right order, and believes no call that failed: seen from behind the calls."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.disk import watch
from broker.durable_files import read_durable, write_durable
from broker.layout import ResultStatus
from tests.manual_cluster import ManualCluster


class Disk:
    """Notes what is written and synced; fails when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.write_error = self.sync_error = 0

    def wrote(self, descriptor: int, offset: int, nbytes: int) -> int:
        self.calls.append(("write", self._name(descriptor)))
        return -self.write_error if self.write_error else nbytes

    def synced(self, descriptor: int) -> int:
        self.calls.append(("sync", self._name(descriptor)))
        return self.sync_error

    @staticmethod
    def _name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


@pytest.fixture
def disk() -> Iterator[Disk]:
    found = Disk()
    watch(found)
    yield found
    watch(None)


def test_a_file_is_synced_before_its_name_and_its_name_after(disk: Disk, tmp_path: Path) -> None:
    write_durable(tmp_path / "x.group", "group", {"position": 1})
    assert disk.calls == [("write", ".x.group.new"), ("sync", ".x.group.new"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("call", ["write_error", "sync_error"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_call_that_fails_leaves_the_old_file(disk: Disk, tmp_path: Path, call: str, number: int) -> None:
    write_durable(tmp_path / "x.group", "group", {"position": 1})
    setattr(disk, call, number)
    with pytest.raises(OSError, match=r"x\.group") as refused:
        write_durable(tmp_path / "x.group", "group", {"position": 2})
    assert refused.value.errno == number
    assert [each.name for each in tmp_path.iterdir()] == ["x.group"]
    assert read_durable(tmp_path / "x.group", "group").values == {"position": 1}


@pytest.mark.parametrize("call", ["write_error", "sync_error"])
def test_a_replica_whose_disk_fails_gives_no_ack_of_level_2(disk: Disk, tmp_path: Path, call: str) -> None:
    cluster = ManualCluster(folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2, ack=2), ack=2)
    cluster.publish_all(session, [0])
    assert [each.status for each in cluster.take_acks(session)] == [ResultStatus.RESULT_COMMITTED]
    setattr(disk, call, errno.EIO)
    cluster.publish_all(session, [1])
    assert [each.status for each in cluster.take_acks(session)] == [ResultStatus.RESULT_UNDURABLE]
