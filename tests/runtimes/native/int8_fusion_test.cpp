// Tests attention and LayerNorm in 8 bits without ONNX Runtime, for the sanitizers: every kernel that this processor
// runs against float64, with error bounds derived from its roundings. Prints each error and returns 1; returns 0 if
// there is none.
#include <cstring>

#include "int8_kernels.h"
#include "int8_reference.h"

using namespace mpcompile;

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float LOWEST = std::numeric_limits<float>::lowest();  // with which exporters mask scores
constexpr double U = 0x1p-24;                                   // a rounding of float32

struct Case {
    int64_t images, queries, keys, heads, dim;
    int64_t biased[3];  // whether the bias differs between images, heads and queries; the first is -1: no bias
    double size = 1;    // of q and k
};

// Inputs that end with the last value that may be read. q, k and v lie at offsets in wider rows.
struct Inputs {
    std::vector<float> q, k, v, bias;
    Attention a{};

    explicit Inputs(const Case& c) {
        const int64_t width = c.heads * c.dim;
        fill(a.q, q, c.images * c.queries, width, 0, 3, c.size);
        fill(a.k, k, c.images * c.keys, width, 2, 3, c.size);
        fill(a.v, v, c.images * c.keys, width, 1, 0, 1);
        a.q.image_stride = c.queries * a.q.token_stride;
        a.k.image_stride = c.keys * a.k.token_stride;
        a.v.image_stride = c.keys * a.v.token_stride;
        a.images = c.images, a.queries = c.queries, a.keys = c.keys, a.heads = c.heads, a.dim = c.dim;
        a.scale = float(1 / std::sqrt(double(c.dim)));
        if (c.biased[0] < 0) return;
        const int64_t sizes[3] = {c.biased[0] ? c.images : 1, c.biased[1] ? c.heads : 1, c.biased[2] ? c.queries : 1};
        bias.resize(size_t(sizes[0] * sizes[1] * sizes[2] * c.keys));
        for (float& value : bias) value = 2 * normal();
        a.bias = bias.data();
        a.bias_query_stride = c.biased[2] ? c.keys : 0;
        a.bias_head_stride = c.biased[1] ? sizes[2] * c.keys : 0;
        a.bias_image_stride = c.biased[0] ? sizes[1] * sizes[2] * c.keys : 0;
    }

    static void fill(Heads& heads, std::vector<float>& values, int64_t tokens, int64_t width, int64_t before,
                     int64_t after, double size) {
        values.resize(size_t(tokens * (before + width + after) - after));
        for (float& value : values) value = float(size) * normal();
        heads = {values.data() + before, 0, before + width + after};
    }
};

const float* row(const Attention& a, const Heads& of, int64_t image, int64_t token, int64_t head) {
    return of.values + image * of.image_stride + token * of.token_stride + head * a.dim;
}

double largest(const Attention& a, const Heads& of, int64_t tokens, int64_t image, int64_t head) {
    double most = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < a.dim; i++) most = std::max(most, std::fabs(double(row(a, of, image, t, head)[i])));
    return most;
}

// The results of one query, and how far each may be off. `bits` 12: q, k and v are rounded to 12 bits of the largest
// magnitude of their head, and the probabilities to 1/4095 of the largest one; 0: float32 throughout.
void reference(const Attention& a, int64_t image, int64_t head, int64_t query, int bits, const double (&most)[3],
               double* y, double* error) {
    std::vector<double> p(size_t(a.keys));
    const double e_q = bits ? most[0] / 4094 : 0, e_k = bits ? most[1] / 4094 : 0, e_v = bits ? most[2] / 4094 : 0;
    const float* q = row(a, a.q, image, query, head);
    double top = -INFINITY, off = 0, total = 0, lost = 0;
    for (int64_t t = 0; t < a.keys; t++) {
        const float* k = row(a, a.k, image, t, head);
        double sum = 0, size = 0, rounding = 0;
        for (int64_t i = 0; i < a.dim; i++) {
            sum += double(q[i]) * k[i], size += std::fabs(double(q[i]) * k[i]);
            rounding += std::fabs(double(q[i])) * e_k + std::fabs(double(k[i])) * e_q + e_q * e_k;
        }
        double& score = p[size_t(t)];
        score = sum * a.scale;
        // float32: a rounding for each channel's addition, and a few for factors, the bias and the distance to the top.
        double mine = a.scale * (rounding + (a.dim + 6) * U * (size + rounding));
        if (a.bias) {
            const double bias = a.bias[image * a.bias_image_stride + head * a.bias_head_stride +
                                       query * a.bias_query_stride + t];
            score += bias;
            if (bias > -1e30) mine += 3 * U * std::fabs(score);
        }
        off = std::max(off, mine);
        top = std::max(top, score);
    }
    for (double& score : p) total += score = std::exp(score - top);
    // exp of a score that is `off` away, twice since the sum's are as well; 4e-6 is the error of the polynomial.
    const double relative = std::expm1(2 * off) + 4e-6 + (a.keys + 8) * U;
    for (const double weight : p) lost += bits ? std::min(weight * std::exp(2 * off), 0.5 / 4095) : 0;
    for (int64_t i = 0; i < a.dim; i++) {
        double size = 0, apart = 0;
        y[i] = 0;
        for (int64_t t = 0; t < a.keys; t++) y[i] += p[size_t(t)] / total * row(a, a.v, image, t, head)[i];
        for (int64_t t = 0; t < a.keys; t++) {
            const double distance = std::fabs(row(a, a.v, image, t, head)[i] - y[i]);
            size += p[size_t(t)] / total * distance;
            apart = std::max(apart, distance);
        }
        // Rounded probabilities, relative to the largest of 1, move the average of v by at most `lost` of the spread.
        error[i] = relative * size + lost / std::max(1.0, total - lost) * apart + e_v + (a.keys + 8) * U * most[2];
    }
}

bool attends(const Int8Kernels& kernels, Attention a) {
    std::vector<float> floats(size_t(a.images * a.queries * a.heads * a.dim), -7.0f);
    std::vector<uint8_t> bytes(floats.size(), 7), alone(bytes);
    a.floats = floats.data(), a.bytes = bytes.data(), a.inverse_scale = 1 / 0.011f, a.zero = 117;
    const size_t scratch = kernels.attention.scratch_bytes(a);
    std::vector<uint8_t> memory(scratch + 64, 0xff);
    uint8_t* const aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    const int bits = kernels.gemm.lanes ? 12 : 0;
    std::vector<double> y(static_cast<size_t>(a.dim)), error(y);
    for (int64_t image = 0; image < a.images; image++)
        for (int64_t head = 0; head < a.heads; head++) {
            kernels.attention.compute(a, image, head, aligned);
            const double most[3] = {largest(a, a.q, a.queries, image, head), largest(a, a.k, a.keys, image, head),
                                    largest(a, a.v, a.keys, image, head)};
            for (int64_t query = 0; query < a.queries; query++) {
                reference(a, image, head, query, bits, most, y.data(), error.data());
                for (int64_t i = 0; i < a.dim; i++) {
                    const size_t at = size_t(((image * a.queries + query) * a.heads + head) * a.dim + i);
                    const double wanted = y[size_t(i)], allowed = error[size_t(i)];
                    const bool right = std::isnan(wanted) ? std::isnan(floats[at]) && bytes[at] == 0
                                                          : std::fabs(floats[at] - wanted) <= allowed &&
                                                                is_quantised(bytes[at], wanted, allowed, 0.011f, 117);
                    if (!right)
                        return expect(false, std::string(kernels.name) + ", attention of " + std::to_string(a.queries) +
                                                 " queries, " + std::to_string(a.keys) + " keys, dim " +
                                                 std::to_string(a.dim) + ", query " + std::to_string(query) + ": " +
                                                 std::to_string(floats[at]) + " and " + std::to_string(bytes[at]) +
                                                 ", not " + std::to_string(wanted) + " +- " + std::to_string(allowed));
                }
            }
        }
    return true;
}

bool all_attentions_are_right(const Int8Kernels& kernels) {
    const int64_t queries[] = {1, 3, 25, 6, 8, 49};
    int64_t count = 0;
    for (const int64_t dim : {1, 8, 20, 32, 64, 80, 96, 512})
        for (const int64_t keys : {1, 5, 197, 256, 257, 577}) {
            const int64_t biased = count % 9 - 1, few = dim * keys > 20000 ? 2 : queries[count % 6];
            const int64_t heads = dim * keys > 20000 ? 1 : 1 + count % 3;
            const Inputs inputs({1 + count % 2, few, keys, heads, dim,
                                 {biased < 0 ? -1 : biased & 1, biased >> 1 & 1, biased >> 2 & 1},
                                 count % 4 ? 1.0 : 3.0});
            if (!attends(kernels, inputs.a)) return false;
            count++;
        }
    return true;
}

// Masks of -infinity and of the lowest float32, of some keys and of all; values that are not finite; zeros.
bool odd_attentions_are_defined(const Int8Kernels& kernels) {
    const Case c{1, 26, 37, 2, 20, {0, 0, 1}, 1};
    for (const float mask : {LOWEST, -INFINITE}) {
        Inputs inputs(c);
        for (size_t i = 0; i < inputs.bias.size(); i++)
            if (i / 37 == 4 || i % 3 == 1) inputs.bias[i] = mask;  // all keys of query 4
        if (!attends(kernels, inputs.a)) return false;
    }
    // The largest sums of integers: all values at the top of their 12 bits.
    for (const float sign : {1.0f, -1.0f}) {
        Inputs inputs({1, 2, 577, 1, 512, {-1}, 1});
        std::fill(inputs.q.begin(), inputs.q.end(), sign);
        std::fill(inputs.k.begin(), inputs.k.end(), 1.0f);
        std::fill(inputs.v.begin(), inputs.v.end(), 1.0f);
        if (!attends(kernels, inputs.a)) return false;
    }
    for (const float odd : {NOT_A_NUMBER, INFINITE, -INFINITE, 3e38f, 0.0f, 1e-40f})
        for (const bool last : {false, true}) {
            Inputs inputs(c);
            for (std::vector<float>* part : {&inputs.q, &inputs.k, &inputs.v}) {
                if (std::isfinite(odd) && odd < 1) std::fill(part->begin(), part->end(), odd);
                // The last channel of a head is not in a whole vector.
                Heads& heads = part == &inputs.q ? inputs.a.q : part == &inputs.k ? inputs.a.k : inputs.a.v;
                const_cast<float*>(heads.values)[5 * heads.token_stride + (last ? 19 : 0)] = odd;
            }
            std::vector<float> y(26 * 40);
            std::vector<uint8_t> bytes(y.size(), 7), memory(kernels.attention.scratch_bytes(inputs.a) + 64);
            inputs.a.floats = y.data(), inputs.a.bytes = bytes.data(), inputs.a.inverse_scale = 1;
            uint8_t* const aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
            for (int64_t head = 0; head < 2; head++) kernels.attention.compute(inputs.a, 0, head, aligned);
            const bool right = std::isfinite(odd) ? odd > 1 || (std::fabs(y[0]) < 1e-30f && bytes[0] == 0)
                                                  : std::isnan(y[5 * 40]) && bytes[5 * 40] == 0;
            if (!expect(right, std::string(kernels.name) + ", attention with " + std::to_string(odd) + ": " +
                                   std::to_string(y[5 * 40]) + " and " + std::to_string(bytes[5 * 40])))
                return false;
        }
    return true;
}

bool normalises(const Int8Kernels& kernels, int64_t columns, float size, float offset, float epsilon) {
    constexpr int64_t TOKENS = 5;
    std::vector<float> x(size_t(TOKENS * columns)), gamma(static_cast<size_t>(columns)), beta(gamma);
    for (float& value : x) value = size * normal() + offset;
    for (float& value : gamma) value = normal();
    for (float& value : beta) value = normal();
    std::vector<uint8_t> y(x.size(), 7);
    const float scale = 0.017f;
    kernels.layer_norm({gamma.data(), beta.data(), columns, epsilon, 1 / scale, 131}, x.data(), y.data(), TOKENS);
    for (int64_t token = 0; token < TOKENS; token++) {
        const float* row = x.data() + token * columns;
        double mean = 0, variance = 0, magnitude = 0;
        for (int64_t i = 0; i < columns; i++) mean += row[i], magnitude += std::fabs(double(row[i]));
        mean /= double(columns), magnitude /= double(columns);
        for (int64_t i = 0; i < columns; i++) variance += (row[i] - mean) * (row[i] - mean);
        const double factor = 1 / std::sqrt(variance / double(columns) + double(epsilon));
        // float32 rounds the mean once for each column, which shifts all distances and enters the variance squared.
        const double shift = double(columns + 4) * U * magnitude, of_factor = double(columns + 4) * U;
        for (int64_t i = 0; i < columns; i++) {
            const double g = double(gamma[size_t(i)]), b = double(beta[size_t(i)]), normal = (row[i] - mean) * factor;
            const double value = normal * g + b, shifted = shift * factor;
            const double of_normal = shifted * (1 + shifted) + std::fabs(normal) * (of_factor + shifted * shifted) +
                                     2 * U * std::fabs(double(row[i])) * factor;
            const double error = std::fabs(g) * of_normal + 3 * U * (std::fabs(g * normal) + std::fabs(b));
            const uint8_t found = y[size_t(token * columns + i)];
            if (!is_quantised(found, value, error, double(scale), 131))
                return expect(false, std::string(kernels.name) + ", LayerNorm of " + std::to_string(columns) +
                                         " columns: " + std::to_string(found) + ", not " +
                                         std::to_string(value / double(scale) + 131) + " +- " +
                                         std::to_string(error / double(scale)));
        }
    }
    return true;
}

bool all_norms_are_right(const Int8Kernels& kernels) {
    for (const int64_t columns : {1, 2, 7, 8, 9, 15, 16, 17, 31, 48, 64, 100, 192, 768, 1021})
        if (!normalises(kernels, columns, 1, 0.3f, 1e-6f) || !normalises(kernels, columns, 40, -300, 1e-5f) ||
            !normalises(kernels, columns, 1e-4f, 0, 1e-5f) || !normalises(kernels, columns, 0, 0, 1e-12f))
            return false;
    // What is not a number gives 0; so does what is infinite, since its mean is.
    for (const float odd : {NOT_A_NUMBER, INFINITE, 3e38f})
        for (const size_t place : {0, 18}) {
            std::vector<float> x(19, 1.0f), gamma(19, 1.0f), beta(19, 0.0f);
            std::vector<uint8_t> y(19, 7);
            x[place] = odd;
            kernels.layer_norm({gamma.data(), beta.data(), 19, 1e-5f, 1, 100}, x.data(), y.data(), 1);
            if (!expect(y[place] == (std::isfinite(odd) ? 100 : 0),
                        std::string(kernels.name) + ", LayerNorm of " + std::to_string(odd)))
                return false;
        }
    return true;
}

}  // namespace

int main() {
    const Int8Kernels* kernels[4];
    const int count = supported_int8_kernels(kernels);
    for (int i = 0; i < count; i++)
        if (!(all_attentions_are_right(*kernels[i]) && odd_attentions_are_defined(*kernels[i]) &&
              all_norms_are_right(*kernels[i])))
            return 1;
    return 0;
}
