// For 64-bit Arm with dot products: the instructions of AVX-512 that the kernels are written in, each out of
// four of NEON; with those of bfloat16 where the compiler may use them.
//
// 512 bits are a struct of four registers: GCC keeps them apart, in registers, once all of this is inlined.
// What their bits mean is a matter of the instruction, so one type stands for all three of AVX-512, and casts
// between them cost nothing. Results are x86's to the bit, with a NaN as an operand too, but for subnormal
// numbers that were or become bfloat16, which x86 makes 0, and for the largest and the least of all lanes
// where one is NaN. It is compiled with -ffp-contract=off: a product and a sum are one operation only where
// the kernels say so.

#include <arm_neon.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>

enum {  // see `avx512.h`
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    PAIRS = 1,
#else
    PAIRS = 0,
#endif
    MOVED = 0,
    X_ROWS = 3,
    W_ROWS = 2,
    SUMS = 4,
};

#define OP static inline __attribute__((always_inline))
typedef uint32x4_t Lanes;
typedef struct {
    Lanes a, b, c, d;
} __m512;
typedef __m512 __m512i, __m512bh;
typedef struct {
    Lanes a, b;
} __m256;
typedef __m256 __m256i;
typedef float32x4_t __m128;
typedef Lanes __m128i;
typedef uint8_t __mmask8;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

// A function of 512 bits out of `call`, which takes and gives 128 as `type`.
#define ONE(name, type, call) \
    OP __m512 name(__m512 x) { \
        return (__m512){(Lanes)call((type)x.a), (Lanes)call((type)x.b), (Lanes)call((type)x.c), \
                        (Lanes)call((type)x.d)}; \
    }
#define TWO(name, type, call) \
    OP __m512 name(__m512 x, __m512 y) { \
        return (__m512){(Lanes)call((type)x.a, (type)y.a), (Lanes)call((type)x.b, (type)y.b), \
                        (Lanes)call((type)x.c, (type)y.c), (Lanes)call((type)x.d, (type)y.d)}; \
    }
#define THREE(name, type, call) \
    OP __m512 name(__m512 x, __m512 y, __m512 z) { \
        return (__m512){ \
            (Lanes)call((type)x.a, (type)y.a, (type)z.a), (Lanes)call((type)x.b, (type)y.b, (type)z.b), \
            (Lanes)call((type)x.c, (type)y.c, (type)z.c), (Lanes)call((type)x.d, (type)y.d, (type)z.d)}; \
    }

// ---- The clock, and memory that is asked for --------------------------------------------------------------

// In thirds of a nanosecond, or nearly: the counter's frequency differs from machine to machine.
OP uint64_t __rdtsc(void) {
    uint64_t ticks, frequency;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    __asm__("mrs %0, cntfrq_el0" : "=r"(frequency));
    return ticks * (frequency < 3000000000 ? 3000000000 / frequency : 1);
}

OP void _mm_pause(void) { __asm__ volatile("isb" ::: "memory"); }  // `yield` does not wait at all

#define _MM_HINT_T1 2
#define _mm_prefetch(p, hint) __builtin_prefetch(p, 0, hint)

// ---- Loads and stores ------------------------------------------------------------------------------------
// Masks of these are always those of the first lanes. What is behind them is not touched: a part is copied.

OP Lanes get(const void *p, int i) { return (Lanes)vld1q_u8((const uint8_t *)p + 16 * i); }
OP void put(void *p, int i, Lanes x) { vst1q_u8((uint8_t *)p + 16 * i, (uint8x16_t)x); }

static __attribute__((noinline, cold, unused)) __m512 part_of(const void *p, long bytes) {
    __m512 x = {0};
    memcpy(&x, p, bytes);
    return x;
}

static __attribute__((noinline, cold, unused)) void put_part(void *p, __m512 x, long bytes) {
    memcpy(p, &x, bytes);
}

OP long count_of(uint64_t mask) { return __builtin_popcountll(mask); }

OP __m512 _mm512_loadu_si512(const void *p) {
    return (__m512){get(p, 0), get(p, 1), get(p, 2), get(p, 3)};
}
OP void _mm512_storeu_si512(void *p, __m512 x) {
    put(p, 0, x.a), put(p, 1, x.b), put(p, 2, x.c), put(p, 3, x.d);
}
#define _mm512_load_si512 _mm512_loadu_si512
#define _mm512_loadu_ps _mm512_loadu_si512
#define _mm512_load_ps _mm512_loadu_si512
#define _mm512_store_si512 _mm512_storeu_si512
#define _mm512_storeu_ps _mm512_storeu_si512
#define _mm512_store_ps _mm512_storeu_si512

OP __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void *p) {
    return m == 0xFFFF ? _mm512_loadu_ps(p) : part_of(p, 4 * count_of(m));
}
#define _mm512_maskz_loadu_epi32 _mm512_maskz_loadu_ps
OP __m512 _mm512_maskz_loadu_epi16(uint64_t m, const void *p) { return part_of(p, 2 * count_of(m)); }
OP __m512 _mm512_maskz_loadu_epi8(uint64_t m, const void *p) { return part_of(p, count_of(m)); }
OP void _mm512_mask_storeu_ps(void *p, __mmask16 m, __m512 x) { put_part(p, x, 4 * count_of(m)); }
OP void _mm512_mask_storeu_epi16(void *p, uint64_t m, __m512 x) { put_part(p, x, 2 * count_of(m)); }

OP __m256i _mm256_loadu_si256(const void *p) { return (__m256i){get(p, 0), get(p, 1)}; }
OP void _mm256_storeu_si256(void *p, __m256i x) { put(p, 0, x.a), put(p, 1, x.b); }
#define _mm256_store_si256 _mm256_storeu_si256
OP __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void *p) {
    if (m == 0xFFFF) return _mm256_loadu_si256(p);
    const __m512 x = part_of(p, 2 * count_of(m));
    return (__m256i){x.a, x.b};
}
OP void _mm256_mask_storeu_epi16(void *p, __mmask16 m, __m256i x) {
    put_part(p, (__m512){x.a, x.b, x.b, x.b}, 2 * count_of(m));
}

OP __m128i _mm_loadu_si128(const void *p) { return get(p, 0); }
OP void _mm_storeu_si128(void *p, __m128i x) { put(p, 0, x); }
OP __m128 _mm_loadu_ps(const void *p) { return (__m128)get(p, 0); }
OP __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void *p) {
    return m == 0xFFFF ? get(p, 0) : part_of(p, count_of(m)).a;
}
OP void _mm_mask_storeu_epi8(void *p, __mmask16 m, __m128i x) {
    put_part(p, (__m512){x, x, x, x}, count_of(m));
}
OP __m128 _mm_maskz_loadu_ps(__mmask8 m, const void *p) {
    return (__m128)(m == 15 ? get(p, 0) : part_of(p, 4 * count_of(m)).a);
}
OP void _mm_mask_storeu_ps(void *p, __mmask8 m, __m128 x) {
    const Lanes v = (Lanes)x;
    if (m == 15) put(p, 0, v);
    else put_part(p, (__m512){v, v, v, v}, 4 * count_of(m));
}

// ---- Masks: a bit a lane ---------------------------------------------------------------------------------

static const Lanes BIT = {1, 2, 4, 8};

OP __mmask16 mask_of(__m512 x) {
    return (__mmask16)vaddvq_u32((x.a & BIT) | (x.b & BIT << 4) | (x.c & BIT << 8) | (x.d & BIT << 12));
}

OP Lanes selected(Lanes mask, Lanes bit, Lanes x, Lanes y) { return vbslq_u32(vtstq_u32(mask, bit), x, y); }

OP __m512 _mm512_mask_mov_ps(__m512 old, __mmask16 m, __m512 x) {
    const Lanes mask = vdupq_n_u32(m);
    return (__m512){selected(mask, BIT, x.a, old.a), selected(mask, BIT << 4, x.b, old.b),
                    selected(mask, BIT << 8, x.c, old.c), selected(mask, BIT << 12, x.d, old.d)};
}
#define _mm512_mask_mov_epi32 _mm512_mask_mov_ps

enum { _CMP_LT_OQ, _CMP_GT_OQ, _CMP_UNORD_Q };

OP Lanes compared(Lanes x, Lanes y, int how) {
    const float32x4_t a = (float32x4_t)x, b = (float32x4_t)y;
    if (how == _CMP_LT_OQ) return vcltq_f32(a, b);
    if (how == _CMP_GT_OQ) return vcgtq_f32(a, b);
    return ~(vceqq_f32(a, a) & vceqq_f32(b, b));
}

OP __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
    return mask_of((__m512){compared(x.a, y.a, how), compared(x.b, y.b, how), compared(x.c, y.c, how),
                            compared(x.d, y.d, how)});
}

OP Lanes nan_or_subnormal(Lanes x) {
    const Lanes bits = x & 0x7FFFFFFF;
    return vcgtq_u32(bits, vdupq_n_u32(0x7F800000)) | vcltq_u32(bits - 1, vdupq_n_u32(0x007FFFFF));
}
ONE(nans_and_subnormals, Lanes, nan_or_subnormal)
#define _mm512_fpclass_ps_mask(x, which) mask_of(nans_and_subnormals(x))  // which: always 0xA1, these

// ---- Floats ----------------------------------------------------------------------------------------------

OP __m512 _mm512_set1_epi32(int x) {
    const Lanes v = vdupq_n_u32((uint32_t)x);
    return (__m512){v, v, v, v};
}
OP __m512 _mm512_set1_ps(float x) {
    const Lanes v = (Lanes)vdupq_n_f32(x);
    return (__m512){v, v, v, v};
}
#define _mm512_setzero_ps() _mm512_set1_epi32(0)
#define SIXTEEN(type, p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a) \
    ((__m512){(Lanes)(type){a, b, c, d}, (Lanes)(type){e, f, g, h}, (Lanes)(type){i, j, k, l}, \
              (Lanes)(type){m, n, o, p}})
#define _mm512_set_ps(...) SIXTEEN(float32x4_t, __VA_ARGS__)

#define _mm512_castps_si512(x) (x)
#define _mm512_castsi512_ps(x) (x)
OP __m256 _mm512_castps512_ps256(__m512 x) { return (__m256){x.a, x.b}; }
OP __m256 _mm512_extractf32x8_ps(__m512 x, int i) { return i ? (__m256){x.c, x.d} : (__m256){x.a, x.b}; }
OP float _mm512_cvtss_f32(__m512 x) { return vgetq_lane_f32((float32x4_t)x.a, 0); }

TWO(_mm512_add_ps, float32x4_t, vaddq_f32)
TWO(_mm512_sub_ps, float32x4_t, vsubq_f32)
TWO(_mm512_mul_ps, float32x4_t, vmulq_f32)
TWO(_mm512_div_ps, float32x4_t, vdivq_f32)
TWO(_mm512_xor_ps, Lanes, veorq_u32)
ONE(_mm512_abs_ps, float32x4_t, vabsq_f32)
#define _mm512_mul_round_ps(x, y, mode) _mm512_mul_ps(x, y)

OP float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
OP float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
TWO(_mm512_max_ps, float32x4_t, larger)
TWO(_mm512_min_ps, float32x4_t, smaller)

OP float32x4_t fused(float32x4_t x, float32x4_t y, float32x4_t sum) { return vfmaq_f32(sum, x, y); }
OP float32x4_t fused_negative(float32x4_t x, float32x4_t y, float32x4_t sum) { return vfmsq_f32(sum, x, y); }
THREE(_mm512_fmadd_ps, float32x4_t, fused)
THREE(_mm512_fnmadd_ps, float32x4_t, fused_negative)

#define _mm512_maskz_mov_ps(m, x) _mm512_mask_mov_ps(_mm512_setzero_ps(), m, x)
#define _mm512_maskz_sub_ps(m, x, y) _mm512_maskz_mov_ps(m, _mm512_sub_ps(x, y))
#define _mm512_maskz_div_ps(m, x, y) _mm512_maskz_mov_ps(m, _mm512_div_ps(x, y))
#define _mm512_mask_mul_ps(old, m, x, y) _mm512_mask_mov_ps(old, m, _mm512_mul_ps(x, y))
#define _mm512_mask_max_ps(old, m, x, y) _mm512_mask_mov_ps(old, m, _mm512_max_ps(x, y))

// In the order that the intrinsics of x86 have.
OP float _mm512_reduce_add_ps(__m512 x) {
    const float32x4_t even = vaddq_f32((float32x4_t)x.a, (float32x4_t)x.c);
    const float32x4_t sum = vaddq_f32(even, vaddq_f32((float32x4_t)x.b, (float32x4_t)x.d));
    return vaddv_f32(vadd_f32(vget_low_f32(sum), vget_high_f32(sum)));
}
OP float _mm512_reduce_max_ps(__m512 x) {
    const float32x4_t top = larger((float32x4_t)x.a, (float32x4_t)x.c);
    return vmaxvq_f32(larger(top, larger((float32x4_t)x.b, (float32x4_t)x.d)));
}
OP float _mm512_reduce_min_ps(__m512 x) {
    const float32x4_t least = smaller((float32x4_t)x.a, (float32x4_t)x.c);
    return vminvq_f32(smaller(least, smaller((float32x4_t)x.b, (float32x4_t)x.d)));
}

ONE(nearest_whole, float32x4_t, vrndnq_f32)
#define _mm512_roundscale_ps(x, mode) nearest_whole(x)  // mode: always to the nearest

OP int32x4_t whole_or_least(float32x4_t x) {  // the least number for what 32 bits do not hold
    const uint32x4_t fits = vcaltq_f32(x, vdupq_n_f32(2147483648.f));
    return vbslq_s32(fits, vcvtnq_s32_f32(x), vdupq_n_s32(INT_MIN));
}
ONE(_mm512_cvtps_epi32, float32x4_t, whole_or_least)

// x 2^power, of whole powers from -150 to 127: in two steps, each of which is a power that a float can be.
OP float32x4_t scaled(float32x4_t x, float32x4_t power) {
    const int32x4_t n = vcvtnq_s32_f32(power), part = n >> 1;
    const float32x4_t once = (float32x4_t)((part + 127) << 23);
    return vmulq_f32(vmulq_f32(x, once), (float32x4_t)((n - part + 127) << 23));
}
TWO(_mm512_scalef_ps, float32x4_t, scaled)

OP __m128 _mm_set_ss(float x) { return (__m128){x, 0, 0, 0}; }
OP __m128 _mm_set1_ps(float x) { return vdupq_n_f32(x); }
OP float _mm_cvtss_f32(__m128 x) { return vgetq_lane_f32(x, 0); }
OP __m128 _mm_add_ps(__m128 x, __m128 y) { return vaddq_f32(x, y); }
OP __m128 _mm_mul_ps(__m128 x, __m128 y) { return vmulq_f32(x, y); }
#define _mm_castsi128_ps(x) ((__m128)(x))
OP __m128 _mm256_castps256_ps128(__m256 x) { return (__m128)x.a; }
OP __m128 _mm256_extractf128_ps(__m256 x, int i) { return (__m128)(i ? x.b : x.a); }
OP __m256 _mm256_add_ps(__m256 x, __m256 y) {
    return (__m256){(Lanes)vaddq_f32((__m128)x.a, (__m128)y.a), (Lanes)vaddq_f32((__m128)x.b, (__m128)y.b)};
}

// ---- Whole numbers ---------------------------------------------------------------------------------------

#define _mm512_setzero_si512() _mm512_set1_epi32(0)
#define _mm512_set_epi32(...) SIXTEEN(int32x4_t, __VA_ARGS__)
OP __m512 _mm512_set1_epi8(int x) {
    const Lanes v = (Lanes)vdupq_n_u8((uint8_t)x);
    return (__m512){v, v, v, v};
}
OP __m512 _mm512_set1_epi64(long long x) {
    const Lanes v = (Lanes)vdupq_n_s64(x);
    return (__m512){v, v, v, v};
}
TWO(_mm512_add_epi32, Lanes, vaddq_u32)
TWO(_mm512_sub_epi32, Lanes, vsubq_u32)
TWO(_mm512_min_epi32, int32x4_t, vminq_s32)
TWO(_mm512_and_si512, Lanes, vandq_u32)
TWO(_mm512_or_si512, Lanes, vorrq_u32)

#define SHIFTED(name, type, operator) \
    OP __m512 name(__m512 x, int n) { \
        return (__m512){(Lanes)((type)x.a operator n), (Lanes)((type)x.b operator n), \
                        (Lanes)((type)x.c operator n), (Lanes)((type)x.d operator n)}; \
    }
SHIFTED(_mm512_slli_epi32, uint32x4_t, <<)
SHIFTED(_mm512_srli_epi32, uint32x4_t, >>)
SHIFTED(_mm512_srli_epi16, uint16x8_t, >>)
SHIFTED(_mm512_srli_epi64, uint64x2_t, >>)
#define _mm512_srl_epi32(x, n) _mm512_srli_epi32(x, (int)vgetq_lane_u32(n, 0))  // n: below 32
OP Lanes shifted_right(Lanes x, Lanes n) { return vshlq_u32(x, vnegq_s32((int32x4_t)n)); }
TWO(_mm512_srlv_epi32, Lanes, shifted_right)

OP int _mm512_reduce_add_epi32(__m512 x) { return (int)vaddvq_u32(x.a + x.b + x.c + x.d); }

// sum += four signed bytes of x times four of w, in each lane.
OP int32x4_t four_bytes_added(int32x4_t sum, int32x4_t x, int32x4_t w) {
    return vdotq_s32(sum, (int8x16_t)x, (int8x16_t)w);
}
THREE(multiply_bytes, int32x4_t, four_bytes_added)

// The compiler reads this and then drops it, since MOVED is 0; it refuses where it cannot.
__attribute__((const, error("unsigned bytes have no place here"))) __m512 no_dpbusd(__m512, __m512, __m512);
#define _mm512_dpbusd_epi32 no_dpbusd

OP __m128i _mm_set1_epi8(int x) { return (__m128i)vdupq_n_u8((uint8_t)x); }
OP __m128i _mm_set1_epi16(int x) { return (__m128i)vdupq_n_u16((uint16_t)x); }
OP __m128i _mm_cvtsi32_si128(int x) { return (__m128i){(uint32_t)x, 0, 0, 0}; }
OP __m128i _mm_and_si128(__m128i x, __m128i y) { return x & y; }
#define _mm_srli_epi16(x, n) ((__m128i)((uint16x8_t)(x) >> (n)))
#define _mm_extract_epi16(x, i) vgetq_lane_u16((uint16x8_t)(x), i)

OP __m128i _mm_mask_add_epi8(__m128i old, __mmask16 m, __m128i x, __m128i y) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t mask = vcombine_u8(vdup_n_u8((uint8_t)m), vdup_n_u8((uint8_t)(m >> 8)));
    const uint8x16_t sum = vaddq_u8((uint8x16_t)x, (uint8x16_t)y);
    return (__m128i)vbslq_u8(vtstq_u8(mask, bit), sum, (uint8x16_t)old);
}

// Of each pair of bytes, unsigned ones of x times signed ones of y, the sum.
OP __m128i _mm_maddubs_epi16(__m128i x, __m128i y) {
    const int16x8_t even = (int16x8_t)((uint16x8_t)x & 255) * ((int16x8_t)((uint16x8_t)y << 8) >> 8);
    const int16x8_t odd = (int16x8_t)((uint16x8_t)x >> 8) * ((int16x8_t)y >> 8);
    return (__m128i)vqaddq_s16(even, odd);
}
OP __m128i _mm_packus_epi16(__m128i x, __m128i y) {
    return (__m128i)vcombine_u8(vqmovun_s16((int16x8_t)x), vqmovun_s16((int16x8_t)y));
}

OP __m256i _mm256_set1_epi8(int x) { return (__m256i){_mm_set1_epi8(x), _mm_set1_epi8(x)}; }
OP __m256i _mm256_and_si256(__m256i x, __m256i y) { return (__m256i){x.a & y.a, x.b & y.b}; }
OP __m256i _mm256_or_si256(__m256i x, __m256i y) { return (__m256i){x.a | y.a, x.b | y.b}; }
OP __m256i _mm256_slli_epi16(__m256i x, int n) {
    return (__m256i){(Lanes)((uint16x8_t)x.a << n), (Lanes)((uint16x8_t)x.b << n)};
}
OP __m256i _mm256_broadcastsi128_si256(__m128i x) { return (__m256i){x, x}; }

// ---- Conversions -----------------------------------------------------------------------------------------

ONE(_mm512_cvtepi32_ps, int32x4_t, vcvtq_f32_s32)
#define floats_of_four_bits(q) _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(15)))

OP __m512 _mm512_cvtepi8_epi32(__m128i x) {
    const int16x8_t low = vmovl_s8(vget_low_s8((int8x16_t)x)), high = vmovl_high_s8((int8x16_t)x);
    return (__m512){(Lanes)vmovl_s16(vget_low_s16(low)), (Lanes)vmovl_high_s16(low),
                    (Lanes)vmovl_s16(vget_low_s16(high)), (Lanes)vmovl_high_s16(high)};
}
OP __m256i _mm256_cvtepu8_epi16(__m128i x) {
    return (__m256i){(Lanes)vmovl_u8(vget_low_u8((uint8x16_t)x)), (Lanes)vmovl_high_u8((uint8x16_t)x)};
}
OP __m512 _mm512_cvtepu16_epi32(__m256i x) {
    const uint16x8_t low = (uint16x8_t)x.a, high = (uint16x8_t)x.b;
    return (__m512){vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                    vmovl_high_u16(high)};
}
OP __m512 _mm512_cvtepu8_epi32(__m128i x) { return _mm512_cvtepu16_epi32(_mm256_cvtepu8_epi16(x)); }

OP Lanes narrowed(Lanes x, Lanes y) { return (Lanes)vuzp1q_u16((uint16x8_t)x, (uint16x8_t)y); }
OP __m256i _mm512_cvtepi32_epi16(__m512 x) { return (__m256i){narrowed(x.a, x.b), narrowed(x.c, x.d)}; }
OP __m128i _mm512_cvtepi32_epi8(__m512 x) {
    const __m256i two = _mm512_cvtepi32_epi16(x);
    return (__m128i)vuzp1q_u8((uint8x16_t)two.a, (uint8x16_t)two.b);
}
OP __m128i _mm512_cvtsepi32_epi8(__m512 x) {  // to the nearest that 8 bits hold
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32((int32x4_t)x.a), (int32x4_t)x.b);
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32((int32x4_t)x.c), (int32x4_t)x.d);
    return (__m128i)vqmovn_high_s16(vqmovn_s16(low), high);
}
OP __m128i _mm512_cvtepi64_epi16(__m512 x) {
    return narrowed(vuzp1q_u32(x.a, x.b), vuzp1q_u32(x.c, x.d));
}

OP __m512 _mm512_cvtph_ps(__m256i x) {
    const float16x8_t low = (float16x8_t)x.a, high = (float16x8_t)x.b;
    return (__m512){(Lanes)vcvt_f32_f16(vget_low_f16(low)), (Lanes)vcvt_high_f32_f16(low),
                    (Lanes)vcvt_f32_f16(vget_low_f16(high)), (Lanes)vcvt_high_f32_f16(high)};
}
OP Lanes to_float16(Lanes x, Lanes y) {
    return (Lanes)vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)x), (float32x4_t)y);
}
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 0
OP __m256i _mm512_cvtps_ph(__m512 x, int mode) {
    (void)mode;  // always to the nearest
    return (__m256i){to_float16(x.a, x.b), to_float16(x.c, x.d)};
}
OP uint16_t _cvtss_sh(float x, int mode) {
    (void)mode;
    return vget_lane_u16((uint16x4_t)vcvt_f16_f32(vdupq_n_f32(x)), 0);
}
OP float _cvtsh_ss(uint16_t x) { return vgetq_lane_f32(vcvt_f32_f16((float16x4_t)vdup_n_u16(x)), 0); }

// ---- bfloat16 --------------------------------------------------------------------------------------------

// To the nearest; NaN stays NaN. Subnormal numbers are rounded as well, which x86 makes 0.
OP Lanes to_bfloat16(Lanes x, Lanes y) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)x);
    return (Lanes)vcvtq_high_bf16_f32(low, (float32x4_t)y);
#else
    const Lanes limit = vdupq_n_u32(0x7F800000);
    const Lanes nan_x = vcgtq_u32(x & 0x7FFFFFFF, limit), nan_y = vcgtq_u32(y & 0x7FFFFFFF, limit);
    const Lanes up_x = x + 0x7FFF + (x >> 16 & 1), up_y = y + 0x7FFF + (y >> 16 & 1);
    x = vbslq_u32(nan_x, x | 0x400000, up_x), y = vbslq_u32(nan_y, y | 0x400000, up_y);
    return (Lanes)vuzp2q_u16((uint16x8_t)x, (uint16x8_t)y);
#endif
}
OP __m256i _mm512_cvtneps_pbh(__m512 x) { return (__m256i){to_bfloat16(x.a, x.b), to_bfloat16(x.c, x.d)}; }
OP __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return (__m512bh){to_bfloat16(low.a, low.b), to_bfloat16(low.c, low.d), to_bfloat16(high.a, high.b),
                      to_bfloat16(high.c, high.d)};
}
#define _mm_cvtneps_pbh(x) to_bfloat16((Lanes)(x), (Lanes)(x))

// sum += two of x times two of y, the upper one first, as on x86: each product is exact, and rounded once
// with its sum. BFDOT, which does both at once, rounds in a way of its own.
OP Lanes pairs_added(Lanes sum, Lanes x, Lanes y) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    const bfloat16x8_t a = (bfloat16x8_t)x, b = (bfloat16x8_t)y;
    return (Lanes)vbfmlalbq_f32(vbfmlaltq_f32((float32x4_t)sum, a, b), a, b);
#else
    const Lanes upper = vdupq_n_u32(0xFFFF0000);
    const float32x4_t odd = fused((float32x4_t)(x & upper), (float32x4_t)(y & upper), (float32x4_t)sum);
    return (Lanes)fused((float32x4_t)(x << 16), (float32x4_t)(y << 16), odd);
#endif
}
THREE(_mm512_dpbf16_ps, Lanes, pairs_added)

// ---- Tables ----------------------------------------------------------------------------------------------

OP uint8x16x4_t table_of(__m512 x) {
    return (uint8x16x4_t){{(uint8x16_t)x.a, (uint8x16_t)x.b, (uint8x16_t)x.c, (uint8x16_t)x.d}};
}
// Of 16 numbers of 32 bits, and of 32 of 16 bits: by the bytes of each.
OP Lanes found_32(uint8x16x4_t table, Lanes index) {
    return (Lanes)vqtbl4q_u8(table, (uint8x16_t)((index & 15) * 0x04040404 + 0x03020100));
}
OP Lanes found_16(uint8x16x4_t table, Lanes index) {
    return (Lanes)vqtbl4q_u8(table, (uint8x16_t)(((uint16x8_t)index & 31) * 0x0202 + 0x0100));
}
OP __m512 _mm512_permutexvar_ps(__m512 index, __m512 x) {
    const uint8x16x4_t table = table_of(x);
    return (__m512){found_32(table, index.a), found_32(table, index.b), found_32(table, index.c),
                    found_32(table, index.d)};
}
#define _mm512_permutexvar_epi32 _mm512_permutexvar_ps
OP __m512 _mm512_permutexvar_epi16(__m512 index, __m512 x) {
    const uint8x16x4_t table = table_of(x);
    return (__m512){found_16(table, index.a), found_16(table, index.b), found_16(table, index.c),
                    found_16(table, index.d)};
}
OP __m512 _mm512_broadcast_i64x4(__m256i x) { return (__m512){x.a, x.b, x.a, x.b}; }
OP __m512 _mm512_i32gather_ps(__m512 index, const float *p, int scale) {
    int32_t at[16];
    float x[16];
    _mm512_storeu_si512(at, index);
    for (int i = 0; i < 16; i++) memcpy(x + i, (const char *)p + (long)at[i] * scale, sizeof(float));
    return _mm512_loadu_ps(x);
}

OP __m128i _mm_shuffle_epi8(__m128i table, __m128i index) {
    return (__m128i)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)(index & 0x8F8F8F8F));
}
OP __m256i _mm256_shuffle_epi8(__m256i table, __m256i index) {
    return (__m256i){_mm_shuffle_epi8(table.a, index.a), _mm_shuffle_epi8(table.b, index.b)};
}

// ---- Parts of 16 bytes -----------------------------------------------------------------------------------

TWO(_mm512_unpacklo_epi32, Lanes, vzip1q_u32)
TWO(_mm512_unpackhi_epi32, Lanes, vzip2q_u32)
TWO(_mm512_unpacklo_epi64, uint64x2_t, vzip1q_u64)
TWO(_mm512_unpackhi_epi64, uint64x2_t, vzip2q_u64)
#define _mm512_unpacklo_ps _mm512_unpacklo_epi32
#define _mm512_unpackhi_ps _mm512_unpackhi_epi32
OP __m512 _mm512_shuffle_ps(__m512 x, __m512 y, int how) {  // the two that occur: lower or upper halves
    return how == 0x44 ? _mm512_unpacklo_epi64(x, y) : _mm512_unpackhi_epi64(x, y);
}
OP Lanes neighbours(Lanes x) { return vrev64q_u32(x); }
OP Lanes halves(Lanes x) { return vextq_u32(x, x, 2); }
ONE(swapped_neighbours, Lanes, neighbours)
ONE(swapped_halves, Lanes, halves)
OP __m512 _mm512_permute_ps(__m512 x, int how) {  // the two that occur
    return how == 0xB1 ? swapped_neighbours(x) : swapped_halves(x);
}

OP Lanes _mm512_extracti32x4_epi32(__m512 x, int i) {
    const Lanes low = i & 1 ? x.b : x.a, high = i & 1 ? x.d : x.c;
    return i & 2 ? high : low;
}
#define _mm512_castsi512_si128(x) ((x).a)
OP __m512 _mm512_shuffle_i32x4(__m512 x, __m512 y, int how) {
    return (__m512){_mm512_extracti32x4_epi32(x, how), _mm512_extracti32x4_epi32(x, how >> 2),
                    _mm512_extracti32x4_epi32(y, how >> 4), _mm512_extracti32x4_epi32(y, how >> 6)};
}
#define _mm512_shuffle_f32x4 _mm512_shuffle_i32x4
