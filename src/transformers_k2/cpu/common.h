/* What the kernels share: bfloat16, and tasks on torch's own threads. */

#pragma once

#include <sched.h>
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

/* Every task from 0 to num_tasks - 1, in any order. */
typedef struct {
    Work *work;
    void *job;
    int64_t num_tasks;
    atomic_llong next, done;
} Stage;

/* A thread takes tasks in a row, which read memory in a row: ever fewer, so that all end at about the same time. */
static inline void run_some(Stage *stage, int num_threads) {
    const int64_t num_tasks = stage->num_tasks;
    long long task = atomic_load(&stage->next), end;
    while (task < num_tasks) {
        end = task + 1 + (num_tasks - task) / (4 * num_threads);
        end = end < num_tasks ? end : num_tasks;
        if (!atomic_compare_exchange_weak(&stage->next, &task, end)) continue;
        for (int64_t i = task; i < end; i++) stage->work(stage->job, i);
        atomic_fetch_add(&stage->done, end - task);
        task = atomic_load(&stage->next);
    }
}

/* A stage begins when all tasks of the one before are done, not when all threads are there: on a busy machine one may
   come late, and then finds nothing left to do. */
static inline void run_all(Stage *stages, int num_stages, int num_threads) {
    for (int i = 0; i < num_stages; i++) {
        run_some(&stages[i], num_threads);
        for (int waits = 0; i + 1 < num_stages && atomic_load(&stages[i].done) < stages[i].num_tasks; waits++)
            if (waits >= 1000) sched_yield();
    }
}

/* The threads are torch's own: others would wait for a core while these spin, as OpenMP's do between two operations. */
static inline void run_stages(Stage *stages, int num_stages, int num_threads) {
    int64_t most = 0;
    for (int i = 0; i < num_stages; i++) most = stages[i].num_tasks > most ? stages[i].num_tasks : most;
    if (num_threads > most) num_threads = (int)most;
#ifdef _OPENMP
    if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
        run_all(stages, num_stages, num_threads);
        return;
    }
#endif
    for (int i = 0; i < num_stages; i++)
        for (int64_t task = 0; task < stages[i].num_tasks; task++) stages[i].work(stages[i].job, task);
}

static inline void run(Work *work, void *job, int64_t num_tasks, int num_threads) {
    run_stages(&(Stage){work, job, num_tasks, 0, 0}, 1, num_threads);
}
