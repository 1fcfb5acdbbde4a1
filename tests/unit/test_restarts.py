"""A broker that ended is started anew; one that ends in the same way again and again, by a signal, is given up."""

import signal
from pathlib import Path

import pytest

from client.restarts import (
    FAULT_PAUSE_SECONDS_MAX,
    FAULTS_MAX,
    KILLS_MAX,
    LONG_PAUSE_SECONDS_MAX,
    LONG_ROW,
    PAUSE_SECONDS,
    PAUSE_SECONDS_MAX,
    STEADY_SECONDS,
    Endings,
    endings_in,
    how,
)


def live(endings: Endings, start: float, seconds: float, code: int, ready: bool) -> float:
    """One life of broker 0; when the next one begins, or when it would."""
    endings.started(0, start)
    if ready:
        endings.ready(0)
    end = start + seconds
    assert endings.ended(0, code, end)
    assert not endings.ended(0, code, end + 1), "it is news once"
    due = endings.of(0).due
    return end if due is None else max(end, due)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE])
@pytest.mark.parametrize("ready", [False, True])
def test_equal_deaths_in_a_row_are_the_end(number: signal.Signals, ready: bool) -> None:
    endings, now, pauses = Endings(), 100.0, []
    for _ in range(FAULTS_MAX):
        assert not (endings.of(0).given_up if pauses else False)
        ended = now + 0.5
        now = live(endings, now, 0.5, -number, ready)
        pauses.append(now - ended)
    life = endings.of(0)
    assert life.given_up and life.due is None
    assert number.name in life.text() and f"{FAULTS_MAX} times in a row" in life.text()
    assert pauses[:-1] == sorted(pauses[:-1]) and pauses[-2] > pauses[0], "it waits longer each time"
    assert max(pauses) <= FAULT_PAUSE_SECONDS_MAX


def test_progress_and_other_ends_begin_a_new_row() -> None:
    endings, now = Endings(), 0.0
    for _ in range(10 * FAULTS_MAX):
        now = live(endings, now, STEADY_SECONDS, -signal.SIGSEGV, True)
        assert endings.of(0).row == 1
    for number in (signal.SIGSEGV, signal.SIGBUS) * FAULTS_MAX:
        now = live(endings, now, 1.0, -number, True)
    assert not endings.of(0).given_up


def test_what_others_kill_is_started_anew() -> None:
    endings, now = Endings(), 0.0
    for _ in range(10 * KILLS_MAX):
        now = live(endings, now, 1.0, -signal.SIGKILL, True)
        assert endings.of(0).due == now
    for number in range(KILLS_MAX - 1):     # with the last one of those
        assert not endings.of(0).given_up, number
        now = live(endings, now, 1.0, -signal.SIGKILL, False)
    assert endings.of(0).given_up, "it never came as far as to answer"


def test_a_start_that_fails_is_tried_for_ever_and_not_told_each_time() -> None:
    endings, now, told = Endings(), 0.0, 0
    for _ in range(1000):
        before = now
        now = live(endings, now, 0.2, 2, False)
        most = PAUSE_SECONDS_MAX if endings.of(0).row <= LONG_ROW else LONG_PAUSE_SECONDS_MAX
        assert PAUSE_SECONDS <= now - before <= 0.2 + most
        told += endings.of(0).worth_a_note
    assert not endings.of(0).given_up
    assert 3 < told < 20
    endings.postpone(0, now)
    assert endings.of(0).due == now + PAUSE_SECONDS_MAX


def test_what_is_written_down_is_read_back(tmp_path: Path) -> None:
    endings = Endings()
    live(endings, 0.0, 1.0, -signal.SIGBUS, True)
    endings.started(1, 0.0)
    endings.save(tmp_path)
    found = endings_in(tmp_path)
    assert list(found) == [0]
    assert (found[0]["how"], found[0]["endings"], found[0]["given_up"]) == ("by signal SIGBUS", 1, False)
    endings.save(tmp_path / "gone")
    assert endings_in(tmp_path / "gone") == {}
    (tmp_path / "endings.json").write_text("[1]")
    assert endings_in(tmp_path) == {}


def test_how_a_process_ended() -> None:
    assert how(2) == "with exit code 2"
    assert how(-9) == "by signal SIGKILL"
    assert how(-40) == "by signal 40"
