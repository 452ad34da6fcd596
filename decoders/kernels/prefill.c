// Products of many rows with 4-bit weights, the rows of x rounded to 8 bits (W4A8): sums of whole numbers for
// each 256 inputs, which then take their scales. Included by `plan.c`.
//
// y[m, n] = sum over g of sx[m, g] sw[n, g] (whole x . whole w) + bias[n]
//
// The weights become 8 bits again, 256 with a scale: their second rounding is a twelfth of the first, where
// they are normally distributed. Each 256 inputs of a row of x have a scale of their own, so that one large
// activation costs few others their bits, and no row depends on another. The instruction multiplies
// unsigned by signed: x is moved up by 128 (MOVED), and 128 times the sum of w's numbers taken off again.

enum { GROUP = 256 };  // inputs that share a scale

// The rows of x as whole numbers.
typedef struct {
    uint8_t *q;    // [M][K], signed without MOVED
    float *scale;  // [M][groups]
    long K, groups;  // K: inputs, rounded up to whole blocks of 128
} Rounded;

// BLOCK rows of w, NEAR * 4 inputs of each, in strips of 16 rows with 4 numbers of each side by side.
typedef struct {
    char *strips;
    int32_t *sum;  // [group][BLOCK]: 128 times that of a row
    float *scale;  // [group][BLOCK]
} Strips;

static void round_activations(const char *x, int kind, long inputs, const Rounded *to, long m) {
    for (long g = 0; g < to->groups; g++) {
        const long k = g * GROUP, count = inputs - k < GROUP ? inputs - k : GROUP;
        const float top = largest(x, kind, k, count);
        const __m512 times = _mm512_set1_ps(top > 0 ? 127.f / top : 0);
        to->scale[m * to->groups + g] = top / 127.f;
        for (long i = k; i < k + GROUP && i < to->K; i += 16) {
            const __m512 v = load(x, kind, i, i < inputs ? first(inputs - i) : 0);
            const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(v, times));
            store_bytes(to->q + m * to->K + i, 0xFFFF,
                        _mm512_cvtepi32_epi8(_mm512_add_epi32(n, _mm512_set1_epi32(MOVED))));
        }
    }
}

// 16 parts of a row of w, from part g on: what scales and offsets become where a group's largest number is
// 127, and what that is.
INLINE __m512 scales_of_127(const Layer *layer, long n, long parts, long g, __m512 *scale, __m512 *offset) {
    groups_of(layer, n, parts, g, scale, offset);
    const __m512 last = _mm512_fmadd_ps(_mm512_set1_ps(15), *scale, *offset);
    __m512 top = _mm512_max_ps(_mm512_abs_ps(*offset), _mm512_abs_ps(last));
    top = _mm512_max_ps(top, _mm512_permute_ps(top, 0xB1));  // of the eight parts of a group
    top = _mm512_max_ps(top, _mm512_permute_ps(top, 0x4E));
    top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xB1));
    const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 times = _mm512_maskz_div_ps(some, _mm512_set1_ps(127), top);
    *scale = _mm512_mul_ps(*scale, times), *offset = _mm512_mul_ps(*offset, times);
    return _mm512_mul_ps(top, _mm512_set1_ps(1 / 127.f));
}

// `count` inputs of row n of w, from k on, as signed bytes by a table for each 32; a group's scale goes to
// every BLOCK-th number of `scales`.
static void bytes_of_row(const Layer *layer, long n, long k, long count, char *to, float *scales) {
    const __m512 value = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const long parts = layer->stride / 16, first_part = k / 32;
    const uint8_t *w = (const uint8_t *)layer->w + (n * parts + first_part) * 16;
    for (long part = 0; part < count / 32; part += 16) {
        __m512 scale, offset;
        float tops[16];
        _mm512_storeu_ps(tops, scales_of_127(layer, n, parts, first_part + part, &scale, &offset));
        for (long j = 0; j < 16 && part + j < count / 32; j++) {
            const __m512i own = _mm512_set1_epi32((int)j);
            const __m512 numbers = _mm512_fmadd_ps(value, _mm512_permutexvar_ps(own, scale),
                                                   _mm512_permutexvar_ps(own, offset));
            const __m128i table = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers));
            const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)w + part + j));
            const __m256i q =
                _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), _mm256_set1_epi8(15));
            _mm256_store_si256((__m256i *)to + part + j,
                               _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), q));
            if (j % 8 == 0) scales[(part + j) / 8 * BLOCK] = tops[j];
        }
    }
}

// `rows` rows of w, from n on, and of these `count` inputs from k on.
static void lay_out(const Layer *layer, long n, int rows, long k, long count, char *own, const Strips *to) {
    const long groups = (count + GROUP - 1) / GROUP;
    if (rows < BLOCK) memset(to->scale, 0, groups * BLOCK * sizeof(float));
    for (int r = 0; r < BLOCK; r++) {
        char *row = own + r % 16 * NEAR * 4;
        if (r < rows) bytes_of_row(layer, n + r, k, count, row, to->scale + r);
        else memset(row, 0, count);
        for (long i = 0; r % 16 == 15 && i < count; i += 64)
            transpose_tile(own + i, to->strips + i * BLOCK + r / 16 * 64);
    }
    for (long g = 0; g < groups; g++)
        for (int r = 0; r < BLOCK; r += 16) {
            const char *strip = to->strips + r * 4;
            __m512i sum = _mm512_setzero_si512();
            for (long i = g * GROUP; i < (g + 1) * GROUP && i < count && MOVED; i += 4)
                sum = multiply_bytes(sum, _mm512_set1_epi8(1), _mm512_load_si512(strip + i * BLOCK));
            _mm512_store_si512(to->sum + g * BLOCK + r, _mm512_slli_epi32(sum, 7));
        }
}

// Up to X_ROWS rows of x, from m on, with group g of the strips, which is number `at` in x, added to `out`
// [M][BLOCK].
static void some_rows_with_group(int M, const Rounded *x, long m, long at, const Strips *w, long g,
                                 float *out) {
    int32_t whole[X_ROWS * BLOCK] __attribute__((aligned(64)));
    const long left = x->K - at * GROUP, count = left < GROUP ? left : GROUP;
    const char *q = (const char *)x->q + m * x->K + at * GROUP;
    whole_strips(M, q, x->K, w->strips + g * GROUP * BLOCK, count / 4, 1, whole);
    for (int r = 0; r < BLOCK; r += 16) {
        const __m512i moved = _mm512_load_si512(w->sum + g * BLOCK + r);
        const __m512 scale = _mm512_load_ps(w->scale + g * BLOCK + r);
        for (int i = 0; i < M; i++) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x->scale[(m + i) * x->groups + at]));
            const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(whole + i * BLOCK + r), moved);
            const __m512 before = at ? _mm512_load_ps(out + i * BLOCK + r) : _mm512_setzero_ps();
            _mm512_store_ps(out + i * BLOCK + r, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, before));
        }
    }
}

// BLOCK outputs, from n on, of all rows.
static void block_of_outputs(const Rounded *x, const Layer *layer, int kind, long M, long n, char *own,
                             const Strips *w, float *out) {
    const int rows = layer->N - n < BLOCK ? (int)(layer->N - n) : BLOCK;
    for (long k = 0; k < x->K; k += NEAR * 4) {
        const long count = x->K - k < NEAR * 4 ? x->K - k : NEAR * 4;
        lay_out(layer, n, rows, k, count, own, w);
        for (long g = 0; g * GROUP < count; g++)
            for (long m = 0; m < M; m += X_ROWS)
                some_rows_with_group(next_rows(M - m), x, m, k / GROUP + g, w, g, out + m * BLOCK);
    }
    for (long m = 0; m < M; m++)
        for (int r = 0; r < rows; r += 16) {
            const __mmask16 mask = first(rows - r);
            __m512 v = _mm512_load_ps(out + m * BLOCK + r);
            if (layer->bias) v = _mm512_add_ps(v, load(layer->bias, kind, n + r, mask));
            store(layer->y, kind, m * layer->N + n + r, mask, v);
        }
}

// x and y are of `kind`; w has 4 bits.
void w4a8_product(const char *x, const Layer *layer, int count, int kind, long M, long inputs,
                  int threads) {
    const long K = (inputs + 127) / 128 * 128, groups = (K + GROUP - 1) / GROUP;
    const long table = NEAR * 4 / GROUP * BLOCK;
    const Rounded rounded = {aligned_alloc(64, M * K), malloc(M * groups * sizeof(float)), K, groups};
#pragma omp parallel num_threads(threads)
    {
        const Team here = team_here(0), *team = &here;
        char *own = aligned_alloc(64, (BLOCK + 16) * NEAR * 4);
        float *tables = aligned_alloc(64, (2 * table + M * BLOCK) * sizeof(float));
        const Strips strips = {own + 16 * NEAR * 4, (int32_t *)tables, tables + table};
        SHARED(m, M, 1) round_activations(x + m * inputs * size_of(kind), kind, inputs, &rounded, m);
        meet(team);
        for (int i = 0; i < count; i++)
            SHARED(n, layer[i].N, BLOCK)
                block_of_outputs(&rounded, layer + i, kind, M, n, own, &strips, tables + 2 * table);
        free(own), free(tables);
    }
    free(rounded.q), free(rounded.scale);
}
