"""Directory: notices topics that appear and go, and opens and closes their state at this broker."""

from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport DirectoryLine, Layout, TOPIC_ACTIVE, TOPIC_CHANGES, TOPIC_DELETING, TopicLine
from broker.log cimport BrokerLog
from broker.stages.sequencer cimport OrderState, Scanner
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_full_fence, cxl_load_acquire


cdef class Directory(Stage):
    """Follows the topic table of the serving head. At the head it opens and closes the sequencer's topics as well.

    `order` and `scanners` are given at the start of a new region; later, by `lead`.

    Deleting a topic takes two rounds: every broker stops and says so (quiesced), then segments are given back.
    """

    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef HeadView head
    cdef uint64_t control_seen
    cdef OrderState order
    cdef list scanners
    cdef uint64_t version_seen
    cdef uint64_t version_known         # all topics are as this version has them
    cdef uint64_t control_known
    cdef bint order_known               # and the sequencer's, if this broker is head
    cdef bint unfinished
    cdef object on_open

    def __init__(self, Memory memory, BrokerLog log, OrderState order=None, scanners=(), on_open=None):
        self.memory = memory
        self.head = HeadView(memory, log.layout)
        self.layout = self.head.layout
        self.log = log
        self.order = order
        self.scanners = list(scanners)
        self.on_open = on_open

    @property
    def complete(self) -> bool:
        """Whether the topics are known as the serving head has them."""
        return self.control_seen != 0 and not self.unfinished

    def lead(self, OrderState order, scanners) -> None:
        """This broker is head from now on; None: it no longer is."""
        self.scanners = list(scanners)
        self.order = order

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t version
        cdef int64_t work
        if not self.head.begin():
            return 0
        self.memory.invalidate(self.layout.directory(), 64)
        version = self.memory.load(self.layout.directory())
        if version == self.version_seen and self.head.control == self.control_seen and not self.unfinished:
            return 0
        if not self.head.same():
            return 1
        self.version_seen = version
        self.control_seen = self.head.control
        with gil:
            try:
                work = self.look(version)
            except BaseException as error:
                self.failure = error
                self.unfinished = True
                work = 0
        return work

    cdef int64_t look(self, uint64_t version) except -1:
        """Bring what we have open in line with the table. What changed last is named there: only that, if it is all."""
        cdef DirectoryLine directory
        cdef uint64_t change
        cdef int64_t work = 0
        cdef OrderState order = self.order
        if order is not None and order.control != self.head.control:
            order = None                        # it serves no longer
        self.unfinished = False
        self.memory.read_line(self.layout.directory(), &directory)
        if (self.control_known == self.head.control and self.order_known == (order is not None)
                and version - self.version_known < TOPIC_CHANGES and directory.topics_version == version):
            for change in range(self.version_known + 1, version + 1):
                work += self.look_at(directory.changed[change % TOPIC_CHANGES], order)
        else:
            for change in range(self.layout.g.topic_count_max):
                work += self.look_at(change, order)
        if not self.unfinished:
            self.version_known = version
            self.control_known = self.head.control
            self.order_known = order is not None
        return work

    cdef int64_t look_at(self, uint64_t topic, OrderState order) except -1:
        cdef uint64_t generation, state
        cdef TopicLine line
        cdef int64_t work = 0
        if topic < self.layout.g.topic_count_max:
            self.memory.invalidate(self.layout.topic(topic), 64)
            self.memory.read_line(self.layout.topic(topic), &line)
            if not self.head.same():
                self.unfinished = True          # the next step reads what another head says
                return work
            generation = line.state >> 8
            state = line.state & 0xFF
            if state == TOPIC_ACTIVE and order is not None and order.topics[topic].generation != generation:
                order.open_topic(topic, &line)
                work += 1
            if state == TOPIC_ACTIVE and self.log.topics[topic].opened != generation:
                if self.log.topics[topic].opened:
                    self.close(topic)
                self.open(topic, generation, &line)
                work += 1
            elif state == TOPIC_ACTIVE and not self.log.topics[topic].ends_known:
                self.log.know_segment_ends(topic)
            if state == TOPIC_ACTIVE and not self.log.topics[topic].ends_known:
                self.unfinished = True          # the head fell during the scan: its successor says
            if state == TOPIC_DELETING and (self.log.topics[topic].opened == generation
                                              or self.log.still_serves(topic, generation)):
                if self.log.topics[topic].opened != generation:
                    self.open(topic, generation, &line)     # an earlier process of ours did: it is for us to stop
                if not self.quiesce(topic, order):
                    self.unfinished = True
            elif state != TOPIC_ACTIVE and line.state and self.log.topics[topic].opened:
                self.close(topic)
                work += 1
        return work

    cdef open(self, uint64_t topic, uint64_t generation, TopicLine* line):
        self.log.open_topic(topic, line)
        if self.on_open is not None:
            self.on_open(topic, generation)

    cdef bint quiesce(self, uint64_t topic, OrderState order):
        """Stop taking batches of the topic and ordering them; True once both have stopped."""
        cdef Scanner scanner
        if order is not None:
            order.close_topic(topic)
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
