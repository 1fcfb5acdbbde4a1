"""Who is in the way is named to those who may see the topic that it is about, and to nobody else."""

import contextvars

import pytest

from broker.head import HeadView
from broker.holders import who_stops, why_full
from broker.layout import CursorState, GroupState, HolderKind
from broker.records import pack
from broker.rights import may_see
from broker.security import CALLER, Principal
from sim.cxl.memory import Role
from tests.manual_cluster import ManualCluster

MINE, SECRET, GROUP, PROCESS = "frames.front", "secret-project", "payroll", 4711
KINDS = [HolderKind.HOLDER_CURSOR, HolderKind.HOLDER_PROTECTED, HolderKind.HOLDER_RETENTION,
         HolderKind.HOLDER_UNCOMMITTED]


def principal(**rights: tuple[str, ...]) -> Principal:
    return Principal(name="somebody", **{"publish": (), "subscribe": (), "admin": (), **rights})


def told(caller: Principal, cluster: ManualCluster, broker: int, topic: int) -> str:
    """What a publisher's error says when this one calls."""
    def run() -> str:
        CALLER.set(caller)
        view = HeadView(cluster.door(0, Role.ROLE_BROKER), cluster.layout)
        error = why_full(view, cluster.layout, broker, topic, may_see)
        return f"{error.message} {error.details} {who_stops(view, cluster.layout, topic, may_see)}"

    return contextvars.copy_context().run(run)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_publisher_hears_no_names_of_topics_that_it_may_not_see(kind: HolderKind) -> None:
    cluster = ManualCluster()
    mine, secret = cluster.create(MINE), cluster.create(SECRET)
    key = secret.generation << 16 | secret.number
    cursor, _ = cluster.open_cursor(secret)
    cluster.poke("CursorLine", "cursor", cursor, pid=PROCESS, state=1 << 8 | CursorState.CURSOR_LIVE, topic=key)
    cluster.poke("GroupLine", "group", 0, state=1 << 8 | GroupState.GROUP_PROTECTED, topic=key)
    for name, place, number in (("CursorName", "cursor_name", cursor), ("GroupName", "group_name", 0)):
        cluster.memory.write_bytes(cluster.layout.offset_of(place, number), pack(name, text=GROUP))
    number = {HolderKind.HOLDER_CURSOR: cursor, HolderKind.HOLDER_PROTECTED: 0}.get(kind, secret.number)
    cluster.poke("ReclaimAnswerLine", "reclaim_answer", 0, holder=kind << 32 | number)
    names = (SECRET, GROUP, str(PROCESS))
    for caller in (principal(subscribe=(SECRET,)), principal(admin=("*",)), principal(publish=(MINE, "secret-*"))):
        assert SECRET in told(caller, cluster, 0, mine.number)
    for caller in (principal(publish=(MINE,)), principal(publish=("frames.*",), subscribe=("orders",)), principal()):
        text = told(caller, cluster, 0, mine.number)
        assert not any(each in text for each in names), text
        assert "another topic" in text
