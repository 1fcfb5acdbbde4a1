"""One publisher process of a benchmark: publishes so many messages when it is told to, and says what that took.

    measuring process  ──{"messages", "start_ns"}──►  this process  ──{"started_ns", "ended_ns", ...}──►

The messages come from `pattern`. Their rows are made once; before each use only the stamps are renewed, so that what is
measured is the product and not the generator.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from broker.errors import CxlmqError
from client.bench import pattern

MODULE = "client.bench.load"
# Rows that are handed over at once: small enough to stay in a core's own cache.
BLOCK_BYTES = 1 << 20
# Enough for every percentile, and little enough to hand over as text.
LATENCIES_MAX = 200_000
# Large messages: enough rows that two neighbours never look alike.
ROWS_MIN = 3


@dataclass(frozen=True)
class LoadSettings:
    """What a publisher process needs to know."""

    topic: str
    cluster: str
    bootstrap: str | None
    transport: str
    publisher: int
    message_bytes: int
    batch_bytes: int | None
    ack: int
    in_flight: int = 8
    delivery_timeout: float = 60.0

    def to_json(self) -> str:
        """For the process's argument."""
        return json.dumps(asdict(self))


def period_of(message_bytes: int) -> int:
    """After so many messages the rows of a publisher come again with new stamps.

    A prime, so that a row never meets its own leftovers of an earlier lap at a regular distance.
    """
    rows = max(ROWS_MIN, BLOCK_BYTES // max(1, message_bytes))
    while any(rows % divisor == 0 for divisor in range(2, math.isqrt(rows) + 1)):
        rows -= 1
    return rows


class Load:
    """Publishes the next messages of one publisher."""

    def __init__(self, settings: LoadSettings, publisher: Any) -> None:
        self._settings = settings
        self._publisher = publisher
        self._period = period_of(settings.message_bytes)
        self._rows = numpy.zeros((self._period, settings.message_bytes), numpy.uint8)
        pattern.fill(self._rows, settings.publisher, 0, self._period)
        self._sequence = 0

    def run(self, messages: int, start_ns: int) -> dict[str, Any]:
        """Publish from `start_ns` (monotonic) on, wait for the last ack; times, CPU, batches and latencies."""
        before = self._publisher.statistics()
        self._publisher.take_latencies()
        time.sleep(max(0, start_ns - time.monotonic_ns()) / 1e9)
        cpu_ns, started_ns = time.process_time_ns(), time.monotonic_ns()
        last = self._publish(messages)
        self._publisher.flush()
        ended_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns() - cpu_ns
        after = self._publisher.statistics()
        if after["failed"] != before["failed"]:
            raise last.exception() or CxlmqError(f"{after['failed'] - before['failed']} messages were not delivered")
        latencies = self._publisher.take_latencies()
        return {"started_ns": started_ns, "ended_ns": ended_ns, "cpu_seconds": cpu_ns / 1e9,
                **{name: after[name] - before[name] for name in ("batches", "retries", "reopened")},
                "latencies_ns": latencies[:: max(1, -(-len(latencies) // LATENCIES_MAX))].tolist()}

    def _publish(self, messages: int) -> Any:
        end, last = self._sequence + messages, None
        while self._sequence < end:
            first = self._sequence % self._period
            rows = self._rows[first:min(self._period, first + end - self._sequence)]
            pattern.restamp(rows, self._settings.publisher, self._sequence)
            last = self._publisher.publish_array(rows)
            self._sequence += len(rows)
        return last


def main(argument: str) -> None:
    """Serve rounds until standard input ends. The first answer says that the session is open; one may be an error."""
    from client.publisher import Publisher

    # Ctrl-C reaches the whole process group, but the measuring process ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = LoadSettings(**json.loads(argument))
    options: dict[str, Any] = {
        "cluster": settings.cluster, "bootstrap": settings.bootstrap, "transport": settings.transport,
        "ack": settings.ack, "batch_bytes": settings.batch_bytes, "in_flight": settings.in_flight,
        "delivery_timeout": settings.delivery_timeout}
    try:
        with Publisher(settings.topic, **options) as publisher:
            load = Load(settings, publisher)
            _answer({"ready": True})
            for line in sys.stdin:
                _answer(load.run(**json.loads(line)))
    except CxlmqError as error:
        _answer({"error": f"{error.message} ({error.code})"})


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
