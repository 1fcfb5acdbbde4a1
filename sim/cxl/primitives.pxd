"""The instructions of primitives.h, as Cython sees them."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "primitives.h" nogil:
    void cxl_probe()
    int cxl_has_clwb, cxl_has_clflushopt, cxl_has_avx512, cxl_has_movdir64b
    uint64_t cxl_load_acquire(const void* p)
    uint64_t cxl_load_relaxed(const void* p)
    void cxl_store_release(void* p, uint64_t v)
    void cxl_store_relaxed(void* p, uint64_t v)
    uint64_t cxl_fetch_add(void* p, uint64_t v)
    uint64_t cxl_fetch_or(void* p, uint64_t v)
    uint64_t cxl_fetch_and(void* p, uint64_t v)
    int cxl_compare_and_swap(void* p, uint64_t expected, uint64_t desired)
    int cxl_count_trailing_zeros(uint64_t v)
    int cxl_popcount(uint64_t v)
    void cxl_count(uint64_t* p, uint64_t v)
    void cxl_store_fence()
    void cxl_full_fence()
    int cxl_flush_kind()
    void cxl_flush_range(const void* p, uint64_t bytes, int kind)
    void cxl_invalidate_range(const void* p, uint64_t bytes)
    void cxl_pause()
    void cxl_yield()
    uint64_t cxl_processor()
    void cxl_leave_processor(uint64_t processor)
    void cxl_write_line(void* line, const void* source)
    int cxl_read_line(void* target, const void* line)
    int cxl_has_avx512, cxl_has_movdir64b     # known once a kind was asked for
    int cxl_copy_kind()
    void cxl_copy_nontemporal(void* target, const void* source, uint64_t bytes, int kind, int flush_kind)
    struct cxl_stream:
        uint8_t* start
        uint8_t* at
    cxl_stream* cxl_stream_new()
    void cxl_stream_start(cxl_stream* s, void* target)
    void cxl_stream_message(cxl_stream* s, const void* source, uint64_t bytes, uint32_t check, int kind, int flush_kind)
    void cxl_stream_finish(cxl_stream* s, int kind, int flush_kind)
    uint32_t cxl_crc32c(uint32_t seed, const void* data, uint64_t bytes)
    int64_t cxl_now_ns()
    int64_t cxl_wall_ns()
    int cxl_futex_wait(void* word, uint32_t expected, int64_t timeout_ns)
    int cxl_futex_wake(void* word, int count)
    int cxl_touch_pages(void* target, uint64_t bytes)
    int cxl_mutex_init(void* target)
    int cxl_mutex_try(void* m)
    int cxl_mutex_lock(void* m)
    void cxl_mutex_unlock(void* m)
    uint64_t cxl_mutex_bytes()
    enum: CXL_COPY_MEMCPY, CXL_COPY_SSE, CXL_COPY_AVX512, CXL_COPY_MOVDIR64B, CXL_COPY_STNP, CXL_COPY_PAGES
