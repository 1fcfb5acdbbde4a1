"""Subscribers of the simulated cluster: they follow the order, at one broker after the other."""

import asyncio
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerUnavailable, UnknownTopic
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader, ReadError, ReadStatus
from broker.sessions import CursorTable
from sim.cluster.history import Read, Violation
from sim.cluster.publishers import ANSWER_STEPS
from sim.cluster.witness import payload_sender

if TYPE_CHECKING:
    from sim.cluster.world import Host, World


class Subscriber:
    """Follows one topic from its first entry, at one broker after the other, with a cursor that protects it."""

    def __init__(self, world: "World", number: int, topic: Any) -> None:
        self.world, self.number, self.topic = world, number, topic
        self.random = world.scenario.random(f"subscriber {number}")
        self.name = f"reader {number}"
        self.reads: list[Read] = world.history.reads.setdefault(self.name, [])
        self.host: Host | None = None
        self.incarnation = 0
        self.presence = 0                   # not 0: its cursor protects views, also when its broker dies
        self.reader: OrderReader | None = None
        self.cursor = -1
        self.request: asyncio.Task[Any] | None = None
        self.request_until = 0
        self.index = 0

    def end(self) -> None:
        """The run is over."""

    def act(self) -> None:
        """Find a broker, or read there."""
        host = self.host
        if host is not None and (not host.powered or host.incarnation != self.incarnation):
            self.leave()
            host = None
        if host is None:
            self._choose()
        elif self.request is not None:
            self._wait()
        elif not host.stalled:
            if self.random.random() < 0.01 and not self.world.draining:
                self.leave()
            else:
                self.read()

    def _choose(self) -> None:
        live = [host for host in self.world.hosts if host.powered]
        if not live:
            return
        host = self.random.choice(live)
        key = self.topic.generation << 16 | self.topic.number
        self.host, self.incarnation = host, host.incarnation
        self.request = host.call(host.cursors.open(key, self.index, self.number + 1, presence=self.presence))
        self.request_until = self.world.step + ANSWER_STEPS

    def _wait(self) -> None:
        request = self.request
        assert request is not None and self.host is not None
        if request.done():
            self.request = None
            if request.cancelled() or request.exception() is not None:
                self.host = None
                return
            self.cursor, index = request.result()
            self._look_up()
            if index != self.index:         # what lay between was reclaimed while nobody protected it
                self.reads = self.world.history.reads.setdefault(f"{self.name} from {index}", [])
                self.index = index
            self.reader = OrderReader(self.host.delivery_door, self.world.layout, self.topic.number,
                                      self.topic.generation, index)
        elif self.world.step > self.request_until:
            self.leave()

    def _look_up(self) -> None:
        """A topic that exists can be opened by its name at any broker."""
        assert self.host is not None
        try:
            found = self.host.topics.find(self.topic.name)
        except BrokerUnavailable:
            return                          # a new head is taking over
        except UnknownTopic:
            raise Violation("T", f"host {self.host.number} does not know the topic {self.topic.name!r}") from None
        if found.generation != self.topic.generation and self.host.powered:
            raise Violation("T", f"host {self.host.number} knows generation {found.generation} of the topic, it is "
                                 f"{self.topic.generation}")

    def leave(self) -> None:
        """Give up the place at this broker."""
        host = self.host
        if host is not None and host.powered and host.incarnation == self.incarnation:
            if self.request is not None:
                self.request.add_done_callback(lambda asked: self._gave_up(asked, host.cursors))
                self.request.cancel()
            elif self.reader is not None:
                host.cursors.close(self.cursor)
        self.host = self.reader = self.request = None
        self.cursor = -1

    @staticmethod
    def _gave_up(asked: "asyncio.Task[Any]", cursors: CursorTable) -> None:
        """A place that was given when nobody waited for it any more."""
        if not asked.cancelled() and asked.exception() is None:
            cursors.close(asked.result()[0])

    def _refused(self, host: "Host", error: ReadError) -> None:
        """Its cursor protects it, so nothing is lost; a topic that is gone is told as such."""
        self.world.history.errors.append((f"{self.name} at host {host.number}: {error}",
                                          error.status == ReadStatus.READ_CLOSED or not host.powered))
        self.leave()

    def _take(self, position: int, count: int, payload: bytes) -> None:
        """Note the next batch, and hold it against the log."""
        read = Read(self.index, position, count, payload_sender(payload, count))
        self.world.check_read(self.name, read)
        self.reads.append(read)
        self.index += 1

    def read(self) -> int:
        """Read what is there, as one frame; how many batches it had."""
        reader, host = self.reader, self.host
        assert reader is not None and host is not None
        try:
            frame = reader.read_frame(self.random.choice((200, 2000, 20000)))
        except ReadError as error:
            self._refused(host, error)
            return 0
        if not frame or not host.powered:
            return 0
        batches = pb.SubscribeResponse.FromString(frame).batches
        for batch in batches:
            self._take(batch.position, batch.message_count, batch.payload)
        self.world.history.cursors.append((self.name, reader.index, reader.frontiers()["committed_index"]))
        host.cursors.move(self.cursor, reader.index)
        return len(batches)
