"""`cxlmq bench`: the limits of this machine, and what a cluster makes of them."""

import json
from pathlib import Path
from typing import Any

import click

from broker.errors import ConfigError
from client.cli.bench_attached import copies, publish, sizes, subscribe
from client.cli.bench_common import (
    CLUSTER_OPTIONS,
    debug_option,
    figure,
    finish,
    json_option,
    measuring,
    progress_to,
    quiet_option,
    results_option,
    with_about,
    workload_options,
)
from client.cli.common import DURATION, EXIT_FAILED, SIZE, CommandExit


@click.group()
def bench() -> None:
    """Measure this machine's limits and a cluster's speed.

    Every command starts what it needs and leaves nothing behind. Figures mean something only beside the limits of the
    same machine in the same minutes: `limits` measures them, and `throughput` does so by itself.

    \b
    Where to begin:
      cxlmq bench limits                    memory copies, bare gRPC, plain sockets
      cxlmq bench throughput                2 GiB through 4 brokers, read back and verified
      cxlmq bench latency --waiting latency
      cxlmq bench contention                mutex or lock-free?
      cxlmq bench publish                   messages a second from a Python loop
    """


for each in (publish, subscribe, sizes, copies):
    bench.add_command(each)


# ---- limits --------------------------------------------------------------------------------------------------------


@bench.command()
@click.argument("which", nargs=-1, metavar="[memory] [grpc] [sockets]")
@click.option("--batch-bytes", type=SIZE, default="1MiB", show_default=True, help="Batch of gRPC and of the sockets.")
@click.option("--brokers", type=click.IntRange(1, 64), default=4, show_default=True, help="Servers of these two.")
@click.option("--publishers", type=click.IntRange(1, 64), default=1, show_default=True, help="Their clients.")
@click.option("--tcp", is_flag=True, help="Measure bare gRPC over TCP as well.")
@quiet_option
@results_option
@json_option
@debug_option
def limits(which: tuple[str, ...], batch_bytes: int, brokers: int, publishers: int, tcp: bool, quiet: bool,
           results: str | None, json_target: str | None) -> None:
    """What memory, gRPC and sockets do here when nothing else is in the way.

    memcpy and non-temporal copies go over up to 1 GiB, beyond any cache. Bare gRPC is the best configuration known
    with a handler that only copies into warm memory; the sockets receive straight into it.

    \b
    Examples:
      cxlmq bench limits
      cxlmq bench limits grpc --batch-bytes 64KiB --tcp
      cxlmq bench limits memory --json -
    """
    from client.bench import limit
    from client.bench.report import LIMIT_NAMES, bar_chart

    for name in which:
        if name not in limit.WHICH:
            raise ConfigError(setting="which", value=repr(name), allowed=", ".join(limit.WHICH))
    with measuring():
        found = limit.measure_limits(which or limit.WHICH, batch_bytes=batch_bytes, servers=brokers,
                                     publishers=publishers, tcp=tcp, progress=progress_to(quiet))
    labels = {name.replace("_gigabytes", "_two_cores_gigabytes"): label.replace("1 core", "2 cores")
              for name, label in LIMIT_NAMES.items() if "1 core" in label} | LIMIT_NAMES
    chart = sorted(((label.removeprefix("limit: "), found[name]) for name, label in labels.items() if found.get(name)),
                   key=lambda bar: bar[1])
    notes = [f"{found['footprint_bytes'] >> 20} MiB of memory, {found['bulk_copy']}"] if "bulk_copy" in found else []
    notes += [f"batches of {found['transport_batch_bytes']:,} bytes"] if "transport_batch_bytes" in found else []
    finish(with_about(found), "\n".join([bar_chart(chart), *notes]), json_target, results, "limits", chart)


# ---- throughput ----------------------------------------------------------------------------------------------------


@bench.command()
@workload_options()
@click.option("--trials", metavar="N", help="Repeat each run; medians are given beside the runs [1].")
@click.option("--limits/--no-limits", "limits_too", default=True, help="Measure the machine's limits first [yes].")
@click.option("--warm-up/--no-warm-up", default=True, help="Go over all segments before the clock runs [yes].")
@click.option("--name", default="throughput", show_default=True, help="Name of the results' folder.")
@quiet_option
@results_option
@json_option
@debug_option
def throughput(values: dict[str, Any], trials: str | None, limits_too: bool, warm_up: bool, name: str, quiet: bool,
               results: str | None, json_target: str | None) -> None:
    """Publish, read everything back, verify every byte and the order, report.

    A cluster is started for it. The clock runs from the first publish to the last ack; where the region keeps less
    than a run publishes, it goes in rounds, and reading back between them is not on the clock. Exit code 1 when what
    came back is not what was published.

    \b
    Examples:
      cxlmq bench throughput
      cxlmq bench throughput --batch-bytes 64KiB --publishers 2 --no-limits
      cxlmq bench throughput --ack 2 --replication-factor 2 --total-bytes 512MiB
      cxlmq bench throughput --trials 5 --json runs.json --results results
    """
    from client.bench import report
    from client.bench.throughput import measure_workload
    from client.bench.workload import Workload

    workload = Workload.parse({**values, "trials": trials})
    with measuring():
        measured = measure_workload(workload, limits=limits_too, warm_up=warm_up, progress=progress_to(quiet))
    found = report.document(measured)
    finish(found, report.throughput_text(found), json_target, results, name, report.bars(found))
    if not found["verified"]:
        raise CommandExit(EXIT_FAILED)


# ---- repeat --------------------------------------------------------------------------------------------------------


@bench.command()
@workload_options()
@click.option("--trials", metavar="N", default="5", show_default=True, help="Runs of each case.")
@click.option("--matrix", is_flag=True, help="Several cases: batch and message sizes, orders, durability.")
@click.option("--csv", "csv_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write the table as CSV.")
@click.option("--baseline", metavar="FILE", type=click.Path(dir_okay=False),
              help="Compare with this stored baseline; exit code 1 when something became worse.")
@click.option("--store-baseline", is_flag=True, help="Store the results in the --baseline file instead.")
@click.option("--limits/--no-limits", "limits_too", default=True, help="Measure the machine's limits first [yes].")
@quiet_option
@results_option
@json_option
@debug_option
def repeat(values: dict[str, Any], trials: str, matrix: bool, csv_file: str | None, baseline: str | None,
           store_baseline: bool, limits_too: bool, quiet: bool, results: str | None, json_target: str | None) -> None:
    """Measure throughput several times: mean, median, deviation, p95 and p99 of every figure.

    A later run is compared with a stored baseline: a change counts when the medians differ by more than a tenth and
    by more than two deviations.

    \b
    Examples:
      cxlmq bench repeat --trials 10 --csv runs.csv
      cxlmq bench repeat --matrix --baseline baseline.json --store-baseline
      cxlmq bench repeat --matrix --baseline baseline.json
    """
    from client.bench import repeat as repeats
    from client.bench.workload import Workload

    if store_baseline and baseline is None:
        raise ConfigError(setting="store-baseline", value="given", allowed="only with --baseline FILE")
    before = repeats.read_baseline(Path(baseline)) if baseline and not store_baseline else []
    given = {name: value for name, value in values.items() if value is not None}
    cases = {name: Workload.parse({**case, **given, "trials": trials})
             for name, case in (repeats.BASELINE_CASES if matrix else {"run": {}}).items()}
    with measuring():
        found = repeats.measure_cases(cases, limits=limits_too, progress=progress_to(quiet))
    changes = repeats.compare(found["rows"], before)
    value = with_about({**found, "comparison": changes})
    if csv_file is not None:
        Path(csv_file).write_text(repeats.csv_text(found["rows"]))
    if baseline and store_baseline:
        Path(baseline).write_text(json.dumps(value, indent=2, default=str) + "\n")
    finish(value, _repeat_text(found, changes), json_target, results, "repeat")
    if not found["verified"] or any(change["verdict"] == "worse" for change in changes):
        raise CommandExit(EXIT_FAILED)


def _repeat_text(found: dict[str, Any], changes: list[dict[str, Any]]) -> str:
    from client.bench.report import table_text

    figures = ("mean", "median", "deviation", "p95", "p99")
    rows = [[row["case"], row["transport"], row["figure"], row["trials"],
             *(figure(row[name], 3 if row["mean"] < 100 else 0) for name in figures)] for row in found["rows"]]
    parts = [table_text("Repeated runs", ["case", "transport", "figure", ">trials", *(f">{name}" for name in figures)],
                        rows)]
    if changes:
        rows = [[each["case"], each["transport"], each["figure"], figure(each["baseline"], 3),
                 figure(each["now"], 3), f"{each['change']:+.1%}", each["verdict"]] for each in changes]
        parts.append(table_text("Against the baseline", ["case", "transport", "figure", ">baseline", ">now", ">change",
                                                         "verdict"], rows))
    return "\n\n".join(parts)


# ---- latency -------------------------------------------------------------------------------------------------------


@bench.command()
@workload_options("transport", "message_bytes", "order", "ack", "replication_factor", "network", *CLUSTER_OPTIONS)
@click.option("--gap", type=DURATION, default="1ms", show_default=True, help="Pause before each batch.")
@click.option("--batches", type=click.IntRange(1), default=3000, show_default=True, help="How many are measured.")
@quiet_option
@results_option
@json_option
@debug_option
def latency(values: dict[str, Any], gap: float, batches: int, quiet: bool, results: str | None,
            json_target: str | None) -> None:
    """How long a lone batch takes from the call to its result, with nothing else in flight.

    What a waiting thread does decides it: --waiting latency never sleeps and costs cores, saver sleeps at once.

    \b
    Examples:
      cxlmq bench latency
      cxlmq bench latency --waiting latency --message-bytes 64KiB --gap 0
      cxlmq bench latency --ack 2 --replication-factor 2 --batches 500
    """
    from client.bench.latency import measure_latency
    from client.bench.report import table_text
    from client.bench.throughput import wanted_transports
    from client.bench.workload import Workload

    workload = Workload.parse(values)
    with measuring():
        runs = [measure_latency(workload, transport, gap_seconds=gap, batches=batches, progress=progress_to(quiet))
                for transport in wanted_transports(workload)]
    names = ("p50", "p99", "p999", "max")
    rows = [[run["transport"], *(figure(run["ack_latency_us"][name], 1) for name in names),
             *(figure(run["sent_to_ack_us"][name], 1) for name in ("p50", "p99")), f"{run['broker_cores']:.3f}"]
            for run in runs]
    columns = ["transport", ">p50 us", ">p99 us", ">p99.9 us", ">max us", ">sent to ack p50", ">p99", ">broker cores"]
    text = table_text(f"Lone batches of {workload.message_bytes:,} bytes, {gap * 1e6:,.0f} us apart", columns, rows)
    finish(with_about({"runs": runs}), text, json_target, results, "latency")


# ---- contention ----------------------------------------------------------------------------------------------------


@bench.command()
@click.option("--quick", is_flag=True, help="Fewer rounds, and the cluster only with the most scanners.")
@click.option("--stage-only", is_flag=True, help="The sequencer's stage alone, no cluster.")
@quiet_option
@results_option
@json_option
@debug_option
def contention(quick: bool, stage_only: bool, quiet: bool, results: str | None, json_target: str | None) -> None:
    """Compare mutex, semaphore and lock-free order over 1, 2 and 4 scanner threads.

    The stage alone orders headers that were delegated in advance: this is where a lock shows. End to end, with tiny
    batches over gRPC, the publisher is slower than any lock.

    \b
    Examples:
      cxlmq bench contention
      cxlmq bench contention --quick --json contention.json
    """
    from client.bench import contention as contentions

    with measuring():
        found = contentions.compare(rounds=5 if quick else 20, batches=0 if stage_only else 3000 if quick else 20_000,
                                    end_to_end_scanners=(4,) if quick else contentions.SCANNER_COUNTS,
                                    progress=progress_to(quiet))
    chart = [(f"{row['lock']}, {row['scanners']} scanners", row["million_batches_per_second"])
             for row in found["stage_alone"]]
    finish(with_about(found), _contention_text(found), json_target, results, "contention", chart, "M batches/s")


def _contention_text(found: dict[str, Any]) -> str:
    from client.bench.report import table_text

    columns = ["lock", ">scanners", ">M batches/s", ">acquisitions", ">contended", ">contentions/s", ">mean wait us",
               ">mean hold us", "advice"]
    parts = []
    for key, title in (("stage_alone", "The sequencer's stage alone"), ("end_to_end", "End to end, tiny batches")):
        rows = [[row["lock"], row["scanners"], figure(row["million_batches_per_second"], 4),
                 f"{row['acquisitions']:,}", f"{row['contended']:,}", figure(row["contended_per_second"]),
                 figure(row["wait_us_mean"], 2), figure(row["hold_us_mean"], 3), row["advice"]]
                for row in found[key]]
        if rows:
            parts.append(table_text(title, columns, rows))
    return "\n\n".join(parts)


# ---- pipeline ------------------------------------------------------------------------------------------------------


@bench.command()
@click.option("--brokers", "broker_counts", metavar="N,N,...", default="1,2,4,8", show_default=True,
              help="Broker counts, with one topic.")
@click.option("--topics", "topic_counts", metavar="N,N,...", default="1,4,16,64", show_default=True,
              help="Topic counts, with four brokers.")
@click.option("--batches", type=click.IntRange(1000), default=200_000, show_default=True, help="Batches of one run.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Medians of so many runs.")
@quiet_option
@results_option
@json_option
@debug_option
def pipeline(broker_counts: str, topic_counts: str, batches: int, runs: int, quiet: bool, results: str | None,
             json_target: str | None) -> None:
    """The native pipeline alone: batch headers to acks, no gRPC and no Python on the way.

    All brokers run in this process with their own threads; native publishers feed them with tiny batches. The cost of
    a batch should not depend on how many brokers and topics there are.

    \b
    Examples:
      cxlmq bench pipeline
      cxlmq bench pipeline --brokers 4 --topics 1 --runs 5
    """
    from client.bench.pipeline import measure_matrix
    from client.bench.report import table_text

    brokers, topics = _numbers("brokers", broker_counts), _numbers("topics", topic_counts)
    with measuring():
        found = measure_matrix(brokers, topics, batches=batches, runs=runs, progress=progress_to(quiet))
    rows = [[each["brokers"], each["topics"], figure(each["batches_per_second"]), figure(each["ns_per_batch"]),
             figure(each["cpu_ns_per_batch"]), figure(each["pushed_back"])] for each in found["results"]]
    text = table_text("Header written to ack", [">brokers", ">topics", ">batches/s", ">ns a batch", ">CPU ns a batch",
                                                ">pushed back"], rows)
    chart = [(f"{each['brokers']} brokers, {each['topics']} topics", each["batches_per_second"])
             for each in found["results"]]
    finish(with_about(found), text, json_target, results, "pipeline", chart, "batches/s")


def _numbers(setting: str, text: str) -> list[int]:
    allowed = "whole numbers from 1 to 64 with commas between"
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= each <= 64 for each in found):
        raise ConfigError(setting=setting, value=repr(text), allowed=allowed)
    return found


# ---- durability --------------------------------------------------------------------------------------------------


@bench.command()
@click.option("--bytes", "total_bytes", type=SIZE, default="512MiB", show_default=True, help="Payload of one round.")
@click.option("--batch-bytes", type=SIZE, default="1MiB", show_default=True, help="Batch of the publisher.")
@click.option("--brokers", type=click.IntRange(2, 64), default=4, show_default=True, help="Brokers, and bare files.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are given.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Where the files go.")
@quiet_option
@results_option
@json_option
@debug_option
def durability(total_bytes: int, batch_bytes: int, brokers: int, runs: int, folder: str | None, quiet: bool,
               results: str | None, json_target: str | None) -> None:
    """Level 2 with replication factor 2, beside writing and fdatasyncing the same bytes with the same batching.

    Both take turns on the same disk. The bar is 0.9 of the bare files.

    \b
    Examples:
      cxlmq bench durability
      cxlmq bench durability --folder /mnt/disk --bytes 2GiB --batch-bytes 256KiB
    """
    from client.bench.durability import measure_durability
    from client.bench.report import table_text

    with measuring():
        found = measure_durability(total_bytes, batch_bytes, brokers=brokers, runs=runs, folder=folder,
                                   progress=progress_to(quiet))
    rows = [[number + 1, f"{each['gigabytes_per_second']:.3f}", f"{each['bare_gigabytes_per_second']:.3f}",
             f"{each['ratio']:.2f}", f"{each['bytes_per_sync']:,}"] for number, each in enumerate(found["rounds"])]
    rows.append(["median", f"{found['gigabytes_per_second']:.3f}", f"{found['bare_gigabytes_per_second']:.3f}",
                 f"{found['ratio']:.2f}", f"{found['bytes_per_sync']:,.0f}"])
    text = table_text("Level 2 and bare files", ["round", ">level 2 GB/s", ">bare GB/s", ">ratio", ">bytes a sync"],
                      rows)
    text += f"\n\nthe bar of {found['bar']} is {'reached' if found['reached'] else 'missed'}"
    finish(with_about(found), text, json_target, results, "durability")


# ---- idle ----------------------------------------------------------------------------------------------------------


@bench.command()
@workload_options(*CLUSTER_OPTIONS)
@click.option("--seconds", type=DURATION, default="10s", show_default=True, help="How long to look on.")
@quiet_option
@results_option
@json_option
@debug_option
def idle(values: dict[str, Any], seconds: float, quiet: bool, results: str | None, json_target: str | None) -> None:
    """What a cluster costs that does nothing: processor time, memory beside the region, time until it is ready.

    \b
    Examples:
      cxlmq bench idle
      cxlmq bench idle --waiting latency --seconds 5
    """
    from client.bench.idle import measure_idle
    from client.bench.report import table_text
    from client.bench.workload import Workload
    from client.cli.common import bytes_text

    workload = Workload.parse(values)
    if seconds <= 0:
        raise ConfigError(setting="seconds", value=seconds, allowed="more than 0")
    with measuring():
        found = measure_idle(workload, seconds, progress_to(quiet))
    rows = [[broker, f"{cores:.4f}", bytes_text(found["memory_bytes_by_broker"][broker])]
            for broker, cores in found["cores_by_broker"].items()]
    rows.append(["all", f"{found['cores']:.4f}", f"at most {bytes_text(found['memory_bytes_max'])}"])
    text = table_text(f"Idle cluster, waiting {workload.waiting}", ["broker", ">cores", ">memory beside the region"],
                      rows)
    text += (f"\n\nready after {found['ready_seconds']:.2f} s, {found['command_seconds']:.2f} s after the command "
             f"was given")
    finish(with_about(found), text, json_target, results, "idle")
