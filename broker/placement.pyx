"""The choice of replicas, for tools and tests. What it computes is in placement.pxd."""

from broker.layout cimport Layout
from broker.placement cimport live_brokers as read_live_brokers, replicas_of
from sim.cxl.memory cimport Memory


def replica_brokers(topic: int, generation: int, source: int, live: int, broker_count: int,
                    replication_factor: int) -> list[int]:
    """The brokers that keep a replica of what came by `source`, in the order of their numbers."""
    chosen = replicas_of(topic, generation, source, live, broker_count, replication_factor)
    return [broker for broker in range(broker_count) if chosen >> broker & 1]


def live_brokers(Memory memory, Layout layout) -> int:
    """One bit for each broker that replicas are chosen from."""
    return read_live_brokers(memory, layout)
