"""Which brokers keep the disk replicas of a topic's batches: rendezvous hashing over the live brokers.

Replicas, acks and reclaim compute the same function of the same words, so nobody has to be told. When a broker goes, only
the choices that named it change.
"""

from libc.stdint cimport int64_t, uint64_t

from broker.layout cimport Layout
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count_trailing_zeros, cxl_popcount

cdef struct Durable:
    uint64_t position           # everything below it is on every disk that the topic wants
    uint64_t failed_from        # a replica that failed lacks what lies from here on; 2^64 - 1: none has failed
    uint64_t failure            # that one: replica << 32 | errno

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

cdef inline Durable durable_frontier(Memory memory, Layout layout, uint64_t topic, uint64_t generation,
                                     uint64_t factor) noexcept nogil:
    """How far a topic is durable, whoever took its batches in; without replicas, all of it.

    All of it: after a loss of the memory the log then ends behind what was acknowledged, without a hole before.
    """
    cdef uint64_t count = layout.g.broker_count, live = live_brokers(memory, layout), source, chosen, r, at, position
    cdef Durable found
    found.position = found.failed_from = <uint64_t>-1
    found.failure = 0
    for source in range(count):
        chosen = replicas_of(topic, generation, source, live, count, factor)
        if cxl_popcount(chosen) < <int64_t>factor - 1:
            found.position = 0                  # too few brokers live: wait for the others
        while chosen:
            r = cxl_count_trailing_zeros(chosen)
            chosen &= chosen - 1
            at = layout.replica(topic, source, r)
            memory.invalidate(at, 64)
            # The generation first: its line is stored the other way round, with a fence between.
            if memory.load(at + 24) != generation:
                found.position = 0              # the line of an earlier topic of this number says nothing
                continue
            position = memory.load(at + 8)
            found.position = min(found.position, position)
            if memory.load(at + 32) and position < found.failed_from:
                found.failed_from = position
                found.failure = r << 32 | memory.load(at + 32)
    return found
