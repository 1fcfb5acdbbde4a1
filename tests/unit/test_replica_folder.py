"""A replica file is removed only with a proof: what it held is reclaimed, or its topic was deleted, also while its broker
was away."""

import os
from pathlib import Path

import pytest

from broker.config import load_config
from broker.data_directory import lock_broker_folder, refuse_half_moved, refuse_used, set_aside, topics_in
from broker.errors import DataDirectoryBusy, DataDirectoryUsed, RecoveryError
from broker.group_files import GroupFiles, GroupRecord, read_group_files
from broker.recovery import make_plan
from broker.replica_files import SESSIONS_SUFFIX, Record, find_files, read_records
from broker.replica_folder import ReplicaFolder
from broker.topics import TopicEntry
from tests.manual_cluster import KIB, ManualCluster, Session


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Session]:
    """Two brokers' replicas: several files each, with 60 batches of one message."""
    cluster = ManualCluster(brokers=2, folder=tmp_path, replica_file_bytes=8 * KIB, order_entry_count=256)
    session = cluster.open_session(cluster.create(replication_factor=2))
    cluster.publish_all(session, range(60))
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    return tmp_path, session


def folder_of(root: Path, broker: int, entry: TopicEntry, run_id: int = 1, catalogue: bool = False) -> ReplicaFolder:
    return ReplicaFolder(root / f"broker-{broker}", broker, run_id, "manual", 2, lambda *_: entry, catalogue=catalogue)


def batches_in(root: Path) -> set[int]:
    return {each.position for file in find_files(root) for each in read_records(file)
            if isinstance(each, Record) and each.end > each.position}


@pytest.mark.parametrize("begins_at", [0, 10, 60])
def test_what_is_not_reclaimed_stays_wherever_the_next_file_begins(
        written: tuple[Path, Session], begins_at: int) -> None:
    """A new file that begins in the middle of an old one, or before it, replaces nothing yet."""
    root, session = written
    files = folder_of(root, 1, session.topic)
    for reclaimed in (0, 10, 25, 40):
        files.create(session.topic.number, session.topic.generation, 0, begins_at, reclaimed)
        assert set(range(reclaimed, 60)) <= batches_in(root), f"reclaimed up to {reclaimed}"
    files.create(session.topic.number, session.topic.generation, 0, 60, 60)
    assert batches_in(root) == set()
    (path,) = root.rglob("*" + SESSIONS_SUFFIX)
    assert path.parent.name == "broker-1"


def test_files_of_a_source_that_went_elsewhere_go_when_they_are_reclaimed(written: tuple[Path, Session]) -> None:
    root, session = written
    files = folder_of(root, 1, session.topic)
    files.create(session.topic.number, session.topic.generation, 1, 60, 60)     # of another source, of a later run
    assert batches_in(root) == set()


def test_what_lies_below_the_reclaimed_position_goes_without_a_next_file(written: tuple[Path, Session]) -> None:
    """Where a broker is no replica any more, nobody begins one."""
    root, session = written
    identity = f"{session.topic.name}.{session.topic.created_ns:x}"
    files = folder_of(root, 1, session.topic)
    files.trim({identity: 45})
    assert set(range(45, 60)) <= batches_in(root) < set(range(60))
    files.trim({identity: 60, "other.1": 60})
    assert batches_in(root) == set()


def test_what_cannot_be_written_down_is_not_removed(written: tuple[Path, Session]) -> None:
    root, session = written
    (root / "broker-1" / f"{session.topic.name}.{session.topic.created_ns:x}{SESSIONS_SUFFIX}").mkdir()
    folder_of(root, 1, session.topic).create(session.topic.number, session.topic.generation, 0, 60, 60)
    assert batches_in(root) == set(range(60)), "whose they were is not on the disk"


def test_a_damaged_file_is_never_trimmed(written: tuple[Path, Session]) -> None:
    root, session = written
    path = find_files(root)[0].path
    data = bytearray(path.read_bytes())
    data[100] ^= 1                              # in its superblock: nobody knows what it is
    path.write_bytes(data)
    folder_of(root, 1, session.topic).create(session.topic.number, session.topic.generation, 0, 60, 60)
    assert path.exists()


# ---- topics that were deleted ----------------------------------------------------------------------------------------


def entry(name: str, created_ns: int) -> TopicEntry:
    return TopicEntry(1, 1, name, 5, 1, 1, 0, created_ns)


@pytest.mark.parametrize("told", [True, False], ids=["another broker wrote it down", "it was there in this run"])
def test_what_was_deleted_while_a_broker_was_away_is_forgotten(
        written: tuple[Path, Session], told: bool) -> None:
    root, session = written
    kept, topic = entry("kept", 5), session.topic
    for each in (kept, topic):
        folder_of(root, 1, each, run_id=1, catalogue=True).topic_appeared(1, 1)
    GroupFiles(root / "broker-1", 1).store(GroupRecord(
        topic=topic.name, created_ns=topic.created_ns, group="g", version=1, position=0, protected=False,
        committed_wall_ns=0))
    if told:
        folder_of(root, 0, topic, run_id=2, catalogue=True).say_deleted(topic.name, topic.created_ns)
    back = folder_of(root, 1, topic, run_id=2 if told else 1, catalogue=True)
    back.compare(back.found(), [kept])
    assert {path.name for path in (root / "broker-1").iterdir()} == {
        "kept.5.topic", f"{topic.name}.{topic.created_ns:x}.deleted"}


def test_that_a_topic_is_not_there_proves_nothing(written: tuple[Path, Session]) -> None:
    """One that was not recovered, of an earlier run."""
    root, session = written
    back = folder_of(root, 1, session.topic, run_id=2, catalogue=True)
    back.compare(back.found(), [])
    assert batches_in(root) == set(range(60))


def test_a_topic_whose_name_begins_as_another_ones_files_do_keeps_its_own(tmp_path: Path) -> None:
    first, second = entry("a", 0x1F), entry("a.1f", 0x2C)
    for each in (first, second):
        folder = folder_of(tmp_path, 0, each, catalogue=True)
        folder.topic_appeared(1, 1)
        folder.create(1, 1, 0, 0, 0)
    deleting = folder_of(tmp_path, 0, first, catalogue=True)
    deleting.topic_appeared(1, 1)
    deleting.topic_deleted(1, 1)
    assert {path.name for path in (tmp_path / "broker-0").iterdir()} == {
        "a.1f.deleted", "a.1f.2c.topic", "a.1f.2c.1.s0.000000.replica"}


# ---- groups that were deleted ----------------------------------------------------------------------------------------


def group(**changed: object) -> GroupRecord:
    return GroupRecord(**{"topic": "t", "created_ns": 1, "group": "g", "version": 5, "position": 70, "protected": False,  # type: ignore[arg-type]
                          "committed_wall_ns": 9, **changed})


def left(root: Path) -> list[tuple[int, int]]:
    runs = {11: 0, 12: 1}
    records, damaged = read_group_files(sorted(root.glob("broker-*")), lambda run_id: runs[run_id])
    assert damaged == []
    return [(each.version, each.position) for each in records]


@pytest.mark.parametrize("version_away", [3, 5])
def test_a_deleted_group_stays_deleted_whatever_a_disk_has_that_was_away(tmp_path: Path, version_away: int) -> None:
    here, away = GroupFiles(tmp_path / "broker-0", 11), GroupFiles(tmp_path / "broker-1", 11)
    away.store(group(version=version_away))
    here.store(group())
    here.delete(group())
    assert left(tmp_path) == []
    back = GroupFiles(tmp_path / "broker-1", 11)
    back.load()
    back.keep([], back.stored(), {("t", 1)})
    assert left(tmp_path / "none") == left(tmp_path) == []
    for path in (tmp_path / "broker-0").iterdir():
        path.unlink()                           # and with the other disk alone
    assert left(tmp_path) == []


def test_a_group_that_is_made_again_counts_in_the_same_run_and_in_a_later_one(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path / "broker-0", 11)
    files.store(group())
    files.delete(group())
    files.store(group(version=6, position=1))
    assert left(tmp_path) == [(6, 1)]
    files.delete(group(version=6))
    GroupFiles(tmp_path / "broker-1", 12).store(group(version=2, position=3))       # versions begin anew with the memory
    assert left(tmp_path) == [(2, 3)]
    GroupFiles(tmp_path / "broker-1", 12).delete(group(version=2))
    assert left(tmp_path) == []


def test_a_group_is_deleted_when_its_broker_finds_that_it_is_gone(tmp_path: Path) -> None:
    GroupFiles(tmp_path / "broker-1", 11).store(group())
    back = GroupFiles(tmp_path / "broker-1", 11)
    back.load()
    assert list(back.stored().values()) == [5]
    back.keep([], back.stored(), {("t", 1)})
    assert left(tmp_path) == []
    later = GroupFiles(tmp_path / "broker-1", 12)
    later.load()
    assert later.stored() == {}


def test_one_of_an_earlier_run_is_not_taken_for_deleted(tmp_path: Path) -> None:
    GroupFiles(tmp_path / "broker-1", 11).store(group())
    back = GroupFiles(tmp_path / "broker-1", 12)
    back.load()
    back.keep([], back.stored(), {("t", 1)})
    assert left(tmp_path) == [(5, 70)]


# ---- a new cluster over an earlier one's data ------------------------------------------------------------------------


def test_nobody_begins_over_data_and_what_is_set_aside_is_whole(written: tuple[Path, Session]) -> None:
    root, session = written
    config = load_config(environment={}, name="x", data_directory=root)
    before = batches_in(root)
    with pytest.raises(DataDirectoryUsed, match=f"'{session.topic.name}'.*--recover {root}.*--fresh"):
        refuse_used(config)
    moved = set_aside(root)
    assert moved is not None
    refuse_used(config)
    assert (topics_in(root), topics_in(moved)) == ([], [session.topic.name])
    assert batches_in(moved) == before == {each.record.position for each in make_plan(moved).topics[0].batches}
    with pytest.raises(RecoveryError, match="neither replica files nor topics"):
        make_plan(root)
    assert set_aside(root) is None


def test_a_folder_that_a_living_broker_writes_into_is_nobody_elses(written: tuple[Path, Session]) -> None:
    root, _ = written
    held = lock_broker_folder(root / "broker-1")
    assert held is not None
    for taking in (lambda: set_aside(root), lambda: lock_broker_folder(root / "broker-1")):
        with pytest.raises(DataDirectoryBusy, match="stop it first"):
            taking()
    assert batches_in(root) == set(range(60))
    os.close(held)
    assert set_aside(root) is not None
    assert lock_broker_folder(root / "broker-1") is None, "a look makes nothing"
    assert sorted(path.name for path in root.iterdir()) == ["set-aside"]
    again = lock_broker_folder(root / "broker-1", make=True)
    assert again is not None
    os.close(again)


def test_a_move_that_was_interrupted_is_not_taken_for_all_there_is(
        written: tuple[Path, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = written
    before, real, moves = batches_in(root), Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        moves.append(path.name)
        if len(moves) == 2:
            raise OSError(5, "broken")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RecoveryError, match="--fresh again"):
        set_aside(root)
    monkeypatch.undo()
    with pytest.raises(DataDirectoryUsed):
        refuse_used(load_config(environment={}, name="x", data_directory=root))
    with pytest.raises(RecoveryError, match="interrupted --fresh"):
        refuse_half_moved(root)
    moved = set_aside(root)
    assert moved is not None
    refuse_half_moved(root)
    assert batches_in(moved) == before


def entry_of(name: str) -> TopicEntry:
    return TopicEntry(1, 3, name, 5, 2, 2, 0, 4711)


def test_a_topic_is_written_down_once_before_it_is_made(tmp_path: Path) -> None:
    files = folder_of(tmp_path, 0, entry_of("a"), catalogue=True)
    files.announce(entry_of("a"))
    (path,) = tmp_path.rglob("*.topic")
    before = path.stat()
    assert [each.name for each in make_plan(tmp_path).topics] == ["a"]
    files.topic_appeared(1, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    files.topic_appeared(1, 3)              # by a process that did not make it
    assert path.stat().st_ino != before.st_ino


def test_what_was_not_made_after_all_leaves_nothing(tmp_path: Path) -> None:
    files = folder_of(tmp_path, 0, entry_of("a"), catalogue=True)
    files.announce(entry_of("a"))
    files.retract(entry_of("a"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    files.retract(entry_of("b"))


def test_a_full_disk_refuses_an_announcement_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = folder_of(tmp_path, 0, entry_of("a"), catalogue=True)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            files.announce(entry_of("a"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not files.unfinished


def test_without_a_data_directory_nothing_is_written_down(tmp_path: Path) -> None:
    files = folder_of(tmp_path, 0, entry_of("a"))
    files.announce(entry_of("a"))
    files.retract(entry_of("a"))
    assert list(tmp_path.rglob("*.topic")) == []
