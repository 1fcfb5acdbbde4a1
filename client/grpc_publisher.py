"""The engine of a publisher over gRPC: a stream to every broker, and every batch kept until it is settled.

    publish ─► Packer ─► pending ─► (stamped with the session's sequence) ─► a broker's stream ─► acks ─► deliveries

A broken stream's batches go to other brokers with the sequence they have; a fenced session is opened anew and goes on
behind what is in the log: see `client.publishing`.
"""

import asyncio
from array import array
from collections.abc import Hashable
from typing import Any

from broker.errors import CxlmqError
from broker.grpc_options import RECOMMENDED_WINDOW_BYTES
from broker.proto import cxlmq_pb2 as pb
from client.engine import Engine
from client.publishing.commands import Connect, Disconnect, Leave, Send
from client.publishing.stream_flights import StreamFlights, Way
from client.transport import PublishTransport

TICK_SECONDS = 0.05


class PublisherEngine(Engine):
    """Carries batches over gRPC streams."""

    def __init__(self, topic: str, *, in_flight: int, **options: Any) -> None:
        self.flights = StreamFlights(in_flight, RECOMMENDED_WINDOW_BYTES)
        super().__init__(topic, in_flight=in_flight, **options)
        self.transports: dict[Hashable, PublishTransport] = {}

    def _new_flights(self) -> StreamFlights:
        return self.flights

    def _opened(self) -> None:
        pass

    async def _supplied(self) -> None:
        pass                                # what a broker does not take yet waits

    def take_latencies(self) -> "array[int]":
        """Send-to-ack times since the last call, ns."""
        taken, self.flights.latencies = self.flights.latencies, array("q")
        return taken

    # ---- streams ----------------------------------------------------------------------------------------------------

    def _go(self, command: Connect | Disconnect | Leave | Send) -> None:
        match command:
            case Send(way, batch) if way in self.transports:
                self.transports[way].send(batch)
            case Connect():
                self._connect(command)
            case Disconnect(way) if way in self.transports:
                self.transports.pop(way).abandon()

    def _connect(self, command: Connect) -> None:
        way = command.way
        assert isinstance(way, Way)

        def on_results(response: pb.PublishResponse) -> None:
            self.flights.results(way, response, self.now())
            self._perform()

        def on_lost(error: CxlmqError) -> None:
            self.transports.pop(way, None)
            self.flights.way_lost(way, error, self.now())
            self._perform()

        try:
            channel = self.connection.channel(command.broker.target)
        except CxlmqError as error:
            self.flights.way_lost(way, error, self.now())
            return
        self.transports[way] = PublishTransport(command.broker, channel, command.opened, on_results, on_lost,
                                                self.compression)

    async def _finish_ways(self) -> None:
        await asyncio.gather(*(transport.close() for transport in list(self.transports.values())))

    def _pause(self) -> float:
        return TICK_SECONDS


__all__ = ["PublisherEngine"]
