/* What the kernels share: bfloat16, and tasks on torch's own threads. */

#pragma once

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bfloat16(uint16_t value) { return from_bits((uint32_t)value << 16); }

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* ties to even */
}

/* Tensors of either dtype: `wide` is float32. */
static inline int64_t size_of(int wide) { return wide ? 4 : 2; }

static inline float read_one(const void *data, int64_t i, int wide) {
    return wide ? ((const float *)data)[i] : from_bfloat16(((const uint16_t *)data)[i]);
}

static inline void write_one(void *data, int64_t i, int wide, float value) {
    if (wide) ((float *)data)[i] = value;
    else ((uint16_t *)data)[i] = to_bfloat16(value);
}

typedef void Work(void *job, int64_t task);

/* A thread takes tasks in a row, which read memory in a row: ever fewer, so that all end at about the same time. */
static inline void run_some(Work *work, void *job, int64_t num_tasks, int num_threads, atomic_llong *next) {
    for (;;) {
        long long task = atomic_load(next), end;
        do {
            if (task >= num_tasks) return;
            end = task + 1 + (num_tasks - task) / (4 * num_threads);
            end = end < num_tasks ? end : num_tasks;
        } while (!atomic_compare_exchange_weak(next, &task, end));
        for (; task < end; task++) work(job, task);
    }
}

/* Every task from 0 to num_tasks - 1, in any order. The threads are torch's own: others would wait for a core while
   these spin, as OpenMP's do between two operations. */
static inline void run(Work *work, void *job, int64_t num_tasks, int num_threads) {
    if (num_threads > num_tasks) num_threads = (int)num_tasks;
#ifdef _OPENMP
    if (num_threads > 1) {
        atomic_llong next;
        atomic_init(&next, 0);
#pragma omp parallel num_threads(num_threads)
        run_some(work, job, num_tasks, num_threads, &next);
        return;
    }
#endif
    for (int64_t task = 0; task < num_tasks; task++) work(job, task);
}
