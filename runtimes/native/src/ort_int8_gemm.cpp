// The custom operators mpcompile::NMGemmInt8…: y = x W + bias with 8-bit activations and weights, as int8_gemm.h
// defines.
//
// Inputs: x u8 (..., columns), and the constants weight s8 (columns, rows), scale and bias float32 (rows). Attributes:
// x_scale, x_zero. The weight is the plain matrix; zeros are found and skipped, whatever the pattern.
//
//   NMGemmInt8                  float32 result
//   NMGemmInt8Add               float32 result, plus the input `residual` of the same shape
//   NMGemmInt8Quantize          u8 result, with the attributes y_scale and y_zero
//   NMGemmInt8…Quantize         the same after ReLU, GELU, or GELU approximated by tanh
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "int8_kernels.h"
#include "int8_packing.h"
#include "ort_custom_op.h"
#include "ort_int8.h"
#include "ort_operators.h"
#include "ort_values.h"

namespace mpcompile {
namespace {

struct GemmOp : CustomOp {
    Activation activation;
    bool adds, quantises;
};

struct Operator {
    const GemmOp* op;
    Api api;
    std::unique_ptr<PackedInt8> packed;
    float y_scale = 1;
    int64_t y_zero = 0;
};

// A constant input of the wanted shape; a size of -1 is free, and is set to the size found.
template <typename T>
OrtStatus* constant(Api api, const OrtKernelInfo* info, size_t index, int64_t (&sizes)[2], size_t dimensions,
                    const T*& data) {
    Shape shape{};
    const char* otherwise = "NMGemmInt8: the weight, its scale and the bias must be constants";
    if (OrtStatus* failed = constant_of(api, info, index, otherwise, shape, data)) return failed;
    bool right = shape.count == dimensions;
    for (size_t i = 0; right && i < dimensions; i++) {
        right = shape.sizes[i] > 0 && shape.sizes[i] < INT32_MAX / 2 && (sizes[i] < 0 || shape.sizes[i] == sizes[i]);
        sizes[i] = shape.sizes[i];
    }
    if (!right) return refuse(api, "NMGemmInt8: the weight must be (columns, rows), its scale and the bias (rows)");
    return nullptr;
}

// [rows][columns] from [columns][rows], in square parts that stay in the cache.
std::vector<int8_t> transposed(const int8_t* from, int64_t columns, int64_t rows) {
    constexpr int64_t PART = 64;
    std::vector<int8_t> to(size_t(columns * rows));
    for (int64_t r0 = 0; r0 < rows; r0 += PART)
        for (int64_t c0 = 0; c0 < columns; c0 += PART)
            for (int64_t c = c0; c < c0 + PART && c < columns; c++)
                for (int64_t r = r0; r < r0 + PART && r < rows; r++) to[size_t(r * columns + c)] = from[c * rows + r];
    return to;
}

OrtStatus* fill(Operator& made, const OrtKernelInfo* info) {
    const Api api = made.api;
    float x_scale = 1;
    int64_t x_zero = 0;
    if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, "x_scale", &x_scale)) return failed;
    if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, "x_zero", &x_zero)) return failed;
    if (made.op->quantises) {
        if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, "y_scale", &made.y_scale)) return failed;
        if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, "y_zero", &made.y_zero)) return failed;
    }
    if (!right_quantisation(x_scale, x_zero) || !right_quantisation(made.y_scale, made.y_zero))
        return refuse(api, "NMGemmInt8: a scale must be between 1e-38 and 1e38, and a zero point between 0 and 255");
    int64_t sizes[2] = {-1, -1};
    const int8_t* weight = nullptr;
    const float *scale = nullptr, *bias = nullptr;
    if (OrtStatus* failed = constant(api, info, 1, sizes, 2, weight)) return failed;
    const int64_t columns = sizes[0], rows = sizes[1];
    if (columns > MOST_COLUMNS) return refuse(api, "NMGemmInt8: more than 65,536 input channels");
    int64_t per_row[2] = {rows, 0};
    if (OrtStatus* failed = constant(api, info, 2, per_row, 1, scale)) return failed;
    if (OrtStatus* failed = constant(api, info, 3, per_row, 1, bias)) return failed;
    const Int8Kernels* kernels[4];
    supported_int8_kernels(kernels);
    made.packed = pack_int8(kernels[0]->gemm, int8_baseline.gemm, transposed(weight, columns, rows), rows, columns,
                            scale, bias, x_scale, int32_t(x_zero));
    return nullptr;
}

OrtStatus* create(const OrtCustomOp* self, Api api, const OrtKernelInfo* info, void** result) {
    try {
        auto made = std::make_unique<Operator>(Operator{static_cast<const GemmOp*>(self), api, nullptr});
        if (OrtStatus* failed = fill(*made, info)) return failed;
        *result = made.release();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return ort::CreateStatus::call(api, ort::FAIL, "NMGemmInt8: out of memory");
    }
}

// What the threads of ONNX Runtime's pool share during one call: tokens in groups, times parts of the chunks of rows.
// A thread computes one part for several groups in turn, whose weights then stay in its L2 cache.
struct Call {
    const PackedInt8& packed;
    Int8Call call;
    int64_t groups, parts;
    size_t stride;  // bytes of a row that the kernel may read
    std::atomic<bool> failed{false};
};

// Rows whose length is no multiple of the kernel's step are copied, so that it never reads beyond the last one.
const uint8_t* padded(const Int8Weights& w, const uint8_t* x, int64_t tokens, size_t stride) {
    uint8_t* to = scratch_bytes(size_t(tokens) * stride);
    for (int64_t t = 0; to && t < tokens; t++) {
        memcpy(to + size_t(t) * stride, x + t * w.columns, size_t(w.columns));
        memset(to + size_t(t) * stride + w.columns, 0, stride - size_t(w.columns));
    }
    return to;
}

void run_item(void* shared, size_t item) {
    Call& mine = *static_cast<Call*>(shared);
    const Int8Weights& w = mine.packed.weights;
    const int64_t part = int64_t(item) / mine.groups, group = int64_t(item) % mine.groups, tokens = mine.call.tokens;
    const int64_t first = tokens * group / mine.groups, last = tokens * (group + 1) / mine.groups;
    const uint8_t* x = mine.call.x + first * w.columns;
    if (mine.stride != size_t(w.columns)) x = padded(w, x, last - first, mine.stride);
    if (!x) {
        mine.failed = true;
        return;
    }
    mine.packed.kernel->compute(w, mine.call, x, mine.stride, first, last, w.chunks() * part / mine.parts,
                                w.chunks() * (part + 1) / mine.parts);
}

constexpr int64_t LEAST_ITEMS = 16;  // that are left for threads to share
constexpr int64_t PART_BYTES = 256 * 1024;

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const Operator& made = *static_cast<const Operator*>(kernel);
    const Api api = made.api;
    const Int8Weights& w = made.packed->weights;
    const OrtValue* x = nullptr;
    if (OrtStatus* failed = ort::GetInput::call(api, context, 0, &x)) return failed;
    Int8Call call{};
    Shape shape{};
    if (OrtStatus* failed = data_of(api, x, call.x)) return failed;
    if (OrtStatus* failed = shape_of(api, x, shape)) return failed;
    if (!shape.count || shape.sizes[shape.count - 1] != w.columns)
        return refuse(api, "NMGemmInt8: x has another number of input channels than the weight");
    call.tokens = shape.product(0, shape.count - 1);
    shape.sizes[shape.count - 1] = w.rows;
    if (made.op->adds) {
        const OrtValue* residual = nullptr;
        Shape added{};
        if (OrtStatus* failed = ort::GetInput::call(api, context, 4, &residual)) return failed;
        if (OrtStatus* failed = shape_of(api, residual, added)) return failed;
        if (!added.is(shape.sizes, shape.count)) return refuse(api, "NMGemmInt8Add: the residual has another shape");
        if (OrtStatus* failed = data_of(api, residual, call.residual)) return failed;
    }
    if (OrtStatus* failed = made.op->quantises ? output_of(api, context, shape, call.bytes)
                                               : output_of(api, context, shape, call.floats))
        return failed;
    if (call.tokens == 0) return nullptr;
    call.activation = made.op->activation;
    call.inverse_scale = 1 / made.y_scale;
    call.zero = float(made.y_zero);
    const int64_t most = made.packed->kernel->layout(w.kept, w.shared).most_tokens;
    const int64_t groups = (call.tokens + most - 1) / most;
    const int64_t weight_bytes = int64_t(made.packed->stream.size() * sizeof(CacheLine));
    const int64_t wanted = std::max((LEAST_ITEMS + groups - 1) / groups, weight_bytes / PART_BYTES);
    const int64_t parts = std::min(w.chunks(), wanted);
    Call shared{*made.packed, call, groups, parts, size_t(w.steps * w.step_columns)};
    if (OrtStatus* failed = ort::ParallelFor::call(api, context, run_item, size_t(groups * parts), 0, &shared))
        return failed;
    return shared.failed ? ort::CreateStatus::call(api, ort::FAIL, "NMGemmInt8: out of memory") : nullptr;
}

GemmOp op(const char* name, Activation activation, bool adds, bool quantises) {
    CustomOp made = custom_op<Operator>(name, {ort::UINT8, ort::INT8, ort::FLOAT, ort::FLOAT},
                                        quantises ? ort::UINT8 : ort::FLOAT, create, compute);
    if (adds) made.inputs[made.input_count++] = ort::FLOAT;
    return {made, activation, adds, quantises};
}

}  // namespace

const std::vector<const OrtCustomOp*>& int8_gemm_operators() {
    static const GemmOp ops[] = {
        op("NMGemmInt8", Activation::NONE, false, false),
        op("NMGemmInt8Add", Activation::NONE, true, false),
        op("NMGemmInt8Quantize", Activation::NONE, false, true),
        op("NMGemmInt8ReluQuantize", Activation::RELU, false, true),
        op("NMGemmInt8GeluQuantize", Activation::GELU, false, true),
        op("NMGemmInt8GeluTanhQuantize", Activation::GELU_TANH, false, true),
    };
    static const std::vector<const OrtCustomOp*> all{&ops[0], &ops[1], &ops[2], &ops[3], &ops[4], &ops[5]};
    return all;
}

}  // namespace mpcompile
