"""Directory: notices topics that appear and go, and opens and closes their state at this broker."""

from libc.stdint cimport int64_t, uint64_t

from broker.layout cimport Layout, TOPIC_ACTIVE, TOPIC_DELETING, TopicLine
from broker.log cimport BrokerLog
from broker.stages.sequencer cimport OrderState, Scanner
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_full_fence, cxl_load_acquire


cdef class Directory(Stage):
    """Follows the topic table. At the head (`order` given) it opens and closes the sequencer's topics as well.

    Deleting a topic takes two rounds: every broker stops and says so (quiesced), then segments are given back.
    """

    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef OrderState order
    cdef list scanners
    cdef uint64_t version_seen
    cdef bint unfinished
    cdef object on_open

    def __init__(self, Memory memory, BrokerLog log, OrderState order=None, scanners=(), on_open=None):
        self.memory = memory
        self.layout = log.layout
        self.log = log
        self.order = order
        self.scanners = list(scanners)
        self.on_open = on_open

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t version
        cdef int64_t work
        self.memory.invalidate(self.layout.directory(), 64)
        version = self.memory.load(self.layout.directory())
        if version == self.version_seen and not self.unfinished:
            return 0
        self.version_seen = version
        with gil:
            work = self.look()
        return work

    cdef int64_t look(self):
        cdef uint64_t topic, generation, state
        cdef TopicLine line
        cdef int64_t work = 0
        self.unfinished = False
        for topic in range(self.layout.g.topic_count_max):
            self.memory.invalidate(self.layout.topic(topic), 64)
            self.memory.read_line(self.layout.topic(topic), &line)
            generation = line.state >> 8
            state = line.state & 0xFF
            if state == TOPIC_ACTIVE and self.log.topics[topic].opened != generation:
                if self.log.topics[topic].opened:
                    self.close(topic)
                self.open(topic, generation)
                work += 1
            elif state == TOPIC_DELETING and self.log.topics[topic].opened == generation:
                if not self.quiesce(topic):
                    self.unfinished = True
            elif state != TOPIC_ACTIVE and state != TOPIC_DELETING and self.log.topics[topic].opened:
                self.close(topic)
                work += 1
        return work

    cdef open(self, uint64_t topic, uint64_t generation):
        if self.order is not None:
            self.order.open_topic(topic, generation)
        self.log.open_topic(topic, generation)
        if self.on_open is not None:
            self.on_open(topic, generation)

    cdef bint quiesce(self, uint64_t topic):
        """Stop taking batches of the topic and ordering them; True once both have stopped."""
        cdef Scanner scanner
        if self.order is not None:
            self.order.close_topic(topic)
            cxl_full_fence()
            for scanner in self.scanners:
                # A scanner that is in a step now may still be writing for this topic.
                if cxl_load_acquire(&scanner.in_step):
                    return False
        return self.log.quiesce_topic(topic)

    cdef close(self, uint64_t topic):
        self.log.close_topic(topic)
        self.log.topics[topic].opened = 0
        if self.on_open is not None:
            self.on_open(topic, 0)
