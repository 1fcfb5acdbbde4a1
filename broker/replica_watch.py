"""Which brokers replicas are chosen from: the head looks who lives, and writes it where all who choose read it.

    beats and READY ─► live ─► silent for the grace period ─► gone: another one takes its place ─► beats and READY: back

A broker that is away for a short while keeps its place. Whoever reads the word needs no version of it: a replica's
line says what is on its own disk alone, whoever was chosen meanwhile, and one that missed a change finds by what was
reclaimed that it has to go on later.
"""

from collections.abc import Callable
from itertools import zip_longest

from broker.layout import BrokerState, Layout
from broker.placement import replica_brokers
from sim.cxl.clock import Clock
from sim.cxl.memory import Memory

STATE, HEARTBEAT = 0, 24            # places in BrokerLine
LIVE_BROKERS = 40                   # in HeadLine


class ReplicaWatch:
    """One head's part. `layout` has the head's own bank, `memory` is the sequencer's door; `look` is called every tick.

    No clocks are compared: a broker is silent when its heartbeat did not change for `grace_ns` by ours.
    """

    def __init__(self, memory: Memory, layout: Layout, clock: Clock, grace_ns: int) -> None:
        self._memory, self._clock, self._grace_ns = memory, clock, grace_ns
        self._lines = [layout.offset_of("broker", each) for each in range(layout.numbers["broker_count"])]
        self._at = layout.offset_of("head") + LIVE_BROKERS
        all_of_them = (1 << len(self._lines)) - 1
        self.live = memory.load_word(self._at) & all_of_them or all_of_them     # as the last head left it
        now = clock.now()
        self._beats = [self._beat(broker) for broker in range(len(self._lines))]
        self._ready_ns: list[int | None] = [now if self.live >> broker & 1 else None
                                            for broker in range(len(self._lines))]

    def _beat(self, broker: int) -> int:
        self._memory.invalidate_range(self._lines[broker], 64)
        return self._memory.load_word(self._lines[broker] + HEARTBEAT)

    def look(self) -> list[tuple[int, bool]]:
        """Look at all brokers; those that are away (False) or back (True) from now on: then everybody is woken."""
        now, live = self._clock.now(), 0
        for broker, line in enumerate(self._lines):
            beat = self._beat(broker)
            if beat != self._beats[broker] and self._memory.load_word(line + STATE) == BrokerState.BROKER_READY:
                self._beats[broker], self._ready_ns[broker] = beat, now
            ready_ns = self._ready_ns[broker]
            if ready_ns is not None and now - ready_ns < self._grace_ns:
                live |= 1 << broker
            else:
                self._ready_ns[broker] = None
        if live in (0, self.live):          # nobody at all: then it is us who are late
            return []
        changed = [(broker, bool(live >> broker & 1)) for broker in range(len(self._lines))
                   if (live ^ self.live) >> broker & 1]
        self.live = live
        self._memory.store_word(self._at, live)
        self._memory.flush_range(self._at, 8)
        self._memory.store_fence()
        return changed


def replaced_replicas(topic: int, generation: int, factor: int, live: int, count: int,
                      position_of: Callable[[int, int], int]) -> list[str]:
    """The replicas of a topic whose broker is away, and who keeps them instead, in words.

    `live` is the word of the head's line; `position_of(source, replica)` says how far a replica is.
    """
    every, found = (1 << count) - 1, []
    for source in range(count):
        usual, now = (set(replica_brokers(topic, generation, source, brokers, count, factor))
                      for brokers in (every, live & every or every))
        for away, other in zip_longest(sorted(usual - now), sorted(now - usual)):
            if other is None:
                found.append(f"broker {away} is away, which keeps what comes by broker {source}, and no other one is "
                             "left to keep it: acks of level 2 wait until it is back")
            else:
                found.append(f"broker {away} is away: broker {other} keeps what comes by broker {source} in its place; "
                             f"it has all below position {position_of(source, other)} that is kept")
    return found
