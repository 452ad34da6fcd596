// What the blocks of GGUF's tensor types stand for, bit for bit as `formats/gguf_blocks.py` has it
// in PyTorch's operators: there each formula is explained. A block is taken apart into whole numbers q and,
// for each group of them, a scale and a minimum; then number = q * scale - minimum, rounded after the
// product.

typedef struct {
    int8_t q[256];
    float scale[16], minimum[16];
} Numbers;

#define BLOCK_OF(name) static void name(const uint8_t *restrict b, Numbers *restrict to)

INLINE float half(const uint8_t *b) {
    uint16_t h;
    memcpy(&h, b, 2);
    return _cvtsh_ss(h);
}

// ---- One scale for 32 numbers ----------------------------------------------------------------------------

// 16 bytes of two numbers: the lower halves, then the upper ones; `less` is taken off.
INLINE void two_of_bytes(const uint8_t *restrict b, int count, int less, int8_t *restrict q) {
    for (int j = 0; j < count; j++) q[j] = (b[j] & 15) - less;
    for (int j = 0; j < count; j++) q[count + j] = (b[j] >> 4) - less;
}

INLINE void add_fifth_bits(const uint8_t *restrict b, int8_t *restrict q) {
    uint32_t bits;
    memcpy(&bits, b, 4);
    for (int i = 0; i < 2; i++) {  // as they were written: 32 bytes at a time would wait for both
        const __m128i some = _mm_loadu_si128((const __m128i *)q + i);
        const __m128i more = _mm_mask_add_epi8(some, (__mmask16)(bits >> 16 * i), some, _mm_set1_epi8(16));
        _mm_storeu_si128((__m128i *)q + i, more);
    }
}

BLOCK_OF(q8_0) {
    to->scale[0] = half(b);
    memcpy(to->q, b + 2, 32);
}

BLOCK_OF(q4_0) {
    to->scale[0] = half(b);
    two_of_bytes(b + 2, 16, 8, to->q);
}

BLOCK_OF(q4_1) {
    to->scale[0] = half(b), to->minimum[0] = -half(b + 2);
    two_of_bytes(b + 4, 16, 0, to->q);
}

BLOCK_OF(q5_0) {
    to->scale[0] = half(b);
    two_of_bytes(b + 6, 16, 16, to->q);
    add_fifth_bits(b + 2, to->q);
}

BLOCK_OF(q5_1) {
    to->scale[0] = half(b), to->minimum[0] = -half(b + 2);
    two_of_bytes(b + 8, 16, 0, to->q);
    add_fifth_bits(b + 4, to->q);
}

// ---- k-quants: 256 numbers in groups ---------------------------------------------------------------------

// Twice 32 bytes of four numbers of 2 bits, times `unit`, added to what is there.
INLINE void add_pairs_of_bits(const uint8_t *restrict b, int unit, int8_t *restrict q) {
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < 4; p++)
            for (int j = 0; j < 32; j++) q[h * 128 + p * 32 + j] += (b[h * 32 + j] >> 2 * p & 3) * unit;
}

// 32 bytes of eight bits, times `unit`, added to what is there.
INLINE void add_bits(const uint8_t *restrict b, int unit, int8_t *restrict q) {
    for (int p = 0; p < 8; p++)
        for (int j = 0; j < 32; j++) q[p * 32 + j] += (b[j] >> p & 1) * unit;
}

// Eight scales and eight minima of 6 bits in 12 bytes, behind d and dmin.
INLINE void six_bits(const uint8_t *restrict b, Numbers *restrict to) {
    const float d = half(b), dmin = half(b + 2);
    const uint8_t *s = b + 4, *m = b + 8, *low = b + 12;
    for (int i = 0; i < 4; i++) {
        to->scale[i] = d * (s[i] & 63), to->minimum[i] = dmin * (m[i] & 63);
        to->scale[4 + i] = d * ((low[i] & 15) | s[i] >> 6 << 4);
        to->minimum[4 + i] = dmin * (low[i] >> 4 | m[i] >> 6 << 4);
    }
}

BLOCK_OF(q2_k) {
    const float d = half(b + 80), dmin = half(b + 82);
    for (int i = 0; i < 16; i++) to->scale[i] = d * (b[i] & 15), to->minimum[i] = dmin * (b[i] >> 4);
    memset(to->q, 0, 256);
    add_pairs_of_bits(b + 16, 1, to->q);
}

BLOCK_OF(q3_k) {
    const float d = half(b + 108);
    for (int i = 0; i < 16; i++) {
        const int low = i < 8 ? b[96 + i] & 15 : b[88 + i] >> 4;
        to->scale[i] = d * (low + (b[104 + i % 4] >> i / 4 * 2 & 3) * 16 - 32);
    }
    memset(to->q, -4, 256);
    add_pairs_of_bits(b + 32, 1, to->q);
    add_bits(b, 4, to->q);
}

BLOCK_OF(q4_k) {
    six_bits(b, to);
    for (int i = 0; i < 4; i++) two_of_bytes(b + 16 + 32 * i, 32, 0, to->q + 64 * i);
}

BLOCK_OF(q5_k) {
    six_bits(b, to);
    for (int i = 0; i < 4; i++) two_of_bytes(b + 48 + 32 * i, 32, 0, to->q + 64 * i);
    add_bits(b + 16, 16, to->q);
}

BLOCK_OF(q6_k) {
    const float d = half(b + 208);
    for (int i = 0; i < 16; i++) to->scale[i] = d * (int8_t)b[192 + i];
    for (int i = 0; i < 2; i++) two_of_bytes(b + 64 * i, 64, 32, to->q + 128 * i);
    add_pairs_of_bits(b + 128, 16, to->q);
}

// ---- Four bits that choose from a table ------------------------------------------------------------------

INLINE void chosen(const uint8_t *b, const int8_t *table, int8_t *q) {
    const __m128i all = _mm_loadu_si128((const __m128i *)table), low = _mm_set1_epi8(15);
    const __m128i two = _mm_loadu_si128((const __m128i *)b);
    _mm_storeu_si128((__m128i *)q, _mm_shuffle_epi8(all, _mm_and_si128(two, low)));
    _mm_storeu_si128((__m128i *)(q + 16), _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16(two, 4), low)));
}

static const int8_t KVALUES_IQ4NL[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                       1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t E2M1[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

BLOCK_OF(iq4_nl) {
    to->scale[0] = half(b);
    chosen(b + 2, KVALUES_IQ4NL, to->q);
}

BLOCK_OF(iq4_xs) {
    const float d = half(b);
    for (int i = 0; i < 8; i++) {
        const int low = b[4 + i / 2] >> i % 2 * 4 & 15, high = b[2 + i / 4] >> i % 4 * 2 & 3;
        to->scale[i] = d * (low + high * 16 - 32);
        chosen(b + 8 + 16 * i, KVALUES_IQ4NL, to->q + 32 * i);
    }
}

BLOCK_OF(mxfp4) {
    to->scale[0] = ldexpf(1, b[0] - 128);
    chosen(b + 1, E2M1, to->q);
}

// ---- All of a tensor -------------------------------------------------------------------------------------

static const struct {
    void (*take)(const uint8_t *restrict, Numbers *restrict);
    long bytes, numbers, group;
} BLOCKS[] = {  // in the order of `calls.BLOCKS`
    {q8_0, 34, 32, 32},    {q4_0, 18, 32, 32},    {q4_1, 20, 32, 32},    {q5_0, 22, 32, 32},
    {q5_1, 24, 32, 32},    {q2_k, 84, 256, 16},   {q3_k, 110, 256, 16},  {q4_k, 144, 256, 32},
    {q5_k, 176, 256, 32},  {q6_k, 210, 256, 16},  {iq4_nl, 18, 32, 32},  {iq4_xs, 136, 256, 32},
    {mxfp4, 17, 32, 32},
};

// bfloat16 as PyTorch rounds it. The instruction makes 0 of numbers that are subnormal, and keeps NaNs apart.
INLINE void store_rounded(uint16_t *to, __m512 v) {
    if (!_mm512_fpclass_ps_mask(v, 0xA1)) {
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v));
        return;
    }
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    r = _mm512_srli_epi32(r, 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(r));
}

// y: numbers of `kind`, of `count` blocks of a type.
void dequantize_blocks(int type, const uint8_t *b, char *y, int kind, long count, int threads) {
    const long size = BLOCKS[type].numbers, group = BLOCKS[type].group;
#pragma omp parallel num_threads(threads)
    {
        Numbers own = {0};
#pragma omp for schedule(static)
        for (long n = 0; n < count; n++) {
            BLOCKS[type].take(b + n * BLOCKS[type].bytes, &own);
            for (long i = 0; i < size; i += 16) {
                const __m512 q = load(own.q, INT8, i, 0xFFFF), scale = _mm512_set1_ps(own.scale[i / group]);
                __m512 v = _mm512_mul_round_ps(q, scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                v = _mm512_sub_ps(v, _mm512_set1_ps(own.minimum[i / group]));
                if (kind == BFLOAT16) store_rounded((uint16_t *)y + n * size + i, v);
                else store(y, kind, n * size + i, 0xFFFF, v);
            }
        }
    }
}

// q: the numbers of Q8_0, 32 bytes a block; of Q4_0 and Q4_1 in pairs, number 2 i in byte i's lower half.
void whole_numbers_of_blocks(int type, const uint8_t *b, uint8_t *q, long count, int threads) {
    const long bytes = BLOCKS[type].bytes, size = bytes == 34 ? 32 : 16;
    const __m128i low = _mm_set1_epi8(15), pair = _mm_set1_epi16(1 | 16 << 8);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < count; n++) {
        const uint8_t *from = b + (n + 1) * bytes - size;
        if (size == 32) {
            memcpy(q + n * 32, from, 32);
            continue;
        }
        const __m128i two = _mm_loadu_si128((const __m128i *)from);
        const __m128i first = _mm_maddubs_epi16(_mm_and_si128(two, low), pair);
        const __m128i second = _mm_maddubs_epi16(_mm_and_si128(_mm_srli_epi16(two, 4), low), pair);
        _mm_storeu_si128((__m128i *)(q + n * 16), _mm_packus_epi16(first, second));
    }
}
