/* A layer's small operations: norms, rotary positions, the choice of experts; small.py compiles this file and says what
   it is for. A product and the sum behind it are rounded apart, as torch's are. */

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "common.h"

#include <math.h>

#define LANES 8
#define ALONE (1 << 16)    /* numbers: for fewer, waking threads takes longer */
#define NORM_ROWS 16       /* of a task */
#define MOST_HALF 256      /* pairs that are rotated: small.py knows this number */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* Norms. */

typedef struct {
    const void *x, *weight;
    void *output;
    int64_t num_rows, size, stride;
    float eps;
    int wide, weight_wide;
} Norm;

INLINE Floats read_eight(const void *data, int64_t i, int wide) {
    Floats values;
    Halves halves;
    if (wide) {
        memcpy(&values, (const float *)data + i, sizeof values);
        return values;
    }
    memcpy(&halves, (const uint16_t *)data + i, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

/* To bfloat16 and back. */
INLINE Floats rounded(Floats values) {
    Words bits = (Words)values, is_nan = (Words)(values != values);
    Words even = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    return (Floats)((even & ~is_nan) | (is_nan & 0x7fc00000));
}

INLINE void write_eight(void *data, int64_t i, int wide, Floats values) {
    if (wide) {
        memcpy((float *)data + i, &values, sizeof values);
    } else {
        Halves halves = __builtin_convertvector((Words)rounded(values) >> 16, Halves);
        memcpy((uint16_t *)data + i, &halves, sizeof halves);
    }
}

INLINE void norm_row(const Norm *job, int64_t row, int wide, int weight_wide) {
    const char *x = (const char *)job->x + row * job->stride * size_of(wide);
    int out_wide = wide || weight_wide;
    char *output = (char *)job->output + row * job->size * size_of(out_wide);
    int64_t whole = job->size / (4 * LANES) * (4 * LANES), i;
    Floats sums[4] = {{0}};
    for (i = 0; i < whole; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Floats values = read_eight(x, i + part * LANES, wide);
            sums[part] += values * values;
        }
    Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float squares = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    for (; i < job->size; i++) squares += read_one(x, i, wide) * read_one(x, i, wide);
    float scale = 1.0f / sqrtf(squares / (float)job->size + job->eps);
    for (i = 0; i + LANES <= job->size; i += LANES) {
        Floats values = read_eight(x, i, wide) * scale;
        values = (wide ? values : rounded(values)) * read_eight(job->weight, i, weight_wide);
        write_eight(output, i, out_wide, values);
    }
    for (; i < job->size; i++) {
        float value = read_one(x, i, wide) * scale;
        value = (wide ? value : from_bfloat16(to_bfloat16(value))) * read_one(job->weight, i, weight_wide);
        write_one(output, i, out_wide, value);
    }
}

static void norm_rows(void *of, int64_t task) {
    const Norm *job = of;
    for (int64_t row = task * NORM_ROWS; row < job->num_rows && row < (task + 1) * NORM_ROWS; row++)
        switch (job->wide * 2 + job->weight_wide) {
            case 0: norm_row(job, row, 0, 0); break;
            case 1: norm_row(job, row, 0, 1); break;
            case 2: norm_row(job, row, 1, 0); break;
            default: norm_row(job, row, 1, 1);
        }
}

/* output [rows, size] = x / sqrt(mean of squares + eps), in the dtype of x, times the weight; bfloat16 if both are. */
void small_rms_norm(
    const void *x, const void *weight, void *output, int64_t num_rows, int64_t size, int64_t stride, float eps,
    int wide, int weight_wide, int num_threads) {
    Norm job = {x, weight, output, num_rows, size, stride, eps, wide, weight_wide};
    run(norm_rows, &job, (num_rows + NORM_ROWS - 1) / NORM_ROWS, num_rows * size < ALONE ? 1 : num_threads);
}

/* Rotary positions. */

typedef struct {
    char *query, *key;
    const char *cos, *sin;
    int64_t num_queries, num_heads, half;
    int64_t query_batch, query_step, query_head, key_batch, key_step, table_batch; /* bytes from one to the next */
    int wide, interleaved;
} Rotation;

/* Halves of a row, or its even and its odd numbers. */
INLINE void split(const char *x, int64_t half, int wide, int interleaved, float *first, float *second) {
    int64_t i = 0;
    if (interleaved && !wide)
        for (; i + LANES <= half; i += LANES) { /* two bfloat16 are one 32-bit word */
            Words pairs;
            memcpy(&pairs, x + 4 * i, sizeof pairs);
            Words even = pairs << 16, odd = pairs & 0xffff0000;
            memcpy(first + i, &even, sizeof even);
            memcpy(second + i, &odd, sizeof odd);
        }
    for (; i < half; i++) {
        first[i] = read_one(x, interleaved ? 2 * i : i, wide);
        second[i] = read_one(x, interleaved ? 2 * i + 1 : half + i, wide);
    }
}

INLINE void rotate_row(char *x, const float *cos, const float *sin, int64_t half, int wide, int interleaved) {
    float first[MOST_HALF], second[MOST_HALF];
    split(x, half, wide, interleaved, first, second);
    /* The tables' second halves belong to the second half of a row; interleaved rows look at the first ones only. */
    const float *cos2 = cos + (interleaved ? 0 : half), *sin2 = sin + (interleaved ? 0 : half);
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        Floats a = read_eight(first, i, 1), b = read_eight(second, i, 1);
        Floats products[4] = {
            a * read_eight(cos, i, 1), b * read_eight(sin, i, 1), b * read_eight(cos2, i, 1), a * read_eight(sin2, i, 1)};
        for (int p = 0; p < 4 && !wide; p++) products[p] = rounded(products[p]);
        write_eight(x, i, wide, products[0] - products[1]);
        write_eight(x, half + i, wide, products[2] + products[3]);
    }
    for (; i < half; i++) {
        float products[4] = {first[i] * cos[i], second[i] * sin[i], second[i] * cos2[i], first[i] * sin2[i]};
        for (int p = 0; p < 4 && !wide; p++) products[p] = from_bfloat16(to_bfloat16(products[p]));
        write_one(x, i, wide, products[0] - products[1]);
        write_one(x, half + i, wide, products[2] + products[3]);
    }
}

INLINE void rotate_rows(const Rotation *job, int64_t batch, int64_t token, int wide, int interleaved) {
    float cos[2 * MOST_HALF], sin[2 * MOST_HALF];
    int64_t size = 2 * job->half, table = batch * job->table_batch + token * size * size_of(wide);
    for (int64_t i = 0; i < size; i++) {
        cos[i] = read_one(job->cos + table, i, wide);
        sin[i] = read_one(job->sin + table, i, wide);
    }
    char *query = job->query + batch * job->query_batch + token * job->query_step;
    for (int64_t head = 0; head < job->num_heads; head++)
        rotate_row(query + head * job->query_head, cos, sin, job->half, wide, interleaved);
    rotate_row(job->key + batch * job->key_batch + token * job->key_step, cos, sin, job->half, wide, interleaved);
}

static void rotate_token(void *of, int64_t task) {
    const Rotation *job = of;
    int64_t batch = task / job->num_queries, token = task % job->num_queries;
    switch (job->wide * 2 + job->interleaved) {
        case 0: rotate_rows(job, batch, token, 0, 0); break;
        case 1: rotate_rows(job, batch, token, 0, 1); break;
        case 2: rotate_rows(job, batch, token, 1, 0); break;
        default: rotate_rows(job, batch, token, 1, 1);
    }
}

/* In place, the heads of query [b, q, heads, size] and key [b, q, size], by tables [b or 1, q, size]; steps are from one
   number's place along a dimension to the next, 0 for a table that has no batch. */
void small_rotate(
    void *query, void *key, const void *cos, const void *sin, int64_t num_batch, int64_t num_queries,
    int64_t num_heads, int64_t size, int64_t query_batch, int64_t query_step, int64_t query_head, int64_t key_batch,
    int64_t key_step, int64_t table_batch, int wide, int interleaved, int num_threads) {
    int64_t bytes = size_of(wide);
    Rotation job = {
        query, key, cos, sin, num_queries, num_heads, size / 2, query_batch * bytes, query_step * bytes,
        query_head * bytes, key_batch * bytes, key_step * bytes, table_batch * bytes, wide, interleaved};
    int64_t num_tokens = num_batch * num_queries;
    run(rotate_token, &job, num_tokens, num_tokens * num_heads * size < ALONE ? 1 : num_threads);
}

/* The choice of experts. */

typedef struct {
    const float *logits, *bias;
    float *weights;
    int64_t *index, num_experts, top_k;
    int normalise;
    float factor;
} Choice;

/* NaN is the largest, as torch has it. */
static inline int is_larger(float a, float b) { return a > b || (a != a && b == b); }

static void choose(void *of, int64_t token) {
    const Choice *job = of;
    const float *logits = job->logits + token * job->num_experts;
    float *weights = job->weights + token * job->top_k, sum = 0;
    int64_t *index = job->index + token * job->top_k, num = 0;
    for (int64_t expert = 0; expert < job->num_experts; expert++) {
        float score = 1.0f / (1.0f + expf(-logits[expert])), key = score + job->bias[expert];
        if (num == job->top_k && !is_larger(key, weights[num - 1] + job->bias[index[num - 1]])) continue;
        int64_t at = num < job->top_k ? num++ : num - 1;
        for (; at > 0 && is_larger(key, weights[at - 1] + job->bias[index[at - 1]]); at--) {
            weights[at] = weights[at - 1];
            index[at] = index[at - 1];
        }
        weights[at] = score;
        index[at] = expert;
    }
    for (int64_t i = 0; i < num; i++) sum += weights[i];
    for (int64_t i = 0; i < num; i++)
        weights[i] = (job->normalise ? weights[i] / (sum + 1e-20f) : weights[i]) * job->factor;
}

/* weights and index [tokens, top_k] of the experts with the largest sigmoid(logits [tokens, experts]) + bias; weights are
   without the bias. There are at least top_k experts, and at least one. */
void small_route(
    const float *logits, const float *bias, float *weights, int64_t *index, int64_t num_tokens, int64_t num_experts,
    int64_t top_k, int normalise, float factor, int num_threads) {
    Choice job = {logits, bias, weights, index, num_experts, top_k, normalise, factor};
    run(choose, &job, num_tokens, num_tokens * num_experts < ALONE / 8 ? 1 : num_threads);
}
