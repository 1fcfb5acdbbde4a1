/* The instructions that Cython cannot say: line flushes, fences, non-temporal copies, pause and futex.
 *
 * Everything is chosen at run time from what the processor has; nothing needs -march. Atomics are the compiler's own
 * (__atomic builtins). On x86-64 `sfence` orders clwb, clflushopt and non-temporal stores; `lfence` orders none of them.
 */
#ifndef CXLMQ_PRIMITIVES_H
#define CXLMQ_PRIMITIVES_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/futex.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define CXL_LINE 64u

enum cxl_flush_kind { CXL_FLUSH_CLFLUSH = 0, CXL_FLUSH_CLFLUSHOPT = 1, CXL_FLUSH_CLWB = 2, CXL_FLUSH_DC_CVAC = 3 };
enum cxl_copy_kind { CXL_COPY_MEMCPY = 0, CXL_COPY_SSE = 1, CXL_COPY_AVX512 = 2, CXL_COPY_MOVDIR64B = 3, CXL_COPY_STNP = 4 };
#define CXL_COPY_PAGES 16               /* beside a kind: from CXL_PAGES_BYTES up, four pages in turn */
#define CXL_PAGES_BYTES 16384u

static int cxl_has_clwb, cxl_has_clflushopt, cxl_has_avx512, cxl_has_movdir64b, cxl_is_intel, cxl_probed;

static inline void cxl_probe(void) {
    if (cxl_probed) return;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        cxl_has_clflushopt = (b >> 23) & 1;
        cxl_has_clwb = (b >> 24) & 1;
        cxl_has_movdir64b = (c >> 28) & 1;
    }
    if (__get_cpuid(0, &a, &b, &c, &d)) cxl_is_intel = b == signature_INTEL_ebx;
    __builtin_cpu_init();
    cxl_has_avx512 = __builtin_cpu_supports("avx512f") ? 1 : 0;
#endif
    cxl_probed = 1;
}

/* ---- atomics ------------------------------------------------------------------------------------------------ */
static inline uint64_t cxl_load_acquire(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
static inline uint64_t cxl_load_relaxed(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED); }
static inline void cxl_store_release(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
static inline void cxl_store_relaxed(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED); }
static inline uint64_t cxl_fetch_add(void *p, uint64_t v) { return __atomic_fetch_add((uint64_t *)p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t cxl_fetch_or(void *p, uint64_t v) { return __atomic_fetch_or((uint64_t *)p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t cxl_fetch_and(void *p, uint64_t v) { return __atomic_fetch_and((uint64_t *)p, v, __ATOMIC_ACQ_REL); }
static inline int cxl_compare_and_swap(void *p, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n((uint64_t *)p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline int cxl_count_trailing_zeros(uint64_t v) { return v ? __builtin_ctzll(v) : 64; }
static inline int cxl_popcount(uint64_t v) { return __builtin_popcountll(v); }

/* A local counter that one thread writes and others read: no lock prefix, no torn value. */
static inline void cxl_count(uint64_t *p, uint64_t v) { cxl_store_relaxed(p, cxl_load_relaxed(p) + v); }

/* ---- fences and flushes ---------------------------------------------------------------------------------------- */
/* Completes this processor's earlier flushes and non-temporal stores before its later stores. */
static inline void cxl_store_fence(void) {
#if defined(__x86_64__)
    __asm__ __volatile__("sfence" ::: "memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("dsb ish" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Orders everything, loads included: needed where two sides each store and then look at the other's word. It completes
 * earlier flushes as well: `dmb` would not wait for `dc cvac`, `dsb` does. */
static inline void cxl_full_fence(void) {
#if defined(__x86_64__)
    __asm__ __volatile__("mfence" ::: "memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("dsb ish" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

static inline int cxl_flush_kind(void) {
#if defined(__x86_64__)
    cxl_probe();
    return cxl_has_clwb ? CXL_FLUSH_CLWB : cxl_has_clflushopt ? CXL_FLUSH_CLFLUSHOPT : CXL_FLUSH_CLFLUSH;
#else
    return CXL_FLUSH_DC_CVAC;
#endif
}

/* Writes one line back; the line may stay cached. */
static inline void cxl_flush_line(const void *p, int kind) {
#if defined(__x86_64__)
    if (kind == CXL_FLUSH_CLWB) __asm__ __volatile__("clwb (%0)" ::"r"(p) : "memory");
    else if (kind == CXL_FLUSH_CLFLUSHOPT) __asm__ __volatile__("clflushopt (%0)" ::"r"(p) : "memory");
    else __asm__ __volatile__("clflush (%0)" ::"r"(p) : "memory");
#elif defined(__aarch64__)
    (void)kind;
    __asm__ __volatile__("dc cvac, %0" ::"r"(p) : "memory");
#else
    (void)p; (void)kind;
#endif
}

/* Drops one line from every cache of this host (a dirty line is written back first). */
static inline void cxl_invalidate_line(const void *p) {
#if defined(__x86_64__)
    if (cxl_has_clflushopt) __asm__ __volatile__("clflushopt (%0)" ::"r"(p) : "memory");
    else __asm__ __volatile__("clflush (%0)" ::"r"(p) : "memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("dc civac, %0" ::"r"(p) : "memory");
#else
    (void)p;
#endif
}

static inline void cxl_flush_range(const void *p, uint64_t bytes, int kind) {
    uintptr_t line = (uintptr_t)p & ~(uintptr_t)(CXL_LINE - 1), end = (uintptr_t)p + bytes;
    for (; line < end; line += CXL_LINE) cxl_flush_line((const void *)line, kind);
}

static inline void cxl_invalidate_range(const void *p, uint64_t bytes) {
    uintptr_t line = (uintptr_t)p & ~(uintptr_t)(CXL_LINE - 1), end = (uintptr_t)p + bytes;
    for (; line < end; line += CXL_LINE) cxl_invalidate_line((const void *)line);
    cxl_full_fence();
}

static inline void cxl_pause(void) {
#if defined(__x86_64__)
    __asm__ __volatile__("pause");
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline void cxl_yield(void) { sched_yield(); }

/* The processor that this thread runs on, plus 1; 0 when nobody knows. */
static inline uint64_t cxl_processor(void) { return (uint64_t)(sched_getcpu() + 1); }

/* Leaves a processor to others: the thread goes on on another one that it may use, if there is one, and may come back. */
static inline void cxl_leave_processor(uint64_t processor) {
    cpu_set_t all, others;
    if (processor == 0 || processor > CPU_SETSIZE || sched_getaffinity(0, sizeof all, &all)) return;
    others = all;
    CPU_CLR(processor - 1, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others)) return;
    sched_setaffinity(0, sizeof all, &all);
}

/* ---- lines -------------------------------------------------------------------------------------------------------
 * Word 0 of every line is its commit word: stored last by the writer, loaded first by the reader. Stores of one
 * processor become visible in order on x86-64; release/acquire says the same to the compiler and to aarch64. */
static inline void cxl_write_line(void *line, const void *source) {
    uint64_t *to = (uint64_t *)line;
    const uint64_t *from = (const uint64_t *)source;
    for (int i = 1; i < 8; i++) cxl_store_relaxed(to + i, from[i]);
    cxl_store_release(to, from[0]);
}

/* Returns 1 when the commit word did not change while the line was read. */
static inline int cxl_read_line(void *target, const void *line) {
    uint64_t *to = (uint64_t *)target;
    const uint64_t *from = (const uint64_t *)line;
    to[0] = cxl_load_acquire(from);
    for (int i = 1; i < 8; i++) to[i] = cxl_load_relaxed(from + i);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return cxl_load_relaxed(from) == to[0];
}

/* ---- copies ------------------------------------------------------------------------------------------------------
 * Bulk payload goes around the cache. With CXL_COPY_PAGES four pages are written in turn, line by line. The caller
 * fences. Which is best where was measured (`cxlmq bench copies` shows it for the machine at hand):
 *
 *   from        Intel with movdir64b      other Intel                   AMD and others     aarch64
 *   0 bytes     memcpy, then flush        memcpy, then flush            memcpy, flush      memcpy, flush
 *   64 bytes    movdir64b                 AVX-512 or SSE stores         the same           stnp
 *   16 KiB      the same, pages in turn   the same, pages in turn       the same           stnp
 *
 * Pages in turn gain 5 % from a hot source and 10 to 30 % from a cold one on Intel, and lose 20 to 30 % on AMD. */
#if defined(__x86_64__)
static inline void cxl_line_sse(uint8_t *to, const uint8_t *from) {
    __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)(from + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(from + 32)), d = _mm_loadu_si128((const __m128i *)(from + 48));
    _mm_stream_si128((__m128i *)to, a);
    _mm_stream_si128((__m128i *)(to + 16), b);
    _mm_stream_si128((__m128i *)(to + 32), c);
    _mm_stream_si128((__m128i *)(to + 48), d);
}

__attribute__((target("avx512f"))) static inline void cxl_line_avx512(uint8_t *to, const uint8_t *from) {
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512((const void *)from));
}

static inline void cxl_line_movdir64b(uint8_t *to, const uint8_t *from) {
    /* movdir64b rax, [rdx]: bytes given, for assemblers that do not know it. */
    __asm__ __volatile__(".byte 0x66, 0x0f, 0x38, 0xf8, 0x02" ::"a"(to), "d"(from) : "memory");
}

#define CXL_COPY_LINES(NAME, LINE, TARGET)                                                                  \
    TARGET static void NAME(uint8_t *to, const uint8_t *from, uint64_t lines, int pages) {                  \
        while (pages && lines >= CXL_PAGES_BYTES / CXL_LINE) {                                                                        \
            for (int i = 0; i < 64; i++) {                                                                  \
                const uint8_t *f = from + i * 64;                                                           \
                uint8_t *t = to + i * 64;                                                                   \
                __builtin_prefetch(f + 16384, 0, 0);                                                        \
                __builtin_prefetch(f + 16384 + 4096, 0, 0);                                                 \
                __builtin_prefetch(f + 16384 + 8192, 0, 0);                                                 \
                __builtin_prefetch(f + 16384 + 12288, 0, 0);                                                \
                LINE(t, f);                                                                                 \
                LINE(t + 4096, f + 4096);                                                                   \
                LINE(t + 8192, f + 8192);                                                                   \
                LINE(t + 12288, f + 12288);                                                                 \
            }                                                                                               \
            to += 16384; from += 16384; lines -= 256;                                                       \
        }                                                                                                   \
        for (; lines; lines--, to += 64, from += 64) LINE(to, from);                                        \
    }
CXL_COPY_LINES(cxl_copy_lines_sse, cxl_line_sse, )
CXL_COPY_LINES(cxl_copy_lines_avx512, cxl_line_avx512, __attribute__((target("avx512f"))))
CXL_COPY_LINES(cxl_copy_lines_movdir64b, cxl_line_movdir64b, )
#elif defined(__aarch64__)
static void cxl_copy_lines_stnp(uint8_t *to, const uint8_t *from, uint64_t lines) {
    for (; lines; lines--, to += 64, from += 64)
        __asm__ __volatile__("ldp q0, q1, [%1]\n ldp q2, q3, [%1, #32]\n stnp q0, q1, [%0]\n stnp q2, q3, [%0, #32]"
                             ::"r"(to), "r"(from) : "memory", "v0", "v1", "v2", "v3");
}
#endif

static inline int cxl_copy_kind(void) {
    cxl_probe();
#if defined(__x86_64__)
    int kind = cxl_has_movdir64b ? CXL_COPY_MOVDIR64B : cxl_has_avx512 ? CXL_COPY_AVX512 : CXL_COPY_SSE;
    return cxl_is_intel ? kind | CXL_COPY_PAGES : kind;
#elif defined(__aarch64__)
    return CXL_COPY_STNP;
#else
    return CXL_COPY_MEMCPY;
#endif
}

/* Copies around the cache. Head and tail that do not fill a line go through the cache and are flushed, so that after
 * one store fence the whole range is in memory. */
static inline void cxl_copy_nontemporal(void *target, const void *source, uint64_t bytes, int kind, int flush_kind) {
    uint8_t *to = (uint8_t *)target;
    const uint8_t *from = (const uint8_t *)source;
    uint64_t head = (CXL_LINE - ((uintptr_t)to & (CXL_LINE - 1))) & (CXL_LINE - 1);
    if (head > bytes) head = bytes;
    if (head) {
        memcpy(to, from, head);
        cxl_flush_range(to, head, flush_kind);
        to += head; from += head; bytes -= head;
    }
    uint64_t lines = bytes / CXL_LINE;
    int pages = kind & CXL_COPY_PAGES;
    kind &= ~CXL_COPY_PAGES;
    (void)pages;
    if (kind == CXL_COPY_MEMCPY) {
        memcpy(to, from, lines * CXL_LINE);
        cxl_flush_range(to, lines * CXL_LINE, flush_kind);
    }
#if defined(__x86_64__)
    else if (kind == CXL_COPY_MOVDIR64B) cxl_copy_lines_movdir64b(to, from, lines, pages);
    else if (kind == CXL_COPY_AVX512) cxl_copy_lines_avx512(to, from, lines, pages);
    else cxl_copy_lines_sse(to, from, lines, pages);
#elif defined(__aarch64__)
    else cxl_copy_lines_stnp(to, from, lines);
#endif
    to += lines * CXL_LINE; from += lines * CXL_LINE; bytes -= lines * CXL_LINE;
    if (bytes) {
        memcpy(to, from, bytes);
        cxl_flush_range(to, bytes, flush_kind);
    }
}

/* ---- streams of messages ---------------------------------------------------------------------------------------------
 * Packs messages (size, check, bytes, zeroes up to a multiple of 8) one behind the other around the cache: a line is put
 * together here and stored when it is full; whole lines of a large message go straight from their source. `at` is 64-byte
 * aligned at the start, and `fill` always a multiple of 8. The line has room before and behind it, so that pieces of it
 * are copied 64 bytes at a time, without a call. All of it lies in one page: where such a piece crosses into another one,
 * messages of 1 KiB take three times as long. */
struct cxl_stream {
    uint8_t *start;
    uint8_t *at;                /* where the line under construction goes */
    uint64_t fill;              /* bytes of it that are there */
    uint8_t room[3 * CXL_LINE] __attribute__((aligned(64)));
} __attribute__((aligned(4 * CXL_LINE)));

/* A stream of its own, to be freed; NULL without memory. */
static inline struct cxl_stream *cxl_stream_new(void) {
    return (struct cxl_stream *)aligned_alloc(sizeof(struct cxl_stream), sizeof(struct cxl_stream));
}

static inline void cxl_stream_start(struct cxl_stream *s, void *target) {
    s->start = s->at = (uint8_t *)target;
    s->fill = 0;
}

#define CXL_STREAM_MESSAGE(NAME, LINE, LINES, TARGET)                                                       \
    TARGET static void NAME(struct cxl_stream *s, const uint8_t *from, uint64_t bytes, uint32_t check,      \
                            int pages, int flush_kind) {                                                    \
        uint8_t *line = s->room + CXL_LINE, *at = s->at;                                                    \
        uint64_t fill = s->fill, left = bytes, lines;                                                       \
        uint32_t header[2] = {(uint32_t)bytes, check};                                                      \
        (void)pages; (void)flush_kind;                                                                      \
        memcpy(line + fill, header, 8);                                                                     \
        fill += 8;                                                                                          \
        if (fill == CXL_LINE) { LINE(at, line); at += CXL_LINE; fill = 0; }                                 \
        if (left >= CXL_LINE) {                                                                             \
            if (fill) {                                                                                     \
                memcpy(line + fill, from, CXL_LINE);                                                        \
                LINE(at, line);                                                                             \
                at += CXL_LINE; from += CXL_LINE - fill; left -= CXL_LINE - fill;                           \
            }                                                                                               \
            lines = left / CXL_LINE;                                                                        \
            if (lines) LINES(at, from, lines);                                                              \
            at += lines * CXL_LINE; from += lines * CXL_LINE; left -= lines * CXL_LINE;                     \
            /* The last 64 bytes of the message, so that its end lies where it belongs. */                  \
            memcpy(line + left - CXL_LINE, from + left - CXL_LINE, CXL_LINE);                               \
            fill = left;                                                                                    \
        } else {                                                                                            \
            memcpy(line + fill, from, left);                                                                \
            fill += left;                                                                                   \
            if (fill >= CXL_LINE) {                                                                         \
                LINE(at, line);                                                                             \
                memcpy(line, line + CXL_LINE, CXL_LINE);                                                    \
                at += CXL_LINE; fill -= CXL_LINE;                                                           \
            }                                                                                               \
        }                                                                                                   \
        if (bytes & 7) {                                                                                    \
            memset(line + fill, 0, 8);                                                                      \
            fill = (fill + 7) & ~(uint64_t)7;                                                               \
            if (fill == CXL_LINE) { LINE(at, line); at += CXL_LINE; fill = 0; }                             \
        }                                                                                                   \
        s->at = at;                                                                                         \
        s->fill = fill;                                                                                     \
    }
#if defined(__x86_64__)
#define CXL_LINES_SSE(t, f, n) cxl_copy_lines_sse(t, f, n, pages)
#define CXL_LINES_AVX512(t, f, n) cxl_copy_lines_avx512(t, f, n, pages)
#define CXL_LINES_MOVDIR64B(t, f, n) cxl_copy_lines_movdir64b(t, f, n, pages)
CXL_STREAM_MESSAGE(cxl_stream_message_sse, cxl_line_sse, CXL_LINES_SSE, )
CXL_STREAM_MESSAGE(cxl_stream_message_avx512, cxl_line_avx512, CXL_LINES_AVX512, __attribute__((target("avx512f"))))
CXL_STREAM_MESSAGE(cxl_stream_message_movdir64b, cxl_line_movdir64b, CXL_LINES_MOVDIR64B, )
#elif defined(__aarch64__)
#define CXL_LINE_STNP(t, f) cxl_copy_lines_stnp(t, f, 1)
CXL_STREAM_MESSAGE(cxl_stream_message_stnp, CXL_LINE_STNP, cxl_copy_lines_stnp, )
#endif
#define CXL_LINES_CACHED(t, f, n) (memcpy(t, f, (n) * CXL_LINE), cxl_flush_range(t, (n) * CXL_LINE, flush_kind))
#define CXL_LINE_CACHED(t, f) CXL_LINES_CACHED(t, f, 1)
CXL_STREAM_MESSAGE(cxl_stream_message_cached, CXL_LINE_CACHED, CXL_LINES_CACHED, )

static inline void cxl_stream_message(struct cxl_stream *s, const void *source, uint64_t bytes, uint32_t check, int kind,
                                      int flush_kind) {
    const uint8_t *from = (const uint8_t *)source;
    int pages = kind & CXL_COPY_PAGES;
    kind &= ~CXL_COPY_PAGES;
#if defined(__x86_64__)
    if (kind == CXL_COPY_AVX512) cxl_stream_message_avx512(s, from, bytes, check, pages, flush_kind);
    else if (kind == CXL_COPY_MOVDIR64B) cxl_stream_message_movdir64b(s, from, bytes, check, pages, flush_kind);
    else if (kind == CXL_COPY_SSE) cxl_stream_message_sse(s, from, bytes, check, pages, flush_kind);
    else
#elif defined(__aarch64__)
    if (kind == CXL_COPY_STNP) cxl_stream_message_stnp(s, from, bytes, check, pages, flush_kind);
    else
#endif
    cxl_stream_message_cached(s, from, bytes, check, pages, flush_kind);
}

/* Stores what is left, the rest of its line zeroed. The caller fences. */
static inline void cxl_stream_finish(struct cxl_stream *s, int kind, int flush_kind) {
    if (!s->fill) return;
    memset(s->room + CXL_LINE + s->fill, 0, CXL_LINE - s->fill);
    cxl_copy_nontemporal(s->at, s->room + CXL_LINE, CXL_LINE, kind, flush_kind);
    s->at += CXL_LINE;
    s->fill = 0;
}

/* ---- checksum: CRC-32C (Castagnoli), by instruction where there is one ------------------------------------------------ */
static inline uint32_t cxl_crc32c_table_step(uint32_t crc, uint8_t byte) {
    crc ^= byte;
    for (int i = 0; i < 8; i++) crc = (crc >> 1) ^ (0x82F63B78u & (0u - (crc & 1)));
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static inline uint32_t cxl_crc32c_sse42(uint32_t crc, const uint8_t *p, uint64_t bytes) {
    uint64_t state = crc, word;
    for (; bytes >= 8; bytes -= 8, p += 8) { memcpy(&word, p, 8); state = _mm_crc32_u64(state, word); }
    crc = (uint32_t)state;
    for (; bytes; bytes--, p++) crc = _mm_crc32_u8(crc, *p);
    return crc;
}
#endif

static inline uint32_t cxl_crc32c(uint32_t seed, const void *data, uint64_t bytes) {
    const uint8_t *p = (const uint8_t *)data;
    uint32_t crc = ~seed;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) return ~cxl_crc32c_sse42(crc, p, bytes);
#endif
    for (; bytes; bytes--, p++) crc = cxl_crc32c_table_step(crc, *p);
    return ~crc;
}

/* ---- time, futex, pages ------------------------------------------------------------------------------------------ */
static inline int64_t cxl_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int64_t cxl_wall_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int cxl_futex_wait(void *word, uint32_t expected, int64_t timeout_ns) {
    struct timespec t = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    return (int)syscall(SYS_futex, word, FUTEX_WAIT, expected, &t, NULL, 0);
}

static inline int cxl_futex_wake(void *word, int count) {
    return (int)syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* Makes pages present without changing a byte of them. */
#define CXL_TOUCH_BYTES 65536   /* in one call: a kernel that preempts lazily gives the core to others between two */
static inline int cxl_touch_pages(void *target, uint64_t bytes) {
    for (uint64_t done = 0; done < bytes; done += CXL_TOUCH_BYTES) {
        uint64_t piece = bytes - done < CXL_TOUCH_BYTES ? bytes - done : CXL_TOUCH_BYTES;
        if (madvise((uint8_t *)target + done, piece, MADV_POPULATE_WRITE) == 0) continue;
        if (errno != EINVAL) return -errno;
        for (uint64_t i = 0; i < piece; i += 4096) __atomic_fetch_or((uint8_t *)target + done + i, 0, __ATOMIC_RELAXED);
    }
    return 0;
}

/* ---- robust lock --------------------------------------------------------------------------------------------------- */
static inline int cxl_mutex_init(void *target) {
    pthread_mutexattr_t attributes;
    if (pthread_mutexattr_init(&attributes)) return -1;
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    int result = pthread_mutex_init((pthread_mutex_t *)target, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return result;
}
static inline int cxl_mutex_try(void *m) {
    int result = pthread_mutex_trylock((pthread_mutex_t *)m);
    if (result == EOWNERDEAD) { pthread_mutex_consistent((pthread_mutex_t *)m); return 0; }
    return result;
}
static inline int cxl_mutex_lock(void *m) {
    int result = pthread_mutex_lock((pthread_mutex_t *)m);
    if (result == EOWNERDEAD) { pthread_mutex_consistent((pthread_mutex_t *)m); return 0; }
    return result;
}
static inline void cxl_mutex_unlock(void *m) { pthread_mutex_unlock((pthread_mutex_t *)m); }
static inline uint64_t cxl_mutex_bytes(void) { return sizeof(pthread_mutex_t); }
#endif
