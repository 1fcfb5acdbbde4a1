"""`cxlmq consume`: print the messages of a topic."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from client.cli import common
from client.cli.common import Target, settings, target_options
from client.cli.format import DEFAULT_FORMAT, Batch, Formatter, compile_format, message_json

_FETCH_SECONDS = 0.5
# Small batches are gathered into writes of this size, unless somebody waits for each message.
_WRITE_BYTES = 256 * 1024


class StartType(click.ParamType):
    """beginning, end, or a position."""

    name = "start"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """The word, or the position as a number."""
        if value in ("beginning", "end") or isinstance(value, int):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is no place in a topic: allowed are beginning, end, or a position from 0", param, ctx)
        return int(value)


@click.command()
@click.argument("topic")
@click.option("--from", "start", type=StartType(), default="beginning", show_default=True,
              metavar="beginning|end|POSITION", help="Where to start.")
@click.option("--format", "-f", "text", default=DEFAULT_FORMAT, show_default=True, metavar="FORMAT",
              help="How to print a message; see below.")
@click.option("--count", "-c", type=click.IntRange(0), metavar="N", help="End after N messages.")
@click.option("--follow", is_flag=True, help="Go on at the end of the topic, and wait for more.")
@click.option("--transport", default="auto", show_default=True, metavar="auto|grpc|attached",
              help="How to reach a broker.")
@target_options
def consume(topic: str, start: str | int, text: str, count: int | None, follow: bool, transport: str,
            target: Target) -> None:
    """Print the messages of a topic, as raw bytes, in their order.

    Without --follow it ends at the end that the topic had when it started.

    \b
    A format holds literal text and (as in kcat):
      %s payload              %o position            %T timestamp, ms
      %S its length           %t topic               %k key, always empty; %K its length, always -1
      %R its length, 4 bytes  %p broker              %h headers, always empty
         big-endian           %% a percent sign      \\n \\r \\t \\0 \\\\ \\xNN bytes

    \b
    Examples:
      cxlmq consume frames > copy.log
      cxlmq consume frames --from end --follow -f '%o: %s\\n'
      cxlmq consume frames --from 100 --count 10 --json
      cxlmq consume pictures --count 1 -f %s > cat.jpg
    """
    from broker.config import check_topic_name

    check_topic_name(topic)
    formatter = compile_format(text, topic)
    end = None if follow else _end_of(topic, target)
    if count == 0 or (end is not None and (start == "end" or (isinstance(start, int) and start >= end))):
        return
    from client.subscriber import Subscriber

    with Subscriber(topic, **target.arguments, transport=transport, start=start) as subscriber:
        output = Output(formatter, topic, count, end, at_once=follow or common.is_terminal(sys.stdout))
        while not output.done(subscriber.position):
            batches = subscriber.fetch_batches(_FETCH_SECONDS)
            for batch in batches:
                output.write(batch)
            if not batches:
                output.flush()
        output.flush()


def _end_of(topic: str, target: Target) -> int:
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        return int(admin.describe_topic(topic)["end_position"])


class Output:
    """Renders batches up to a count and a position, and writes them in large pieces."""

    def __init__(self, formatter: Formatter, topic: str, count: int | None, end: int | None, at_once: bool) -> None:
        self._render = self._json if settings().as_json else formatter.render
        self._topic = topic
        self._left = count
        self._end = end
        self._at_once = at_once
        self._pieces: list[bytes] = []
        self._bytes = 0

    def done(self, position: int | None) -> bool:
        """Whether everything that was asked for is rendered, when `position` is next (None: not known yet)."""
        return self._left == 0 or (self._end is not None and position is not None and position >= self._end)

    def write(self, batch: Batch) -> None:
        """Take a batch, as far as it is wanted."""
        limit = self._left
        if self._end is not None:
            until_end = max(0, self._end - batch.position)
            limit = until_end if limit is None else min(limit, until_end)
        data, count = self._render(batch, limit)
        if self._left is not None:
            self._left -= count
        self._pieces.append(data)
        self._bytes += len(data)
        if self._at_once or self._bytes >= _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._bytes = [], 0
        write_all(data)

    def _json(self, batch: Batch, limit: int | None) -> tuple[bytes, int]:
        messages = batch.messages()[:limit]
        lines = [json.dumps(message_json(payload, position, self._topic, batch.broker, batch.timestamp_ns))
                 for position, payload in enumerate(messages, batch.position)]
        return "".join(line + "\n" for line in lines).encode(), len(lines)


def write_all(data: bytes, write: Callable[[int, memoryview], int] = os.write) -> None:
    """Write to standard output, all of it."""
    descriptor, rest = sys.stdout.fileno(), memoryview(data)
    while rest:
        rest = rest[write(descriptor, rest):]
