"""What all commands share: options, output, errors and exit codes.

A command returns nothing and raises; `run` in client.cli.main turns what was raised into one line and an exit code.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from broker.errors import (
    BadTopicName,
    BadTopicOptions,
    ConfigError,
    CxlmqError,
    RegionMissing,
    RegionTooSmall,
    UnknownTopic,
)
from client.cli import output
from client.cli.output import print_json as print_json
from client.cli.output import say as say

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_MISSING, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
_USAGE_ERRORS = (ConfigError, BadTopicName, BadTopicOptions, RegionTooSmall)
_MISSING_ERRORS = (RegionMissing, UnknownTopic)

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., Any])


@dataclass
class RunSettings:
    """How this run of the command talks; options set it wherever they stand on the line."""

    as_json: bool = False
    debug: bool = False


class CommandExit(Exception):
    """Ends a command with an exit code, after it has said what there is to say."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def settings() -> RunSettings:
    """The settings of the running command."""
    return click.get_current_context().ensure_object(RunSettings)


# ---- options -----------------------------------------------------------------------------------------------------


def _remember(field: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            setattr(context.ensure_object(RunSettings), field, True)

    return callback


_JSON = click.option("--json", "as_json", is_flag=True, expose_value=False, is_eager=True,
                     callback=_remember("as_json"), help="Print JSON: one document, or one a line for streams.")
_DEBUG = click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember("debug"),
                      help="Show the traceback of an error.")


def common_options(function: CommandFunction) -> CommandFunction:
    """--json and --debug; the command asks `settings()`."""
    return _JSON(_DEBUG(function))


@dataclass(frozen=True)
class Target:
    """The cluster that a command works with."""

    cluster: str
    bootstrap: str | None
    security: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the library's Admin, Publisher and Subscriber."""
        return {"cluster": self.cluster, "bootstrap": self.bootstrap, "security": self.security}


def target_options(function: CommandFunction) -> CommandFunction:
    """--cluster, --bootstrap and --security as the argument `target`, with --json and --debug."""
    import functools

    @functools.wraps(function)
    def command(*args: Any, cluster: str | None, bootstrap: str | None, security: str | None, **values: Any) -> Any:
        if cluster and bootstrap:
            raise click.UsageError("give --cluster or --bootstrap, not both")
        return function(*args, target=Target(cluster or default_cluster(), bootstrap, security), **values)

    command = click.option("--security", metavar="DIR|FILE",
                           help="Certificate and token for a cluster with security [CXLMQ_SECURITY].")(command)
    command = click.option("--bootstrap", metavar="ADDRESS",
                           help="A broker's address instead, also on another machine: host:port or unix:/path."
                           )(command)
    command = click.option("--cluster", metavar="NAME",
                           help="Name of a cluster on this machine [default: default, or CXLMQ_NAME].")(command)
    return common_options(command)  # type: ignore[return-value]


def default_cluster() -> str:
    """The name used when none is given."""
    from broker.config import default_name as name

    return name()


class SizeType(click.ParamType):
    """A number of bytes: 65536, 64KiB, 64K (1024), 64KB (1000)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        from broker.config import parse_bytes

        try:
            return parse_bytes(value)
        except ConfigError as error:
            self.fail(f"{value!r} is no size: {error.details.get('allowed')}", param, ctx)


class DurationType(click.ParamType):
    """Seconds: 1.5, 200ms, 5us, 2m."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        from broker.config import parse_duration

        try:
            return parse_duration(value)
        except ConfigError as error:
            self.fail(f"{value!r} is no time: {error.details.get('allowed')}", param, ctx)


class MillisecondsType(DurationType):
    """Milliseconds: 5, 0.5, or a time with its unit: 5ms, 100us, 1s."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Milliseconds."""
        try:
            return super().convert(f"{float(value)}ms", param, ctx) * 1000
        except ValueError:              # it has a unit
            return super().convert(value, param, ctx) * 1000


SIZE, DURATION, MILLISECONDS = SizeType(), DurationType(), MillisecondsType()


# ---- settings of a cluster as options ----------------------------------------------------------------------------

# (setting, metavar, help). Values stay text: load_config parses and checks them, and names what is wrong.
_SETTINGS: tuple[tuple[str, str, str], ...] = (
    ("name", "NAME", "Name of the cluster; clients find it by this name [default]."),
    ("brokers", "N", "Broker processes; one of them is the head, which orders all batches [4]."),
    ("region_bytes", "SIZE", "Shared memory of all brokers on /dev/shm. Smaller than the traffic: it is reused behind "
                             "acks, replicas and readers [1GiB]."),
    ("message_bytes_max", "SIZE", "Largest message that is taken [16MiB, or a sixteenth of a small region]."),
    ("batch_bytes_max", "SIZE", "Largest batch of a publisher [4MiB, or a sixteenth of a small region]."),
    ("topic_count_max", "N", "Topics that can exist at once, up to 16384; with many, rings, indexes and segments are "
                             "chosen smaller [by region size: 64 from 512MiB]."),
    ("ring_slot_count", "N", "Batches per topic and broker that may wait for order; a power of two "
                             "[by region size]."),
    ("order_entry_count", "N", "Batches per topic that readers can still find; a power of two [by region size]."),
    ("segment_bytes", "SIZE", "Unit in which memory is given to topics; a power of two [by region size]."),
    ("session_count_max", "N", "Publishers' sessions at once, over all brokers [by region size]."),
    ("cursor_count_max", "N", "Readers at once, over all brokers [by region size]."),
    ("group_count_max", "N", "Consumer groups at once, of all topics [by region size]."),
    ("attach_slot_count", "N", "Clients that can attach to the memory directly [64]."),
    ("pool", "atomic|partitioned|leader", "How segments are allocated: one shared bitmap, a share per broker, or by "
                                          "the head [atomic]."),
    ("sequencer_lock", "mutex|semaphore|atomic", "How scanner threads agree on the next position; atomic is "
                                                 "lock-free [atomic]."),
    ("scanners", "N", "Threads of the sequencer, at most one a broker [1]."),
    ("thread_plan", "fused|staged", "One thread runs all stages of a broker (few cores), or one a stage (many) "
                                    "[fused]."),
    ("waiting", "latency|balanced|saver", "What an idle thread does: yield for ever, yield a little then sleep, or "
                                          "sleep at once [balanced]."),
    ("memory", "mapped|noncoherent|checked", "What kind of memory the region is: this machine's own, hosts with "
                                             "private caches, or the same with every access checked [mapped]."),
    ("profile", "DEVICE", "Latencies and bandwidths of a device, when memory is not mapped; `cxlmq profiles` lists "
                          "them [this machine's own]."),
    ("hosts", "H,H,...", "Host of each broker, when memory is not mapped: brokers of one host share a cache [each its "
                         "own]."),
    ("eviction_period", "N", "Accesses between two things that a host's cache does by itself; 0 for none [1000]."),
    ("memory_seed", "N", "Seed of garbage and of what caches do by themselves [1]."),
    ("coherent_bytes", "SIZE", "Coherent area of the hardware, where atomics work [64KiB]."),
    ("session_lease_seconds", "TIME", "How long a gap in a publisher's batches may last [30s]."),
    ("group_lease_seconds", "TIME", "How long a silent member keeps its consumer group [10s]."),
    ("heartbeat_ms", "N", "How often a broker says that it is alive [100]."),
    ("head_lease_seconds", "TIME", "How long the head may be silent before another broker takes over [1s]."),
    ("replica_grace_seconds", "TIME", "How long a broker may be away before others keep its replicas [5s]."),
    ("membership", "region|etcd", "Who elects the head: heartbeats in the region, or leases in etcd, for brokers on "
                                  "several hosts [region]."),
    ("etcd_endpoints", "HOST:PORT,...", "Where etcd listens, with membership etcd."),
    ("restart", "true|false", "Whether brokers that end are started anew [true]."),
    ("data_directory", "FOLDER", "Where replicas are written; they stay when the cluster stops [a folder of the "
                                 "cluster, which goes with it]."),
    ("listen_host", "HOST", "Address to listen at; 0.0.0.0 for publishers on other machines, which needs --security "
                            "[127.0.0.1]."),
    ("listen_port", "PORT", "Broker K listens at PORT + K; 0 takes any free port [0]."),
    ("runtime_directory", "FOLDER", "Where the cluster's folder (sockets, logs) is created [XDG_RUNTIME_DIR/cxlmq, or "
                                    "/tmp/cxlmq-UID]."),
    ("security", "DIR|FILE", "Mutual TLS, tokens and rights per topic, as `cxlmq security init` writes them [off]."),
    ("insecure_clear_text", "", "Listen beyond this machine without security: anybody can read and write."),
)


def config_options(function: CommandFunction) -> CommandFunction:
    """--config and one option per setting, as the argument `overrides` (see `load`)."""
    import functools

    @functools.wraps(function)
    def command(*args: Any, config: str | None, **values: Any) -> Any:
        overrides = {setting: values.pop(setting) for setting, _, _ in _SETTINGS}
        return function(*args, overrides={"path": config, **overrides}, **values)

    for setting, metavar, text in reversed(_SETTINGS):
        flag = "--" + setting.replace("_", "-")
        if metavar:
            command = click.option(flag, setting, metavar=metavar, help=text)(command)
        else:
            command = click.option(flag, setting, flag_value=True, default=None, help=text)(command)
    return click.option("--config", metavar="FILE.toml", type=click.Path(dir_okay=False),
                        help="Settings as TOML, named as the options with '_' for '-'; options given here win."
                        )(command)  # type: ignore[return-value]


# ---- output ------------------------------------------------------------------------------------------------------


def report(values: Any, text: str) -> None:
    """Tell what was changed: as JSON, or as a text for people."""
    output.report(settings().as_json, values, text)


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at this stream."""
    return bool(stream.isatty())


def console(stderr: bool = False) -> Any:
    """A rich console; wide when the output goes into a file, so that nothing is cut off."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if is_terminal(stream) else 2000)


def make_table(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> Any:
    """A rich table; a column whose name starts with '>' is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left",
                         overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def bytes_text(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def time_text(unix_ns: int) -> str:
    """A time for people."""
    import datetime

    return datetime.datetime.fromtimestamp(int(unix_ns) / 1e9, datetime.UTC).isoformat(timespec="milliseconds")


# ---- errors ------------------------------------------------------------------------------------------------------


def exit_code_of(error: CxlmqError) -> int:
    """The exit code for an error of ours."""
    if isinstance(error, _USAGE_ERRORS):
        return EXIT_USAGE
    return EXIT_MISSING if isinstance(error, _MISSING_ERRORS) else EXIT_FAILED


def print_error(code: str, message: str, details: dict[str, object], as_json: bool, **more: object) -> None:
    """One error, on standard error: a line for people, or a JSON line."""
    if as_json:
        say(json.dumps({"error": code, "message": message, "details": details, **more}, default=str))
    else:
        say(f"error: {' '.join(message.split())} ({code})" if "\n" not in message else f"error: {message} ({code})")
