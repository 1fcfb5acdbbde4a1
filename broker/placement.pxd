"""Which brokers keep the disk replicas of a topic's batches: rendezvous hashing over the live brokers.

Replicas, acks and reclaim compute the same function of the same words, so nobody has to be told. When a broker goes, only
the choices that named it change.
"""

from libc.stdint cimport uint64_t

from broker.layout cimport Layout
from sim.cxl.memory cimport Memory

cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EB
    return x ^ (x >> 31)

cdef inline uint64_t replicas_of(uint64_t topic, uint64_t generation, uint64_t source, uint64_t live, uint64_t count,
                                 uint64_t factor) noexcept nogil:
    """A bit for each broker that keeps a replica of what came by `source`; fewer than factor - 1 when too few live."""
    cdef uint64_t chosen = 0, k, r, weight, best, best_weight
    for k in range(1, factor):
        best = count
        best_weight = 0
        for r in range(count):
            if r == source or not live >> r & 1 or chosen >> r & 1:
                continue
            weight = mix(mix(generation << 32 | topic << 16 | source << 8 | r) + <uint64_t>0x9E3779B97F4A7C15)
            if best == count or weight > best_weight:
                best = r
                best_weight = weight
        if best == count:
            break
        chosen |= <uint64_t>1 << best
    return chosen

cdef inline uint64_t live_brokers(Memory memory, Layout layout) noexcept nogil:
    """The brokers that replicas are chosen from, as the head says whose bank `layout` has."""
    cdef uint64_t live
    memory.invalidate(layout.head_line(), 64)
    live = memory.load(layout.head_line() + 40)
    if live:
        return live
    return <uint64_t>-1 >> (64 - layout.g.broker_count)
