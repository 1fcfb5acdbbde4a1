"""Whole clusters under seeds: every invariant holds whatever the schedule and the faults, and a seed replays to the byte."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest

from sim.cluster.attached import AttachedPublisher
from sim.cluster.history import Operation
from sim.cluster.run import run_scenario, run_seeds, run_world
from sim.cluster.scenario import FAULT_KINDS, draw
from sim.cluster.world import FOLDER_PREFIX, World, remove_leftovers
from sim.cxl.region import SHARED_MEMORY_FOLDER

ROOT = Path(__file__).parents[2]
ALL = frozenset(FAULT_KINDS)
SEEDS, STEPS = 200, 6_000


def test_no_seed_breaks_an_invariant() -> None:
    failed = [verdict for verdict in run_seeds(range(SEEDS), os.cpu_count() or 1, steps=STEPS) if verdict.failed]
    assert not failed, "\n".join(f"{each.seed}: {each.invariant} {each.text}" for each in failed)


@pytest.mark.parametrize("kinds", ["", *FAULT_KINDS])
def test_each_kind_of_fault_alone(kinds: str) -> None:
    chosen = frozenset({kinds} if kinds else ())
    for seed in range(1_000, 1_010):
        verdict = run_scenario(draw(seed, steps=STEPS, kinds=chosen))
        assert not verdict.failed, verdict


@pytest.mark.parametrize(("hosts", "seeds"), [(1, (710535, 710618)), (2, range(5)), (9, (198,)), (16, (0, 1363, 1391))])
def test_clusters_of_other_sizes_break_no_invariant(hosts: int, seeds: Iterable[int]) -> None:
    for seed in seeds:
        verdict = run_scenario(draw(seed, hosts=hosts))
        assert not verdict.failed, verdict


@pytest.mark.parametrize("seed", [3, 20, 29, 40, 62])
def test_attached_clients_go_on_at_the_only_broker_when_it_was_started_again(seed: int) -> None:
    scenario = draw(seed, hosts=1)
    assert scenario.attached
    verdict = run_scenario(scenario)
    assert not verdict.failed, verdict
    assert verdict.faults["broker started again"]


def test_a_session_that_ended_changes_no_size_of_batches() -> None:
    world = World(draw(0).smaller(attached=1, publishers=1, segment_bytes=4 << 10, region_bytes=3 << 20))
    client = AttachedPublisher(world, 1, world.create_topic("t"), 1, 1, 1)
    client.core.take_unsettled()            # which makes what spills as small as leases were
    sizes = [client._build(Operation(1, first, 3, 1, 0)).used for first in range(0, 3_000, 3)]
    world.close()
    assert max(sizes) > 4 << 10


def test_a_client_on_a_host_of_its_own_sees_that_it_was_given_room() -> None:
    world = World(draw(0, kinds=frozenset()).smaller(attached=1, publishers=1, hosts=2, region_bytes=3 << 20))
    for host in world.hosts:
        world._often(host.serve, 60)
    client = AttachedPublisher(world, 1, world.create_topic("t"), 1, 1, 1)
    world.publishers.append(client)
    while len(client.flights.slots) < 2:
        client.act()
        client.core.is_supplied()           # it looks, and its cache has what it saw
        world.advance(world.step + 5)
    world.advance(world.step + 5_000)
    supplied = client.core.is_supplied()
    world.close()
    assert supplied


def test_a_run_says_which_faults_met_somebody_and_how_much_time_it_simulated() -> None:
    calm, rough = run_scenario(draw(62, hosts=1, kinds=frozenset())), run_scenario(draw(62, hosts=1))
    assert set(calm.faults) <= {"reader sought"}, "what readers do by themselves"
    assert (rough.faults["power lost"], rough.faults["broker started again"]) == (1, 1)
    assert rough.simulated_seconds >= rough.steps * draw(62, hosts=1).tick_ns / 1e9


def test_publishers_give_batches_up_and_what_they_say_of_them_is_true() -> None:
    # Judged by the checkers of the history: what is said not to be in the log is never read, and nothing else is a gap.
    given_up = {"failed": 0, "unknown": 0}
    for seed in range(30):
        verdict, world = run_world(draw(seed, steps=STEPS).smaller(delivery_steps=400))
        assert not verdict.failed, verdict
        for each in world.history.operations:
            if each.outcome in given_up and each.settled >= 0 and each.level > 0:
                given_up[each.outcome] += 1
    assert min(given_up.values()) > 0, given_up


def test_without_faults_everything_that_was_sent_is_in_the_log() -> None:
    for seed in range(5):
        scenario = draw(seed, steps=40_000, kinds=frozenset())
        assert run_scenario(scenario).batches == scenario.publishers * scenario.batches


def test_the_same_seed_does_the_same_again() -> None:
    for seed in range(10):
        first, again = (run_scenario(draw(seed, steps=STEPS)) for _ in range(2))
        assert (first.trace_hash, first.steps, first.batches) == (again.trace_hash, again.steps, again.batches)


@pytest.mark.parametrize("seed", [12, 35])
def test_a_simulation_leaves_nothing_in_memory(seed: int) -> None:
    # Attached publishers are killed in them with batches in flight: 10,000 seeds took more memory than there is.
    world = weakref.ref(run_world(draw(seed, steps=STEPS))[1])
    gc.collect()
    assert world() is None


def test_views_that_are_collected_after_their_simulation_end_nothing() -> None:
    # A reader's batches are still viewed when a run is broken off; the collector takes them in any order.
    code = ("import gc; gc.set_threshold(200, 5, 5)\n"
            "from sim.cluster.mutants import BY_NAME\n"
            "from sim.cluster.run import hunt\n"
            "for name in ('reader-ignored', 'replica-ignored', 'segment-early'): hunt(BY_NAME[name])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_another_process_on_another_day_does_the_same() -> None:
    # Neither the hashes of strings, nor addresses, nor the time of day may matter.
    found = set()
    for hash_seed in ("0", "12345"):
        ended = subprocess.run(
            [sys.executable, "-m", "client.cli.main", "sim", "--seed", "17", "--steps", str(STEPS), "--json"], cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo"}, capture_output=True, text=True, check=True)
        verdict = json.loads(ended.stdout)
        assert verdict["verdict"] == "ok"
        found.add((verdict["trace_hash"], verdict["steps"]))
    assert len(found) == 1
    assert found == {(verdict.trace_hash, verdict.steps) for verdict in [run_scenario(draw(17, steps=STEPS))]}


def test_attached_publishers_take_part_and_live_through_what_befalls_them() -> None:
    # They die in mid-copy, stand still for longer than their leases, never hear of their slots: others see what they sent.
    acknowledged = reopened = dead = 0
    for seed in range(2_000, 2_060):
        verdict, world = run_world(draw(seed, steps=STEPS))
        assert not verdict.failed, verdict
        for client in range(world.scenario.attached):
            acknowledged += sum(each.client == client + 1 and each.outcome == "ok" for each in world.history.operations)
            reopened += world.publishers[client].epoch > 1
            dead += world.publishers[client].state == "dead"
    assert acknowledged > 500
    assert reopened
    assert dead


def test_heads_are_replaced_and_nothing_is_lost() -> None:
    # Power goes, and stalled heads go on as if nothing had happened: others take over, again and again.
    epochs = []
    for seed in range(60):
        verdict, world = run_world(draw(seed, steps=STEPS, kinds=frozenset({"crash", "stall", "torn", "evict"})))
        assert not verdict.failed, verdict
        epochs.append(len({entry.epoch for entry in world.log()}))
    assert sum(count > 1 for count in epochs) >= 5


def test_what_a_killed_simulation_left_is_removed_and_nothing_else() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, ours = (Path(SHARED_MEMORY_FOLDER, f"{FOLDER_PREFIX}{process}-test") for process in (ended.pid, os.getpid()))
    left.mkdir()
    ours.mkdir()
    try:
        remove_leftovers()
        assert not left.exists()
        assert ours.exists()
    finally:
        ours.rmdir()


def test_other_seeds_do_something_else() -> None:
    assert len({run_scenario(draw(seed, steps=STEPS)).trace_hash for seed in range(8)}) == 8
