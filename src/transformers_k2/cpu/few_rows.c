/* Products of a few rows with float32 or bfloat16 matrices, and gated layers; few_rows.py compiles this file and says
   what it is for.

   A sum of products is eight partial sums in float32: inputs i, i + 16, ... for one order of the inputs within sixteen.
   It depends on nothing but the number of inputs: the same bits for any number of threads, and whatever other rows are in
   the batch. Everything else is about reading each weight from memory once, and from the cache rarely. */

#include "common.h"

#include <math.h>
#include <stdlib.h>

#define LANES 8
#define CHUNK 16           /* inputs at a time; what is prepared is filled up with zeros to a multiple */
#define OUTPUTS 4          /* multiplied at a time with ROWS rows: 12 of 16 registers are sums */
#define ROWS 3
#define TILE 16            /* outputs of a task */
#define GROUP 16           /* rows that go through a tile together */
#define CACHED (1 << 14)   /* prepared inputs, of all rows of a group, that stay in the second-level cache */
#define SHORT (1 << 11)    /* bytes of an output */
#define ALONE (1 << 16)    /* products: for fewer, waking threads takes longer */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

typedef struct {
    const char *data; /* [out, in] */
    int64_t stride;   /* bytes from an output to the next */
    int wide;         /* float32 rather than bfloat16 */
} Matrix;

static inline int64_t padded(int64_t num) { return (num + CHUNK - 1) / CHUNK * CHUNK; }

/* Where input i goes among prepared ones. Two bfloat16 are one 32-bit word: a shift has one of them, a mask the other. */
static inline int64_t place(int64_t i, int wide) {
    int64_t in_chunk = i % CHUNK;
    return wide ? i : i - in_chunk + in_chunk % 2 * LANES + in_chunk / 2;
}

/* `wide` is that of the input, `for_wide` that of the matrix. */
static void prepare(const void *input, int64_t num_in, int wide, int for_wide, float *to) {
    memset(to + num_in / CHUNK * CHUNK, 0, (size_t)(padded(num_in) - num_in / CHUNK * CHUNK) * sizeof *to);
    if (wide && for_wide) {
        memcpy(to, input, (size_t)num_in * sizeof *to);
    } else if (wide || for_wide) {
        for (int64_t i = 0; i < num_in; i++) to[place(i, for_wide)] = read_one(input, i, wide);
    } else {
        int64_t whole = num_in / CHUNK * CHUNK;
        for (int64_t i = 0; i < whole; i += CHUNK) {
            Words pairs;
            memcpy(&pairs, (const uint16_t *)input + i, sizeof pairs);
            Words first = pairs << 16, second = pairs & 0xffff0000;
            memcpy(to + i, &first, sizeof first);
            memcpy(to + i + LANES, &second, sizeof second);
        }
        for (int64_t i = whole; i < num_in; i++) to[place(i, 0)] = read_one(input, i, 0);
    }
}

static inline __attribute__((always_inline)) Floats widened(const char *weight, int half, int wide) {
    Floats values;
    Words pairs;
    if (wide) {
        memcpy(&values, weight + half * (int)sizeof values, sizeof values);
        return values;
    }
    memcpy(&pairs, weight, sizeof pairs);
    return (Floats)(half ? pairs & 0xffff0000 : pairs << 16);
}

/* Where weights are that come from memory meanwhile. */
typedef struct {
    const char *start;
    int64_t chunk, output; /* bytes from one chunk, or output, to the next */
} Ahead;

/* sums[output][row] += a few chunks of the outputs' weights times those of the rows. */
static inline __attribute__((always_inline)) void accumulate(
    int num_outputs, int num_rows, int wide, int64_t num_chunks, const char *weight, int64_t stride,
    Ahead ahead, const float *const *rows, int64_t start, Floats (*sums)[GROUP]) {
    Floats sum[OUTPUTS][ROWS];
    const float *row[ROWS];
    for (int r = 0; r < num_rows; r++) row[r] = rows[r] + start;
#pragma GCC unroll 4
    for (int o = 0; o < num_outputs; o++)
#pragma GCC unroll 4
        for (int r = 0; r < num_rows; r++) sum[o][r] = sums[o][r];
    for (int64_t i = 0; i < num_chunks; i++) {
        const char *next = weight + i * CHUNK * size_of(wide);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Floats x[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < num_rows; r++) memcpy(&x[r], row[r] + i * CHUNK + half * LANES, sizeof x[r]);
#pragma GCC unroll 4
            for (int o = 0; o < num_outputs; o++) {
                if (half == 0) __builtin_prefetch(ahead.start + i * ahead.chunk + o * ahead.output);
                Floats w = widened(next + o * stride, half, wide);
#pragma GCC unroll 4
                for (int r = 0; r < num_rows; r++) sum[o][r] += w * x[r];
            }
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < num_outputs; o++)
#pragma GCC unroll 4
        for (int r = 0; r < num_rows; r++) sums[o][r] = sum[o][r];
}

/* The same with constant numbers, which keeps the sums in registers. */
static void accumulate_some(
    int num_outputs, int num_rows, int wide, int64_t num_chunks, const char *weight, int64_t stride,
    Ahead ahead, const float *const *rows, int64_t start, Floats (*sums)[GROUP]) {
#define CASE(o, r, w) \
    case ((o) * 4 + (r)) * 2 + (w): accumulate(o, r, w, num_chunks, weight, stride, ahead, rows, start, sums); break;
#define CASES(o, w) CASE(o, 1, w) CASE(o, 2, w) CASE(o, 3, w)
    switch ((num_outputs * 4 + num_rows) * 2 + wide) {
        CASES(1, 0) CASES(1, 1) CASES(OUTPUTS, 0) CASES(OUTPUTS, 1)
    }
#undef CASES
#undef CASE
}

static inline float total(Floats sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* results[output][row] for up to TILE outputs and GROUP prepared rows. `then` are the weights that will be read next. */
static void multiply(
    const Matrix *matrix, int64_t first, int num_outputs, int64_t num_in, const float *const *rows, int num_rows,
    const char *then, float (*results)[GROUP]) {
    Floats sums[TILE][GROUP];
    for (int o = 0; o < num_outputs; o++)
        for (int r = 0; r < num_rows; r++) sums[o][r] = (Floats){0};
    int64_t whole = num_in / CHUNK * CHUNK, size = size_of(matrix->wide);
    int64_t block = CACHED / num_rows / CHUNK * CHUNK;
    const char *tile = matrix->data + first * matrix->stride;
    for (int64_t start = 0; start < whole; start += block) {
        int64_t stop = start + block < whole ? start + block : whole;
        for (int o = 0; o < num_outputs;) {
            int step = num_outputs - o < OUTPUTS ? 1 : OUTPUTS;
            const char *weight = tile + o * matrix->stride + start * size;
            const char *next = o + step < num_outputs ? weight + step * matrix->stride
                               : stop < whole         ? tile + stop * size
                                                      : then;
            /* The CPU's own prefetching follows long outputs of float32, but no short ones, and needs help with bfloat16. */
            int64_t chunk = CHUNK * size, stride = matrix->stride;
            Ahead none = {weight, 0, 0}, ahead = matrix->wide ? none : (Ahead){next, chunk, stride};
            if (stride <= SHORT && stride == (stop - start) * size) ahead = (Ahead){next, step * chunk, chunk};
            for (int r = 0; r < num_rows;) {
                int left = num_rows - r, groups = (left + ROWS - 1) / ROWS, together = (left + groups - 1) / groups;
                accumulate_some(
                    step, together, matrix->wide, (stop - start) / CHUNK, weight, matrix->stride,
                    r ? none : ahead, rows + r, start, (Floats(*)[GROUP])&sums[o][r]);
                r += together;
            }
            o += step;
        }
    }
    if (num_in > whole) {
        for (int o = 0; o < num_outputs; o++) {
            char last[CHUNK * 4] = {0};
            memcpy(last, tile + o * matrix->stride + whole * size, (size_t)((num_in - whole) * size));
            for (int r = 0; r < num_rows; r++)
                accumulate_some(1, 1, matrix->wide, 1, last, 0, (Ahead){last, 0, 0}, rows + r, whole, (Floats(*)[GROUP])&sums[o][r]);
        }
    }
    for (int o = 0; o < num_outputs; o++)
        for (int r = 0; r < num_rows; r++) results[o][r] = total(sums[o][r]);
}

static inline int within(int64_t start, int64_t end, int most) {
    return end - start < most ? (int)(end - start) : most;
}

/* Linear layers. */

typedef struct {
    Matrix weight;
    const float *x; /* prepared */
    void *output;
    int64_t num_rows, num_in, num_out;
    int out_wide;
} Linear;

static void linear_tile(void *of, int64_t task) {
    const Linear *job = of;
    int64_t first = task * TILE;
    int num_outputs = within(first, job->num_out, TILE);
    for (int64_t row = 0; row < job->num_rows; row += GROUP) {
        int num_rows = within(row, job->num_rows, GROUP);
        const float *rows[GROUP];
        float results[TILE][GROUP];
        for (int r = 0; r < num_rows; r++) rows[r] = job->x + (row + r) * padded(job->num_in);
        multiply(
            &job->weight, first, num_outputs, job->num_in, rows, num_rows,
            job->weight.data + (first + TILE) * job->weight.stride, results);
        for (int r = 0; r < num_rows; r++)
            for (int o = 0; o < num_outputs; o++)
                write_one(job->output, (row + r) * job->num_out + first + o, job->out_wide, results[o][r]);
    }
}

/* output [rows, out] = x [rows, in] times the matrix; strides count elements. Returns -1 if there is no memory. */
int few_rows_linear(
    const void *x, const void *weight, void *output, int64_t num_rows, int64_t num_in, int64_t num_out,
    int64_t x_stride, int64_t weight_stride, int wide, int weight_wide, int out_wide, int num_threads) {
    float *scratch = aligned_alloc(64, (size_t)(num_rows * padded(num_in) * (int64_t)sizeof(float) + 64) / 64 * 64);
    if (!scratch) return -1;
    for (int64_t r = 0; r < num_rows; r++)
        prepare(
            (const char *)x + r * x_stride * size_of(wide), num_in, wide, weight_wide,
            scratch + r * padded(num_in));
    Linear job = {
        {weight, weight_stride * size_of(weight_wide), weight_wide}, scratch, output, num_rows, num_in, num_out,
        out_wide};
    run(linear_tile, &job, (num_out + TILE - 1) / TILE, num_rows * num_in * num_out < ALONE ? 1 : num_threads);
    free(scratch);
    return 0;
}

/* Gated layers: one, or experts. */

typedef struct {
    int64_t expert, start, end; /* its pairs */
} Slice;

typedef struct {
    int64_t token;
    float weight;
} Pair;

typedef struct {
    const char *gate, *up, *down; /* the first expert's */
    int64_t gate_stride, down_stride; /* bytes from an expert to the next */
    float *x, *hidden, *sum; /* [tokens, in], [pairs, middle], both prepared; [tokens, in] */
    Slice *slices;
    Pair *pairs;
    void *output;
    int64_t num_slices, num_tokens, num_in, num_middle;
    int wide, weight_wide;
} Gated;

static void gated_tile(void *of, int64_t task) {
    const Gated *job = of;
    int64_t num_tiles = (job->num_middle + TILE - 1) / TILE, first = task % num_tiles * TILE;
    int64_t stride = job->num_in * size_of(job->weight_wide);
    Slice slice = job->slices[task / num_tiles];
    int num_outputs = within(first, job->num_middle, TILE);
    Matrix gate = {job->gate + slice.expert * job->gate_stride, stride, job->weight_wide};
    Matrix up = {job->up + slice.expert * job->gate_stride, stride, job->weight_wide};
    for (int64_t pair = slice.start; pair < slice.end; pair += GROUP) {
        int num_rows = within(pair, slice.end, GROUP);
        const float *rows[GROUP];
        float of_gate[TILE][GROUP], of_up[TILE][GROUP];
        for (int r = 0; r < num_rows; r++) rows[r] = job->x + job->pairs[pair + r].token * padded(job->num_in);
        multiply(
            &gate, first, num_outputs, job->num_in, rows, num_rows, up.data + first * stride, of_gate);
        multiply(
            &up, first, num_outputs, job->num_in, rows, num_rows, gate.data + (first + TILE) * stride, of_up);
        for (int r = 0; r < num_rows; r++) {
            float *to = job->hidden + (pair + r) * padded(job->num_middle);
            for (int o = 0; o < num_outputs; o++)
                to[place(first + o, job->weight_wide)] = of_gate[o][r] / (1.0f + expf(-of_gate[o][r])) * of_up[o][r];
        }
    }
}

static void down_tile(void *of, int64_t task) {
    const Gated *job = of;
    int64_t first = task * TILE;
    int num_outputs = within(first, job->num_in, TILE);
    for (int64_t i = 0; i < job->num_slices; i++) {
        Slice slice = job->slices[i];
        const char *data = job->down + slice.expert * job->down_stride;
        Matrix down = {data, job->num_middle * size_of(job->weight_wide), job->weight_wide};
        const char *then = i + 1 < job->num_slices ? job->down + job->slices[i + 1].expert * job->down_stride : data;
        for (int64_t pair = slice.start; pair < slice.end; pair += GROUP) {
            int num_rows = within(pair, slice.end, GROUP);
            const float *rows[GROUP];
            float results[TILE][GROUP];
            for (int r = 0; r < num_rows; r++) rows[r] = job->hidden + (pair + r) * padded(job->num_middle);
            multiply(
                &down, first, num_outputs, job->num_middle, rows, num_rows, then + first * down.stride, results);
            for (int r = 0; r < num_rows; r++) {
                float *to = job->sum + job->pairs[pair + r].token * job->num_in + first;
                for (int o = 0; o < num_outputs; o++) to[o] += job->pairs[pair + r].weight * results[o][r];
            }
        }
    }
    for (int64_t token = 0; token < job->num_tokens; token++)
        for (int o = 0; o < num_outputs; o++) {
            int64_t at = token * job->num_in + first + o;
            write_one(job->output, at, job->wide, job->sum[at]);
        }
}

static void *take(char **from, int64_t num, size_t size) {
    void *start = *from;
    *from += ((size_t)num * size + 63) / 64 * 64;
    return start;
}

/* output [tokens, in] = sum over a token's experts of weight * down(silu(gate(x)) * up(x)), for matrices [experts, middle,
   in] and [experts, in, middle]; `gate_stride` and `down_stride` are from an expert to the next. Experts that are not
   below num_experts are none; without `index` all are 0, without `weights` 1. Returns -1 if there is no memory, -2 if an expert is negative. */
int few_rows_gated(
    const void *x, const int64_t *index, const void *weights, const void *gate, const void *up, const void *down,
    void *output, int64_t num_tokens, int64_t num_choices, int64_t num_experts, int64_t num_in, int64_t num_middle,
    int64_t x_stride, int64_t gate_stride, int64_t down_stride, int wide, int weight_wide, int weights_wide,
    int num_threads) {
    int64_t num_pairs = num_tokens * num_choices, size = size_of(weight_wide);
    for (int64_t i = 0; index && i < num_pairs; i++)
        if (index[i] < 0) return -2;
    size_t bytes = (size_t)(num_tokens * padded(num_in) + num_pairs * padded(num_middle) + num_tokens * num_in) *
                       sizeof(float) +
                   (size_t)num_pairs * (sizeof(Pair) + sizeof(Slice)) + (size_t)(num_experts + 1) * sizeof(int64_t) +
                   8 * 64;
    char *scratch = aligned_alloc(64, bytes / 64 * 64), *from = scratch;
    if (!scratch) return -1;
    Gated job = {
        .gate = gate, .up = up, .down = down, .gate_stride = gate_stride * size, .down_stride = down_stride * size,
        .output = output, .num_tokens = num_tokens, .num_in = num_in, .num_middle = num_middle, .wide = wide,
        .weight_wide = weight_wide};
    job.x = take(&from, num_tokens * padded(num_in), sizeof(float));
    job.hidden = take(&from, num_pairs * padded(num_middle), sizeof(float));
    job.sum = take(&from, num_tokens * num_in, sizeof(float));
    job.pairs = take(&from, num_pairs, sizeof(Pair));
    job.slices = take(&from, num_pairs, sizeof(Slice));
    int64_t *ends = take(&from, num_experts + 1, sizeof(int64_t));

    memset(ends, 0, (size_t)(num_experts + 1) * sizeof *ends);
    for (int64_t i = 0; i < num_pairs; i++) {
        int64_t expert = index ? index[i] : 0;
        if (expert < num_experts) ends[expert + 1]++;
    }
    for (int64_t expert = 0; expert < num_experts; expert++) {
        int64_t start = ends[expert], end = start + ends[expert + 1];
        ends[expert + 1] = end;
        if (end > start) job.slices[job.num_slices++] = (Slice){expert, start, end};
    }
    for (int64_t i = 0; i < num_pairs; i++) {
        int64_t expert = index ? index[i] : 0;
        if (expert < num_experts)
            job.pairs[ends[expert]++] = (Pair){i / num_choices, weights ? read_one(weights, i, weights_wide) : 1.0f};
    }
    for (int64_t token = 0; token < num_tokens; token++)
        prepare(
            (const char *)x + token * x_stride * size_of(wide), num_in, wide, weight_wide,
            job.x + token * padded(num_in));
    memset(job.sum, 0, (size_t)(num_tokens * num_in) * sizeof(float));
    for (int64_t pair = 0; pair < num_pairs; pair++)
        for (int64_t i = num_middle / CHUNK * CHUNK; i < padded(num_middle); i++)
            job.hidden[pair * padded(num_middle) + i] = 0;

    if (num_pairs * num_in * num_middle < ALONE) num_threads = 1;
    Stage stages[2] = {
        {gated_tile, &job, job.num_slices * ((num_middle + TILE - 1) / TILE), 0, 0},
        {down_tile, &job, (num_in + TILE - 1) / TILE, 0, 0}};
    run_stages(stages, 2, num_threads);
    free(scratch);
    return 0;
}
