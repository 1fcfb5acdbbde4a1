"""`cxlmq bench publish|subscribe|sizes|copies`: attached clients beside what memory can do."""

from pathlib import Path
from typing import Any

import click

from broker.errors import ConfigError
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
from client.cli.common import SIZE

_runs = click.option("--runs", type=click.IntRange(1), default=5, show_default=True,
                     help="Medians of so many, after one that is not counted.")
_transport = click.option("--transport", type=click.Choice(["attached", "grpc"]), default="attached", show_default=True)


def _workload(values: dict[str, Any], **more: Any) -> Any:
    from client.bench.workload import Workload

    return Workload.parse({**values, **more})


@click.command()
@workload_options("order", "ack", "batch_bytes", *CLUSTER_OPTIONS)
@_transport
@click.option("--message-bytes", "sizes", type=SIZE, multiple=True, default=("128", "1KiB"), show_default=True,
              help="Size of a message; may be given several times.")
@_runs
@quiet_option
@results_option
@json_option
@debug_option
def publish(values: dict[str, Any], transport: str, sizes: tuple[int, ...], runs: int, quiet: bool,
            results: str | None, json_target: str | None) -> None:
    """Messages a second from a Python loop: publish(bytes), publish_many(list), publish_array(rows).

    A hot block of different messages is published again and again until the last ack. What the region still keeps
    afterwards is read back and compared. Each trial stands beside the copy rate of one core just before and after it.

    \b
    Examples:
      cxlmq bench publish
      cxlmq bench publish --message-bytes 64 --message-bytes 4KiB --runs 3
      cxlmq bench publish --transport grpc
    """
    from client.bench.attached import measure_publishing
    from client.bench.report import table_text

    workload = _workload({"batch_bytes": "adaptive", **{k: v for k, v in values.items() if v is not None}},
                         transport=transport)
    with measuring():
        rows = measure_publishing(workload, sizes, runs=runs, progress=progress_to(quiet))
    text = table_text(f"From a Python loop, {transport}", ["call", ">bytes", ">million/s", ">GB/s", ">of a copy",
                                                           ">copy GB/s", ">compared bytes"],
                      [[row["call"], f"{row['message_bytes']:,}", figure(row["messages_per_second"] / 1e6, 2),
                        figure(row["gigabytes_per_second"], 2), figure(row["of_nontemporal"], 2),
                        figure(row["nontemporal_gigabytes_per_second"], 1), f"{row['verified_bytes']:,}"]
                       for row in rows])
    chart = [(f"{row['call']}, {row['message_bytes']:,} B", row["messages_per_second"] / 1e6) for row in rows]
    finish(with_about({"transport": transport, "rows": rows}), text, json_target, results, "publish", chart,
           "million/s")


@click.command()
@workload_options("message_bytes", "batch_bytes", "total_bytes", "order", *CLUSTER_OPTIONS)
@_transport
@_runs
@quiet_option
@results_option
@json_option
@debug_option
def subscribe(values: dict[str, Any], transport: str, runs: int, quiet: bool, results: str | None,
              json_target: str | None) -> None:
    """A subscriber that follows a publisher, and one alone over a full region.

    Following: batches as views, not touched, beside the rate of the publisher that runs at the same time. Alone: every
    byte is touched, beside the rate at which one core reads as much memory.

    \b
    Examples:
      cxlmq bench subscribe
      cxlmq bench subscribe --batch-bytes 64KiB --total-bytes 512MiB
    """
    from client.bench.attached import measure_subscribing
    from client.bench.report import table_text

    workload = _workload(values, transport=transport)
    with measuring():
        found = measure_subscribing(workload, runs=runs, progress=progress_to(quiet))
    following, alone = found["following"], found["alone"]
    text = table_text("", ["subscriber", ">GB/s", ">beside GB/s", ">ratio"], [
        ["follows a publisher, views", figure(following["followed_gigabytes_per_second"], 2),
         figure(following["published_gigabytes_per_second"], 2), figure(following["ratio"], 2)],
        ["alone, every byte", figure(alone["gigabytes_per_second"], 2),
         figure(alone["read_gigabytes_per_second"], 2), figure(alone["ratio"], 2)]])
    finish(with_about({"transport": transport, **found}), text, json_target, results, "subscribe")


@click.command()
@workload_options("order", "ack", *CLUSTER_OPTIONS)
@_transport
@_runs
@click.option("--plot", metavar="FILE", type=click.Path(dir_okay=False), help="Draw the costs as a picture (PNG, SVG).")
@quiet_option
@results_option
@json_option
@debug_option
def sizes(values: dict[str, Any], transport: str, runs: int, plot: str | None, quiet: bool, results: str | None,
          json_target: str | None) -> None:
    """Cost of a message from 64 B to 4 MiB, by call, and where copying becomes most of it.

    \b
    Examples:
      cxlmq bench sizes --plot sizes.png
      cxlmq bench sizes --runs 3 --json sizes.json
    """
    from client.bench.attached import CALLS, measure_sizes
    from client.bench.report import plot_costs, table_text

    if plot is not None and not Path(plot).resolve().parent.is_dir():
        raise ConfigError(setting="plot", value=repr(plot), allowed="a file in a folder that exists")
    workload = _workload(values, transport=transport)
    with measuring():
        found = measure_sizes(workload, runs=runs, progress=progress_to(quiet))
    by_size: dict[int, dict[str, float]] = {}
    for row in found["rows"]:
        by_size.setdefault(row["message_bytes"], {})[row["call"]] = row["nanoseconds_per_message"]
    copy = found["nontemporal_gigabytes_per_second"]
    text = table_text(f"ns a message, {transport}", [">bytes", *(f">{call}" for call in CALLS), ">copy alone"],
                      [[f"{size:,}", *(figure(each[call], 1) for call in CALLS), figure(size / copy, 1)]
                       for size, each in by_size.items()])
    crossovers = [f"{call}: copying is most of the cost from {size:,} bytes" if size else f"{call}: never"
                  for call, size in found["crossovers"].items()]
    if plot is not None and not plot_costs(Path(plot), found):
        raise ConfigError(setting="plot", value=repr(plot), allowed="only with matplotlib: pip install 'cxlmq[plots]'")
    finish(with_about({"transport": transport, **found}), "\n".join([text, *crossovers]), json_target, results, "sizes")


@click.command()
@_runs
@quiet_option
@results_option
@json_option
@debug_option
def copies(runs: int, quiet: bool, results: str | None, json_target: str | None) -> None:
    """Every way to copy into memory, by size: which is best here, and which this processor gets.

    The choice is a small table in sim/cxl/primitives.h. A share far below 1 in the last column says that the table does
    not know this processor: please report it.

    \b
    Examples:
      cxlmq bench copies
      cxlmq bench copies --runs 9 --json copies.json
    """
    from client.bench.attached import measure_copies
    from client.bench.report import table_text

    with measuring():
        found = measure_copies(runs=runs, progress=progress_to(quiet))
    names = list(found["rows"][0]["gigabytes_per_second"])
    text = table_text("GB/s into memory, a fence after each piece",
                      ["source", ">bytes", *(f">{name}" for name in names), "best", ">chosen of best"],
                      [[row["source"], f"{row['bytes']:,}",
                        *(figure(row["gigabytes_per_second"][name], 2) for name in names), row["best"],
                        figure(row["chosen_of_best"], 2)] for row in found["rows"]])
    finish(with_about(found), f"{text}\nchosen here: {found['chosen']}", json_target, results, "copies")
