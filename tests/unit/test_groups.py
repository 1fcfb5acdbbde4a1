"""Consumer groups: a place never goes back nor beyond the end, one member at a time commits, and what is protected stays."""

import asyncio
import itertools
import random
from typing import Any

import pytest

from broker.errors import (
    BrokerUnavailable,
    CommitRefused,
    CxlmqError,
    GroupBusy,
    GroupFenced,
    GroupNotDurable,
    GroupTableFull,
    PositionLost,
    UnknownGroup,
)
from broker.group_files import GroupRecord
from broker.groups import Durable, Group, GroupTable
from broker.layout import GroupState, HolderKind
from broker.reader import OrderReader
from broker.stages.receiver import RECEIVED
from broker.topics import TopicEntry
from sim.cxl.memory import Role
from tests.manual_cluster import SECOND, ManualCluster, drive

LEASE_NS = 10 * SECOND
SMALL = {"region_bytes": 272 << 10, "order_entry_count": 256}


class Setting:
    """A cluster with one topic, and its group table."""

    def __init__(self, messages: int = 20, **numbers: int) -> None:
        self.cluster = ManualCluster(**{**numbers})
        self.topic: TopicEntry = self.cluster.create()
        self.session = self.cluster.open_session(self.topic)
        self.published = 0
        self.publish(messages)
        head = self.cluster.brokers[0]
        self.table = GroupTable(self.cluster.door(0, Role.ROLE_ADMIN), self.cluster.layout, self.cluster.clock.now,
                                lambda: 7_000 + self.cluster.clock.now(), head.cursors, 1)

    def publish(self, count: int) -> None:
        """One-message batches; stops when there is no room, also after a look at what can be reclaimed."""
        for _ in range(count):
            for _ in range(4):
                status = self.cluster.publish(self.session, self.published, [bytes(2000)])
                self.cluster.settle()
                if status == RECEIVED:
                    break
            else:
                return
            self.published += 1

    @property
    def reader(self) -> OrderReader:
        return self.cluster.reader(self.topic)

    def join(self, member: int = 1, name: str = "g", protect: bool = False, start: int = 0) -> Group:
        return drive(self.table.join(self.topic, self.reader, name, member, f"member {member}", LEASE_NS, protect,
                                     lambda: (start, self.reader.find(start))))

    def commit(self, group: Group, position: int) -> Group:
        return self.table.commit(self.topic, self.reader, group.name, group.member, group.member_epoch, position, LEASE_NS)

    def reset(self, position: int | None = None, protect: bool | None = None, name: str = "g") -> Group:
        start = None if position is None else lambda: (position, self.reader.find(position))
        return drive(self.table.reset(self.topic, self.reader, name, start, protect))


def test_a_new_group_begins_at_its_start_and_moves_by_commits() -> None:
    setting = Setting()
    group = setting.join(start=3)
    assert (group.position, group.member, group.holder, group.protected) == (3, 1, "member 1", False)
    assert setting.commit(group, 12).position == 12
    again = setting.table.find(setting.topic, "g")
    assert (again.position, again.index, again.committed_wall_ns) == (12, 12, 7_000 + setting.cluster.clock.now())
    assert [each.name for each in setting.table.entries()] == ["g"]


def test_a_group_is_not_put_where_its_place_was_granted_further_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a head that gives away more than its frontier says: what lies between must not be passed over in silence."""
    setting = Setting()
    committed = setting.commit(setting.join(start=3), 5)
    setting.table.leave(setting.topic, "g", committed.member, committed.member_epoch)
    cursors = setting.cluster.brokers[0].cursors
    free, opening = len(cursors._free), cursors.open
    monkeypatch.setattr(cursors, "open", lambda key, index, *rest: opening(key, index + 1, *rest))
    with pytest.raises(BrokerUnavailable) as told:
        setting.join(member=2)
    assert told.value.comes_back
    assert len(cursors._free) == free, "who is refused holds nothing"
    assert setting.table.find(setting.topic, "g").position == 5
    monkeypatch.undo()
    assert setting.join(member=2).position == 5


def test_a_commit_goes_neither_back_nor_beyond_the_end() -> None:
    setting = Setting(10)
    group = setting.commit(setting.join(), 5)
    for wrong in (4, 0, 11, 1 << 62):
        with pytest.raises(CommitRefused) as raised:
            setting.commit(group, wrong)
        assert (raised.value.committed, raised.value.end_position) == (5, 10)
    assert setting.commit(group, 5).position == 5, "the same again is no harm"
    assert setting.commit(group, 10).position == 10


def test_one_member_at_a_time_and_the_other_is_told_who() -> None:
    setting = Setting()
    first = setting.join(1)
    with pytest.raises(GroupBusy, match="member 1") as raised:
        setting.join(2)
    assert raised.value.lease_seconds_left == 10.0
    setting.cluster.clock.advance(LEASE_NS - 1)
    setting.table.renew(setting.topic, "g", 1, first.member_epoch, LEASE_NS)
    setting.cluster.clock.advance(LEASE_NS - 1)
    with pytest.raises(GroupBusy):
        setting.join(2)
    setting.cluster.clock.advance(1)
    second = setting.join(2)
    assert second.member_epoch > first.member_epoch
    for act in (lambda: setting.commit(first, 5),
                lambda: setting.table.renew(setting.topic, "g", 1, first.member_epoch, LEASE_NS)):
        with pytest.raises(GroupFenced, match="member 2"):
            act()
    assert setting.commit(second, 5).position == 5


def test_a_lease_that_ended_is_renewed_as_long_as_nobody_else_came() -> None:
    setting = Setting()
    group = setting.join()
    setting.cluster.clock.advance(100 * LEASE_NS)
    assert setting.commit(group, 3).position == 3
    with pytest.raises(GroupBusy):
        setting.join(2)


def test_the_same_member_joins_again_and_its_earlier_self_is_fenced() -> None:
    setting = Setting()
    first, second = setting.join(1), setting.join(1)
    with pytest.raises(GroupFenced):
        setting.commit(first, 1)
    setting.commit(second, 1)


def test_who_leaves_makes_room_at_once_and_a_late_leave_is_nothing() -> None:
    setting = Setting()
    first = setting.commit(setting.join(1), 4)
    setting.table.leave(setting.topic, "g", 1, first.member_epoch)
    second = setting.join(2)
    assert second.position == 4
    setting.table.leave(setting.topic, "g", 1, first.member_epoch)
    assert setting.table.find(setting.topic, "g").member == 2
    with pytest.raises(UnknownGroup):
        setting.table.leave(setting.topic, "other", 1, 1)


def test_reset_is_the_way_back_and_only_while_nobody_reads() -> None:
    setting = Setting()
    group = setting.commit(setting.join(), 15)
    for act in (lambda: setting.reset(2), lambda: drive(setting.table.delete(setting.topic, "g"))):
        with pytest.raises(GroupBusy):
            act()
    setting.table.leave(setting.topic, "g", 1, group.member_epoch)
    assert setting.reset(2).position == 2
    assert setting.reset(protect=True).protected
    with pytest.raises(GroupFenced, match="nobody"):
        setting.commit(group, 16)
    assert not setting.reset(protect=False).protected
    assert setting.join(2).position == 2


def test_a_protected_group_keeps_its_data_and_is_named_and_an_unprotected_one_is_told_what_it_lost() -> None:
    setting = Setting(30, **SMALL)
    kept = setting.join(1, "kept", protect=True, start=10)
    setting.table.leave(setting.topic, "kept", 1, kept.member_epoch)
    loose = setting.join(2, "loose", start=0)
    setting.table.leave(setting.topic, "loose", 2, loose.member_epoch)
    setting.publish(600)
    assert setting.published < 200, "the region is full, and stays so"
    assert setting.reader.frontiers()["reclaimed_position"] == 10
    holder = setting.cluster.record("ReclaimAnswerLine", "reclaim_answer", 0)["holder"]
    assert (holder >> 32, holder & 0xFFFFFFFF) == (HolderKind.HOLDER_PROTECTED, kept.number)
    with pytest.raises(PositionLost, match="positions 0 to 9") as raised:
        setting.join(2, "loose")
    assert (raised.value.position, raised.value.first_available) == (0, 10)
    assert setting.table.find(setting.topic, "loose").member == 0, "nobody became its member"
    assert setting.join(1, "kept").position == 10
    before = setting.published
    setting.commit(setting.table.find(setting.topic, "kept"), before)
    setting.publish(20)
    assert setting.published == before + 20, "commits make room"


def test_giving_up_the_protection_frees_the_data() -> None:
    for give_up in ("reset", "delete"):
        setting = Setting(10, **SMALL)
        group = setting.join(1, protect=True)
        setting.table.leave(setting.topic, "g", 1, group.member_epoch)
        setting.publish(600)
        full = setting.published
        if give_up == "reset":
            setting.reset(protect=False)
        else:
            drive(setting.table.delete(setting.topic, "g"))
            assert setting.table.entries() == []
        setting.publish(100)
        assert setting.published == full + 100


def test_a_place_that_is_being_reclaimed_is_granted_or_refused_never_half() -> None:
    setting = Setting(400, **SMALL)
    first = setting.reader.frontiers()["reclaimed_position"]
    assert first > 0
    with pytest.raises(PositionLost):
        setting.join(1, "old", protect=True, start=first - 1)
    assert setting.table.entries() == []
    assert setting.join(1, "new", protect=True, start=first).position == first
    setting.publish(300)
    assert setting.reader.frontiers()["reclaimed_position"] == first


def test_groups_go_with_their_topic_and_do_not_come_back_with_the_next_of_its_name() -> None:
    setting = Setting()
    setting.join(protect=True)
    setting.cluster.close_session(setting.session)
    setting.cluster.close_streams(setting.session)
    setting.cluster.delete()
    drive(setting.table.forget_deleted(()))
    assert setting.cluster.record("GroupLine", "group", 0)["state"] & 0xFF == GroupState.GROUP_FREE
    setting.topic = setting.cluster.create()
    with pytest.raises(UnknownGroup):
        setting.table.find(setting.topic, "g")


def test_a_full_table_says_so() -> None:
    setting = Setting(group_count_max=3)
    for number in range(3):
        setting.join(name=f"g{number}")
    with pytest.raises(GroupTableFull, match="3 places"):
        setting.join(name="one-more")
    assert len(setting.table.entries()) == 3


def test_a_group_comes_back_from_disk_and_never_beyond_the_end() -> None:
    setting = Setting(10)
    values: dict[str, Any] = {"topic": "topic", "created_ns": 9, "version": 400, "protected": True,
                              "committed_wall_ns": 77}
    assert setting.table.restore(setting.topic, setting.reader, GroupRecord(
        group="near", position=6, **values)).position == 6
    assert setting.table.restore(setting.topic, setting.reader, GroupRecord(
        group="far", position=60, **values)).position == 10
    found = {each.name: (each.position, each.index, each.protected) for each in setting.table.entries()}
    assert found == {"near": (6, 6, True), "far": (10, 10, True)}
    near = setting.join(name="near")
    assert (near.position, near.version > 400) == (6, True)


def table_of(setting: Setting, broker: int) -> GroupTable:
    """Another broker's table."""
    cluster = setting.cluster
    return GroupTable(cluster.door(broker, Role.ROLE_ADMIN), cluster.layout, cluster.clock.now, lambda: 0,
                      cluster.brokers[broker].cursors, 2)


def test_a_new_head_goes_on_with_the_groups_of_the_last_one() -> None:
    setting = Setting()
    group = setting.commit(setting.join(protect=True), 9)
    other = table_of(setting, 1)
    assert other.find(setting.topic, "g") == group, "every broker sees it"
    setting.cluster.take_over(1)
    assert other.find(setting.topic, "g") == group
    other.lead(setting.cluster.order.layout)
    moved = other.commit(setting.topic, setting.reader, "g", 1, group.member_epoch, 11, LEASE_NS)
    assert (moved.position, moved.version > group.version) == (11, True)
    assert setting.table.find(setting.topic, "g").position == 11, "also the last head sees the new one's"


def test_a_replaced_head_acknowledges_no_commit_and_what_it_wrote_counts_for_nobody() -> None:
    setting = Setting()
    group = setting.commit(setting.join(), 5)
    other = table_of(setting, 1)
    setting.cluster.take_over(1)
    other.lead(setting.cluster.order.layout)
    for late in (lambda: setting.commit(group, 8), lambda: setting.join(1),
                 lambda: setting.table.leave(setting.topic, "g", 1, group.member_epoch),
                 lambda: setting.table.restore(setting.topic, setting.reader, GroupRecord(
                     topic="topic", created_ns=1, group="r", version=1, position=1, protected=False,
                     committed_wall_ns=0))):
        with pytest.raises(BrokerUnavailable, match="new head"):
            late()
    assert [(each.name, each.position, each.member) for each in other.entries()] == [("g", 5, 1)]


def test_a_commit_in_the_middle_of_which_another_head_begins_is_not_acknowledged(
        monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    group = setting.commit(setting.join(), 5)
    whole = setting.table._bank._require_same

    def replaced(control: int) -> None:
        setting.cluster.take_over(1)        # after the line was written, before the answer
        whole(control)

    monkeypatch.setattr(setting.table._bank, "_require_same", replaced)
    with pytest.raises(BrokerUnavailable):
        setting.commit(group, 8)
    assert table_of(setting, 1).find(setting.topic, "g").position == 8, "not acknowledged, and taken over all the same"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_members_do_places_are_monotone_and_exclusive(seed: int) -> None:
    """A random walk of members against a model. C: never back but by reset, never beyond the tail."""
    dice = random.Random(seed)
    setting = Setting(5)
    members: dict[int, Group] = {}
    position, owner, until = None, 0, 0
    for _ in range(150):
        act = dice.choice(["publish", "join", "commit", "commit", "leave", "renew", "wait", "reset"])
        member = dice.randint(1, 3)
        mine = members.get(member)
        now = setting.cluster.clock.now()
        try:
            if act == "publish" and setting.published < 50:
                setting.publish(1)
            elif act == "wait":
                setting.cluster.clock.advance(dice.randrange(LEASE_NS))
            elif act == "join":
                members[member] = setting.join(member)
                assert owner in (0, member) or until <= now, f"{member} joined while {owner} had the lease"
                position = members[member].position if position is None else position
                owner, until = member, now + LEASE_NS
            elif act == "reset" and position is not None:
                target = dice.randint(0, setting.published)
                setting.reset(target)
                assert owner == 0 or until <= now
                position, owner = target, 0
            elif mine is None:
                continue
            elif act == "commit":
                target = dice.randint(0, 60)
                setting.commit(mine, target)
                assert owner == member
                assert position is not None and position <= target <= setting.published
                position, until = target, now + LEASE_NS
            elif act == "renew":
                setting.table.renew(setting.topic, "g", member, mine.member_epoch, LEASE_NS)
                assert owner == member
                until = now + LEASE_NS
            elif act == "leave":
                setting.table.leave(setting.topic, "g", member, mine.member_epoch)
                if owner == member and setting.table.find(setting.topic, "g").member == 0:
                    owner, until = 0, 0
        except CxlmqError:
            pass
        if position is not None:
            assert setting.table.find(setting.topic, "g").position == position, f"seed {seed}: after {act}"


# ---- refused, cancelled ----------------------------------------------------------------------------------------------


async def no_room(_: TopicEntry, __: Group) -> None:
    """The disk refuses."""
    raise GroupNotDurable(reason="no room")


async def for_ever(_: TopicEntry, __: Group) -> None:
    """The disk does not answer; whoever waits for it goes away."""
    raise asyncio.CancelledError


def place_of(setting: Setting, name: str = "g") -> dict[str, Any]:
    """What a group says of itself, but for the count of its changes."""
    return {**vars(setting.table.find(setting.topic, name)), "version": 0}


@pytest.mark.parametrize("durable", [no_room, for_ever])
def test_who_is_refused_for_want_of_a_disk_holds_nothing(durable: Durable) -> None:
    setting = Setting()

    def joins(member: int, name: str = "g") -> None:
        with pytest.raises((GroupNotDurable, asyncio.CancelledError), match=r"as it was|^$"):
            drive(setting.table.join(setting.topic, setting.reader, name, member, "x", LEASE_NS, True,
                                     lambda: (0, 0), durable))

    joins(1)
    assert setting.table.entries() == [], "a group that was not made is not there"
    group = setting.commit(setting.join(1), 5)
    before = place_of(setting)
    joins(1)
    assert place_of(setting) == before
    setting.commit(group, 6)                    # the member that was there still is
    setting.table.leave(setting.topic, "g", 1, group.member_epoch)
    before = place_of(setting)
    joins(2)
    assert place_of(setting) == before
    for place in ((2, 2), (15, 15)):
        with pytest.raises((GroupNotDurable, asyncio.CancelledError)):
            drive(setting.table.reset(setting.topic, setting.reader, "g", itertools.repeat(place).__next__, True, durable))
        assert place_of(setting) == before
    assert setting.join(3).member == 3, "nobody holds it"


def test_a_member_that_never_heard_its_epoch_can_leave() -> None:
    setting = Setting()
    setting.join(1)
    setting.table.leave(setting.topic, "g", 2, 0)
    with pytest.raises(GroupBusy):
        setting.join(2)
    setting.table.leave(setting.topic, "g", 1, 0)
    assert setting.join(2).member == 2


@pytest.mark.parametrize("ahead", [-1000 * SECOND, 1000 * SECOND])
def test_a_lease_is_not_judged_by_the_clock_of_another_host(ahead: int) -> None:
    setting = Setting()
    clock = setting.cluster.clock
    clock.advance(2000 * SECOND)
    setting.join(1)
    other = GroupTable(setting.cluster.door(1, Role.ROLE_ADMIN), setting.cluster.layout, lambda: clock.now() + ahead,
                       lambda: 0, setting.cluster.brokers[1].cursors, 2)
    setting.cluster.take_over(1)
    other.lead(setting.cluster.order.layout, LEASE_NS)
    setting.table = other
    clock.advance(LEASE_NS - 1)
    with pytest.raises(GroupBusy):
        setting.join(2)
    clock.advance(2)
    assert setting.join(2).member == 2
