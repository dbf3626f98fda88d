// Convolutions as int8 products: x is [images][height][width][channels], and each output position is a token whose
// columns are the channels of the first tap, those of the second tap, and so on. Windows are copied into a tile for a
// group of tokens, which stays in the cache; a convolution of one tap and stride 1 reads x itself.
//
// A block of 16 columns (int8_gemm.h) may then hold channels of two taps. Where this makes a block keep too many
// weights, the channels of each tap are padded to a multiple of 16.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "window.h"

namespace mpcompile {

struct ConvWeight {
    std::vector<int8_t> values;  // [rows][taps][tap_columns]
    int64_t tap_columns;         // at least the number of channels; what is beyond is 0
};

// From the weight as ONNX has it, [rows][channels][taps].
ConvWeight by_taps(const int8_t* weight, int64_t rows, int64_t channels, int64_t taps);

struct ConvInput {
    const uint8_t* x;
    int64_t height, width, channels;
    uint8_t zero;  // of padding
    int64_t out_height, out_width;
};

// Copies the windows of the tokens [first, last) to `to`, `stride` bytes apart. Padded columns are not written.
void copy_windows(const Window& window, const ConvInput& input, int64_t tap_columns, int64_t first, int64_t last,
                  uint8_t* to, size_t stride);

}  // namespace mpcompile
