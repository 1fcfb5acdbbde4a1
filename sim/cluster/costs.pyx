"""What the steps of the stages cost on this machine: the product's own stages, one thread, nothing beside them."""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.log cimport RESERVED
from broker.stages.ack cimport AckStage
from broker.stages.receiver cimport Receiver
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport MappedMemory, Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_store_release, cxl_stream

cdef enum:
    PAYLOAD_BYTES = 64
    ROUNDS_MAX = 1000000


class CostError(RuntimeError):
    """The stages did not do what the measurement needs."""


def time_stages(receivers, acks, streams, stages, uint64_t topic, uint64_t client, uint64_t session, uint64_t first,
                uint64_t batches, uint64_t burst) -> tuple[int, list[int]]:
    """Bring `batches` tiny batches of one session from their receivers to their acks, `burst` at a time.

    `stages` step in turn. Returns ns spent in the receivers, and in each stage. Raises `CostError`.
    """
    cdef uint8_t payload[PAYLOAD_BYTES]
    cdef int64_t since, now, receiving = 0
    cdef uint64_t sent = 0, settled, i, b, slot, count = len(stages), brokers = len(receivers), rounds = 0
    cdef uint64_t* numbers = <uint64_t*>calloc(brokers, 8)
    cdef int64_t* spent = <int64_t*>calloc(count, 8)
    cdef AckStage ack
    cdef int status = RESERVED
    memset(payload, 0, PAYLOAD_BYTES)
    for b in range(brokers):
        numbers[b] = streams[b]
    try:
        while sent < batches and status == RESERVED:
            since = cxl_now_ns()
            for i in range(burst):
                b = (first + sent) % brokers
                status = (<Receiver>receivers[b]).receive_payload(
                    topic, (<AckStage>acks[b]).streams[numbers[b]].generation, payload, PAYLOAD_BYTES, 1, client,
                    session, 1, first + sent, 0, &slot)
                if status != RESERVED:
                    break
                (<AckStage>acks[b]).expect(numbers[b], first + sent, slot, 1)
                sent += 1
            receiving += cxl_now_ns() - since
            while True:
                since = cxl_now_ns()
                for i in range(count):
                    (<Stage>stages[i]).step()
                    now = cxl_now_ns()
                    spent[i] += now - since
                    since = now
                settled = 0
                for b in range(brokers):
                    ack = <AckStage>acks[b]
                    cxl_store_release(&ack.streams[numbers[b]].acks_tail, ack.streams[numbers[b]].acks_head)
                    settled += ack.streams[numbers[b]].waiting_head - ack.streams[numbers[b]].waiting_tail
                rounds += 1
                if settled == 0:
                    break
                if rounds > ROUNDS_MAX:
                    raise CostError("the stages do not settle what they were given")
        if status != RESERVED:
            raise CostError(f"batch {sent} was not received: reserve status {status}")
        return receiving, [spent[i] for i in range(count)]
    finally:
        free(numbers)
        free(spent)


def time_packing(mapping, bytes message, uint64_t batch_bytes, uint64_t total_bytes) -> int:
    """ns to write `total_bytes` of framed messages as an attached publisher does, in batches, each with a fence."""
    cdef MappedMemory memory = MappedMemory(mapping)
    cdef const uint8_t* source = message
    cdef uint64_t nbytes = len(message), framed = 8 + (nbytes + 7) // 8 * 8, done = 0, at = 0, i
    cdef uint64_t messages = max(<uint64_t>1, batch_bytes // framed)
    cdef cxl_stream stream
    cdef int64_t since
    if batch_bytes > memory.bytes:
        raise ValueError("a batch is larger than the mapping")
    with nogil:
        since = cxl_now_ns()
        while done < total_bytes:
            if at + batch_bytes > memory.bytes:
                at = 0
            memory.stream_start(&stream, at)
            for i in range(messages):
                memory.stream_messages(&stream, source, nbytes, 1, 0)
            memory.stream_finish(&stream)
            memory.fence()
            at += (messages * framed + 63) // 64 * 64
            done += messages * framed
    return cxl_now_ns() - since
