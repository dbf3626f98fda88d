// Tests the int8 products without ONNX Runtime, for the sanitizers: the integers of every kernel that this processor
// runs against a plain reference, for all patterns, ragged shapes and the values at which 16-bit lanes saturate, and
// what is done with a sum before it is stored. Prints each error and returns 1; returns 0 if there is none.
#include <cstring>
#include <memory>

#include "int8_kernels.h"
#include "int8_packing.h"
#include "int8_reference.h"

using namespace mpcompile;

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Product {
    int64_t rows, columns;
    std::vector<int8_t> weight;
    std::vector<float> scale, bias;
    int x_zero = 0;
    std::unique_ptr<PackedInt8> packed;

    Product(const Int8Kernels& kernels, int64_t rows, int64_t columns, std::vector<int8_t> weight, int x_zero,
            std::vector<float> scale = {}, std::vector<float> bias = {})
        : rows(rows), columns(columns), weight(weight), scale(scale), bias(bias), x_zero(x_zero) {
        if (this->scale.empty()) this->scale.assign(size_t(rows), 1.0f);
        if (this->bias.empty()) this->bias.assign(size_t(rows), 0.0f);
        packed = pack_int8(kernels.gemm, int8_baseline.gemm, std::move(weight), rows, columns, this->scale.data(),
                           this->bias.data(), 1.0f, x_zero);
    }

    bool skips_zeros() const { return packed->weights.stream != nullptr; }

    // Computes all tokens in calls of as many as a kernel takes, on rows that end where the kernel may read no further.
    // What lies behind the columns of a row is 255, which no weight may touch.
    void run(const std::vector<uint8_t>& x, Int8Call call) const {
        const Int8Weights& w = packed->weights;
        const size_t stride = size_t(w.steps * w.step_columns);
        std::vector<uint8_t> padded(size_t(call.tokens) * stride, 255);
        for (int64_t t = 0; t < call.tokens; t++)
            std::copy_n(x.data() + t * columns, columns, padded.data() + size_t(t) * stride);
        const int64_t most = packed->kernel->layout(w.kept, w.shared).most_tokens;
        for (int64_t first = 0; first < call.tokens; first += most)
            for (int64_t chunk = 0; chunk < w.chunks(); chunk++)
                packed->kernel->compute(w, call, padded.data() + size_t(first) * stride, stride, first,
                                        std::min(first + most, call.tokens), chunk, chunk + 1);
    }
};

std::string described(const Int8Kernels& kernels, const Product& p, const Pattern& pattern) {
    const Int8Weights& w = p.packed->weights;
    return std::string(kernels.name) + ", " + std::to_string(p.rows) + "x" + std::to_string(p.columns) + ", " +
           std::to_string(pattern.keep) + ":" + std::to_string(pattern.of) + " sharing " +
           std::to_string(pattern.sharing) + ", packed with kept " + std::to_string(w.kept) + " shared " +
           std::to_string(w.shared) + (w.wide ? " wide" : "") + (p.skips_zeros() ? "" : " for the baseline");
}

// With scale 1 and bias 0, a result is the integer as float32 rounds it.
bool exact(const Int8Kernels& kernels, const Product& p, const Pattern& pattern, int64_t tokens) {
    const std::vector<uint8_t> x = random_activations(tokens, p.columns);
    const std::vector<int64_t> sums = exact_sums(p.weight, p.rows, p.columns, x, tokens, p.x_zero);
    std::vector<float> y(size_t(tokens * p.rows), -7.0f);
    Int8Call call{};
    call.x = x.data(), call.floats = y.data(), call.tokens = tokens;
    p.run(x, call);
    for (size_t i = 0; i < y.size(); i++)
        if (y[i] != float(sums[i]))
            return expect(false, described(kernels, p, pattern) + ": token " + std::to_string(i / size_t(p.rows)) +
                                     " of " + std::to_string(tokens) + ", row " + std::to_string(i % size_t(p.rows)) +
                                     ": " + std::to_string(y[i]) + ", not " + std::to_string(sums[i]));
    return true;
}

bool all_patterns_are_exact(const Int8Kernels& kernels) {
    const int64_t shapes[][2] = {{64, 128}, {1, 1}, {3, 7}, {40, 48}, {72, 80}, {100, 132}, {127, 40}, {129, 257}};
    const Pattern patterns[] = {{2, 4}, {4, 8}, {8, 16}, {1, 4}, {2, 8}, {4, 16}, {6, 12}, {16, 32}, {0, 0}};
    int64_t count = 0;
    for (Pattern pattern : patterns)
        for (const auto& [rows, columns] : shapes)
            for (const int64_t sharing : {1, 2, 4})
                for (const Values values :
                     {Values::SMALL, Values::EXTREME, Values::LANE_128, Values::LANE_129, Values::ZERO}) {
                    if ((values == Values::ZERO || !pattern.keep) && sharing > 1) continue;
                    pattern.sharing = sharing;
                    pattern.scattered = ++count % 2;
                    const int x_zero = count % 3 == 0 ? 0 : count % 3 == 1 ? 255 : int(below(256));
                    const Product p(kernels, rows, columns, random_weight(rows, columns, pattern, values), x_zero);
                    if (!exact(kernels, p, pattern, 5 + count % 9)) return false;
                }
    return true;
}

// Every number of tokens that one call can have, and more than that, for each layout of the stream.
bool all_numbers_of_tokens_are_exact(const Int8Kernels& kernels) {
    for (const Pattern& pattern :
         {Pattern{2, 4, 1}, {2, 4, 2}, {2, 4, 4}, {1, 4, 1}, {1, 4, 2}, {1, 4, 4}, {0, 0, 1}}) {
        const Product p(kernels, 20, 32, random_weight(20, 32, pattern, Values::SMALL), 131);
        for (int64_t tokens = 1; tokens <= 200; tokens += tokens < 64 ? 1 : 17)
            if (!exact(kernels, p, pattern, tokens)) return false;
    }
    return true;
}

// Each weight gets the fastest layout that it permits: rows that share patterns are found, also if they are scattered,
// and only a lane that can saturate takes a weight to the baseline kernel.
bool layouts_are_chosen(const Int8Kernels& kernels) {
    if (!kernels.gemm.lanes) return true;
    struct Expected {
        Pattern pattern;
        Values values;
        int kept, shared;
        bool wide, stream;  // if 16-bit lanes can saturate
    };
    for (const Expected& e : {Expected{{2, 4, 1}, Values::SMALL, 8, 1, false, true},
                              {{2, 4, 2, true}, Values::SMALL, 8, 2, false, true},
                              {{2, 4, 4, true}, Values::SMALL, 8, 4, false, true},
                              {{8, 16, 4}, Values::LANE_128, 8, 4, false, true},
                              {{8, 16, 1}, Values::LANE_129, 8, 1, true, true},
                              {{4, 16, 1}, Values::LANE_128, 4, 1, false, true},
                              {{1, 4, 2, true}, Values::SMALL, 4, 2, false, true},
                              {{2, 8, 4, true}, Values::SMALL, 4, 4, false, true},
                              {{0, 0}, Values::SMALL, 16, 4, false, true},
                              {{8, 16, 1}, Values::EXTREME, 8, 1, true, false}}) {
        const Product p(kernels, 64, 64, random_weight(64, 64, e.pattern, e.values), 0);
        const Int8Weights& w = p.packed->weights;
        const bool saturates = kernels.gemm.saturates, stream = e.stream || !saturates;
        const bool right = w.kept == e.kept && p.skips_zeros() == stream && (!stream || w.shared == e.shared) &&
                           (!stream || w.wide == (e.wide && saturates));
        if (!expect(right, described(kernels, p, e.pattern) + ": another layout was expected")) return false;
    }
    return true;
}

// The largest sums of 32 bits: 65,536 columns of -128.
bool longest_rows_are_exact(const Int8Kernels& kernels) {
    constexpr int64_t COLUMNS = 65536;
    std::vector<int8_t> weight(3 * COLUMNS, -128);
    std::fill(weight.begin() + COLUMNS, weight.begin() + 2 * COLUMNS, int8_t(127));
    for (int64_t i = 0; i < COLUMNS; i++) weight[size_t(2 * COLUMNS + i)] = i < COLUMNS / 2 ? 127 : -128;
    for (const int x_zero : {0, 255})
        if (!exact(kernels, Product(kernels, 3, COLUMNS, weight, x_zero), {0, 0}, 5)) return false;
    return true;
}

// Residual, activation and quantisation of random sums, some rows with a bias that is huge, infinite or not a number.
bool stores(const Int8Kernels& kernels, Activation activation, bool adds, bool odd, int64_t rows, Pattern pattern) {
    constexpr int64_t COLUMNS = 48, TOKENS = 23;
    std::vector<float> scale(static_cast<size_t>(rows)), bias(scale);
    for (float& value : scale) value = 0.0005f * (1.5f + normal() * normal());
    for (float& value : bias) value = normal();
    const float odd_values[] = {INFINITE, -INFINITE, NOT_A_NUMBER, 3e38f, -3e38f, 1e6f, -1e6f, -0.0f};
    if (odd)
        for (size_t i = 0; i < bias.size(); i++) bias[i] = odd_values[i % 8];
    const Product p(kernels, rows, COLUMNS, random_weight(rows, COLUMNS, pattern, Values::SMALL), 77, scale, bias);
    const std::vector<uint8_t> x = random_activations(TOKENS, COLUMNS);
    const std::vector<int64_t> sums = exact_sums(p.weight, rows, COLUMNS, x, TOKENS, 77);
    std::vector<float> residual(size_t(TOKENS * rows)), y(residual);
    for (float& value : residual) value = 3 * normal();
    std::vector<uint8_t> bytes(y.size(), 7);
    const float y_scale = 0.031f;
    const int y_zero = activation == Activation::NONE ? 128 : 9;
    Int8Call call{};
    call.x = x.data(), call.residual = adds ? residual.data() : nullptr, call.tokens = TOKENS;
    call.floats = y.data(), call.bytes = bytes.data(), call.activation = activation;
    call.inverse_scale = 1 / y_scale, call.zero = float(y_zero);
    p.run(x, call);
    for (size_t i = 0; i < y.size(); i++) {
        const size_t row = i % size_t(rows);
        const double product = double(sums[i]) * double(scale[row]), added = adds ? double(residual[i]) : 0;
        double value = activated(activation, product + double(bias[row]) + added);
        // A bias of -inf before a GELU: the limit. What is not a number gives the smallest byte, or ReLU's 0.
        if (bias[row] == -INFINITE && activation > Activation::RELU) value = 0;
        if (std::isnan(bias[row])) value = activation == Activation::RELU ? 0 : -1e30;
        const double size = std::fabs(product) + std::fabs(double(bias[row])) + std::fabs(added);
        double error = error_of(activation, size, value);
        if (!std::isfinite(error)) error = GELU_ERROR;
        const bool close = std::isnan(bias[row]) || std::isinf(value) || std::fabs(double(y[i]) - value) <= error;
        if (!expect(close && is_quantised(bytes[i], value, error, double(y_scale), y_zero),
                    described(kernels, p, pattern) + ", activation " + std::to_string(int(activation)) + ", bias " +
                        std::to_string(bias[row]) + ": " + std::to_string(y[i]) + " and " + std::to_string(bytes[i]) +
                        ", not " + std::to_string(value)))
            return false;
    }
    return true;
}

// GELU on a dense grid, with the largest errors that int8_simd.h states, by sums of 0 and one bias a row.
bool gelu_errors_are_as_stated(const Int8Kernels& kernels) {
    constexpr int64_t ROWS = 4096;
    std::vector<float> bias(ROWS), scale(ROWS, 1.0f), y(ROWS);
    for (int64_t i = 0; i < ROWS; i++) bias[size_t(i)] = float(i - ROWS / 2) / 256;
    const Product p(kernels, ROWS, 1, std::vector<int8_t>(ROWS, 0), 0, scale, bias);
    for (const Activation activation : {Activation::GELU, Activation::GELU_TANH}) {
        Int8Call call{};
        call.floats = y.data(), call.tokens = 1, call.activation = activation;
        p.run({0}, call);
        const double stated = activation == Activation::GELU ? GELU_ERROR : 9e-6;
        for (size_t i = 0; i < size_t(ROWS); i++) {
            const double value = activated(activation, double(bias[i]));
            // float32 rounds the steps of the polynomial and of its product with x.
            if (!expect(std::fabs(double(y[i]) - value) <= stated + 4 * 0x1p-24 * std::fabs(value),
                        std::string(kernels.name) + ": GELU of " + std::to_string(bias[i]) + " is " +
                            std::to_string(y[i]) + ", not " + std::to_string(value)))
                return false;
        }
    }
    return true;
}

bool all_results_are_stored(const Int8Kernels& kernels) {
    for (const Activation activation : {Activation::NONE, Activation::RELU, Activation::GELU, Activation::GELU_TANH})
        for (const bool odd : {false, true})
            for (const int64_t rows : {64, 37, 83})
                if (!stores(kernels, activation, false, odd, rows, {2, 4, rows == 83 ? 1 : 4, true})) return false;
    return stores(kernels, Activation::NONE, true, false, 100, {2, 4, 2, true}) &&
           stores(kernels, Activation::NONE, true, true, 64, {1, 4}) && gelu_errors_are_as_stated(kernels);
}

}  // namespace

int main() {
    const Int8Kernels* kernels[4];
    const int count = supported_int8_kernels(kernels);
    for (int i = 0; i < count; i++)
        if (!(all_patterns_are_exact(*kernels[i]) && all_numbers_of_tokens_are_exact(*kernels[i]) &&
              layouts_are_chosen(*kernels[i]) && longest_rows_are_exact(*kernels[i]) &&
              all_results_are_stored(*kernels[i])))
            return 1;
    return 0;
}
