"""The region is lost with every host, again and again: what was promised is recovered from the disks, or named as lost."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from broker.disk import sync, watch, write
from broker.durable_files import make_folder, sync_folder, write_whole
from sim.cluster.disks import Disks
from sim.cluster.run import run_scenario, run_world
from sim.cluster.scenario import draw

STEPS = 6_000
FOUND = (62, 633, 1030)                     # what these showed is in tests/unit/test_recovery_*.py
LOSING = [seed for seed in range(300) if draw(seed, steps=STEPS).loses]


@pytest.mark.parametrize("seed", sorted({*LOSING[:30], *FOUND}))
def test_what_was_promised_outlives_the_region(seed: int) -> None:
    verdict = run_scenario(draw(seed, steps=STEPS))
    assert not verdict.failed, verdict
    assert verdict.faults["region lost"]


def test_what_was_under_way_when_the_region_was_lost_does_not_come_in_the_next_one() -> None:
    verdict = run_scenario(draw(60_020, hosts=7))
    assert not verdict.failed, verdict


def test_a_run_with_losses_replays_to_the_byte() -> None:
    for seed in LOSING[:4]:
        first, second = (run_scenario(draw(seed, steps=STEPS)) for _ in range(2))
        assert (first.trace_hash, first.steps, first.batches) == (second.trace_hash, second.steps, second.batches)


def test_hosts_and_clients_live_on_behind_a_loss() -> None:
    """In a calm run nobody dies: everything that clients had in mind gets its outcome in the new region."""
    seeds = [seed for seed in range(200) if draw(seed, steps=STEPS, kinds=frozenset({"loss"})).loses][:6]
    for seed in seeds:
        verdict, world = run_world(draw(seed, steps=STEPS, kinds=frozenset({"loss"})))
        assert not verdict.failed, verdict
        assert world.losses
        assert all(operation.settled >= 0 for operation in world.history.operations), seed
        assert len(world.log()) > world.restored_entries or not any(
            each.invoked > world.lost_at for each in world.history.operations), "new batches go behind"


# ---- the disks themselves --------------------------------------------------------------------------------------------

OLD, NEW = b"o" * 1000, b"n" * 3000


def outcomes(tmp_path: Path, act: Callable[[Path], None], sync_before: bool = False) -> set[bytes | None]:
    """What losses of power leave of the file "x" that `act` has made, or changed when it was durable before."""
    found: set[bytes | None] = set()
    for seed in range(60):
        root = tmp_path / str(seed)
        root.mkdir()
        disks = Disks(root, lambda host: False, lambda host: None)
        watch(disks)
        try:
            path = disks.folder / "broker-0" / "x"
            make_folder(path.parent)
            if sync_before:
                write_whole(path, OLD)
            act(path)
        finally:
            watch(None)
        disks.lose_power(Random(seed))
        found.add(path.read_bytes() if path.exists() else None)
    return found


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def put(path: Path, *, synced: bool) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    write(descriptor, NEW)
    if synced:
        sync(descriptor)
    os.close(descriptor)


def test_what_is_not_synced_is_lost_torn_or_kept(tmp_path: Path) -> None:
    found = outcomes(tmp_path, lambda path: put(path, synced=False))
    assert {None, b"", NEW, bytes(len(NEW))} < found
    assert any(each and each.strip(b"\0") and each != NEW for each in found), "torn"


def test_a_name_is_durable_with_its_folder(tmp_path: Path) -> None:
    assert outcomes(tmp_path, lambda path: put(path, synced=True)) == {None, NEW}


def test_a_small_file_of_ours_is_the_new_one_when_it_is_said_to_be(tmp_path: Path) -> None:
    assert outcomes(tmp_path, lambda path: write_whole(path, NEW), sync_before=True) == {NEW}


def test_a_file_that_was_removed_may_come_back_until_its_folder_is_synced(tmp_path: Path) -> None:
    def remove(path: Path) -> None:
        path.unlink()

    def remove_durably(path: Path) -> None:
        path.unlink()
        sync_folder(path.parent)

    assert outcomes(_new(tmp_path / "a"), remove, sync_before=True) == {None, OLD}
    assert outcomes(_new(tmp_path / "b"), remove_durably, sync_before=True) == {None}


@pytest.mark.parametrize("what", ["write", "full"])
def test_a_disk_that_fails_leaves_the_old_file(tmp_path: Path, what: str) -> None:
    disks = Disks(tmp_path, lambda host: False, lambda host: None)
    watch(disks)
    try:
        path = disks.folder / "broker-0" / "x"
        write_whole(path, OLD)
        disks.fail(0, what, 1_000)
        if what == "write":
            with pytest.raises(OSError, match="Input/output error"):
                write_whole(path, NEW)
        else:
            with pytest.raises(OSError, match="No space left"):
                write_whole(path, NEW)
        assert path.read_bytes() == OLD
    finally:
        watch(None)
