// Shapes, data and attributes of ONNX Runtime's values, for the custom operators.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "ort_c_api.h"

namespace mpcompile {

using Api = const void* const*;
constexpr size_t MOST_DIMENSIONS = 8;

struct Shape {
    int64_t sizes[MOST_DIMENSIONS];
    size_t count;

    int64_t product(size_t begin, size_t end) const {
        int64_t result = 1;
        for (size_t i = begin; i < end; i++) result *= sizes[i];
        return result;
    }
    bool is(const int64_t* wanted, size_t dimensions) const {
        if (count != dimensions) return false;
        for (size_t i = 0; i < dimensions; i++)
            if (sizes[i] != wanted[i]) return false;
        return true;
    }
};

// A status for a file or an input that is invalid.
inline OrtStatus* refuse(Api api, const char* what) { return ort::CreateStatus::call(api, ort::INVALID_GRAPH, what); }

OrtStatus* shape_of(Api api, const OrtValue* value, Shape& shape);

template <typename T>
OrtStatus* data_of(Api api, const OrtValue* value, const T*& data) {
    void* found = nullptr;
    OrtStatus* failed = ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &found);
    data = static_cast<const T*>(found);
    return failed;
}

// Gets a constant input with its shape; refuses with the text `otherwise` if it is computed.
template <typename T>
OrtStatus* constant_of(Api api, const OrtKernelInfo* info, size_t index, const char* otherwise, Shape& shape,
                       const T*& data) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (OrtStatus* failed = ort::GetConstantInput::call(api, info, index, &is_constant, &value)) return failed;
    if (!is_constant || !value) return ort::CreateStatus::call(api, ort::INVALID_GRAPH, otherwise);
    if (OrtStatus* failed = shape_of(api, value, shape)) return failed;
    return data_of(api, value, data);
}

// Gets an output of this shape.
template <typename T>
OrtStatus* output_of(Api api, OrtKernelContext* context, const Shape& shape, T*& data) {
    OrtValue* output = nullptr;
    if (OrtStatus* failed = ort::GetOutput::call(api, context, 0, shape.sizes, shape.count, &output)) return failed;
    const T* found = nullptr;
    OrtStatus* failed = data_of(api, output, found);
    data = const_cast<T*>(found);
    return failed;
}

}  // namespace mpcompile
