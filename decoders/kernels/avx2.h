// For processors with AVX2, FMA and F16C alone: the instructions of AVX-512 that the kernels are written in,
// each out of two of AVX2. Here is what the kernels use, as they use it. It is compiled with
// -ffp-contract=off: a product and a sum are one operation only where the kernels say so.

#include <immintrin.h>
#include <string.h>

enum {  // see `avx512.h`
    PAIRS = 0,
    MOVED = 0,
    X_ROWS = 3,
    W_ROWS = 2,
    SUMS = 4,
};

#define OWN static inline __attribute__((always_inline))

// 16 lanes of 32 bits. Whole numbers are in the same halves: casts within cost nothing.
typedef struct {
    __m256 low, high;
} Halves;
#define __m512 Halves
#define __m512i Halves
#define __m512bh Halves

OWN Halves of_integers(__m256i low, __m256i high) { return (Halves){(__m256)low, (__m256)high}; }

// f of each half: of one vector or two, of floats or of whole numbers, and of what both halves have alike.
#define ONE(f, x, ...) \
    ({ \
        const Halves x_ = (x); \
        (Halves){(__m256)f(x_.low, ##__VA_ARGS__), (__m256)f(x_.high, ##__VA_ARGS__)}; \
    })
#define TWO(f, x, y, ...) \
    ({ \
        const Halves x_ = (x), y_ = (y); \
        (Halves){f(x_.low, y_.low, ##__VA_ARGS__), f(x_.high, y_.high, ##__VA_ARGS__)}; \
    })
#define INTEGER(f, x, ...) \
    ({ \
        const Halves x_ = (x); \
        (Halves){(__m256)f((__m256i)x_.low, ##__VA_ARGS__), (__m256)f((__m256i)x_.high, ##__VA_ARGS__)}; \
    })
#define INTEGERS(f, x, y, ...) \
    ({ \
        const Halves x_ = (x), y_ = (y); \
        of_integers(f((__m256i)x_.low, (__m256i)y_.low, ##__VA_ARGS__), \
                    f((__m256i)x_.high, (__m256i)y_.high, ##__VA_ARGS__)); \
    })

// ---- Masks ------------------------------------------------------------------------------------------------

// A lane of ones for each of the lowest eight bits.
OWN __m256i lanes_of(unsigned mask) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bits), bits);
}

// y where the bit is set, else x.
OWN Halves blended(unsigned mask, Halves x, Halves y) {
    if (mask == 0xFFFF) return y;
    return (Halves){_mm256_blendv_ps(x.low, y.low, (__m256)lanes_of(mask)),
                    _mm256_blendv_ps(x.high, y.high, (__m256)lanes_of(mask >> 8))};
}

#define _mm512_mask_mov_epi32(old, m, x) blended(m, old, x)
#define _mm512_maskz_mov_ps(m, x) blended(m, _mm512_setzero_ps(), x)
#define _mm512_maskz_sub_ps(m, x, y) blended(m, _mm512_setzero_ps(), _mm512_sub_ps(x, y))
#define _mm512_maskz_div_ps(m, x, y) blended(m, _mm512_setzero_ps(), _mm512_div_ps(x, y))
#define _mm512_mask_mul_ps(old, m, x, y) blended(m, old, _mm512_mul_ps(x, y))
#define _mm512_mask_max_ps(old, m, x, y) blended(m, old, _mm512_max_ps(x, y))

OWN __mmask16 mask_of(Halves x) {  // the highest bit of each lane
    return (__mmask16)(_mm256_movemask_ps(x.low) | _mm256_movemask_ps(x.high) << 8);
}
#define _mm512_cmp_ps_mask(x, y, how) mask_of(TWO(_mm256_cmp_ps, x, y, how))
#define _mm512_fpclass_ps_mask(x, which) _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)  // subnormals are right here

// ---- Loads and stores -------------------------------------------------------------------------------------

OWN Halves load_all(const void *p) {
    return (Halves){_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)p + 8)};
}
OWN void store_all(void *p, Halves x) {
    _mm256_storeu_ps((float *)p, x.low);
    _mm256_storeu_ps((float *)p + 8, x.high);
}
#define _mm512_load_ps(p) load_all(p)
#define _mm512_loadu_ps(p) load_all(p)
#define _mm512_load_si512(p) load_all(p)
#define _mm512_loadu_si512(p) load_all(p)
#define _mm512_store_ps(p, x) store_all(p, x)
#define _mm512_storeu_ps(p, x) store_all(p, x)
#define _mm512_store_si512(p, x) store_all(p, x)
#define _mm512_storeu_si512(p, x) store_all(p, x)

OWN Halves load_lanes(unsigned mask, const float *p) {
    if (mask == 0xFFFF) return load_all(p);
    return (Halves){_mm256_maskload_ps(p, lanes_of(mask)), _mm256_maskload_ps(p + 8, lanes_of(mask >> 8))};
}
OWN void store_lanes(float *p, unsigned mask, Halves x) {
    _mm256_maskstore_ps(p, lanes_of(mask), x.low);
    _mm256_maskstore_ps(p + 8, lanes_of(mask >> 8), x.high);
}
#define _mm512_maskz_loadu_ps(m, p) load_lanes(m, p)
#define _mm512_maskz_loadu_epi32(m, p) load_lanes(m, (const float *)(p))
#define _mm512_mask_storeu_ps(p, m, x) store_lanes(p, m, x)
#define _mm_maskz_loadu_ps(m, p) _mm_maskload_ps(p, _mm256_castsi256_si128(lanes_of(m)))
#define _mm_mask_storeu_ps(p, m, x) _mm_maskstore_ps(p, _mm256_castsi256_si128(lanes_of(m)), x)

// There are no masked loads and stores of 16 and 8 bits. Masks are those of the first lanes, at the end of a
// row. Not by way of memory: a load waits long for bytes that were just stored one by one.
static __attribute__((noinline)) __m256i load_part(const void *p, long bytes) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i whole = _mm256_set1_epi32((int)(bytes >> 2)), is_last = _mm256_cmpeq_epi32(whole, lanes);
    unsigned last = 0;
    for (long i = bytes & ~3L; 0 <= i && i < bytes && i < 32; i++)
        last |= (unsigned)((const unsigned char *)p)[i] << i % 4 * 8;
    const __m256i x = _mm256_maskload_epi32(p, _mm256_cmpgt_epi32(whole, lanes));
    return _mm256_or_si256(x, _mm256_and_si256(is_last, _mm256_set1_epi32((int)last)));
}
static __attribute__((noinline)) void store_part(void *p, __m256i x, long bytes) {
    char all[32];
    _mm256_storeu_si256((__m256i *)all, x);
    memcpy(p, all, bytes);
}
OWN long lanes_in(unsigned long long mask) { return __builtin_popcountll(mask); }
OWN __m256i load_16_bits(unsigned mask, const void *p) {
    return mask == 0xFFFF ? _mm256_loadu_si256((const __m256i *)p) : load_part(p, 2 * lanes_in(mask));
}
OWN __m128i load_8_bits(unsigned mask, const void *p) {
    return mask == 0xFFFF ? _mm_loadu_si128((const __m128i *)p)
                          : _mm256_castsi256_si128(load_part(p, lanes_in(mask)));
}
#define _mm256_maskz_loadu_epi16(m, p) load_16_bits(m, p)
#define _mm_maskz_loadu_epi8(m, p) load_8_bits(m, p)
#define _mm512_maskz_loadu_epi8(m, p) \
    of_integers(load_part(p, lanes_in(m)), load_part((const char *)(p) + 32, lanes_in(m) - 32))
#define _mm256_mask_storeu_epi16(p, m, x) store_part(p, x, 2 * lanes_in(m))
#define _mm_mask_storeu_epi8(p, m, x) store_part(p, _mm256_castsi128_si256(x), lanes_in(m))

// ---- Floats -----------------------------------------------------------------------------------------------

#define _mm512_setzero_ps() ((Halves){_mm256_setzero_ps(), _mm256_setzero_ps()})
OWN Halves all_alike(float x) { return (Halves){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define _mm512_set1_ps(x) all_alike(x)
#define _mm512_set_ps(p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a) \
    ((Halves){_mm256_set_ps(h, g, f, e, d, c, b, a), _mm256_set_ps(p, o, n, m, l, k, j, i)})

#define _mm512_add_ps(x, y) TWO(_mm256_add_ps, x, y)
#define _mm512_sub_ps(x, y) TWO(_mm256_sub_ps, x, y)
#define _mm512_mul_ps(x, y) TWO(_mm256_mul_ps, x, y)
#define _mm512_mul_round_ps(x, y, mode) TWO(_mm256_mul_ps, x, y)
#define _mm512_div_ps(x, y) TWO(_mm256_div_ps, x, y)
#define _mm512_max_ps(x, y) TWO(_mm256_max_ps, x, y)
#define _mm512_min_ps(x, y) TWO(_mm256_min_ps, x, y)
#define _mm512_xor_ps(x, y) TWO(_mm256_xor_ps, x, y)
#define _mm512_abs_ps(x) TWO(_mm256_andnot_ps, _mm512_set1_ps(-0.f), x)
#define _mm512_roundscale_ps(x, mode) ONE(_mm256_round_ps, x, (mode) | _MM_FROUND_NO_EXC)

OWN Halves fused(Halves x, Halves y, Halves z) {
    return (Halves){_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
#define _mm512_fmadd_ps(x, y, z) fused(x, y, z)
#define _mm512_fnmadd_ps(x, y, z) fused(_mm512_xor_ps(x, _mm512_set1_ps(-0.f)), y, z)

// y 2^n for whole numbers n from -150 to 0, in two steps: 2^-150 is no float.
OWN __m256 times_power(__m256 y, __m256 n) {
    const __m256i all = _mm256_cvtps_epi32(n), some = _mm256_srai_epi32(all, 1);
    const __m256i rest = _mm256_sub_epi32(all, some), bias = _mm256_set1_epi32(127);
    y = _mm256_mul_ps(y, (__m256)_mm256_slli_epi32(_mm256_add_epi32(some, bias), 23));
    return _mm256_mul_ps(y, (__m256)_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}
#define _mm512_scalef_ps(y, n) TWO(times_power, y, n)

// Of all lanes: `f` is add_ps, max_ps or min_ps.
#define REDUCED(f, x) \
    ({ \
        const Halves x_ = (x); \
        const __m256 eight = _mm256_##f(x_.low, x_.high); \
        const __m128 four = _mm_##f(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
        const __m128 two = _mm_##f(four, _mm_movehl_ps(four, four)); \
        _mm_cvtss_f32(_mm_##f(two, _mm_movehdup_ps(two))); \
    })
#define _mm512_reduce_add_ps(x) REDUCED(add_ps, x)
#define _mm512_reduce_max_ps(x) REDUCED(max_ps, x)
#define _mm512_reduce_min_ps(x) REDUCED(min_ps, x)
#define _mm512_cvtss_f32(x) _mm256_cvtss_f32((x).low)

// ---- Whole numbers ----------------------------------------------------------------------------------------

#define _mm512_setzero_si512() _mm512_setzero_ps()
OWN Halves integers_alike(int x) { return of_integers(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
#define _mm512_set1_epi32(x) integers_alike(x)
#define _mm512_set1_epi64(x) of_integers(_mm256_set1_epi64x(x), _mm256_set1_epi64x(x))
#define _mm512_set1_epi8(x) of_integers(_mm256_set1_epi8(x), _mm256_set1_epi8(x))
#define _mm512_set_epi32(p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a) \
    of_integers(_mm256_set_epi32(h, g, f, e, d, c, b, a), _mm256_set_epi32(p, o, n, m, l, k, j, i))

#define _mm512_add_epi32(x, y) INTEGERS(_mm256_add_epi32, x, y)
#define _mm512_sub_epi32(x, y) INTEGERS(_mm256_sub_epi32, x, y)
#define _mm512_min_epi32(x, y) INTEGERS(_mm256_min_epi32, x, y)
#define _mm512_and_si512(x, y) INTEGERS(_mm256_and_si256, x, y)
#define _mm512_or_si512(x, y) INTEGERS(_mm256_or_si256, x, y)
#define _mm512_srlv_epi32(x, n) INTEGERS(_mm256_srlv_epi32, x, n)
#define _mm512_srl_epi32(x, n) INTEGER(_mm256_srl_epi32, x, n)
#define _mm512_slli_epi32(x, n) INTEGER(_mm256_slli_epi32, x, n)
#define _mm512_srli_epi16(x, n) INTEGER(_mm256_srli_epi16, x, n)
#define _mm512_srli_epi32(x, n) INTEGER(_mm256_srli_epi32, x, n)
#define _mm512_srli_epi64(x, n) INTEGER(_mm256_srli_epi64, x, n)

OWN int sum_of_lanes(Halves x) {
    const __m256i eight = _mm256_add_epi32((__m256i)x.low, (__m256i)x.high);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
#define _mm512_reduce_add_epi32(x) sum_of_lanes(x)

// The instruction multiplies unsigned by signed, and cuts off the sum of two products at 16 bits. |w| is 128
// at most, and x, with the sign of w, 127: the sum fits.
OWN __m256i products_of_bytes(__m256i x, __m256i w) {
    const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
#define multiply_bytes(sum, x, w) _mm512_add_epi32(sum, INTEGERS(products_of_bytes, x, w))

OWN __m128i sum_where(__m128i old, int mask, __m128i x, __m128i y) {
    const __m128i bits = _mm_set1_epi64x((long long)0x8040201008040201ULL);
    const __m128i own = _mm_unpacklo_epi64(_mm_set1_epi8((char)mask), _mm_set1_epi8((char)(mask >> 8)));
    return _mm_blendv_epi8(old, _mm_add_epi8(x, y), _mm_cmpeq_epi8(_mm_and_si128(own, bits), bits));
}
#define _mm_mask_add_epi8(old, m, x, y) sum_where(old, m, x, y)

// ---- Conversions ------------------------------------------------------------------------------------------

#define _mm512_castps_si512(x) (x)
#define _mm512_castsi512_ps(x) (x)
#define _mm512_castps512_ps256(x) (x).low
#define _mm512_extractf32x8_ps(x, i) (x).high
OWN __m128i quarter_of(Halves x, int i) {
    const __m256i half = (__m256i)(i < 2 ? x.low : x.high);
    return i % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}
#define _mm512_castsi512_si128(x) quarter_of(x, 0)
#define _mm512_extracti32x4_epi32(x, i) quarter_of(x, i)

#define _mm512_cvtepi32_ps(x) INTEGER(_mm256_cvtepi32_ps, x)
#define _mm512_cvtps_epi32(x) ONE(_mm256_cvtps_epi32, x)
#define floats_of_four_bits(q) _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(15)))

#define OF_BYTES(f, x) \
    ({ \
        const __m128i x_ = (x); \
        of_integers(f(x_), f(_mm_unpackhi_epi64(x_, x_))); \
    })
#define _mm512_cvtepi8_epi32(x) OF_BYTES(_mm256_cvtepi8_epi32, x)
#define _mm512_cvtepu8_epi32(x) OF_BYTES(_mm256_cvtepu8_epi32, x)

#define OF_16_BITS(f, x) \
    ({ \
        const __m256i x_ = (x); \
        (Halves){(__m256)f(_mm256_castsi256_si128(x_)), (__m256)f(_mm256_extracti128_si256(x_, 1))}; \
    })
#define _mm512_cvtepu16_epi32(x) OF_16_BITS(_mm256_cvtepu16_epi32, x)
#define _mm512_cvtph_ps(x) OF_16_BITS(_mm256_cvtph_ps, x)

// The lowest 16 bits, the lowest 8, the nearest of 8. Packing works on quarters, which are then put in order.
OWN __m256i to_16_bits(Halves x) {
    const __m256i mask = _mm256_set1_epi32(0xFFFF), low = _mm256_and_si256((__m256i)x.low, mask);
    const __m256i packed = _mm256_packus_epi32(low, _mm256_and_si256((__m256i)x.high, mask));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}
OWN __m128i to_8_bits(Halves x) {
    const __m256i v = _mm256_and_si256(to_16_bits(x), _mm256_set1_epi16(255));
    return _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
OWN __m128i to_nearest_8_bits(Halves x) {
    const __m256i packed = _mm256_packs_epi32((__m256i)x.low, (__m256i)x.high);
    const __m256i v = _mm256_permute4x64_epi64(packed, 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
#define _mm512_cvtepi32_epi16(x) to_16_bits(x)
#define _mm512_cvtepi32_epi8(x) to_8_bits(x)
#define _mm512_cvtsepi32_epi8(x) to_nearest_8_bits(x)

#define _mm512_cvtps_ph(x, mode) \
    ({ \
        const Halves x_ = (x); \
        _mm256_set_m128i(_mm256_cvtps_ph(x_.high, mode), _mm256_cvtps_ph(x_.low, mode)); \
    })

// bfloat16 in the lowest 16 bits: the nearest, of two the even one. NaN stays NaN.
OWN __m256i to_bfloat16(__m256 x) {
    const __m256i upper = _mm256_srli_epi32((__m256i)x, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32((__m256i)x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(64));
    const __m256i is_nan = (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, is_nan);
}
#define _mm512_cvtneps_pbh(x) to_16_bits(ONE(to_bfloat16, x))
#define _mm_cvtneps_pbh(x) _mm256_castsi256_si128(to_bfloat16(_mm256_castps128_ps256(x)))  // of one lane

// ---- Lanes in another order -------------------------------------------------------------------------------

// Looked up in a table of 16 by the lowest four bits.
OWN __m256 of_sixteen(__m256 index, Halves table) {
    const __m256i i = (__m256i)index;
    const __m256 is_high = (__m256)_mm256_slli_epi32(i, 28);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, i), _mm256_permutevar8x32_ps(table.high, i),
                            is_high);
}
OWN Halves looked_up(Halves index, Halves table) { return ONE(of_sixteen, index, table); }
#define _mm512_permutexvar_ps(index, table) looked_up(index, table)
#define _mm512_permutexvar_epi32(index, table) looked_up(index, table)

OWN Halves gathered(Halves index, const float *p) {
    return (Halves){_mm256_i32gather_ps(p, (__m256i)index.low, 4),
                    _mm256_i32gather_ps(p, (__m256i)index.high, 4)};
}
#define _mm512_i32gather_ps(index, p, scale) gathered(index, p)

// Within each quarter.
#define _mm512_permute_ps(x, how) ONE(_mm256_permute_ps, x, how)
#define _mm512_shuffle_ps(x, y, how) TWO(_mm256_shuffle_ps, x, y, how)
#define _mm512_unpacklo_ps(x, y) TWO(_mm256_unpacklo_ps, x, y)
#define _mm512_unpackhi_ps(x, y) TWO(_mm256_unpackhi_ps, x, y)
#define _mm512_unpacklo_epi32(x, y) INTEGERS(_mm256_unpacklo_epi32, x, y)
#define _mm512_unpackhi_epi32(x, y) INTEGERS(_mm256_unpackhi_epi32, x, y)
#define _mm512_unpacklo_epi64(x, y) INTEGERS(_mm256_unpacklo_epi64, x, y)
#define _mm512_unpackhi_epi64(x, y) INTEGERS(_mm256_unpackhi_epi64, x, y)

// Two quarters of x, then two of y.
#define QUARTERS(x, how) _mm256_permute2f128_ps((x).low, (x).high, ((how) & 3) | ((how) >> 2 & 3) << 4)
#define _mm512_shuffle_f32x4(x, y, how) ((Halves){QUARTERS(x, how), QUARTERS(y, (how) >> 4)})
#define _mm512_shuffle_i32x4(x, y, how) _mm512_shuffle_f32x4(x, y, how)

// ---- Left out ---------------------------------------------------------------------------------------------
// The compiler reads these and drops them, since PAIRS and MOVED are 0; it refuses where it cannot.

#define LEFT_OUT __attribute__((const, error("not for AVX2")))
LEFT_OUT Halves no_pairs(Halves sum, Halves x, Halves y);
LEFT_OUT Halves no_unsigned_bytes(Halves sum, Halves x, Halves y);
LEFT_OUT Halves no_two_of_16_bits(Halves high, Halves low);
LEFT_OUT Halves no_table_of_16_bits(Halves index, Halves table);
LEFT_OUT Halves no_half_twice(__m256i x);
LEFT_OUT __m128i no_quarters(Halves x);
LEFT_OUT Halves no_load(unsigned mask, const void *p);
LEFT_OUT int no_store(void *p, unsigned mask, Halves x);
#define _mm512_dpbf16_ps no_pairs
#define _mm512_dpbusd_epi32 no_unsigned_bytes
#define _mm512_cvtne2ps_pbh no_two_of_16_bits
#define _mm512_permutexvar_epi16 no_table_of_16_bits
#define _mm512_broadcast_i64x4 no_half_twice
#define _mm512_cvtepi64_epi16 no_quarters
#define _mm512_maskz_loadu_epi16 no_load
#define _mm512_mask_storeu_epi16 no_store
