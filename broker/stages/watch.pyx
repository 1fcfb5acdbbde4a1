"""Watch: tells the event loop of a broker that a topic with waiting subscribers has new commits."""

from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout
from broker.notifier cimport Notifier
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport (
    cxl_count_trailing_zeros, cxl_fetch_and, cxl_fetch_or, cxl_full_fence, cxl_load_relaxed,
)


cdef class Watch(Stage):
    """Follows the sequencer's activity line for the topics that somebody waits for."""

    cdef Memory memory
    cdef Layout layout
    cdef HeadView head
    cdef uint64_t control_seen
    cdef Notifier notifier
    cdef uint64_t activity_words
    cdef uint64_t seen[2048]            # TOPICS_MAX topics, one byte each
    cdef uint64_t wanted[256]           # and one bit each
    cdef uint64_t fired[256]

    def __init__(self, Memory memory, Layout layout, Notifier notifier):
        self.memory = memory
        self.head = HeadView(memory, layout)
        self.layout = self.head.layout
        self.notifier = notifier
        self.activity_words = (layout.g.topic_count_max + 7) // 8

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t line, word, now, changed, i, topic, bit
        cdef int64_t work = 0
        if not self.head.begin():
            return 0
        if self.head.control != self.control_seen:
            self.control_seen = self.head.control
            self.prepare_to_sleep()             # another head: whoever waits looks anew
        line = self.layout.sequencer_activity()
        self.memory.invalidate(line, self.activity_words * 8)
        for word in range(self.activity_words):
            now = self.memory.load(line + word * 8)
            changed = now ^ self.seen[word]
            if not changed:
                continue
            self.seen[word] = now
            for i in range(8):
                topic = word * 8 + i
                bit = <uint64_t>1 << (topic % 64)
                if changed >> (8 * i) & 0xFF and cxl_load_relaxed(&self.wanted[topic // 64]) & bit:
                    cxl_fetch_and(&self.wanted[topic // 64], ~bit)
                    cxl_fetch_or(&self.fired[topic // 64], bit)
                    work += 1
        if work:
            self.notifier.notify()
        return work

    cdef void prepare_to_sleep(self) noexcept nogil:
        # A count of one byte may come round to the same value: say that all have news.
        cdef uint64_t word
        for word in range(self.activity_words):
            self.seen[word] = ~self.memory.load(self.layout.sequencer_activity() + word * 8)

    def want(self, uint64_t topic) -> None:
        """Ask to be told of the topic's next commit. Look once more after this, before waiting."""
        cxl_fetch_or(&self.wanted[topic // 64], <uint64_t>1 << (topic % 64))
        cxl_full_fence()

    def take_fired(self) -> list[int]:
        """The topics that got news since they were wanted."""
        cdef uint64_t word, bits
        topics = []
        for word in range((self.activity_words + 7) // 8):
            if cxl_load_relaxed(&self.fired[word]):
                bits = cxl_fetch_and(&self.fired[word], 0)
                while bits:
                    topics.append(word * 64 + cxl_count_trailing_zeros(bits))
                    bits &= bits - 1
        return topics
