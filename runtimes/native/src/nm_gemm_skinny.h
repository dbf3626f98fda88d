// The interface of a kernel for few tokens; it reads the layout of skinny_packing.h.
#pragma once
#include "skinny_packing.h"

namespace mpcompile {

// Tokens are computed in token groups, one after the other for each row panel. nm_gemm_skinny.cpp is compiled for these
// group sizes, up to the widest that has enough registers; a group with fewer tokens is padded with zeros.
constexpr int SKINNY_WIDTHS[] = {1, 2, 3, 4, 6, 8};

struct SkinnyKernel {
    Permutes permutes;
    int widest;   // tokens of the widest token group
    int most[5];  // most tokens for which it is the faster kernel, by rows_per_pattern; 0 without permutes
    // Computes row panels [begin, end) for a packed tile and stores the outputs.
    void (*compute)(const RowPanels&, const float* bias, const Activations&, const Tile&, int64_t begin, int64_t end,
                    const float* packed);
};

// All tokens of a call as one tile: `lanes` is the size of a token group, `vectors` the number of groups.
inline Tile skinny_tile(const SkinnyKernel& kernel, int64_t tokens) {
    const int groups = int((tokens + kernel.widest - 1) / kernel.widest);
    for (int width : SKINNY_WIDTHS)
        if (width * groups >= tokens) return {0, tokens, width, groups, false};
    return {};
}

}  // namespace mpcompile
