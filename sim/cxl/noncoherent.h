/* What Cython cannot say: the number of a thread, and the place in the code that called. */
#ifndef CXLMQ_NONCOHERENT_H
#define CXLMQ_NONCOHERENT_H

#include <stdint.h>

/* Number of the calling thread, from 0 on, in the order in which threads first asked. */
static inline int cxl_thread_number(void) {
    static int threads;
    static __thread int mine;
    if (!mine) mine = __atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED);
    return mine - 1;
}

/* Return address of the function that this stands in. */
#define cxl_caller() ((uint64_t)(uintptr_t)__builtin_return_address(0))

#define CXL_EXTENT ((uint64_t)1 << 63)
#define CXL_HASH_PRIME 0x9E3779B97F4A7C15ull
#define CXL_TRACE_PRIME 0x100000001b3ull                    /* FNV-1a */

/* A device line's version: odd while the line is written. */
static inline uint32_t cxl_version_load(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void cxl_version_store(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int cxl_version_take(uint32_t *p, uint32_t old) {
    return __atomic_compare_exchange_n(p, &old, old + 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline uint64_t cxl_random(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15ull);        /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
#endif
