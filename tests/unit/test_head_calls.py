"""Calls that only the head may do wait for a head that serves, once, and are never reported as what a try of theirs did."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from broker import head_calls
from broker.errors import BrokerUnavailable, DuplicateTopic, status_of, to_metadata
from broker.head_calls import HeadCalls
from broker.layout import ControlBits
from broker.proto import cxlmq_pb2 as pb
from tests.manual_cluster import ManualCluster

METHOD = "Admin/CreateTopic"
ASKED = pb.CreateTopicRequest(name="t")


class Heads:
    """Brokers that can be head, on unix sockets, and one that is not and passes calls on."""

    def __init__(self, folder: Path) -> None:
        self.cluster = ManualCluster(brokers=3)
        self.memory, self.layout = self.cluster.memory, self.cluster.layout
        self.broker, self.is_head = 2, False
        self.addresses = {broker: f"unix:{folder}/{broker}.sock" for broker in range(3)}
        self.servers: dict[int, grpc.aio.Server] = {}
        self.calls = HeadCalls(self, lambda: None)
        self.log: list[str] = []

    def broker_line(self, broker: int) -> dict[str, Any]:
        return {"unix_address": self.addresses[broker]}

    def elect(self, broker: int, serving: bool = True) -> None:
        self.memory.store_word(self.layout.offset_of("control"), 5 << 32 | broker | (
            ControlBits.CONTROL_SERVING if serving else 0))

    async def start(self, broker: int, answer: Callable[[Any], Awaitable[pb.Topic]] | None = None) -> None:
        async def handler(request: pb.CreateTopicRequest, context: Any) -> pb.Topic:
            self.log.append(f"{broker} {request.name} by {context.peer()}")
            return await answer(context) if answer is not None else pb.Topic(name=request.name, number=broker)

        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cxlmq.v1.Admin", {
            "CreateTopic": grpc.unary_unary_rpc_method_handler(
                handler, pb.CreateTopicRequest.FromString, pb.Topic.SerializeToString)}),))
        server.add_insecure_port(self.addresses[broker])
        await server.start()
        self.servers[broker] = server

    async def kill(self, broker: int) -> None:
        await self.servers.pop(broker).stop(None)

    async def create(self) -> pb.Topic:
        made: pb.Topic = await self.calls.call(METHOD, ASKED, pb.Topic, DuplicateTopic)
        return made

    async def end(self) -> None:
        await self.calls.close()
        for server in self.servers.values():
            await server.stop(None)


def with_heads(tmp_path: Path, run: Callable[[Heads], Awaitable[None]]) -> None:
    async def main() -> None:
        heads = Heads(tmp_path)
        try:
            async with asyncio.timeout(60):
                await run(heads)
        finally:
            await heads.end()

    asyncio.run(main())


async def refuse(context: Any) -> pb.Topic:
    error = DuplicateTopic(topic="t")
    await context.abort(grpc.StatusCode[status_of(error)], error.message, to_metadata(error))
    raise AssertionError


async def never(_: Any) -> pb.Topic:
    await asyncio.sleep(60)
    raise AssertionError


@pytest.mark.parametrize("known", [False, True], ids=["first call", "kept channel"])
@pytest.mark.parametrize("recovering", [False, True])
def test_a_call_right_after_the_heads_death_waits_for_the_next_head(tmp_path: Path, known: bool, recovering: bool) -> None:
    async def run(heads: Heads) -> None:
        await heads.start(0)
        await heads.start(1)
        heads.elect(0)
        if known:
            assert (await heads.create()).number == 0
        await heads.kill(0)
        waiting = asyncio.create_task(heads.create())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        if recovering:
            heads.elect(1, serving=False)
            await asyncio.sleep(0.3)
            assert not waiting.done()
        heads.elect(1)
        assert (await waiting).number == 1

    with_heads(tmp_path, run)


def test_a_head_that_stands_still_is_left_when_another_one_is_head(tmp_path: Path) -> None:
    async def run(heads: Heads) -> None:
        await heads.start(0, never)
        await heads.start(1)
        heads.elect(0)
        waiting = asyncio.create_task(heads.create())
        while not heads.log:
            await asyncio.sleep(0.01)
        heads.elect(1)
        assert (await waiting).number == 1

    with_heads(tmp_path, run)


def test_what_a_lost_try_did_is_no_refusal(tmp_path: Path) -> None:
    async def run(heads: Heads) -> None:
        await heads.start(0, never)
        await heads.start(1, refuse)
        heads.elect(0)
        waiting = asyncio.create_task(heads.create())
        while not heads.log:
            await asyncio.sleep(0.01)
        await heads.kill(0)
        heads.elect(1)
        assert await waiting == pb.Topic()
        with pytest.raises(grpc.aio.AioRpcError):       # of a call whose first try it is
            await heads.create()

    with_heads(tmp_path, run)


@pytest.mark.parametrize("asked", [False, True])
def test_without_a_head_the_wait_ends(tmp_path: Path, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_calls, "HEAD_SECONDS", 1.0)

    async def run(heads: Heads) -> None:
        heads.elect(0)
        if asked:
            await heads.start(0, never)
        waiting = asyncio.create_task(heads.create())
        if asked:
            while not heads.log:
                await asyncio.sleep(0.01)
            await heads.kill(0)
        with pytest.raises(BrokerUnavailable) as refused:
            await waiting
        # Whether it may be made again without a thought.
        assert ("unsent" in refused.value.details) == (not asked)

    with_heads(tmp_path, run)


def test_we_do_not_ask_ourselves_before_we_serve(tmp_path: Path) -> None:
    async def run(heads: Heads) -> None:
        await heads.start(2)
        heads.elect(2)
        waiting = asyncio.create_task(heads.create())
        await asyncio.sleep(0.2)
        assert heads.log == []
        heads.is_head = True
        assert (await waiting).number == 2

    with_heads(tmp_path, run)


def test_channels_are_kept(tmp_path: Path) -> None:
    def sockets() -> int:
        return sum(1 for each in os.listdir("/proc/self/fd") if _link(each).startswith("socket:"))

    async def run(heads: Heads) -> None:
        await heads.start(0)
        heads.elect(0)
        await heads.create()
        before = sockets()
        channels = dict(heads.calls._channels)
        await asyncio.gather(*(heads.create() for _ in range(50)))
        assert sockets() == before
        assert heads.calls._channels == channels
        assert len(channels) == 1

    with_heads(tmp_path, run)


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def test_a_cancelled_call_is_ended_at_the_head(tmp_path: Path) -> None:
    ended = SimpleNamespace(seen=False)

    async def watched(_: Any) -> pb.Topic:
        try:
            await asyncio.sleep(60)
        finally:
            ended.seen = True
        raise AssertionError

    async def run(heads: Heads) -> None:
        await heads.start(0, watched)
        heads.elect(0)
        waiting = asyncio.create_task(heads.create())
        while not heads.log:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while not ended.seen:
            await asyncio.sleep(0.01)

    with_heads(tmp_path, run)
