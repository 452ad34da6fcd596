// A decoding step in one call: a plan is a flat list of operations with their pointers, which `plan.py` makes
// once from the modules of a model. One team of threads runs all of it, and meets after each operation.
// Every operation rounds its result to the model's dtype, as PyTorch's operators do.

#include "kernels.c"
#include "blocks.c"
#include "prefill.c"

enum { EMBED, LAYER_NORM, RMS_NORM, PRODUCT, ROTATE, ATTEND, ACTIVATE, GATE, ADD, REORDER, KEEP, HEAD };
enum { TRANSPOSED = 8, INT8_WEIGHTS, SAME, INT8_GROUPS };  // weights, beside INT8 and INT4
enum { GELU_TANH, GELU, SILU, RELU, RELU2 };  // activations

// Heads of `width` numbers: `row` numbers from one row of x to the next, `head` from one head to the next.
typedef struct {
    long heads, width, row, head;
} Heads;

typedef struct {
    long what, which;  // which: of EMBED the ids, of PRODUCT the weights, of ACTIVATE and GATE the function
    char *in, *other, *third, *out;  // out: NULL for the result of the step
    const char *weight, *bias;
    Layer layers[3];
    long count;  // of layers
    Heads heads, others;
    long layer, window, rows;  // rows: of an embedding
    double number;             // eps, or the scale of the scores
} Op;

// Where a layer's keys and values are: (B, K, S, D), D side by side; of 8 bits with their scale behind them.
typedef struct {
    char *keys, *values;
    long key_batch, key_head, key_row, value_batch, value_head, value_row;
} Cache;

typedef struct {
    const int64_t *ids[3];  // (M,) tokens, positions and token types
    const char *embeds;     // (M, C) instead of tokens, or NULL
    const char *cosine, *sine;
    long tables, R;     // rows of the tables: one for each position, or 0: one for each row of x
    long M, T, past;    // rows of x, T of each sequence; positions in the cache
    const float *mask;  // (B, past + T) to add, or NULL
    const Cache *cache;
    char *y;        // (M, C), or with a head the logits of the last `kept` rows of each sequence
    long kept;
    long int8;      // whether the cache has 8 bits
} Step;

typedef struct {
    long kind, count;
    const Op *ops;
    char *scratch;
    long single, backoff;  // steps to go with one thread, and how many at the next time
} Plan;

// Where an operation writes its rows.
INLINE char *result_of(const Op *op, const Step *step) { return op->out ? op->out : step->y; }

// ---- Operations -------------------------------------------------------------------------------------------

enum { TOKENS, POSITIONS, TYPES };  // which ids

static void embed(const Team *team, const Plan *plan, const Step *step, const Op *op) {
    const long C = op->heads.width, bytes = C * size_of(plan->kind);
    if (op->which == TYPES && !step->ids[TYPES]) return;
    SHARED(m, step->M, 1) {
        const char *row = op->which == TOKENS && step->embeds ? step->embeds + m * bytes
                                                         : op->weight + step->ids[op->which][m] * bytes;
        char *to = op->out + m * bytes;
        if (!op->in) memcpy(to, row, bytes);
        for (long i = 0; op->in && i < C; i += 16) {
            const __mmask16 mask = first(C - i);
            __m512 sum = _mm512_add_ps(load(to, plan->kind, i, mask), load(row, plan->kind, i, mask));
            store(to, plan->kind, i, mask, sum);
        }
    }
}

// Each head, or the whole row: (x - mean) / sqrt(variance + eps) * weight + bias.
static void layer_norm(const Team *team, int kind, const Step *step, const Op *op) {
    const long C = op->heads.width, H = op->heads.heads, size = size_of(kind);
    SHARED(r, step->M * H, 1) {
        const long at = (r / H * op->heads.row + r % H * op->heads.head) * size;
        const char *x = op->in + at;
        char *y = result_of(op, step) + at;
        __m512 sum = _mm512_setzero_ps(), square = sum;
        for (long i = 0; i < C; i += 16) sum = _mm512_add_ps(sum, load(x, kind, i, first(C - i)));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
        for (long i = 0; i < C; i += 16) {
            __m512 v = _mm512_maskz_sub_ps(first(C - i), load(x, kind, i, first(C - i)), mean);
            square = _mm512_fmadd_ps(v, v, square);
        }
        const __m512 part = _mm512_set1_ps(1.f / sqrtf(_mm512_reduce_add_ps(square) / C + (float)op->number));
        for (long i = 0; i < C; i += 16) {
            const __mmask16 m = first(C - i);
            __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x, kind, i, m), mean), part);
            v = op->weight ? _mm512_mul_ps(v, load(op->weight, kind, i, m)) : v;
            store(y, kind, i, m, op->bias ? _mm512_add_ps(v, load(op->bias, kind, i, m)) : v);
        }
    }
}

static void multiply(const Team *team, const Plan *plan, const Op *op, long M, const Layer *layers) {
    const long K = op->heads.width, kind = plan->kind;
    float *numbers = (float *)plan->scratch;
    uint8_t *bytes = (uint8_t *)(numbers + 64);  // behind the scales of the rows
    if (op->which == INT8) return int8_part(team, op->in, layers, op->count, kind, M, K, bytes, numbers);
    if (op->which == INT8_WEIGHTS)
        return int8_weights_part(team, op->in, layers, op->count, kind, M, K, bytes, numbers);
    if (op->which == INT8_GROUPS)
        return int8_groups_part(team, op->in, layers, op->count, kind, M, K, plan->scratch);
    if (op->which == INT4) return int4_part(team, op->in, layers, op->count, kind, M, K, plan->scratch);
    const char *x = op->in;
    if (kind == FLOAT16 || (kind == BFLOAT16 && (op->which == TRANSPOSED || !PAIRS))) {
        SHARED(i, M * K, 16) {
            const __mmask16 m = first(M * K - i);
            store(numbers, FLOAT32, i, m, load(x, kind, i, m));
        }
        meet(team);
        x = plan->scratch;
    }
    if (op->which == SAME) return product_part(team, x, layers, op->count, kind, M, K);
    for (int i = 0; i < op->count; i++) {
        const Result to = {0, layers[i].bias, layers[i].y, kind, M, layers[i].N};
        transposed_part(team, (const float *)x, layers[i].w, kind, K, layers[i].stride, &to);
    }
}

// The last rows of each sequence.
static void keep(const Team *team, int kind, const Step *step, const Op *op) {
    const long bytes = op->heads.width * size_of(kind);
    SHARED(m, step->M / step->T * step->kept, 1) {
        const long from = m / step->kept * step->T + step->T - step->kept + m % step->kept;
        memcpy(op->out + m * bytes, op->in + from * bytes, bytes);
    }
}

// The output layer, over the last rows of each sequence.
static void head(const Team *team, const Plan *plan, const Step *step, const Op *op) {
    const long rows = step->M / step->T * step->kept;
    Layer layer = op->layers[0];
    layer.y = step->y;
    multiply(team, plan, op, rows, &layer);
}

// q and k in place.
static void rotate_heads(const Team *team, int kind, const Step *step, const Op *op) {
    const long size = size_of(kind), H = op->heads.heads, all = H + op->others.heads;
    SHARED(r, step->M * all, 1) {
        const long m = r / all, h = r % all;
        const Heads *heads = h < H ? &op->heads : &op->others;
        char *x = h < H ? op->in + (m * heads->row + h * heads->head) * size
                        : op->other + (m * heads->row + (h - H) * heads->head) * size;
        const long table = (step->tables ? step->ids[POSITIONS][m] : m) * step->R * size;
        rotate_one(x, step->cosine + table, step->sine + table, x, kind, step->R, step->R);
    }
}

// A row of D numbers to where the cache has it.
static void append(const char *row, int kind, int stored, long D, char *to) {
    if (stored != INT8) {
        memcpy(to, row, D * size_of(kind));
        return;
    }
    const float scale = round_row(row, kind, 0, D, (int8_t *)to);
    memcpy(to + D, &scale, sizeof scale);
}

// Keys and values go to the cache; then each query sees those up to its own, in its window.
static void attend(const Team *team, int kind, const Step *step, const Op *op) {
    const long K = op->others.heads, G = op->heads.heads / K, D = op->heads.width, size = size_of(kind);
    const long some = (G * D + 16) / 16 * 16, S = step->past + step->T;
    const int stored = step->int8 ? INT8 : kind, bytes = size_of(stored);
    const Cache *cache = step->cache + op->layer;
    const long key_row = cache->key_row * bytes, value_row = cache->value_row * bytes;
    float *sum = aligned_alloc(64, (3 * some + G * S + 48) / 16 * 64), *wide = sum + some;
    float *scores = wide + some;
    char *own = (char *)(scores + (G * S + 15) / 16 * 16);
    SHARED(h, step->M / step->T * K, 1) {
        const long b = h / K, n = h % K;
        char *keys = cache->keys + (b * cache->key_batch + n * cache->key_head) * bytes;
        char *values = cache->values + (b * cache->value_batch + n * cache->value_head) * bytes;
        for (long t = 0; t < step->T; t++) {
            const long from = ((b * step->T + t) * op->others.row + n * op->others.head) * size;
            append(op->other + from, kind, stored, D, keys + (step->past + t) * key_row);
            append(op->third + from, kind, stored, D, values + (step->past + t) * value_row);
        }
        for (long t = 0; t < step->T; t++) {
            const long m = b * step->T + t, end = step->past + t + 1;
            const long start = op->window && end > op->window ? end - op->window : 0;
            for (long g = 0; g < G; g++) {
                const char *q = op->in + (m * op->heads.row + (n * G + g) * op->heads.head) * size;
                memcpy(own + g * D * size, q, D * size);
            }
            const char *k = keys + start * key_row, *v = values + start * value_row;
            const float *bias = step->mask ? step->mask + b * S + start : 0;
            heads_of(own, k, v, k, bias, 0, op->out + (m * K + n) * G * D * size, kind, stored,
                     (float)op->number, G, end - start, D, cache->key_row, cache->value_row, scores, sum,
                     wide);
        }
    }
    free(sum);
}

INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f), below = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x));
    const __m512 e = power_of_e(below);
    const __m512 part = _mm512_div_ps(one, _mm512_add_ps(one, e));
    return _mm512_mask_mul_ps(part, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), part, e);
}

INLINE __m512 activated(__m512 x, int function) {
    if (function == SILU) return _mm512_mul_ps(x, sigmoid(x));
    if (function == GELU_TANH) {  // (1 + tanh u) / 2 is the sigmoid of 2 u
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.5957691216f))));
    }
    if (function == GELU) {
        float v[16];
        _mm512_storeu_ps(v, x);
        for (int i = 0; i < 16; i++) v[i] = 0.5f * v[i] * (1.f + erff(v[i] * 0.70710678f));
        return _mm512_loadu_ps(v);
    }
    const __m512 y = _mm512_max_ps(_mm512_setzero_ps(), x);  // NaN stays NaN, as the second operand
    return function == RELU2 ? _mm512_mul_ps(y, y) : y;
}

static void activate(const Team *team, int kind, const Step *step, const Op *op) {
    const long n = step->M * op->heads.width;
    SHARED(i, n, 16) {
        const __mmask16 m = first(n - i);
        store(op->out, kind, i, m, activated(load(op->in, kind, i, m), op->which));
    }
}

// SwiGLU: rows of [gate | up] become up times the activated gate.
static void gate_and_up(const Team *team, int kind, const Step *step, const Op *op) {
    const long F = op->heads.width, parts = (F + 15) / 16;
    SHARED(r, step->M * parts, 1) {
        const long m = r / parts, i = r % parts * 16;
        const __mmask16 mask = first(F - i);
        __m512 gate = rounded(activated(load(op->in, kind, m * 2 * F + i, mask), op->which), kind);
        __m512 up = load(op->in, kind, m * 2 * F + F + i, mask);
        store(op->out, kind, m * F + i, mask, _mm512_mul_ps(up, gate));
    }
}

static void add(const Team *team, int kind, const Step *step, const Op *op) {
    const long n = step->M * op->heads.width;
    char *y = result_of(op, step);
    SHARED(i, n, 16) {
        const __mmask16 m = first(n - i);
        store(y, kind, i, m, _mm512_add_ps(load(op->in, kind, i, m), load(op->other, kind, i, m)));
    }
}

// Inputs of weights whose groups are scattered, in the order of the groups: `weight` has their indices.
static void reorder(const Team *team, int kind, const Step *step, const Op *op) {
    const long K = op->heads.width, size = size_of(kind);
    const int32_t *order = (const int32_t *)op->weight;
    SHARED(m, step->M, 1)
        for (long k = 0; k < K; k++) {
            if (size == 4) ((float *)op->out)[m * K + k] = ((float *)op->in)[m * K + order[k]];
            else ((uint16_t *)op->out)[m * K + k] = ((uint16_t *)op->in)[m * K + order[k]];
        }
}

// ---- A step -----------------------------------------------------------------------------------------------

static void run_op(const Team *team, const Plan *plan, const Step *step, const Op *op) {
    const int kind = plan->kind;
    switch (op->what) {
    case EMBED: return embed(team, plan, step, op);
    case LAYER_NORM: return layer_norm(team, kind, step, op);
    case RMS_NORM:
        return rms_norm_part(team, op->in, op->weight, result_of(op, step), kind, op->number, step->M,
                             op->heads.width);
    case PRODUCT: return multiply(team, plan, op, step->M, op->layers);
    case ROTATE: return rotate_heads(team, kind, step, op);
    case ATTEND: return attend(team, kind, step, op);
    case ACTIVATE: return activate(team, kind, step, op);
    case GATE: return gate_and_up(team, kind, step, op);
    case ADD: return add(team, kind, step, op);
    case REORDER: return reorder(team, kind, step, op);
    case KEEP: return keep(team, kind, step, op);
    case HEAD: return head(team, plan, step, op);
    }
}

// Whether every id has a row in its embedding, and every position in the tables.
static int fits(const Plan *plan, const Step *step) {
    for (long i = 0; i < plan->count; i++) {
        const Op *op = plan->ops + i;
        if (op->what != EMBED || (op->which == TOKENS && step->embeds)) continue;
        if (op->which == TYPES && !step->ids[TYPES]) continue;
        for (long m = 0; m < step->M; m++)
            if (step->ids[op->which][m] < 0 || step->ids[op->which][m] >= op->rows) return 0;
    }
    for (long m = 0; step->tables && m < step->M; m++)
        if (step->ids[POSITIONS][m] < 0 || step->ids[POSITIONS][m] >= step->tables) return 0;
    return 1;
}

// 0 for a step that cannot be: nothing is written then. Where the threads wait for each other more than a
// quarter of the time, others want the processors: the next steps are left to one thread.
int run_plan(Plan *plan, const Step *step, int threads) {
    if (!fits(plan, step)) return 0;
    if (plan->single > 0) plan->single--, threads = 1;
    Barrier barrier = {0};
    const long start = (long)__rdtsc();
#pragma omp parallel num_threads(threads)
    {
        const Team here = team_here(&barrier), *team = &here;
        for (long i = 0; i < plan->count; i++) {
            run_op(team, plan, step, plan->ops + i);
            if (i < plan->count - 1) meet(team);
        }
    }
    if (threads > 1) {
        const int crowded = barrier.waited > ((long)__rdtsc() - start) * threads / 4;
        plan->backoff = crowded ? (plan->backoff < 32 ? plan->backoff * 2 : 64) : 4;
        plan->single = crowded ? plan->backoff : 0;
    }
    return 1;
}
