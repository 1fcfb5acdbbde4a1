"""What a measurement looks like: JSON for programs, a table and bars for the terminal, a folder of results."""

import contextlib
import datetime
import io
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from client.cli.common import make_table
from client.coherence import profile_text
from sim.cxl.memory import processor_features

ROOT = Path(__file__).resolve().parents[2]
BAR_CELLS = 40
TEXT_WIDTH = 200
PACKAGES = ("grpcio", "numpy", "cython", "protobuf")
# Figures of a run that are worth a median over several.
FIGURES = ("seconds", "gigabytes_per_second", "messages_per_second", "batches_per_second", "flushes_per_gigabyte",
           "fences_per_gigabyte")
LIMIT_NAMES = {
    "nontemporal_gigabytes_per_second": "limit: non-temporal copy, 1 core",
    "memcpy_gigabytes_per_second": "limit: memcpy, 1 core",
    "read_gigabytes_per_second": "limit: read, 1 core",
    "sockets_gigabytes_per_second": "limit: plain unix sockets",
    "grpc_gigabytes_per_second": "limit: bare gRPC, unix",
    "grpc_tcp_gigabytes_per_second": "limit: bare gRPC, TCP",
}


# ---- where and what ------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine that measured."""
    cpu_info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpu_info)
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {
        "host": platform.node(), "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "kernel": platform.release(), "python": platform.python_version(), **processor_features(),
        "packages": {name: found for name in PACKAGES if (found := _package_version(name))},
        "load_average": os.getloadavg()[0],
    }


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that was measured, "+" behind it when files differ from it; None outside a repository."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True,
                              text=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return None


# ---- JSON ----------------------------------------------------------------------------------------------------------


def document(measured: dict[str, Any]) -> dict[str, Any]:
    """The JSON of throughput runs: the run itself, or `runs` and `medians` when there are several."""
    runs: list[dict[str, Any]] = measured["runs"]
    if len(runs) == 1:
        return {**runs[0], **about()}
    return {"runs": runs, "medians": medians(runs), "limits": measured["limits"],
            "verified": all(run["verified"] for run in runs), **about()}


def about() -> dict[str, Any]:
    """When, where and with which code something was measured."""
    return {"machine": machine(), "commit": commit(),
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def medians(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians of the figures over the trials, by transport."""
    by_transport: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_transport.setdefault(run["transport"], []).append(run)
    found = {}
    for transport, group in by_transport.items():
        latencies = {name: _median(run["ack_latency_us"][name] for run in group) for name in ("p50", "p99", "p999")}
        found[transport] = {**{name: _median(run[name] for run in group) for name in FIGURES},
                            "ack_latency_us": latencies, "trials": len(group)}
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def write_json(target: str, value: Any) -> None:
    """Write to a file, or to standard output for "-"."""
    text = json.dumps(value, indent=2, default=str)
    if target == "-":
        print(text, flush=True)
    else:
        Path(target).write_text(text + "\n")


# ---- for people ----------------------------------------------------------------------------------------------------


def runs_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a document, one or several."""
    runs: list[dict[str, Any]] = report.get("runs", [report])
    return runs


def throughput_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: what was measured, then one column a run."""
    runs = runs_of(report)
    return [[label, *(_cell(value(run)) for run in runs)] for label, value in _ROWS]


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None, digits: int = 0, unit: str = "") -> str | None:
    return None if value is None else f"{value:,.{digits}f}{unit}"


def _latency_text(run: dict[str, Any]) -> str | None:
    latency = run["ack_latency_us"]
    if latency["p50"] is None:
        return None
    return " / ".join(f"{latency[name]:,.0f}" for name in ("p50", "p99", "p999")) + " us"


def _ratio_text(run: dict[str, Any], limit: str) -> str | None:
    found = run["limits"].get(limit)
    return f"{run['gigabytes_per_second'] / found:.2f}  (of {found:.2f} GB/s)" if found else None


def _verified_text(run: dict[str, Any]) -> str:
    if not run["verified"]:
        return f"NO: {run['difference']}"
    order = "every byte, in order" if run["order"] == 5 else "every byte"
    return f"yes, {order} ({run['verified_bytes']:,} bytes)"


def _lock_text(run: dict[str, Any]) -> str:
    lock = run["sequencer_lock"]
    return f"{lock['mode']}: {lock['contended']:,} of {lock['acquisitions']:,} contended"


_ROWS: tuple[tuple[str, Any], ...] = (
    ("transport", lambda run: run["transport"] + (" over TCP" if run["network"] == "tcp" else "")),
    ("brokers / publishers", lambda run: f"{run['brokers']} / {run['publishers']}"),
    ("message / batch bytes", lambda run: f"{run['message_bytes']:,} / {run['batch_bytes']:,}"),
    ("order / ack / replication", lambda run: f"{run['order']} / {run['ack']} / {run['replication_factor']}"),
    ("memory", lambda run: run.get("memory")),
    ("  profile", lambda run: profile_text(run.get("profile_costs"))),
    ("published", lambda run: f"{run['total_bytes']:,} bytes in {run['rounds']} rounds, {run['seconds']:.2f} s"),
    ("GB/s", lambda run: _number(run["gigabytes_per_second"], 3)),
    ("  of bare gRPC", lambda run: _ratio_text(run, "grpc_tcp_gigabytes_per_second" if run["network"] == "tcp"
                                               else "grpc_gigabytes_per_second")),
    ("  of plain sockets", lambda run: _ratio_text(run, "sockets_gigabytes_per_second")),
    ("  of a non-temporal copy", lambda run: _ratio_text(run, "nontemporal_gigabytes_per_second")),
    ("messages/s", lambda run: _number(run["messages_per_second"])),
    ("batches/s", lambda run: _number(run["batches_per_second"])),
    ("ack latency p50 / p99 / p99.9", _latency_text),
    ("verified", _verified_text),
    ("read back", lambda run: _number(run["read_back"]["gigabytes_per_second"], 2, " GB/s, not in the time above")),
    ("warm-up, not counted", lambda run: f"{run['warm_up']['bytes']:,} bytes, {run['warm_up']['seconds']:.2f} s"),
    ("CPU publishers / brokers", lambda run: f"{run['cpu_seconds']['publishers']:.2f} / "
                                             f"{run['cpu_seconds']['brokers']:.2f} s"),
    ("flushes / fences per GB", lambda run: f"{run['flushes_per_gigabyte']:,.0f} / {run['fences_per_gigabyte']:,.0f}"),
    ("hold-buffer peak", lambda run: f"{run['hold_buffer_peak']} batches"),
    ("sequencer lock", _lock_text),
    ("  advice", lambda run: run["sequencer_lock"]["advice"]),
)


def bars(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Name and GB/s of the runs (medians when there are several trials) and of the limits."""
    found: list[tuple[str, float]] = []
    if "runs" in report:
        found += [(f"cxlmq {transport}", each["gigabytes_per_second"]) for transport, each in report["medians"].items()]
    else:
        found.append((f"cxlmq {report['transport']}", report["gigabytes_per_second"]))
    for name, label in LIMIT_NAMES.items():
        if report["limits"].get(name):
            found.append((label, report["limits"][name]))
    return sorted(found, key=lambda bar: bar[1])


def bar_chart(values: Sequence[tuple[str, float]], unit: str = "GB/s") -> str:
    """Horizontal bars for the terminal."""
    if not values:
        return ""
    width, largest = max(len(name) for name, _ in values), max(value for _, value in values)
    lines = []
    for name, value in values:
        eighths = round(BAR_CELLS * 8 * value / largest) if largest else 0
        bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
        lines.append(f"{name:<{width}}  {bar or '▏':<{BAR_CELLS}}  {value:,.2f} {unit}")
    return "\n".join(lines)


def throughput_text(report: dict[str, Any]) -> str:
    """Table and bars, as they are printed and kept in table.txt."""
    rows = throughput_rows(report)
    names = [f"run {number}" for number in range(1, len(rows[0]))]
    return "\n".join([table_text("", ["", *names], rows), "", bar_chart(bars(report))])


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as plain text; a column whose name starts with '>' is aligned to the right."""
    output = io.StringIO()
    Console(file=output, width=TEXT_WIDTH, highlight=False).print(make_table(title, columns, rows))
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())


# ---- the results folder --------------------------------------------------------------------------------------------


def save_results(root: Path, name: str, report: dict[str, Any], text: str,
                 chart: Sequence[tuple[str, float]] = (), unit: str = "GB/s") -> Path:
    """Keep a report below `root` in a folder of its own: report.json, table.txt, and plot.png where matplotlib is."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = next(path for path in (root / f"{moment}-{name}{suffix}" for suffix in _suffixes()) if _make(path))
    write_json(str(folder / "report.json"), report)
    (folder / "table.txt").write_text(text + "\n")
    if chart:
        plot_bars(folder / "plot.png", name, chart, unit)
    return folder


def _suffixes() -> Iterable[str]:
    yield ""
    yield from (f"-{number}" for number in range(2, 1000))


def _make(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, drawn without a screen; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_bars(path: Path, title: str, values: Sequence[tuple[str, float]], unit: str = "GB/s") -> bool:
    """A picture of the bars; False where matplotlib is not installed (pip install 'cxlmq[plots]')."""
    figure = new_figure(9, 1.2 + 0.45 * len(values))
    if figure is None:
        return False
    axes = figure.add_subplot()
    colors = ["#1f6f8b" if name.startswith("cxlmq") else "#c9c9c9" for name, _ in values]
    drawn = axes.barh([name for name, _ in values], [value for _, value in values], color=colors)
    axes.bar_label(drawn, labels=[f"{value:,.2f}" for _, value in values], padding=3)
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def plot_costs(path: Path, found: dict[str, Any]) -> bool:
    """ns a message over its size, a line a call, beside the copy alone; False where matplotlib is not installed.

    `found` is what `client.bench.attached.measure_sizes` returns.
    """
    figure = new_figure(9, 5.5)
    if figure is None:
        return False
    axes = figure.add_subplot()
    rows, copy = found["rows"], found["nontemporal_gigabytes_per_second"]
    sizes = sorted({row["message_bytes"] for row in rows})
    for call, crossover in found["crossovers"].items():
        mine = [row for row in rows if row["call"] == call]
        axes.plot([row["message_bytes"] for row in mine], [row["nanoseconds_per_message"] for row in mine], "o-",
                  label=call)
        for row in mine:
            if row["message_bytes"] == crossover:
                axes.annotate("copying is most of it", (crossover, row["nanoseconds_per_message"]),
                              textcoords="offset points", xytext=(8, -12), fontsize=8)
    axes.plot(sizes, [size / copy for size in sizes], "--", color="#888888", label=f"copy alone, {copy:.1f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes of a message", ylabel="ns a message")
    axes.set_xticks(sizes, [f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB" if size >> 10 else f"{size} B"
                            for size in sizes])
    axes.legend()
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True
