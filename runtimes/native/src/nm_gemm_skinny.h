// What the operator asks of a kernel for few tokens; skinny_packing.h has the layout that it reads.
#pragma once
#include "skinny_packing.h"

namespace mpcompile {

// Tokens are computed in groups, each strip for one group after the other. nm_gemm_skinny.cpp is compiled for these sizes of a
// group; the rest of a larger one is zeros.
constexpr int FEW_WIDTHS[] = {1, 2, 3, 4, 6, 8};
constexpr int FEW_WIDEST = 8;

struct Few {
    Permutes permutes;
    int most[5];  // up to so many tokens it is the faster kernel, by share; none where there are no permutes
    // Computes strips [begin, end) for a packed tile, and writes them out.
    void (*compute)(const Strips&, const float* bias, const Activations&, const Tile&, int64_t begin, int64_t end,
                    const float* packed);
};

// All tokens of a call as one tile: `lanes` is the size of a group, `vectors` how many groups there are.
inline Tile few_tile(int64_t tokens) {
    const int groups = int((tokens + FEW_WIDEST - 1) / FEW_WIDEST);
    for (int width : FEW_WIDTHS)
        if (width * groups >= tokens) return {0, tokens, width, groups, false};
    return {};
}

}  // namespace mpcompile
