"""Consumer groups: named places in a topic's order, in the region, where every broker sees them and the head writes.

Invariants: a group's position never goes back but by `reset`, and never passes the end of the log; of several members
only the one that joined last commits, and nobody joins while another's lease lasts; what a protected group has not
committed is not reclaimed.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from broker.bank import Bank
from broker.errors import (
    BrokerUnavailable,
    CommitRefused,
    GroupBusy,
    GroupFenced,
    GroupNotDurable,
    GroupTableFull,
    PositionLost,
    UnknownGroup,
)
from broker.group_files import GroupRecord, read_group_files
from broker.head import HeadView, control_word, head_of
from broker.layout import GroupState, Layout, record_dtypes
from broker.reader import OrderReader
from broker.records import pack, record_bytes, unpack
from broker.recovery import read_manifests
from broker.sessions import CursorTable
from broker.topics import TopicEntry
from sim.cxl.memory import Memory

NOBODY = 0
LEASE_NS = 10_000_000_000
Durable = Callable[[TopicEntry, "Group"], Awaitable[None]]


async def _memory_is_enough(_: TopicEntry, __: "Group") -> None:
    """A place that need not be on a disk."""


def topic_key(topic: TopicEntry) -> int:
    """How records of the region name a topic."""
    return topic.generation << 16 | topic.number


@dataclass(frozen=True)
class Group:
    """A group as its line describes it."""

    number: int
    name: str
    version: int
    topic: int
    position: int
    index: int
    member: int
    member_epoch: int
    lease_until_ns: int
    committed_wall_ns: int
    protected: bool
    holder: str

    def record(self, topic: TopicEntry) -> GroupRecord:
        """What of it is kept on disk."""
        return GroupRecord(topic=topic.name, created_ns=topic.created_ns, group=self.name, version=self.version,
                           position=self.position, protected=self.protected, committed_wall_ns=self.committed_wall_ns)


def read_groups(folder: Path, topics: Collection[tuple[str, int]]) -> tuple[list[GroupRecord], list[str]]:
    """The groups of these topics (name, created) in a data directory, and what is damaged there."""
    began_by = {each.run_id: number for number, each in enumerate(read_manifests(folder), 1)}
    records, damaged = read_group_files(sorted(folder.glob("broker-*")), lambda run_id: began_by.get(run_id, 0))
    return [each for each in records if (each.topic, each.created_ns) in topics], damaged


class GroupTable:
    """Reads the group table of the serving head; at the head, everything else as well, in its own bank.

    `now` is the monotonic clock, `wall` the other, both in ns.
    """

    def __init__(self, memory: Memory, layout: Layout, now: Callable[[], int], wall: Callable[[], int],
                 cursors: CursorTable, pid: int, bank: Bank | None = None) -> None:
        self._memory, self._layout, self._now, self._wall = memory, layout, now, wall
        self._bank = bank or Bank(memory, layout)
        self._head = HeadView(memory, layout)
        self._cursors, self._pid = cursors, pid
        self._count = layout.numbers["group_count_max"]
        self._lock = asyncio.Lock()
        self._lead: tuple[int, int] | None = None       # since when we lead, and how long leases are
        self._leases: dict[int, tuple[int, int]] = {}   # number -> member epoch, end of the lease that we gave

    def lead(self, layout: Layout, lease_ns: int = LEASE_NS) -> None:
        """This broker is head from now on, and writes the bank of `layout`."""
        self._bank.lead(layout)
        self.begin_term(lease_ns)

    def begin_term(self, lease_ns: int = LEASE_NS) -> None:
        """From now on leases are counted from when we began."""
        self._lead = self._now(), lease_ns
        self._leases.clear()

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _states(self) -> Any:
        """The state words of all groups."""
        stride = self._layout.offset_of("group", 1) - self._layout.offset_of("group", 0)
        data = self._head.read_bytes((self._count - 1) * stride + 64, "group", 0)
        return numpy.ndarray((self._count,), record_dtypes()["GroupLine"], data, strides=(stride,))["state"]

    def entries(self, topics: Collection[int] | None = None) -> list[Group]:
        """All groups, or those of these topics (keys)."""
        found = [self._read(int(number)) for number in numpy.flatnonzero(self._states() & 0xFF)]
        return [each for each in found if topics is None or each.topic in topics]

    def _read(self, number: int) -> Group:
        data = self._head.read_bytes(3 * 64, "group", number)
        line = unpack("GroupLine", data[:64])
        name, holder = unpack("GroupName", data[64:128])["text"], unpack("GroupHolder", data[128:])["text"]
        state = line.pop("state")
        return Group(number=number, name=name, version=state >> 8, holder=holder if line["member"] else "",
                     protected=state & 0xFF == GroupState.GROUP_PROTECTED, **line)

    def find(self, topic: TopicEntry, name: str) -> Group:
        """A group. Raises `UnknownGroup`."""
        for group in self.entries((topic_key(topic),)):
            if group.name == name:
                return group
        raise UnknownGroup(group=name, topic=topic.name)

    def require_member(self, topic: TopicEntry, name: str, member: int, member_epoch: int) -> Group:
        """The group, if this is the member that joined last. Raises `GroupFenced`, `UnknownGroup`."""
        group = self.find(topic, name)
        if (group.member, group.member_epoch) != (member, member_epoch):
            raise GroupFenced(group=name, topic=topic.name, holder=group.holder or "nobody (it was reset or left)")
        return group

    def lease_left_ns(self, group: Group) -> int:
        """How long the member's lease lasts; 0 or less when nobody reads.

        A lease ends by the clock of the head that gave it, and clocks of hosts have nothing in common. The head knows
        the leases that it gave; one of a former head it lets last as long as if it had been given when this one began.
        Who only looks compares with what the head's clock said last.
        """
        if group.member == NOBODY:
            return 0
        epoch, until = self._leases.get(group.number, (0, 0))
        if epoch == group.member_epoch:
            return until - self._now()
        if self._lead is not None:
            return sum(self._lead) - self._now()
        return group.lease_until_ns - self._now_at_head()

    def _now_at_head(self) -> int:
        head = self._layout.offset_of("broker", head_of(control_word(self._memory, self._layout)))
        self._memory.invalidate_range(head, 64)
        return int(unpack("BrokerLine", self._memory.read_line_bytes(head))["heartbeat_ns"])

    # ---- writing (at the head) --------------------------------------------------------------------------------------

    async def join(self, topic: TopicEntry, reader: OrderReader, name: str, member: int, holder: str, lease_ns: int,
                   protect: bool, start: Callable[[], tuple[int, int]],
                   durable: Durable = _memory_is_enough) -> Group:
        """Become the group's one reader; a new group begins at `start()`, (position, index).

        Raises `GroupBusy`, `GroupTableFull`, `PositionLost` (of an unprotected group: what it has not read is gone),
        and what `durable` raises. Refused or cancelled, the group is as it was.
        """
        async with self._lock:
            try:
                group = self.find(topic, name)
            except UnknownGroup:
                position, index = start()
                group = Group(self._free_number(topic, name), name, 0, topic_key(topic), position, index, NOBODY, 0, 0,
                              0, False, "")
            if group.member != member:
                self._refuse_if_read(group, topic)
            protected = protect or group.protected
            return await self._place(topic, reader, group, group.position, protected, durable, member=member,
                                     holder=holder, lease_until_ns=self._now() + lease_ns,
                                     committed_wall_ns=self._wall())

    async def reset(self, topic: TopicEntry, reader: OrderReader, name: str,
                    start: Callable[[], tuple[int, int]] | None, protect: bool | None,
                    durable: Durable = _memory_is_enough) -> Group:
        """Put a group somewhere else, or change its protection; refused or cancelled, it is as it was.

        Raises `GroupBusy`, `PositionLost`, `UnknownGroup`, and what `durable` raises.
        """
        async with self._lock:
            group = self.find(topic, name)
            self._refuse_if_read(group, topic)
            position = group.position if start is None else start()[0]
            return await self._place(topic, reader, group, position, group.protected if protect is None else protect,
                                     durable, member=NOBODY, holder="", lease_until_ns=0,
                                     committed_wall_ns=self._wall())

    async def _place(self, topic: TopicEntry, reader: OrderReader, group: Group, position: int, protected: bool,
                     durable: Durable, **changed: Any) -> Group:
        """Write a group at a position that nothing was reclaimed beyond, and make that durable; all of it or nothing.

        The place is granted to a cursor first: from the grant on the reclaimer keeps it, and when the cursor is closed
        the group's own line does, or else whoever reads. The cursor keeps the former place as well, for it may be that
        again.
        """
        cursor, first_index = await self._cursors.open(topic_key(topic), reader.find(min(position, group.position)),
                                                       self._pid)
        try:
            first = reader.frontiers()["reclaimed_position"]
            if position < first:
                raise PositionLost(
                    f"group {group.name} of topic {topic.name} lost positions {position} to {first - 1}: they were "
                    f"reclaimed before it read them; `cxlmq group reset` puts it at what is kept, protect keeps it",
                    position=position, first_available=first, group=group.name, topic=topic.name)
            if position < reader.position_of(first_index):
                # Given away by a head whose frontier nobody sees: the one that serves may have it still, or will say.
                raise BrokerUnavailable("what the group reads next is just being reclaimed, or a head fell: try again",
                                        address="head")
            written = self._write(group, position=position, index=max(first_index, reader.find(position)),
                                  protected=protected, member_epoch=group.member_epoch + 1, **changed)
            try:
                await durable(topic, written)
            except BaseException as error:
                with contextlib.suppress(BrokerUnavailable):    # another head: what we wrote is for it to keep
                    self._undo(group, written)
                if isinstance(error, GroupNotDurable):
                    raise GroupNotDurable(
                        f"group {group.name} of topic {topic.name} is as it was: its place cannot be written to disk "
                        f"({error.details.get('reason')}); make room in the data directory and try again",
                        **error.details) from error
                raise
            return written
        finally:
            self._cursors.close(cursor)

    def _undo(self, before: Group, written: Group) -> None:
        """Put back what was there before a change that is refused, unless something came after it.

        The epoch is the former one as well: nobody was told of the new one. The version is not: a file may have it.
        """
        now = self._read(written.number)
        if (now.version, now.member, now.member_epoch) != (written.version, written.member, written.member_epoch):
            return
        if before.version == 0:
            self._free(written.number)
        else:
            self._write(now, **{name: getattr(before, name) for name in (
                "position", "index", "protected", "member", "member_epoch", "holder", "lease_until_ns",
                "committed_wall_ns")})

    def renew(self, topic: TopicEntry, name: str, member: int, member_epoch: int, lease_ns: int) -> Group:
        """The member is alive. Raises `GroupFenced`, `UnknownGroup`."""
        group = self.require_member(topic, name, member, member_epoch)
        return self._write(group, lease_until_ns=self._now() + lease_ns)

    def commit(self, topic: TopicEntry, reader: OrderReader, name: str, member: int, member_epoch: int, position: int,
               lease_ns: int) -> Group:
        """Everything below `position` is done. Raises `CommitRefused`, `GroupFenced`, `UnknownGroup`."""
        group = self.require_member(topic, name, member, member_epoch)
        end = reader.frontiers()["committed_position"]
        if not group.position <= position <= end:
            raise CommitRefused(group=name, topic=topic.name, position=position, committed=group.position,
                                end_position=end)
        changed = {"position": position, "index": reader.find(position), "committed_wall_ns": self._wall()} if (
            position != group.position) else {}
        return self._write(group, lease_until_ns=self._now() + lease_ns, **changed)

    def leave(self, topic: TopicEntry, name: str, member: int, member_epoch: int) -> None:
        """The member reads no more; of one that was fenced before it is no news. An epoch of 0 is whichever it has."""
        group = self.find(topic, name)
        if group.member == member and member_epoch in (0, group.member_epoch):
            self._write(group, member=NOBODY, holder="", lease_until_ns=0)

    async def delete(self, topic: TopicEntry, name: str) -> Group:
        """Forget a group, and keep nothing for it. Raises `GroupBusy`, `UnknownGroup`."""
        async with self._lock:
            group = self.find(topic, name)
            self._refuse_if_read(group, topic)
            self._free(group.number)
            return group

    def restore(self, topic: TopicEntry, reader: OrderReader, record: GroupRecord) -> Group:
        """After recovery: the group as it was on disk, at most at the end of what was recovered.

        Versions go on from there, so that a copy on a disk that comes back later is seen to be older.
        """
        end = reader.frontiers()["committed_position"]
        position = min(record.position, end)
        group = Group(self._free_number(topic, record.group), record.group, 0, topic_key(topic), position,
                      reader.find(position), NOBODY, 0, 0, record.committed_wall_ns, record.protected, "")
        return self._write(group, record.version)

    def restore_all(self, topics: Collection[TopicEntry], reader_of: Callable[[TopicEntry], OrderReader],
                    folder: Path) -> dict[str, Any]:
        """Bring back the groups of restored topics from a data directory; the report, as JSON values."""
        by_name = {(topic.name, topic.created_ns): topic for topic in topics}
        records, damaged = read_groups(folder, by_name)
        restored = []
        for record in records:
            topic = by_name[record.topic, record.created_ns]
            group = self.restore(topic, reader_of(topic), record)
            restored.append({"topic": topic.name, "group": group.name, "position": group.position})
        return {"groups": restored, "damaged_groups": damaged}

    async def forget_deleted(self, alive: Collection[int]) -> None:
        """Free the groups of topics (keys) that are gone."""
        async with self._lock:
            for group in self.entries():
                if group.topic not in alive:
                    self._free(group.number)

    def _refuse_if_read(self, group: Group, topic: TopicEntry) -> None:
        if (left := self.lease_left_ns(group)) > 0:
            raise GroupBusy(group=group.name, topic=topic.name, holder=group.holder or "somebody",
                            lease_seconds_left=round(left / 1e9, 1))

    def _free_number(self, topic: TopicEntry, name: str) -> int:
        free = numpy.flatnonzero(self._states() & 0xFF == 0)
        if not len(free):
            raise GroupTableFull(group=name, topic=topic.name, group_count_max=self._count)
        return int(free[0])

    def _free(self, number: int) -> None:
        with self._bank.writing() as layout:
            at = layout.offset_of("group", number)
            self._memory.store_word(at, self._memory.load_word(at) >> 8 << 8 | GroupState.GROUP_FREE)
            self._memory.flush_range(at, 8)
            self._memory.store_fence()

    def _write(self, group: Group, above: int = 0, **changed: Any) -> Group:
        """Change a group's line. Who the member is, is written before the line that makes it one.

        The version counts the changes of places over the whole table: of two files of a group that was deleted and made
        again, the later wins.
        """
        moved = group.version == 0 or not changed.keys() <= {"member", "holder", "lease_until_ns"}
        version = max(above, int((self._states() >> 8).max())) + 1 if moved else group.version
        fresh = Group(**{**group.__dict__, **changed, "version": version})
        with self._bank.writing() as layout:
            at = layout.offset_of("group", fresh.number)
            # Whoever asked may have waited since it read the group: for a grant, and under another head.
            if self._memory.load_word(at) & 0xFF if group.version == 0 else self._read(group.number) != group:
                raise BrokerUnavailable(f"group {group.name} was changed meanwhile: try again", address="head")
            if group.version == 0:
                self._memory.write_line_bytes(at + 64, pack("GroupName", text=fresh.name))
            if fresh.holder != group.holder:
                text = fresh.holder.encode()[:record_bytes("GroupHolder") - 1]
                self._memory.write_line_bytes(at + 128, pack("GroupHolder", text=text.decode(errors="ignore")))
            self._memory.flush_range(at + 64, 128)
            self._memory.store_fence()
            state = GroupState.GROUP_PROTECTED if fresh.protected else GroupState.GROUP_OPEN
            self._memory.write_line_bytes(at, pack(
                "GroupLine", state=version << 8 | state, topic=fresh.topic, position=fresh.position, index=fresh.index,
                member=fresh.member, member_epoch=fresh.member_epoch, lease_until_ns=fresh.lease_until_ns,
                committed_wall_ns=fresh.committed_wall_ns))
            self._memory.flush_range(at, 64)
            self._memory.store_fence()
        self._leases[fresh.number] = fresh.member_epoch, fresh.lease_until_ns
        return fresh
