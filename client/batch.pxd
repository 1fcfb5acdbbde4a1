from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from client.turn cimport Turn

cdef extern from "Python.h":
    ctypedef struct PyObject

cdef enum OutcomeKind:
    OUTCOME_COMMITTED = 1
    OUTCOME_DUPLICATE = 2
    OUTCOME_SENT = 3                    # level 0: nobody waits for more
    OUTCOME_UNDURABLE = 4
    OUTCOME_FAILED = 5                  # with `error`

cdef struct Outcome:
    # What became of a batch, noted where no Python may run, and told later. It is a part of its batch.
    Outcome* next
    PyObject* batch                     # owned by whoever has the outcome
    PyObject* error                     # owned; NULL without
    uint64_t position                   # of a replica that failed: which
    uint64_t broker
    int kind

cdef class Batch:
    cdef Outcome outcome
    cdef public object frame            # the request's bytes: header, then packed messages
    cdef uint8_t* data                  # where messages are packed
    cdef readonly uint64_t capacity     # payload bytes there is room for
    cdef readonly uint64_t used
    cdef readonly uint64_t count
    cdef public object sequence         # None until stamped
    cdef public object position         # of the first message, once acked
    cdef public object epoch
    cdef public object broker
    cdef public bint duplicate
    cdef public object error
    cdef public bint settled
    cdef public int level
    cdef public double opened
    cdef public double deadline
    cdef public int64_t sent_ns
    cdef public list callbacks
    cdef public object publisher
    cdef public int64_t number          # of sealing, for the publisher's books

    cdef bint append(self, const void* source, uint64_t nbytes) noexcept nogil
    cdef bint fits(self, uint64_t nbytes) noexcept nogil
    cdef list decide(self, position, epoch, broker, bint duplicate, error)
    cdef int adopt(self, const void* payload, uint64_t nbytes, uint64_t count, uint64_t wall_ns) except -1
    cdef int _cut(self, Py_ssize_t size) except -1

cdef class Delivery:
    cdef readonly Batch batch
    cdef readonly uint64_t index

cdef class Packer:
    cdef Turn turn                      # whose it is to pack
    cdef readonly Batch batch
    cdef object publisher
    cdef object full                    # called when the current batch has to go
    cdef readonly uint64_t message_bytes_max
    cdef public uint64_t target         # payload bytes of a batch
    cdef readonly uint64_t messages
    cdef readonly uint64_t nbytes
    cdef readonly bint ended            # nothing is packed any more

    cdef bint is_empty(self) noexcept
    cdef uint64_t _put(self, const uint8_t* source, uint64_t nbytes, uint64_t rows, Delivery delivery) noexcept
    cdef int _make_room(self, uint64_t nbytes) except -1
    cdef Delivery _pack(self, const uint8_t* source, uint64_t nbytes)
    cdef int _send_if_full(self, Delivery delivery) except -1
    cdef Delivery _pack_object(self, data)

cdef void tell(list callbacks) except *
