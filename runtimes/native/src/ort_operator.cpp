// The custom operators mpcompile::NMGemm and NMConv of ONNX Runtime: y = x W^T + bias, where W is N:M in the streams of
// nm_gemm.h.
//
// Inputs: x, and the constants values, places, common, order, bias. Attributes: rows, columns, share, block, chunk.
// x is (..., columns) for NMGemm, and (images, columns, ...) for NMConv, a 1x1 convolution.
// Pruned weights are not in the streams and not multiplied: unlike a dense product, 0 * inf and 0 * NaN do not occur.
#include <atomic>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>

#include "ort_operators.h"
#include "ort_values.h"
#include "tile_scheduler.h"

namespace mpcompile {
namespace {

constexpr size_t INPUTS = 6;
constexpr int INPUT_TYPES[INPUTS] = {ort::FLOAT, ort::FLOAT, ort::UINT16, ort::UINT16, ort::INT32, ort::FLOAT};
const char* const INPUT_NAMES[INPUTS] = {"x", "values", "places", "common", "order", "bias"};

struct Operator {
    Api api;
    const Kernel* kernel;
    Weights weights;  // its pointers are set in each call
    bool channels_first;
    std::once_flag row_panels_made;
    RowPanels* row_panels = nullptr;

    ~Operator() { free_row_panels(row_panels); }
};

// The layout for few tokens, made at the first call that needs it; null if the other layout is as fast, or if there is
// no memory for a second one.
const RowPanels* row_panels_for(Operator& op, const Weights& w, int64_t tokens) {
    const SkinnyKernel& skinny = *op.kernel->skinny;
    if (tokens > skinny.most[w.rows_per_pattern]) return nullptr;
    std::call_once(op.row_panels_made, [&] { op.row_panels = make_row_panels(w, skinny.permutes); });
    return op.row_panels;
}

extern const OrtCustomOp NM_GEMM, NM_CONV;

OrtStatus* refuse(Api api, const char* what, size_t input) {
    char text[160];
    snprintf(text, sizeof text, "NMGemm: input %s %s", INPUT_NAMES[input], what);
    return ort::CreateStatus::call(api, ort::INVALID_GRAPH, text);
}

// Why the attributes are invalid; null if they are valid. All values from which the kernel computes addresses are
// bounded here or in `check_weights`.
const char* invalid_attributes(const Weights& w) {
    if (w.rows_per_pattern != 1 && w.rows_per_pattern != 2 && w.rows_per_pattern != 4)
        return "NMGemm: share must be 1, 2 or 4";
    if (w.rows < 1 || w.rows > INT32_MAX - 64) return "NMGemm: rows is out of range";
    if (w.columns < 1 || w.columns > INT32_MAX) return "NMGemm: columns is out of range";
    if (w.block < 1 || w.block >= UINT16_MAX) return "NMGemm: block is out of range";
    if (w.chunk < 4 || w.chunk % 4 || w.chunk > INT32_MAX - 64) return "NMGemm: chunk must be a multiple of 4";
    return nullptr;
}

// Whether each block names every row once: the output of a row that is missing would be uninitialised memory.
bool names_each_row_once(const Weights& w, const int32_t* order) {
    const std::unique_ptr<int64_t[]> named(new (std::nothrow) int64_t[size_t(w.rows)]());
    if (!named) return false;
    const int64_t size = w.row_groups * w.group_rows();
    int64_t padding = 0;
    for (int64_t i = 0; i < w.blocks * size; i++) {
        const int64_t row = order[i], block = i / size + 1;
        if (row == w.rows) {
            padding++;
            continue;
        }
        if (named[size_t(row)] == block) return false;
        named[size_t(row)] = block;
    }
    return padding == w.blocks * (size - w.rows);
}

// Whether every index and every row in the streams is in range.
bool in_bounds(const Weights& w, size_t input, const void* data, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (input == 2 && static_cast<const uint16_t*>(data)[i] > w.block) return false;
        if (input == 3 && static_cast<const uint16_t*>(data)[i] > w.nonzeros) return false;
        if (input == 4) {
            const int64_t row = static_cast<const int32_t*>(data)[i], position = i % (w.row_groups * w.group_rows());
            const int64_t first = position / w.chunk * w.chunk;
            const int64_t last = first + w.chunk < w.rows ? first + w.chunk : w.rows;
            const bool padding = row == w.rows && w.rows - first <= w.chunk;  // the last row group may be padded
            if (!padding && (row < first || row >= last)) return false;
        }
    }
    return true;
}

// Validates the weights, once, when the session is created.
OrtStatus* check_weights(Operator& op, const OrtKernelInfo* info) {
    Weights& w = op.weights;
    if (const char* why = invalid_attributes(w)) return ort::CreateStatus::call(op.api, ort::INVALID_GRAPH, why);
    w.blocks = (w.columns + w.block - 1) / w.block;
    w.row_groups = (w.rows + w.group_rows() - 1) / w.group_rows();
    for (size_t input = 1; input < INPUTS; input++) {
        int constant = 0;
        const OrtValue* value = nullptr;
        if (OrtStatus* failed = ort::GetConstantInput::call(op.api, info, input, &constant, &value)) return failed;
        if (!constant || !value) return refuse(op.api, "is not a constant", input);
        Shape shape{};
        if (OrtStatus* failed = shape_of(op.api, value, shape)) return failed;
        if (input == 1) w.nonzeros = shape.count == 4 ? shape.sizes[2] : -1;
        const int64_t sizes[INPUTS][4] = {{},
                                          {w.blocks, w.row_groups, w.nonzeros, w.group_rows()},
                                          {w.blocks, w.row_groups, w.nonzeros, w.group_indices()},
                                          {w.blocks, w.row_groups},
                                          {w.blocks, w.row_groups, w.group_rows()},
                                          {w.rows}};
        const size_t dimensions[INPUTS] = {0, 4, 4, 2, 3, 1};
        if (!shape.is(sizes[input], dimensions[input])) return refuse(op.api, "has another shape", input);
        const void* data = nullptr;
        if (OrtStatus* failed = data_of(op.api, value, data)) return failed;
        if (!in_bounds(w, input, data, shape.product(0, shape.count))) return refuse(op.api, "is out of bounds", input);
        if (input == 4 && !names_each_row_once(w, static_cast<const int32_t*>(data)))
            return refuse(op.api, "does not name each row once", input);
    }
    return nullptr;
}

OrtStatus* create(const OrtCustomOp* self, Api api, const OrtKernelInfo* info, void** made) {
    const Kernel* kernels[4];
    supported_kernels(kernels);
    Operator* op = new (std::nothrow) Operator{api, kernels[0], {}, self == &NM_CONV, {}};
    if (!op) return ort::CreateStatus::call(api, ort::FAIL, "NMGemm: out of memory");
    const struct {
        const char* name;
        int64_t* value;
    } attributes[] = {{"rows", &op->weights.rows},
                      {"columns", &op->weights.columns},
                      {"share", &op->weights.rows_per_pattern},
                      {"block", &op->weights.block},
                      {"chunk", &op->weights.chunk}};
    OrtStatus* failed = nullptr;
    for (const auto& attribute : attributes)
        if (!failed) failed = ort::GetAttributeInt::call(api, info, attribute.name, attribute.value);
    if (!failed) failed = check_weights(*op, info);
    if (failed) {
        delete op;
        return failed;
    }
    *made = op;
    return nullptr;
}

// What the threads of ONNX Runtime's pool share during one call.
struct Call {
    const TileScheduler& scheduler;
    std::atomic<bool> failed{false};
};

void run_item(void* call, size_t item) {
    Call& mine = *static_cast<Call*>(call);
    if (!mine.scheduler.run(int64_t(item))) mine.failed = true;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    Operator& op = *static_cast<Operator*>(kernel);
    Weights w = op.weights;
    const OrtValue* inputs[INPUTS];
    for (size_t i = 0; i < INPUTS; i++)
        if (OrtStatus* failed = ort::GetInput::call(op.api, context, i, &inputs[i])) return failed;
    Activations a{};
    if (OrtStatus* failed = data_of(op.api, inputs[0], a.x)) return failed;
    if (OrtStatus* failed = data_of(op.api, inputs[1], w.values)) return failed;
    if (OrtStatus* failed = data_of(op.api, inputs[2], w.indices)) return failed;
    if (OrtStatus* failed = data_of(op.api, inputs[3], w.common)) return failed;
    if (OrtStatus* failed = data_of(op.api, inputs[4], w.order)) return failed;
    if (OrtStatus* failed = data_of(op.api, inputs[5], w.bias)) return failed;
    Shape shape{};
    if (OrtStatus* failed = shape_of(op.api, inputs[0], shape)) return failed;
    const size_t axis = op.channels_first ? 1 : shape.count - 1;
    if (shape.count < (op.channels_first ? 3 : 1) || shape.sizes[axis] != w.columns)
        return refuse(op.api, "has another number of input channels than the weights", 0);
    a.pixels = op.channels_first ? shape.product(2, shape.count) : 0;
    a.tokens = shape.product(0, axis) * (op.channels_first ? a.pixels : 1);
    shape.sizes[axis] = w.rows;
    if (OrtStatus* failed = output_of(op.api, context, shape, a.y)) return failed;
    if (a.tokens == 0) return nullptr;
    const TileScheduler scheduler(*op.kernel, w, a, row_panels_for(op, w, a.tokens));
    Call call{scheduler};
    OrtStatus* failed = ort::ParallelFor::call(op.api, context, run_item, size_t(scheduler.items()), 0, &call);
    if (failed) return failed;
    return call.failed ? ort::CreateStatus::call(op.api, ort::FAIL, "NMGemm: out of memory") : nullptr;
}

constexpr OrtCustomOp named(const char* (*name)(const OrtCustomOp*)) {
    return {
        ort::CUSTOM_OP_VERSION,
        nullptr,
        name,
        [](const OrtCustomOp*) { return "CPUExecutionProvider"; },
        [](const OrtCustomOp*, size_t input) { return INPUT_TYPES[input]; },
        [](const OrtCustomOp*) { return INPUTS; },
        [](const OrtCustomOp*, size_t) { return int(ort::FLOAT); },
        [](const OrtCustomOp*) { return size_t(1); },
        nullptr,
        [](void* kernel) { delete static_cast<Operator*>(kernel); },
        [](const OrtCustomOp*, size_t) { return 0; },
        [](const OrtCustomOp*, size_t) { return 0; },
        [](const OrtCustomOp*, size_t) { return 0; },
        [](const OrtCustomOp*) { return 0; },
        [](const OrtCustomOp*) { return 1; },
        [](const OrtCustomOp*) { return 0; },
        [](const OrtCustomOp*) { return 1; },
        create,
        compute,
        {},
    };
}

const OrtCustomOp NM_GEMM = named([](const OrtCustomOp*) { return "NMGemm"; });
const OrtCustomOp NM_CONV = named([](const OrtCustomOp*) { return "NMConv"; });

}  // namespace

const std::vector<const OrtCustomOp*>& float_operators() {
    static const std::vector<const OrtCustomOp*> all{&NM_GEMM, &NM_CONV};
    return all;
}

}  // namespace mpcompile
