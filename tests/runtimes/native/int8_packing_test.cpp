// Prints how many rows share a pattern in the packed form of some weights, on a made-up kernel: one number a line.
#include <cstdio>

#include "int8_packing.h"

using namespace mpcompile;

namespace {

constexpr int64_t ROWS = 64, COLUMNS = 64;

Int8Layout layout(int kept, int shared) { return {shared ? 1 : 0, 1, kept == 8 ? 16 : kept == 4 ? 32 : 8, 64}; }

const Int8Kernel KERNEL = {8, false, layout, nullptr, false, nullptr};

// Every `sharing` neighbouring rows keep the same 2 of 4. Every `zeros`-th kept weight is zero; 0 means none.
int shared(int64_t sharing, int zeros) {
    std::vector<int8_t> weight(ROWS * COLUMNS, 0);
    uint32_t random = 1;
    int count = 0;
    for (int64_t row = 0; row < ROWS; row += sharing)
        for (int64_t column = 0; column < COLUMNS; column += 4) {
            random = random * 1664525u + 1013904223u;
            const int64_t first = random >> 30, second = (first + 1 + (random >> 16) % 3) % 4;
            for (int64_t r = row; r < row + sharing; r++)
                for (const int64_t place : {first, second})
                    weight[size_t(r * COLUMNS + column + place)] = zeros && ++count % zeros == 0 ? 0 : 1;
        }
    const std::vector<float> ones(ROWS, 1.0f);
    return pack_int8(KERNEL, KERNEL, weight, ROWS, COLUMNS, ones.data(), ones.data(), 1, 0)->weights.shared;
}

}  // namespace

int main() {
    for (const int64_t sharing : {1, 2, 4})
        for (const int zeros : {0, 61, 9}) std::printf("%d\n", shared(sharing, zeros));
}
