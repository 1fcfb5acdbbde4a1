"""`cxlmq consume`: print the messages of a topic."""

import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from client.cli import common, places
from client.cli.common import Target, say, settings, target_options
from client.cli.ending import Stopped
from client.cli.format import DEFAULT_FORMAT, Batch, Formatter, compile_format, message_json
from client.cli.output import OutputFailed, write_bytes
from client.start import Start

_FETCH_SECONDS = 0.5
_COMMIT_SECONDS = 0.5
# Small batches are gathered into writes of this size, unless somebody waits for each message.
_WRITE_BYTES = 256 * 1024


@click.command()
@click.argument("topic")
@click.option("--from", "place", type=places.PlaceType(), default="beginning", show_default=True,
              metavar=places.METAVAR, help=f"Where to start; {places.HELP}")
@click.option("--group", metavar="NAME",
              help="Go on where this group has committed, and commit what is printed; --from is for a new group.")
@click.option("--protect", is_flag=True, help="From now on the group keeps what it has not committed.")
@click.option("--group-wait", type=common.DURATION, default="0s", metavar="TIME",
              help="How long to wait for another reader of the group to leave.")
@click.option("--format", "-f", "text", default=DEFAULT_FORMAT, show_default=True, metavar="FORMAT",
              help="How to print a message; see below.")
@click.option("--count", "-c", type=click.IntRange(0), metavar="N", help="End after N messages.")
@click.option("--follow", is_flag=True, help="Go on at the end of the topic, and wait for more.")
@click.option("--transport", default="auto", show_default=True, metavar="auto|grpc|attached",
              help="How to reach a broker.")
@target_options
def consume(topic: str, place: Start | places.Last, group: str | None, protect: bool, group_wait: float, text: str,
            count: int | None, follow: bool, transport: str, target: Target) -> None:
    """Print the messages of a topic, as raw bytes, in their order.

    Without --follow it ends at the end that the topic had when it started. Stopped by Ctrl-C, SIGTERM or SIGHUP, a
    member of a group commits what it has printed and leaves.

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
      cxlmq consume frames --from -10                   the last ten messages
      cxlmq consume frames --from 5m --follow           what was published since five minutes ago, and what comes
      cxlmq consume frames --from 2026-11-21T10:00:00Z
      cxlmq consume frames --group recorder --protect --follow >> recording.log
      cxlmq consume pictures --count 1 -f %s > cat.jpg
    """
    from broker.config import check_topic_name

    check_topic_name(topic)
    formatter = compile_format(text, topic)
    topic_end = int(places.bounds(topic, target)["end_position"])
    start = places.settled(place, topic, target)
    end = None if follow else topic_end
    if isinstance(start, int) and start >= topic_end and group is None:
        say(f"note: topic {topic} ends at position {topic_end}: there is nothing from {start} on yet")
    if group is None and (count == 0 or (end is not None and (
            start == "end" or (isinstance(start, int) and start >= end)))):
        return
    from client.subscriber import Subscriber

    with Subscriber(topic, **target.arguments, transport=transport, start=start, group=group, protect=protect,
                    group_wait=group_wait) as subscriber:
        output = Output(formatter, topic, count, end, at_once=follow or common.is_terminal(sys.stdout))
        commit = Committer(subscriber.commit) if group else None
        try:
            _print_all(subscriber, output, commit)
        except Stopped:
            if commit:
                commit.now(output)
            raise
    if output.printed is None and isinstance(start, datetime.datetime) and group is None:
        say(f"note: nothing was published since {start.isoformat(timespec='seconds')}: topic {topic} ends at position "
            f"{topic_end}")


def _print_all(subscriber: Any, output: "Output", commit: "Committer | None") -> None:
    while not output.done(subscriber.position):
        batches = subscriber.fetch_batches(_FETCH_SECONDS)
        for batch in batches:
            output.write(batch)
        if not batches:
            output.flush()
        if commit:
            commit.soon(output)
    output.flush()
    if commit:
        commit.now(output)


class Committer:
    """Commits what was printed, and not oftener than it pays."""

    def __init__(self, commit: Callable[[int], None]) -> None:
        self._commit = commit
        self._next = 0.0
        self._done: int | None = None

    def soon(self, output: "Output") -> None:
        """Commit what is printed, if the last time is long enough ago."""
        if time.monotonic() >= self._next:
            output.flush()
            self.now(output)

    def now(self, output: "Output") -> None:
        """Commit what is printed."""
        if output.printed is not None and output.printed != self._done:
            self._commit(output.printed)
            self._done = output.printed
        self._next = time.monotonic() + _COMMIT_SECONDS


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
        self._first: int | None = None
        self._rendered: int | None = None
        self.printed: int | None = None         # every message below this position was written

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
        if self._first is None:
            self._first = batch.position
        self._rendered = batch.position + count
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
        try:
            write_bytes(data)
        except OutputFailed as error:
            place = self._first if self.printed is None else self.printed
            again = "" if place is None else f"; go on with --from {place}"
            raise OutputFailed(f"{error.message}{again}", **error.details) from None
        self.printed = self._rendered

    def _json(self, batch: Batch, limit: int | None) -> tuple[bytes, int]:
        messages = batch.messages()[:limit]
        lines = [json.dumps(message_json(payload, position, self._topic, batch.broker, batch.timestamp_ns))
                 for position, payload in enumerate(messages, batch.position)]
        return "".join(line + "\n" for line in lines).encode(), len(lines)
