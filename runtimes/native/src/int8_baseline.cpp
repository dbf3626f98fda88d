// The int8 operators in plain C++, for processors without kernels of their own, and the product also for weights with
// which 16-bit lanes could saturate.
#include <math.h>
#include <stdlib.h>

#include "int8_kernels.h"

namespace mpcompile {
namespace {

float activated(Activation activation, float x) {
    // GELU is 0 below -20 in float32, and -infinity times its factor of 0 would be NaN.
    if (activation != Activation::NONE && x < -20) x = -20;
    switch (activation) {
        case Activation::RELU:
            return x > 0 ? x : 0.0f;
        case Activation::GELU:
            return 0.5f * x * (1 + erff(x * 0.70710678f));
        case Activation::GELU_TANH:
            return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        default:
            return x;
    }
}

// The limits are those of the integers. NaN gives the lower one, as in the other kernels.
uint8_t quantised(float value, float inverse_scale, float zero, float low = 0, float high = 255) {
    const float scaled = rintf(value * inverse_scale);
    return uint8_t(scaled > low - zero ? scaled < high - zero ? scaled + zero : high : low);
}

float dequantised(uint8_t integer, const U8Scale& of) { return (float(integer) - of.zero) * of.scale; }

void compute(const Int8Weights& w, const Int8Call& call, const uint8_t* x, size_t stride, int64_t first, int64_t last,
             int64_t begin, int64_t end) {
    const int64_t end_row = end * CHUNK < w.rows ? end * CHUNK : w.rows;
    for (int64_t t = first; t < last; t++, x += stride)
        for (int64_t row = begin * CHUNK; row < end_row; row++) {
            const int8_t* weight = w.matrix + row * w.columns;
            int32_t sum = w.start[row];
            for (int64_t i = 0; i < w.columns; i++) sum += x[i] * weight[i];
            float value = float(sum) * w.scale[row] + w.bias[row];
            const int64_t at = t * w.rows + row;
            if (call.residual) value += call.residual[at];
            value = activated(call.activation, value);
            if (call.added) {
                const uint8_t step = quantised(value, 1 / call.branch.scale, call.branch.zero);
                value = dequantised(step, call.branch) + dequantised(call.added[at], call.added_scale);
            }
            if (call.floats) call.floats[at] = value;
            if (call.bytes) call.bytes[at] = quantised(value, call.inverse_scale, call.zero, call.low, call.high);
        }
}

// One head, one query after the other. The scratch memory holds the probabilities and the result of one query.
void attend(const Attention& a, int64_t image, int64_t head, uint8_t* scratch) {
    float* const scores = reinterpret_cast<float*>(scratch);
    float* const y = scores + a.keys;
    const auto row = [&](const Heads& of, int64_t token) {
        return of.values + image * of.image_stride + token * of.token_stride + head * a.dim;
    };
    for (int64_t query = 0; query < a.queries; query++) {
        const float* q = row(a.q, query);
        float most = -INFINITY, total = 0;
        for (int64_t t = 0; t < a.keys; t++) {
            const float* k = row(a.k, t);
            float sum = 0;
            for (int64_t i = 0; i < a.dim; i++) sum += q[i] * k[i];
            scores[t] = sum * a.scale;
            if (a.bias)
                scores[t] +=
                    a.bias[image * a.bias_image_stride + head * a.bias_head_stride + query * a.bias_query_stride + t];
            most = fmaxf(most, scores[t]);
        }
        for (int64_t i = 0; i < a.dim; i++) y[i] = 0;
        for (int64_t t = 0; t < a.keys; t++) {
            const float p = expf(scores[t] - most);
            total += p;
            for (int64_t i = 0; i < a.dim; i++) y[i] += p * row(a.v, t)[i];
        }
        const int64_t at = ((image * a.queries + query) * a.heads + head) * a.dim;
        for (int64_t i = 0; i < a.dim; i++) {
            if (a.floats) a.floats[at + i] = y[i] / total;
            if (a.bytes) a.bytes[at + i] = quantised(y[i] / total, a.inverse_scale, a.zero);
        }
    }
}

size_t attention_scratch(const Attention& a) { return size_t(a.keys + a.dim) * sizeof(float); }

void normalise(const LayerNorm& n, const float* x, uint8_t* y, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++, x += n.columns, y += n.columns) {
        float mean = 0, variance = 0;
        for (int64_t i = 0; i < n.columns; i++) mean += x[i];
        mean /= float(n.columns);
        for (int64_t i = 0; i < n.columns; i++) variance += (x[i] - mean) * (x[i] - mean);
        const float factor = 1 / sqrtf(variance / float(n.columns) + n.epsilon);
        for (int64_t i = 0; i < n.columns; i++)
            y[i] = quantised((x[i] - mean) * factor * n.gamma[i] + n.beta[i], n.inverse_scale, n.zero);
    }
}

}  // namespace

extern const Int8Kernels int8_baseline;
const Int8Kernels int8_baseline = {
    "int8_baseline",
    {0, false, [](int, int) { return Int8Layout{1, 1, 1, 64}; }, compute, true, nullptr},
    {attention_scratch, attend},
    normalise,
};

}  // namespace mpcompile
