// The custom operators mpcompile::NMConvInt8…: a convolution with 8-bit activations and weights whose tensors have the
// channels last, as int8_conv.h defines.
//
// Inputs: x u8 (images, height, width, channels), and the constants weight s8 (rows, channels, height, width) as a Conv
// of ONNX has it, scale and bias float32 (rows). The result is u8 (images, height, width, rows). Attributes: x_scale,
// x_zero, y_scale, y_zero; strides, dilations and pads as those of a Conv; low and high, between which the integers of
// the result are clipped. Zeros of the weight are found and skipped, whatever the pattern.
//
//   NMConvInt8       the result of the convolution
//   NMConvInt8Add    the result is quantised with branch_scale and branch_zero; then it is added to the u8 input
//                    `residual` of the same shape, with residual_scale and residual_zero
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "int8_conv.h"
#include "int8_kernels.h"
#include "int8_packing.h"
#include "ort_custom_op.h"
#include "ort_int8.h"
#include "ort_operators.h"
#include "ort_values.h"
#include "ort_window.h"

namespace mpcompile {
namespace {

struct ConvOp : CustomOp {
    bool adds;
};

struct Operator {
    const ConvOp* op;
    Api api;
    Window window;
    int64_t channels, tap_columns;
    std::unique_ptr<PackedInt8> packed;
    uint8_t x_zero;
    U8Scale y, branch, residual;
    float low, high;
};

OrtStatus* scale_of(Api api, const OrtKernelInfo* info, const char* scale, const char* zero, U8Scale& found) {
    int64_t integer = 0;
    if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, scale, &found.scale)) return failed;
    if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, zero, &integer)) return failed;
    found.zero = float(integer);
    if (right_quantisation(found.scale, integer)) return nullptr;
    return refuse(api, "NMConvInt8: a scale must be between 1e-38 and 1e38, and a zero point between 0 and 255");
}

OrtStatus* limit_of(Api api, const OrtKernelInfo* info, const char* name, float& found) {
    int64_t integer = 0;
    if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, name, &integer)) return failed;
    found = float(integer);
    return integer >= 0 && integer <= 255 ? nullptr : refuse(api, "NMConvInt8: a limit is not between 0 and 255");
}

// The fastest kernel that adds bytes.
const Int8Kernel& kernel() {
    const Int8Kernels* kernels[4];
    const int count = supported_int8_kernels(kernels);
    for (int i = 0; i < count; i++)
        if (kernels[i]->gemm.adds_bytes) return kernels[i]->gemm;
    return int8_baseline.gemm;
}

OrtStatus* fill(Operator& made, const OrtKernelInfo* info) {
    const Api api = made.api;
    U8Scale x;
    if (OrtStatus* failed = scale_of(api, info, "x_scale", "x_zero", x)) return failed;
    if (OrtStatus* failed = scale_of(api, info, "y_scale", "y_zero", made.y)) return failed;
    if (OrtStatus* failed = limit_of(api, info, "low", made.low)) return failed;
    if (OrtStatus* failed = limit_of(api, info, "high", made.high)) return failed;
    if (made.op->adds) {
        if (OrtStatus* failed = scale_of(api, info, "branch_scale", "branch_zero", made.branch)) return failed;
        if (OrtStatus* failed = scale_of(api, info, "residual_scale", "residual_zero", made.residual)) return failed;
    }
    made.x_zero = uint8_t(x.zero);
    if (OrtStatus* failed = window_of(api, info, made.window)) return failed;
    const char* otherwise = "NMConvInt8: the weight, its scale and the bias must be constants";
    const char* wrong = "NMConvInt8: the weight must be (rows, channels, height, width), its scale and the bias (rows)";
    Shape sizes{}, scales{}, biases{};
    const int8_t* weight = nullptr;
    const float *scale = nullptr, *bias = nullptr;
    if (OrtStatus* failed = constant_of(api, info, 1, otherwise, sizes, weight)) return failed;
    if (OrtStatus* failed = constant_of(api, info, 2, otherwise, scales, scale)) return failed;
    if (OrtStatus* failed = constant_of(api, info, 3, otherwise, biases, bias)) return failed;
    if (sizes.count != 4 || !scales.is(sizes.sizes, 1) || !biases.is(sizes.sizes, 1)) return refuse(api, wrong);
    for (size_t i = 0; i < 4; i++)
        if (sizes.sizes[i] <= 0 || sizes.sizes[i] > MOST_COLUMNS) return refuse(api, wrong);
    const int64_t rows = sizes.sizes[0];
    made.channels = sizes.sizes[1];
    made.window.kernel[0] = sizes.sizes[2];
    made.window.kernel[1] = sizes.sizes[3];
    if (sizes.sizes[2] > MOST_COLUMNS / sizes.sizes[3] || made.channels > MOST_COLUMNS / made.window.taps())
        return refuse(api, "NMConvInt8: more than 65,536 weights for an output channel");
    ConvWeight arranged = by_taps(weight, rows, made.channels, made.window.taps());
    made.tap_columns = arranged.tap_columns;
    made.packed = pack_int8(kernel(), int8_baseline.gemm, std::move(arranged.values), rows,
                            made.window.taps() * made.tap_columns, scale, bias, x.scale, int32_t(x.zero));
    return nullptr;
}

OrtStatus* create(const OrtCustomOp* self, Api api, const OrtKernelInfo* info, void** result) {
    try {
        auto made = std::make_unique<Operator>();
        made->op = static_cast<const ConvOp*>(self);
        made->api = api;
        if (OrtStatus* failed = fill(*made, info)) return failed;
        *result = made.release();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return ort::CreateStatus::call(api, ort::FAIL, "NMConvInt8: out of memory");
    }
}

// What the threads of ONNX Runtime's pool share during one call: groups of tokens, times parts of the chunks of rows.
struct Call {
    const Operator& made;
    Int8Call call;
    ConvInput input;
    int64_t groups, parts, bytes;  // the size of x
    uint64_t id;                   // differs between calls
    std::atomic<bool> failed{false};
};

// The windows of one group of tokens. A thread keeps them for the other parts of the group.
struct Tile {
    std::vector<CacheLine> memory;  // zeros at first: columns that are not written are read
    uint64_t call = 0;
    int64_t group = 0;

    uint8_t* windows(Call& mine, int64_t wanted, int64_t first, int64_t last, size_t stride) {
        const size_t lines = size_t(last - first) * stride / sizeof(CacheLine) + 1;
        if (lines > memory.size()) memory.resize(lines);
        uint8_t* to = memory.data()->bytes;
        if (call != mine.id || group != wanted)
            copy_windows(mine.made.window, mine.input, mine.made.tap_columns, first, last, to, stride);
        call = mine.id;
        group = wanted;
        return to;
    }
};

void run_item(void* shared, size_t item) {
    static thread_local Tile tile;
    Call& mine = *static_cast<Call*>(shared);
    const Int8Weights& w = mine.made.packed->weights;
    const int64_t group = int64_t(item) / mine.parts, part = int64_t(item) % mine.parts, tokens = mine.call.tokens;
    const int64_t first = tokens * group / mine.groups, last = tokens * (group + 1) / mine.groups;
    const int64_t step = w.steps * w.step_columns;  // bytes that the kernel reads of each token
    // Bytes beyond a token are multiplied by 0, but must lie within x.
    const bool in_place = mine.made.window.pointwise() && (last - 1) * w.columns + step <= mine.bytes;
    const size_t stride = size_t(in_place ? w.columns : step);
    const uint8_t* x = mine.call.x + first * w.columns;
    if (!in_place) try {
            x = tile.windows(mine, group, first, last, stride);
        } catch (const std::bad_alloc&) {
            mine.failed = true;
            return;
        }
    mine.made.packed->kernel->compute(w, mine.call, x, stride, first, last, w.chunks() * part / mine.parts,
                                      w.chunks() * (part + 1) / mine.parts);
}

constexpr int64_t LEAST_ITEMS = 16;  // that are left for threads to share

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    static std::atomic<uint64_t> calls{0};
    const Operator& made = *static_cast<const Operator*>(kernel);
    const Api api = made.api;
    const Int8Weights& w = made.packed->weights;
    const OrtValue* x = nullptr;
    Int8Call call{};
    Shape shape{};
    if (OrtStatus* failed = ort::GetInput::call(api, context, 0, &x)) return failed;
    if (OrtStatus* failed = data_of(api, x, call.x)) return failed;
    if (OrtStatus* failed = shape_of(api, x, shape)) return failed;
    if (shape.count != 4 || shape.sizes[3] != made.channels)
        return refuse(api, "NMConvInt8: x must be (images, height, width, channels) with the channels of the weight");
    const int64_t bytes = shape.product(0, 4);
    ConvInput input{call.x, shape.sizes[1], shape.sizes[2], made.channels, made.x_zero, 0, 0};
    input.out_height = shape.sizes[1] = made.window.outputs(0, input.height);
    input.out_width = shape.sizes[2] = made.window.outputs(1, input.width);
    shape.sizes[3] = w.rows;
    if (input.out_height <= 0 || input.out_width <= 0) return refuse(api, "NMConvInt8: the image is too small");
    call.tokens = shape.product(0, 3);
    if (made.op->adds) {
        const OrtValue* residual = nullptr;
        Shape added{};
        if (OrtStatus* failed = ort::GetInput::call(api, context, 4, &residual)) return failed;
        if (OrtStatus* failed = shape_of(api, residual, added)) return failed;
        if (!added.is(shape.sizes, 4)) return refuse(api, "NMConvInt8Add: the residual has another shape");
        if (OrtStatus* failed = data_of(api, residual, call.added)) return failed;
        call.branch = made.branch;
        call.added_scale = made.residual;
    }
    if (OrtStatus* failed = output_of(api, context, shape, call.bytes)) return failed;
    if (call.tokens == 0) return nullptr;
    call.inverse_scale = 1 / made.y.scale;
    call.zero = made.y.zero;
    call.low = made.low;
    call.high = made.high;
    const int64_t most = made.packed->kernel->layout(w.kept, w.shared).most_tokens;
    const int64_t groups = (call.tokens + most - 1) / most;
    const int64_t parts = std::min(w.chunks(), (LEAST_ITEMS + groups - 1) / groups);
    Call shared{made, call, input, groups, parts, bytes, ++calls};
    if (OrtStatus* failed = ort::ParallelFor::call(api, context, run_item, size_t(groups * parts), 0, &shared))
        return failed;
    return shared.failed ? ort::CreateStatus::call(api, ort::FAIL, "NMConvInt8: out of memory") : nullptr;
}

ConvOp op(const char* name, bool adds) {
    CustomOp made = custom_op<Operator>(name, {ort::UINT8, ort::INT8, ort::FLOAT, ort::FLOAT}, ort::UINT8, create,
                                        compute);
    if (adds) made.inputs[made.input_count++] = ort::UINT8;
    return {made, adds};
}

}  // namespace

const std::vector<const OrtCustomOp*>& int8_conv_operators() {
    static const ConvOp ops[] = {op("NMConvInt8", false), op("NMConvInt8Add", true)};
    static const std::vector<const OrtCustomOp*> all{&ops[0], &ops[1]};
    return all;
}

}  // namespace mpcompile
