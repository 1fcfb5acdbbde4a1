"""Calls that only the head may do, passed on to it by the other brokers, over a head change when one comes between.

    who is head? ─► its channel is ready ─► call ─► answer, or a typed error
         ▲               │ no                 │ cut off, or another one is head by now: it may have been done
         └───────────────┴────────────────────┘ until HEAD_SECONDS are over
"""

import asyncio
from typing import Any

import grpc
import grpc.aio

from broker.errors import ERROR_KEY, BrokerUnavailable, CxlmqError
from broker.grpc_options import channel_options
from broker.head import control_word, head_of, is_serving

HEAD_SECONDS = 10.0                     # for a head that serves: several leases, and a takeover
CALL_SECONDS = 30.0
LOOK_SECONDS = 0.05
WATCH_SECONDS = 0.25                    # between two looks whether the head that was asked still is head
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class HeadCalls:
    """This broker's channels to whoever is head."""

    def __init__(self, node: Any, own_metadata: Any) -> None:
        self._node, self._own_metadata = node, own_metadata
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(self, method: str, request: Any, reply: Any, done: type[CxlmqError] | None) -> Any:
        """The head's reply to a method ("Admin/CreateTopic").

        A try whose answer was lost may have done it all: `done` is the error that says so, when another one is made;
        the reply is empty then. Raises `BrokerUnavailable` when no head serves in time, AioRpcError with the head's
        refusal.
        """
        loop = asyncio.get_running_loop()
        deadline, asked, why = loop.time() + HEAD_SECONDS, False, "nobody is head"
        while loop.time() < deadline:
            head = self._serving()
            channel = None if head is None else self._channel(head)
            if channel is None or not await self._is_ready(channel):
                why = "nobody is head" if head is None else f"broker {head} is head and takes no call"
                await asyncio.sleep(LOOK_SECONDS)
                continue
            try:
                return await self._ask(channel, head, method, request, reply)
            except grpc.aio.AioRpcError as error:
                said = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
                if asked and done is not None and said == done.code:
                    return reply()
                if said is not None:
                    raise
                if error.code() not in _GONE:
                    why, asked = error.code().name.lower(), True
                    break
                why, asked = f"broker {head} went away", True
                await asyncio.sleep(LOOK_SECONDS)
        details = {} if asked else {"unsent": True}
        raise BrokerUnavailable(f"the head broker does not answer ({why}): only it changes topics and groups",
                                address="head", **details)

    def _control(self) -> int:
        return int(control_word(self._node.memory, self._node.layout))

    def _serving(self) -> int | None:
        """The broker that is head and serves; of ourselves we know it first."""
        control = self._control()
        head = head_of(control)
        if not is_serving(control) or (head == self._node.broker and not self._node.is_head):
            return None
        return int(head)

    def _channel(self, head: int | None) -> grpc.aio.Channel | None:
        address = self._node.broker_line(head)["unix_address"]
        if address and address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=channel_options(1 << 20))
        return self._channels.get(address)

    @staticmethod
    async def _is_ready(channel: grpc.aio.Channel) -> bool:
        """Whether a call would reach somebody: one that never left may be made again without a thought."""
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                await channel.channel_ready()
        except TimeoutError:
            return False
        return True

    async def _ask(self, channel: grpc.aio.Channel, head: int | None, method: str, request: Any, reply: Any) -> Any:
        """The reply; the call is ended when another broker becomes head meanwhile. Raises AioRpcError."""
        call = channel.unary_unary(f"/cxlmq.v1.{method}", request.__class__.SerializeToString, reply.FromString)(
            request, timeout=CALL_SECONDS, metadata=self._own_metadata())
        answered = asyncio.ensure_future(_result(call))
        try:
            while not (await asyncio.wait({answered}, timeout=WATCH_SECONDS))[0]:
                if head_of(self._control()) != head:
                    call.cancel()           # it stands still, or is replaced: what it does no longer counts
            return await answered
        finally:
            call.cancel()
            answered.cancel()

    async def close(self) -> None:
        """Close the channels."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()


async def _result(call: Any) -> Any:
    """A call's reply; AioRpcError also when we ended it ourselves."""
    try:
        return await call
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata()) from None
