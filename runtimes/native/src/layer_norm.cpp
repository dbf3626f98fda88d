// LayerNorm with a quantised result, compiled for AVX2 and for AVX-512 with VNNI, with NM_LAYER_NORM as the name of the
// LayerNormKernel that it defines. Mean and variance are computed in two passes over a row, which stays in the cache.
#include "layer_norm.h"

#include "int8_simd.h"

namespace {

using mpcompile::LayerNorm;

// Calls step(i, count) for each vector of a row; the last one may have fewer than LANES values.
template <typename Step>
NM_INLINE void each_vector(int64_t columns, Step step) {
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) step(i, LANES);
    if (i < columns) step(i, int(columns - i));
}

// `count` values; the lanes beyond are `other`.
NM_INLINE Floats load_some(const float* p, int count, float other) {
    if (count == LANES) return load_floats(p);
    float values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = i < count ? p[i] : other;
    return load_floats(values);
}

void normalise(const LayerNorm& n, const float* x, uint8_t* y, int64_t tokens) {
    const float share = 1 / float(n.columns);
    const Floats inverse = all(n.inverse_scale), zero = all(n.zero);
    for (int64_t t = 0; t < tokens; t++, x += n.columns, y += n.columns) {
        Floats sum = all(0);
        each_vector(n.columns, [&](int64_t i, int count)
                                   __attribute__((always_inline)) { sum = sum + load_some(x + i, count, 0); });
        const float mean = sum_of(sum) * share;
        Floats squares = all(0);
        each_vector(n.columns, [&](int64_t i, int count) __attribute__((always_inline)) {
            const Floats distance = load_some(x + i, count, mean) - all(mean);
            squares = multiply_add(distance, distance, squares);
        });
        const Floats factor = all(1 / __builtin_sqrtf(sum_of(squares) * share + n.epsilon));
        each_vector(n.columns, [&](int64_t i, int count) __attribute__((always_inline)) {
            const Floats normal = (load_some(x + i, count, 0) - all(mean)) * factor;
            const Floats value =
                multiply_add(normal, load_some(n.gamma + i, count, 0), load_some(n.beta + i, count, 0));
            if (count == LANES) return store_quantised(y + i, value, inverse, zero);
            uint8_t bytes[LANES];
            store_quantised(bytes, value, inverse, zero);
            memcpy(y + i, bytes, size_t(count));
        });
    }
}

}  // namespace

namespace mpcompile {

extern const LayerNormKernel NM_LAYER_NORM;
const LayerNormKernel NM_LAYER_NORM = normalise;

}  // namespace mpcompile
