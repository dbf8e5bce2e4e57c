/* Attention of few queries to a cache of latents that stay compressed; mla.py compiles this and says what it is for.

   A head's key is W_UK c with the shared rotary key r behind it, its value W_UV c, where c is the token's latent. So a
   score is (q W_UK) c + q_rot r, and the output W_UV (sum of p c): nothing is expanded. A head of a query is a "row".
   Three stages:
     absorb  q W_UK of each head, scaled, and the rotary part behind it;
     attend  a chunk of the tokens for up to ROWS rows: blocks of tokens, each read from memory once for all rows, with
             running maxima, sums and outputs (online softmax);
     finish  the chunks' outputs are put together, and W_UV applied.
   Both halves of `attend` are products of small matrices. `dots` and `combine` are these products; the other stages
   use them on the weights. Latents in 8 bits have products of their own.

   Everything is float32, in an order that depends on the number of tokens only: the same bits for any number of
   threads, and whatever else is in the batch. */

#include "mla_float.h"
#include "mla_int8.h"

#define STEP (BLOCK + LANES) /* from one row's scores to the next one's: `dots` writes beyond a row's last */
#define MAX_CHUNKS 32        /* tasks that the tokens are cut into at most */
#define AHEAD 16             /* rows of weights that come from memory while as many are used */
#define ALONE (1 << 20)      /* products: for fewer, waking threads takes longer */

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
} Job;

static inline float to_float(int wide, const void *from, int64_t i) {
    return wide ? ((const float *)from)[i] : from_bfloat16(((const uint16_t *)from)[i]);
}

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
    const int64_t step = s->latent * job->weight_item;
    const char *matrix = job->kv_b + head * (s->nope + s->value) * step;
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
                Source part = {matrix + i * step, step, s->latent, AHEAD * step, 0};
                combine(
                    wide, nopes + query * s->nope + i, s->nope, ones, &part, least(s->nope - i, AHEAD),
                    rows + query * job->row_pad, least(s->queries - query, ROWS), job->row_pad);
            }
        for (int64_t query = 0; query < s->queries && job->scales; query++) {
            int64_t row = batch * job->rows + head * s->queries + query;
            code_row(
                job, job->queries + row * job->row_pad, job->coded + row * job->row_pad, job->units + 2 * row);
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
    Floats most = all_of(before), total = {0};
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
        Codes codes[2];
        if (job->scales) {
            const float *scales = job->scales + batch * s->scale_batch + start * s->scale_token;
            codes[0] = (Codes){(const int8_t *)parts[0].data, scales, latent_step, s->scale_token, s->latent};
            scales += num_groups(s->latent);
            codes[1] = (Codes){(const int8_t *)parts[1].data, scales, rotary_step, s->scale_token, s->rotary};
            code_dots(
                job->coded + row_start * job->row_pad, num_rows, job->row_pad, job->units + 2 * row_start, codes,
                num_tokens, scores[0], STEP);
        } else {
            dots(
                wide, job->queries + row_start * job->row_pad, num_rows, job->row_pad, parts, 2, num_tokens, scores[0],
                STEP);
        }
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
    const int64_t step = s->latent * job->weight_item;
    const char *matrix = job->kv_b + (head * (s->nope + s->value) + s->nope) * step;
    for (int64_t batch = 0; batch < s->batch; batch++)
        for (int64_t query = 0; query < s->queries; query += DOT_ROWS) {
            int64_t num_rows = least(s->queries - query, DOT_ROWS), row = head * s->queries + query;
            for (int64_t i = 0; i < num_rows; i++) merge(job, batch, row + i);
            const float *from = job->outputs + (batch * job->num_chunks * job->rows + row) * job->latent_pad;
            for (int64_t start = 0; start < s->value; start += BLOCK) {
                Source part = {matrix + start * step, step, s->latent, AHEAD * step, 0};
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
    for (int i = 0; i < 7; total += padded(sizes[i++])) parts[i] = scratch ? scratch + total : 0;
    job->queries = parts[0];
    job->outputs = parts[1];
    job->nopes = parts[2];
    job->largest = parts[3];
    job->sums = parts[4];
    job->units = parts[5];
    job->coded = (int16_t *)parts[6];
    return total;
}

/* Floats of `scratch` that a call needs. */
int64_t mla_scratch(const Sizes *sizes, const float *scales) {
    Job job = {.s = *sizes, .scales = scales};
    return prepare(&job, 0);
}

/* output[batch, query, head] = softmax(q_nope W_UK c + q_rot r) c W_UV over the tokens (c, r) that the mask shows. */
void mla_decode(
    const void *q_nope, const void *q_rot, const void *latents, const void *rotary, const float *scales,
    const void *kv_b, const void *mask, void *output, float *scratch, const Sizes *sizes, float scaling,
    int num_threads) {
    Job job = {
        .s = *sizes, .q_nope = q_nope, .q_rot = q_rot, .latents = latents, .rotary = rotary, .scales = scales,
        .kv_b = kv_b, .mask = mask, .output = output, .scaling = scaling};
    prepare(&job, scratch);
    const int64_t products = sizes->batch * job.rows * (sizes->tokens * 2 + sizes->nope + sizes->value) * sizes->latent;
    Stage stages[3] = {
        {absorb, &job, sizes->heads, 0, 0},
        {attend, &job, sizes->batch * job.num_chunks * job.num_groups, 0, 0},
        {finish, &job, sizes->heads, 0, 0}};
    run_stages(stages, 3, products < ALONE ? 1 : num_threads);
}
