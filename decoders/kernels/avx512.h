// For processors with AVX-512's bfloat16 and VNNI instructions. The kernels call those by their own names;
// here is what the other headers, for other processors, define differently.

#include <immintrin.h>

enum {
    PAIRS = 1,    // bfloat16 is multiplied as it is, two products and a sum in one instruction; 0: as float32
    MOVED = 128,  // what bytes of x are moved up by, since they are multiplied unsigned; 0: signed
    X_ROWS = 6,   // rows of x, whose products with
    W_ROWS = 4,   // rows of w are summed in registers at once
    SUMS = 8,     // partial sums of one row of x with one of w
};

// sum += four bytes of x times four of w, in each lane.
#define multiply_bytes(sum, x, w) _mm512_dpbusd_epi32(sum, x, w)

// The lowest four bits of each lane.
#define floats_of_four_bits(q) \
    _mm512_permutexvar_ps(q, _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
