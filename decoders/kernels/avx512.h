// For processors with AVX-512's bfloat16 and VNNI instructions: their own names, and what other processors do
// in another way (`avx2.h`).

#include <immintrin.h>

enum {
    PAIRS = 1,    // bfloat16 is multiplied as it is, two products and a sum in one instruction; 0: as float32
    MOVED = 128,  // what bytes of x are moved up by, since they are multiplied unsigned; 0: signed
    X_ROWS = 6,   // so many rows of x
    W_ROWS = 4,   // with so many of w have their sums in registers
    SUMS = 8,     // and one with one so many
};

// sum += four bytes of x times four of w, in each lane.
#define multiply_bytes(sum, x, w) _mm512_dpbusd_epi32(sum, x, w)

// The lowest four bits of each lane.
#define floats_of_four_bits(q) \
    _mm512_permutexvar_ps(q, _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
