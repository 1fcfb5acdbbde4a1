"""What the commands of `cxlmq bench` share: options of a workload, progress, errors, and where results go."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from broker.errors import ConfigError, TmpfsTooSmall
from client.cli.common import CommandFunction, RunSettings, say
from client.cli.output import line

# Option -> (metavar, help); the values stay text, `Workload.parse` checks all of them before anything starts.
_WORKLOAD: dict[str, tuple[str, str]] = {
    "transport": ("grpc|attached|both", "How publishers reach the brokers; both measures one after the other [both]."),
    "brokers": ("N", "Broker processes [4]."),
    "publishers": ("N", "Publisher processes, at once [1]."),
    "message_bytes": ("SIZE", "Size of a message [1KiB]."),
    "total_bytes": ("SIZE", "What all publishers publish together [2GiB]."),
    "batch_bytes": ("SIZE|adaptive", "Size of a batch; adaptive lets the publisher choose [1MiB]."),
    "order": ("0|1|2|5", "Order of the topic: none, per broker, total, total and per session [5]."),
    "ack": ("0|1|2", "What publishers wait for: nothing, ordered in memory, durable on disks [1]."),
    "replication_factor": ("N", "Copies: 1 is the memory alone, N adds N-1 disks [1]."),
    "sequencer_lock": ("mutex|semaphore|atomic", "How scanners agree on the next position [atomic]."),
    "scanners": ("N", "Threads of the sequencer, at most one a broker [1]."),
    "waiting": ("latency|balanced|saver", "What an idle thread does [balanced]."),
    "thread_plan": ("fused|staged", "One thread a broker, or one a stage [fused]."),
    "region_bytes": ("SIZE", "Shared memory of all brokers [1GiB]."),
    "network": ("unix|tcp", "Sockets that gRPC uses [unix]."),
    "memory": ("mapped|noncoherent|checked", "This machine's own memory, hosts with private caches, or the same with "
                                             "every access checked [mapped]."),
    "profile": ("DEVICE", "Latencies and bandwidths of a device, when memory is not mapped; see `cxlmq profiles` "
                          "[this machine's]."),
}
CLUSTER_OPTIONS = ("brokers", "waiting", "thread_plan", "region_bytes")


# ---- options and output --------------------------------------------------------------------------------------------


def workload_options(*names: str) -> Callable[[CommandFunction], CommandFunction]:
    """Options of a workload (all without `names`), given to the command as the dictionary `values`."""
    chosen = names or tuple(_WORKLOAD)

    def decorate(function: CommandFunction) -> CommandFunction:
        @functools.wraps(function)
        def command(*args: Any, **arguments: Any) -> Any:
            return function(*args, values={name: arguments.pop(name) for name in chosen}, **arguments)

        for name in reversed(chosen):
            metavar, text = _WORKLOAD[name]
            command = click.option("--" + name.replace("_", "-"), name, metavar=metavar, help=text)(command)
        return command  # type: ignore[return-value]

    return decorate


def _json_target(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """Check that the file can be written before hours are spent; errors are JSON too when the output is."""
    if value is None:
        return None
    if value == "-":
        context.ensure_object(RunSettings).as_json = True
    elif not Path(value).resolve().parent.is_dir() or Path(value).is_dir():
        raise ConfigError(setting="json", value=repr(value), allowed="- or a file in a folder that exists")
    return value


json_option = click.option("--json", "json_target", metavar="FILE|-", callback=_json_target,
                           help="Write the results as JSON to a file, or to standard output for -.")
results_option = click.option("--results", "results", metavar="FOLDER", type=click.Path(file_okay=False),
                              help="Keep report, table and picture in a new folder below this one.")


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.ensure_object(RunSettings).debug |= value


debug_option = click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug,
                            help="Show the traceback of an error.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Do not say what is being measured.")


def progress_to(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else say


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Signals end a measurement like Ctrl-C; what the measurement raises becomes an error of ours."""
    from client.bench.harness import LimitError
    from client.bench.sequencer_bench import BenchError
    from client.bench.throughput import RunFailed
    from client.cluster import interrupted_by_signals
    from sim.cxl.region import TmpfsFull

    try:
        with interrupted_by_signals():
            yield
    except (LimitError, BenchError) as error:
        raise RunFailed(f"the measurement failed: {error}") from error
    except TmpfsFull as error:
        raise TmpfsTooSmall(f"{error}: enlarge /dev/shm, or do without the limits (--no-limits) and with a smaller "
                            "region (--region-bytes)", wanted_bytes=error.wanted_bytes,
                            free_bytes=error.free_bytes) from None


def finish(value: dict[str, Any], text: str, json_target: str | None, results: str | None, name: str,
            chart: list[tuple[str, float]] | None = None, unit: str = "GB/s") -> None:
    """Print, write JSON, and keep a folder of results."""
    from client.bench.report import save_results, write_json

    if json_target != "-":
        line(text)
    if json_target is not None:
        write_json(json_target, value)
    if results is not None:
        folder = save_results(Path(results), re.sub(r"[^A-Za-z0-9._-]+", "-", name), value, text, chart or [], unit)
        say(f"results: {folder}")


def with_about(value: dict[str, Any]) -> dict[str, Any]:
    from client.bench.report import about

    return {**value, **about()}


def figure(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
