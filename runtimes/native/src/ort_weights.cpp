#include "ort_weights.h"

#include <cstdio>
#include <memory>
#include <new>

namespace mpcompile {
namespace {

const char* const INPUT_NAMES[WEIGHT_INPUTS + 1] = {"x", "values", "places", "common", "order", "bias", "residual"};

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
OrtStatus* check_weights(Api api, const OrtKernelInfo* info, Weights& w) {
    if (const char* why = invalid_attributes(w)) return ort::CreateStatus::call(api, ort::INVALID_GRAPH, why);
    w.blocks = (w.columns + w.block - 1) / w.block;
    w.row_groups = (w.rows + w.group_rows() - 1) / w.group_rows();
    for (size_t input = 1; input < WEIGHT_INPUTS; input++) {
        int constant = 0;
        const OrtValue* value = nullptr;
        if (OrtStatus* failed = ort::GetConstantInput::call(api, info, input, &constant, &value)) return failed;
        if (!constant || !value) return refuse_input(api, "is not a constant", input);
        Shape shape{};
        if (OrtStatus* failed = shape_of(api, value, shape)) return failed;
        if (input == 1) w.nonzeros = shape.count == 4 ? shape.sizes[2] : -1;
        const int64_t sizes[WEIGHT_INPUTS][4] = {{},
                                          {w.blocks, w.row_groups, w.nonzeros, w.group_rows()},
                                          {w.blocks, w.row_groups, w.nonzeros, w.group_indices()},
                                          {w.blocks, w.row_groups},
                                          {w.blocks, w.row_groups, w.group_rows()},
                                          {w.rows}};
        const size_t dimensions[WEIGHT_INPUTS] = {0, 4, 4, 2, 3, 1};
        if (!shape.is(sizes[input], dimensions[input])) return refuse_input(api, "has another shape", input);
        const void* data = nullptr;
        if (OrtStatus* failed = data_of(api, value, data)) return failed;
        if (!in_bounds(w, input, data, shape.product(0, shape.count)))
            return refuse_input(api, "is out of bounds", input);
        if (input == 4 && !names_each_row_once(w, static_cast<const int32_t*>(data)))
            return refuse_input(api, "does not name each row once", input);
    }
    return nullptr;
}

}  // namespace

OrtStatus* refuse_input(Api api, const char* what, size_t input) {
    char text[160];
    snprintf(text, sizeof text, "NMGemm: input %s %s", INPUT_NAMES[input], what);
    return ort::CreateStatus::call(api, ort::INVALID_GRAPH, text);
}

OrtStatus* weights_of(Api api, const OrtKernelInfo* info, Weights& weights) {
    const struct {
        const char* name;
        int64_t* value;
    } attributes[] = {{"rows", &weights.rows},
                      {"columns", &weights.columns},
                      {"share", &weights.rows_per_pattern},
                      {"block", &weights.block},
                      {"chunk", &weights.chunk}};
    for (const auto& attribute : attributes)
        if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, attribute.name, attribute.value)) return failed;
    return check_weights(api, info, weights);
}

OrtStatus* streams_of(Api api, const OrtKernelContext* context, Weights& w) {
    const OrtValue* inputs[WEIGHT_INPUTS];
    for (size_t i = 1; i < WEIGHT_INPUTS; i++)
        if (OrtStatus* failed = ort::GetInput::call(api, context, i, &inputs[i])) return failed;
    if (OrtStatus* failed = data_of(api, inputs[1], w.values)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[2], w.indices)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[3], w.common)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[4], w.order)) return failed;
    return data_of(api, inputs[5], w.bias);
}

}  // namespace mpcompile
