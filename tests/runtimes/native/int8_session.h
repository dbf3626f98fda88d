// The int8 operators as a session on a file holds them, with random inputs and what their results must be.
#pragma once
#include <cstring>

#include "int8_kernels.h"
#include "int8_packing.h"
#include "int8_reference.h"
#include "ort_fakes.h"

namespace mpcompile {

constexpr int64_t ROWS = 100, COLUMNS = 72, HEADS = 3, DIM = 20, WIDTH = HEADS * DIM;
constexpr float X_SCALE = 0.02f, Y_SCALE = 0.05f, EPSILON = 1e-5f, SCORE_SCALE = 0.25f;
constexpr int64_t X_ZERO = 77, Y_ZERO = 101;
using Sizes = std::vector<int64_t>;

// An int8 operator with its constants, as a session holds it, and inputs for it.
struct Session {
    const OrtCustomOp* op;
    std::string name;
    OrtKernelInfo info;
    void* kernel = nullptr;
    std::vector<int8_t> weight, turned;  // [rows][columns], and as the file stores it
    std::vector<float> scale, bias;

    explicit Session(const OrtCustomOp* op, Pattern pattern = {2, 4, 2, true}) : op(op), name(op->GetName(op)) {
        info.floats = {{"x_scale", X_SCALE}, {"y_scale", Y_SCALE}, {"epsilon", EPSILON}, {"scale", SCORE_SCALE}};
        info.attributes = {{"x_zero", X_ZERO}, {"y_zero", Y_ZERO}, {"heads", HEADS},       {"dim", DIM},
                           {"q_offset", 0},    {"k_offset", 2},    {"v_offset", 1}, {"first_query", 0},
                           {"queries", INT32_MAX}};
        if (!is_gemm()) return;
        weight = random_weight(ROWS, COLUMNS, pattern, Values::SMALL);
        turned.resize(weight.size());
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t k = 0; k < COLUMNS; k++) turned[size_t(k * ROWS + row)] = weight[size_t(row * COLUMNS + k)];
        for (int64_t row = 0; row < ROWS; row++) {
            scale.push_back(0.01f * (1 + normal() * normal()));
            bias.push_back(normal());
        }
        info.constants = {
            {1, {{COLUMNS, ROWS}, turned.data()}}, {2, {{ROWS}, scale.data()}}, {3, {{ROWS}, bias.data()}}};
    }
    Session(const Session&) = delete;
    ~Session() {
        if (kernel) op->KernelDestroy(kernel);
    }

    bool is(const char* part) const { return name.find(part) != std::string::npos; }
    bool is_gemm() const { return is("NMGemmInt8"); }

    std::string open() { return text_of(op->CreateKernelV2(op, api(), &info, &kernel)); }

    std::string run(const std::vector<OrtValue>& inputs, OrtKernelContext& context) const {
        context.inputs = inputs;
        context.element_bytes = op->GetOutputType(op, 0) == ort::FLOAT ? sizeof(float) : 1;
        return text_of(op->KernelComputeV2(kernel, &context));
    }
};

// Inputs for an operator: of so many images and tokens, and as many keys.
struct Inputs {
    std::vector<uint8_t> x;
    std::vector<std::vector<float>> floats;
    std::vector<OrtValue> values;

    Inputs(const Session& s, int64_t images, int64_t tokens, int64_t keys = 19) {
        floats.reserve(8);  // values point into them
        if (s.is_gemm()) {
            x = random_activations(images * tokens, COLUMNS);
            values.push_back({{images, tokens, COLUMNS}, x.data()});
            for (const auto& constant : s.info.constants) values.push_back(constant.second);
            if (s.is("Add")) add({images, tokens, ROWS});
        } else if (s.is("LayerNorm")) {
            add({images, tokens, COLUMNS}), add({COLUMNS}), add({COLUMNS});
        } else {
            add({images, tokens, WIDTH}), add({images, keys, WIDTH + 2}), add({images, keys, WIDTH + 1});
            const Sizes biases[] = {{1, HEADS, tokens, keys}, {keys}, {images, 1, 1, keys}, {images, HEADS, 1, keys}};
            if (s.is("Biased")) add(biases[tokens % 4]);
        }
    }

    void add(const Sizes& shape) {
        int64_t count = 1;
        for (const int64_t size : shape) count *= size;
        floats.emplace_back(size_t(count));
        for (float& value : floats.back()) value = normal();
        values.push_back({shape, floats.back().data()});
    }
};

inline const Int8Kernels& fastest() {
    const Int8Kernels* found[4];
    supported_int8_kernels(found);
    return *found[0];
}

// The bytes of a product, from exact integers; of another operator, from a direct call of its kernel.
inline bool is_right(const Session& s, const Inputs& in, int64_t images, int64_t tokens, int64_t keys,
                     const std::vector<uint8_t>& found) {
    const size_t element = s.is("Quantize") ? 1 : sizeof(float);
    if (!s.is_gemm()) {
        std::vector<uint8_t> y(size_t(images * tokens * (s.is("LayerNorm") ? COLUMNS : WIDTH)) * element);
        if (s.is("LayerNorm")) {
            const float *gamma = in.floats[1].data(), *beta = in.floats[2].data();
            fastest().layer_norm({gamma, beta, COLUMNS, EPSILON, 1 / Y_SCALE, float(Y_ZERO)}, in.floats[0].data(),
                                 y.data(), images * tokens);
            return y == found;
        }
        Attention a{{in.floats[0].data(), tokens * WIDTH, WIDTH},
                    {in.floats[1].data() + 2, keys * (WIDTH + 2), WIDTH + 2},
                    {in.floats[2].data() + 1, keys * (WIDTH + 1), WIDTH + 1},
                    images, tokens, keys, HEADS, DIM, SCORE_SCALE, nullptr, 0, 0, 0, nullptr, nullptr,
                    1 / Y_SCALE, float(Y_ZERO)};
        std::vector<float> bias(size_t(images * HEADS * tokens * keys));  // of each image, head, query and key
        if (s.is("Biased")) {
            Sizes sizes = in.values[3].shape;
            sizes.insert(sizes.begin(), 4 - sizes.size(), 1);
            for (size_t i = 0; i < bias.size(); i++) {
                const int64_t whole[] = {images, HEADS, tokens, keys};
                int64_t at = 0, rest = int64_t(i), place[4];
                for (int d = 3; d >= 0; rest /= whole[d--]) place[d] = rest % whole[d];
                for (size_t d = 0; d < 4; d++) at = at * sizes[d] + (sizes[d] == 1 ? 0 : place[d]);
                bias[i] = in.floats[3][size_t(at)];
            }
            a.bias = bias.data();
            a.bias_image_stride = HEADS * tokens * keys;
            a.bias_head_stride = tokens * keys;
            a.bias_query_stride = keys;
        }
        if (s.is("Quantize"))
            a.bytes = y.data();
        else
            a.floats = reinterpret_cast<float*>(y.data());
        std::vector<CacheLine> scratch(fastest().attention.scratch_bytes(a) / 64 + 1);
        for (int64_t i = 0; i < images * HEADS; i++)
            fastest().attention.compute(a, i / HEADS, i % HEADS, scratch.data()->bytes);
        return y == found;
    }
    const Activation activation = s.is("GeluTanh") ? Activation::GELU_TANH : s.is("Gelu") ? Activation::GELU
                                  : s.is("Relu")   ? Activation::RELU : Activation::NONE;
    const std::vector<int64_t> sums = exact_sums(s.weight, ROWS, COLUMNS, in.x, images * tokens, X_ZERO);
    if (found.size() != sums.size() * element) return false;
    for (size_t i = 0; i < sums.size(); i++) {
        const size_t row = i % ROWS;
        const double product = double(sums[i]) * double(X_SCALE) * double(s.scale[row]), bias = double(s.bias[row]);
        const double added = s.is("Add") ? double(in.floats[0][i]) : 0;
        const double value = activated(activation, product + bias + added);
        const double error = error_of(activation, std::fabs(product) + std::fabs(bias) + std::fabs(added), value);
        float single = 0;
        if (element > 1) memcpy(&single, found.data() + 4 * i, 4);
        if (element > 1 ? std::fabs(double(single) - value) > error
                        : !is_quantised(found[i], value, error, double(Y_SCALE), double(Y_ZERO)))
            return false;
    }
    return true;
}

}  // namespace mpcompile
