"""What all tests share: property tests print how to replay a failure, and no exception is printed and lost. Helpers:
`tests.manual_cluster`."""

import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("cxlmq", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cxlmq")


def pytest_configure() -> None:
    """Tests send signals to the processes that they start, and a signal that we ignore would be ignored there.

    Started with `&` or nohup, we are to outlive Ctrl-C and the terminal: a handler that does nothing is not inherited.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plant", metavar="NAME", help="run with this bug planted in the stages: see cxlmq sim --mutants")
    parser.addoption("--fuzz-seeds", metavar="FIRST:END", default="0:4", help="seeds of tests/end_to_end/test_fuzz_grpc.py")
    parser.addoption("--chaos", metavar="MINUTES:SEED", default="2:1", help="how long, and with which seed, "
                     "tests/end_to_end/test_chaos_run.py runs")
    parser.addoption("--crash-pairs", type=int, default=100, help="how many pairs of crashes "
                     "tests/simulation/test_crashes.py tries; 0: all of them, which takes about an hour")
    parser.addoption("--topics", type=int, default=150, help="how many topics tests/end_to_end/test_many_topics.py has")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each seed of --fuzz-seeds."""
    if "fuzz_seed" in metafunc.fixturenames:
        first, _, end = metafunc.config.getoption("--fuzz-seeds").partition(":")
        metafunc.parametrize("fuzz_seed", range(int(first), int(end or int(first) + 1)))


@pytest.fixture(autouse=True, scope="session")
def planted_bug(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --plant, every test runs with that bug, to see which of them notices."""
    from sim.cluster.mutants import BY_NAME, switch_on

    name = request.config.getoption("--plant")
    switch_on(BY_NAME[name] if name else None)
    yield
    switch_on(None)


# ---- no exception is printed and lost --------------------------------------------------------------------------------

LOST = ("lost exception in", "Exception ignored in", "Exception in thread")


@pytest.fixture(autouse=True)
def nothing_is_lost() -> Iterator[None]:
    """A test fails when an exception reaches a hook of last resort: nobody was told of it."""
    lost: list[str] = []

    def note(exception: Any) -> None:
        where = getattr(exception, "object", None) or getattr(exception, "thread", None)
        lost.append(f"{exception.exc_value!r} in {where!r}")

    before = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = threading.excepthook = note
    yield
    sys.unraisablehook, threading.excepthook = before
    assert not lost, f"printed and lost: {lost}"


@pytest.fixture(autouse=True, scope="session")
def brokers_lose_nothing() -> Iterator[None]:
    """The same for the brokers of clusters that tests start: it would be in their logs."""
    from client.cluster import Cluster

    original = Cluster._stop_processes

    def stop(self: Cluster) -> None:
        original(self)
        for path in self.config.folder.glob("broker-*.log"):
            text = path.read_text(errors="replace")
            assert not any(each in text for each in LOST), f"{path.name} says:\n{text[-4000:]}"

    Cluster._stop_processes = stop          # type: ignore[method-assign]
    yield
    Cluster._stop_processes = original      # type: ignore[method-assign]
