"""The measuring scripts as users call them: tiny totals, every field of the report, nothing left behind."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from client.bench import throughput as throughput_module
from client.bench.workload import Workload
from client.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path("/dev/shm")
# A script sets up what it needs first: in a fresh checkout that takes minutes.
pytestmark = pytest.mark.timeout(900)

TINY = {"NUM_BROKERS": "2", "REGION_SIZE": "32MiB", "TOTAL_MESSAGE_SIZE": "20MiB", "MESSAGE_SIZE": "1000",
        "BATCH_SIZE": "128KiB", "TRANSPORT": "grpc"}
FIELDS = {
    "transport", "brokers", "publishers", "message_bytes", "batch_bytes", "total_bytes", "order", "ack",
    "replication_factor", "seconds", "gigabytes_per_second", "messages_per_second", "batches_per_second",
    "ack_latency_us", "verified", "verified_bytes", "sequencer_lock", "flushes", "fences", "cpu_seconds", "limits"}
LATENCY_FIELDS = {"p50", "p99", "p999"}
LOCK_FIELDS = {"mode", "acquisitions", "contended", "contended_per_second", "wait_us", "advice"}
LIMIT_FIELDS = {"memcpy_gigabytes_per_second", "nontemporal_gigabytes_per_second", "grpc_gigabytes_per_second"}


def script(name: str, *arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script with exactly these variables of ours."""
    known = {"NUM_PUBLISHERS", "ORDER", "ACK", "REPLICATION_FACTOR", "NUM_TRIALS", "SEQUENCER_LOCK", "WAIT", "SCANNERS",
             "NETWORK", *TINY}
    environment = {key: value for key, value in os.environ.items() if key not in known}
    return subprocess.run(["bash", str(ROOT / "scripts" / name), *map(str, arguments)], capture_output=True, text=True,
                          env={**environment, **variables}, timeout=900, check=False)


def leftovers() -> set[str]:
    """Clusters of benchmarks that are still there."""
    return {path.name for path in SHARED.glob("*cxlmq-bench-*")}


def throughput(tmp_path: Path, *arguments: object, **variables: str) -> dict[str, Any]:
    """Run the script, which must succeed; its report."""
    target = tmp_path / "report.json"
    done = script("run_throughput.sh", "--json", target, "--results", tmp_path / "results", *arguments,
                  **{**TINY, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(target.read_text())
    return report


def check_run(found: dict[str, Any]) -> None:
    """Every named field is there and makes sense."""
    assert found.keys() >= FIELDS
    assert found["ack_latency_us"].keys() >= LATENCY_FIELDS
    assert found["sequencer_lock"].keys() >= LOCK_FIELDS
    assert found["limits"].keys() >= LIMIT_FIELDS
    assert found["verified"] is True
    assert found["verified_bytes"] == found["total_bytes"] > 0
    assert found["gigabytes_per_second"] == pytest.approx(found["total_bytes"] / found["seconds"] / 1e9)
    assert min(found["flushes"], found["fences"], found["batches_per_second"]) > 0
    assert min(found["cpu_seconds"]["publishers"], found["cpu_seconds"]["brokers"]) > 0


def test_everything_is_published_read_back_and_reported(tmp_path: Path) -> None:
    before = leftovers()
    report = throughput(tmp_path)               # with the limits of the machine
    check_run(report)
    assert all(report["limits"][name] > 0 for name in LIMIT_FIELDS)
    assert report["total_bytes"] == 20 * 1024 * 1024 // 1000 * 1000
    assert (report["brokers"], report["message_bytes"], report["batch_bytes"]) == (2, 1000, 128 << 10)
    assert report["rounds"] > 1                 # the region keeps less than was published
    assert report["warm_up"]["verified_bytes"] == report["warm_up"]["bytes"] > 0
    assert 0 < report["ack_latency_us"]["p50"] <= report["ack_latency_us"]["p99"] <= report["ack_latency_us"]["p999"]
    assert report["machine"]["cores"] >= 1
    assert leftovers() == before
    folder, = (tmp_path / "results").iterdir()
    assert json.loads((folder / "report.json").read_text()) == report
    assert "every byte, in order" in (folder / "table.txt").read_text()


def test_several_publishers_and_trials_are_a_list_of_runs(tmp_path: Path) -> None:
    report = throughput(tmp_path, "--no-limits", NUM_TRIALS="2", NUM_PUBLISHERS="3", TOTAL_MESSAGE_SIZE="8MiB",
                        SEQUENCER_LOCK="mutex", BATCH_SIZE="adaptive", WAIT="saver")
    assert [each["trial"] for each in report["runs"]] == [1, 2]
    for each in report["runs"]:
        check_run(each)
        assert (each["publishers"], each["sequencer_lock"]["mode"]) == (3, "mutex")
        assert each["sequencer_lock"]["acquisitions"] > 0
        assert set(each["limits"].values()) == {None}
    assert report["medians"]["grpc"]["gigabytes_per_second"] > 0


@pytest.mark.parametrize("variables", [
    {"ORDER": "0", "ACK": "0"}, {"ORDER": "2", "ACK": "1"}, {"ACK": "2", "REPLICATION_FACTOR": "2"},
    {"MESSAGE_SIZE": "5", "TOTAL_MESSAGE_SIZE": "100KB"}, {"MESSAGE_SIZE": "1MiB", "BATCH_SIZE": "64KiB"},
    {"NETWORK": "tcp"}], ids=lambda variables: "-".join(f"{key}={value}" for key, value in variables.items()))
def test_orders_acks_sizes_and_networks(tmp_path: Path, variables: dict[str, str]) -> None:
    report = throughput(tmp_path, "--no-limits", **{"TOTAL_MESSAGE_SIZE": "8MiB", **variables})
    assert report["verified"] is True
    assert report["verified_bytes"] == report["total_bytes"] > 0


def test_both_transports_stand_side_by_side(tmp_path: Path) -> None:
    report = throughput(tmp_path, "--no-limits", TRANSPORT="both", TOTAL_MESSAGE_SIZE="8MiB")
    assert {each["transport"] for each in report["runs"]} == {"attached", "grpc"} == report["medians"].keys()
    for each in report["runs"]:
        check_run(each)


def test_a_difference_is_reported_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reader expects other bytes than the publishers send, as if a segment had been overwritten."""
    monkeypatch.setattr(throughput_module.load, "period_of", lambda message_bytes: 2)
    values = {"brokers": 1, "region_bytes": "16MiB", "message_bytes": "1000", "total_bytes": "1MB", "transport": "grpc"}
    report = throughput_module.measure_workload(Workload.parse(values), limits=False)["runs"][0]
    assert report["verified"] is False
    assert re.fullmatch(r"position 2, publisher 1, sequence 2, byte \d+: the content differs from what was published",
                        report["difference"])
    arguments = [*(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), "--no-limits", "--quiet"]
    assert run(["bench", "throughput", "--json", str(tmp_path / "report.json"), *arguments]) == 1
    assert json.loads((tmp_path / "report.json").read_text())["verified"] is False


@pytest.mark.parametrize(("variable", "value", "allowed"), [
    ("NUM_BROKERS", "many", "1 to 64"), ("MESSAGE_SIZE", "64MiB", "1 to"), ("ORDER", "3", "0, 1, 2, 4, 5"),
    ("ACK", "2", "use ack 1"), ("SEQUENCER_LOCK", "spin", "mutex, semaphore, atomic"),
    ("TRANSPORT", "pigeon", "grpc, attached, both"), ("REGION_SIZE", "1", "1048576")])
def test_a_wrong_value_is_refused_before_anything_starts(tmp_path: Path, variable: str, value: str,
                                                         allowed: str) -> None:
    target, before = tmp_path / "report.json", leftovers()
    done = script("run_throughput.sh", "--json", target, "--results", tmp_path / "results",
                  **{**TINY, variable: value})
    assert done.returncode == 2, done.stdout + done.stderr
    assert allowed in done.stderr
    assert "starting" not in done.stderr
    assert done.stdout == ""
    assert not target.exists()
    assert not (tmp_path / "results").exists()
    assert leftovers() == before


def test_a_json_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = script("run_throughput.sh", "--json", tmp_path / "missing" / "report.json", **TINY)
    assert done.returncode == 2
    assert "folder that exists" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: int) -> None:
    before = leftovers()
    environment = {**os.environ, **TINY, "TOTAL_MESSAGE_SIZE": "100GiB"}
    with subprocess.Popen(["bash", str(ROOT / "scripts/run_throughput.sh"), "--no-limits", "--results",
                           str(tmp_path / "results")], env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "round 2" in line or "warm-up" in line:
                break
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(60) == 130
    deadline = time.monotonic() + 10
    while leftovers() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers() == before


@pytest.mark.parametrize("name", ["run_throughput.sh", "measure_mutex_contention.sh", "measure_performance_simple.sh",
                                  "measure_performance_baseline.sh", "profile_hot_paths.sh"])
def test_every_script_explains_itself(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage:")


def test_locks_are_compared_on_the_stage_alone(tmp_path: Path) -> None:
    target = tmp_path / "contention.json"
    done = script("measure_mutex_contention.sh", "--json", target, "--quick", "--stage-only", "--results",
                  tmp_path / "results")
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["stage_alone"]
    assert {(row["lock"], row["scanners"]) for row in rows} == {
        (lock, scanners) for lock in ("mutex", "semaphore", "atomic") for scanners in (1, 2, 4)}
    for row in rows:
        assert row["million_batches_per_second"] > 0.01
        assert row["advice"]
        if row["lock"] != "atomic":
            assert row["acquisitions"] >= row["batches"]


def test_repeated_runs_become_statistics_and_a_baseline(tmp_path: Path) -> None:
    baseline, table = tmp_path / "baseline.json", tmp_path / "runs.csv"
    arguments = ("--no-limits", "--csv", table, "--results", tmp_path / "results")
    variables = {**TINY, "NUM_TRIALS": "2", "TOTAL_MESSAGE_SIZE": "2MiB"}
    done = script("measure_performance_simple.sh", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    header, *rows = table.read_text().splitlines()
    assert header == "case,transport,figure,trials,mean,median,deviation,p95,p99,min,max"
    assert any(row.startswith("run,grpc,gigabytes_per_second,2,") for row in rows)
    done = script("measure_performance_simple.sh", *arguments, "--baseline", baseline, "--store-baseline", **variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(baseline.read_text())["rows"]
    done = script("measure_performance_simple.sh", *arguments, "--baseline", baseline, **variables)
    assert done.returncode in (0, 1)            # so tiny a run may well be slower
    assert "Against the baseline" in done.stdout


# ---- machines that lack something ----------------------------------------------------------------------------------


def on_a_machine(preparation: str, name: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script where `preparation` has changed what is mounted, for it alone."""
    done = subprocess.run(["unshare", "--mount", "bash", "-c", f'{preparation} || exit 99; exec bash "$0" "$@"',
                           str(ROOT / "scripts" / name), *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, **variables}, timeout=900)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()[:200]}")
    return done


@pytest.mark.parametrize(("room", "arguments"), [
    ("24m", ()), ("24m", ("--no-limits",)), ("100m", ()), ("300m", ()), ("300m", ("--no-limits",))])
def test_a_shared_memory_that_is_too_small_is_one_error(room: str, arguments: tuple[str, ...]) -> None:
    done = on_a_machine(f"mount -t tmpfs -o size={room} tmpfs /dev/shm", "run_throughput.sh", "--quiet", *arguments,
                        NUM_BROKERS="2", TOTAL_MESSAGE_SIZE="20MiB", TRANSPORT="grpc")
    assert done.returncode == 1
    assert "tmpfs-too-small" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr


def test_a_checkout_that_cannot_be_written_says_so() -> None:
    readonly = f"mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT}"
    done = on_a_machine(readonly, "run_throughput.sh", CXLMQ_EXTRAS="none-of-ours")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
