"""What a command could not print it says, and its exit code tells what became of the messages, however it was ended."""

import array
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from client import Admin
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, read_topic

ROOT = Path(__file__).resolve().parents[2]
COMMAND = f"{sys.executable} -m client.cli.main"
SECONDS = 60.0
CLOSED, FULL = ">&-", ">/dev/full"


@pytest.fixture
def made(cluster: Cluster, topic: str) -> str:
    """A topic with a message, and a group of it."""
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    assert shell(f"echo one | {COMMAND} produce {topic} --cluster {cluster.name}").returncode == 0
    assert shell(f"{COMMAND} consume {topic} --group g --cluster {cluster.name}").stdout == "one\n"
    return topic


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell; nothing it says may be a traceback."""
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS,
                          stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr
    assert "internal" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


OF_A_TOPIC = ["consume TOPIC", "consume TOPIC --json", "topic list", "topic describe TOPIC --json", "group list",
              "group describe TOPIC g"]
PLAIN = ["cluster status NAME", "cluster list --json", "region inspect NAME", "region verify NAME", "profiles", "--help", "--version",
         "topic --help"]


@pytest.mark.parametrize("command", [*OF_A_TOPIC, *PLAIN])
def test_data_that_cannot_be_written_is_an_error_that_names_the_output(cluster: Cluster, made: str, command: str) -> None:
    line = f"{COMMAND} {command.replace('TOPIC', made).replace('NAME', cluster.name)}" + (
        f" --cluster {cluster.name}" if command in OF_A_TOPIC else "")
    for output, reason in ((CLOSED, "closed"), (FULL, "No space left")):
        done = shell(f"{line} {output}")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "standard output" in done.stderr
        assert reason in done.stderr
        if "--json" in command:
            assert json.loads(done.stderr)["error"] == "output"


@pytest.mark.parametrize("command", ["consume TOPIC", "topic list", "--help"])
def test_errors_that_cannot_be_told_change_nothing(cluster: Cluster, made: str, command: str) -> None:
    line = f"{COMMAND} {command.replace('TOPIC', made)}" + ("" if command == "--help" else f" --cluster {cluster.name}")
    assert shell(f"{line} >&- 2>&-").returncode == 1
    assert shell(f"{line} >/dev/full 2>/dev/full").returncode == 1
    assert shell(f"{line} --nonsense 2>/dev/full").returncode == 2
    for errors in ("2>&-", "2>/dev/full"):
        whole = shell(f"{line} {errors}")
        assert (whole.returncode, bool(whole.stdout)) == (0, True)
    assert shell(f"{line} | head -c 0; exit ${{PIPESTATUS[0]}}").returncode == 0


@pytest.mark.parametrize("output", [CLOSED, FULL, ">&- 2>&- <&-", "--json >/dev/full 2>/dev/full", "--json | head -c 0"])
def test_what_is_done_is_done_whether_or_not_it_can_be_told(cluster: Cluster, made: str, output: str) -> None:
    where = f"--cluster {cluster.name} {output}; exit ${{PIPESTATUS[0]}}"
    with Admin(cluster=cluster.name) as admin:
        if "<&-" not in output:
            assert shell(f"echo two | {{ {COMMAND} produce {made} {where}; }}; exit ${{PIPESTATUS[1]}}").returncode == 0
            assert admin.describe_topic(made)["end_position"] == 2
        assert shell(f"{COMMAND} topic alter {made} --retention keep {where}").returncode == 0
        assert admin.describe_topic(made)["retention_bytes"] == -1
        assert shell(f"{COMMAND} group reset {made} g --to 0 {where}").returncode == 0
        assert admin.describe_group(made, "g")["position"] == 0
        assert shell(f"{COMMAND} group delete {made} g {where}").returncode == 0
        assert admin.list_groups(made) == []
        assert shell(f"{COMMAND} topic create {made} {where}").returncode == 1          # not done: it was there
        assert shell(f"{COMMAND} topic create {made} --retention keep --if-not-exists {where}").returncode == 0
        assert shell(f"{COMMAND} topic delete {made} {where}").returncode == 0
        assert made not in [each["name"] for each in admin.list_topics()]


def test_a_group_keeps_what_could_not_be_printed(cluster: Cluster, made: str) -> None:
    shell(f"seq 100 | {COMMAND} produce {made} --cluster {cluster.name}")
    for output in (FULL, CLOSED):
        done = shell(f"{COMMAND} consume {made} --group h --cluster {cluster.name} {output}")
        assert done.returncode == 1
        assert "go on with --from 0" in done.stderr
    with Admin(cluster=cluster.name) as admin:
        found = admin.describe_group(made, "h")
        assert (found["position"], found["holder"]) == (0, "")
    assert shell(f"{COMMAND} consume {made} --group h --cluster {cluster.name}").stdout.splitlines()[1:] == [
        str(each) for each in range(1, 101)]


def test_input_that_is_closed_or_breaks_is_said(cluster: Cluster, made: str, tmp_path: Path) -> None:
    done = shell(f"{COMMAND} produce {made} --cluster {cluster.name} <&-")
    assert (done.returncode, "standard input is closed" in done.stderr) == (2, True)
    done = shell(f"{COMMAND} produce {made} --cluster {cluster.name} 0> {tmp_path / 'written'}")     # not for reading
    assert (done.returncode, "cannot be read" in done.stderr, "0 of 0" in done.stderr) == (1, True, True)
    with Admin(cluster=cluster.name) as admin:
        assert admin.describe_topic(made)["end_position"] == 1


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">/dev/full"])
def test_a_cluster_that_is_up_is_up_whether_or_not_it_can_be_told(closed: str) -> None:
    name = unique("quiet")
    try:
        assert shell(f"{COMMAND} cluster up -d --name {name} --brokers 1 --region-bytes 16MiB {closed}").returncode == 0
        assert shell(f"{COMMAND} cluster status {name}").returncode == 0
    finally:
        assert shell(f"{COMMAND} cluster down {name} >/dev/full").returncode == 0
    assert traces(name) == []


# ---- ended from outside ---------------------------------------------------------------------------------------------


def start(*arguments: str, ignoring: tuple[int, ...] = (), **pipes: Any) -> subprocess.Popen[bytes]:
    """A command that runs; as `nohup` and `&` do, its parent may have it ignore signals."""
    def prepare() -> None:
        for number in ignoring:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen([*COMMAND.split(), *arguments], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=prepare, **pipes)  # noqa: PLW1509


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_producer_that_is_stopped_publishes_what_it_has_read(
        cluster: Cluster, made: str, number: int, code: int, as_json: bool) -> None:
    with start("produce", made, "--cluster", cluster.name, *(["--json"] if as_json else []), stdin=subprocess.PIPE,
               stdout=subprocess.PIPE) as feeder:
        assert feeder.stdin
        feeder.stdin.write(b"two\nthree\nfour with no end")
        feeder.stdin.flush()
        with Admin(cluster=cluster.name) as admin:
            assert eventually(lambda: admin.describe_topic(made)["end_position"] == 3)
        feeder.send_signal(number)
        out, err = feeder.communicate(timeout=SECONDS)
    assert feeder.returncode == code, err
    if as_json:
        told = json.loads(out)
        assert (told["messages"], told["acknowledged"], told["incomplete_bytes"]) == (2, 2, 16)
    else:
        assert b"all messages that were read are acknowledged: 2 messages" in err
        assert b"16 bytes of a message without its end are not published" in err
    assert read_topic(cluster.name, made) == [b"one", b"two", b"three"]


def waiting_bytes(pipe: Any) -> int:
    """What lies in a pipe and nobody has read."""
    found = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


def test_a_producer_that_is_stopped_while_nobody_answers_says_how_many_are_there() -> None:
    with Cluster(small_config(brokers=1, restart=False)) as alone:
        with Admin(cluster=alone.name) as admin:
            admin.create_topic("t")
        with start("produce", "t", "--cluster", alone.name, "--transport", "grpc", stdin=subprocess.PIPE) as feeder:
            assert feeder.stdin
            feeder.stdin.write(b"one\n")
            feeder.stdin.flush()
            with Admin(cluster=alone.name) as admin:
                assert eventually(lambda: admin.describe_topic("t")["end_position"] == 1)
            os.kill(alone.processes[0], signal.SIGSTOP)
            try:
                feeder.stdin.write(b"two\n")
                feeder.stdin.flush()
                assert eventually(lambda: waiting_bytes(feeder.stdin) == 0)     # it was read
                assert feeder.stderr
                feeder.send_signal(signal.SIGINT)
                assert feeder.stderr.readline().startswith(b"stopping")
                feeder.send_signal(signal.SIGINT)
                err = feeder.stderr.read()
                assert feeder.wait(SECONDS) == 1, err
                assert b"1 of 2 messages" in err
            finally:
                os.kill(alone.processes[0], signal.SIGCONT)
    assert traces(alone.name) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_member_of_a_group_that_is_stopped_commits_what_it_printed_and_leaves(
        cluster: Cluster, made: str, number: int, code: int, transport: str) -> None:
    with start("consume", made, "--group", "h", "--follow", "--transport", transport, "--cluster", cluster.name,
               stdout=subprocess.PIPE) as reader, Admin(cluster=cluster.name) as admin:
        assert reader.stdout
        assert reader.stdout.readline() == b"one\n"
        shell(f"seq 3 | {COMMAND} produce {made} --cluster {cluster.name}")
        assert [reader.stdout.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
        reader.send_signal(number)
        rest, err = reader.communicate(timeout=SECONDS)
        assert (reader.returncode, rest, err) == (code, b"", b"")
        found = admin.describe_group(made, "h")
        assert (found["position"], found["holder"]) == (4, "")


def test_signals_that_the_parent_has_us_ignore_are_ignored(cluster: Cluster, made: str) -> None:
    ignoring = (signal.SIGINT, signal.SIGHUP)
    with start("produce", made, "--cluster", cluster.name, ignoring=ignoring, stdin=subprocess.PIPE) as feeder:
        assert feeder.stdin
        feeder.stdin.write(b"two\n")
        feeder.stdin.flush()
        with Admin(cluster=cluster.name) as admin:
            assert eventually(lambda: admin.describe_topic(made)["end_position"] == 2)
        for number in ignoring:
            feeder.send_signal(number)
        feeder.communicate(b"three\n", timeout=SECONDS)
    assert feeder.returncode == 0
    assert read_topic(cluster.name, made) == [b"one", b"two", b"three"]


# ---- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["9999-12-31T00:00:00Z", "@1e11"])
def test_a_place_that_cannot_be_asked_for_is_refused_with_those_that_can(cluster: Cluster, made: str, place: str) -> None:
    for command in (f"consume {made} --from {place}", f"group reset {made} g --to {place}"):
        done = shell(f"{COMMAND} {command} --cluster {cluster.name}")
        assert (done.returncode, "allowed are" in done.stderr) == (2, True), done.stderr


def test_places_before_the_end_and_times_ago(cluster: Cluster, made: str) -> None:
    shell(f"seq 10 | {COMMAND} produce {made} --cluster {cluster.name}")
    for place, first in (("-1", "10"), ("-1000", "one"), ("1h", "one"), ("@-5", "one")):
        done = shell(f"{COMMAND} consume {made} --from '{place}' --cluster {cluster.name}")
        assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, first, ""), place
    done = shell(f"{COMMAND} group reset {made} g --to -2 --json --cluster {cluster.name}")
    assert json.loads(done.stdout)["position"] == 9
    for place, remark in (("11", "there is nothing from 11 on"), ("5000", "ends at position 11"),
                          ("2100-01-01", "nothing was published"), ("end", "")):
        done = shell(f"{COMMAND} consume {made} --from {place} --cluster {cluster.name}")
        assert (done.returncode, done.stdout) == (0, "")
        assert remark in done.stderr
        assert bool(remark) == bool(done.stderr)
