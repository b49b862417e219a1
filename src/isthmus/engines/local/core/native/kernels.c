/* Decoder layers for a few tokens at a time, in fp32 or emulated W8A8, over the paged cache.

   What the torch path does in a hundred small operations is one call here. Shapes: N tokens, D hidden, H heads, K
   key/value heads, W width of a cache entry, E experts. Matrices are [out, in], as published checkpoints have them.

   Every sum has one order that depends on its own length alone, never on N, on the neighbours or on the thread: a token
   gets the same bits in any company. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define TOKENS 4
#define OUTPUTS 4
#define AHEAD 4096 /* floats between the weights in use and those that are fetched */
#define NEAR 4096  /* floats of tokens that stay in the first cache while all outputs are computed of them */
#define LARGEST 127.0f
#define BLOCK 1024

/* A sum has LANES partial sums, in PARTS registers. MOST tokens are summed at once, as registers allow: 32 or 16. */
#ifdef __AVX512F__
#define PARTS 1
#define MOST 4
#else
#define PARTS 2
#define MOST 3
#endif
#define PART (LANES / PARTS)
typedef float part __attribute__((vector_size(PART * 4), aligned(4), may_alias));
typedef int32_t part_int __attribute__((vector_size(PART * 4), aligned(4), may_alias));

/* With `scale` [out] the weight holds int8 values in fp32, and inputs are quantised by row. */
typedef struct {
    const float *weight, *scale, *bias;
    int64_t in, out;
} Linear;

typedef struct {
    const float *weight;
    float eps;
} Norm;

typedef struct {
    Linear gate, up, down;
} Mlp;

typedef struct {
    /* Attention. Latent: q or q_a and q_b, kv_a and up projections by head. Grouped: q, k, v. */
    int32_t latent, heads, kv_heads, nope, rope, value, rank, window; /* window: entries in view, 0 for all */
    float scale;
    Norm input_norm, q_norm, kv_norm, post_norm; /* grouped: of each head of queries and of keys, or null */
    Linear q_a, q, k, v, kv_a, output;
    const float *up_key, *up_value; /* up_key [H, rank, nope], up_value [H, value, rank] */
    /* MLP: dense, or a router with experts and a shared expert. The router's bias and the shared expert may be null. */
    int32_t experts, top_k, groups, top_groups, softmax, normalise;
    float routed_scale;
    const float *router, *router_bias, *gate_up, *down; /* [E, D], [E], [E, 2 width, D], [E, D, width] */
    const float *gate_up_scale, *down_scale;            /* [E, 2 width], [E, D], or null */
    int64_t expert_width;
    Mlp mlp;
} Layer;

typedef struct {
    int64_t tokens, hidden, block_size, table_width;
    const int64_t *places, *lengths; /* [N] */
    const int32_t *tables;           /* [N, table_width] */
    const float *cos, *sin;          /* [N, rope / 2] */
    int32_t threads, route_width;
    int16_t *routes; /* [places, route_width]: the experts of all layers of the token at each place; or null */
} Pass;

/* --- memory that lasts for one layer */

typedef struct {
    char *start;
    size_t size, used;
} Arena;
static __thread Arena arena;

static int reserve(size_t bytes) {
    arena.used = 0;
    if (bytes <= arena.size) return 0;
    free(arena.start);
    arena.size = bytes + bytes / 2;
    arena.start = aligned_alloc(64, (arena.size + 63) / 64 * 64);
    if (!arena.start) arena.size = 0;
    return arena.start ? 0 : -1;
}

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void *take(size_t bytes) {
    void *place = arena.start + arena.used;
    arena.used += rounded(bytes);
    return place;
}

static float *floats(int64_t count) { return take(count * sizeof(float)); }

/* --- products */

static inline part load(const float *x) { return *(const part *)x; }

static inline void put(float *x, part value) { *(part *)x = value; }

static inline part pick(part_int mask, part yes, part no) {
    return (part)((mask & (part_int)yes) | (~mask & (part_int)no));
}

static inline part everywhere(float x) { return (part){0} + x; }

/* Some lanes of two vectors; GCC has Clang's name for it since version 12. */
#if defined(__clang__) || __GNUC__ >= 12
#define BOTH(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BOTH(a, b, ...) __builtin_shuffle(a, b, (part_int){__VA_ARGS__})
#endif

/* The sums over the lanes of `count` sums, PARTS registers each, always in the order (i, i + 8), (i, i + 4), (i, i + 2),
   (i, i + 1); of 16 at most, or of 8. */
#if PARTS == 1
static inline part fold8(part a, part b) {
    return BOTH(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           BOTH(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

static inline part fold4(part a, part b) {
    return BOTH(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           BOTH(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

static inline part fold2(part a, part b) {
    return BOTH(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           BOTH(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

static inline part fold1(part a, part b) {
    return BOTH(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           BOTH(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

static inline part totals(const part *x, int count) {
    part a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = fold8(x[2 * i % count], x[(2 * i + 1) % count]);
    for (int i = 0; i < 4; i++) b[i] = fold4(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; i++) c[i] = fold2(b[2 * i], b[2 * i + 1]);
    return fold1(c[0], c[1]);
}
#else
static inline part fold4(part a, part b) {
    return BOTH(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + BOTH(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

static inline part fold2(part a, part b) {
    return BOTH(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + BOTH(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}

static inline part fold1(part a, part b) {
    return BOTH(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + BOTH(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

static inline part totals(const part *x, int count) {
    part a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = x[2 * (i % count)] + x[2 * (i % count) + 1];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) b[i] = fold4(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; i++) c[i] = fold2(b[2 * i], b[2 * i + 1]);
    return fold1(c[0], c[1]);
}
#endif

static inline float total(const part *x) { return totals(x, 1)[0]; }

/* y[t][o] = x[t] . w[o] for T tokens and O outputs; the last 1..15 elements are added one by one. */
#define DEFINE_TILE(T, O)                                                                                      \
    static inline void tile_##T##_##O(const float *const *x, const float *w, int64_t stride, int64_t length,   \
                                      float *const *y, int64_t first) {                                        \
        part sum[T * O * PARTS];                                                                               \
        _Pragma("GCC unroll 16") for (int i = 0; i < T * O * PARTS; i++) sum[i] = everywhere(0.0f);            \
        int64_t k = 0;                                                                                         \
        for (; k + LANES <= length; k += LANES)                                                                \
            for (int p = 0; p < PARTS; p++) {                                                                  \
                part row[O];                                                                                   \
                for (int o = 0; o < O; o++) row[o] = load(w + o * stride + k + p * PART);                      \
                for (int t = 0; t < T; t++) {                                                                  \
                    part one = load(x[t] + k + p * PART);                                                      \
                    for (int o = 0; o < O; o++) sum[(t * O + o) * PARTS + p] += one * row[o];                  \
                }                                                                                              \
            }                                                                                                  \
        part all = totals(sum, T * O);                                                                         \
        if (k == length) {                                                                                     \
            _Pragma("GCC unroll 4") for (int t = 0; t < T; t++)                                                \
                _Pragma("GCC unroll 4") for (int o = 0; o < O; o++) y[t][first + o] = all[t * O + o];          \
            return;                                                                                            \
        }                                                                                                      \
        for (int t = 0; t < T; t++)                                                                            \
            for (int o = 0; o < O; o++) {                                                                      \
                float result = all[t * O + o];                                                                 \
                for (int64_t rest = k; rest < length; rest++)                                                  \
                    result = fmaf(x[t][rest], w[o * stride + rest], result);                                   \
                y[t][first + o] = result;                                                                      \
            }                                                                                                  \
    }
DEFINE_TILE(1, 1)
DEFINE_TILE(1, 4)
DEFINE_TILE(2, 1)
#if PARTS == 1
DEFINE_TILE(2, 4)
DEFINE_TILE(4, 1)
DEFINE_TILE(4, 4)
#else
DEFINE_TILE(2, 2)
DEFINE_TILE(3, 1)
DEFINE_TILE(3, 2)
#endif

/* OUTPUTS outputs of `step` tokens. */
static inline void tile_whole(const float *const *x, int step, const float *w, int64_t stride, int64_t length,
                              float *const *y, int64_t first) {
    if (step == 1) tile_1_4(x, w, stride, length, y, first);
#if PARTS == 1
    else if (step == 2) tile_2_4(x, w, stride, length, y, first);
    else tile_4_4(x, w, stride, length, y, first);
#else
    else
        for (int o = 0; o < OUTPUTS; o += 2) {
            if (step == 2) tile_2_2(x, w + o * stride, stride, length, y, first + o);
            else tile_3_2(x, w + o * stride, stride, length, y, first + o);
        }
#endif
}

/* One output of `step` tokens. */
static inline void tile_rest(const float *const *x, int step, const float *w, int64_t stride, int64_t length,
                             float *const *y, int64_t first) {
    if (step == 1) tile_1_1(x, w, stride, length, y, first);
    else if (step == 2) tile_2_1(x, w, stride, length, y, first);
#if PARTS == 1
    else tile_4_1(x, w, stride, length, y, first);
#else
    else tile_3_1(x, w, stride, length, y, first);
#endif
}

static void tile(const float *const *x, int tokens, const float *w, int64_t stride, int64_t length, float *const *y,
                 int64_t first, int outputs) {
    for (int t = 0; t < tokens;) {
        int step = tokens - t >= MOST ? MOST : tokens - t >= 2 ? 2 : 1;
        if (outputs == OUTPUTS) tile_whole(x + t, step, w, stride, length, y + t, first);
        else
            for (int o = 0; o < outputs; o++) tile_rest(x + t, step, w + o * stride, stride, length, y + t, first + o);
        t += step;
    }
}

static inline void fetch(const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) __builtin_prefetch(x + i);
}

/* y[t][o] = x[t] . w[o]: rows by pointers, so that none is gathered. */
static void product(const float *const *x, int tokens, const float *w, int64_t length, int64_t outputs,
                    float *const *y, int threads) {
    int64_t each = ((outputs + OUTPUTS - 1) / OUTPUTS + threads - 1) / threads * OUTPUTS;
    int most = (int)(NEAR / length) / (4 * MOST) * (4 * MOST);
    if (most < 4 * MOST) most = 4 * MOST;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        int64_t end = (part + 1) * each < outputs ? (part + 1) * each : outputs;
        for (int t = 0; t < tokens; t += most)
            for (int64_t o = part * each; o < end; o += OUTPUTS) {
                int count = end - o < OUTPUTS ? (int)(end - o) : OUTPUTS;
                if (t == 0) fetch(w + o * length + AHEAD, count * length);
                tile(x + t, tokens - t < most ? tokens - t : most, w + o * length, length, length, y + t, o, count);
            }
    }
}

static float **rows_of(float *x, int64_t count, int64_t stride) {
    float **rows = take(count * sizeof(float *));
    for (int64_t i = 0; i < count; i++) rows[i] = x + i * stride;
    return rows;
}

/* Symmetric int8 values of a row, kept in fp32, and their scale: formats/int8.py's `quantise_rows`. */
static float quantise(const float *x, float *values, int64_t size) {
    float most = 0.0f;
    for (int64_t i = 0; i < size; i++) {
        float positive = fabsf(x[i]);
        most = positive > most || positive != positive ? positive : most;
    }
    float scale = most / LARGEST;
    if (scale < FLT_MIN) scale = FLT_MIN;
    for (int64_t i = 0; i < size; i++) values[i] = rintf(x[i] / scale);
    return scale;
}

/* Products of int8 values. fp32 holds sums of up to BLOCK of them exactly; longer ones are added up in int32. */
static void quantised_product(float *const *x, int tokens, const float *w, const float *scale, int64_t length,
                              int64_t outputs, float *const *y, int threads) {
    size_t mark = arena.used;
    float *values = floats(tokens * length), *scales = floats(tokens);
    float **rows = rows_of(values, tokens, length);
    for (int t = 0; t < tokens; t++) scales[t] = quantise(x[t], rows[t], length);
    if (length <= BLOCK)
        product((const float *const *)rows, tokens, w, length, outputs, y, threads);
    else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t o = 0; o < outputs; o++)
            for (int t = 0; t < tokens; t++) {
                int32_t sum = 0;
                for (int64_t start = 0; start < length; start += BLOCK) {
                    int64_t size = length - start < BLOCK ? length - start : BLOCK;
                    const float *from = rows[t] + start;
                    float part, *to = &part;
                    tile_1_1(&from, w + o * length + start, length, size, &to, 0);
                    sum += (int32_t)part;
                }
                y[t][o] = (float)sum;
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int64_t o = 0; o < outputs; o++) y[t][o] = y[t][o] * scale[o] * scales[t];
    arena.used = mark;
}

static void scaled_product(float *const *x, int tokens, const float *w, const float *scale, int64_t length,
                           int64_t outputs, float *const *y, int threads) {
    if (scale) quantised_product(x, tokens, w, scale, length, outputs, y, threads);
    else product((const float *const *)x, tokens, w, length, outputs, y, threads);
}

static void linear(const Linear *layer, float *const *x, int64_t tokens, float *const *y, int threads) {
    scaled_product(x, (int)tokens, layer->weight, layer->scale, layer->in, layer->out, y, threads);
    if (layer->bias)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t o = 0; o < layer->out; o++) y[t][o] += layer->bias[o];
}

/* --- norms, rotations, activations */

static void norm(const Norm *layer, const float *x, float *y, int64_t size) {
    part sum[PARTS] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int p = 0; p < PARTS; p++) sum[p] += load(x + i + p * PART) * load(x + i + p * PART);
    float squares = total(sum);
    for (; i < size; i++) squares = fmaf(x[i], x[i], squares);
    float scale = 1.0f / sqrtf(squares / (float)size + layer->eps);
    for (i = 0; i < size; i++) y[i] = x[i] * scale * layer->weight[i];
}

/* Each of `heads` heads of a row, in place; nothing where there is no such norm. */
static void norm_heads(const Norm *layer, float *x, int64_t heads, int64_t size) {
    if (layer->weight)
        for (int64_t h = 0; h < heads; h++) norm(layer, x + h * size, x + h * size, size);
}

/* Pairs (2 i, 2 i + 1), as DeepSeek's weights want it. */
static void rotate_pairs(float *x, const float *cos, const float *sin, int size) {
    for (int i = 0; i < size / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

/* Pairs (i, i + size / 2), the layout of Hugging Face weights. */
static void rotate_halves(float *x, const float *cos, const float *sin, int size) {
    int half = size / 2;
    for (int i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

/* exp(x) for x <= 88: 2^n times a polynomial (Cephes, expf); below -87 it is 0. */
static inline part exponential(part x) {
    part_int tiny = x < -87.0f;
    part bounded = pick(tiny, everywhere(-87.0f), x);
    part turns = bounded * 1.44269504f;
    part half = pick(turns < 0.0f, everywhere(-0.5f), everywhere(0.5f));
    part_int whole = __builtin_convertvector(turns + half, part_int);
    part n = __builtin_convertvector(whole, part);
    part r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    part p = everywhere(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    part power = (part)((whole + 127) << 23);
    return pick(tiny, everywhere(0.0f), p * power);
}

static void silu_times(float *gate, const float *up, int64_t size) {
    int64_t i = 0;
    for (int64_t end = size / LANES * LANES; i < end; i += PART) {
        part g = load(gate + i);
        part_int negative = g < 0.0f;
        part e = exponential(pick(negative, g, -g));
        put(gate + i, g * pick(negative, e, everywhere(1.0f)) / (1.0f + e) * load(up + i));
    }
    for (; i < size; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* softmax of `size` scores in place; what lies up to the next multiple of LANES is overwritten. */
static void softmax(float *x, int64_t size, float scale) {
    float most = -INFINITY;
    for (int64_t i = 0; i < size; i++) {
        x[i] *= scale;
        if (x[i] > most) most = x[i];
    }
    if (!(most > -INFINITY)) most = 0.0f;
    int64_t filled = (size + LANES - 1) / LANES * LANES;
    for (int64_t i = size; i < filled; i++) x[i] = -INFINITY;
    part sum[PARTS] = {{0}};
    for (int64_t i = 0; i < filled; i += LANES)
        for (int p = 0; p < PARTS; p++) {
            part e = exponential(load(x + i + p * PART) - most);
            put(x + i + p * PART, e);
            sum[p] += e;
        }
    float all = total(sum);
    for (int64_t i = 0; i < filled; i++) x[i] /= all;
}

/* --- attention */

/* Entries from number `start` on in their block, of which `*here` up to the block's end or the last one are in a row. */
static const float *block_of(const float *store, const int32_t *table, int64_t size, int64_t width, int64_t start,
                             int64_t length, int64_t *here) {
    int64_t within = start % size;
    *here = length - start < size - within ? length - start : size - within;
    return store + (table[start / size] * size + within) * width;
}

/* One token: `heads` queries [heads, key] that share a key/value head, over its last `window` entries, 0 for all. */
static void attend(const Pass *pass, const float *store, int64_t width, int64_t token, const float *query, int heads,
                   int64_t key_start, int64_t key, int64_t value_start, int64_t value, int64_t window, float scale,
                   float *scores, float *out) {
    int64_t length = pass->lengths[token], size = pass->block_size, here;
    int64_t begin = window > 0 && window < length ? length - window : 0;
    int64_t stride = (length + LANES - 1) / LANES * LANES;
    const int32_t *table = pass->tables + token * pass->table_width;
    const float *q[TOKENS];
    float *s[TOKENS];
    for (int first = 0; first < heads; first += TOKENS) {
        int count = heads - first < TOKENS ? heads - first : TOKENS;
        for (int h = 0; h < count; h++) q[h] = query + (first + h) * key, s[h] = scores + (first + h) * stride;
        for (int64_t start = begin; start < length; start += here) {
            const float *block = block_of(store, table, size, width, start, length, &here) + key_start;
            for (int64_t i = 0; i < here; i += OUTPUTS) {
                int outputs = here - i < OUTPUTS ? (int)(here - i) : OUTPUTS;
                tile(q, count, block + i * width, width, key, s, start - begin + i, outputs);
            }
        }
        for (int h = 0; h < count; h++) softmax(s[h], length - begin, scale);
        for (int h = 0; h < count; h++) memset(out + (first + h) * value, 0, value * sizeof(float));
        for (int64_t start = begin; start < length; start += here) {
            const float *block = block_of(store, table, size, width, start, length, &here) + value_start;
            for (int h = 0; h < count; h++) {
                float *o = out + (first + h) * value;
                const float *p = s[h] + start - begin;
                int64_t c = 0;
                for (; c + LANES <= value; c += LANES) {
                    part sum[PARTS];
                    for (int at = 0; at < PARTS; at++) sum[at] = load(o + c + at * PART);
                    for (int64_t i = 0; i < here; i++)
                        for (int at = 0; at < PARTS; at++) sum[at] += p[i] * load(block + i * width + c + at * PART);
                    for (int at = 0; at < PARTS; at++) put(o + c + at * PART, sum[at]);
                }
                for (; c < value; c++)
                    for (int64_t i = 0; i < here; i++) o[c] = fmaf(p[i], block[i * width + c], o[c]);
            }
        }
    }
}

static int64_t longest(const Pass *pass) {
    int64_t most = 0;
    for (int64_t t = 0; t < pass->tokens; t++)
        if (pass->lengths[t] > most) most = pass->lengths[t];
    return (most + LANES - 1) / LANES * LANES;
}

/* Rows [N, heads * value] of a latent layer's attention, before the output projection. */
static void latent_attention(const Layer *layer, const Pass *pass, float *store, float *const *x, float *out) {
    int64_t n = pass->tokens, heads = layer->heads, rank = layer->rank, rope = layer->rope, nope = layer->nope;
    int64_t width = rank + rope, q_size = heads * (nope + rope);
    float *entries = floats(n * width), *q = floats(n * q_size);
    float **entry_rows = rows_of(entries, n, width), **q_rows = rows_of(q, n, q_size);
    if (layer->q_a.weight) {
        float *compressed = floats(n * layer->q_a.out);
        float **rows = rows_of(compressed, n, layer->q_a.out);
        linear(&layer->q_a, x, n, rows, pass->threads);
        for (int64_t t = 0; t < n; t++) norm(&layer->q_norm, rows[t], rows[t], layer->q_a.out);
        linear(&layer->q, rows, n, q_rows, pass->threads);
    } else
        linear(&layer->q, x, n, q_rows, pass->threads);
    linear(&layer->kv_a, x, n, entry_rows, pass->threads);
    for (int64_t t = 0; t < n; t++) {
        const float *cos = pass->cos + t * rope / 2, *sin = pass->sin + t * rope / 2;
        norm(&layer->kv_norm, entry_rows[t], entry_rows[t], rank);
        rotate_pairs(entry_rows[t] + rank, cos, sin, (int)rope);
        memcpy(store + pass->places[t] * width, entry_rows[t], width * sizeof(float));
        for (int64_t h = 0; h < heads; h++) rotate_pairs(q_rows[t] + h * (nope + rope) + nope, cos, sin, (int)rope);
    }
    float *query = floats(n * heads * width), *context = floats(n * heads * rank);
    int64_t span = longest(pass), threads = pass->threads;
    float *scores = floats(n * heads * span);
    float **from = take(n * heads * sizeof(float *)), **to = take(n * heads * sizeof(float *));
    for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < n; t++) {
            from[h * n + t] = q_rows[t] + h * (nope + rope);
            to[h * n + t] = query + (t * heads + h) * width;
            memcpy(to[h * n + t] + rank, from[h * n + t] + nope, rope * sizeof(float));
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < heads; h++)
        product((const float *const *)from + h * n, (int)n, layer->up_key + h * rank * nope, nope, rank, to + h * n, 1);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < n; t++)
        attend(pass, store, width, t, query + t * heads * width, (int)heads, 0, width, 0, rank, 0, layer->scale,
               scores + t * heads * span, context + t * heads * rank);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < n; t++) {
            from[h * n + t] = context + (t * heads + h) * rank;
            to[h * n + t] = out + (t * heads + h) * layer->value;
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < heads; h++)
        product((const float *const *)from + h * n, (int)n, layer->up_value + h * layer->value * rank, rank,
                layer->value, to + h * n, 1);
}

/* Rows [N, heads * size] of grouped-query attention, before the output projection. */
static void grouped_attention(const Layer *layer, const Pass *pass, float *store, float *const *x, float *out) {
    int64_t n = pass->tokens, heads = layer->heads, kv_heads = layer->kv_heads, size = layer->value;
    int64_t keys = kv_heads * size, width = 2 * keys, group = heads / kv_heads;
    float *entries = floats(n * width), *q = floats(n * heads * size);
    float **key_rows = rows_of(entries, n, width), **value_rows = rows_of(entries + keys, n, width);
    float **q_rows = rows_of(q, n, heads * size);
    linear(&layer->q, x, n, q_rows, pass->threads);
    linear(&layer->k, x, n, key_rows, pass->threads);
    linear(&layer->v, x, n, value_rows, pass->threads);
    for (int64_t t = 0; t < n; t++) {
        const float *cos = pass->cos + t * size / 2, *sin = pass->sin + t * size / 2;
        norm_heads(&layer->q_norm, q_rows[t], heads, size);
        norm_heads(&layer->kv_norm, key_rows[t], kv_heads, size);
        for (int64_t h = 0; h < heads; h++) rotate_halves(q_rows[t] + h * size, cos, sin, (int)size);
        for (int64_t h = 0; h < kv_heads; h++) rotate_halves(key_rows[t] + h * size, cos, sin, (int)size);
        memcpy(store + pass->places[t] * width, key_rows[t], width * sizeof(float));
    }
    int64_t span = longest(pass), threads = pass->threads;
    float *scores = floats(n * heads * span);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < n; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t first = t * heads + h * group;
            attend(pass, store, width, t, q + first * size, (int)group, h * size, size, keys + h * size, size,
                   layer->window, layer->scale, scores + first * span, out + first * size);
        }
}

/* --- experts */

static void gated(const Mlp *mlp, float *const *x, int64_t n, float *const *y, int threads) {
    int64_t width = mlp->gate.out;
    float *gate = floats(n * width), *up = floats(n * width);
    float **gate_rows = rows_of(gate, n, width), **up_rows = rows_of(up, n, width);
    linear(&mlp->gate, x, n, gate_rows, threads);
    linear(&mlp->up, x, n, up_rows, threads);
    for (int64_t t = 0; t < n; t++) silu_times(gate_rows[t], up_rows[t], width);
    linear(&mlp->down, gate_rows, n, y, threads);
}

/* The place of the largest that is not taken, also where none of them is a number. */
static int best(const float *x, const char *taken, int count) {
    int place = -1;
    for (int i = 0; i < count; i++)
        if (!taken[i] && (place < 0 || x[i] > x[place])) place = i;
    return place;
}

/* Experts chosen for one token by score + bias, the likeliest first, and their weights by the score alone. */
static void choose(const Layer *layer, float *scores, float *biased, int32_t *chosen, float *weights) {
    int experts = layer->experts, size = experts / layer->groups;
    char taken[experts];
    memset(taken, 0, experts);
    float most = scores[best(scores, taken, experts)], sum = 0;
    for (int e = 0; e < experts; e++) {
        scores[e] = layer->softmax ? expf(scores[e] - most) : 1.0f / (1.0f + expf(-scores[e]));
        sum += scores[e];
    }
    for (int e = 0; e < experts; e++) {
        if (layer->softmax) scores[e] /= sum;
        biased[e] = layer->router_bias ? scores[e] + layer->router_bias[e] : scores[e];
    }
    if (layer->top_groups < layer->groups) {
        float by_group[layer->groups];
        for (int g = 0; g < layer->groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int e = g * size; e < (g + 1) * size; e++) {
                if (biased[e] > first) second = first, first = biased[e];
                else if (biased[e] > second) second = biased[e];
            }
            by_group[g] = size > 1 ? first + second : first;
        }
        for (int closed = layer->groups - layer->top_groups; closed > 0; closed--) {
            int worst = -1;
            for (int g = 0; g < layer->groups; g++)
                if (by_group[g] < INFINITY && (worst < 0 || by_group[g] <= by_group[worst])) worst = g;
            if (worst < 0) break;
            by_group[worst] = INFINITY;
            for (int e = worst * size; e < (worst + 1) * size; e++) biased[e] = -INFINITY;
        }
    }
    float chosen_sum = 0;
    for (int k = 0; k < layer->top_k; k++) {
        chosen[k] = best(biased, taken, experts);
        weights[k] = scores[chosen[k]];
        chosen_sum += weights[k];
        taken[chosen[k]] = 1;
    }
    for (int k = 0; k < layer->top_k; k++)
        weights[k] = (layer->normalise ? weights[k] / (chosen_sum + 1e-20f) : weights[k]) * layer->routed_scale;
}

/* y[t] = shared expert + weighted routed experts of x[t], experts in ascending order. Their numbers are noted from
   column `route` of the pass's routes on. */
static void mixture(const Layer *layer, const Pass *pass, int route, float *const *x, float *const *y) {
    int64_t n = pass->tokens, size = pass->hidden, width = layer->expert_width;
    int experts = layer->experts, top_k = layer->top_k;
    if (layer->mlp.gate.weight) gated(&layer->mlp, x, n, y, pass->threads);
    else
        for (int64_t t = 0; t < n; t++) memset(y[t], 0, size * sizeof(float));
    float *scores = floats(n * experts), *biased = floats(experts), *weights = floats(n * top_k);
    int32_t *chosen = take(n * top_k * sizeof(int32_t));
    float **score_rows = rows_of(scores, n, experts);
    product((const float *const *)x, (int)n, layer->router, size, experts, score_rows, pass->threads);
    for (int64_t t = 0; t < n; t++) choose(layer, score_rows[t], biased, chosen + t * top_k, weights + t * top_k);
    if (pass->routes)
        for (int64_t t = 0; t < n; t++)
            for (int k = 0; k < top_k; k++)
                pass->routes[pass->places[t] * pass->route_width + route + k] = (int16_t)chosen[t * top_k + k];
    float *inner = floats(n * 2 * width), *outer = floats(n * size), *share = floats(n);
    float **inner_rows = rows_of(inner, n, 2 * width), **outer_rows = rows_of(outer, n, size);
    float **mine = take(n * sizeof(float *)), **target = take(n * sizeof(float *));
    for (int e = 0; e < experts; e++) {
        int count = 0;
        for (int64_t t = 0; t < n; t++)
            for (int k = 0; k < top_k; k++)
                if (chosen[t * top_k + k] == e) {
                    mine[count] = x[t], target[count] = y[t], share[count] = weights[t * top_k + k];
                    count++;
                }
        if (!count) continue;
        const float *in_scale = layer->gate_up_scale ? layer->gate_up_scale + e * 2 * width : NULL;
        const float *out_scale = layer->down_scale ? layer->down_scale + e * size : NULL;
        scaled_product(mine, count, layer->gate_up + e * 2 * width * size, in_scale, size, 2 * width, inner_rows,
                       pass->threads);
        for (int i = 0; i < count; i++) silu_times(inner_rows[i], inner_rows[i] + width, width);
        scaled_product(inner_rows, count, layer->down + e * size * width, out_scale, width, size, outer_rows,
                       pass->threads);
        for (int i = 0; i < count; i++)
            for (int64_t c = 0; c < size; c++) target[i][c] = fmaf(share[i], outer_rows[i][c], target[i][c]);
    }
}

/* --- what is called from outside */

static size_t scratch(const Layer *layer, const Pass *pass) {
    size_t n = pass->tokens, width = layer->latent ? layer->rank + layer->rope : 2 * layer->kv_heads * layer->value;
    size_t q = layer->heads * (layer->nope + layer->rope + layer->value), heads = layer->heads;
    size_t inner = layer->mlp.gate.out > layer->expert_width ? layer->mlp.gate.out : layer->expert_width;
    size_t widest = pass->hidden > heads * layer->value ? pass->hidden : heads * layer->value;
    if (inner > widest) widest = inner;
    size_t each = 4 * pass->hidden + widest + layer->q_a.out + width + q + layer->q_a.out + heads * (width + layer->rank + longest(pass));
    each += heads * layer->value + 4 * inner + 2 * layer->experts + 2 * layer->top_k + 64;
    return n * each * sizeof(float) + n * (28 + 2 * heads) * sizeof(float *) + 4096 * 4 + layer->experts * 4;
}

/* x [N, D] through `count` layers, in place; `stores` has the cache of each. -1 if memory is short. */
int isthmus_layers(const Layer *layers, int64_t count, const Pass *pass, float *const *stores, float *x) {
    int64_t n = pass->tokens, size = pass->hidden;
    int route = 0;
    for (int64_t index = 0; index < count; index++) {
        const Layer *layer = layers + index;
        if (reserve(scratch(layer, pass))) return -1;
        int64_t context = (int64_t)layer->heads * layer->value;
        float *normed = floats(n * size), *attended = floats(n * context), *added = floats(n * size);
        float **normed_rows = rows_of(normed, n, size), **attended_rows = rows_of(attended, n, context);
        float **added_rows = rows_of(added, n, size);
        for (int64_t t = 0; t < n; t++) norm(&layer->input_norm, x + t * size, normed_rows[t], size);
        if (layer->latent) latent_attention(layer, pass, stores[index], normed_rows, attended);
        else grouped_attention(layer, pass, stores[index], normed_rows, attended);
        linear(&layer->output, attended_rows, n, added_rows, pass->threads);
        for (int64_t i = 0; i < n * size; i++) x[i] += added[i];
        for (int64_t t = 0; t < n; t++) norm(&layer->post_norm, x + t * size, normed_rows[t], size);
        if (layer->experts) mixture(layer, pass, route, normed_rows, added_rows), route += layer->top_k;
        else gated(&layer->mlp, normed_rows, n, added_rows, pass->threads);
        for (int64_t i = 0; i < n * size; i++) x[i] += added[i];
    }
    return 0;
}

/* y [N, out] = norm(x) [N, in] times weight [out, in]; no norm if its weight is null. */
int isthmus_head(const Norm *before, const float *weight, const float *x, int64_t n, int64_t in, int64_t out, float *y,
                 int32_t threads) {
    if (reserve(n * in * sizeof(float) + 2 * n * sizeof(float *) + 4096)) return -1;
    float *normed = floats(n * in);
    float **from = rows_of(normed, n, in), **to = rows_of(y, n, out);
    for (int64_t t = 0; t < n; t++)
        if (before->weight) norm(before, x + t * in, from[t], in);
        else memcpy(from[t], x + t * in, in * sizeof(float));
    product((const float *const *)from, (int)n, weight, in, out, to, threads);
    return 0;
}

int64_t isthmus_layer_bytes(void) { return sizeof(Layer); }
