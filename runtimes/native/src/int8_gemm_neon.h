// The tile of int8_gemm.cpp for NEON: its shape, and the product of T tokens with one panel.
//
// A vector of activations is one block of 16 columns, loaded as it is, and `tbl` selects four kept columns for each of
// four rows. All operands of a step stay in registers beside the sums, of which there are 32.
#pragma once
#include "int8_gemm.h"
#include "int8_simd.h"

namespace {

template <int KEPT, int SHARED, bool NARROW>  // NARROW: without splits, as here always
struct Shape {
    static constexpr bool DENSE = KEPT == 16;
    static constexpr int SPLITS = 1, ROWS = LANES;
    static constexpr int GROUPS = SHARED == 1 ? 2 : 1;
    static constexpr int TOKENS = DENSE ? 5 : SHARED == 1 ? 8 : SHARED == 2 ? 10 : 4;
    static constexpr int VECTORS = GROUPS * SHARED, PANEL_ROWS = VECTORS * ROWS;
    static constexpr int CONTROLS = DENSE ? 0 : 2, OPERANDS = CONTROLS + 2 * SHARED;
    static constexpr int COLUMNS = DENSE ? 8 : KEPT == 8 ? 16 : 32;  // of a step
    static constexpr size_t STEP_BYTES = sizeof(Bytes) * GROUPS * OPERANDS;
};

// The sums of T tokens and one panel: out[t * CHUNK + row of the panel].
template <int KEPT, int SHARED, bool NARROW, bool WIDE, int T>
__attribute__((noinline)) void multiply(const uint8_t* x, size_t stride, const uint8_t* w, int64_t steps,
                                        int32_t* out) {
    static_assert(!WIDE, "no 16-bit lanes");
    using S = Shape<KEPT, SHARED, NARROW>;
    Bytes sums[T][S::VECTORS];
    NM_UNROLL for (int t = 0; t < T; t++) NM_UNROLL for (int r = 0; r < S::VECTORS; r++) sums[t][r] = zeros();
    Bytes flip = flips();
    if constexpr (X_OFFSET != 0) NM_KEEP(flip);
    for (int64_t step = 0; step < steps; step++, x += S::COLUMNS, w += S::STEP_BYTES) {
        Bytes held[S::GROUPS][S::OPERANDS];
        NM_UNROLL for (int g = 0; g < S::GROUPS; g++) NM_UNROLL for (int i = 0; i < S::OPERANDS; i++) {
            held[g][i] = load_bytes(w + sizeof(Bytes) * (g * S::OPERANDS + i));
            NM_KEEP(held[g][i]);
        }
        NM_UNROLL for (int t = 0; t < T; t++) {
            const uint8_t* from = x + t * stride;
            if constexpr (S::DENSE) {
                const uint8x8_t columns = load_8_activations(from, flip);
                NM_UNROLL for (int r = 0; r < SHARED; r++) add_products_of_part<0>(sums[t][r], columns, held[0][r]);
                NM_UNROLL for (int r = 0; r < SHARED; r++) add_products_of_part<1>(sums[t][r], columns,
                                                                                   held[0][SHARED + r]);
                continue;
            }
            Bytes first = load_activations(from, flip), second = first;
            NM_KEEP(first);
            if constexpr (KEPT == 4) {
                second = load_activations(from + 16, flip);
                NM_KEEP(second);
            }
            NM_UNROLL for (int g = 0; g < S::GROUPS; g++) NM_UNROLL for (int half = 0; half < S::CONTROLS; half++) {
                Bytes selected = shuffled(KEPT == 4 && half ? second : first, held[g][half]);
                NM_KEEP(selected);
                NM_UNROLL for (int r = 0; r < SHARED; r++) add_products(
                    sums[t][g * SHARED + r], selected, held[g][S::CONTROLS + half * SHARED + r]);
            }
        }
    }
    store_sums<T, S::GROUPS, SHARED>(sums[0], out, mpcompile::CHUNK);
}

}  // namespace
