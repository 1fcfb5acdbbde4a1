"""A member of a consumer group: holds the group's lease, commits, and knows when it may not read any more.

The lease counts from when a request was sent: we stop reading before the broker lets somebody else begin.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from broker.config import check_group_name
from broker.errors import (
    CommitRefused,
    ConfigError,
    CxlmqError,
    GroupBusy,
    GroupFenced,
    GroupNotDurable,
    UnknownGroup,
)
from broker.proto import cxlmq_pb2 as pb
from broker.records import HOLDER_BYTES, fitted
from client.arguments import as_seconds
from client.connection import Connection
from client.start import Start, fill_start

RETRY_SECONDS = 0.2
BUSY_RETRY_SECONDS = 0.2
LOOK_SECONDS = 0.02
LEAVE_SECONDS = 2.0                     # for a word that may go unheard: the lease ends by itself


class Processed:
    """How far all threads and tasks have come that read for one member: what may be committed without being asked for.

    Whoever asks for more, or has ended, has processed what it was given. Any thread.
    """

    def __init__(self) -> None:
        self._at_work: dict[Any, int] = {}      # who -> where the log stood when it asked: it was given nothing before
        self._lock = threading.Lock()

    def asks(self, who: threading.Thread | asyncio.Task[Any] | None, handed: int) -> int:
        """Somebody asks when everything below `handed` was given out; below what it returns, all is processed."""
        with self._lock:
            self._at_work[who] = handed
            if len(self._at_work) > 1:
                for each in [each for each in self._at_work if each is not who and _has_ended(each)]:
                    del self._at_work[each]
            return min(self._at_work.values())

    def got_nothing(self, who: threading.Thread | asyncio.Task[Any] | None) -> None:
        """Nothing came: it is at work on nothing."""
        with self._lock:
            self._at_work.pop(who, None)

    def committed(self, position: int) -> None:
        """Somebody says that all below a position is processed, whoever was given it."""
        with self._lock:
            self._at_work = {who: max(since, position) for who, since in self._at_work.items()}


def _has_ended(who: threading.Thread | asyncio.Task[Any]) -> bool:
    return not who.is_alive() if isinstance(who, threading.Thread) else who.done()


class Membership:
    """One member of one group. Coroutines run on the client loop; `processed` may be set from any thread."""

    def __init__(self, connection: Connection, topic: str, group: str, protect: bool, auto_commit: float | None,
                 wait: float) -> None:
        check_group_name(group)
        if auto_commit is not None and as_seconds("auto_commit", auto_commit) == 0:
            raise ConfigError(setting="auto_commit", value=repr(auto_commit), allowed="None, or seconds above 0")
        self._connection = connection
        self._names: dict[str, Any] = {"topic": topic, "group": group, "member": secrets.randbits(63) + 1}
        self._protect, self._wait = protect, as_seconds("group_wait", wait)
        self.auto_commit = auto_commit
        self.member_epoch = 0
        self.committed = 0
        self.seen = pb.TopicIdentity()          # of the topic that we joined
        self.processed: int | None = None       # everything below it may be committed
        self.work = Processed()
        self.failure: CxlmqError | None = None
        self._lease_seconds = 0.0
        self._valid_until = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._committing = asyncio.Lock()

    # ---- on the client loop -----------------------------------------------------------------------------------------

    async def join(self, start: Start) -> int:
        """Become the reader; the committed position. Raises `GroupBusy` when somebody else reads for too long.

        Refused or cancelled, we hold nothing.
        """
        deadline = None if self._wait is None else time.monotonic() + self._wait
        while True:
            try:
                await self._join(start)
                break
            except GroupBusy:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                left = BUSY_RETRY_SECONDS if deadline is None else deadline - time.monotonic()
                await asyncio.sleep(min(BUSY_RETRY_SECONDS, max(0.0, left)))
        self.failure = None
        self.processed = self.committed
        self._beating = asyncio.get_running_loop().create_task(self._beat())
        return self.committed

    async def _join(self, start: Start) -> None:
        request = pb.JoinGroupRequest(**self._names, protect=self._protect, seen=self.seen,
                                      holder=fitted(f"process {os.getpid()} on {socket.gethostname()}", HOLDER_BYTES))
        fill_start(request, start)
        sent = time.monotonic()
        try:
            self._renewed(sent, await self._connection.undoable(
                self._connection.any("Groups/Join", request, pb.GroupMembership), lambda _: self._say_goodbye()))
        except CxlmqError as error:
            if error.comes_back:                # it may have been done, and nobody could tell us
                await self._say_goodbye()
            raise

    async def _say_goodbye(self) -> None:
        request = pb.LeaveGroupRequest(**self._names, seen=self.seen)
        with contextlib.suppress(CxlmqError):   # the lease ends by itself
            await self._connection.any("Groups/Leave", request, pb.LeaveGroupResponse, LEAVE_SECONDS)

    def _renewed(self, sent: float, membership: pb.GroupMembership) -> None:
        self.member_epoch, self.committed = membership.member_epoch, membership.position
        self._lease_seconds = membership.lease_ms / 1000
        self._valid_until = sent + self._lease_seconds
        self.seen.CopyFrom(membership.topic)

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
            try:
                try:
                    await self.commit(self._to_commit)
                except CommitRefused:           # a commit that was given up is done all the same: ask where we are
                    await self.commit(lambda: None)
            except CxlmqError as error:
                pause = RETRY_SECONDS           # no head at the moment: whether the lease still lasts is for `valid`
                if not error.comes_back and not isinstance(error, GroupNotDurable):
                    self.failure = error
            except Exception as error:          # a mistake of ours: whoever reads is told
                self.failure = CxlmqError(f"internal error: {error!r}")
                raise

    def _to_commit(self) -> int | None:
        """With auto_commit, what is processed and not committed."""
        ahead = self.auto_commit is not None and self.processed is not None and self.processed > self.committed
        return self.processed if ahead else None

    async def commit(self, place: Callable[[], int | None]) -> None:
        """Commit a position, or (None) only renew the lease; `place` is asked when it is our turn.

        Raises `CommitRefused`, `GroupFenced`, `BrokerUnavailable`.
        """
        async with self._committing:
            try:
                await self._commit(place())
            except (GroupFenced, UnknownGroup) as error:
                if not error.details.get("recovered"):
                    raise
                await self._join_again(error)
                await self._commit(place())

    async def renew(self) -> None:
        """Say that we are there; in a recovered cluster, join again."""
        await self.commit(lambda: None)

    async def _commit(self, position: int | None) -> None:
        request = pb.CommitGroupRequest(**self._names, member_epoch=self.member_epoch, seen=self.seen)
        if position is not None and position != self.committed:
            request.position = position         # of one that goes back the head says what is wrong with it
        sent = time.monotonic()
        self._renewed(sent, await self._connection.any("Groups/Commit", request, pb.GroupMembership))

    async def _join_again(self, fenced: CxlmqError) -> None:
        """The cluster was recovered, and no head of it knows of members: go on, unless somebody read meanwhile."""
        before = self.committed
        await self._join(before)
        if self.committed > before:
            await self._say_goodbye()
            raise fenced

    async def commit_surely(self, position: int) -> None:
        """As `commit`, and tries again while no head answers and the lease lasts."""
        while True:
            try:
                await self.commit(lambda: position)
                self.work.committed(position)
                return
            except CxlmqError as error:
                if not error.comes_back or time.monotonic() > self._valid_until:
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
                await self.commit(lambda: position)
        request = pb.LeaveGroupRequest(**self._names, member_epoch=self.member_epoch, seen=self.seen)
        with contextlib.suppress(CxlmqError):
            await self._connection.any("Groups/Leave", request, pb.LeaveGroupResponse)

    # ---- anywhere ---------------------------------------------------------------------------------------------------

    def valid(self) -> bool:
        """Whether nobody else can be reading. Raises why we are the member no more."""
        if self.failure is not None:
            raise self.failure
        return time.monotonic() < self._valid_until

    def wait(self, deadline: float | None, sleep: Callable[[float], Any] = time.sleep) -> bool:
        """Wait until reading is allowed; False when the time is over first."""
        while not self.valid():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            sleep(LOOK_SECONDS)
        return True

    async def wait_async(self, deadline: float | None) -> bool:
        """As `wait`, from any event loop."""
        while not self.valid():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True
