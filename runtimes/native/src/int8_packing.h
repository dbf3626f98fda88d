// Brings an int8 weight into the order in which a kernel reads it, and keeps everything that belongs to it.
#pragma once
#include <memory>
#include <vector>

#include "int8_gemm.h"

namespace mpcompile {

struct CacheLine {
    alignas(64) uint8_t bytes[64];
};

struct PackedInt8 {
    Int8Weights weights;         // points into the fields below
    const Int8Kernel* kernel;    // that reads them
    std::vector<int8_t> matrix;  // only for the baseline kernel
    std::vector<CacheLine> stream;
    std::vector<int32_t> start;
    std::vector<float> scale, bias;
    std::vector<uint8_t> position;
};

// The most weights that a row of [rows][columns] keeps in a block of 16 columns: 4, 8, or 16 for more.
int most_kept(const int8_t* values, int64_t rows, int64_t columns);

// `values` is [rows][columns]; `scale` and `bias` have one value for each row; `x_scale` and `x_zero` are those of the
// activations. Packs for `widest`, or for `baseline` if 16-bit lanes of `widest` could saturate with these weights.
// Throws std::bad_alloc.
std::unique_ptr<PackedInt8> pack_int8(const Int8Kernel& widest, const Int8Kernel& baseline, std::vector<int8_t> values,
                                      int64_t rows, int64_t columns, const float* scale, const float* bias,
                                      float x_scale, int32_t x_zero);

}  // namespace mpcompile
