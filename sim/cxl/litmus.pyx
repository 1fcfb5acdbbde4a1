"""Litmus tests of the primitives at full speed: threads without the GIL on one mapping. For tests only.

Each function runs one side of a litmus; a test starts the sides in threads (or processes) of their own and checks the
outcomes that they counted. All sides meet before each round, so that they really run at the same time. A side gives up,
and says so, when the other does not come.

    store buffering    store x, FENCE, load y | store y, FENCE, load x       never: both loads see nothing
    message passing    payload around the cache, fence, flag                 never: the flag without the payload
    lines              write_line, again and again                           never: a word older than the commit word
    fetch-or           every side takes every bit                            never: a bit with two takers, or with none
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset

from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_pause, cxl_yield

cdef enum:
    GIVE_UP_NS = 20000000000
    PAYLOAD_MAX = 4096

GAVE_UP = -1


cdef bint wait_until(Memory memory, uint64_t offset, uint64_t at_least) noexcept nogil:
    """Spin until a word reaches a value; False when it takes for ever."""
    cdef uint64_t tries = 0
    cdef int64_t begun = 0
    while memory.load(offset) < at_least:
        tries += 1
        if tries % 64:
            cxl_pause()
        else:
            cxl_yield()                 # there may be one core
        if tries % 65536 == 0:
            begun = begun or cxl_now_ns()
            if cxl_now_ns() - begun > GIVE_UP_NS:
                return False
    return True


cdef bint meet(Memory memory, uint64_t offset, uint64_t who, uint64_t count, uint64_t number) noexcept nogil:
    """All `count` sides arrive at round `number` before one goes on."""
    cdef uint64_t other
    memory.store(offset + who * 64, number)
    for other in range(count):
        if not wait_until(memory, offset + other * 64, number):
            return False
    return True


def store_buffering(Memory memory, uint64_t base, uint64_t who, uint64_t rounds, bint fenced=True) -> int:
    """One side of store buffering, 8 bytes of outcome a round from base + 4096 on: 1 seen nothing, 2 seen the other.

    `fenced` puts `full_fence` between the store and the load. Without it real processors show the outcome.
    """
    cdef uint64_t number, words = base + 4096 + 16 * rounds, mine, seen
    cdef bint together = True
    with nogil:
        for number in range(rounds):
            mine = words + (2 * (number % 512) + who) * 64
            memory.store(mine, 0)
            if not meet(memory, base, who, 2, 2 * number + 1) or not meet(memory, base, who, 2, 2 * number + 2):
                together = False
                break
            memory.store(mine, 1)
            if fenced:
                memory.full_fence()
            seen = memory.load(words + (2 * (number % 512) + 1 - who) * 64)
            memory.store(base + 4096 + 16 * number + 8 * who, seen + 1)
    return rounds if together else GAVE_UP


def send_payloads(Memory memory, uint64_t base, uint64_t count, uint64_t slots) -> int:
    """Message passing, the sender: payload n around the cache, fence, then n into the flag."""
    cdef uint8_t payload[PAYLOAD_MAX]
    cdef uint64_t number, nbytes
    cdef bint together = True
    with nogil:
        for number in range(1, count + 1):
            if number > slots and not wait_until(memory, base + 64, number - slots):
                together = False
                break
            nbytes = 1 + number * 977 % (PAYLOAD_MAX - 8)
            memset(payload, <int>(number % 251), nbytes)
            memory.copy_in(base + 4096 + number % slots * PAYLOAD_MAX + number % 8, payload, nbytes)
            memory.fence()
            memory.store(base, number)
            memory.flush(base, 8)
    return count if together else GAVE_UP


def take_payloads(Memory memory, uint64_t base, uint64_t count, uint64_t slots) -> int:
    """Message passing, the receiver: how many payloads were not what their flag promised; GAVE_UP when none came."""
    cdef uint8_t payload[PAYLOAD_MAX]
    cdef uint64_t number, nbytes, i, wrong = 0
    cdef bint together = True, good
    with nogil:
        for number in range(1, count + 1):
            if not wait_until(memory, base, number):
                together = False
                break
            nbytes = 1 + number * 977 % (PAYLOAD_MAX - 8)
            memory.invalidate(base + 4096 + number % slots * PAYLOAD_MAX, PAYLOAD_MAX)
            memory.copy_out(payload, base + 4096 + number % slots * PAYLOAD_MAX + number % 8, nbytes)
            good = True
            for i in range(nbytes):
                good = good and payload[i] == number % 251
            wrong += not good
            memory.store(base + 64, number)
    return wrong if together else GAVE_UP


def write_lines(Memory memory, uint64_t base, uint64_t count) -> int:
    """Lines, the writer: every word of the line is n, for n from 1 to `count`."""
    cdef uint64_t line[8]
    cdef uint64_t number, i
    with nogil:
        for number in range(1, count + 1):
            for i in range(8):
                line[i] = number
            memory.write_line(base, line)
            if number % 16 == 0:
                memory.flush(base, 64)
    return count


def read_lines(Memory memory, uint64_t base, uint64_t count) -> tuple[int, int, int]:
    """Lines, the reader: (reads, lines with a word older than the commit word, commit words that went back)."""
    cdef uint64_t line[8]
    cdef uint64_t last = 0, reads = 0, older = 0, back = 0, i
    cdef int64_t begun = cxl_now_ns()
    with nogil:
        while last < count and cxl_now_ns() - begun < GIVE_UP_NS:
            memory.read_line(base, line)
            reads += 1
            back += line[0] < last
            for i in range(1, 8):
                if line[i] < line[0]:
                    older += 1
                    break
            if line[0] == last:
                cxl_yield()
            last = line[0]
    return reads, older, back


def take_bits(Memory memory, uint64_t base, uint64_t who, uint64_t count, uint64_t bits) -> int:
    """Fetch-or: try every bit once; how many this side took, marked in its own words behind the shared ones."""
    cdef uint64_t step, bit, mask, won = 0, mine = base + 4096 + (who + 1) * (bits // 8 + 64)
    cdef bint together
    with nogil:
        together = meet(memory, base, who, count, 1)
        for step in range(bits):
            bit = (step * 7919 + who * bits // count) % bits        # each side in its own turn of a shuffle
            mask = <uint64_t>1 << (bit % 64)
            if not memory.fetch_or(base + 4096 + bit // 64 * 8, mask) & mask:
                memory.store(mine + bit // 64 * 8, memory.load(mine + bit // 64 * 8) | mask)
                won += 1
    return won if together else GAVE_UP


def access_costs(Memory memory, uint64_t base, uint64_t count) -> dict[str, float]:
    """Nanoseconds of one access of each kind, alone on its line, over `count` of them; 64 lines in turn."""
    cdef uint64_t line[8]
    cdef uint64_t i
    cdef int64_t begun
    costs = {}
    memset(line, 0, 64)
    begun = cxl_now_ns()
    with nogil:
        for i in range(count):
            memory.load(base + i % 64 * 64)
    costs["load"] = <double>(cxl_now_ns() - begun) / count
    begun = cxl_now_ns()
    with nogil:
        for i in range(count):
            memory.store(base + i % 64 * 64, i)
    costs["store"] = <double>(cxl_now_ns() - begun) / count
    begun = cxl_now_ns()
    with nogil:
        for i in range(count):
            memory.invalidate(base + i % 64 * 64, 64)
            memory.load(base + i % 64 * 64)
    costs["invalidate, load"] = <double>(cxl_now_ns() - begun) / count
    begun = cxl_now_ns()
    with nogil:
        for i in range(count):
            memory.write_line(base + i % 64 * 64, line)
            memory.flush(base + i % 64 * 64, 64)
            if i % 4 == 3:
                memory.fence()
    costs["write line, flush, fence in fours"] = <double>(cxl_now_ns() - begun) / count
    return costs
