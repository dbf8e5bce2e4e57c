/* Attention of few queries to a cache of latents that stay compressed; mla.py compiles this file and says what it is for.

   A head's key is W_UK c with the shared rotary key r behind it, its value W_UV c, where c is the token's latent. So a
   score is (q W_UK) c + q_rot r, and the output W_UV (sum of p c): nothing is expanded. A head of a query is a "row".
   Three stages, with a barrier between:
     absorb  q W_UK of each head, scaled, and the rotary part behind it;
     attend  a chunk of the tokens for up to ROWS rows: blocks of tokens, each read from memory once for all rows, with
             running maxima, sums and outputs (online softmax);
     finish  the chunks' outputs are put together, and W_UV applied.
   Both halves of `attend` are products of small matrices. `dots` and `combine` are these products; the other stages
   use them on the weights.

   bfloat16 numbers become float32 in registers, 16 at a time: those at even places, then those at odd ones. Rows in
   float32 are kept in that order ("paired"), which costs nothing since only products of two such rows are ever taken.
   Everything is float32, in an order that depends on the number of tokens only: the same bits for any number of
   threads, and whatever else is in the batch. */

#include <math.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

#define LANES 8
#define PAIR (2 * LANES)   /* numbers converted at a time */
#define BLOCK 48           /* tokens between two updates of the maxima: they stay in the second-level cache meanwhile */
#define STEP (BLOCK + LANES) /* from one row's scores to the next one's */
#define ROWS 64            /* rows of a task: their scores stay in the first-level cache */
#define MAX_CHUNKS 64      /* tasks that the tokens are cut into at most */
#define DOT_ROWS 4         /* rows and tokens of `dots` whose sums stay in registers */
#define DOT_TOKENS 3
#define COMBINE_ROWS 6     /* rows of `combine`, times PAIR; FEW_ROWS rows times twice that */
#define FEW_ROWS 3
#define MOST_PAIRS 2
#define AHEAD 16           /* rows of weights that come from memory while one is used */
#define ALONE (1 << 20)    /* products: for fewer, waking threads takes longer */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

enum { NO_MASK, BOOL_MASK, FLOAT_MASK };

/* What the caller passes, in this order. Steps are in elements; a query's, a token's. */
typedef struct {
    int64_t batch, queries, heads, tokens;
    int64_t nope, rotary, latent, value; /* sizes of q_nope, of the rotary parts, of a latent, of a head's output */
    int64_t nope_batch, nope_query, nope_head;
    int64_t rot_batch, rot_query, rot_head;
    int64_t latent_batch, latent_token;
    int64_t rotary_batch, rotary_token;
    int64_t scale_batch, scale_token;
    int64_t mask_batch, mask_head, mask_query;
    int64_t mask_kind;
    int64_t wide; /* float32 rather than bfloat16 */
} Sizes;

typedef struct Job {
    Sizes s;
    const char *q_nope, *q_rot, *latents, *rotary, *kv_b;
    const float *scales; /* of latents and rotary parts, if these are codes in 8 bits */
    const void *mask;
    char *output;
    float scaling;
    int64_t item, weight_item, rows, latent_pad, row_pad, chunk, num_chunks, num_groups;
    float *queries; /* [batch, rows, row_pad]: paired, latent part and rotary part each filled up with zeros */
    float *nopes;   /* [heads, batch, queries, nope] */
    float *outputs; /* [batch, chunks, rows, latent_pad]: paired, not yet divided by the sums */
    float *largest; /* [batch, chunks, rows] */
    float *sums;    /* [batch, chunks, rows] */
    float *units;   /* [batch, rows, 2]: of the queries in 16 bits, for both parts */
    int16_t *coded; /* [batch, rows, row_pad]: these, in their own order */
    int num_threads;
    atomic_llong next[3];
} Job;

/* Rows of `size` numbers, `step` bytes apart. Those `ahead` bytes behind come from memory meanwhile: as a whole, or if
   they are `shared`, the first halves of their numbers by `dots` and the second ones by `combine`. */
typedef struct {
    const char *data;
    int64_t step, size, ahead;
    int shared;
} Source;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t size) { return (size + PAIR - 1) / PAIR * PAIR; }

static inline float to_float(int wide, const void *from, int64_t i) {
    return wide ? ((const float *)from)[i] : from_bfloat16(((const uint16_t *)from)[i]);
}

/* Where number i of a row is in the paired order. */
static inline int64_t place(int wide, int64_t i) {
    return wide ? i : i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2;
}

/* Compilers that see the inner loops' registers all in use load factors again for each product, or spill sums. Spelled
   out, a product takes its factors from registers and adds to its own. */
#if defined(__AVX2__) && defined(__FMA__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#define ADD_PRODUCT(sum, a, b) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b))
#else
#define IN_REGISTER(vector)
#define ADD_PRODUCT(sum, a, b) ((sum) += (a) * (b))
#endif

/* Inlined, or specialised for a caller, such a function gets fewer registers. */
#define APART __attribute__((noinline, noclone))

/* Half of 16 numbers: the first or the last eight of float32, those at even or at odd places of bfloat16. */
static inline __attribute__((always_inline)) Floats half(int wide, const char *from, int which) {
    Words raw;
    if (wide) {
        memcpy(&raw, from + which * sizeof raw, sizeof raw);
        return (Floats)raw;
    }
    memcpy(&raw, from, sizeof raw);
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
    Floats all = {x, x, x, x, x, x, x, x};
    return exponential(all)[0];
}

/* The sums of the lanes of three vectors, and a fourth number. */
static inline void totals(Floats a, Floats b, Floats c, float to[4]) {
    const Floats zero = {0};
#ifdef __AVX2__
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)zero));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    const Floats all[4] = {a, b, c, zero};
    for (int i = 0; i < 4; i++)
        to[i] = ((all[i][0] + all[i][1]) + (all[i][2] + all[i][3])) + ((all[i][4] + all[i][5]) + (all[i][6] + all[i][7]));
#endif
}

/* sum[row][token] += 16 numbers of each row times those of each token. */
static inline __attribute__((always_inline)) void multiply(
    int wide, int num_rows, int num_tokens, const float *rows, int64_t row_step, const char *tokens, int64_t token_step,
    Floats (*sum)[DOT_TOKENS]) {
#pragma GCC unroll 2
    for (int which = 0; which < 2; which++) {
        Floats value[DOT_TOKENS];
#pragma GCC unroll 4
        for (int token = 0; token < num_tokens; token++) value[token] = half(wide, tokens + token * token_step, which);
#pragma GCC unroll 4
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
                __builtin_prefetch(tokens + token * step + ahead + (i * item >> shared));
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
#pragma GCC unroll 4
    for (int row = 0; row < num_rows; row++) totals(sum[row][0], sum[row][1], sum[row][2], to + row * to_step);
}

/* to[row][token]: the scalar products of all rows with all tokens. Room for three more numbers in a row of `to`. */
static inline __attribute__((always_inline)) void dots_of(
    int wide, const float *rows, int64_t num_rows, int64_t row_step, const Source *parts, int num_parts,
    int64_t num_tokens, float *to, int64_t to_step) {
    for (int64_t row = 0; row < num_rows;) {
        int count = (int)least(num_rows - row, DOT_ROWS);
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
                default: TILES(4);
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

/* to[row] = to[row] * keep[row] + the sum over tokens of weights[row][token] * token, for 16 or 32 numbers of each. */
static inline __attribute__((always_inline)) void combine_tile(
    int wide, int num_rows, int num_pairs, const float *weights, int64_t weight_step, const float *keep,
    const Source *source, const char *tokens, int64_t num_tokens, float *to, int64_t to_step) {
    const int64_t item = wide ? 4 : 2, step = source->step, ahead = source->ahead;
    Floats sum[COMBINE_ROWS][2 * MOST_PAIRS];
#pragma GCC unroll 6
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * num_pairs; i++) sum[row][i] = load(to + row * to_step + i * LANES) * keep[row];
    for (int64_t token = 0; token < num_tokens; token++, tokens += step) {
        __builtin_prefetch(tokens + ahead);
#pragma GCC unroll 2
        for (int pair = 0; pair < num_pairs; pair++) {
            Floats first = half(wide, tokens + pair * PAIR * item, 0), second = half(wide, tokens + pair * PAIR * item, 1);
#pragma GCC unroll 6
            for (int row = 0; row < num_rows; row++) {
                float w = weights[row * weight_step + token];
                Floats weight = {w, w, w, w, w, w, w, w};
                ADD_PRODUCT(sum[row][2 * pair], first, weight);
                ADD_PRODUCT(sum[row][2 * pair + 1], second, weight);
            }
        }
    }
#pragma GCC unroll 6
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
        const int is_double = num_rows <= FEW_ROWS && tokens->size - i >= 2 * PAIR;
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
            switch (count) {
                case 1: is_double ? TILE(1, 2) : TILE(1, 1); break;
                case 2: is_double ? TILE(2, 2) : TILE(2, 1); break;
                case 3: is_double ? TILE(3, 2) : TILE(3, 1); break;
                case 4: TILE(4, 1); break;
                case 5: TILE(5, 1); break;
                default: TILE(6, 1);
            }
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

#include "mla_int8.h"

/* A row in float32 as the integers that meet codes. */
static void code_row(const Job *job, const float *row, int16_t *to, float *units) {
    const int wide = (int)job->s.wide;
    const int64_t sizes[2] = {job->s.latent, job->s.rotary};
    for (int part = 0; part < 2; part++) {
        int64_t size = padded(sizes[part]);
        float largest = magnitude(row, size);
        for (int64_t i = 0; i < size; i += PAIR) {
            float values[PAIR];
            for (int j = 0; j < PAIR; j++) values[j] = row[i + place(wide, j)];
            units[part] = quantize(values, PAIR, largest, to + i);
        }
        row += size;
        to += size;
    }
}

/* The rows of one head: q_nope W_UK and q_rot, times the scaling. */
static void absorb(void *all, int64_t head) {
    const Job *job = all;
    const Sizes *s = &job->s;
    const int wide = (int)s->wide;
    static const float ones[ROWS] = {[0 ... ROWS - 1] = 1.0f};
    Source matrix = {job->kv_b + head * (s->nope + s->value) * s->latent * job->weight_item, s->latent * job->weight_item, s->latent, 0, 0};
    for (int64_t batch = 0; batch < s->batch; batch++) {
        float *rows = job->queries + (batch * job->rows + head * s->queries) * job->row_pad;
        float *nopes = job->nopes + (head * s->batch + batch) * s->queries * s->nope;
        memset(rows, 0, (size_t)(s->queries * job->row_pad) * sizeof *rows);
        for (int64_t query = 0; query < s->queries; query++) {
            int64_t nope = batch * s->nope_batch + query * s->nope_query + head * s->nope_head;
            int64_t rot = batch * s->rot_batch + query * s->rot_query + head * s->rot_head;
            for (int64_t i = 0; i < s->nope; i++)
                nopes[query * s->nope + i] = to_float(wide, job->q_nope, nope + i) * job->scaling;
            for (int64_t i = 0; i < s->rotary; i++)
                rows[query * job->row_pad + job->latent_pad + place(wide, i)] =
                    to_float(wide, job->q_rot, rot + i) * job->scaling;
        }
        for (int64_t query = 0; query < s->queries; query += ROWS)
            for (int64_t i = 0; i < s->nope; i += AHEAD) {
                Source part = {matrix.data + i * matrix.step, matrix.step, matrix.size, AHEAD * matrix.step, 0};
                combine(
                    wide, nopes + query * s->nope + i, s->nope, ones, &part, least(s->nope - i, AHEAD),
                    rows + query * job->row_pad, least(s->queries - query, ROWS), job->row_pad);
            }
        for (int64_t query = 0; query < s->queries && job->scales; query++) {
            int64_t row = batch * job->rows + head * s->queries + query;
            code_row(
                job, job->queries + row * job->row_pad, job->coded + row * job->row_pad,
                job->units + 2 * row);
        }
    }
}

/* Where a row's mask is; only for a mask. */
static inline int64_t mask_place(const Sizes *s, int64_t batch, int64_t row) {
    return batch * s->mask_batch + row / s->queries * s->mask_head + row % s->queries * s->mask_query;
}

/* Tokens that a row sees at most, without a mask: the last query all of them, the one before all but one. */
static inline int64_t limit(const Sizes *s, int64_t row) { return s->tokens - s->queries + row % s->queries + 1; }

/* Whether a row sees any of these tokens. */
static int sees(const Job *job, int64_t batch, int64_t row, int64_t start, int64_t num_tokens) {
    if (job->s.mask_kind == NO_MASK) return start < limit(&job->s, row);
    int64_t first = mask_place(&job->s, batch, row) + start;
    if (job->s.mask_kind == BOOL_MASK) {
        uint8_t any = 0;
        for (int64_t i = 0; i < num_tokens; i++) any |= ((const uint8_t *)job->mask)[first + i];
        return any;
    }
    int any = 0;
    for (int64_t i = 0; i < num_tokens; i++) any |= ((const float *)job->mask)[first + i] != -INFINITY;
    return any;
}

/* The mask of a row, on its scores; what fills the last vector up is hidden. */
static void hide(const Job *job, int64_t batch, int64_t row, int64_t start, int64_t num_tokens, float *scores) {
    if (job->s.mask_kind == NO_MASK) {
        for (int64_t i = limit(&job->s, row) - start < 0 ? 0 : limit(&job->s, row) - start; i < num_tokens; i++)
            scores[i] = -INFINITY;
    } else if (job->s.mask_kind == BOOL_MASK) {
        const uint8_t *mask = (const uint8_t *)job->mask + mask_place(&job->s, batch, row) + start;
        for (int64_t i = 0; i < num_tokens; i++) scores[i] = mask[i] ? scores[i] : -INFINITY;
    } else {
        const float *mask = (const float *)job->mask + mask_place(&job->s, batch, row) + start;
        for (int64_t i = 0; i < num_tokens; i++) scores[i] += mask[i];
    }
    for (int64_t i = num_tokens; i % LANES; i++) scores[i] = -INFINITY;
}

/* The scores of a row become weights, relative to the largest score so far. Returns what is to become of the weights
   before. Scores that are all hidden leave everything as it is. */
static float weigh(float *scores, int64_t num_tokens, float *largest, float *sum) {
    float before = *largest, after = before;
    Floats most = {before, before, before, before, before, before, before, before}, total = {0};
    for (int64_t i = 0; i < num_tokens; i += LANES) {
        Floats score = load(scores + i);
        Ints more = score > most;
        most = (Floats)(((Ints)score & more) | ((Ints)most & ~more));
    }
    for (int lane = 0; lane < LANES; lane++) after = most[lane] > after ? most[lane] : after;
    float origin = after == -INFINITY ? 0.0f : after;
    for (int64_t i = 0; i < num_tokens; i += LANES) {
        Floats weight = exponential(load(scores + i) - origin);
        store(scores + i, weight);
        total += weight;
    }
    float keep = exponential_of_one(before - origin), now[4];
    totals(total, total, total, now);
    *largest = after;
    *sum = *sum * keep + now[0];
    return keep;
}

/* A chunk of tokens for a few rows. */
static void attend(void *all, int64_t task) {
    const Job *job = all;
    const Sizes *s = &job->s;
    const int wide = (int)s->wide;
    int64_t group = task % job->num_groups, chunk = task / job->num_groups % job->num_chunks;
    int64_t batch = task / job->num_groups / job->num_chunks;
    int64_t first = group * ROWS, num_rows = least(job->rows - first, ROWS);
    int64_t slot = (batch * job->num_chunks + chunk) * job->rows + first;
    int64_t row_start = batch * job->rows + first;
    const char *latents = job->latents + batch * s->latent_batch * job->item;
    const char *rotary = job->rotary + batch * s->rotary_batch * job->item;
    float *output = job->outputs + slot * job->latent_pad, *largest = job->largest + slot, *sums = job->sums + slot;
    _Alignas(64) float scores[ROWS][STEP];
    float keep[ROWS];
    memset(output, 0, (size_t)(num_rows * job->latent_pad) * sizeof *output);
    for (int64_t row = 0; row < num_rows; row++) {
        largest[row] = -INFINITY;
        sums[row] = 0.0f;
    }
    int64_t end = least((chunk + 1) * job->chunk, s->tokens);
    for (int64_t start = chunk * job->chunk; start < end; start += BLOCK) {
        int64_t num_tokens = least(end - start, BLOCK), seen = 0;
        for (int64_t row = 0; row < num_rows && !seen; row++) seen = sees(job, batch, first + row, start, num_tokens);
        if (!seen) continue;
        const int64_t latent_step = s->latent_token * job->item, rotary_step = s->rotary_token * job->item;
        const Source parts[2] = {
            {latents + start * latent_step, latent_step, s->latent, BLOCK * latent_step, 1},
            {rotary + start * rotary_step, rotary_step, s->rotary, BLOCK * rotary_step, 0}};
        const float *scales = job->scales ? job->scales + batch * s->scale_batch + start * s->scale_token : 0;
        const Codes codes[2] = {
            {(const int8_t *)parts[0].data, scales, parts[0].step, s->scale_token, s->latent},
            {(const int8_t *)parts[1].data, scales + num_groups(s->latent), parts[1].step, s->scale_token, s->rotary}};
        if (job->scales)
            code_dots(
                job->coded + row_start * job->row_pad, num_rows, job->row_pad,
                job->units + 2 * row_start, codes, num_tokens, scores[0], STEP);
        else
            dots(wide, job->queries + row_start * job->row_pad, num_rows, job->row_pad, parts, 2, num_tokens, scores[0], STEP);
        for (int64_t row = 0; row < num_rows; row++) {
            hide(job, batch, first + row, start, num_tokens, scores[row]);
            keep[row] = weigh(scores[row], num_tokens, largest + row, sums + row);
        }
        if (job->scales)
            code_combine(scores[0], STEP, keep, codes, num_tokens, output, num_rows, job->latent_pad);
        else
            combine(wide, scores[0], STEP, keep, parts, num_tokens, output, num_rows, job->latent_pad);
    }
}

/* A row's outputs of all chunks become one, in the place of the first. Rows that see nothing become zero. */
static void merge(const Job *job, int64_t batch, int64_t row) {
    int64_t first = batch * job->num_chunks * job->rows + row;
    float largest = -INFINITY, sum = 0.0f, keep[MAX_CHUNKS];
    for (int64_t chunk = 0; chunk < job->num_chunks; chunk++) {
        float value = job->largest[first + chunk * job->rows];
        largest = value > largest ? value : largest;
    }
    float origin = largest == -INFINITY ? 0.0f : largest;
    for (int64_t chunk = 0; chunk < job->num_chunks; chunk++) {
        keep[chunk] = exponential_of_one(job->largest[first + chunk * job->rows] - origin);
        sum += keep[chunk] * job->sums[first + chunk * job->rows];
    }
    float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    float *output = job->outputs + first * job->latent_pad;
    for (int64_t i = 0; i < job->latent_pad; i++) output[i] *= keep[0];
    for (int64_t chunk = 1; chunk < job->num_chunks; chunk++) {
        const float *other = output + chunk * job->rows * job->latent_pad;
        if (job->sums[first + chunk * job->rows] == 0.0f) continue;
        for (int64_t i = 0; i < job->latent_pad; i++) output[i] += keep[chunk] * other[i];
    }
    for (int64_t i = 0; i < job->latent_pad; i += PAIR) {
        float values[PAIR];
        for (int j = 0; j < PAIR; j++) values[j] = output[i + j] * scale;
        for (int j = 0; j < PAIR; j++) output[i + (job->scales ? place((int)job->s.wide, j) : j)] = values[j];
    }
}

/* The output of one head. */
static void finish(void *all, int64_t head) {
    const Job *job = all;
    const Sizes *s = &job->s;
    int64_t step = s->latent * job->weight_item;
    Source matrix = {job->kv_b + (head * (s->nope + s->value) + s->nope) * step, step, s->latent, 0, 0};
    for (int64_t batch = 0; batch < s->batch; batch++)
        for (int64_t query = 0; query < s->queries; query += DOT_ROWS) {
            int64_t num_rows = least(s->queries - query, DOT_ROWS), row = head * s->queries + query;
            for (int64_t i = 0; i < num_rows; i++) merge(job, batch, row + i);
            const float *from = job->outputs + (batch * job->num_chunks * job->rows + row) * job->latent_pad;
            for (int64_t start = 0; start < s->value; start += BLOCK) {
                Source part = {matrix.data + start * step, step, s->latent, AHEAD * step, 0};
                int64_t count = least(s->value - start, BLOCK);
                float values[DOT_ROWS][STEP];
                dots((int)s->wide, from, num_rows, job->latent_pad, &part, 1, count, values[0], STEP);
                for (int64_t i = 0; i < num_rows; i++) {
                    int64_t to = ((batch * s->queries + query + i) * s->heads + head) * s->value + start;
                    for (int64_t j = 0; j < count; j++)
                        if (s->wide)
                            ((float *)job->output)[to + j] = values[i][j];
                        else
                            ((uint16_t *)job->output)[to + j] = to_bfloat16(values[i][j]);
                }
            }
        }
}

static void run_stage(Job *job, int stage, int64_t num_tasks, Work *work) {
    run_some(work, job, num_tasks, job->num_threads, &job->next[stage]);
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static void run_stages(Job *job) {
    run_stage(job, 0, job->s.heads, absorb);
    run_stage(job, 1, job->s.batch * job->num_chunks * job->num_groups, attend);
    run_stage(job, 2, job->s.heads, finish);
}

/* The parts of a call that follow from its sizes. Returns the floats of `scratch` that it needs. */
static int64_t prepare(Job *job, float *scratch) {
    const Sizes *s = &job->s;
    int64_t num_blocks = (s->tokens + BLOCK - 1) / BLOCK;
    job->weight_item = s->wide ? 4 : 2;
    job->item = job->scales ? 1 : job->weight_item;
    job->rows = s->heads * s->queries;
    job->latent_pad = padded(s->latent);
    job->row_pad = job->latent_pad + padded(s->rotary);
    job->chunk = (num_blocks + MAX_CHUNKS - 1) / MAX_CHUNKS * BLOCK;
    job->num_chunks = (s->tokens + job->chunk - 1) / job->chunk;
    job->num_groups = (job->rows + ROWS - 1) / ROWS;
    int64_t all = s->batch * job->rows, sizes[] = {
        all * job->row_pad, all * job->num_chunks * job->latent_pad, all * s->nope, all * job->num_chunks,
        all * job->num_chunks, job->scales ? all * 2 : 0, job->scales ? all * job->row_pad / 2 : 0};
    float *parts[7];
    int64_t total = 0;
    for (int i = 0; i < 7; total += padded(sizes[i++])) parts[i] = scratch + total;
    job->queries = parts[0];
    job->outputs = parts[1];
    job->nopes = parts[2];
    job->largest = parts[3];
    job->sums = parts[4];
    job->units = parts[5];
    job->coded = (int16_t *)parts[6];
    return total;
}

/* Floats of `scratch` that a call needs; it is aligned to 64. */
int64_t mla_scratch(const Sizes *sizes, const float *scales) {
    Job job = {.s = *sizes, .scales = scales};
    return prepare(&job, 0);
}

/* output[batch, query, head] = softmax(q_nope W_UK c + q_rot r) c W_UV over the tokens (c, r) that the mask shows. */
void mla_decode(
    const void *q_nope, const void *q_rot, const void *latents, const void *rotary, const float *scales,
    const void *kv_b, const void *mask, void *output, float *scratch, const Sizes *sizes, float scaling, int num_threads) {
    Job job = {
        .s = *sizes, .q_nope = q_nope, .q_rot = q_rot, .latents = latents, .rotary = rotary, .scales = scales, .kv_b = kv_b, .mask = mask,
        .output = output, .scaling = scaling};
    prepare(&job, scratch);
    for (int stage = 0; stage < 3; stage++) atomic_init(&job.next[stage], 0);
    const int64_t products = sizes->batch * job.rows * (sizes->tokens * 2 + sizes->nope + sizes->value) * sizes->latent;
    job.num_threads = products < ALONE ? 1 : num_threads;
#ifdef _OPENMP
    if (job.num_threads > 1) {
        /* torch's own threads: others would wait for a core while these spin. */
#pragma omp parallel num_threads(job.num_threads)
        run_stages(&job);
        return;
    }
#endif
    run_stages(&job);
}
