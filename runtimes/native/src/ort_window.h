// Attributes of a window, for the operators that move one over an image.
#pragma once
#include "ort_values.h"
#include "window.h"

namespace mpcompile {

// Gets an attribute of `count` integers of at least `least`.
inline OrtStatus* integers_of(Api api, const OrtKernelInfo* info, const char* name, size_t count, int64_t least,
                              int64_t* found) {
    size_t size = count;
    if (OrtStatus* failed = ort::GetAttributeInts::call(api, info, name, found, &size)) return failed;
    bool right = size == count;
    for (size_t i = 0; right && i < count; i++) right = found[i] >= least && found[i] < INT32_MAX / 2;
    return right ? nullptr
                 : refuse(api,
                          "mpcompile: strides, dilations and kernel_shape must be two positive numbers, and pads four "
                          "that are not negative");
}

// Gets strides, dilations and pads; the size of the window is left to be set.
inline OrtStatus* window_of(Api api, const OrtKernelInfo* info, Window& window) {
    int64_t pads[4];
    if (OrtStatus* failed = integers_of(api, info, "strides", 2, 1, window.stride)) return failed;
    if (OrtStatus* failed = integers_of(api, info, "dilations", 2, 1, window.dilation)) return failed;
    if (OrtStatus* failed = integers_of(api, info, "pads", 4, 0, pads)) return failed;
    for (int axis = 0; axis < 2; axis++) {
        window.before[axis] = pads[axis];
        window.after[axis] = pads[2 + axis];
    }
    return nullptr;
}

}  // namespace mpcompile
