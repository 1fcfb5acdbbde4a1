"""Reports, statistics and the refusal of wrong workloads; nothing is started here."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from broker.config import layout_of
from broker.errors import ConfigError, RegionTooSmall
from client.bench import flamegraph, repeat, report
from client.bench.throughput import (
    Reading,
    Totals,
    lock_advice,
    wanted_transports,
)
from client.bench.workload import Workload

LIMITS = {"memcpy_gigabytes_per_second": 10.0, "nontemporal_gigabytes_per_second": 20.0,
          "grpc_gigabytes_per_second": 2.0}


def a_run(transport: str = "grpc", gigabytes_per_second: float = 1.5, **changes: Any) -> dict[str, Any]:
    """A run as `measure_run` reports it."""
    return {
        "transport": transport, "brokers": 4, "publishers": 1, "message_bytes": 1024, "batch_bytes": 1 << 20,
        "total_bytes": 3_000_000_000, "order": 5, "ack": 1, "replication_factor": 1, "network": "unix", "trial": 1,
        "seconds": 2.0, "gigabytes_per_second": gigabytes_per_second, "messages_per_second": 1e6,
        "batches_per_second": 1500.0, "ack_latency_us": {"p50": 5000.0, "p99": 9000.0, "p999": 9500.0},
        "verified": True, "verified_bytes": 3_000_000_000, "difference": None, "rounds": 6,
        "read_back": {"gigabytes_per_second": 1.2}, "warm_up": {"bytes": 10**9, "seconds": 0.7},
        "sequencer_lock": {"mode": "mutex", "acquisitions": 3000, "contended": 10, "contended_per_second": 5.0,
                           "wait_us": 12.0, "advice": "5 contentions/s: the mutex is fine (under 100/s)"},
        "hold_buffer_peak": 20, "flushes": 100, "fences": 50, "flushes_per_gigabyte": 33.0, "fences_per_gigabyte": 16.0,
        "cpu_seconds": {"publishers": 1.0, "brokers": 2.0}, "limits": LIMITS, **changes,
    }


def measured(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"runs": list(runs), "limits": LIMITS}


# ---- the document --------------------------------------------------------------------------------------------------


def test_one_run_is_the_document_itself() -> None:
    document = report.document(measured(a_run()))
    assert "runs" not in document
    assert document["gigabytes_per_second"] == 1.5
    assert document["machine"]["cores"] >= 1
    json.dumps(document)


def test_several_runs_are_a_list_with_medians_beside_it() -> None:
    runs = [a_run("grpc", 1.0), a_run("grpc", 3.0), a_run("grpc", 2.0), a_run("attached", 20.0)]
    document = report.document(measured(*runs))
    assert [run["gigabytes_per_second"] for run in document["runs"]] == [1.0, 3.0, 2.0, 20.0]
    assert document["medians"]["grpc"]["gigabytes_per_second"] == 2.0
    assert document["medians"]["grpc"]["trials"] == 3
    assert document["medians"]["attached"]["ack_latency_us"]["p99"] == 9000.0
    assert document["verified"]


def test_one_wrong_run_makes_the_document_wrong() -> None:
    assert not report.document(measured(a_run(), a_run(verified=False, difference="position 7")))["verified"]


def test_medians_leave_out_what_was_not_measured() -> None:
    none = {"p50": None, "p99": None, "p999": None}
    found = report.medians([a_run(ack_latency_us=none), a_run()])
    assert found["grpc"]["ack_latency_us"]["p50"] == 5000.0
    assert report.medians([a_run(ack_latency_us=none)])["grpc"]["ack_latency_us"]["p50"] is None


def test_the_text_says_what_matters() -> None:
    text = report.throughput_text(report.document(measured(a_run())))
    for wanted in ("1.500", "0.75  (of 2.00 GB/s)", "5,000 / 9,000 / 9,500 us", "every byte, in order",
                   "the mutex is fine", "limit: bare gRPC"):
        assert wanted in text
    wrong = a_run(verified=False, difference="position 7, publisher 1, byte 3: differs", ack_latency_us={"p50": None})
    text = report.throughput_text(report.document(measured(wrong)))
    assert "NO: position 7, publisher 1, byte 3" in text


def test_the_text_works_without_limits() -> None:
    without = dict.fromkeys(LIMITS)
    text = report.throughput_text(report.document({**measured(a_run(limits=without)), "limits": without}))
    assert "limit:" not in text


def test_bars_are_as_long_as_their_values() -> None:
    lines = report.bar_chart([("small", 1.0), ("large", 4.0)]).splitlines()
    assert lines[1].count("█") == report.BAR_CELLS == 4 * lines[0].count("█")
    assert report.bar_chart([]) == ""


def test_results_are_kept_in_a_folder_each(tmp_path: Path) -> None:
    document = report.document(measured(a_run()))
    folders = [report.save_results(tmp_path / "results", "name", document, "text", report.bars(document))
               for _ in range(2)]
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.name.partition("-name")[0].replace("-", "").isdigit()
        assert json.loads((folder / "report.json").read_text())["verified"] is True
        assert (folder / "table.txt").read_text() == "text\n"
        pytest.importorskip("matplotlib")
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "text"), [
    (0.0, "is fine"), (99.9, "is fine"), (100.0, "either works"), (1000.0, "either works"), (1000.1, "go lock-free")])
def test_the_advice_follows_the_rule_of_thumb(rate: float, text: str) -> None:
    assert text in lock_advice("mutex", rate)
    assert "lock-free already" in lock_advice("atomic", rate)


def test_rounds_add_up_from_the_first_publish_to_the_last_ack() -> None:
    totals = Totals()

    def answer(started: int, ended: int) -> dict[str, Any]:
        return {"started_ns": started, "ended_ns": ended, "batches": 3, "retries": 0, "cpu_seconds": 0.5,
                "latencies_ns": [1000, 2000]}

    def reading(value: int) -> Reading:
        return Reading({"flushes": value}, {"ring_full": value}, {"lock_contended": value}, float(value))

    totals.count([answer(10**9, 2 * 10**9), answer(15 * 10**8, 4 * 10**9)], reading(5), reading(8))
    totals.count([answer(10**10, 10**10 + 10**9)], reading(10), reading(11))
    assert totals.seconds == pytest.approx(4.0)
    assert (totals.rounds, totals.batches, totals.publisher_cpu_seconds) == (2, 9, 1.5)
    assert (totals.access, totals.sequencer, totals.broker_cpu_seconds) == ({"flushes": 4}, {"lock_contended": 4}, 4.0)
    assert numpy.concatenate(totals.latencies).size == 6


def test_statistics_of_repeated_runs() -> None:
    rows = repeat.statistics_of("case", [a_run(gigabytes_per_second=value) for value in (1.0, 2.0, 6.0)])
    row = next(each for each in rows if each["figure"] == "gigabytes_per_second")
    assert (row["mean"], row["median"], row["trials"]) == (3.0, 2.0, 3)
    assert row["deviation"] == pytest.approx(numpy.std([1.0, 2.0, 6.0], ddof=1))
    assert row["p95"] == pytest.approx(5.6)
    parsed = list(csv.DictReader(io.StringIO(repeat.csv_text(rows))))
    assert float(parsed[0]["mean"]) == rows[0]["mean"]
    assert repeat.summary([4.0])["deviation"] == 0.0


@pytest.mark.parametrize(("now", "verdict"), [(2.0, "same"), (1.9, "same"), (1.5, "worse"), (2.5, "better")])
def test_a_change_counts_beyond_the_noise(now: float, verdict: str) -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        return repeat.statistics_of("case", [a_run(gigabytes_per_second=value), a_run(gigabytes_per_second=value)])

    found = {each["figure"]: each["verdict"] for each in repeat.compare(rows(now), rows(2.0))}
    assert found["gigabytes_per_second"] == verdict
    assert found["ack_latency_us_p50"] == "same"


def test_more_latency_is_worse_and_noisy_figures_do_not_count() -> None:
    slow = a_run(ack_latency_us={"p50": 9000.0, "p99": 9000.0})
    before = repeat.statistics_of("case", [a_run(), a_run()])
    found = {each["figure"]: each["verdict"] for each in
             repeat.compare(repeat.statistics_of("case", [slow, slow]), before)}
    assert found["ack_latency_us_p50"] == "worse"
    noisy = [a_run(gigabytes_per_second=value) for value in (1.0, 1.4, 2.5)]
    found = {each["figure"]: each["verdict"] for each in repeat.compare(repeat.statistics_of("case", noisy), before)}
    assert found["gigabytes_per_second"] == "same"


def test_a_baseline_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in (None, "no json", "[]"):
        file = tmp_path / "baseline.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError, match="--store-baseline"):
            repeat.read_baseline(file)


# ---- workloads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "text"), [
    ("brokers", "x", "NUM_BROKERS"), ("brokers", "0", "1 to 64"), ("brokers", "2.5", "whole number"),
    ("brokers", "", "NUM_BROKERS"),
    ("publishers", "65", "NUM_PUBLISHERS"), ("message_bytes", "0", "MESSAGE_SIZE"),
    ("message_bytes", "1 furlong", "KiB"), ("message_bytes", "17MiB", "1 to 16777216"),
    ("total_bytes", "-1", "TOTAL_MESSAGE_SIZE"), ("total_bytes", "100", "at least one message"),
    ("batch_bytes", "65MiB", "BATCH_SIZE"), ("order", "3", "ORDER"), ("order", "6", "one of 0, 1, 2, 4, 5"), ("order", "3", "one of 0, 1, 2, 4, 5"),
    ("order", "-1", "ORDER"), ("order", "5.0", "ORDER"), ("ack", "3", "one of 0, 1, 2"), ("ack", "x", "ACK"),
    ("ack", "2", "REPLICATION_FACTOR"), ("replication_factor", "5", "REPLICATION_FACTOR"),
    ("trials", "0", "NUM_TRIALS"),
    ("sequencer_lock", "spin", "mutex, semaphore, atomic"), ("waiting", "never", "latency, balanced, saver"),
    ("transport", "pigeon", "grpc, attached, both"), ("network", "udp", "unix, tcp"), ("scanners", "5", "scanners"),
    ("nonsense", "1", "nonsense"),
])
def test_a_wrong_value_is_refused_with_what_is_allowed(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Workload.parse({name: value})
    assert text in str(caught.value)


def test_a_region_that_is_too_small_names_the_smallest() -> None:
    with pytest.raises(RegionTooSmall, match="at least"):
        Workload.parse({"region_bytes": "1MiB", "brokers": "64"})


def test_values_are_understood() -> None:
    workload = Workload.parse({"message_bytes": "1KiB", "total_bytes": "10MB", "batch_bytes": "adaptive", "order": "4",
                               "ack": "2", "replication_factor": "2", "brokers": None})
    assert (workload.message_bytes, workload.total_bytes, workload.batch_bytes) == (1024, 10_000_000, None)
    assert (workload.order, workload.brokers, workload.messages) == (5, 4, 9765)


def test_batches_are_smaller_in_a_small_region_unless_they_are_asked_for() -> None:
    assert Workload.parse({"region_bytes": "4MiB"}).batch_bytes == 256 << 10
    with pytest.raises(ConfigError, match="1 to 262144"):
        Workload.parse({"region_bytes": "4MiB", "batch_bytes": "1MiB"})


@pytest.mark.parametrize("batch", ["4096", "65536", "1MiB", "adaptive"])
@pytest.mark.parametrize("message", ["16", "1024", "100000", "1048576"])
def test_a_round_fits_into_what_the_region_keeps(message: str, batch: str) -> None:
    workload = Workload.parse({"message_bytes": message, "batch_bytes": batch})
    batches = workload.round_messages() / workload.batch_messages
    assert workload.round_messages() * workload.framed_bytes <= workload.region_bytes / 2
    assert batches <= 16384 / 2


def test_both_transports_are_measured_the_fast_one_first() -> None:
    assert wanted_transports(Workload.parse({})) == ["attached", "grpc"]
    assert wanted_transports(Workload.parse({"transport": "grpc"})) == ["grpc"]


# ---- flame graphs --------------------------------------------------------------------------------------------------


def test_a_flame_graph_is_drawn_from_samples() -> None:
    samples = """python 123 1.5: 100 cpu-clock:
        7f01 inner+0x10 (/lib/a.so)
        7f00 outer (/lib/a.so)

python 123 1.6: 100 cpu-clock:
        7f02 other<T>+0x1 (/lib/b.so)
        7f00 outer+0x5 (/lib/a.so)
"""
    root = flamegraph.parse(samples.splitlines())
    outer = root.children["python"].children["outer"]
    assert (root.samples, outer.samples, outer.children["inner"].samples) == (2, 2, 1)
    drawing = flamegraph.draw(root)
    assert drawing.startswith("<svg")
    assert "other&lt;T&gt;: 1 samples, 50.0%" in drawing


@pytest.mark.parametrize("brokers", [1, 4, 16, 64])
def test_a_round_leaves_room_for_the_segments_that_are_open_at_every_broker(brokers: int) -> None:
    workload = Workload.parse({"brokers": brokers, "publishers": 2})
    numbers = layout_of(workload.cluster_config("check")).numbers
    used = workload.round_messages() * workload.framed_bytes // numbers["segment_bytes"] + 1
    assert used + brokers * 2 * 4 < numbers["segment_count"]


def test_batches_larger_than_usual_are_allowed_when_the_region_has_room() -> None:
    workload = Workload.parse({"batch_bytes": "16MiB", "region_bytes": "512MiB"})
    assert workload.cluster_config("check").batch_bytes_max == 16 << 20
    with pytest.raises(ConfigError, match="BATCH_SIZE"):
        Workload.parse({"batch_bytes": "64MiB", "region_bytes": "512MiB"})
