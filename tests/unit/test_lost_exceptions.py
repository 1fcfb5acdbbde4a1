"""No exception is printed and lost: native functions that cannot raise meet none, and whoever loses one fails its test."""

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker.node import _say_what_is_lost

ROOT = Path(__file__).parents[2]
LOSES = """
import sys, threading

class Loses:
    def __del__(self):
        raise ValueError("nobody is told")

def test_loses_one_in_a_destructor():
    Loses()

def test_loses_one_in_a_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

def test_loses_none():
    pass
"""
# Native functions that cannot raise and have a way on which an exception is printed, by the generated C. Why each is right.
MAY_MEET_ONE = {
    "broker.stages.directory.Directory.step": "what its Python part raises is kept in `failure`",
    "broker.stages.replication.Replication.look_again": "the same",
    "broker.stages.replication.Replication.begin_again": "the same",
    "broker.stages.replication.Replication.join_again": "the same",
    "client.attached.AttachedCore.submit_private": "an assertion of ours: the hooks tell",
    "client.attached.Loan.__releasebuffer__": "gives back a pin and calls nothing that raises",
    "client.turn.tell_watcher": "calls what a test put there",
    "broker.disk.ask_wrote": "calls what a simulation put there: the hooks of tests tell",
    "broker.disk.ask_synced": "calls what a simulation put there: the hooks of tests tell",
    "client.attached.AttachedCore.__dealloc__": "a destructor: the hooks of tests and brokers tell",
    "client.attached.AttachedCore.__del__": "a destructor: the hooks of tests and brokers tell",
    "client.attached.Loan.__del__": "a destructor: the hooks of tests and brokers tell",
    "sim.cluster.door.HostControl.call_now": "what the call raises is kept in `raised`",
}


def test_a_test_that_loses_an_exception_fails(tmp_path: Path) -> None:
    (tmp_path / "test_loses.py").write_text(LOSES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "3 passed, 2 errors" in done.stdout, done.stdout
    assert done.stdout.count("printed and lost") >= 2


def test_native_functions_that_cannot_raise_meet_no_exception() -> None:
    found = set()
    for path in [path for folder in ("broker", "client", "sim") for path in (ROOT / folder).rglob("*.pyx")]:
        generated = path.with_suffix(".c")
        assert generated.exists(), f"{path} is not built: run scripts/bootstrap.sh"
        found |= set(re.findall(r'__Pyx_WriteUnraisable\("([^"]+)"', generated.read_text(errors="replace")))
    assert found <= set(MAY_MEET_ONE), (
        f"{sorted(found - set(MAY_MEET_ONE))} may print an exception and lose it: catch it and keep it where the caller looks")


def test_a_broker_writes_what_is_lost_into_its_log(caplog: pytest.LogCaptureFixture) -> None:
    before = sys.unraisablehook, threading.excepthook
    try:
        _say_what_is_lost()
        with caplog.at_level(logging.ERROR, "cxlmq"):
            thread = threading.Thread(target=lambda: 1 // 0, name="worker")
            thread.start()
            thread.join()
    finally:
        sys.unraisablehook, threading.excepthook = before
    (record,) = caplog.records
    assert record.getMessage() == "lost exception in worker"
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
