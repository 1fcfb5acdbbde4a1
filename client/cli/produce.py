"""`cxlmq produce`: publish what comes from a file or standard input."""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import click

from broker.errors import ConfigError, CxlmqError, DuplicateTopic, UnknownTopic
from client.cli import common, split
from client.cli.common import CommandExit, Target, print_error, print_json, settings, target_options
from client.cli.topic import check_topic, topic_options


@dataclass
class Outcome:
    """What came of it."""

    topic: str
    messages: int = 0
    bytes: int = 0
    acknowledged: int = 0
    seconds: float = 0.0
    last_position: int | None = None


@click.command()
@click.argument("topic")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@click.option("--keep-newline", is_flag=True, help="The newline belongs to the message.")
@click.option("--length-prefixed", is_flag=True, help="Each message follows its length (4 bytes, little-endian).")
@click.option("--prefix-bytes", type=click.Choice([str(each) for each in split.PREFIX_BYTES]), default="4",
              show_default=True, help="Bytes of each length, with --length-prefixed.")
@click.option("--big-endian", is_flag=True, help="Lengths are big-endian, as `consume -f %R%s` writes them.")
@click.option("--whole", is_flag=True, help="All of the input is one message.")
@click.option("--ack", type=click.Choice(["0", "1", "2"]),
              help="What counts as taken. 0: sent, 1: ordered, 2: on the replicas' disks [as the topic says].")
@click.option("--batch-size", type=common.SIZE, help="Bytes of a batch [adapted between 64KiB and 4MiB].")
@click.option("--linger", type=common.DURATION, default="1ms", show_default=True,
              help="How long a batch that is not full waits for more.")
@click.option("--transport", default="auto", show_default=True, metavar="auto|grpc|attached",
              help="How to reach the brokers; auto takes the fastest that works.")
@click.option("--timeout", type=common.DURATION, default="30s", show_default=True,
              help="A message that is not acknowledged by then has failed.")
@click.option("--create", is_flag=True, help="Create the topic when it is missing, with --order, "
                                             "--replication-factor, --retention and --ack.")
@topic_options
@target_options
def produce(topic: str, file: str, target: Target, **options: Any) -> None:
    """Publish messages from FILE, or from standard input: one message a line.

    Lines end at "\\n", which is not part of the message; an empty line is an empty message; any bytes are allowed.
    It succeeds only when every message is acknowledged; else it says how many are, and exits with 1.

    \b
    Examples:
      echo hello | cxlmq produce greetings --create
      cxlmq produce frames can-2014.log
      tail -f app.log | cxlmq produce logs --linger 5ms
      cxlmq consume old -f '%R%s' | cxlmq produce new --length-prefixed --big-endian
      cxlmq produce pictures cat.jpg --whole
    """
    if options["whole"] and options["length_prefixed"]:
        raise click.UsageError("give --whole or --length-prefixed, not both")
    if options["keep_newline"] and (options["whole"] or options["length_prefixed"]):
        raise click.UsageError("--keep-newline is for lines")
    _check_name(topic)
    wanted = check_topic(topic, options["order"], int(options["ack"] or 1), options["replication_factor"],
                         options["retention"]) if options["create"] else None
    with _opened(file) as descriptor:
        if wanted is not None:
            _create_if_missing(target, wanted)
        outcome, error = _publish_all(topic, target, descriptor, options)
    _report(outcome, error)


def _check_name(topic: str) -> None:
    from broker.config import check_topic_name

    check_topic_name(topic)


class _opened(AbstractContextManager[int]):
    """The input's file descriptor; standard input is left open. Raises `ConfigError`."""

    def __init__(self, file: str) -> None:
        self._close = file != "-"
        try:
            self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if self._close else 0
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}", setting="file", value=file) from error

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        if self._close:
            os.close(self._descriptor)


def _create_if_missing(target: Target, wanted: dict[str, Any]) -> None:
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        try:
            admin.describe_topic(wanted["name"])
        except UnknownTopic:
            try:
                admin.create_topic(**wanted)
            except DuplicateTopic:          # somebody was faster
                return
            if not settings().as_json:
                common.say(f"note: topic {wanted['name']!r} is created")


def _messages(descriptor: int, options: dict[str, Any]) -> Iterator[list[bytes]]:
    chunks = split.read_chunks(descriptor)
    if options["whole"]:
        return split.whole(chunks)
    if options["length_prefixed"]:
        return split.split_prefixed(chunks, int(options["prefix_bytes"]), "big" if options["big_endian"] else "little")
    return split.split_lines(chunks, options["keep_newline"])


def _publish_all(topic: str, target: Target, descriptor: int,
                 options: dict[str, Any]) -> tuple[Outcome, BaseException | None]:
    """Publish everything; what stopped it, if anything did, beside what came of it."""
    from client.publisher import Publisher

    outcome = Outcome(topic)
    failed: BaseException | None = None
    started = time.monotonic()
    publisher = Publisher(
        topic, **target.arguments, transport=options["transport"], linger_ms=options["linger"] * 1000,
        ack=None if options["ack"] is None else int(options["ack"]), batch_bytes=options["batch_size"],
        delivery_timeout=options["timeout"])
    try:
        with publisher, _progress(descriptor) as progress:
            try:
                _pump(publisher, _messages(descriptor, options), outcome, progress)
            except (CxlmqError, KeyboardInterrupt, OSError) as error:
                failed = error
    except CxlmqError as error:             # closing found messages that are not acknowledged
        failed = failed or error
    outcome.seconds = time.monotonic() - started
    outcome.acknowledged = publisher.statistics()["acked"]
    if failed is None and outcome.acknowledged < outcome.messages:
        failed = CxlmqError("some messages in the middle were not acknowledged: publish them again")
    return outcome, failed


def _pump(publisher: Any, groups: Iterator[list[bytes]], outcome: Outcome, progress: Any) -> None:
    """Publish group after group; stop at the first that has failed."""
    outstanding: deque[Any] = deque()       # the delivery of each group's last message
    for messages in groups:
        outstanding.append(publisher.publish_many(messages))
        outcome.messages += len(messages)
        outcome.bytes += sum(map(len, messages))
        while outstanding and outstanding[0].done():
            outcome.last_position = outstanding.popleft().result().position
        progress.show(outcome)
    publisher.flush()
    for delivery in outstanding:
        outcome.last_position = delivery.result().position


def _report(outcome: Outcome, error: BaseException | None) -> None:
    seconds = max(outcome.seconds, 1e-9)
    values = {**asdict(outcome), "seconds": round(outcome.seconds, 6),
              "megabytes_per_second": round(outcome.bytes / seconds / 1e6, 3)}
    if isinstance(error, CxlmqError):
        message = f"{error.message}; {outcome.acknowledged} of {outcome.messages} messages are acknowledged"
        print_error(error.code, message, error.details, settings().as_json, **values)
        raise CommandExit(common.exit_code_of(error))
    if error is not None:
        common.say(f"stopped: {outcome.acknowledged} of {outcome.messages} messages are acknowledged")
        raise error
    if settings().as_json:
        print_json(values)
        return
    where = "" if outcome.last_position is None else f", the last at position {outcome.last_position}"
    common.say(f"{outcome.messages:,} messages, {outcome.bytes:,} bytes in {outcome.seconds:.3f} s "
               f"({outcome.bytes / seconds / 1e6:.1f} MB/s){where}")


# ---- progress ----------------------------------------------------------------------------------------------------


class _Silent:
    """No progress: nobody looks."""

    def show(self, outcome: Outcome) -> None:
        """Nothing."""


class _Bar(AbstractContextManager["_Bar"]):
    """Bytes so far, on standard error."""

    def __init__(self, total: int | None) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._bar = Progress(TextColumn("{task.fields[messages]:,} messages"), BarColumn(), DownloadColumn(),
                             TransferSpeedColumn(), console=common.console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total, messages=0)

    def show(self, outcome: Outcome) -> None:
        """What is published by now."""
        self._bar.update(self._task, completed=outcome.bytes, messages=outcome.messages)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _progress(descriptor: int) -> AbstractContextManager[Any]:
    # What is typed at the terminal needs no bar between its lines.
    typed = os.isatty(descriptor)
    if settings().as_json or typed or not common.is_terminal(sys.stderr):
        return nullcontext(_Silent())
    status = os.fstat(descriptor)
    return _Bar(status.st_size if stat.S_ISREG(status.st_mode) else None)


