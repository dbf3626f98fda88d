// The window that a convolution or a pooling moves over images.
#pragma once
#include <stdint.h>

namespace mpcompile {

// Pairs are vertical, horizontal.
struct Window {
    int64_t kernel[2], stride[2], dilation[2];
    int64_t before[2], after[2];  // padding: above and to the left, below and to the right

    int64_t taps() const { return kernel[0] * kernel[1]; }
    // The number of output positions along one axis; 0 if the window does not fit.
    int64_t outputs(int axis, int64_t size) const {
        const int64_t room = size + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
        return room < 0 ? 0 : room / stride[axis] + 1;
    }
    // Whether each output position reads the one input position of the same index.
    bool pointwise() const {
        return taps() == 1 && stride[0] == 1 && stride[1] == 1 && !before[0] && !before[1] && !after[0] && !after[1];
    }
};

}  // namespace mpcompile
