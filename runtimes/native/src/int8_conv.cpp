#include "int8_conv.h"

#include <string.h>

#include "int8_packing.h"

namespace mpcompile {
namespace {

constexpr int64_t BLOCK = 16;

std::vector<int8_t> taps_apart(const int8_t* weight, int64_t rows, int64_t channels, int64_t taps,
                               int64_t tap_columns) {
    std::vector<int8_t> values(size_t(rows * taps * tap_columns));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t tap = 0; tap < taps; tap++)
                values[size_t((row * taps + tap) * tap_columns + c)] = weight[(row * channels + c) * taps + tap];
    return values;
}

// A call of memcpy takes longer than most of these copies.
inline void copy(uint8_t* to, const uint8_t* from, int64_t count) {
    if (count < BLOCK) {
        memcpy(to, from, size_t(count));
        return;
    }
    for (int64_t i = 0; i + BLOCK < count; i += BLOCK) memcpy(to + i, from + i, BLOCK);
    memcpy(to + count - BLOCK, from + count - BLOCK, BLOCK);
}

}  // namespace

ConvWeight by_taps(const int8_t* weight, int64_t rows, int64_t channels, int64_t taps) {
    ConvWeight plain{taps_apart(weight, rows, channels, taps, channels), channels};
    if (taps == 1 || channels % BLOCK == 0) return plain;
    const int kept = most_kept(plain.values.data(), rows, taps * channels);
    if (kept == 4) return plain;
    const int64_t padded = (channels + BLOCK - 1) / BLOCK * BLOCK;
    ConvWeight apart{taps_apart(weight, rows, channels, taps, padded), padded};
    return most_kept(apart.values.data(), rows, taps * padded) < kept ? apart : plain;
}

void copy_windows(const Window& window, const ConvInput& input, int64_t tap_columns, int64_t first, int64_t last,
                  uint8_t* to, size_t stride) {
    const int64_t channels = input.channels, row_taps = window.kernel[1], step = window.dilation[1];
    const int64_t outputs = input.out_height * input.out_width;
    // The taps of one row of the window are then neighbours in x and in the tile.
    const bool contiguous = step == 1 && tap_columns == channels;
    for (int64_t token = first; token < last; token++, to += stride) {
        const int64_t image = token / outputs, y = token % outputs / input.out_width, x = token % input.out_width;
        const int64_t top = y * window.stride[0] - window.before[0], left = x * window.stride[1] - window.before[1];
        const bool inside = left >= 0 && left + (row_taps - 1) * step < input.width;
        uint8_t* target = to;
        for (int64_t ky = 0; ky < window.kernel[0]; ky++, target += row_taps * tap_columns) {
            const int64_t row = top + ky * window.dilation[0];
            if (row < 0 || row >= input.height) {
                memset(target, input.zero, size_t(row_taps * tap_columns));
                continue;
            }
            const uint8_t* from = input.x + (image * input.height + row) * input.width * channels;
            if (contiguous && inside) {
                copy(target, from + left * channels, row_taps * channels);
                continue;
            }
            for (int64_t kx = 0; kx < row_taps; kx++) {
                const int64_t column = left + kx * step;
                if (column < 0 || column >= input.width)
                    memset(target + kx * tap_columns, input.zero, size_t(channels));
                else
                    copy(target + kx * tap_columns, from + column * channels, channels);
            }
        }
    }
}

}  // namespace mpcompile
