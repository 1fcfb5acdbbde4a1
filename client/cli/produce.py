"""`cxlmq produce`: publish what comes from a file or standard input."""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import click

from broker.errors import ConfigError, CxlmqError, DuplicateTopic, UnknownTopic
from client.cli import common, output, split
from client.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CommandExit,
    Target,
    print_error,
    settings,
    target_options,
)
from client.cli.ending import Gently, Stopped
from client.cli.topic import check_topic, topic_options


@dataclass
class Outcome:
    """What came of it."""

    topic: str
    messages: int = 0
    bytes: int = 0
    acknowledged: int = 0
    seconds: float = 0.0
    incomplete_bytes: int = 0       # read of a message whose end never came: not published
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
@click.option("--linger", type=common.MILLISECONDS, default="1", show_default="1 ms", metavar="TIME",
              help="How long a batch that is not full waits for more: milliseconds, as linger_ms of the library, or a "
                   "time with its unit (5ms, 0.1s).")
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
    It succeeds only when every message is acknowledged; else it says how many are, and exits with 1. Ctrl-C, SIGTERM
    and SIGHUP end the input: what was read is published, and when all of it is acknowledged the exit code is that of
    the signal (130, 143, 129); a second one gives up. Half a message is not published, and said.

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
    with _opened(file) as descriptor, Gently(_tell_of_stopping) as signals:
        if wanted is not None:
            _create_if_missing(target, wanted)
        outcome, error = _publish_all(topic, target, _Input(descriptor, signals, options), options)
    _report(outcome, error)


def _tell_of_stopping() -> None:
    common.say("stopping: what was read is being published; once more to give up")


def _chunks(descriptor: int, signals: Gently) -> Iterator[bytes]:
    """The input as it comes. Raises `Stopped` when it is to end before its end, and `InputFailed`."""
    try:
        yield from split.read_chunks(descriptor, signals.wait_for_input)
    except OSError as error:
        raise InputFailed(reason=error.strerror or str(error)) from error


def _check_name(topic: str) -> None:
    from broker.config import check_topic_name

    check_topic_name(topic)


class InputFailed(CxlmqError):
    """The input ends in an error; details: reason."""

    code: ClassVar[str] = "input"
    template = "the input cannot be read ({reason}): what was read before is published"


class _opened(AbstractContextManager[int]):
    """The input's file descriptor; standard input is left open. Raises `ConfigError`."""

    def __init__(self, file: str) -> None:
        self._close = file != "-"
        if not self._close and not output.has_input():
            raise ConfigError("standard input is closed: give it a file or a pipe, or name a FILE", setting="file",
                              value="-")
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


class _Input:
    """The messages of a descriptor. Everything that was read is counted in `outcome`, whatever ends it."""

    def __init__(self, descriptor: int, signals: Gently, options: dict[str, Any]) -> None:
        self.descriptor = descriptor
        self._signals = signals
        self._pending = bytearray()
        self._groups = self._split(_chunks(descriptor, signals), options)

    def _split(self, chunks: Iterator[bytes], options: dict[str, Any]) -> Iterator[list[bytes]]:
        if options["whole"]:
            return split.whole(chunks, self._pending)
        if options["length_prefixed"]:
            return split.split_prefixed(chunks, self._pending, int(options["prefix_bytes"]),
                                        "big" if options["big_endian"] else "little")
        return split.split_lines(chunks, self._pending, options["keep_newline"])

    def next_messages(self, outcome: Outcome) -> list[bytes]:
        """The next ones as they came; none at the end. Raises `Stopped`, `InputFailed`, `BadBatch`, `MessageTooBig`."""
        with self._signals.held():
            try:
                messages = next(self._groups, [])
                outcome.messages += len(messages)
                outcome.bytes += sum(map(len, messages))
            finally:
                outcome.incomplete_bytes = len(self._pending)
        return messages


def _publish_all(topic: str, target: Target, read: _Input,
                 options: dict[str, Any]) -> tuple[Outcome, BaseException | None]:
    """Publish everything; what stopped it, if anything did, beside what came of it."""
    from client.publisher import Publisher

    outcome = Outcome(topic)
    failed: BaseException | None = None
    started = time.monotonic()
    publisher = Publisher(
        topic, **target.arguments, transport=options["transport"], linger_ms=options["linger"],
        ack=None if options["ack"] is None else int(options["ack"]), batch_bytes=options["batch_size"],
        delivery_timeout=options["timeout"])
    try:
        with publisher, _progress(read.descriptor) as progress:
            try:
                _pump(publisher, read, outcome, progress)
            except (CxlmqError, KeyboardInterrupt) as error:
                failed = error
    except (CxlmqError, KeyboardInterrupt) as error:    # closing found messages without an ack, or was stopped
        failed = failed or error
    outcome.seconds = time.monotonic() - started
    outcome.acknowledged = publisher.statistics()["acked"]
    if failed is None and outcome.acknowledged < outcome.messages:
        failed = CxlmqError("some messages in the middle were not acknowledged: publish them again")
    return outcome, failed


def _pump(publisher: Any, read: _Input, outcome: Outcome, progress: Any) -> None:
    """Publish group after group; stop at the first that has failed."""
    outstanding: deque[Any] = deque()       # the delivery of each group's last message
    while messages := read.next_messages(outcome):
        outstanding.append(publisher.publish_many(messages))
        while outstanding and outstanding[0].done():
            outcome.last_position = outstanding.popleft().result().position
        progress.show(outcome)
    publisher.flush()
    for delivery in outstanding:
        outcome.last_position = delivery.result().position


def _report(outcome: Outcome, error: BaseException | None) -> None:
    """Say what became of the messages; the exit code says so, too."""
    seconds = max(outcome.seconds, 1e-9)
    values = {**asdict(outcome), "seconds": round(outcome.seconds, 6),
              "megabytes_per_second": round(outcome.bytes / seconds / 1e6, 3)}
    half = "" if not outcome.incomplete_bytes else (
        f"; {outcome.incomplete_bytes} bytes of a message without its end are not published")
    counts = f"{outcome.acknowledged} of {outcome.messages} messages are acknowledged{half}"
    if isinstance(error, CxlmqError):
        print_error(error.code, f"{error.message}; {counts}", error.details, settings().as_json, **values)
        raise CommandExit(common.exit_code_of(error))
    if error is not None and outcome.acknowledged < outcome.messages:
        print_error("stopped", f"stopped, and {counts}: the others may be in the log or not", {}, settings().as_json,
                    **values)
        raise CommandExit(EXIT_FAILED)
    where = "" if outcome.last_position is None else f", the last at position {outcome.last_position}"
    counted = "message" if outcome.messages == 1 else "messages"
    text = (f"{outcome.messages:,} {counted}, {outcome.bytes:,} bytes in {outcome.seconds:.3f} s "
            f"({outcome.bytes / seconds / 1e6:.1f} MB/s){where}")
    if settings().as_json:
        common.report(values, text)
    else:
        common.say(text if error is None else
                   f"stopped, and all messages that were read are acknowledged: {text}{half}")
    if error is not None:
        raise CommandExit(error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED)


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


