"""Batches as publishers build them: messages packed in place behind the request's header, sealed without a copy."""

import asyncio
import logging
import threading
import time
from dataclasses import dataclass

cimport cython
from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from broker.wire cimport MESSAGE_HEADER_BYTES, REQUEST_HEADER_BYTES, message_check, message_stride, write_request_header
from client.turn cimport (
    PLACE_COPIED, PLACE_COPYING, PLACE_MADE, SAFEGUARD_CALLBACK_ONCE, SAFEGUARD_LOOK_AGAIN, forget_turn, give_turn,
    left_out, pass_by, take_turn,
)
from sim.cxl.primitives cimport cxl_now_ns

from broker.errors import ClosedError

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject** target, Py_ssize_t size) except -1
    void Py_INCREF(PyObject* o)
    void Py_XDECREF(PyObject* o)

_log = logging.getLogger("cxlmq")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a message: its position in the topic's total order, and what was promised for it.

    `position` is None when no ack was asked for (level 0), or when a duplicate's place is no longer known. `epoch` is that
    of the head when the ack was made; 0 when it was learned by reopening the session.
    """

    position: int | None
    epoch: int
    level: int
    duplicate: bool
    broker: int | None


cdef class Batch:
    """One batch under construction, on its way, or settled."""

    def __init__(self, publisher, uint64_t capacity):
        self.publisher = publisher
        self.frame = PyBytes_FromStringAndSize(NULL, REQUEST_HEADER_BYTES + capacity)
        self.data = <uint8_t*>PyBytes_AS_STRING(self.frame) + REQUEST_HEADER_BYTES
        self.capacity = capacity
        self.level = 1

    cdef bint fits(self, uint64_t nbytes) noexcept nogil:
        return self.used + message_stride(nbytes) <= self.capacity

    cdef bint append(self, const void* source, uint64_t nbytes) noexcept nogil:
        """Pack one message; False when it does not fit."""
        cdef uint8_t* at = self.data + self.used
        cdef uint64_t stride = message_stride(nbytes)
        if self.used + stride > self.capacity:
            return False
        (<uint32_t*>at)[0] = <uint32_t>nbytes
        (<uint32_t*>at)[1] = message_check(<uint32_t>nbytes)
        if stride > MESSAGE_HEADER_BYTES:
            (<uint64_t*>(at + stride - 8))[0] = 0
        memcpy(at + MESSAGE_HEADER_BYTES, source, nbytes)
        self.used += stride
        self.count += 1
        return True

    def seal(self, wall_ns: int) -> None:
        """Cut the frame to what is used and write its header, all but the sequence."""
        if self.used < self.capacity:
            self._cut(REQUEST_HEADER_BYTES + self.used)
            self.data = <uint8_t*>PyBytes_AS_STRING(self.frame) + REQUEST_HEADER_BYTES
            self.capacity = self.used
        write_request_header(self.data - REQUEST_HEADER_BYTES, 0, self.count, wall_ns, self.used)

    cdef int _cut(self, Py_ssize_t size) except -1:
        # The frame has one owner, this batch: its block is cut in place, not copied.
        cdef PyObject* raw = <PyObject*>self.frame
        Py_INCREF(raw)
        self.frame = None
        _PyBytes_Resize(&raw, size)
        self.frame = <object>raw
        Py_XDECREF(raw)
        return 0

    cdef int adopt(self, const void* payload, uint64_t nbytes, uint64_t count, uint64_t wall_ns) except -1:
        """Take a packed payload that lies elsewhere as this batch's own."""
        self.frame = PyBytes_FromStringAndSize(NULL, REQUEST_HEADER_BYTES + nbytes)
        self.data = <uint8_t*>PyBytes_AS_STRING(self.frame) + REQUEST_HEADER_BYTES
        self.capacity = self.used = nbytes
        self.count = count
        memcpy(self.data, payload, nbytes)
        write_request_header(self.data - REQUEST_HEADER_BYTES, 0, count, wall_ns, nbytes)
        return 0

    def stamp(self, uint64_t sequence) -> None:
        """Give the batch its sequence: once for a session; every retransmission keeps it."""
        assert self.data != NULL, "a released batch is sent no more"
        memcpy(self.data - REQUEST_HEADER_BYTES + 1, &sequence, 8)
        self.sequence = sequence

    def settle(self, position, epoch, broker, bint duplicate, error) -> None:
        """The outcome is known: wake whoever waits for one of the messages. Only the first outcome counts."""
        tell(self.decide(position, epoch, broker, duplicate, error))

    cdef list decide(self, position, epoch, broker, bint duplicate, error):
        """Settle; the callbacks that are to be told. No Python runs, so no thread sees half of it."""
        cdef list callbacks
        if self.settled:
            return None
        self.position = position
        self.epoch = epoch
        self.broker = broker
        self.duplicate = duplicate
        self.error = error
        callbacks = self.callbacks
        self.callbacks = None
        self.settled = True
        return callbacks

    def release(self) -> None:
        """Let go of the bytes: nobody will send this batch again."""
        self.frame = None
        self.data = NULL

    @property
    def nbytes(self) -> int:
        """Packed bytes."""
        return self.used


cdef void tell(list callbacks) except *:
    """Call each once. One that fails must not stop the acks of everybody else; Ctrl-C in it reaches the main thread after
    the others were told."""
    cdef object interruption = None
    for callback, delivery in callbacks or ():
        try:
            callback(delivery)
        except BaseException as error:
            if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
                _log.exception("a delivery callback failed")
            else:
                interruption = error
    if interruption is not None:
        raise interruption


@cython.freelist(4096)
cdef class Delivery:
    """A published message on its way. It always settles within the publisher's delivery time-out.

    `result()` waits; in a coroutine, `await delivery`.
    """

    def __init__(self, Batch batch, uint64_t index):
        self.batch = batch
        self.index = index

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self.batch.settled

    def receipt(self) -> Receipt:
        """The receipt of a settled message; raises its error."""
        cdef Batch batch = self.batch
        if batch.error is not None:
            raise batch.error
        position = None if batch.position is None else batch.position + self.index
        return Receipt(position, batch.epoch or 0, batch.level, batch.duplicate, batch.broker)

    def result(self, timeout=None) -> Receipt:
        """Wait for the outcome. Raises the message's error, or TimeoutError when it is not known in `timeout` seconds."""
        if not self.batch.settled:
            self.batch.publisher.wait_for_batch(self.batch, timeout)
        return self.receipt()

    def exception(self, timeout=None):
        """Wait for the outcome; its error, None when the message was delivered."""
        if not self.batch.settled:
            self.batch.publisher.wait_for_batch(self.batch, timeout)
        return self.batch.error

    def add_done_callback(self, callback) -> None:
        """Call `callback(delivery)` once when the outcome is known, at once if it is."""
        # Made before looking: from there on no other thread comes between.
        cdef list fresh = [], callbacks
        cdef tuple entry = (callback, self)
        cdef Batch batch = self.batch
        pass_by(PLACE_MADE)
        if batch.settled:
            fresh.append(entry)
            tell(fresh)
            return
        if left_out == SAFEGUARD_CALLBACK_ONCE:
            pass_by(PLACE_MADE)
        if batch.callbacks is None:
            batch.callbacks = fresh
        callbacks = batch.callbacks
        callbacks.append(entry)

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self):
        if not self.batch.settled:
            loop = asyncio.get_running_loop()
            future = loop.create_future()

            def wake(_):
                loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))

            self.batch.publisher.urge(self.batch)
            self.add_done_callback(wake)
            if self.batch.settled:
                wake(self)
            await future
        return self.receipt()


cdef enum:
    NOGIL_BYTES = 32768                 # copies from here on let other threads run


class Dropped(Exception):
    """The policy for a full buffer drops this message; `error` is what its delivery settles with."""

    def __init__(self, error):
        super().__init__(str(error))
        self.error = error


def dropped_delivery(publisher, error) -> Delivery:
    """A delivery that is settled with `error` already."""
    cdef Batch batch = Batch(publisher, 0)
    batch.settle(None, None, None, False, error)
    return Delivery(batch, 0)


cdef class Packer:
    """Packs messages into the current batch and hands full ones over. The hot part of `publish`.

    May be used by several threads: `turn` has one owner. Python (the policy, the collector, `full`) runs outside of a
    turn, and whoever comes back looks at the current batch anew.
    """

    def __init__(self, publisher, full, uint64_t target, uint64_t message_bytes_max):
        self.publisher = publisher
        self.full = full
        self.target = target
        self.message_bytes_max = message_bytes_max

    def take(self):
        """The current batch, which is then no longer current; None when it is empty."""
        return self.take_to(None)

    def take_to(self, list behind):
        """As `take`; the batch is appended to `behind` in the same step: no batch that was packed later comes before it."""
        cdef Batch batch
        take_turn(&self.turn)
        batch = self.batch
        if batch is None or batch.count == 0:
            batch = None
        else:
            self.batch = None
            if behind is not None:
                behind.append(batch)
        give_turn(&self.turn)
        return batch

    def end(self) -> None:
        """Pack nothing more."""
        take_turn(&self.turn)
        self.ended = True
        give_turn(&self.turn)

    def after_fork(self) -> None:
        """In a child: what is here is the parent's."""
        forget_turn(&self.turn)
        self.ended = True

    cdef bint is_empty(self) noexcept:
        return self.batch is None or self.batch.count == 0

    cdef uint64_t _put(self, const uint8_t* source, uint64_t nbytes, uint64_t rows, Delivery delivery) noexcept:
        """Pack as many of `rows` messages as the current batch has room for; `delivery` is then that of the last. In a turn."""
        cdef Batch batch = self.batch
        cdef uint64_t stride = message_stride(nbytes), fit = 0, k
        if batch is None or self.ended:
            return 0
        fit = min(rows, (batch.capacity - batch.used) // stride)
        if fit == 0:
            return 0
        if fit * nbytes < NOGIL_BYTES:
            for k in range(fit):
                batch.append(source + k * nbytes, nbytes)
        else:
            pass_by(PLACE_COPYING)
            with nogil:
                for k in range(fit):
                    batch.append(source + k * nbytes, nbytes)
            pass_by(PLACE_COPIED)
        delivery.batch = batch
        delivery.index = batch.count - 1
        self.messages += fit
        self.nbytes += fit * nbytes
        return fit

    cdef int _make_room(self, uint64_t nbytes) except -1:
        """Have a current batch with room, unless another thread is faster: whoever packs looks again."""
        cdef uint64_t room = max(self.target, message_stride(nbytes))
        cdef Batch old = self.batch, fresh
        if self.ended:
            self.publisher.raise_if_closed()
            raise ClosedError(what="the publisher")
        if old is not None:
            if old.count:
                self.full()
            take_turn(&self.turn)
            if self.batch is old and (old.count == 0 or left_out == SAFEGUARD_LOOK_AGAIN):
                self.batch = None           # too small, and still nothing in it
            give_turn(&self.turn)
        if self.batch is None:
            self.publisher.make_room(room)
            fresh = Batch(self.publisher, room)
            fresh.opened = time.monotonic()
            pass_by(PLACE_MADE)
            take_turn(&self.turn)
            if self.batch is None:
                self.batch = fresh
            give_turn(&self.turn)
        return 0

    cdef Delivery _pack(self, const uint8_t* source, uint64_t nbytes):
        """Pack one message; the batch goes when that fills it."""
        cdef Delivery delivery
        cdef bint packed
        if nbytes > self.message_bytes_max:
            self.publisher.too_big(nbytes)
        # Made before the message is packed: the collector may run with any new object, and others with the collector.
        delivery = Delivery.__new__(Delivery)
        pass_by(PLACE_MADE)
        while True:
            take_turn(&self.turn)
            packed = self._put(source, nbytes, 1, delivery)
            give_turn(&self.turn)
            if packed:
                break
            try:
                self._make_room(nbytes)
            except Dropped as dropped:
                return dropped_delivery(self.publisher, dropped.error)
        self._send_if_full(delivery)
        return delivery

    cdef int _send_if_full(self, Delivery delivery) except -1:
        if delivery.batch.used >= self.target and self.batch is delivery.batch:
            self.full()
        return 0

    def append(self, data) -> Delivery:
        """Pack one message: bytes, or anything with the buffer protocol."""
        return self._pack_object(data)

    cdef Delivery _pack_object(self, data):
        cdef Py_buffer view
        if PyBytes_CheckExact(data):
            return self._pack(<const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        PyObject_GetBuffer(data, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            return self._pack(<const uint8_t*>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def append_many(self, messages) -> Delivery:
        """Pack an iterable of bytes-like messages; the delivery of the last."""
        cdef Delivery delivery = None
        for data in messages:
            delivery = self._pack_object(data)
        if delivery is None:
            raise ValueError("publish_many needs at least one message")
        return delivery

    def append_array(self, const uint8_t[:, ::1] rows) -> Delivery:
        """Pack a 2-D array, one row a message; the delivery of the last row."""
        cdef uint64_t i = 0, fit, count = rows.shape[0], nbytes = rows.shape[1]
        cdef const uint8_t* source = &rows[0, 0] if count and nbytes else NULL
        cdef Delivery delivery = None, last
        if count == 0:
            raise ValueError("publish_array needs at least one row")
        while i < count:
            # One row by the way that makes room and asks the policy; then as many as fit, without asking.
            delivery = self._pack(source + i * nbytes, nbytes)
            i += 1
            if i == count or delivery.batch is not self.batch:
                continue
            last = Delivery.__new__(Delivery)
            take_turn(&self.turn)
            fit = self._put(source + i * nbytes, nbytes, count - i, last) if delivery.batch is self.batch else 0
            give_turn(&self.turn)
            if fit:
                i += fit
                delivery = last
                self._send_if_full(delivery)
        return delivery


def now_ns() -> int:
    """Monotonic time in ns."""
    return cxl_now_ns()
