// Random int8 weights, and what the results of the int8 kernels are compared with.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "int8_gemm.h"

namespace mpcompile {

inline std::mt19937 rng(0);

inline float normal() { return std::normal_distribution<float>()(rng); }
inline int64_t below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(rng); }

enum class Values {
    SMALL,     // any four add up to at most 128: no 16-bit lane can saturate
    EXTREME,   // 127, -127 and -128
    LANE_128,  // any four of a row add up to exactly 128 or -128: the most that a lane can hold
    LANE_129,  // one more in each block of 16: four in one lane would saturate
    ZERO,
};

// `keep` of every `of` columns at random places; 0 of 0: dense. `sharing` rows have the same pattern.
struct Pattern {
    int64_t keep, of, sharing = 1;
    bool scattered = false;  // rows that share lie anywhere in a chunk of 64 rows, rather than side by side
};

// A weight [rows][columns].
inline std::vector<int8_t> random_weight(int64_t rows, int64_t columns, const Pattern& pattern, Values values) {
    std::vector<int8_t> weight(size_t(rows * columns), 0);
    for (int64_t chunk = 0; chunk < rows; chunk += CHUNK) {
        std::vector<int64_t> order;
        for (int64_t row = chunk; row < std::min(chunk + CHUNK, rows); row++) order.push_back(row);
        if (pattern.scattered) std::shuffle(order.begin(), order.end(), rng);
        std::vector<char> kept(size_t(columns), 1);
        for (size_t i = 0; i < order.size(); i++) {
            if (pattern.keep && i % size_t(pattern.sharing) == 0)
                for (int64_t group = 0; group < columns; group += pattern.of) {
                    std::vector<char> mask(size_t(pattern.of), 0);
                    std::fill(mask.begin(), mask.begin() + pattern.keep, 1);
                    std::shuffle(mask.begin(), mask.end(), rng);
                    for (int64_t k = 0; k < pattern.of && group + k < columns; k++)
                        kept[size_t(group + k)] = mask[size_t(k)];
                }
            const int sign = below(2) ? 1 : -1;
            for (int64_t column = 0, place = 0; column < columns; column++) {
                if (column % 16 == 0) place = 0;
                if (!kept[size_t(column)] || values == Values::ZERO) continue;
                int value = int(below(63)) - 31;
                if (value == 0) value = 1;
                if (values == Values::EXTREME) value = below(8) == 0 ? -128 : below(2) ? 127 : -127;
                if (values == Values::LANE_128) value = 32 * sign;
                if (values == Values::LANE_129) value = 32 * sign + (place++ % 8 < 2 ? sign : 0);
                weight[size_t(order[i] * columns + column)] = int8_t(value);
            }
        }
    }
    return weight;
}

// The exact sums of (x - x_zero) * weight: [tokens][rows].
inline std::vector<int64_t> exact_sums(const std::vector<int8_t>& weight, int64_t rows, int64_t columns,
                                       const std::vector<uint8_t>& x, int64_t tokens, int x_zero) {
    std::vector<int64_t> sums(size_t(tokens * rows));
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t row = 0; row < rows; row++) {
            const uint8_t* from = x.data() + token * columns;
            const int8_t* w = weight.data() + row * columns;
            int64_t sum = 0;
            for (int64_t k = 0; k < columns; k++) sum += (from[k] - x_zero) * w[k];
            sums[size_t(token * rows + row)] = sum;
        }
    return sums;
}

// Random activations; every fifth token is all 0, every other fifth all 255.
inline std::vector<uint8_t> random_activations(int64_t tokens, int64_t columns) {
    std::vector<uint8_t> x(size_t(tokens * columns));
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t k = 0; k < columns; k++)
            x[size_t(token * columns + k)] = token % 5 == 3 ? 0 : token % 5 == 4 ? 255 : uint8_t(below(256));
    return x;
}

inline double activated(Activation activation, double x) {
    if (activation == Activation::RELU) return std::max(x, 0.0);
    if (activation == Activation::GELU) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    if (activation == Activation::GELU_TANH)
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    return x;
}

constexpr double GELU_ERROR = 1.1e-5;  // the largest, as int8_simd.h says

// How far float32 may be off activated(x), where x is a sum of terms of this total size: product, bias and residual are
// rounded by 2^-24 each, and GELU has a slope of at most 1.13.
inline double error_of(Activation activation, double size, double result) {
    const double error = 4 * 0x1p-24 * size;
    if (activation <= Activation::RELU) return error;
    return 1.13 * error + GELU_ERROR + 4 * 0x1p-24 * std::fabs(result);
}

// Whether `found` is `value` quantised, if the value may differ by `error`: exact, except where that reaches a tie. The
// kernels multiply by 1 / scale, which rounds twice by 2^-24 of the quotient.
inline bool is_quantised(uint8_t found, double value, double error, double scale, double zero) {
    const double quotient = value / scale, slack = error / scale + std::fabs(quotient) * 0x1p-22;
    const auto byte = [&](double q) { return std::min(std::max(std::nearbyint(q) + zero, 0.0), 255.0); };
    if (std::isinf(value)) return found == (value > 0 ? 255 : 0);
    return found >= byte(quotient - slack) && found <= byte(quotient + slack);
}

}  // namespace mpcompile
