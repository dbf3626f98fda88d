// The interface of LayerNorm with a quantised result.
#pragma once
#include <stdint.h>

namespace mpcompile {

struct LayerNorm {
    const float *gamma, *beta;  // [columns]
    int64_t columns;
    float epsilon;
    float inverse_scale, zero;  // of the result
};

// Normalises `tokens` rows of x into y.
using LayerNormKernel = void (*)(const LayerNorm&, const float* x, uint8_t* y, int64_t tokens);

}  // namespace mpcompile
