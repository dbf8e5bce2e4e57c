/* Rows times INT4 matrices as the hub stores them; cpu_kernel.py compiles this file and says what it is for.

   A weight is a code from -8 to 7, stored as code + 8 in four bits, times the bfloat16 scale of its group. Activations
   become 16-bit integers with a power of two for each 32 inputs, so that the sum over 32 inputs is one of integers, and
   exact. The rest is float32, in an order that depends on nothing but the number of inputs: the same bits for any
   number of threads, and whatever else is in the batch. */

#include "../cpu/common.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(INT4_PORTABLE)
#include <immintrin.h>
#define INT4_AVX2
#endif

#define GROUP 32                 /* inputs that share a power of two; scales may be shared by several of these */
#define CHUNK (2 * GROUP)        /* inputs multiplied at a time: 32 bytes of weights */
#define LANES 8                  /* partial sums in float32: four for each group of a chunk */
#define MAX_ROWS 4               /* rows multiplied at a time: as many sums as registers hold beside the codes */
#define TILE 32                  /* outputs of a task */
#define CACHED 128               /* chunks that stay in the first-level cache, of all rows together: 20 KB */
#define PREPARED_ALONE (1 << 15) /* inputs: for fewer, waking threads takes longer */

/* 64 inputs of a row. Two bytes of weights are for inputs 4 i to 4 i + 3, so every fourth input is in the same plane. */
typedef struct {
    _Alignas(32) int16_t plane[4][CHUNK / 4];
    float unit[LANES]; /* what an integer 1 stands for */
} Chunk;

typedef struct {
    int64_t expert, start, end;
} Slice;

typedef struct {
    const uint8_t *packed;  /* [experts, out, in / 2] */
    const uint16_t *scale;  /* [experts, out, groups] */
    const void *input;      /* [rows, in] */
    void *output;           /* [rows, out] */
    Chunk *chunks;          /* [rows, parts, num_chunks] */
    Slice *slices;
    int64_t num_in, num_out, num_groups, num_chunks, num_tiles;
    int wide, parts; /* float32 rather than bfloat16: two integers to an activation */
} Job;

/* 32 inputs as integers of at most 2^14, so that sums of weights times them are exact in float32. The second
   integer, for float32, is what the first leaves, in 2^-15 of its unit. Inputs far below the smallest normal number
   become zero. */
static void prepare_group(const float value[GROUP], int half, int parts, Chunk *chunk, int64_t next_part) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    uint32_t largest = 0;
    for (int i = 0; i < GROUP; i++) {
        uint32_t bits = to_bits(value[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    uint32_t exponent = largest >> 23;
    int finite = exponent < 255;
    exponent = exponent < 14 ? 14 : exponent;
    float unit = finite ? from_bits((exponent - 13) << 23) : from_bits(0x7fc00000); /* the products are NaN as well */
    float inverse = finite ? from_bits((267 - exponent) << 23) : 0.0f;
    float rest[GROUP];
    for (int i = 0; i < GROUP; i++) rest[i] = finite ? value[i] * inverse : 0.0f;
    for (int part = 0; part < parts; part++) {
        int16_t code[GROUP];
        for (int i = 0; i < GROUP; i++) {
            float rounded = rest[i] + magic;
            code[i] = (int16_t)(int32_t)(to_bits(rounded) - to_bits(magic));
            rest[i] = (rest[i] - (rounded - magic)) * 32768.0f;
        }
        Chunk *to = chunk + part * next_part;
        for (int i = 0; i < GROUP; i++) to->plane[i % 4][half * GROUP / 4 + i / 4] = code[i];
        for (int lane = 0; lane < LANES / 2; lane++) to->unit[half * LANES / 2 + lane] = unit;
        unit *= 1.0f / 32768.0f;
    }
}

static void prepare_row(void *of, int64_t row) {
    const Job *job = of;
    Chunk *chunks = job->chunks + row * job->parts * job->num_chunks;
    if (job->num_in % CHUNK)
        for (int part = 1; part <= job->parts; part++)
            memset(&chunks[part * job->num_chunks - 1], 0, sizeof(Chunk));
    for (int64_t start = 0; start < job->num_in; start += GROUP) {
        float value[GROUP];
        int64_t first = row * job->num_in + start;
        if (job->wide) {
            memcpy(value, (const float *)job->input + first, sizeof value);
        } else {
            const uint16_t *from = (const uint16_t *)job->input + first;
            for (int i = 0; i < GROUP; i++) value[i] = from_bits((uint32_t)from[i] << 16);
        }
        prepare_group(value, start / GROUP % 2, job->parts, chunks + start / CHUNK, job->num_chunks);
    }
}

/* sums[row] += a few chunks of one output's weights times those of each row. `ahead` bytes from there are the weights
   that follow, of the next output: they come from memory meanwhile. */
#ifdef INT4_AVX2
static inline __attribute__((always_inline)) void accumulate(
    int num_rows, int64_t num_chunks, const uint8_t *bytes, const uint16_t *scale, const Chunk *chunks,
    int64_t stride, int64_t ahead, float (*sums)[LANES]) {
    /* Both bytes of a group's scale, as the upper half of a float32, in the four lanes of the group. */
    const __m256i spread = _mm256_setr_epi8(
        -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1,
        -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3);
    __m256 sum[MAX_ROWS];
#pragma GCC unroll 4
    for (int row = 0; row < num_rows; row++) sum[row] = _mm256_loadu_ps(sums[row]);
    for (int64_t i = 0; i < num_chunks; i++) {
        /* code + 8 with its highest bit flipped is the code in two's complement: shifts extend the sign. */
        __m256i raw = _mm256_loadu_si256((const __m256i *)(bytes + 32 * i));
        __builtin_prefetch(bytes + 32 * i + ahead);
        __m256i four = _mm256_xor_si256(raw, _mm256_set1_epi16((short)0x8888));
        __m256i code0 = _mm256_srai_epi16(_mm256_slli_epi16(four, 12), 12);
        __m256i code1 = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 12);
        __m256i code2 = _mm256_srai_epi16(_mm256_slli_epi16(four, 4), 12);
        __m256i code3 = _mm256_srai_epi16(four, 12);
        int32_t pair;
        memcpy(&pair, scale + 2 * i, sizeof pair);
        __m256 scales = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(pair), spread));
#pragma GCC unroll 4
        for (int row = 0; row < num_rows; row++) {
            const Chunk *chunk = chunks + row * stride + i;
            const __m256i *plane = (const __m256i *)chunk->plane;
            __m256i low = _mm256_add_epi32(_mm256_madd_epi16(code0, plane[0]), _mm256_madd_epi16(code1, plane[1]));
            __m256i high = _mm256_add_epi32(_mm256_madd_epi16(code2, plane[2]), _mm256_madd_epi16(code3, plane[3]));
            __m256 dot = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), _mm256_load_ps(chunk->unit));
            sum[row] = _mm256_fmadd_ps(dot, scales, sum[row]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < num_rows; row++) _mm256_storeu_ps(sums[row], sum[row]);
}
#else
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

static inline __attribute__((always_inline)) void accumulate(
    int num_rows, int64_t num_chunks, const uint8_t *bytes, const uint16_t *scale, const Chunk *chunks,
    int64_t stride, int64_t ahead, float (*sums)[LANES]) {
    Floats sum[MAX_ROWS];
    memcpy(sum, sums, (size_t)num_rows * sizeof *sum);
    for (int64_t i = 0; i < num_chunks; i++) {
        __builtin_prefetch(bytes + 32 * i + ahead);
        /* A lane has the weights of two integers in each plane. */
        Words eight;
        Ints code[8];
        memcpy(&eight, bytes + 32 * i, sizeof eight);
        eight ^= 0x88888888;
        for (int place = 0; place < 8; place++) code[place] = (Ints)(eight << (28 - 4 * place)) >> 28;
        float one = from_bits((uint32_t)scale[2 * i] << 16), two = from_bits((uint32_t)scale[2 * i + 1] << 16);
        Floats scales = {one, one, one, one, two, two, two, two};
        for (int row = 0; row < num_rows; row++) {
            const Chunk *chunk = chunks + row * stride + i;
            Ints dot = {0};
            Floats unit;
            memcpy(&unit, chunk->unit, sizeof unit);
            for (int place = 0; place < 4; place++) {
                Words pair;
                memcpy(&pair, chunk->plane[place], sizeof pair);
                dot += code[place] * ((Ints)(pair << 16) >> 16) + code[place + 4] * ((Ints)pair >> 16);
            }
            sum[row] += __builtin_convertvector(dot, Floats) * unit * scales;
        }
    }
    memcpy(sums, sum, (size_t)num_rows * sizeof *sum);
}
#endif

/* The same with constant numbers of rows, which keeps the sums in registers. */
static void accumulate_rows(
    int num_rows, int64_t num_chunks, const uint8_t *bytes, const uint16_t *scale, const Chunk *chunks,
    int64_t stride, int64_t ahead, float (*sums)[LANES]) {
    switch (num_rows) {
        case 1: accumulate(1, num_chunks, bytes, scale, chunks, stride, ahead, sums); break;
        case 2: accumulate(2, num_chunks, bytes, scale, chunks, stride, ahead, sums); break;
        case 3: accumulate(3, num_chunks, bytes, scale, chunks, stride, ahead, sums); break;
        default: accumulate(4, num_chunks, bytes, scale, chunks, stride, ahead, sums);
    }
}

/* A chunk range of one output: scales of larger groups are repeated first, and a last half chunk is filled up. */
static void accumulate_output(
    const Job *job, int num_rows, int64_t output, int64_t start, int64_t end, const Chunk *chunks,
    float (*sums)[LANES]) {
    const uint8_t *bytes = job->packed + output * (job->num_in / 2);
    const uint16_t *scale = job->scale + output * job->num_groups;
    int64_t repeat = job->num_in / job->num_groups / GROUP, whole = job->num_in / CHUNK;
    uint16_t repeated[2 * CACHED];
    if (repeat > 1) {
        for (int64_t i = 2 * start; i < 2 * end; i++)
            repeated[i - 2 * start] = i < job->num_in / GROUP ? scale[i / repeat] : 0;
        scale = repeated;
    } else {
        scale += 2 * start;
    }
    int64_t stop = end < whole ? end : whole;
    accumulate_rows(
        num_rows, stop - start, bytes + 32 * start, scale, chunks + start, job->num_chunks, job->num_in / 2,
        sums);
    if (end > whole) {
        uint8_t last[32] = {0};
        uint16_t scales[2] = {scale[2 * (whole - start)], 0};
        memcpy(last, bytes + 32 * whole, 16);
        accumulate_rows(num_rows, 1, last, scales, chunks + whole, job->num_chunks, 0, sums);
    }
}

static inline float total(const float lanes[LANES]) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* A few outputs of all rows of one expert. Few rows at a time, and of these as many inputs as the cache holds. */
static void multiply_tile(void *of, int64_t task) {
    const Job *job = of;
    Slice slice = job->slices[task / job->num_tiles];
    int64_t first = task % job->num_tiles * TILE, last = first + TILE < job->num_out ? first + TILE : job->num_out;
    int64_t row = slice.start * job->parts, end = slice.end * job->parts;
    while (row < end) {
        int num_rows = end - row < MAX_ROWS ? (int)(end - row) : MAX_ROWS;
        const Chunk *chunks = job->chunks + row * job->num_chunks;
        float sums[TILE][MAX_ROWS][LANES];
        memset(sums, 0, sizeof sums);
        int64_t step = CACHED / num_rows;
        for (int64_t start = 0; start < job->num_chunks; start += step) {
            int64_t stop = start + step < job->num_chunks ? start + step : job->num_chunks;
            for (int64_t i = first; i < last; i++)
                accumulate_output(
                    job, num_rows, slice.expert * job->num_out + i, start, stop, chunks, sums[i - first]);
        }
        for (int part = 0; part < num_rows; part += job->parts) {
            int64_t place = (row + part) / job->parts * job->num_out;
            for (int64_t i = first; i < last; i++) {
                float value = total(sums[i - first][part]);
                if (job->wide)
                    ((float *)job->output)[place + i] = value + total(sums[i - first][part + 1]);
                else
                    ((uint16_t *)job->output)[place + i] = to_bfloat16(value);
            }
        }
        row += num_rows;
    }
}

/* Bytes of `scratch` that a call needs; it is aligned to 32. */
int64_t int4_scratch(int64_t num_rows, int64_t num_in, int64_t num_experts, int wide) {
    int64_t num_chunks = (num_in + CHUNK - 1) / CHUNK;
    return num_rows * (wide ? 2 : 1) * num_chunks * (int64_t)sizeof(Chunk) + num_experts * (int64_t)sizeof(Slice);
}

/* output[row] = matrix of its expert times input[row], for rows sorted by expert: expert e has those from ends[e - 1] to
   ends[e]. Returns -1, and does nothing, if these are no such numbers. */
int int4_grouped(
    const void *input, const int64_t *ends, const void *packed, const void *scale, void *output, void *scratch,
    int64_t num_rows, int64_t num_experts, int64_t num_in, int64_t num_out, int64_t num_groups, int wide,
    int num_threads) {
    Job job = {
        .packed = packed, .scale = scale, .input = input, .output = output, .chunks = scratch, .wide = wide,
        .parts = wide ? 2 : 1, .num_in = num_in, .num_out = num_out, .num_groups = num_groups,
        .num_chunks = (num_in + CHUNK - 1) / CHUNK, .num_tiles = (num_out + TILE - 1) / TILE};
    job.slices = (Slice *)(job.chunks + num_rows * job.parts * job.num_chunks);
    int64_t start = 0, num_slices = 0;
    for (int64_t expert = 0; expert < num_experts; start = ends[expert++]) {
        if (ends[expert] < start || ends[expert] > num_rows) return -1;
        if (ends[expert] > start) job.slices[num_slices++] = (Slice){expert, start, ends[expert]};
    }
    run(prepare_row, &job, start, start * num_in < PREPARED_ALONE ? 1 : num_threads);
    run(multiply_tile, &job, num_slices * job.num_tiles, num_threads);
    return 0;
}
