"""What this machine's memory can do: one core's passes over a large mapping, without the GIL.

    source (one hot piece, or none)  ──►  piece 0 | piece 1 | ... | piece n-1 of the mapping

The mapping is larger than the last-level cache, so that every pass goes to memory, as a log's segments do. A source of
several pieces is gone through again and again: a large one is cold each time.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy

from sim.cxl.primitives cimport (
    CXL_COPY_AVX512, CXL_COPY_MEMCPY, CXL_COPY_MOVDIR64B, CXL_COPY_PAGES, CXL_COPY_SSE, CXL_COPY_STNP,
    cxl_copy_kind, cxl_copy_nontemporal, cxl_flush_kind, cxl_has_avx512, cxl_has_movdir64b, cxl_now_ns, cxl_pause,
    cxl_store_fence,
)

KINDS = ("memcpy", "nontemporal", "read")

cdef enum:
    MEMCPY = -1
    READ = -2


def _copies() -> dict[str, int]:
    """The copies that end in memory and that this processor has, by name."""
    cdef bint x86 = cxl_copy_kind() & ~CXL_COPY_PAGES not in (CXL_COPY_STNP, CXL_COPY_MEMCPY)
    found = {"memcpy, flush": CXL_COPY_MEMCPY}
    stores = [("SSE", CXL_COPY_SSE, x86), ("AVX-512", CXL_COPY_AVX512, cxl_has_avx512),
              ("movdir64b", CXL_COPY_MOVDIR64B, cxl_has_movdir64b)]
    for name, kind, there in stores:
        if there:
            found[name] = kind
            found[f"{name}, pages in turn"] = kind | CXL_COPY_PAGES
    if cxl_copy_kind() == CXL_COPY_STNP:
        found["stnp"] = CXL_COPY_STNP
    return found


COPIES = _copies()
CHOSEN = next(name for name, kind in COPIES.items() if kind == cxl_copy_kind())


cdef uint64_t _sum(const uint8_t* data, uint64_t nbytes) noexcept nogil:
    """Touch every byte: the sum of all 8-byte words."""
    cdef const uint64_t* words = <const uint64_t*>data
    cdef uint64_t total = 0, k
    for k in range(nbytes // 8):
        total += words[k]
    return total


cdef uint64_t _pass(int kind, uint8_t* mapping, uint8_t* source, uint64_t source_bytes, uint64_t piece_bytes,
                    uint64_t pieces) noexcept nogil:
    cdef uint64_t i, at = 0, total = 0
    cdef int flush_kind = cxl_flush_kind()
    for i in range(pieces):
        if kind == MEMCPY:
            memcpy(mapping + i * piece_bytes, source + at, piece_bytes)
        elif kind == READ:
            total += _sum(mapping + i * piece_bytes, piece_bytes)
        else:
            cxl_copy_nontemporal(mapping + i * piece_bytes, source + at, piece_bytes, kind, flush_kind)
            cxl_store_fence()
        at += piece_bytes
        if at + piece_bytes > source_bytes:
            at = 0
    return total


def run_pass(mapping, source, str kind, uint64_t offset, uint64_t nbytes, int64_t start_at_ns=0,
             uint64_t piece_bytes=0) -> tuple[int, int, int]:
    """One pass over `nbytes` of a writable mapping from `offset`, in pieces of the size of `source` if not said.

    "memcpy", "nontemporal" (what the product uses here) and the names in `COPIES` copy `source` into every piece; "read"
    sums up the words of every piece. Begins at `start_at_ns` (monotonic), so that several threads begin together.
    Returns (begun ns, ended ns, sum).
    """
    cdef Py_buffer view, from_view
    cdef int number = {"memcpy": MEMCPY, "read": READ, "nontemporal": cxl_copy_kind(), **COPIES}[kind]
    cdef int64_t begun, ended
    cdef uint64_t total
    PyObject_GetBuffer(mapping, &view, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(source, &from_view, PyBUF_SIMPLE)
        try:
            piece_bytes = piece_bytes or from_view.len
            if (piece_bytes == 0 or piece_bytes > <uint64_t>from_view.len or offset % 64
                    or offset + nbytes > <uint64_t>view.len or nbytes % piece_bytes):
                raise ValueError(f"{nbytes} bytes from {offset} are no whole pieces of {piece_bytes} bytes in the mapping")
            with nogil:
                while cxl_now_ns() < start_at_ns:
                    cxl_pause()
                begun = cxl_now_ns()
                total = _pass(number, <uint8_t*>view.buf + offset, <uint8_t*>from_view.buf, from_view.len, piece_bytes,
                              nbytes // piece_bytes)
                ended = cxl_now_ns()
        finally:
            PyBuffer_Release(&from_view)
    finally:
        PyBuffer_Release(&view)
    return begun, ended, total


def add_up(data) -> int:
    """The sum of all 8-byte words of a buffer: every byte of it is touched."""
    cdef Py_buffer view
    cdef uint64_t total
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    with nogil:
        total = _sum(<const uint8_t*>view.buf, view.len)
    PyBuffer_Release(&view)
    return total
