"""Files of consumer groups: whole or not there, the newest wins, damage is named and nothing is removed."""

import os
from pathlib import Path
from typing import Any

import pytest

from broker.group_files import GroupFiles, GroupRecord, read_group_files


def record(**changed: Any) -> GroupRecord:
    return GroupRecord(**{"topic": "topic", "created_ns": 0xABC, "group": "g", "version": 5, "position": 70,
                          "protected": True, "committed_wall_ns": 99, **changed})


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path / "deep" / "folder")
    files.store(record())
    (file,) = (tmp_path / "deep" / "folder").iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == ("topic-abc.g.group", 0o600)
    assert read_group_files([tmp_path / "deep" / "folder"]) == ([record()], [])


def test_the_newest_of_several_disks_wins_and_an_older_one_is_not_stored_over_it(tmp_path: Path) -> None:
    first, second = GroupFiles(tmp_path / "a"), GroupFiles(tmp_path / "b")
    first.store(record(version=6, position=80))
    first.store(record(version=5, position=70))
    second.store(record(version=4, position=60))
    assert read_group_files([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == ([record(version=6, position=80)], [])


def test_every_damaged_byte_is_found_and_nothing_is_removed(tmp_path: Path) -> None:
    GroupFiles(tmp_path).store(record())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        found, damaged = read_group_files([tmp_path])
        assert (found, len(damaged)) == ([], 1), f"byte {at}"
        assert str(file) in damaged[0]
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert read_group_files([tmp_path])[0] == []
    assert file.exists()


def test_keeping_follows_what_there_is(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path)
    files.keep([record(), record(group="h")], ())
    assert len(list(tmp_path.iterdir())) == 2
    known = files.stored()
    files.store(record(group="i", version=9))
    files.keep([record(group="h", version=9)], known)
    assert {each.group for each in read_group_files([tmp_path])[0]} == {"h", "i"}, "what came meanwhile stays"
    files.keep([record(group="h", version=9)], files.stored())
    assert [each.version for each in read_group_files([tmp_path])[0]] == [9]
    files.store(record(version=10))
    assert {each.group for each in read_group_files([tmp_path])[0]} == {"g", "h"}, "one that was made again comes back"


def test_a_failure_leaves_the_last_whole_file_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = GroupFiles(tmp_path)
    files.store(record())

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="No space"):
        files.store(record(version=6, position=99))
    monkeypatch.undo()
    assert read_group_files([tmp_path]) == ([record()], [])
    files.store(record(version=6, position=99))
    assert read_group_files([tmp_path])[0][0].position == 99
