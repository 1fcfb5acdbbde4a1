"""The `cxlmq` command against a running cluster: what it prints, what it refuses, and its exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from broker.errors import ConfigError, RegionMissing
from client.admin import Admin
from client.cli.main import run
from client.cluster import Cluster
from client.publisher import Publisher
from client.subscriber import Subscriber
from tests.end_to_end.conftest import traces, unique
from tests.end_to_end.library_support import eventually

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "client.cli.main"]
CAN_LOG = ROOT / "tests/data/can-2014.log"


class Cli:
    """Runs command lines in this process, on the module's cluster."""

    def __init__(self, cluster: str, capture: pytest.CaptureFixture[bytes]) -> None:
        self.cluster = cluster
        self._capture = capture
        self.out, self.err = b"", ""

    def __call__(self, *arguments: object, code: int = 0) -> bytes:
        """Run a command that takes --cluster; its standard output. Checks the exit code."""
        return self.plain(*arguments, "--cluster", self.cluster, code=code)

    def plain(self, *arguments: object, code: int = 0) -> bytes:
        """Run a command as it is."""
        self._capture.readouterr()
        ended = run([str(each) for each in arguments])
        out, err = self._capture.readouterr()
        self.out, self.err = out, err.decode()
        assert ended == code, f"exit code {ended}: {self.err}"
        assert "Traceback" not in self.err
        return self.out

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Run with --json and decode the one document."""
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def cli(cluster: Cluster, capfdbinary: pytest.CaptureFixture[bytes]) -> Cli:
    return Cli(cluster.name, capfdbinary)


@pytest.fixture
def made(cli: Cli, topic: str) -> str:
    """A topic with three messages."""
    cli("topic", "create", topic)
    produce(cli, topic, b"one\n\nthree\n")
    return topic


def produce(cli: Cli, topic: str, data: bytes, *options: str, code: int = 0) -> str:
    """Publish some bytes from a pipe; what was said on standard error."""
    ended = subprocess.run([*COMMAND, "produce", topic, "--cluster", cli.cluster, *options], cwd=ROOT, input=data,
                           capture_output=True, timeout=60, check=False)
    assert ended.returncode == code, ended.stderr.decode()
    return (ended.stdout + ended.stderr).decode()


def one_error(text: str) -> str:
    """The error line, which is the only one."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: "), text
    return lines[0]


# ---- help and usage ----------------------------------------------------------------------------------------------

COMMANDS = ["cluster up", "cluster status", "cluster down", "broker", "topic create", "topic list", "topic describe",
            "topic delete", "topic alter", "cluster list", "produce", "consume", "region inspect", "region gc", "region layout"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"cxlmq {command}" in text
    assert "--json" in text
    assert "--debug" in text


def test_top_help_documents_exit_codes_and_loads_nothing() -> None:
    program = ("import sys; from client.cli.main import run; run(['--help']); "
               "print([m for m in ('numpy', 'grpc', 'rich', 'msgspec', 'psutil') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
    assert all(code in out for code in ("0 ", "1 ", "2 ", "3 ", "130 "))
    assert all(name in out for name in ("cluster", "broker", "topic", "produce", "consume", "region"))


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["topic", "nonsense"], ["topic", "create"], ["consume", "t", "--from", "yesterday"],
    ["consume", "t", "-f", "%z"], ["produce", "t", "--whole", "--length-prefixed"], ["produce", "t", "--ack", "7"],
    ["produce", "t", "/no/such/file"], ["topic", "create", "no/slash"], ["consume", "bad name"],
    ["topic", "create", "t", "--order", "3"], ["topic", "create", "t", "--ack", "2"],
    ["topic", "create", "t", "--ack", "3"], ["topic", "create", "t", "--rf", "0"],
    ["topic", "create", "t", "--retention", "much"], ["topic", "list", "--cluster", "a", "--bootstrap", "b:1"],
    ["cluster", "up", "--brokers", "many"], ["cluster", "up", "--waiting", "never"],
    ["cluster", "up", "--region-bytes", "1MiB", "--brokers", "16"], ["cluster", "up", "--config", "/no/such.toml"],
    ["broker", "--id", "4"], ["cluster", "down", "../other"],
])
def test_wrong_usage_is_refused_with_2_before_anything_happens(
        arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    one_error(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [
    ["topic", "list"], ["consume", "t"], ["cluster", "status"], ["region", "inspect"], ["cluster", "down"]])
def test_missing_cluster_is_3_and_says_which_run(cli: Cli, arguments: list[str]) -> None:
    name = unique("missing")
    positional = arguments[0] in ("cluster", "region")
    cli.plain(*arguments, *([name] if positional else ["--cluster", name]), code=3)
    assert name in one_error(cli.err)
    if arguments[0] != "cluster" or arguments[1] != "down":
        assert cli.cluster in cli.err


def test_errors_as_json(cli: Cli) -> None:
    cli("consume", "nothing-here", "--json", code=3)
    assert json.loads(cli.err)["error"] == "unknown-topic"
    cli("consume", "--json", code=2)
    assert json.loads(cli.err)["error"] == "usage"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["topic", "list", "--cluster", unique("missing"), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


# ---- topics ------------------------------------------------------------------------------------------------------


def test_topic_life(cli: Cli, topic: str) -> None:
    made = cli.json("topic", "create", topic, "--order", 2, "--ack", 2, "--rf", 2, "--retention", "1MiB")
    assert (made["order"], made["ack"], made["replication_factor"], made["retention_bytes"]) == (2, 2, 2, 1 << 20)
    assert topic in [each["name"] for each in cli.json("topic", "list")]
    assert cli.json("topic", "describe", topic)["end_position"] == 0
    assert topic.encode() in cli("topic", "list")
    assert b"replication factor   2" in cli("topic", "describe", topic)
    cli("topic", "create", topic, code=1)
    assert "duplicate-topic" in one_error(cli.err)
    assert cli.json("topic", "delete", topic) == {"deleted": [topic]}
    cli("topic", "describe", topic, code=3)
    assert "unknown-topic" in one_error(cli.err)
    cli("topic", "delete", topic, code=3)
    cli("topic", "delete", topic, "--if-exists")


def test_order_4_is_an_alias_and_said(cli: Cli, topic: str) -> None:
    assert cli.json("topic", "create", topic, "--order", 4)["order"] == 5
    assert "alias" in cli.err


def test_replication_factor_above_the_brokers_is_refused_by_the_cluster(cli: Cli, topic: str) -> None:
    cli("topic", "create", topic, "--rf", 5, code=2)
    assert "1 to the number of brokers (4)" in one_error(cli.err)


# ---- produce and consume -----------------------------------------------------------------------------------------


def test_lines_go_in_and_come_out(cli: Cli, made: str) -> None:
    assert cli("consume", made) == b"one\n\nthree\n"
    assert cli("consume", made, "--from", 1) == b"\nthree\n"
    assert cli("consume", made, "--count", 1) == b"one\n"
    assert cli("consume", made, "--from", 1, "--count", 1, "-f", "[%s]") == b"[]"
    assert cli("consume", made, "--count", 0) == cli("consume", made, "--from", "end") == b""
    assert cli("consume", made, "--from", 99) == b""


def test_formats(cli: Cli, made: str) -> None:
    assert cli("consume", made, "-f", r"%t:%o:%S:%s\x3b") == f"{made}:0:3:one;{made}:1:0:;{made}:2:5:three;".encode()
    assert cli("consume", made, "-f", "%R%s") == b"\0\0\0\x03one\0\0\0\0\0\0\0\x05three"


def test_json_messages_are_one_a_line(cli: Cli, made: str) -> None:
    lines = [json.loads(line) for line in cli("consume", made, "--json").splitlines()]
    assert [(each["position"], each["payload"]) for each in lines] == [(0, "one"), (1, ""), (2, "three")]
    assert all(abs(each["timestamp_ms"] - time.time() * 1000) < 60_000 for each in lines)


def test_produce_says_what_it_did(cli: Cli, topic: str) -> None:
    said = produce(cli, topic, b"a\nbc\n", "--create")
    assert "2 messages, 3 bytes" in said
    assert "position 1" in said
    values = json.loads(produce(cli, topic, b"d", "--json"))
    assert (values["messages"], values["bytes"], values["acknowledged"], values["last_position"]) == (1, 1, 1, 2)
    assert produce(cli, topic, b"", "--json", "--create").count("\n") == 1


def test_real_log_comes_back_identical(cli: Cli, topic: str) -> None:
    cli("produce", topic, CAN_LOG, "--create", "--batch-size", "8KiB")
    assert "6,158 messages" in cli.err
    assert cli("consume", topic) == CAN_LOG.read_bytes()
    assert cli.json("topic", "describe", topic)["end_position"] == 6158


def test_three_subscribers_at_different_times(cli: Cli, topic: str) -> None:
    cli("topic", "create", topic)
    early = subprocess.Popen([*COMMAND, "consume", topic, "--follow", "--count", "6158", "--cluster", cli.cluster],
                             cwd=ROOT, stdout=subprocess.PIPE)
    feeder = subprocess.Popen([*COMMAND, "produce", topic, "--cluster", cli.cluster], cwd=ROOT, stdin=subprocess.PIPE)
    lines = CAN_LOG.read_bytes().splitlines(keepends=True)
    assert feeder.stdin
    feeder.stdin.write(b"".join(lines[:3000]))
    feeder.stdin.flush()
    middle = subprocess.Popen([*COMMAND, "consume", topic, "--follow", "--count", "6158", "--cluster", cli.cluster],
                              cwd=ROOT, stdout=subprocess.PIPE)
    feeder.stdin.write(b"".join(lines[3000:]))
    feeder.stdin.close()
    assert feeder.wait(30) == 0
    expected = CAN_LOG.read_bytes()
    assert early.communicate(timeout=30)[0] == middle.communicate(timeout=30)[0] == expected
    assert cli("consume", topic) == expected


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_every_order_delivers_every_message(cli: Cli, topic: str, order: int) -> None:
    cli("topic", "create", topic, "--order", order)
    sent = [b"%d" % number for number in range(2000)]
    produce(cli, topic, b"\n".join(sent), "--batch-size", "4KiB")
    found = cli("consume", topic).splitlines()
    assert sorted(found) == sorted(sent)
    if order == 5:
        assert found == sent


def test_length_prefixed_binary(cli: Cli, topic: str) -> None:
    messages = [b"\0\n\xff", b"", os.urandom(5000)]
    data = b"".join(len(each).to_bytes(4, "little") + each for each in messages)
    produce(cli, topic, data, "--create", "--length-prefixed")
    assert cli("consume", topic, "-f", "%s") == b"".join(messages)
    assert cli("consume", topic, "-f", "%S ") == b"3 0 5000 "
    piped = cli("consume", topic, "-f", "%R%s")
    produce(cli, topic, piped, "--length-prefixed", "--big-endian")
    assert cli("consume", topic, "--from", 3, "-f", "%R%s") == piped


def test_truncated_input_says_what_is_in(cli: Cli, topic: str) -> None:
    said = one_error(produce(cli, topic, b"\x01\0\0\0a\x09\0\0\0b", "--create", "--length-prefixed", "--json", code=1)
                     .replace("{", "error: {", 1))
    assert json.loads(said.removeprefix("error: "))["acknowledged"] == 1
    assert cli("consume", topic, "-f", "%s") == b"a"


def test_whole_input_and_kept_newlines(cli: Cli, topic: str) -> None:
    produce(cli, topic, b"a\nb\n", "--create", "--whole")
    produce(cli, topic, b"c\nd", "--keep-newline")
    assert cli("consume", topic, "-f", "<%s>") == b"<a\nb\n><c\n><d>"


def test_message_too_big_is_refused(cli: Cli, topic: str) -> None:
    said = produce(cli, topic, b"small\n" + b"x" * (5 << 20), "--create", code=1)
    assert "message-too-big" in said
    assert "1 of 2 messages are acknowledged" in said
    assert cli("consume", topic) == b"small\n"


def test_unknown_topic(cli: Cli, topic: str) -> None:
    assert "unknown-topic" in one_error(produce(cli, topic, b"x", code=3))
    cli("consume", topic, code=3)


def test_ack_2_on_a_replicated_topic(cli: Cli, topic: str) -> None:
    cli("topic", "create", topic, "--ack", 2, "--rf", 2)
    assert json.loads(produce(cli, topic, b"a\nb\n", "--json"))["acknowledged"] == 2


def test_closed_pipe_is_quiet(cli: Cli, topic: str) -> None:
    cli("produce", topic, CAN_LOG, "--create")
    reader = f"{' '.join(COMMAND)} consume {topic} --cluster {cli.cluster} -f '%s %s\\n'"
    shell = f"{reader} | head -2; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[2] == "0"


def test_follow_prints_at_once_and_ctrl_c_ends_it(cli: Cli, made: str) -> None:
    reader = subprocess.Popen([*COMMAND, "consume", made, "--from", "end", "--follow", "--cluster", cli.cluster],
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not any(each["state"] for each in cursors(cli.cluster)) and time.monotonic() < deadline:
        time.sleep(0.05)
    produce(cli, made, b"four\n")
    assert reader.stdout
    assert reader.stdout.readline() == b"four\n"
    reader.send_signal(signal.SIGINT)
    _, err = reader.communicate(timeout=20)
    assert reader.returncode == 130
    assert b"Traceback" not in err


def cursors(name: str) -> list[dict[str, Any]]:
    from broker.inspection import inspect_region
    from broker.region import attach_region

    with attach_region(name, writable=False) as region:
        return inspect_region(region)["cursors"]


def test_typed_input_is_sent_line_by_line(cli: Cli, made: str) -> None:
    feeder = subprocess.Popen([*COMMAND, "produce", made, "--cluster", cli.cluster], cwd=ROOT, stdin=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    assert feeder.stdin
    feeder.stdin.write(b"four\n")
    feeder.stdin.flush()
    with Admin(cluster=cli.cluster) as admin:
        deadline = time.monotonic() + 20
        while admin.describe_topic(made)["end_position"] < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert admin.describe_topic(made)["end_position"] == 4
    feeder.communicate(timeout=20)
    assert feeder.returncode == 0


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_the_library_takes_the_cluster_that_the_command_takes(
        cluster: Cluster, topic: str, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXLMQ_NAME", cluster.name)
    assert run(["topic", "create", topic]) == 0
    with Admin() as admin:
        assert admin.describe_topic(topic)["end_position"] == 0
    with Publisher(topic, transport=transport) as publisher:
        publisher.publish(b"m").result(20)
    with Subscriber(topic, transport=transport) as subscriber:
        assert [bytes(each.payload) for each in subscriber.fetch(1, 20)] == [b"m"]
    monkeypatch.setenv("CXLMQ_NAME", unique("missing"))
    for client in (Admin, lambda: Publisher(topic, transport=transport), lambda: Subscriber(topic, transport=transport)):
        with pytest.raises(RegionMissing), client() as opened:
            opened.list_topics()
    monkeypatch.setenv("CXLMQ_NAME", "a/b")
    for client in (Admin, lambda: Publisher(topic, transport=transport), lambda: Subscriber(topic, transport=transport)):
        with pytest.raises(ConfigError, match="name"):
            client()
    monkeypatch.delenv("CXLMQ_NAME")
    monkeypatch.setenv("CXLMQ_NAMES", cluster.name)
    with pytest.raises(ConfigError, match="is CXLMQ_NAME meant"):
        Admin()
    assert run(["topic", "list"]) == 2


def test_clusters_are_listed_with_their_heads(cli: Cli, made: str) -> None:
    found = {each["name"]: each for each in json.loads(cli.plain("cluster", "list", "--json"))}
    assert (found[cli.cluster]["live"], found[cli.cluster]["brokers"], found[cli.cluster]["head"]) == (True, "4 of 4", 0)
    assert cli.cluster.encode() in cli.plain("cluster", "list")
    assert json.loads(cli.plain("cluster", "status", cli.cluster, "--json"))["head"] == 0
    assert b"head 0" in cli.plain("cluster", "status", cli.cluster)
    assert b"0 (head)" in cli("cluster", "status")


def test_bootstrap_instead_of_a_name(cli: Cli, cluster: Cluster, made: str) -> None:
    for address in (cluster.addresses[2].tcp, cluster.addresses[1].unix):
        assert cli.plain("consume", made, "--bootstrap", address) == b"one\n\nthree\n"
    assert cluster.addresses[0].tcp.encode() in cli.plain("cluster", "status", "--bootstrap", cluster.addresses[0].tcp)
    cli.plain("topic", "list", "--bootstrap", "127.0.0.1:9", code=1)
    assert "broker-unavailable" in one_error(cli.err)


# ---- cluster and region ------------------------------------------------------------------------------------------


def test_status(cli: Cli, made: str) -> None:
    values = json.loads(cli.plain("cluster", "status", cli.cluster, "--json"))
    assert [each["state"] for each in values["brokers"]] == ["ready"] * 4
    assert all(each["alive"] and each["rss_bytes"] > 1 << 20 and each["heartbeat_age_ms"] < 5000
               and each["cpu_percent"] is not None for each in values["brokers"])
    found = next(each for each in values["topics"] if each["name"] == made)
    assert (found["first_position"], found["end_position"], found["order"]) == (0, 3, 5)
    assert found["messages_per_second"] == 0
    assert made.encode() in cli.plain("cluster", "status", cli.cluster)


def test_status_watches_as_a_stream_of_json(cli: Cli) -> None:
    watcher = subprocess.Popen([*COMMAND, "cluster", "status", cli.cluster, "--watch", "--json", "--interval", "50ms"],
                               cwd=ROOT, stdout=subprocess.PIPE)
    assert watcher.stdout
    looks = [json.loads(watcher.stdout.readline()) for _ in range(3)]
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert looks[0]["brokers"][0]["cpu_percent"] is None
    assert looks[2]["brokers"][0]["cpu_percent"] is not None


def test_inspect_and_gc(cli: Cli, made: str) -> None:
    values = json.loads(cli.plain("region", "inspect", cli.cluster, "--json"))
    assert {"superblock", "brokers", "topics", "pool", "statistics"} <= values.keys()
    assert made.encode() in cli.plain("region", "inspect", cli.cluster)
    kept = json.loads(cli.plain("region", "gc", "--dry-run", "--json"))["kept"]
    assert cli.cluster in [each["name"] for each in kept]
    cli.plain("region", "gc", "--dry-run")


def test_layout(cli: Cli, tmp_path: Path) -> None:
    text = cli.plain("region", "layout", "--brokers", 2, "--region-bytes", "64MiB").decode()
    assert text.startswith("# Data structures")
    assert "2 brokers" in text
    cli.plain("region", "layout", "--brokers", 2, "--region-bytes", "64MiB", "--output", tmp_path / "map.md")
    assert (tmp_path / "map.md").read_text() == text


def test_up_detached_status_and_down(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = unique("test")
    (tmp_path / "small.toml").write_text(f'[cluster]\nname = "{name}"\nbrokers = 2\nregion_bytes = "64MiB"\n')
    assert run(["cluster", "up", "--detach", "--config", str(tmp_path / "small.toml")]) == 0
    try:
        said = capsys.readouterr().out
        assert "broker 1" in said
        assert f"cxlmq cluster down {name}" in said
        assert run(["cluster", "up", "--detach", "--name", name]) == 1
        assert "region-foreign" in one_error(capsys.readouterr().err)
        assert run(["cluster", "status", name, "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        os.kill(status["brokers"][1]["pid"], signal.SIGKILL)
        assert eventually(lambda: run(["cluster", "status", name]) == 1, 20.0)
    finally:
        assert run(["cluster", "down", name]) == 0
    assert traces(name) == []


def test_brokers_by_hand_and_down(capsys: pytest.CaptureFixture[str]) -> None:
    name = unique("test")
    brokers = [subprocess.Popen([*COMMAND, "broker", "--id", str(number), "--brokers", "2", "--region-bytes", "64MiB",
                                 "--name", name], cwd=ROOT) for number in (0, 1)]
    try:
        assert eventually(lambda: run(["cluster", "status", name]) == 0, 20.0)
    finally:
        ended = run(["cluster", "down", name])
        codes = [each.wait(20) for each in brokers]
    capsys.readouterr()
    assert (ended, codes) == (0, [0, 0])
    assert traces(name) == []


def test_short_writes_are_continued() -> None:
    from client.cli.output import _write_all

    written = io.BytesIO()
    _write_all(1, b"abcdef", lambda descriptor, data: written.write(data[:2]))
    assert written.getvalue() == b"abcdef"
