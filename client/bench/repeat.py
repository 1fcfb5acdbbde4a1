"""The same measurement several times: how far can its figures be trusted, and have they changed since last time?

    cases ─► trials ─► mean, median, deviation, p95, p99 of each figure ─► table, CSV ─► against a stored baseline
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from broker.errors import ConfigError
from client.bench.throughput import measure_workload
from client.bench.workload import Workload

# Figure -> (where it is in a run, whether more is better).
FIGURES: dict[str, tuple[tuple[str, ...], bool]] = {
    "gigabytes_per_second": (("gigabytes_per_second",), True),
    "messages_per_second": (("messages_per_second",), True),
    "batches_per_second": (("batches_per_second",), True),
    "ack_latency_us_p50": (("ack_latency_us", "p50"), False),
    "ack_latency_us_p99": (("ack_latency_us", "p99"), False),
    "publisher_cpu_seconds": (("cpu_seconds", "publishers"), False),
    "broker_cpu_seconds": (("cpu_seconds", "brokers"), False),
}
COLUMNS = ("case", "transport", "figure", "trials", "mean", "median", "deviation", "p95", "p99", "min", "max")
# Less than a tenth is noise on a shared machine; so are two deviations.
NOISE_RATIO, NOISE_DEVIATIONS = 0.10, 2.0
# Small batches, large ones, and the one that people compare with.
BASELINE_CASES: dict[str, dict[str, Any]] = {
    "1 MiB batches": {},
    "64 KiB batches": {"batch_bytes": 64 << 10, "total_bytes": 512 << 20},
    "adaptive batches": {"batch_bytes": "adaptive"},
    "128 B messages": {"message_bytes": 128, "total_bytes": 512 << 20},
    "order 0": {"order": 0},
    "ack 2, 2 copies": {"ack": 2, "replication_factor": 2, "total_bytes": 512 << 20},
}

Progress = Callable[[str], None]


def measure_cases(cases: dict[str, Workload], *, limits: bool = True,
                  progress: Progress = lambda _: None) -> dict[str, Any]:
    """Every case with all its trials; `rows` hold the statistics of each figure, see `COLUMNS`."""
    rows: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    for name, workload in cases.items():
        found = measure_workload(workload, limits=limits and not measured,
                                 progress=lambda text, name=name: progress(f"{name}: {text}"))  # type: ignore[misc]
        measured[name] = found
        rows += statistics_of(name, found["runs"])
    first: dict[str, Any] = next(iter(measured.values()))
    return {"rows": rows, "cases": measured, "limits": first["limits"],
            "verified": all(run["verified"] for found in measured.values() for run in found["runs"])}


def statistics_of(case: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each transport and figure."""
    rows = []
    for transport in dict.fromkeys(run["transport"] for run in runs):
        for figure, (path, _) in FIGURES.items():
            values = [value for run in runs if run["transport"] == transport and (value := _at(run, path)) is not None]
            if values:
                rows.append({"case": case, "transport": transport, "figure": figure, **summary(values)})
    return rows


def _at(run: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = run
    for key in path:
        value = value[key]
    return None if value is None else float(value)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, sample deviation (0 for one value), percentiles."""
    found = numpy.array(values, float)
    p95, p99 = numpy.percentile(found, (95, 99))
    return {"trials": len(values), "mean": float(found.mean()), "median": float(numpy.median(found)),
            "deviation": float(found.std(ddof=1)) if len(values) > 1 else 0.0, "p95": float(p95), "p99": float(p99),
            "min": float(found.min()), "max": float(found.max())}


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV, with a header."""
    output = io.StringIO()
    writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """The rows of a stored baseline. Raises `ConfigError`."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(setting="baseline", value=str(path),
                          allowed="a file that --store-baseline has written") from error
    return rows


def compare(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure against the baseline's; `verdict` is same, better or worse.

    A change counts when the medians differ by more than a tenth and by more than two of the larger deviation.
    """
    before = {(row["case"], row["transport"], row["figure"]): row for row in baseline}
    found = []
    for row in rows:
        old = before.get((row["case"], row["transport"], row["figure"]))
        if old is None or not old["median"]:
            continue
        change = row["median"] / old["median"] - 1
        noise = max(NOISE_RATIO * abs(old["median"]), NOISE_DEVIATIONS * max(row["deviation"], old["deviation"]))
        more_is_better = FIGURES[row["figure"]][1]
        verdict = "same" if abs(row["median"] - old["median"]) <= noise else (
            "better" if (change > 0) == more_is_better else "worse")
        found.append({"case": row["case"], "transport": row["transport"], "figure": row["figure"],
                      "baseline": old["median"], "now": row["median"], "change": change, "verdict": verdict})
    return found
