// Products of few rows, products with int8 and int4 weights, RMSNorm, rotary embedding, attention of one
// query. It is written in the instructions of AVX-512; for processors that have others a header makes these
// out of them. `build.py` compiles it (through `plan.c`, a whole decoding step); `native.py` believes it only
// after it has given the right numbers.
//
// | entry point            | activations        | weights                  | called for rows of x          |
// |------------------------|--------------------|--------------------------|-------------------------------|
// | product                | float32, bf16, f16 | of the same dtype        | 1 to 16                       |
// | transposed_product     | float32, bf16, f16 | the same, stored [K, N]  | 1 to 16                       |
// | int8_product           | float32, bf16, f16 | int8; x becomes int8 too | any; another order from 36 on |
// | int8_weights_product   | float32, bf16, f16 | int8                     | 1 to 5 in bf16, else 1 to 32  |
// | int8_groups_product    | float32, bf16, f16 | int8 by groups           | 1 to 5 in bf16, else 1 to 32  |
// | int4_product           | float32, bf16, f16 | int4                     | 1 to 5 in bf16, else 1 to 32  |
// | bfloat16_product       | bf16               | int8, int4               | more than those above         |
// | dequantize             | float32, bf16, f16 | int8, int4               | -                             |
// | dequantize_blocks      | -                  | GGUF's (blocks.c)        | -                             |
// | whole_numbers_of_blocks | -                 | GGUF's Q8_0, Q4_0, Q4_1  | -                             |
// | to_int8, to_int4       | -                  | from float32, bf16, f16  | -                             |
// | rms_norm               | float32, bf16, f16 | of the same dtype        | any                           |
// | rotate                 | float32, bf16, f16 | -                        | any                           |
// | one_query              | float32, bf16, f16 | -; keys of 8 bits too    | 1 query for each sequence     |
// | w4a8_product           | float32, bf16, f16 | int4; x becomes int8 too | more than 16 (see prefill.c)  |
// | run_plan (plan.c)      | float32, bf16, f16 | all of these             | 1 to 16                       |
//
// Sums are in float32; those of int8_product are whole numbers.
//
// All of these read each weight once. What decides is how fast memory is read: straight through, one row of
// weights after the other, and each asked for in time.

#ifdef __AVX512F__
#include "avx512.h"
#elif defined __AVX2__
#include "avx2.h"
#elif defined __aarch64__
#include "neon.h"
#endif
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define UNROLL _Pragma("GCC unroll 8")  // so that sums stay in registers
#define INLINE static inline __attribute__((always_inline))
enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // what a number is stored as
enum { BLOCK = 64, NEAR = 1024 };  // outputs, and 4 bytes of inputs, that stay near while all rows of x pass
enum { AHEAD = 8192 };  // bytes of weights that are asked for before they are needed, into the next rows
#define ASK(p) \
    _mm_prefetch((const char *)(p), _MM_HINT_T1)  // into the second cache: x needs the first for itself
enum { MANY = 36 };  // rows of whole numbers from which it pays to lay weights out anew

// ---- Threads ----------------------------------------------------------------------------------------------
// A team is the threads of one parallel region. With a barrier they meet there: they wait actively for a
// moment, as long as a meeting takes that nobody disturbs, and then sleep, so that others get the processor.

enum { SPIN = 150000 };  // ticks of the clock: some 50 microseconds

typedef struct {
    _Atomic int arrived, turn, asleep;
    _Atomic long waited;  // ticks, of all threads
} Barrier;

typedef struct {
    int rank, size;
    Barrier *barrier;  // NULL: OpenMP's barrier
} Team;

INLINE Team team_here(Barrier *barrier) {
    return (Team){omp_get_thread_num(), omp_get_num_threads(), barrier};
}

static void futex(Barrier *barrier, int what, int value) {
    syscall(SYS_futex, (int *)&barrier->turn, what, value, 0, 0, 0);
}

static void wait_for_others(Barrier *barrier, int turn) {
    const long start = (long)__rdtsc();
    while (atomic_load(&barrier->turn) == turn) {
        if ((long)__rdtsc() - start < SPIN) {
            _mm_pause();
            continue;
        }
        atomic_fetch_add(&barrier->asleep, 1);
        futex(barrier, FUTEX_WAIT_PRIVATE, turn);
        atomic_fetch_sub(&barrier->asleep, 1);
    }
    atomic_fetch_add(&barrier->waited, (long)__rdtsc() - start);
}

static void meet(const Team *team) {
    Barrier *barrier = team->barrier;
    if (!barrier) {
#pragma omp barrier
        return;
    }
    const int turn = atomic_load(&barrier->turn);
    if (atomic_fetch_add(&barrier->arrived, 1) < team->size - 1) {
        wait_for_others(barrier, turn);
        return;
    }
    atomic_store(&barrier->arrived, 0);
    atomic_fetch_add(&barrier->turn, 1);
    if (atomic_load(&barrier->asleep)) futex(barrier, FUTEX_WAKE_PRIVATE, INT_MAX);
}

// A thread's part of 0 to n, in whole steps.
INLINE long first_of(const Team *team, long n, long step) {
    return (n + step - 1) / step * team->rank / team->size * step;
}

INLINE long last_of(const Team *team, long n, long step) {
    const long end = (n + step - 1) / step * (team->rank + 1) / team->size * step;
    return end < n ? end : n;
}

#define SHARED(i, n, step) \
    for (long i = first_of(team, n, step), i##_end = last_of(team, n, step); i < i##_end; i += step)

// ---- Numbers ----------------------------------------------------------------------------------------------

INLINE __mmask16 first(long n) { return n >= 16 ? 0xFFFF : (__mmask16)((1u << n) - 1); }

// Up to 16 numbers from index i on as float32, 0 for what is behind the end.
INLINE __m512 load(const void *p, int kind, long i, __mmask16 m) {
    if (kind == FLOAT32) return _mm512_maskz_loadu_ps(m, (const float *)p + i);
    if (kind == FLOAT16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
    if (kind == INT8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, (const int8_t *)p + i)));
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Whole stores are told apart: masked ones of 16 bits and less are slow on some processors.
INLINE void store(void *p, int kind, long i, __mmask16 m, __m512 v) {
    if (kind == FLOAT32) {
        if (m == 0xFFFF) _mm512_storeu_ps((float *)p + i, v);
        else _mm512_mask_storeu_ps((float *)p + i, m, v);
        return;
    }
    __m256i half = kind == FLOAT16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                   : (__m256i)_mm512_cvtneps_pbh(v);
    if (m == 0xFFFF) _mm256_storeu_si256((__m256i *)((uint16_t *)p + i), half);
    else _mm256_mask_storeu_epi16((uint16_t *)p + i, m, half);
}

INLINE void store_bytes(uint8_t *p, __mmask16 m, __m128i v) {
    if (m == 0xFFFF) _mm_storeu_si128((__m128i *)p, v);
    else _mm_mask_storeu_epi8(p, m, v);
}

INLINE int size_of(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

INLINE void store_one(void *p, int kind, long i, float v) {
    if (kind == FLOAT32) ((float *)p)[i] = v;
    else if (kind == FLOAT16)
        ((uint16_t *)p)[i] = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else ((uint16_t *)p)[i] = _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0);
}

INLINE float load_one(const void *p, int kind, long i) {
    if (kind == FLOAT32) return ((const float *)p)[i];
    if (kind == FLOAT16) return _cvtsh_ss(((const uint16_t *)p)[i]);
    return _mm_cvtss_f32(
        _mm_castsi128_ps(_mm_cvtsi32_si128((int32_t)((uint32_t)((const uint16_t *)p)[i] << 16))));
}

// e to the power of x, for x <= 0; 2e-7 off at most. NaN stays NaN, as the second operand of a maximum.
INLINE __m512 power_of_e(__m512 x) {
    x = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-104.f), x), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), f = _mm512_sub_ps(x, n);
    const float c[] = {
        1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f};
    __m512 y = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 7; i++) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(y, n);
}

// ---- A few rows -------------------------------------------------------------------------------------------
// y[m, n] = sum over k of x[m, k] w[n, k] + bias[n]; w is stored row by row, `stride` numbers apart. bfloat16
// with bfloat16 (`pairs`, if the target has PAIRS): two products and a sum in one instruction; else x is
// float32.

INLINE __m512 multiply_add(__m512 sum, const void *w, int kind, int pairs, const void *x, long i, long left) {
    if (pairs) {
        const uint16_t *a = (const uint16_t *)w + i, *b = (const uint16_t *)x + i;
        if (left >= 32)
            return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
        __mmask32 m = (1u << left) - 1;
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(m, a),
                                (__m512bh)_mm512_maskz_loadu_epi16(m, b));
    }
    return _mm512_fmadd_ps(load(w, kind, i, first(left)), load(x, FLOAT32, i, first(left)), sum);
}

// One row of w with one of x: straight through memory, as fast as it can be read.
INLINE float one_row(const void *x, const void *w, int kind, int pairs, long K) {
    const long step = pairs ? 32 : 16;
    __m512 sum[SUMS];
    UNROLL for (int u = 0; u < SUMS; u++)
        sum[u] = _mm512_setzero_ps();
    long k = 0;
    for (; k + SUMS * step <= K; k += SUMS * step) UNROLL for (int u = 0; u < SUMS; u++) {
            ASK((const char *)w + (k + u * step) * size_of(kind) + AHEAD);
            sum[u] = multiply_add(sum[u], w, kind, pairs, x, k + u * step, step);
        }
    for (; k < K; k += step) sum[0] = multiply_add(sum[0], w, kind, pairs, x, k, K - k);
    UNROLL for (int u = SUMS / 2; u; u /= 2)
        for (int i = 0; i < u; i++) sum[i] = _mm512_add_ps(sum[i], sum[i + u]);
    return _mm512_reduce_add_ps(sum[0]);
}

// R rows of w with M of x. What the next R rows have in this place is asked for in time.
INLINE void few_rows(int M, int R, const char *x, const char *w, int kind, int pairs, long K, long stride,
                     float *out) {
    const long step = pairs ? 32 : 16, size = size_of(kind);
    __m512 sum[X_ROWS][W_ROWS];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < R; r++)
            sum[m][r] = _mm512_setzero_ps();
    long k = 0;
    for (; k + step <= K; k += step) {
        UNROLL for (int r = 0; r < R; r++)
            ASK(w + ((R + r) * stride + k) * size);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int r = 0; r < R; r++)
                sum[m][r] = multiply_add(sum[m][r], w + r * stride * size, kind, pairs,
                                         x + m * K * (pairs ? 2 : 4), k, step);
    }
    if (k < K) UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int r = 0; r < R; r++)
                sum[m][r] = multiply_add(sum[m][r], w + r * stride * size, kind, pairs,
                                         x + m * K * (pairs ? 2 : 4), k, K - k);
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < R; r++)
            out[m * W_ROWS + r] = _mm512_reduce_add_ps(sum[m][r]);
}

// F of a constant from 1 to MOST.
#define OF_CONSTANT(MOST, M, F, ...) \
    switch (M) { \
    case 1: F(1, __VA_ARGS__); break; \
    case 2: F(2, __VA_ARGS__); break; \
    case 3: F(3, __VA_ARGS__); break; \
    case 4: if (MOST > 3) F(4, __VA_ARGS__); break; \
    case 5: if (MOST > 3) F(5, __VA_ARGS__); break; \
    default: if (MOST > 3) F(6, __VA_ARGS__); \
    }
#define OF_ROWS(M, F, ...) OF_CONSTANT(X_ROWS, M, F, __VA_ARGS__)

// How many of `left` rows are next.
INLINE int next_rows(long left) { return left < X_ROWS ? (int)left : X_ROWS; }

// One of several that read the same x, as those of q, k and v do: each stays where it is.
typedef struct {
    const void *w, *scale;  // scale: float32 for each row; 16 bits for each group; or NULL
    const void *zero;       // for each group: INT8 to take off before, floats to add after; or NULL
    const void *bias;       // of the kind of y, or NULL
    void *y;                // (M, N)
    long N, stride;         // stride: numbers from one row of w to the next
    long scale_kind, zero_kind, shift;  // a group has 32 << shift inputs
} Layer;

typedef struct {
    const float *scale;  // or NULL
    const void *bias;
    void *y;
    int kind;
    long M, N;
} Result;

INLINE void finish(const Result *to, long m, long n, float v) {
    if (to->scale) v *= to->scale[n];
    if (to->bias) v += load_one(to->bias, to->kind, n);
    store_one(to->y, to->kind, m * to->N + n, v);
}

// Up to W_ROWS rows of w, from n on, with all rows of x: both bfloat16 (`pairs`), or x float32.
INLINE void panel(const char *x, const char *w, int kind, int pairs, long K, long stride, const Result *to,
                  long n) {
    int R = to->N - n < W_ROWS ? (int)(to->N - n) : W_ROWS;
    for (long m = 0; m < to->M; m += X_ROWS) {
        int few = next_rows(to->M - m);
        const long size = pairs ? 2 : 4;
        float out[X_ROWS * W_ROWS];
        if (R == W_ROWS) { OF_ROWS(few, few_rows, W_ROWS, x + m * K * size, w, kind, pairs, K, stride, out) }
        for (int i = 0; i < few; i++)
            for (int r = 0; r < R; r++)
                finish(to, m + i, n + r,
                       R == W_ROWS ? out[i * W_ROWS + r]
                                   : one_row(x + (m + i) * K * size, w + r * stride * size_of(kind), kind,
                                             pairs, K));
    }
}

static void panel_of_pairs(const char *x, const char *w, long K, long stride, const Result *to, long n) {
    panel(x, w, BFLOAT16, 1, K, stride, to, n);
}

static void panel_of_floats(const char *x, const char *w, long K, long stride, const Result *to, long n) {
    panel(x, w, FLOAT32, 0, K, stride, to, n);
}

// x as float32, for all but bfloat16 with bfloat16. To be freed.
static float *widened(const void *x, int kind, long count) {
    float *wide = aligned_alloc(64, (count * 4 + 127) / 64 * 64);
    for (long i = 0; i < count; i += 16)
        store(wide, FLOAT32, i, first(count - i), load(x, kind, i, first(count - i)));
    return wide;
}

INLINE void rows_of(const void *x, const Layer *layer, int count, int kind, int pairs, long M, long K,
                    int out_kind, const Team *team) {
    const int whole = pairs ? BFLOAT16 : FLOAT32;
    {
        const int is_same = M == 1 || kind == whole || !PAIRS;
        char *own = is_same ? 0 : aligned_alloc(64, (K + 16) * 16);  // rows of w as x is
        for (int i = 0; i < count; i++) {
            const Result to = {0, layer[i].bias, layer[i].y, out_kind, M, layer[i].N};
            const long stride = layer[i].stride, step = M == 1 ? 1 : W_ROWS;
            SHARED(n, to.N, step) {
                const char *some = (const char *)layer[i].w + n * stride * size_of(kind);
                if (M == 1) {
                    finish(&to, 0, n, one_row(x, some, kind, pairs, K));
                    continue;
                }
                for (long r = 0; own && r < W_ROWS && n + r < to.N; r++)
                    for (long k = 0; k < K; k += 16)
                        store(own, whole, r * K + k, first(K - k),
                              load(some, kind, r * stride + k, first(K - k)));
                if (!PAIRS) {
                    panel(x, some, kind, 0, K, stride, &to, n);
                    continue;
                }
                (pairs ? panel_of_pairs : panel_of_floats)(x, own ? own : some, K, own ? K : stride, &to, n);
            }
        }
        free(own);
    }
}

// x: float32, or with PAIRS bfloat16 where w is.
static void product_part(const Team *team, const void *x, const Layer *layer, int count, int kind, long M,
                         long K) {
    if (kind == BFLOAT16) rows_of(x, layer, count, BFLOAT16, PAIRS, M, K, BFLOAT16, team);
    else if (kind == FLOAT16) rows_of(x, layer, count, FLOAT16, 0, M, K, FLOAT16, team);
    else rows_of(x, layer, count, FLOAT32, 0, M, K, FLOAT32, team);
}

// x (M, K), y (M, N) and w (N, K) are of one kind. With PAIRS, several rows of x in float16 share what W_ROWS
// rows of w become: float32.
void product(const void *x, const Layer *layer, int count, int kind, long M, long K, int threads) {
    float *wide = kind == BFLOAT16 && PAIRS ? 0 : widened(x, kind, M * K);
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        product_part(&team, wide ? (void *)wide : x, layer, count, kind, M, K);
    }
    free(wide);
}

// R inputs of M rows of x, 16 outputs a time: sum[m, n] += x[m, k] w[k, n], for `count` outputs.
INLINE void some_inputs(int M, int R, const float *x, long K, const char *w, int kind, long stride,
                        long count, float *sum, long room) {
    __m512 u[X_ROWS][4];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < R; r++)
            u[m][r] = _mm512_set1_ps(x[m * K + r]);
    for (long n = 0; n < count; n += 16) {
        const __mmask16 mask = first(count - n);
        __m512 v[4];
        UNROLL for (int r = 0; r < R; r++) {
            ASK(w + ((R + r) * stride + n) * size_of(kind));
            v[r] = load(w, kind, r * stride + n, mask);
        }
        UNROLL for (int m = 0; m < M; m++) {
            __m512 now = _mm512_load_ps(sum + m * room + n);
            UNROLL for (int r = 0; r < R; r++)
                now = _mm512_fmadd_ps(u[m][r], v[r], now);
            _mm512_store_ps(sum + m * room + n, now);
        }
    }
}

INLINE void columns_of(const float *x, const char *w, int kind, long K, long stride, const Result *to,
                       const Team *team) {
    const long room = ((to->N + team->size - 1) / team->size + 15) / 16 * 16;  // outputs of a thread
    SHARED(n, to->N, room) {
        const long count = to->N - n < room ? to->N - n : room;
        float *sum = aligned_alloc(64, to->M * room * 4);
        memset(sum, 0, to->M * room * 4);
        for (long k = 0; k < K; k += 4) {
            const char *some = w + (k * stride + n) * size_of(kind);
            for (long m = 0; m < to->M; m += X_ROWS) {
                int few = next_rows(to->M - m);
                if (K - k >= 4) {
                    OF_ROWS(few, some_inputs, 4, x + m * K + k, K, some, kind, stride, count, sum + m * room,
                            room)
                } else
                    for (long r = 0; r < K - k; r++)
                        OF_ROWS(few, some_inputs, 1, x + m * K + k + r, K, some + r * stride * size_of(kind),
                                kind, stride, count, sum + m * room, room)
            }
        }
        for (long m = 0; m < to->M; m++)
            for (long i = 0; i < count; i += 16) {
                __m512 v = _mm512_load_ps(sum + m * room + i);
                if (to->bias) v = _mm512_add_ps(v, load(to->bias, to->kind, n + i, first(count - i)));
                store(to->y, to->kind, m * to->N + n + i, first(count - i), v);
            }
        free(sum);
    }
}

static void transposed_part(const Team *team, const float *x, const void *w, int kind, long K, long stride,
                            const Result *to) {
    if (kind == BFLOAT16) columns_of(x, w, BFLOAT16, K, stride, to, team);
    else if (kind == FLOAT16) columns_of(x, w, FLOAT16, K, stride, to, team);
    else columns_of(x, w, FLOAT32, K, stride, to, team);
}

// The same with w stored [K, N], as GPT-1's is, x, w and y of one kind.
void transposed_product(const void *x, const void *w, const void *bias, void *y, int kind, long M, long N,
                        long K, long stride, int threads) {
    Result to = {0, bias, y, kind, M, N};
    float *wide = widened(x, kind, M * K);
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        transposed_part(&team, wide, w, kind, K, stride, &to);
    }
    free(wide);
}

// Groups of inputs: w = scale * q + offset. With a zero that is (q - zero) * scale, exactly, since a product
// of a scale of 11 bits and a number of 8 is a float32. A row has `parts` times 32 inputs; of these 16 times
// 32, from part g on, have these scales and offsets.
INLINE void groups_of(const Layer *layer, long n, long parts, long g, __m512 *scale, __m512 *offset) {
    const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const int shift = (int)layer->shift;
    const long row = (parts + (1L << shift) - 1) >> shift, at = g >> shift;
    const __mmask16 some = first(row - at) & (shift < 4 ? first(16 >> shift) : 1);
    const __m512i own = _mm512_srl_epi32(iota, _mm_cvtsi32_si128(shift));
    *scale = _mm512_permutexvar_ps(own, load(layer->scale, (int)layer->scale_kind, n * row + at, some));
    *offset = _mm512_setzero_ps();
    if (!layer->zero) return;
    *offset = _mm512_permutexvar_ps(own, load(layer->zero, (int)layer->zero_kind, n * row + at, some));
    if (layer->zero_kind == INT8) *offset = _mm512_fnmadd_ps(*scale, *offset, _mm512_setzero_ps());
}

// Row n of 4 bits, from part g on, as numbers of `kind`. Of each part a table says what its 16 numbers stand
// for; in 16 bits it holds them twice, since it is looked up with 5 bits.
INLINE void int4_row(const Layer *layer, long n, long parts, long g, void *to, int kind, long inputs) {
    const __m512 value = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i shift = _mm512_set1_epi64(4LL << 32);
    const uint8_t *w = (const uint8_t *)layer->w + (n * parts + g) * 16;
    __m512 scale = value, offset = value;  // until the first group
    for (long k = 0; k < inputs; k += 32) {
        if (k % 512 == 0) groups_of(layer, n, parts, g + k / 32, &scale, &offset);
        const __m512i own = _mm512_set1_epi32((int)(k / 32 % 16));
        __m512 table = _mm512_fmadd_ps(value, _mm512_permutexvar_ps(own, scale),
                                       _mm512_permutexvar_ps(own, offset));
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w + k / 2)));
        if (kind == FLOAT32 || !PAIRS) {
            for (int i = 0; i < 2 && k + i * 16 < inputs; i++) {
                __m512i q = _mm512_srlv_epi32(
                    _mm512_permutexvar_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(8 * i)), bytes), shift);
                store(to, kind, k + i * 16, first(inputs - k - i * 16), _mm512_permutexvar_ps(q, table));
            }
            continue;
        }
        __m256i half = kind == FLOAT16 ? _mm512_cvtps_ph(table, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                       : (__m256i)_mm512_cvtneps_pbh(table);
        __m512i q = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // one in each 16 bits
        __m512i v = _mm512_permutexvar_epi16(q, _mm512_broadcast_i64x4(half));
        if (inputs - k >= 32) _mm512_storeu_si512((uint16_t *)to + k, v);
        else _mm512_mask_storeu_epi16((uint16_t *)to + k, (1u << (inputs - k)) - 1, v);
    }
}

// The same of 8 bits, with a scale for each row or by groups.
INLINE void int8_row(const Layer *layer, long n, long k, void *to, int kind, long inputs) {
    const int8_t *w = (const int8_t *)layer->w + n * layer->stride + k;
    const int whole = layer->scale_kind == FLOAT32;
    __m512 scale = _mm512_set1_ps(whole ? ((const float *)layer->scale)[n] : 0), offset = _mm512_setzero_ps();
    __m512 scales = scale, offsets = offset;
    for (long i = 0; i < inputs; i += 16) {
        if (!whole && i % 512 == 0) groups_of(layer, n, layer->stride / 32, (k + i) / 32, &scales, &offsets);
        const __m512i own = _mm512_set1_epi32((int)(i / 32 % 16));
        if (!whole) scale = _mm512_permutexvar_ps(own, scales), offset = _mm512_permutexvar_ps(own, offsets);
        const __mmask16 m = first(inputs - i);
        store(to, kind, i, m, _mm512_fmadd_ps(load(w, INT8, i, m), scale, offset));
    }
}

INLINE __m512i signed_bytes(const int8_t *w, long left) {
    return left >= 64 ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8((1ULL << left) - 1, w);
}

INLINE int32_t sum_of_row(const int8_t *w, long inputs) {
    __m512i sum = _mm512_setzero_si512();
    for (long k = 0; k < inputs; k += 64)
        sum = multiply_bytes(sum, _mm512_set1_epi8(1), signed_bytes(w + k, inputs - k));
    return _mm512_reduce_add_epi32(sum);
}

// A row of sums of whole numbers, times its scales.
INLINE void finish_whole(const Result *to, long m, long n, int rows, float sx, const int32_t *sums,
                         const int32_t *out) {
    for (int r = 0; r < rows; r += 16) {
        __mmask16 mask = first(rows - r);
        __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, sums + r), 7);
        __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(out + r), shift));
        __m512 v =
            _mm512_mul_ps(sum, _mm512_mul_ps(_mm512_set1_ps(sx), load(to->scale, FLOAT32, n + r, mask)));
        if (to->bias) v = _mm512_add_ps(v, load(to->bias, to->kind, n + r, mask));
        store(to->y, to->kind, m * to->N + n + r, mask, v);
    }
}

// ---- Many rows --------------------------------------------------------------------------------------------
// BLOCK rows of w, and of these NEAR times 4 bytes, are laid out in strips of 16 rows with 4 bytes of each
// side by side: nothing has to be added up across a register, and what is read again for all rows of x lies
// near. 4 bytes are four whole numbers, or two of bfloat16, which 8 bits become exactly and 4 bits rounded;
// without PAIRS, one of float32.

enum { WIDE = PAIRS ? BFLOAT16 : FLOAT32 };

// `count` inputs of row n, from k on, as four bytes are; zeros behind them.
INLINE void near_row(int whole, const Layer *from, int kind, long inputs, long n, long k, long count,
                     char *to) {
    long bytes = whole ? count : size_of(WIDE) * count;
    memset(to + bytes / 64 * 64, 0, bytes % 64 ? 64 : 0);
    if (kind == INT4) int4_row(from, n, (inputs + 127) / 128 * 4, k / 32, to, WIDE, count);
    else if (kind == INT8 && !whole && from->scale_kind != FLOAT32) int8_row(from, n, k, to, WIDE, count);
    else if (!whole && !PAIRS)
        for (long i = 0, at = n * from->stride + k; i < count; i += 16)
            store(to, WIDE, i, first(count - i), load(from->w, kind, at + i, first(count - i)));
    else if (kind == INT8 && !whole) {
        for (long i = 0, at = n * from->stride + k; i < count; i += 32) {
            long left = count - i;
            __m512 low = load(from->w, INT8, at + i, first(left)),
                   high = load(from->w, INT8, at + i + 16, left > 16 ? first(left - 16) : 0);
            _mm512_store_si512(to + 2 * i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    } else memcpy(to, (const char *)from->w + (n * from->stride + k) * size_of(kind), bytes);
}

// 16 rows of 16 times 4 bytes, `NEAR` times 4 apart, become columns, `BLOCK` times 4 apart.
static void transpose_tile(const char *from, char *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(from + i * NEAR * 4);
    UNROLL for (int i = 0; i < 16; i += 2)
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]),
              a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {  // a quarter of a[4 j + i] is a quarter of a column
        __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88),
                more = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD),
                rest = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
        _mm512_store_si512(to + i * BLOCK * 4, _mm512_shuffle_i32x4(even, more, 0x88));
        _mm512_store_si512(to + (8 + i) * BLOCK * 4, _mm512_shuffle_i32x4(even, more, 0xDD));
        _mm512_store_si512(to + (4 + i) * BLOCK * 4, _mm512_shuffle_i32x4(odd, rest, 0x88));
        _mm512_store_si512(to + (12 + i) * BLOCK * 4, _mm512_shuffle_i32x4(odd, rest, 0xDD));
    }
}

INLINE __m512i multiply_wide(__m512i sum, __m512i x, __m512i w) {
    return PAIRS ? (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w)
                 : (__m512i)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
}

// M rows of x with W_ROWS strips, added to `out` [M][BLOCK] unless these are the first.
INLINE void strips(int M, int whole, const char *x, long stride, const char *w, long steps, int begin,
                   int32_t *out) {
    __m512i sum[X_ROWS][W_ROWS];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < W_ROWS; r++)
            sum[m][r] = begin ? _mm512_setzero_si512() : _mm512_load_si512(out + m * BLOCK + r * 16);
    for (long k = 0; k < steps; k++) {
        __m512i v[W_ROWS];
        UNROLL for (int r = 0; r < W_ROWS; r++)
            v[r] = _mm512_load_si512(w + k * BLOCK * 4 + r * 64);
        UNROLL for (int m = 0; m < M; m++) {
            int32_t four;
            memcpy(&four, x + m * stride + k * 4, 4);
            __m512i u = _mm512_set1_epi32(four);
            UNROLL for (int r = 0; r < W_ROWS; r++)
                sum[m][r] = whole ? multiply_bytes(sum[m][r], u, v[r]) : multiply_wide(sum[m][r], u, v[r]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < W_ROWS; r++)
            _mm512_store_si512(out + m * BLOCK + r * 16, sum[m][r]);
}

static void whole_strips(int M, const char *x, long stride, const char *w, long steps, int begin,
                         int32_t *out) {
    for (int r = 0; r < BLOCK / 16; r += W_ROWS)
        OF_ROWS(M, strips, 1, x, stride, w + r * 64, steps, begin, out + r * 16)
}

static void wide_strips(int M, const char *x, long stride, const char *w, long steps, int begin,
                        int32_t *out) {
    for (int r = 0; r < BLOCK / 16; r += W_ROWS)
        OF_ROWS(M, strips, 0, x, stride, w + r * 64, steps, begin, out + r * 16)
}

// x: rows of whole numbers with their scales (`whole`), or of WIDE numbers, `stride` bytes apart; what they
// have behind the last input is a number.
INLINE void many_rows(int whole, const char *x, long stride, const float *sx, const Layer *w, int kind,
                      long inputs, const Result *to, int threads) {
    const int unit = whole ? 1 : size_of(WIDE);
    const long part = NEAR * 4 / unit;
#pragma omp parallel num_threads(threads)
    {
        char *near = aligned_alloc(64, (BLOCK + 16) * NEAR * 4), *own = near + BLOCK * NEAR * 4;
        int32_t *out = aligned_alloc(64, to->M * BLOCK * 4);
#pragma omp for schedule(static)
        for (long n = 0; n < to->N; n += BLOCK) {
            int rows = to->N - n < BLOCK ? (int)(to->N - n) : BLOCK;
            int32_t sums[BLOCK] = {0};
            for (int r = 0; r < rows && whole && MOVED; r++)
                sums[r] = sum_of_row((const int8_t *)w->w + (n + r) * w->stride, inputs);
            for (long k = 0; k < inputs; k += part) {
                long count = inputs - k < part ? inputs - k : part;
                for (int r = 0; r < BLOCK; r++) {
                    char *row = own + r % 16 * NEAR * 4;
                    if (r < rows) near_row(whole, w, kind, inputs, n + r, k, count, row);
                    else memset(row, 0, NEAR * 4);
                    for (long i = 0; r % 16 == 15 && i < count * unit; i += 64)
                        transpose_tile(own + i, near + i * BLOCK + r / 16 * 64);
                }
                for (long m = 0; m < to->M; m += X_ROWS)
                    (whole ? whole_strips : wide_strips)(next_rows(to->M - m), x + m * stride + k * unit,
                                                         stride, near, (count * unit + 3) / 4, k == 0,
                                                         out + m * BLOCK);
            }
            for (long m = 0; m < to->M; m++) {
                if (whole) finish_whole(to, m, n, rows, sx[m], sums, out + m * BLOCK);
                else
                    for (int r = 0; r < rows; r += 16) {
                        __mmask16 mask = first(rows - r);
                        __m512 v = _mm512_load_ps((float *)out + m * BLOCK + r);
                        if (to->scale) v = _mm512_mul_ps(v, load(to->scale, FLOAT32, n + r, mask));
                        if (to->bias) v = _mm512_add_ps(v, load(to->bias, to->kind, n + r, mask));
                        store(to->y, to->kind, m * to->N + n + r, mask, v);
                    }
            }
        }
        free(near), free(out);
    }
}

// ---- 8 bits -----------------------------------------------------------------------------------------------
// y[m, n] = sx[m] sw[n] (whole x . whole w) + bias[n]. Each row of x has a scale of its own, so that no row
// depends on another. The instruction multiplies unsigned by signed: x is moved up by 128 (MOVED), and 128
// times the sum of w's row taken off again.

// The largest of |x|, NaN if one number is.
INLINE float largest(const void *x, int kind, long start, long inputs) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 none = 0;
    for (long k = 0; k < inputs; k += 16) {
        __m512 v = load(x, kind, start + k, first(inputs - k));
        top = _mm512_max_ps(top, _mm512_abs_ps(v)), none |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    return none ? NAN : _mm512_reduce_max_ps(top);
}

// One row of x: its scale, its whole numbers as bytes. `K` is rounded up to 64.
static float whole_numbers(const void *x, int kind, long start, long inputs, long K, uint8_t *q) {
    float scale = largest(x, kind, start, inputs) / 127.f;
    __m512 one = _mm512_set1_ps(scale > 0 ? scale : 1.f);
    memset(q + K - 64, MOVED, 64);
    for (long k = 0; k < inputs; k += 16) {
        __m512i n = _mm512_cvtps_epi32(_mm512_div_ps(load(x, kind, start + k, first(inputs - k)), one));
        store_bytes(q + k, first(inputs - k),
                    _mm512_cvtepi32_epi8(_mm512_add_epi32(n, _mm512_set1_epi32(MOVED))));
    }
    return scale;
}

// One row of w with one of x. The sum of w's row is taken on the way: it costs nothing while memory is waited
// for, where kept sums would have to be read.
INLINE int32_t one_whole_row(const uint8_t *x, const int8_t *w, long inputs) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[4], own[4];
    UNROLL for (int u = 0; u < 4; u++)
        sum[u] = own[u] = _mm512_setzero_si512();
    long k = 0;
    for (; k + 256 <= inputs; k += 256) UNROLL for (int u = 0; u < 4; u++) {
            __m512i v = _mm512_loadu_si512(w + k + u * 64);
            ASK(w + k + u * 64 + AHEAD);
            sum[u] = multiply_bytes(sum[u], _mm512_loadu_si512(x + k + u * 64), v);
            if (MOVED) own[u] = multiply_bytes(own[u], ones, v);
        }
    for (; k < inputs; k += 64) {
        __m512i v = signed_bytes(w + k, inputs - k);
        sum[0] = multiply_bytes(sum[0], _mm512_loadu_si512(x + k), v);
        if (MOVED) own[0] = multiply_bytes(own[0], ones, v);
    }
    UNROLL for (int u = 0; u < 4; u++)
        sum[u] = _mm512_sub_epi32(sum[u], _mm512_slli_epi32(own[u], 7));
    return _mm512_reduce_add_epi32(
        _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
}

// R rows of w with M of x.
INLINE void whole_rows(int M, int R, const uint8_t *x, long K, const int8_t *w, long inputs, int32_t *out) {
    __m512i sum[X_ROWS][W_ROWS];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < R; r++)
            sum[m][r] = _mm512_setzero_si512();
    for (long k = 0; k < inputs; k += 64) {
        __m512i v[W_ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            v[r] = signed_bytes(w + r * inputs + k, inputs - k);
            ASK(w + (r + R) * inputs + k);
        }
        UNROLL for (int m = 0; m < M; m++) {
            __m512i u = _mm512_loadu_si512(x + m * K + k);
            UNROLL for (int r = 0; r < R; r++)
                sum[m][r] = multiply_bytes(sum[m][r], u, v[r]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int r = 0; r < R; r++)
            out[m * BLOCK + r] = _mm512_reduce_add_epi32(sum[m][r]);
}

// Rows of x with up to BLOCK rows of w, from n on.
static void some_whole_rows(const uint8_t *x, const float *sx, long K, const int8_t *w, long inputs,
                            const Result *to, long n) {
    int rows = to->N - n < BLOCK ? (int)(to->N - n) : BLOCK;
    int32_t sums[BLOCK] = {0}, out[X_ROWS * BLOCK];
    for (int r = 0; r < rows && to->M > 1 && MOVED; r++) sums[r] = sum_of_row(w + (n + r) * inputs, inputs);
    for (long m = 0; m < to->M; m += X_ROWS) {
        int few = next_rows(to->M - m), r = 0;
        for (; r + W_ROWS <= rows && to->M > 1; r += W_ROWS)
            OF_ROWS(few, whole_rows, W_ROWS, x + m * K, K, w + (n + r) * inputs, inputs, out + r)
        for (; r < rows; r++)
            for (int i = 0; i < few; i++)
                out[i * BLOCK + r] =
                    one_whole_row(x + (m + i) * K, w + (n + r) * inputs, inputs) + 128 * sums[r];
        for (int i = 0; i < few; i++) finish_whole(to, m + i, n, rows, sx[m + i], sums, out + i * BLOCK);
    }
}

// q: room for M rows of K bytes, sx: for M numbers.
static void int8_part(const Team *team, const void *x, const Layer *layer, int count, int kind, long M,
                      long inputs, uint8_t *q, float *sx) {
    const long K = (inputs + 63) / 64 * 64;
    SHARED(m, M, 1) sx[m] = whole_numbers(x, kind, m * inputs, inputs, K, q + m * K);
    meet(team);
    for (int i = 0; i < (M < MANY ? count : 0); i++) {
        const Result to = {layer[i].scale, layer[i].bias, layer[i].y, kind, M, layer[i].N};
        SHARED(n, to.N, BLOCK) some_whole_rows(q, sx, K, layer[i].w, inputs, &to, n);
    }
}

void int8_product(const void *x, const Layer *layer, int count, int kind, long M, long inputs, int threads) {
    const long K = (inputs + 63) / 64 * 64;
    uint8_t *q = aligned_alloc(64, M * K);
    float *sx = malloc(M * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        int8_part(&team, x, layer, count, kind, M, inputs, q, sx);
    }
    for (int i = 0; i < (M < MANY ? 0 : count); i++) {
        const Result to = {layer[i].scale, layer[i].bias, layer[i].y, kind, M, layer[i].N};
        many_rows(1, (char *)q, K, sx, layer + i, INT8, inputs, &to, threads);
    }
    free(q), free(sx);
}

// The same without rounding x to 8 bits: it becomes whole numbers of 24 bits in three digits of 8, [3][K]. So
// the sums are exact, and no weight has to be made a float. The scale is a power of two, which costs x no
// bit. Digits are unsigned: where that is not how bytes are multiplied (MOVED is 0), x and w become float32.
static float digits(const void *x, int kind, long start, long inputs, long K, uint8_t *q) {
    const float top = largest(x, kind, start, inputs);
    int above;  // the power of two that is
    frexpf(top, &above);
    above = above < -100 ? -100 : above;
    const __m512 ones = _mm512_set1_ps(ldexpf(1, 23 - above));
    for (long k = 0; k < inputs; k += 16) {
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, kind, start + k, first(inputs - k)), ones));
        n = _mm512_add_epi32(_mm512_min_epi32(n, _mm512_set1_epi32((1 << 23) - 1)),
                             _mm512_set1_epi32(1 << 23));
        for (int i = 0; i < 3; i++, n = _mm512_srli_epi32(n, 8))
            store_bytes(q + i * K + k, first(inputs - k), _mm512_cvtepi32_epi8(n));
    }
    return isfinite(top) ? ldexpf(1, above - 23) : NAN;
}

INLINE double row_of_digits(const uint8_t *x, long K, const int8_t *w, long inputs) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[4][2];  // of each digit, and of w's row
    UNROLL for (int i = 0; i < 4; i++)
        sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    for (long k = 0; k < inputs; k += 128) UNROLL for (int u = 0; u < 2; u++) {
            const long at = k + u * 64;
            if (at >= inputs) break;
            __m512i v = signed_bytes(w + at, inputs - at);
            ASK(w + at + AHEAD);
            UNROLL for (int i = 0; i < 3; i++)
                sum[i][u] = _mm512_dpbusd_epi32(sum[i][u], _mm512_loadu_si512(x + i * K + at), v);
            sum[3][u] = _mm512_dpbusd_epi32(sum[3][u], ones, v);
        }
    double all[4];
    UNROLL for (int i = 0; i < 4; i++)
        all[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(sum[i][0], sum[i][1]));
    return all[0] + 256 * all[1] + 65536 * all[2] - 8388608 * all[3];
}

// q: room for M rows of 4 K bytes, sx: for M numbers.
static void int8_weights_part(const Team *team, const void *x, const Layer *layer, int count, int kind,
                              long M, long inputs, uint8_t *q, float *sx) {
    const long K = (inputs + 63) / 64 * 64;
    float *wide = (float *)q;
    SHARED(m, M, 1) {
        if (MOVED) sx[m] = digits(x, kind, m * inputs, inputs, K, q + 3 * m * K);
        for (long k = 0; k < inputs && !MOVED; k += 16) {
            const __mmask16 mask = first(inputs - k);
            store(wide, FLOAT32, m * K + k, mask, load(x, kind, m * inputs + k, mask));
        }
    }
    meet(team);
    for (int i = 0; i < count; i++) {
        const Result to = {layer[i].scale, layer[i].bias, layer[i].y, kind, M, layer[i].N};
        SHARED(n, to.N, 1) {
            const int8_t *w = (const int8_t *)layer[i].w + n * inputs;
            for (long m = 0; m < M; m++)
                finish(&to, m, n,
                       MOVED ? row_of_digits(q + 3 * m * K, K, w, inputs) * sx[m]
                             : one_row(wide + m * K, w, INT8, 0, inputs));
        }
    }
}

void int8_weights_product(const void *x, const Layer *layer, int count, int kind, long M, long inputs,
                          int threads) {
    const long K = (inputs + 63) / 64 * 64;
    uint8_t *q = aligned_alloc(64, 4 * M * K);
    float *sx = malloc(M * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        int8_weights_part(&team, x, layer, count, kind, M, inputs, q, sx);
    }
    free(q), free(sx);
}

// ---- 8 bits by groups -------------------------------------------------------------------------------------
// w[n, k] = q scale + offset, for each group of 32 inputs or more. Rows are whole groups.

// One row of x, per 64 inputs: in float32 as they are; in bfloat16 (`pairs`) those of even, then those of
// odd index. And the sum of each 32.
static void beside_bytes(const void *x, int kind, int pairs, long inputs, char *to, float *sums) {
    for (long k = 0; k < inputs; k += 64, to += pairs ? 128 : 256) {
        __m512 row[4];
        for (int i = 0; i < 4; i++)
            row[i] = load(x, kind, k + 16 * i, inputs - k > 16 * i ? first(inputs - k - 16 * i) : 0);
        for (int i = 0; i < 4; i += 2) *sums++ = _mm512_reduce_add_ps(_mm512_add_ps(row[i], row[i + 1]));
        for (int i = 0; i < 4 && !pairs; i++) _mm512_storeu_ps(to + 64 * i, row[i]);
        for (int i = 0; i < 2 && PAIRS && pairs; i++) {
            __m512i two = (__m512i)_mm512_cvtne2ps_pbh(row[2 * i + 1], row[2 * i]);
            _mm256_storeu_si256((__m256i *)(to + 32 * i), _mm512_cvtepi32_epi16(two));
            two = _mm512_srli_epi32(two, 16);
            _mm256_storeu_si256((__m256i *)(to + 64 + 32 * i), _mm512_cvtepi32_epi16(two));
        }
    }
}

// 64 numbers of a row of w with bfloat16: a byte is its lower half plus 16 times its upper one, which has the
// sign. A table makes bfloat16 of either, as with 4 bits.
INLINE __m512 halves_of_bytes(__m512i q, const char *x) {
    const __m512 low = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 high =
        _mm512_set_ps(-16, -32, -48, -64, -80, -96, -112, -128, 112, 96, 80, 64, 48, 32, 16, 0);
    const __m512i tables[2] = {(__m512i)_mm512_cvtne2ps_pbh(low, low),
                               (__m512i)_mm512_cvtne2ps_pbh(high, high)};
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    UNROLL for (int j = 0; j < 4; j++) {  // two halves of even bytes, then of odd ones
        __m512bh v = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4 * j), tables[j % 2]);
        sum[j % 2] = _mm512_dpbf16_ps(sum[j % 2], v, (__m512bh)_mm512_loadu_si512(x + j / 2 * 64));
    }
    return _mm512_add_ps(sum[0], sum[1]);
}

// One row of w, straight through memory, with M of x.
INLINE void bytes(int M, int pairs, const char *x, const float *sums, long inputs, const Layer *layer,
                  long n, float *out) {
    const long K = (inputs + 63) / 64 * 64, size = K * (pairs ? 2 : 4), parts = inputs / 32;
    const int8_t *w = (const int8_t *)layer->w + n * inputs;
    __m512 sum[X_ROWS][2], scale, offset;
    UNROLL for (int m = 0; m < M; m++)
        sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (long g = 0; g < parts; g += 16) {
        groups_of(layer, n, parts, g, &scale, &offset);
        if (layer->zero) UNROLL for (int m = 0; m < M; m++)
                sum[m][0] = _mm512_fmadd_ps(
                    offset, load(sums, FLOAT32, m * (K / 32) + g, first(parts - g)), sum[m][0]);
        __m512i group = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        for (long k = g * 32; k < inputs && k < g * 32 + 512; k += 64) {
            ASK(w + k + AHEAD);
            const __m512 s = _mm512_permutexvar_ps(group, scale);
            const __m512i q = signed_bytes(w + k, inputs - k);
            group = _mm512_add_epi32(group, _mm512_set1_epi32(2));
            UNROLL for (int m = 0; m < M && pairs; m++)
                sum[m][k / 64 % 2] = _mm512_fmadd_ps(s, halves_of_bytes(q, x + m * size + k * 2),
                                                     sum[m][k / 64 % 2]);
            if (pairs) continue;
            __m512 v[4];
            v[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(q)));
            v[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(q, 1)));
            v[2] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(q, 2)));
            v[3] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(q, 3)));
            const __m512 both[2] = {_mm512_shuffle_f32x4(s, s, 0x00), _mm512_shuffle_f32x4(s, s, 0xAA)};
            UNROLL for (int m = 0; m < M; m++) {
                const float *row = (const float *)(x + m * size) + k;
                UNROLL for (int i = 0; i < 2; i++) {
                    __m512 part = _mm512_mul_ps(v[2 * i], _mm512_loadu_ps(row + 32 * i));
                    part = _mm512_fmadd_ps(v[2 * i + 1], _mm512_loadu_ps(row + 32 * i + 16), part);
                    sum[m][i] = _mm512_fmadd_ps(both[i], part, sum[m][i]);
                }
            }
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        out[m] = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]));
}

// Bytes that a row of x takes with its sums.
INLINE long bytes_room(int kind, long inputs) {
    return (inputs + 63) / 64 * (kind == BFLOAT16 && PAIRS ? 128 + 8 : 256 + 8);
}

INLINE void bytes_of(int pairs, const Team *team, const void *x, const Layer *layer, int count, int kind,
                     long M, long inputs, char *room) {
    const long K = (inputs + 63) / 64 * 64, size = K * (pairs ? 2 : 4);
    float *sums = (float *)(room + M * size);
    SHARED(m, M, 1) beside_bytes((const char *)x + m * inputs * size_of(kind), kind, pairs, inputs,
                                 room + m * size, sums + m * (K / 32));
    meet(team);
    for (int i = 0; i < count; i++) {
        const Result to = {0, layer[i].bias, layer[i].y, kind, M, layer[i].N};
        SHARED(n, to.N, 1) {
            for (long m = 0; m < M; m += X_ROWS) {
                int few = next_rows(M - m);
                float out[X_ROWS];
                OF_ROWS(few, bytes, pairs, room + m * size, sums + m * (K / 32), inputs, layer + i, n, out)
                for (int r = 0; r < few; r++) finish(&to, m + r, n, out[r]);
            }
        }
    }
}

// room: for M times `bytes_room`.
static void int8_groups_part(const Team *team, const void *x, const Layer *layer, int count, int kind, long M,
                             long inputs, char *room) {
    if (kind == BFLOAT16 && PAIRS) bytes_of(1, team, x, layer, count, kind, M, inputs, room);
    else bytes_of(0, team, x, layer, count, kind, M, inputs, room);
}

void int8_groups_product(const void *x, const Layer *layer, int count, int kind, long M, long inputs,
                         int threads) {
    char *room = aligned_alloc(64, (M * bytes_room(kind, inputs) + 127) / 64 * 64);
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        int8_groups_part(&team, x, layer, count, kind, M, inputs, room);
    }
    free(room);
}

// ---- 4 bits -----------------------------------------------------------------------------------------------
// w[n, k] = q scale + offset, for each group of 32 inputs or more; two q in a byte, the first in the lower
// half. 128 of them are 16 lanes of 8: lane i has the inputs 8 i to 8 i + 7, four lanes a group.

// One row of x in that order, 128 at a time: [8][16] in float32, or [4][16] pairs i and i + 4 in bfloat16
// (`pairs`); and the sum of each group.
static void in_lanes(const void *x, int kind, int pairs, long inputs, char *to, float *sums) {
    const __m512i every_eighth =
        _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 3);
    for (long block = 0; block * 128 < inputs; block++) {
        float row[128] = {0};
        for (long k = block * 128; k < inputs && k < block * 128 + 128; k += 16)
            _mm512_storeu_ps(row + k - block * 128, load(x, kind, k, first(inputs - k)));
        for (int g = 0; g < 4; g++)
            *sums++ = _mm512_reduce_add_ps(
                _mm512_add_ps(_mm512_loadu_ps(row + g * 32), _mm512_loadu_ps(row + g * 32 + 16)));
        for (int j = 0; j < 8 && !pairs; j++, to += 64)
            _mm512_storeu_ps(to, _mm512_i32gather_ps(every_eighth, row + j, 4));
        for (int j = 0; j < 4 && PAIRS && pairs; j++)
            for (int i = 0; i < 128; i += 32, to += 16) {
                __m512i fours =
                    (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + i + 16), _mm512_loadu_ps(row + i));
                _mm_storeu_si128((__m128i *)to, _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 16 * j)));
            }
    }
}

// One row of w, straight through memory, with M of x. Numbers of 4 bits become floats by a table: of 16 in
// float32, and in bfloat16 of the same 16 twice, since that takes 5 bits, of which the highest is the next
// number's. What the zeros take away is a product of its own, of the sums of the groups.
INLINE void nibbles(int M, int pairs, const char *x, const float *sums, long blocks, const Layer *layer,
                    long n, float *out) {
    const __m512 value = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i value_twice = PAIRS ? (__m512i)_mm512_cvtne2ps_pbh(value, value) : (__m512i)value;
    const long size = pairs ? 256 : 512;
    const uint8_t *w = (const uint8_t *)layer->w + n * blocks * 64;
    __m512 sum[X_ROWS], part[X_ROWS], s, offset;
    UNROLL for (int m = 0; m < M; m++)
        sum[m] = _mm512_setzero_ps();
    for (long b = 0; b < blocks; b += 4) {  // 16 groups
        __mmask16 some = first(4 * (blocks - b));
        groups_of(layer, n, blocks * 4, b * 4, &s, &offset);
        UNROLL for (int m = 0; m < M; m++)
            sum[m] = _mm512_fmadd_ps(offset, load(sums, FLOAT32, (m * blocks + b) * 4, some), sum[m]);
        __m512i group = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        for (long c = b; c < b + 4 && c < blocks; c++) {
            __m512i q = _mm512_loadu_si512(w + c * 64);
            ASK(w + c * 64 + AHEAD);
            UNROLL for (int m = 0; m < M; m++)
                part[m] = _mm512_setzero_ps();
            UNROLL for (int j = 0; j < 4 && pairs; j++) {
                __m512i v = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4 * j), value_twice);
                UNROLL for (int m = 0; m < M; m++)
                    part[m] =
                        _mm512_dpbf16_ps(part[m], (__m512bh)v,
                                         (__m512bh)_mm512_loadu_si512(x + (m * blocks + c) * size + j * 64));
            }
            UNROLL for (int j = 0; j < 8 && !pairs; j++) {
                __m512 v = floats_of_four_bits(_mm512_srli_epi32(q, 4 * j));
                UNROLL for (int m = 0; m < M; m++)
                    part[m] =
                        _mm512_fmadd_ps(v, _mm512_loadu_ps(x + (m * blocks + c) * size + j * 64), part[m]);
            }
            UNROLL for (int m = 0; m < M; m++)
                sum[m] = _mm512_fmadd_ps(_mm512_permutexvar_ps(group, s), part[m], sum[m]);
            group = _mm512_add_epi32(group, _mm512_set1_epi32(4));
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        out[m] = _mm512_reduce_add_ps(sum[m]);
}

// Bytes that a row of x takes in lanes, and with its sums.
INLINE long lanes_size(int pairs, long blocks) { return blocks * (pairs ? 256 : 512); }
INLINE long lanes_room(int kind, long inputs) {
    const long blocks = (inputs + 127) / 128;
    return lanes_size(kind == BFLOAT16 && PAIRS, blocks) + blocks * 64;
}

INLINE void nibbles_of(int pairs, const Team *team, const void *x, const Layer *layer, int count, int kind,
                       long M, long inputs, char *lanes) {
    const long blocks = (inputs + 127) / 128, size = lanes_size(pairs, blocks);
    float *sums = (float *)(lanes + M * size);
    SHARED(m, M, 1) in_lanes((const char *)x + m * inputs * size_of(kind), kind, pairs, inputs,
                             lanes + m * size, sums + m * blocks * 4);
    meet(team);
    for (int i = 0; i < count; i++) {
        const Result to = {0, layer[i].bias, layer[i].y, kind, M, layer[i].N};
        SHARED(n, to.N, 1) {
            for (long m = 0; m < M; m += X_ROWS) {
                int few = next_rows(M - m);
                float out[X_ROWS];
                OF_ROWS(few, nibbles, pairs, lanes + m * size, sums + m * blocks * 4, blocks, layer + i, n,
                        out)
                for (int r = 0; r < few; r++) finish(&to, m + r, n, out[r]);
            }
        }
    }
}

// lanes: room for M times `lanes_room`.
static void int4_part(const Team *team, const void *x, const Layer *layer, int count, int kind, long M,
                      long inputs, char *lanes) {
    if (kind == BFLOAT16 && PAIRS) nibbles_of(1, team, x, layer, count, kind, M, inputs, lanes);
    else nibbles_of(0, team, x, layer, count, kind, M, inputs, lanes);
}

// Rows of w are whole blocks of 128 inputs, padded with scales of 0.
void int4_product(const void *x, const Layer *layer, int count, int kind, long M, long inputs, int threads) {
    char *lanes = aligned_alloc(64, M * lanes_room(kind, inputs));
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        int4_part(&team, x, layer, count, kind, M, inputs, lanes);
    }
    free(lanes);
}

// ---- Many rows of bfloat16 --------------------------------------------------------------------------------

// x (M, inputs) and y (M, N) of bfloat16; w of `kind`: bfloat16, or 8 or 4 bits with their scales.
void bfloat16_product(const uint16_t *x, const Layer *layer, int kind, long M, long inputs, int threads) {
    const int by_rows = kind == INT8 && layer->scale_kind == FLOAT32;
    Result to = {by_rows ? layer->scale : 0, layer->bias, layer->y, BFLOAT16, M, layer->N};
    if (!PAIRS) {
        float *wide = widened(x, BFLOAT16, M * inputs);
        many_rows(0, (const char *)wide, inputs * 4, 0, layer, kind, inputs, &to, threads);
        free(wide);
        return;
    }
    const long K = (inputs + 1) / 2 * 2;
    uint16_t *even = K == inputs ? 0 : calloc(M * K, 2);
    for (long m = 0; even && m < M; m++) memcpy(even + m * K, x + m * inputs, inputs * 2);
    many_rows(0, (const char *)(even ? even : x), K * 2, 0, layer, kind, inputs, &to, threads);
    free(even);
}

// ---- Weights out of and into 8 and 4 bits -----------------------------------------------------------------

// What 8 or 4 bits (`bits`: INT8 or INT4) stand for: y (N, inputs) of `kind`.
void dequantize(const Layer *layer, int bits, int kind, long inputs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < layer->N; n++) {
        char *to = (char *)layer->y + n * inputs * size_of(kind);
        if (bits == INT4) int4_row(layer, n, (inputs + 127) / 128 * 4, 0, to, kind, inputs);
        else int8_row(layer, n, 0, to, kind, inputs);
    }
}

// One row: its whole numbers, and the scale: max |w| / 127, NaN if one is.
static float round_row(const void *w, int kind, long start, long inputs, int8_t *q) {
    const float scale = largest(w, kind, start, inputs) / 127.f;
    const __m512 one = _mm512_set1_ps(scale > 0 ? scale : 1.f);
    for (long k = 0; k < inputs; k += 16) {
        const __mmask16 m = first(inputs - k);
        __m512i v = _mm512_cvtps_epi32(_mm512_div_ps(load(w, kind, start + k, m), one));
        store_bytes((uint8_t *)q + k, m, _mm512_cvtsepi32_epi8(v));
    }
    return scale;
}

void to_int8(const void *w, int kind, long stride, int8_t *q, float *scale, long N, long inputs,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) scale[n] = round_row(w, kind, n * stride, inputs, q + n * inputs);
}

// 32 at a time: scale = (max - min) / 15 as float16, with 0 between min and max.
void to_int4(const void *w, int kind, long stride, uint8_t *q, uint16_t *scale, uint8_t *zero, long N,
             long inputs, int threads) {
    long blocks = (inputs + 127) / 128;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++)
        for (long g = 0; g < blocks * 4; g++) {
            __m512 v[2], low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
            __mmask16 none = 0;
            for (int i = 0; i < 2; i++) {
                long k = g * 32 + i * 16;
                v[i] = load(w, kind, n * stride + k, k < inputs ? first(inputs - k) : 0);
                low = _mm512_min_ps(low, v[i]), high = _mm512_max_ps(high, v[i]);
                none |= _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
            }
            float least = _mm512_reduce_min_ps(low);
            store_one(scale, FLOAT16, n * blocks * 4 + g,
                      none ? NAN : (_mm512_reduce_max_ps(high) - least) / 15.f);
            float step = load_one(scale, FLOAT16, n * blocks * 4 + g), one = step > 0 ? step : 1.f;
            __m512 z = _mm512_roundscale_ps(_mm512_set1_ps(-least / one), _MM_FROUND_TO_NEAREST_INT);
            z = _mm512_min_ps(z, _mm512_set1_ps(15.f));
            zero[n * blocks * 4 + g] = (uint8_t)_mm512_cvtss_f32(z);
            uint8_t whole[32];
            for (int i = 0; i < 2; i++) {
                __m512 u = _mm512_add_ps(_mm512_div_ps(v[i], _mm512_set1_ps(one)), z);
                u = _mm512_min_ps(_mm512_max_ps(u, _mm512_setzero_ps()), _mm512_set1_ps(15.f));
                _mm_storeu_si128((__m128i *)(whole + i * 16), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(u)));
            }
            for (int i = 0; i < 16; i++)
                q[n * blocks * 64 + g * 16 + i] = whole[2 * i] | (uint8_t)(whole[2 * i + 1] << 4);
        }
}

// ---- Norm -------------------------------------------------------------------------------------------------

// Each row of x (M, C) / sqrt(mean(x^2) + eps), as x is stored, and only then times w (C).
static void rms_norm_part(const Team *team, const void *x, const void *w, void *y, int kind, float eps,
                          long M, long C) {
    SHARED(m, M, 1) {
        const char *row = (const char *)x + m * C * size_of(kind);
        char *to = (char *)y + m * C * size_of(kind);
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < C; i += 16) {
            __m512 v = load(row, kind, i, first(C - i));
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        __m512 part = _mm512_set1_ps(1.f / sqrtf(_mm512_reduce_add_ps(sum) / C + eps));
        for (long i = 0; i < C; i += 16) {
            store(to, kind, i, first(C - i), _mm512_mul_ps(load(row, kind, i, first(C - i)), part));
            store(to, kind, i, first(C - i),
                  _mm512_mul_ps(load(to, kind, i, first(C - i)), load(w, kind, i, first(C - i))));
        }
    }
}

void rms_norm(const void *x, const void *w, void *y, int kind, float eps, long M, long C, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Team team = team_here(0);
        rms_norm_part(&team, x, w, y, kind, eps, M, C);
    }
}

// ---- Rotation ---------------------------------------------------------------------------------------------

INLINE __m512 rounded(__m512 v, int kind) {
    if (kind == FLOAT16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if (kind == BFLOAT16)
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
    return v;
}

// Explicit rounding keeps the compiler from fusing a product and a sum into one operation.
#define TIMES(a, b) rounded(_mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), kind)

// One row of D: of its first R, number i pairs with i + R / 2. Rounded after each step, as PyTorch's
// operators do. y may be x: both numbers of a pair are read before one is written.
INLINE void rotate_row(const char *x, const char *cos, const char *sin, char *y, int kind, long D, long R) {
    const long half = R / 2, size = size_of(kind);
    for (long i = 0; i < half; i += 16) {
        __mmask16 m = first(half - i);
        __m512 a = load(x, kind, i, m), b = load(x, kind, half + i, m),
               minus = _mm512_xor_ps(b, _mm512_set1_ps(-0.f));
        store(y, kind, i, m,
              _mm512_add_ps(TIMES(a, load(cos, kind, i, m)), TIMES(minus, load(sin, kind, i, m))));
        store(y, kind, half + i, m,
              _mm512_add_ps(TIMES(b, load(cos, kind, half + i, m)),
                            TIMES(a, load(sin, kind, half + i, m))));
    }
    memcpy(y + R * size, x + R * size, (D - R) * size);
}

static void rotate_one(const char *x, const char *cos, const char *sin, char *y, int kind, long D, long R) {
    if (kind == BFLOAT16) rotate_row(x, cos, sin, y, BFLOAT16, D, R);
    else if (kind == FLOAT16) rotate_row(x, cos, sin, y, FLOAT16, D, R);
    else rotate_row(x, cos, sin, y, FLOAT32, D, R);
}

// x (B, H, T, D), these numbers apart and D side by side; y whole; tables (B or 1, T, R), `tables_batch` 0
// for 1.
void rotate(const char *x, const char *cosine, const char *sine, char *y, int kind, long B, long H, long T,
            long D, long R, long x_batch, long x_head, long x_row, long tables_batch, int threads) {
    const long size = size_of(kind), heads = B * H;
    if (T == 1) {  // less work than waking a thread
        for (long h = 0; h < heads; h++) {
            long at = h / H * tables_batch * size;
            const char *row = x + (h / H * x_batch + h % H * x_head) * size;
            rotate_one(row, cosine + at, sine + at, y + h * D * size, kind, D, R);
        }
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < heads * T; r++) {
        long b = r / (H * T), h = r / T % H, t = r % T, at = (b * tables_batch + t * R) * size;
        const char *row = x + (b * x_batch + h * x_head + t * x_row) * size;
        rotate_one(row, cosine + at, sine + at, y + r * D * size, kind, D, R);
    }
}

// ---- Attention of one query -------------------------------------------------------------------------------
// q, y: (B, K G, D); k, v: (B, K, S, D) with D side by side; bias: NULL or float32 (B or 1, H or 1, S). Keys
// and values of 8 bits have their scale, a float, behind the D bytes of each row.

enum { TILE = 64 };  // keys at a time: few enough to stay near for all heads that share them

INLINE float scale_of(const char *row, int kind, long D) {
    float scale = 1.f;
    if (kind == INT8) memcpy(&scale, row + D, sizeof scale);
    return scale;
}

// sum[d] += sum over s of w[s] v[s, d], for 16 * C numbers d.
INLINE void weigh(int C, const float *w, const void *v, int kind, long S, long row, long d, long D,
                  float *sum) {
    __m512 now[6];
    UNROLL for (int c = 0; c < C; c++)
        now[c] = load(sum, FLOAT32, d + 16 * c, first(D - d - 16 * c));
    for (long s = 0; s < S; s++) UNROLL for (int c = 0; c < C; c++)
            now[c] = _mm512_fmadd_ps(_mm512_set1_ps(w[s] * scale_of((const char *)v + s * row, kind, D)),
                                     load(v, kind, s * row + d + 16 * c, first(D - d - 16 * c)), now[c]);
    UNROLL for (int c = 0; c < C; c++)
        store(sum, FLOAT32, d + 16 * c, first(D - d - 16 * c), now[c]);
}

// The sum of each of four.
INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// G heads that share S keys k and values v, of `kind`. q is float32, or with PAIRS bfloat16 where k is; y is
// of `out`.
// `next`: the keys that are read after.
INLINE void some_heads(const void *q, const char *k, const char *v, const char *next, const float *bias,
                       long bias_head, void *y, int out, int kind, float scale, long G, long S, long D,
                       long k_row, long v_row, float *scores, float *sum) {
    const int pairs = kind == BFLOAT16 && PAIRS, size = size_of(kind);
    const long step = pairs ? 32 : 16, bytes = D * size;
    for (long s = 0; s < S; s += 4) {
        const int some = S - s < 4 ? (int)(S - s) : 4;
        for (long r = s + AHEAD / bytes; r < s + AHEAD / bytes + 4; r++)  // behind the keys come the values
            for (long i = 0; i < bytes; i += 64)
                ASK((r < S ? k + r * k_row * size : v + (r - S) * v_row * size) + i);
        for (long g = 0; g < G; g++) {
            __m512 dot[4];
            UNROLL for (int r = 0; r < 4; r++)
                dot[r] = _mm512_setzero_ps();
            for (long d = 0; d < D; d += step) UNROLL for (int r = 0; r < 4; r++)
                    dot[r] = multiply_add(dot[r], k + (s + (r < some ? r : 0)) * k_row * size, kind, pairs,
                                          (const char *)q + g * D * (pairs ? 2 : 4), d, D - d);
            __m128 sums = _mm_mul_ps(four_sums(dot[0], dot[1], dot[2], dot[3]), _mm_set1_ps(scale));
            if (kind == INT8) {
                float own[4];
                for (int r = 0; r < 4; r++) own[r] = scale_of(k + (s + (r < some ? r : 0)) * k_row, kind, D);
                sums = _mm_mul_ps(sums, _mm_loadu_ps(own));
            }
            const __mmask8 mask = (1 << some) - 1;
            if (bias) sums = _mm_add_ps(sums, _mm_maskz_loadu_ps(mask, bias + g * bias_head + s));
            _mm_mask_storeu_ps(scores + g * S + s, mask, sums);
        }
    }
    for (long g = 0; g < G; g++) {
        float *row = scores + g * S;
        __m512 top = _mm512_set1_ps(-INFINITY), all = _mm512_setzero_ps();
        for (long s = 0; s < S; s += 16)
            top = _mm512_mask_max_ps(top, first(S - s), top, load(row, FLOAT32, s, first(S - s)));
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (long s = 0; s < S; s += 16) {
            __m512 e = _mm512_maskz_mov_ps(
                first(S - s), power_of_e(_mm512_sub_ps(load(row, FLOAT32, s, first(S - s)), top)));
            all = _mm512_add_ps(all, e);
            store(row, FLOAT32, s, first(S - s), e);
        }
        __m512 part = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(all));
        for (long s = 0; s < S; s += 16)
            store(row, FLOAT32, s, first(S - s), _mm512_mul_ps(load(row, FLOAT32, s, first(S - s)), part));
    }
    memset(sum, 0, G * D * sizeof(float));
    for (long s = 0; s < S; s += TILE) {
        long some = S - s < TILE ? S - s : TILE;
        for (long r = s + TILE; r < s + 2 * TILE; r++)
            for (long i = 0; i < bytes; i += 64)
                ASK((r < S ? v + r * v_row * size : next + (r - S) * k_row * size) + i);
        for (long g = 0; g < G; g++)
            for (long d = 0; d < D; d += 96) {
                int C = D - d < 96 ? (int)((D - d + 15) / 16) : 6;
                OF_CONSTANT(6, C, weigh, scores + g * S + s, v + s * v_row * size, kind, some, v_row, d, D,
                            sum + g * D)
            }
    }
    for (long i = 0; i < G * D; i += 16)
        store(y, out, i, first(G * D - i), load(sum, FLOAT32, i, first(G * D - i)));
}

// The same by what k and v are stored as: `stored` is INT8, or the kind of q and y. `wide`: room for q as
// float32.
static void heads_of(const void *q, const char *k, const char *v, const char *next, const float *bias,
                     long bias_head, void *y, int kind, int stored, float scale, long G, long S, long D,
                     long k_row, long v_row, float *scores, float *sum, float *wide) {
    for (long i = 0; !(stored == BFLOAT16 && PAIRS) && i < G * D; i += 16)
        store(wide, FLOAT32, i, first(G * D - i), load(q, kind, i, first(G * D - i)));
#define HEADS(q, stored) \
    some_heads(q, k, v, next, bias, bias_head, y, kind, stored, scale, G, S, D, k_row, v_row, scores, sum)
    if (stored == BFLOAT16) HEADS(PAIRS ? q : wide, BFLOAT16);
    else if (stored == FLOAT16) HEADS(wide, FLOAT16);
    else if (stored == INT8) HEADS(wide, INT8);
    else HEADS(wide, FLOAT32);
}

void one_query(const void *q, const void *k, const void *v, const float *bias, long bias_batch,
               long bias_head, void *y, int kind, int stored, float scale, long B, long K, long G, long S,
               long D, long k_batch, long k_head, long k_row, long v_batch, long v_head, long v_row,
               int threads) {
    const int size = size_of(kind), own = size_of(stored);
#pragma omp parallel num_threads(threads)
    {
        long some = (G * D + 16) / 16 * 16;
        float *sum = aligned_alloc(64, (2 * some + G * S + 32) / 16 * 64), *wide = sum + some;
#pragma omp for schedule(static)
        for (long h = 0; h < B * K; h++) {
            const long b = h / K, n = h % K;
            const char *keys = (const char *)k + (b * k_batch + n * k_head) * own;
            const char *values = (const char *)v + (b * v_batch + n * v_head) * own;
            const float *row = bias ? bias + b * bias_batch + n * G * bias_head : 0;
            heads_of((const char *)q + h * G * D * size, keys, values, keys + k_head * own, row, bias_head,
                     (char *)y + h * G * D * size, kind, stored, scale, G, S, D, k_row, v_row, wide + some,
                     sum, wide);
        }
        free(sum);
    }
}
