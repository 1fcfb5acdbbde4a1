"""A member of a consumer group: holds the group's lease, commits, and knows when it may not read any more.

The lease counts from when a request was sent: we stop reading before the broker lets somebody else begin.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from broker.config import check_group_name
from broker.errors import BrokerUnavailable, ConfigError, CxlmqError, GroupBusy, GroupNotDurable
from broker.proto import cxlmq_pb2 as pb
from client.connection import Connection
from client.start import Start, fill_start

RETRY_SECONDS = 0.2
BUSY_RETRY_SECONDS = 0.2
LOOK_SECONDS = 0.02


class Membership:
    """One member of one group. Coroutines run on the client loop; `processed` may be set from any thread."""

    def __init__(self, connection: Connection, topic: str, group: str, protect: bool, auto_commit: float | None,
                 wait: float) -> None:
        check_group_name(group)
        if auto_commit is not None and not auto_commit > 0:
            raise ConfigError(setting="auto_commit", value=repr(auto_commit), allowed="None, or seconds above 0")
        self._connection = connection
        self._names: dict[str, Any] = {"topic": topic, "group": group, "member": secrets.randbits(63) + 1}
        self._protect, self._wait = protect, wait
        self.auto_commit = auto_commit
        self.member_epoch = 0
        self.committed = 0
        self.processed: int | None = None       # everything below it may be committed
        self.handed: int | None = None          # everything below it was given out
        self.failure: CxlmqError | None = None
        self._lease_seconds = 0.0
        self._valid_until = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._committing = asyncio.Lock()

    # ---- on the client loop -----------------------------------------------------------------------------------------

    async def join(self, start: Start) -> int:
        """Become the reader; the committed position. Raises `GroupBusy` when somebody else reads for too long."""
        request = pb.JoinGroupRequest(**self._names, protect=self._protect,
                                      holder=f"process {os.getpid()} on {socket.gethostname()}"[:63])
        fill_start(request, start)
        deadline = time.monotonic() + self._wait
        while True:
            sent = time.monotonic()
            try:
                self._renewed(sent, await self._connection.any("Groups/Join", request, pb.GroupMembership))
                break
            except GroupBusy:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(min(BUSY_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
        self.failure = None
        self.processed = self.handed = self.committed
        self._beating = asyncio.get_running_loop().create_task(self._beat())
        return self.committed

    def _renewed(self, sent: float, membership: pb.GroupMembership) -> None:
        self.member_epoch, self.committed = membership.member_epoch, membership.position
        self._lease_seconds = membership.lease_ms / 1000
        self._valid_until = sent + self._lease_seconds

    def introduce(self, request: pb.SubscribeRequest) -> None:
        """Let a subscription say that we are the member."""
        request.group, request.member = self._names["group"], self._names["member"]
        request.member_epoch = self.member_epoch

    async def _beat(self) -> None:
        """Renew the lease, and commit what is processed, until somebody else is the member."""
        interval = self._lease_seconds / 3
        if self.auto_commit is not None:
            interval = min(interval, self.auto_commit)
        pause = interval
        while self.failure is None:
            await asyncio.sleep(pause)
            pause = interval
            ahead = self.auto_commit is not None and self.processed is not None and self.processed > self.committed
            try:
                await self.commit(self.processed if ahead else None)
            except (BrokerUnavailable, GroupNotDurable):
                pause = RETRY_SECONDS           # no head at the moment: whether the lease still lasts is for `valid`
            except CxlmqError as error:
                self.failure = error

    async def commit(self, position: int | None) -> None:
        """Commit a position, or only renew the lease. Raises `CommitRefused`, `GroupFenced`, `BrokerUnavailable`."""
        async with self._committing:
            request = pb.CommitGroupRequest(**self._names, member_epoch=self.member_epoch)
            if position is not None and position != self.committed:
                request.position = position     # of one that goes back the head says what is wrong with it
            sent = time.monotonic()
            self._renewed(sent, await self._connection.any("Groups/Commit", request, pb.GroupMembership))

    async def commit_surely(self, position: int) -> None:
        """As `commit`, and tries again while no head answers and the lease lasts."""
        while True:
            try:
                await self.commit(position)
                return
            except BrokerUnavailable:
                if time.monotonic() > self._valid_until:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def leave(self, position: int | None) -> None:
        """Commit a last position, and let others read at once."""
        if self._beating is None:
            return
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self._beating = None
        if self.failure is not None:
            return
        with contextlib.suppress(CxlmqError):   # the lease ends by itself
            if position is not None and position > self.committed:
                await self.commit(position)
            request = pb.LeaveGroupRequest(**self._names, member_epoch=self.member_epoch)
            await self._connection.any("Groups/Leave", request, pb.LeaveGroupResponse)

    # ---- anywhere ---------------------------------------------------------------------------------------------------

    def valid(self) -> bool:
        """Whether nobody else can be reading. Raises why we are the member no more."""
        if self.failure is not None:
            raise self.failure
        return time.monotonic() < self._valid_until

    def wait(self, timeout: float | None, sleep: Callable[[float], Any] = time.sleep) -> bool:
        """Wait until reading is allowed; False when the time is over first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.valid():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            sleep(LOOK_SECONDS)
        return True

    async def wait_async(self, timeout: float | None) -> bool:
        """As `wait`, from any event loop."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.valid():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True
