"""The choice of replicas, for tools and tests. What it computes is in placement.pxd."""

from broker.layout cimport Layout
from broker.placement cimport Durable, durable_frontier as read_durable_frontier, live_brokers as read_live_brokers, replicas_of
from sim.cxl.memory cimport Memory


def replica_brokers(topic: int, generation: int, source: int, live: int, broker_count: int,
                    replication_factor: int) -> list[int]:
    """The brokers that keep a replica of what came by `source`, in the order of their numbers."""
    chosen = replicas_of(topic, generation, source, live, broker_count, replication_factor)
    return [broker for broker in range(broker_count) if chosen >> broker & 1]


def live_brokers(Memory memory, Layout layout) -> int:
    """One bit for each broker that replicas are chosen from."""
    return read_live_brokers(memory, layout)


def durable_frontier(Memory memory, Layout layout, topic: int, generation: int, factor: int) -> tuple[int, int, int]:
    """How far a topic is durable, from where on a failed replica lacks it, and that replica (2^64 - 1, 0: none failed)."""
    cdef Durable found = read_durable_frontier(memory, layout, topic, generation, factor)
    return found.position, found.failed_from, found.failure
