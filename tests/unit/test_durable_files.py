"""Small files on disk: whole or not there after a crash or a failing disk at every step, and no bit of them is believed
that was not written."""

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.durable_files import Content, FileDamaged, opened, read_durable, sealed, write_durable
from broker.errors import RecoveryError
from broker.group_files import GroupFiles, GroupRecord, read_group_files
from broker.recovery import RecoveryPlan, make_plan, write_manifest
from broker.replica_folder import ReplicaFolder
from broker.topics import TopicEntry
from broker.verify import verify_replicas
from tests.manual_cluster import ManualCluster

VALUES = {"topic": "t", "numbers": [1, 2, 3], "text": "öß"}
CALLS = ("open", "write", "fdatasync", "replace", "fsync", "mkdir")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.topic"
    write_durable(path, "topic", VALUES)
    assert read_durable(path, "topic") == Content(VALUES, True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["file.topic"]


def test_a_full_disk_is_said_with_the_file_that_could_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.group"
    write_durable(path, "group", {"position": 1})
    (tmp_path / ".x.group.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_durable(path, "group", {"position": 2})
    assert refused.value.errno == errno.ENOSPC
    assert refused.value.filename == str(path)
    assert read_durable(path, "group").values == {"position": 1}


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    data = sealed("topic", VALUES)
    for at in range(len(data)):
        for bit in range(8):
            with pytest.raises(FileDamaged):
                opened(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:], "topic")
        with pytest.raises(FileDamaged):
            opened(data[:at], "topic")
    with pytest.raises(FileDamaged, match="kind topic, not manifest"):
        opened(data, "manifest")


def test_a_file_without_a_checksum_is_read_and_says_so() -> None:
    assert opened(b'{"topic": "t"}', "topic") == Content({"topic": "t"}, False)


# ---- crashes, and disks that fail ------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The process ends here."""


@pytest.fixture
def nth_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, BaseException], list[str]]]:
    """Let the n-th call that reaches the disk fail; the names of those that were made."""
    real = {name: getattr(os, name) for name in CALLS}

    def arm(number: int, error: BaseException) -> list[str]:
        made: list[str] = []

        def wrap(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                made.append(name)
                if len(made) == number:
                    if name == "write":         # half of it is there
                        real["write"](arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2])
                    raise error
                return real[name](*arguments, **more)
            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, wrap(name))
        return made

    yield arm
    monkeypatch.undo()


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "topic": lambda folder, number: write_durable(folder / "a" / "t.topic", "topic", {"number": number}),
    "group": lambda folder, number: GroupFiles(folder / "a").store(GroupRecord(
        topic="t", created_ns=1, group="g", version=number, position=number, protected=False, committed_wall_ns=0)),
}


def numbers_in(kind: str, folder: Path) -> list[int]:
    """What is there, by the number that was written; nothing may be damaged."""
    if kind == "group":
        records, damaged = read_group_files([folder / "a"])
        assert damaged == []
        return [each.version for each in records]
    return [read_durable(path, "topic").values["number"] for path in folder.rglob("*.topic")]


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")],
                         ids=["crash", "full", "broken"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_at_every_step_the_old_or_the_new_file_is_there(
        tmp_path: Path, nth_call: Any, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException,
        again: bool) -> None:
    for step in range(1, 100):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        if again:
            WRITERS[kind](folder, 1)
        made = nth_call(step, error)
        with contextlib.suppress(Interrupted, OSError):
            WRITERS[kind](folder, 2)
        monkeypatch.undo()
        if len(made) < step:                # nothing was left to fail
            assert numbers_in(kind, folder) == [2]
            break
        assert numbers_in(kind, folder) in ([[1], [2]] if again else [[], [2]])
        WRITERS[kind](folder, 3)
        assert numbers_in(kind, folder) == [3], "tried again, it works"
    assert {"open", "write", "fdatasync", "replace", "fsync"} <= set(made)
    assert made.index("fdatasync") < made.index("replace") < len(made) - 1 - made[::-1].index("fsync")
    if not again:
        assert made.index("mkdir") < made.index("fsync") < made.index("replace"), "the parent is synced as well"


# ---- every kind of file in a data directory --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with every kind of file, each small."""
    folder = tmp_path_factory.mktemp("whole")
    cluster = ManualCluster(brokers=2, folder=folder, replica_file_bytes=8 << 10, order_entry_count=64)
    session = cluster.open_session(cluster.create(replication_factor=2, retention_bytes=2048))
    cluster.publish_all(session, range(150))
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    entry = session.topic
    files = ReplicaFolder(folder / "broker-0", 0, 1, "manual", 2, lambda *_: entry, catalogue=True)
    files.topic_appeared(entry.number, entry.generation)
    files.say_deleted("other", 77)
    GroupFiles(folder / "broker-0", 1).store(GroupRecord(
        topic=entry.name, created_ns=entry.created_ns, group="g", version=3, position=140, protected=True,
        committed_wall_ns=5))
    write_manifest(folder, 2, make_plan(folder).topics)
    return folder


def described(plan: RecoveryPlan, folder: Path) -> Any:
    """What recovery would do."""
    records, _ = read_group_files(sorted(folder.glob("broker-*")))
    return [(topic.options, topic.first_position, topic.end_position, topic.sessions, topic.lost,
             [(each.record.position, each.record.fields["payload_crc"]) for each in topic.batches])
            for topic in plan.topics], plan.ignored, records


@pytest.mark.parametrize("suffix", [".json", ".topic", ".deleted", ".sessions", ".group", ".replica"])
def test_a_flipped_bit_changes_nothing_or_is_named(whole: Path, tmp_path: Path, suffix: str) -> None:
    """In every kind of file: recovery finds the same, or says which file is damaged; so does `region verify`."""
    copied = tmp_path / "copy"
    shutil.copytree(whole, copied)
    wanted = described(make_plan(copied), copied)
    path = min(copied.rglob(f"*{suffix}"), key=lambda each: each.stat().st_size)
    data = path.read_bytes()
    step = 9 if suffix != ".replica" else 61            # one bit of every byte of the small ones
    named = 0
    for bit in range(0, len(data) * 8, step):
        at = bit // 8
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1:])
        try:
            plan = make_plan(copied)
            _, groups = read_group_files(sorted(copied.glob("broker-*")))
            told = [each.path for each in plan.damage] + groups
        except RecoveryError as error:
            told = [str(error.file)]
            plan = None
        if any(str(path) in each for each in told):
            named += 1
            if named % 97 == 1:
                assert any(str(path) in each.where for each in verify_replicas(copied)), f"bit {bit}"
        else:
            assert plan is not None
            assert described(plan, copied) == wanted, f"bit {bit}"
    assert named
    if suffix != ".replica":                            # its padding is nobody's
        assert named == len(range(0, len(data) * 8, step))


def test_a_description_without_a_checksum_is_not_believed_against_one_that_has_it(whole: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(whole, copied)
    (path,) = copied.rglob("*.topic")
    options = read_durable(path, "topic").values["topic"]
    path.write_text(json.dumps({"topic": {**options, "order": 1}}))     # as earlier versions wrote it
    plan = make_plan(copied)
    assert plan.topics[0].options["order"] == options["order"] == 5
    assert [each.path for each in plan.damage] == [str(path)]
    path.write_text(json.dumps({"topic": options}))
    assert make_plan(copied).damage == []


def test_files_of_earlier_versions_are_read(whole: Path, tmp_path: Path) -> None:
    """Without first lines, with empty marks of deletion, and groups that say neither run nor deletion."""
    copied = tmp_path / "copy"
    shutil.copytree(whole, copied)
    wanted = described(make_plan(copied), copied)
    for path in [*copied.rglob("*.json"), *copied.rglob("*.topic")]:
        path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    for path in copied.rglob("*.deleted"):
        path.write_bytes(b"")
    for path in copied.rglob("*.group"):
        body = {key: value for key, value in json.loads(path.read_bytes()[16:]).items() if key not in ("deleted", "run_id")}
        data = json.dumps(body).encode()
        path.write_bytes(b"CXLMQGRP%08x" % zlib.crc32(data) + data)
    plan = make_plan(copied)
    assert plan.damage == []
    topics, ignored, groups = described(plan, copied)
    assert (topics, ignored) == wanted[:2]
    assert [(each.group, each.position, each.deleted) for each in groups] == [("g", 140, False)]


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, "full")], ids=["crash", "full"])
def test_a_recovery_that_ends_at_any_step_of_its_manifest_can_be_done_again(
        whole: Path, tmp_path: Path, nth_call: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    for step in range(1, 50):
        copied = tmp_path / f"{step}"
        shutil.copytree(whole, copied)
        plan = make_plan(copied)
        wanted = described(plan, copied)
        made = nth_call(step, error)
        with contextlib.suppress(Interrupted, OSError):
            write_manifest(copied, 9, plan.topics)
        monkeypatch.undo()
        assert described(make_plan(copied), copied) == wanted
        write_manifest(copied, 10, make_plan(copied).topics)
        assert described(make_plan(copied), copied) == wanted
        if len(made) < step:
            return
    raise AssertionError("it never came to an end")


def test_a_manifest_that_is_missing_is_noticed(whole: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(whole, copied)
    write_manifest(copied, 3, make_plan(copied).topics)
    (copied / "recoveries" / "000001.json").unlink()
    with pytest.raises(RecoveryError, match=r"000001\.json is missing"):
        make_plan(copied)


def test_topics_of_whom_a_full_disk_was_not_told_are_written_down_later(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TopicEntry(1, 1, "t", 5, 1, 1, 0, 99)
    files = ReplicaFolder(tmp_path / "broker-0", 0, 1, "manual", 2, lambda *_: entry, catalogue=True)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    for change in (files.topic_appeared, files.topic_deleted):
        with pytest.raises(OSError, match="full"):
            change(1, 1)
        assert files.unfinished
    monkeypatch.undo()
    files.tend()
    assert not files.unfinished
    assert [path.name for path in (tmp_path / "broker-0").iterdir()] == ["t.63.deleted"]
