/* The products of mla.c for latents in 8 bits, in integers: twice as many at a time, and no conversion.

   A value is a code times the float32 scale of its token and GROUP neighbours. A query's row becomes 16-bit integers,
   with one unit for the latent part and one for the rotary part: its products with a token's group add up exactly.
   A block's weights become 16-bit integers relative to the row's largest there, the scales relative to the block's
   largest in the group; their products, again in 16 bits, multiply the codes. So what is lost is about 2^-16 of the
   largest of these, far below what the codes have lost. */

#pragma once

#include "mla_float.h"

#define GROUP 64
#define CODE_TOKENS 2 /* for `code_dots`: with DOT_ROWS, as many sums as registers hold beside the factors */
#define LARGEST 32767.0f

/* A block of tokens: codes and scales of the latents or the rotary parts. */
typedef struct {
    const int8_t *codes;
    const float *scales;
    int64_t code_step, scale_step, size;
} Codes;

typedef int8_t Bytes __attribute__((vector_size(PAIR)));
typedef int16_t Shorts __attribute__((vector_size(2 * PAIR)));

static inline int64_t num_groups(int64_t size) { return (size + GROUP - 1) / GROUP; }

static inline Shorts widen(const int8_t *from) {
#if WIDEST
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Shorts);
#endif
}

static inline Shorts load_shorts(const int16_t *from) {
    Shorts value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* sum += the sums of two neighbours' products. */
#if WIDEST && defined(__AVX512VNNI__)
#define ADD_PAIRS(sum, a, b) __asm__ volatile("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#elif defined(__AVX2__)
#define ADD_PAIRS(sum, a, b)                                                                                   \
    do {                                                                                                       \
        Ints pairs_;                                                                                           \
        __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"                                            \
                         : "+" REGISTER(sum), "=&" REGISTER(pairs_)                                            \
                         : REGISTER(a), REGISTER(b));                                                          \
    } while (0)
#else
#define ADD_PAIRS(sum, a, b)                                                                                   \
    ((sum) += ((Ints)((Words)(a) << 16) >> 16) * ((Ints)((Words)(b) << 16) >> 16) +                            \
              ((Ints)(a) >> 16) * ((Ints)(b) >> 16))
#endif

/* (a * b) / 2^15, rounded. */
static inline Shorts multiply_high(Shorts a, Shorts b) {
#if WIDEST
    return (Shorts)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Shorts)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
    Shorts result;
    for (int i = 0; i < PAIR; i++) result[i] = (int16_t)((a[i] * b[i] + (1 << 14)) >> 15);
    return result;
#endif
}

/* PAIR columns of two tokens: the pairs of the first half, then of the others. */
static inline void interleave(const int8_t *a, const int8_t *b, Shorts to[2]) {
#if WIDEST
    for (int i = 0; i < 2; i++, a += LANES, b += LANES) {
        __m128i first = _mm_loadu_si128((const __m128i *)a), second = _mm_loadu_si128((const __m128i *)b);
        __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
        to[i] = (Shorts)_mm512_cvtepi8_epi16(pairs);
    }
#elif defined(__AVX2__)
    __m128i first = _mm_loadu_si128((const __m128i *)a), second = _mm_loadu_si128((const __m128i *)b);
    to[0] = (Shorts)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
    to[1] = (Shorts)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second));
#else
    for (int i = 0; i < PAIR; i++) {
        to[i / LANES][i % LANES * 2] = a[i];
        to[i / LANES][i % LANES * 2 + 1] = b[i];
    }
#endif
}

/* Numbers that are at most `largest` in magnitude as integers from -LARGEST to LARGEST. Returns what 1 stands for: NaN
   if `largest` is not finite. */
static inline float quantize(const float *from, int64_t num, float largest, int16_t *to) {
    int usable = largest <= 3.4e38f && largest >= 1e-33f;
    float inverse = usable ? LARGEST / largest : 0.0f;
    for (int64_t i = 0; i < num; i++) {
        float magic = 12582912.0f, scaled = usable ? from[i] * inverse : 0.0f; /* rounds as in `exponential` */
        to[i] = (int16_t)(int32_t)(to_bits(scaled + magic) - to_bits(magic));
    }
    return usable ? largest / LARGEST : largest * 0.0f;
}

/* The largest magnitude, or NaN if there is one. */
static inline float magnitude(const float *from, int64_t num) {
    uint32_t largest = 0; /* as bits: NaN is above all */
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits = to_bits(from[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return from_bits(largest);
}

/* sum[row][token] += a pair of each row times the codes of each token. */
static inline __attribute__((always_inline)) void code_multiply(
    int num_rows, int num_tokens, const int16_t *rows, int64_t row_step, const int8_t *codes, int64_t step,
    Ints (*sum)[CODE_TOKENS]) {
    Shorts value[CODE_TOKENS];
#pragma GCC unroll 4
    for (int token = 0; token < num_tokens; token++) value[token] = widen(codes + token * step);
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++) {
        Shorts query = load_shorts(rows + row * row_step);
#pragma GCC unroll 4
        for (int token = 0; token < num_tokens; token++) ADD_PAIRS(sum[row][token], query, value[token]);
    }
}

/* Scalar products of few rows with few tokens, as `dots_tile`. Rows are integers, with a unit for each part. */
static inline __attribute__((always_inline)) void code_dots_tile(
    int num_rows, int num_tokens, const int16_t *rows, int64_t row_step, const float *units, const Codes *parts,
    int64_t first, float *to, int64_t to_step) {
    Floats total[DOT_ROWS][CODE_TOKENS] = {0};
    for (int part = 0; part < 2; part++) {
        int64_t size = parts[part].size, step = parts[part].code_step, scale_step = parts[part].scale_step;
        const int8_t *codes = parts[part].codes + first * step;
        const float *scales = parts[part].scales + first * scale_step;
        Floats sum[DOT_ROWS][CODE_TOKENS] = {0};
        for (int64_t start = 0; start < size; start += GROUP, scales++) {
            Ints exact[DOT_ROWS][CODE_TOKENS] = {0};
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++) /* the next block comes from memory meanwhile */
                __builtin_prefetch(codes + (token + BLOCK) * step + start, 0, CACHE);
            if (size - start >= GROUP) {
#pragma GCC unroll 4
                for (int64_t i = 0; i < GROUP; i += PAIR)
                    code_multiply(num_rows, num_tokens, rows + start + i, row_step, codes + start + i, step, exact);
            } else {
                int8_t last[CODE_TOKENS][GROUP] = {0};
                for (int token = 0; token < num_tokens; token++)
                    memcpy(last[token], codes + token * step + start, (size_t)(size - start));
                for (int64_t i = 0; i < size - start; i += PAIR)
                    code_multiply(num_rows, num_tokens, rows + start + i, row_step, last[0] + i, GROUP, exact);
            }
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++)
#pragma GCC unroll 8
                for (int row = 0; row < num_rows; row++)
                    sum[row][token] += __builtin_convertvector(exact[row][token], Floats) * scales[token * scale_step];
        }
#pragma GCC unroll 8
        for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++)
                total[row][token] += sum[row][token] * units[2 * row + part];
        rows += padded(size);
    }
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++) totals(total[row][0], total[row][1], total[row][1], to + row * to_step);
}

static APART void code_dots(
    const int16_t *rows, int64_t num_rows, int64_t row_step, const float *units, const Codes *parts, int64_t num_tokens,
    float *to, int64_t to_step) {
    for (int64_t row = 0, count; row < num_rows; row += count) {
        count = num_rows - row >= DOT_ROWS ? DOT_ROWS : least(num_rows - row, 4);
        for (int64_t token = 0; token < num_tokens; token += CODE_TOKENS) {
            const int16_t *from = rows + row * row_step;
            float *target = to + row * to_step + token;
            int num = (int)least(num_tokens - token, CODE_TOKENS);
#define TILE(r, t) code_dots_tile(r, t, from, row_step, units + 2 * row, parts, token, target, to_step)
#define TILES(r) (num == 2 ? TILE(r, 2) : TILE(r, 1))
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
    }
}

/* to[row] = to[row] * keep[row] + gain[row] * the sum over tokens of weights[row][token] * codes, for a pair. */
static inline __attribute__((always_inline)) void code_combine_tile(
    int num_rows, const int16_t *weights, int64_t weight_step, const float *keep, const float *gain,
    const int8_t *codes, int64_t step, int64_t num_tokens, float *to, int64_t to_step) {
    Ints sum[COMBINE_ROWS][2] = {0};
    for (int64_t token = 0; token < num_tokens; token += 2, codes += 2 * step) {
        Shorts value[2];
        interleave(codes, token + 1 < num_tokens ? codes + step : codes, value); /* a last weight is zero */
#pragma GCC unroll 8
        for (int row = 0; row < num_rows; row++) {
            int32_t pair;
            memcpy(&pair, weights + row * weight_step + token, sizeof pair);
            Shorts both = (Shorts)(pair - (Ints){0});
            ADD_PAIRS(sum[row][0], value[0], both);
            ADD_PAIRS(sum[row][1], value[1], both);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 2
        for (int which = 0; which < 2; which++) {
            float *place = to + row * to_step + which * LANES;
            store(place, load(place) * keep[row] + __builtin_convertvector(sum[row][which], Floats) * gain[row]);
        }
}

/* The same for all columns and rows, from weights in float32 [rows, weight_step]. */
static APART void code_combine(
    const float *weights, int64_t weight_step, const float *keep, const Codes *tokens, int64_t num_tokens, float *to,
    int64_t num_rows, int64_t to_step) {
    const int64_t num_tiles = (num_rows + COMBINE_ROWS - 1) / COMBINE_ROWS;
    int16_t share[ROWS][BLOCK], product[ROWS][BLOCK], scale[BLOCK];
    float unit[ROWS], gain[ROWS], scales[BLOCK];
    int8_t last[BLOCK][PAIR];
    memset(share, 0, sizeof share);
    memset(scale, 0, sizeof scale);
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = weights + row * weight_step;
        unit[row] = quantize(from, num_tokens, magnitude(from, num_tokens), share[row]);
    }
    for (int64_t group = 0; group < num_groups(tokens->size); group++) {
        for (int64_t token = 0; token < num_tokens; token++)
            scales[token] = tokens->scales[token * tokens->scale_step + group];
        float scale_unit = quantize(scales, num_tokens, magnitude(scales, num_tokens), scale);
        for (int64_t row = 0; row < num_rows; row++) {
            gain[row] = unit[row] * scale_unit * 32768.0f;
            for (int64_t i = 0; i < BLOCK; i += PAIR) {
                Shorts both = multiply_high(load_shorts(share[row] + i), load_shorts(scale + i));
                memcpy(product[row] + i, &both, sizeof both);
            }
        }
        for (int64_t i = group * GROUP; i < least((group + 1) * GROUP, tokens->size); i += PAIR) {
            const int8_t *from = tokens->codes + i;
            int64_t step = tokens->code_step;
            if (tokens->size - i < PAIR) {
                memset(last, 0, sizeof last);
                for (int64_t token = 0; token < num_tokens; token++)
                    memcpy(last[token], from + token * step, (size_t)(tokens->size - i));
                from = last[0];
                step = sizeof last[0];
            }
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                int64_t row = tile * num_rows / num_tiles, count = (tile + 1) * num_rows / num_tiles - row;
#define TILE(n)                                                                                                \
    code_combine_tile(                                                                                         \
        n, product[row], BLOCK, keep + row, gain + row, from, step, num_tokens, to + row * to_step + i, to_step)
                switch (count) {
                    case 1: TILE(1); break;
                    case 2: TILE(2); break;
                    case 3: TILE(3); break;
                    case 4: TILE(4); break;
                    case 5: TILE(5); break;
#if COMBINE_ROWS > 6
                    case 6: TILE(6); break;
                    case 7: TILE(7); break;
#endif
                    default: TILE(COMBINE_ROWS);
                }
#undef TILE
            }
        }
    }
}
