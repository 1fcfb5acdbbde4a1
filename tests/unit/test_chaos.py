"""The judge of chaos runs: it sees what is wrong in trails, and nothing where nothing is."""

import os
import random
import signal
import time
from pathlib import Path

import numpy
import pytest

from sim.chaos.damage import flip_bit, judge_damaged
from sim.chaos.faults import Fault, Injector
from sim.chaos.pauses import Watchman
from sim.chaos.run import Outcome
from sim.chaos.timeline import plot_timeline, timeline_text
from sim.chaos.trail import Kind, Trail, make_message, read_trail, sender_of
from sim.chaos.verdict import MEANINGS, Trails, awake, history_of, judge, judge_recovered, longest_wait, resume_seconds
from tests.manual_cluster import ManualCluster

SECOND = 1_000_000_000


def test_a_message_names_its_sender_and_damage_takes_the_name_away() -> None:
    message = bytearray(make_message(7, 3, 500))
    assert sender_of(message) == (7, 3)
    for at in (0, 5, 9, 21, len(message) - 1):
        message[at] ^= 1
        assert sender_of(message) is None
        message[at] ^= 1
    assert sender_of(message[:-1]) is None and sender_of(b"") is None


def test_half_an_event_of_a_killed_writer_is_left_out(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "t")
    trail.write(Kind.SENT, 1, 0)
    trail.write(Kind.ACKED, 1, 0, 4, 1)
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-1])
    assert [event.kind for event in read_trail(tmp_path / "t")] == [Kind.SENT]
    assert list(read_trail(tmp_path / "missing")) == []


class Story:
    """Trails of one topic, written by hand."""

    def __init__(self, folder: Path) -> None:
        self.publisher, self.reader = Trail(folder / "p"), Trail(folder / "r")
        self.auditor, self.last = Trail(folder / "a"), Trail(folder / "l")
        self.group = Trail(folder / "g")
        self.trails = Trails([folder / "p"], [folder / "r"], folder / "a", folder / "l", groups=[folder / "g"])
        self.sent = 0
        self.epochs: list[tuple[int, int]] = []
        self.faults: list[Fault] = []

    def publish(self, position: int, epoch: int = 1) -> None:
        self.publisher.write(Kind.SENT, 1, self.sent)
        self.publisher.write(Kind.ACKED, 1, self.sent, position, epoch)
        self.sent += 1

    def read(self, numbers: list[int], *who: Trail) -> None:
        for trail in who or (self.auditor, self.reader, self.last):
            trail.write_reads([((1, number), position) for position, number in enumerate(numbers)])

    def broken(self, leftovers: tuple[str, ...] = (), late: int = 0) -> set[str]:
        times = [event.at_ns for event in read_trail(self.trails.auditor)]
        found = judge({"t": self.trails}, self.faults, times[0] - SECOND, times[-1] + SECOND + late, list(leftovers),
                      self.epochs)
        return {name for name, text in found.items() if text}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    for position in range(4):
        made.publish(position)
    return made


def test_a_run_without_fault_is_judged_whole(story: Story) -> None:
    story.read([0, 1, 2, 3])
    assert story.broken() == set()


def test_what_was_acknowledged_and_is_not_there_breaks_a1(story: Story) -> None:
    story.read([0, 1, 2])
    assert "A1" in story.broken()


def test_a_message_twice_breaks_u_and_p(story: Story) -> None:
    story.read([0, 1, 2, 3, 3])
    assert {"U", "P"} <= story.broken()


def test_a_reader_that_saw_another_order_breaks_t(story: Story) -> None:
    story.read([0, 1, 2, 3], story.auditor, story.last)
    story.read([0, 2, 1, 3], story.reader)
    assert story.broken() == {"T"}


def test_an_unknown_sender_breaks_n(story: Story) -> None:
    story.read([0, 1, 2, 3])
    story.reader.write_reads([(None, 4)])
    story.auditor.write_reads([(None, 4)])
    assert "N" in story.broken()


def test_an_epoch_that_goes_back_breaks_m(story: Story) -> None:
    story.publish(4, epoch=3)
    story.publish(5, epoch=2)
    story.read([0, 1, 2, 3, 4, 5])
    assert story.broken() == {"M"}


def test_an_ack_under_an_old_epoch_for_what_was_sent_under_a_new_one_breaks_z(story: Story) -> None:
    story.publish(4, epoch=1)           # sent before anybody saw epoch 2
    story.epochs.append((time.monotonic_ns(), 2))
    story.publish(5, epoch=2)
    story.read([0, 1, 2, 3, 4, 5])
    assert story.broken() == set()
    story.epochs.append((time.monotonic_ns(), 3))
    story.publish(6, epoch=2)
    story.read([0, 1, 2, 3, 4, 5, 6], story.auditor, story.last)
    assert "Z" in story.broken()


def test_a_message_sent_after_anothers_ack_and_ordered_before_it_breaks_r(story: Story) -> None:
    first, second = Trail(story.trails.auditor.parent / "p1"), Trail(story.trails.auditor.parent / "p2")
    first.write(Kind.SENT, 11, 0)
    first.write(Kind.ACKED, 11, 0, 5, 1)
    second.write(Kind.SENT, 12, 0)
    second.write(Kind.ACKED, 12, 0, 4, 1)
    story.trails.publishers += [story.trails.auditor.parent / "p1", story.trails.auditor.parent / "p2"]
    story.read([0, 1, 2, 3], story.auditor, story.last)
    for trail in (story.auditor, story.last):
        trail.write_reads([((12, 0), 4), ((11, 0), 5)])
    assert story.broken() == {"R"}


@pytest.mark.parametrize("events", [
    [(Kind.COMMITTED, 3), (Kind.STARTED, 2)], [(Kind.COMMITTED, 3), (Kind.COMMITTED, 2)], [(Kind.COMMITTED, 5)]],
    ids=["found further back", "back", "beyond the tail"])
def test_a_group_that_goes_back_or_beyond_the_tail_breaks_c(story: Story, events: list[tuple[Kind, int]]) -> None:
    story.read([0, 1, 2, 3])
    for kind, position in ((Kind.STARTED, 0), (Kind.COMMITTED, 2)):
        story.group.write(kind, 0, position=position)
    assert story.broken() == set()
    for kind, position in events:
        story.group.write(kind, 0, position=position)
    assert story.broken() == {"C"}


def test_damage_and_an_auditor_that_lost_something_break_i(story: Story) -> None:
    story.read([0, 1, 2, 3])
    story.reader.write(Kind.DAMAGED, 0, position=4)
    assert story.broken() == {"I"}


def test_the_auditor_may_lose_nothing(story: Story) -> None:
    story.read([0, 1, 2, 3])
    story.auditor.write(Kind.GAP, 0, position=4)
    assert story.broken() == {"I"}


def test_nothing_acknowledged_for_long_breaks_v(story: Story) -> None:
    story.read([0, 1, 2, 3])
    assert story.broken(late=20 * SECOND) == {"V"}


def test_acks_that_resume_late_after_a_heads_death_break_v(story: Story) -> None:
    story.faults.append(Fault("kill head", "broker 0", time.monotonic_ns() - 3 * SECOND))
    story.publish(4)
    story.read([0, 1, 2, 3, 4])
    story.faults[0].at_ns = min(event.at_ns for event in read_trail(story.trails.publishers[0])) - 3 * SECOND
    assert story.broken() == {"V"}


def test_what_was_given_up_is_left_out_of_p_and_what_waited_long_breaks_v(story: Story) -> None:
    trail = Trail(story.trails.auditor.parent / "p1")
    for number in range(3):
        trail.write(Kind.SENT, 9, number)
    story.trails.publishers.append(story.trails.auditor.parent / "p1")
    trail.write(Kind.ACKED, 9, 0, 4, 1)
    trail.write(Kind.UNKNOWN, 9, 1)
    story.read([0, 1, 2, 3], story.auditor, story.last)
    for reader in (story.auditor, story.last):
        reader.write_reads([((9, 0), 4), ((9, 2), 5)])
    assert story.broken() == set(), "message 1 was given up, and its publisher told"
    history = history_of(story.trails)
    assert longest_wait(history)[0] < 15
    history.operations[-2].settled = history.operations[-2].invoked + 16 * SECOND
    assert longest_wait(history) == (16.0, "message 1 of client 9")
    trail.write(Kind.SENT, 9, 3)
    for reader in (story.auditor, story.last):
        reader.write_reads([((9, 4), 6)])
    assert "P" in story.broken(), "message 3 is on its way, and 4 must not be there without it"


def test_what_does_not_come_back_from_the_disks_breaks_a2() -> None:
    acked = {(1, 0): 7, (1, 1): 8, (2, 0): 3}
    assert judge_recovered(acked, {(1, 0): 7, (1, 1): 8}, kept_from=5) == ""
    assert "at None" in judge_recovered(acked, {(1, 0): 7}, kept_from=5)
    assert "at 9" in judge_recovered(acked, {(1, 0): 7, (1, 1): 9}, kept_from=5)
    assert "at 4" in judge_recovered(acked, {(1, 0): 7, (1, 1): 8, (2, 0): 4}, kept_from=5)
    assert judge_recovered(acked, {(1, 0): 7, (1, 1): 8}, kept_from=0)


def test_a_group_that_goes_on_ahead_of_what_it_read_breaks_g(story: Story) -> None:
    story.read([0, 1, 2, 3])
    story.group.write(Kind.STARTED, 0, position=0)
    story.group.write_reads([((1, 0), 0), ((1, 1), 1)])
    story.group.write(Kind.STARTED, 0, position=1)      # what was not committed comes again
    story.group.write_reads([((1, 1), 1)])
    story.group.write(Kind.STARTED, 0, position=2)
    assert story.broken() == set()
    story.group.write(Kind.STARTED, 0, position=3)
    assert story.broken() == {"G"}


def test_a_forked_child_that_hangs_breaks_f(story: Story) -> None:
    story.read([0, 1, 2, 3])
    story.publisher.write(Kind.CHILD, 1, 14)
    assert story.broken() == {"F"}


def test_when_all_brokers_were_killed_no_heads_death_is_measured() -> None:
    acks = numpy.array([1.0, 1.1, 9.6], float) * SECOND
    faults = [Fault("kill head", "broker 0", int(1.05 * SECOND)), Fault("kill all", "brokers [1, 2]", 2 * SECOND)]
    assert resume_seconds(acks.astype(numpy.int64), faults[:1]) and not resume_seconds(acks.astype(numpy.int64), faults)


def test_what_is_left_over_breaks_b(story: Story) -> None:
    story.read([0, 1, 2, 3])
    assert story.broken(("3 segments are in use",)) == {"B"}


def test_a_long_silence_after_a_heads_death_is_measured() -> None:
    acks = numpy.array([1.0, 1.1, 3.6, 3.7], float) * SECOND
    assert resume_seconds(acks.astype(numpy.int64), [Fault("kill head", "broker 0", int(1.05 * SECOND))]) == [
        pytest.approx(2.5)]
    assert resume_seconds(acks.astype(numpy.int64), [Fault("kill broker", "broker 1", SECOND)]) == []


def test_readers_of_the_damaged_topic_are_told_and_go_on_or_i_is_broken(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "d")
    trail.write_reads([((1, 0), 0), ((1, 1), 1)])
    trail.write(Kind.DAMAGED, 0, position=2)
    trail.write_reads([((1, 3), 3)])
    assert judge_damaged(tmp_path / "d", 4, 4) == []
    assert "did not go on" in judge_damaged(tmp_path / "d", 6, 4)[0]
    trail.write_reads([(None, 4)])
    assert "nobody sent" in judge_damaged(tmp_path / "d", 5, 5)[0]


def test_one_bit_of_a_recent_order_entry_is_flipped() -> None:
    cluster = ManualCluster(brokers=2)
    session = cluster.open_session(cluster.create())
    assert flip_bit(cluster.memory, cluster.order.layout, session.topic.number, random.Random(1)) == "", "nothing is committed yet"
    cluster.publish_all(session, range(5))
    before = bytes(cluster.mapping)
    where = flip_bit(cluster.memory, cluster.order.layout, session.topic.number, random.Random(1))
    assert where.startswith("order entry ")
    assert sum((a ^ b).bit_count() for a, b in zip(before, bytes(cluster.mapping), strict=True)) == 1


def test_the_timeline_shows_acks_and_faults(tmp_path: Path) -> None:
    acks = numpy.sort(numpy.random.default_rng(1).integers(0, 10 * SECOND, 1000))
    faults = [Fault("kill head", "broker 0", 2 * SECOND), Fault("stop head", "broker 1", 5 * SECOND, 6 * SECOND),
              Fault("kill reader", "reader", 9 * SECOND)]
    outcome = Outcome(faults=faults, begun_ns=0, ended_ns=10 * SECOND, acks_ns=acks, reads_ns=acks)
    head, kills, rate = timeline_text(outcome, width=10).splitlines()
    assert head.removeprefix("head   ") == "  H  s    "
    assert kills.removeprefix("kills  ") == "         k"
    assert " " not in rate.removeprefix("acks/s ")[:10]
    if plot_timeline(tmp_path / "timeline.png", outcome):
        assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_time_in_which_the_machine_stood_still_is_nobodys_silence(story: Story) -> None:
    begin, end = 100 * SECOND, 150 * SECOND
    assert [int(awake(moment * SECOND, [(begin, end)])) // SECOND for moment in (90, 120, 150, 160)] == [90, 100, 100, 110]
    acks = numpy.array([99, 151], numpy.int64) * SECOND
    fault = Fault("kill head", "broker 0", 99 * SECOND)
    assert resume_seconds(acks, [fault]) == [52.0] and resume_seconds(acks, [fault], pauses=[(begin, end)]) == [2.0]


def test_the_watchman_sees_a_pause() -> None:
    pauses: list[tuple[int, int]] = []
    with Watchman(pauses) as watchman:
        os.kill(watchman._process.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(watchman._process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while not pauses and time.monotonic() < deadline:
            time.sleep(0.05)
    assert pauses and pauses[0][1] - pauses[0][0] > SECOND


class Nobody:
    """A target whose processes never end; garbage is all that reaches it."""

    def brokers(self) -> dict[int, int]:
        return {}

    def head(self) -> int | None:
        return None

    def publishers(self) -> list[int]:
        return []

    def readers(self) -> list[int]:
        return []

    def fail_disks(self, *rules: str) -> bool:
        return True

    def send_garbage(self, chance: object) -> None:
        pass

    def damage(self, chance: object) -> str:
        return "an entry"

    def start_other(self) -> bool:
        return True


def test_the_same_seed_brings_the_same_faults() -> None:
    def story_of(seed: int) -> list[tuple[str, str, float]]:
        injector = Injector(Nobody(), seed)
        pauses = []
        for _ in range(200):
            pauses.append(injector.next_pause(1.0))
            injector.inject()
        return [(fault.what, fault.whom, pauses[number]) for number, fault in enumerate(injector.done)]

    assert story_of(3) == story_of(3) != story_of(4)
    assert {"damage", "disk", "garbage", "other"} == {what for what, _, _ in story_of(3)}


def test_every_verdict_has_a_line_that_says_what_must_hold() -> None:
    found = judge({}, [], 0, 1, [])
    assert {*found, "A2"} == MEANINGS.keys()
    assert all(text.endswith(".") and len(text) > 20 for text in MEANINGS.values())
