"""How a command is ended from outside: `client/cli/ending.py`, and what `produce` has counted then."""

import os
import signal
from collections.abc import Iterator

import pytest

from client.cli.ending import Gently, Stopped
from client.cli.produce import Outcome, _Input

LINES = {"whole": False, "length_prefixed": False, "keep_newline": False}


def ring() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def signals() -> Iterator[Gently]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Gently(lambda: None) as found:
        yield found
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_interrupts_but_not_what_is_held(signals: Gently) -> None:
    ring()
    done = []
    with pytest.raises(Stopped), signals.held():
        ring()
        done.append("all of it")
    assert done
    with pytest.raises(Stopped):
        ring()


def test_what_was_read_is_counted_before_a_second_signal_ends_it(signals: Gently, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.write(write, b"one\ntwo\nthr")
    real = os.read

    def reading(descriptor: int, count: int) -> bytes:
        found = real(descriptor, count)
        ring()
        ring()
        return found

    messages = _Input(read, signals, LINES)
    monkeypatch.setattr(os, "read", reading)
    outcome = Outcome("t")
    with pytest.raises(Stopped):
        messages.next_messages(outcome)
    monkeypatch.undo()
    assert (outcome.messages, outcome.bytes, outcome.incomplete_bytes) == (2, 6, 3)
    os.close(read)
    os.close(write)
