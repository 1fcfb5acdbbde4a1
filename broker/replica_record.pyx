"""Checksums and records of replica files, for the Python side: recovery, verify, tests."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from broker.replica_record cimport REPLICA_ALIGNMENT, REPLICA_MAGIC, REPLICA_SUPERBLOCK, ReplicaRecord
from sim.cxl.primitives cimport cxl_crc32c

RECORD_BYTES = sizeof(ReplicaRecord)
RECORD_MAGIC = REPLICA_MAGIC
RECORD_ALIGNMENT = REPLICA_ALIGNMENT
SUPERBLOCK_BYTES = REPLICA_SUPERBLOCK
assert RECORD_BYTES == 128


def crc32c(data, uint32_t seed=0) -> int:
    """CRC-32C (Castagnoli) of anything with the buffer protocol; `seed` is the checksum of what came before."""
    cdef Py_buffer view
    cdef uint32_t found
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            found = cxl_crc32c(seed, view.buf, view.len)
    finally:
        PyBuffer_Release(&view)
    return found


def parse_record(data, uint32_t file_tag):
    """The fields of a record header, or None when these 128 bytes are none of the file with this tag."""
    cdef ReplicaRecord record
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < <Py_ssize_t>sizeof(record):
            return None
        memcpy(&record, view.buf, sizeof(record))
    finally:
        PyBuffer_Release(&view)
    if (record.magic != REPLICA_MAGIC or record.file_tag != file_tag
            or record.header_crc != cxl_crc32c(0, &record, sizeof(record) - 4)):
        return None
    fields = dict(record.entry)
    fields.update(index=record.index, durable_position=record.durable_position,
                  committed_position=record.committed_position, first_position=record.first_position,
                  payload_crc=record.payload_crc)
    return fields
