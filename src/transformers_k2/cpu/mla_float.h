/* The products of mla.c in float32, and what goes with them: vectors, conversion from bfloat16, exponentials.

   bfloat16 numbers become float32 in registers, PAIR at a time: those at even places, then those at odd ones. Rows of
   float32 are kept in that order ("paired"), which costs nothing: only products of two such rows are ever taken. */

#pragma once

#include <math.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

/* BLOCK: tokens of `combine` at most: for 64 rows, all this stays in the second-level cache. DOT_ROWS: rows of `dots`
   whose sums stay in registers. COMBINE_ROWS: rows of `combine`, with a pair of each; so few as COMBINE_FEW with two.
   CACHE: what is fetched ahead goes to the first level (3), or to the second (2), where more can be under way. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDEST 1 /* 32 registers of 64 bytes */
#define LANES 16
#define BLOCK 64
#define DOT_ROWS 8
#define COMBINE_ROWS 8
#define COMBINE_FEW 6
#define CACHE 2
#else
#define WIDEST 0
#define LANES 8
#define BLOCK 48
#define DOT_ROWS 4
#define COMBINE_ROWS 6
#define COMBINE_FEW 3
#define CACHE 3
#endif
#define PAIR (2 * LANES) /* numbers converted at a time */
#define ROWS 64          /* rows at most */
#define DOT_TOKENS 3

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

/* Rows of `size` numbers, `step` bytes apart. Those `ahead` bytes behind come from memory meanwhile: as a whole, or if
   they are `shared`, the first halves of their numbers by `dots` and the second ones by `combine`. */
typedef struct {
    const char *data;
    int64_t step, size, ahead;
    int shared;
} Source;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t size) { return (size + PAIR - 1) / PAIR * PAIR; }

/* Where number i of a row is in the paired order. */
static inline int64_t place(int wide, int64_t i) {
    return wide ? i : i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2;
}

/* Compilers that see the inner loops' registers all in use load factors again for each product, or spill sums. Spelled
   out, a product takes its factors from registers and adds to its own. */
#if defined(__AVX2__) && defined(__FMA__)
#if WIDEST
#define REGISTER "v"
#else
#define REGISTER "x"
#endif
#define IN_REGISTER(vector) __asm__("" : "+" REGISTER(vector))
#define ADD_PRODUCT(sum, a, b)                                                                                 \
    __asm__ volatile("vfmadd231ps %2, %1, %0" : "+" REGISTER(sum) : REGISTER(a), REGISTER(b))
#else
#define IN_REGISTER(vector)
#define ADD_PRODUCT(sum, a, b) ((sum) += (a) * (b))
#endif

/* Inlined, or specialised for a caller, such a function gets fewer registers. */
#define APART __attribute__((noinline, noclone))

/* Half of a pair: the first or the last numbers of float32, those at even or at odd places of bfloat16. */
static inline __attribute__((always_inline)) Floats half(int wide, const char *from, int which) {
    Words raw;
    if (wide) {
        memcpy(&raw, from + which * sizeof raw, sizeof raw);
        return (Floats)raw;
    }
    memcpy(&raw, from, sizeof raw);
    if (which && WIDEST) return (Floats)(raw & 0xffff0000);
    if (which) {
        raw >>= 16;
        IN_REGISTER(raw); /* else it becomes a mask, for which there is no register */
    }
    return (Floats)(raw << 16);
}

static inline Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline Floats all_of(float value) { return value - (Floats){0}; }

static inline void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }

/* e^x for x <= 0, within 1 ulp; 0 below the logarithm of the smallest normal number; NaN of NaN. */
static inline Floats exponential(Floats x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    Ints normal = ~(x < -87.3f);
    Floats shifted = x * 1.44269504f + magic, whole = shifted - magic;
    Floats r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f; /* ln 2 in two parts: the first product is exact */
    Floats series = 1.0f / 5040 * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = (series * r * r + r) + 1.0f;
    Floats power = (Floats)(((Words)shifted + (127 - 0x4b400000u)) << 23);
    return (Floats)((Ints)(series * power) & normal);
}

static inline float exponential_of_one(float x) {
    return exponential(all_of(x))[0];
}

typedef float Eight __attribute__((vector_size(32)));

static inline Eight folded(Floats value) {
#if WIDEST
    Eight halves[2];
    memcpy(halves, &value, sizeof halves);
    return halves[0] + halves[1];
#else
    return value;
#endif
}

/* The sums of the lanes of three vectors, and a fourth number. */
static inline void totals(Floats a, Floats b, Floats c, float to[4]) {
    const Eight all[4] = {folded(a), folded(b), folded(c), {0}};
#ifdef __AVX2__
    __m256 pairs = _mm256_hadd_ps(
        _mm256_hadd_ps((__m256)all[0], (__m256)all[1]), _mm256_hadd_ps((__m256)all[2], (__m256)all[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; i++)
        to[i] = ((all[i][0] + all[i][1]) + (all[i][2] + all[i][3])) +
                ((all[i][4] + all[i][5]) + (all[i][6] + all[i][7]));
#endif
}

/* sum[row][token] += a pair of each row times those of each token. */
static inline __attribute__((always_inline)) void multiply(
    int wide, int num_rows, int num_tokens, const float *rows, int64_t row_step, const char *tokens, int64_t token_step,
    Floats (*sum)[DOT_TOKENS]) {
#pragma GCC unroll 2
    for (int which = 0; which < 2; which++) {
        Floats value[DOT_TOKENS];
#pragma GCC unroll 4
        for (int token = 0; token < num_tokens; token++) value[token] = half(wide, tokens + token * token_step, which);
#pragma GCC unroll 8
        for (int row = 0; row < num_rows; row++) {
            Floats query = load(rows + row * row_step + which * LANES);
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++) ADD_PRODUCT(sum[row][token], query, value[token]);
        }
    }
}

/* The scalar products of few rows with few tokens, each in one or two parts; what lies behind them in `to` is lost. */
static inline __attribute__((always_inline)) void dots_tile(
    int wide, int num_rows, int num_tokens, const float *rows, int64_t row_step, const Source *parts, int num_parts,
    int64_t first, float *to, int64_t to_step) {
    const int64_t item = wide ? 4 : 2;
    Floats sum[DOT_ROWS][DOT_TOKENS] = {0};
    for (int part = 0; part < num_parts; part++) {
        int64_t size = parts[part].size, step = parts[part].step, ahead = parts[part].ahead, whole = size / PAIR * PAIR;
        const char *tokens = parts[part].data + first * step;
        const int shared = parts[part].shared;
        for (int64_t i = 0; i < whole; i += PAIR) {
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++)
                __builtin_prefetch(tokens + token * step + ahead + (i * item >> shared), 0, CACHE);
            multiply(wide, num_rows, num_tokens, rows + i, row_step, tokens + i * item, step, sum);
        }
        if (whole < size) {
            char last[DOT_TOKENS][4 * PAIR] = {0};
            for (int token = 0; token < num_tokens; token++)
                memcpy(last[token], tokens + token * step + whole * item, (size_t)((size - whole) * item));
            multiply(wide, num_rows, num_tokens, rows + whole, row_step, last[0], sizeof last[0], sum);
        }
        rows += padded(size);
    }
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++) totals(sum[row][0], sum[row][1], sum[row][2], to + row * to_step);
}

/* to[row][token]: the scalar products of all rows with all tokens. Room for three more numbers in a row of `to`. */
static inline __attribute__((always_inline)) void dots_of(
    int wide, const float *rows, int64_t num_rows, int64_t row_step, const Source *parts, int num_parts,
    int64_t num_tokens, float *to, int64_t to_step) {
    for (int64_t row = 0; row < num_rows;) {
        int count = num_rows - row >= DOT_ROWS ? DOT_ROWS : (int)least(num_rows - row, 4);
        for (int64_t token = 0; token < num_tokens; token += DOT_TOKENS) {
            const float *from = rows + row * row_step;
            float *target = to + row * to_step + token;
            int num = (int)least(num_tokens - token, DOT_TOKENS);
#define TILE(r, t) dots_tile(wide, r, t, from, row_step, parts, num_parts, token, target, to_step)
#define TILES(r) (num == 3 ? TILE(r, 3) : num == 2 ? TILE(r, 2) : TILE(r, 1))
            switch (count) {
                case 1: TILES(1); break;
                case 2: TILES(2); break;
                case 3: TILES(3); break;
#if DOT_ROWS > 4
                case 4: TILES(4); break;
#endif
                default: TILES(DOT_ROWS);
            }
#undef TILES
#undef TILE
        }
        row += count;
    }
}

static APART void dots(
    int wide, const float *rows, int64_t num_rows, int64_t row_step, const Source *parts, int num_parts,
    int64_t num_tokens, float *to, int64_t to_step) {
    if (wide)
        dots_of(1, rows, num_rows, row_step, parts, num_parts, num_tokens, to, to_step);
    else
        dots_of(0, rows, num_rows, row_step, parts, num_parts, num_tokens, to, to_step);
}

/* to[row] = to[row] * keep[row] + the sum over tokens of weights[row][token] * token, for one or two pairs of each. */
static inline __attribute__((always_inline)) void combine_tile(
    int wide, int num_rows, int num_pairs, const float *weights, int64_t weight_step, const float *keep,
    const Source *source, const char *tokens, int64_t num_tokens, float *to, int64_t to_step) {
    const int64_t item = wide ? 4 : 2, step = source->step, ahead = source->ahead;
    Floats sum[COMBINE_ROWS][4];
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * num_pairs; i++) sum[row][i] = load(to + row * to_step + i * LANES) * keep[row];
    for (int64_t token = 0; token < num_tokens; token++, tokens += step) {
        __builtin_prefetch(tokens + ahead, 0, CACHE);
#pragma GCC unroll 2
        for (int pair = 0; pair < num_pairs; pair++) {
            const char *from = tokens + pair * PAIR * item;
            Floats first = half(wide, from, 0), second = half(wide, from, 1);
#pragma GCC unroll 8
            for (int row = 0; row < num_rows; row++) {
                Floats weight = all_of(weights[row * weight_step + token]);
                ADD_PRODUCT(sum[row][2 * pair], first, weight);
                ADD_PRODUCT(sum[row][2 * pair + 1], second, weight);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * num_pairs; i++) store(to + row * to_step + i * LANES, sum[row][i]);
}

/* The same for all numbers of up to BLOCK tokens and for all rows, in tiles of nearly equal numbers of rows. */
static inline __attribute__((always_inline)) void combine_of(
    int wide, const float *weights, int64_t weight_step, const float *keep, const Source *tokens, int64_t num_tokens,
    float *to, int64_t num_rows, int64_t to_step) {
    const int64_t item = wide ? 4 : 2, num_tiles = (num_rows + COMBINE_ROWS - 1) / COMBINE_ROWS;
    char last[BLOCK][4 * PAIR];
    for (int64_t i = 0, width; i < tokens->size; i += width) {
        const int is_double = num_rows <= COMBINE_FEW && tokens->size - i >= 2 * PAIR;
        Source source = *tokens;
        const char *from = tokens->data + i * item;
        if (tokens->shared) source.ahead += (tokens->size - i) * item / 2;
        width = is_double ? 2 * PAIR : PAIR;
        if (tokens->size - i < PAIR) {
            memset(last, 0, sizeof last);
            for (int64_t token = 0; token < num_tokens; token++)
                memcpy(last[token], from + token * tokens->step, (size_t)((tokens->size - i) * item));
            from = last[0];
            source = (Source){.step = sizeof last[0]};
        }
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            int64_t row = tile * num_rows / num_tiles, count = (tile + 1) * num_rows / num_tiles - row;
#define TILE(rows, pairs)                                                                                      \
    combine_tile(                                                                                              \
        wide, rows, pairs, weights + row * weight_step, weight_step, keep + row, &source, from, num_tokens,    \
        to + row * to_step + i, to_step)
#define TILES(rows)                                                                                            \
    if (rows <= COMBINE_FEW && is_double) TILE(rows, 2);                                                       \
    else TILE(rows, 1)
            switch (count) {
                case 1: TILES(1); break;
                case 2: TILES(2); break;
                case 3: TILES(3); break;
                case 4: TILES(4); break;
                case 5: TILES(5); break;
#if COMBINE_ROWS > 6
                case 6: TILES(6); break;
                case 7: TILES(7); break;
#endif
                default: TILES(COMBINE_ROWS);
            }
#undef TILES
#undef TILE
        }
    }
}

static APART void combine(
    int wide, const float *weights, int64_t weight_step, const float *keep, const Source *tokens, int64_t num_tokens,
    float *to, int64_t num_rows, int64_t to_step) {
    if (wide)
        combine_of(1, weights, weight_step, keep, tokens, num_tokens, to, num_rows, to_step);
    else
        combine_of(0, weights, weight_step, keep, tokens, num_tokens, to, num_rows, to_step);
}
