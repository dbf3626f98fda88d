// The interface between the int8 operators and the int8 kernels: plain structs, shared by all builds of int8_gemm.cpp.
//
// y = (sum over columns of (x - x_zero) * weight) * scale + bias, where x is u8, the weight is s8, and the sum is an
// exact 32-bit integer. The file holds the weight as a plain matrix; `pack` (int8_packing.cpp) brings it into the order
// in which a kernel reads it, once for each session.
//
// SIMD lanes hold output rows, four bytes each: a vector of weights has four weights of each of `lanes` rows. A block
// of 16 columns of one token is broadcast to all lanes, and a shuffle selects for each row the activations of its four
// kept columns. Which columns a row keeps is therefore free, for any N:M that keeps at most 8 or at most 4 of 16. Rows
// with the same pattern (`shared` of them, in as many vectors) use the same shuffled vector.
//
// The packed weights, in steps of 8 products for each row and split:
//   kept 8    a step is one block of 16 columns: four kept columns, then the other four
//   kept 4    a step is two blocks of 16 columns: four kept columns of each
//   kept 16   dense: a step is 8 columns, four and four, without controls
//   stream [panels][steps][groups]{control 0, control 1}{shared vectors}{shared vectors}
// A panel has `groups` groups of rows; in each, row l * shared + r is in lane l of vector r. The two controls of a step
// are absent if the weights are dense.
//
// With `splits` above 1, the 128-bit parts of a vector hold neighbouring blocks rather than copies of one block, and
// each part sums over its own blocks; the parts are added at the end. A step then has `splits` times as many columns,
// and a vector `lanes / splits` rows. Activations are then loaded as they are, without a broadcast, which on Zen 4
// takes as long as a shuffle.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mpcompile {

constexpr int64_t CHUNK = 64;  // rows whose sums are kept before they are scaled and stored; a multiple of every panel

enum class Activation { NONE, RELU, GELU, GELU_TANH };

struct Int8Weights {
    const uint8_t* stream;    // null for the baseline kernel, which reads `matrix`
    const int8_t* matrix;     // [rows][columns]
    const int32_t* start;     // [padded rows] (x_offset - x_zero) * (sum of the row's weights)
    const float* scale;       // [padded rows] scale of the activations times that of the row
    const float* bias;        // [padded rows]
    const uint8_t* position;  // [padded rows] the place of a row in the stream's order of its chunk; null if in order
    int64_t rows, columns;
    int64_t steps, step_columns;
    int kept, shared;
    bool wide;    // each 16-bit lane holds the sum of two products rather than four: twice the work, more range
    bool narrow;  // the layout for few columns

    int64_t chunks() const { return (rows + CHUNK - 1) / CHUNK; }
};

// A number is (integer - zero) * scale.
struct U8Scale {
    float scale = 1, zero = 0;
};

struct Int8Call {
    const uint8_t* x;       // [tokens][columns]
    const float* residual;  // [tokens][rows], added to the result; or null
    float* floats;          // [tokens][rows]; or null
    uint8_t* bytes;         // [tokens][rows]: the result, quantised; or null
    int64_t tokens;
    Activation activation;
    float inverse_scale, zero;  // of `bytes`
    // Only kernels with `adds_bytes` read the following. They come after the activation.
    float low = 0, high = 255;       // limits of `bytes`
    const uint8_t* added = nullptr;  // [tokens][rows], added to the result after that is rounded like `branch`; or null
    U8Scale branch, added_scale;
};

struct Int8Layout {
    int groups, splits;
    int64_t step_columns;
    int64_t most_tokens;  // of a call of `compute`: a multiple of the tokens of a tile
};

struct Int8Kernel {
    int lanes;       // 32-bit lanes of a vector; 0 for the baseline kernel
    bool saturates;  // sums of products pass through 16-bit lanes
    Int8Layout (*layout)(int kept, int shared);
    // Computes the tokens [first, last) of chunks [begin, end). `x` is the row of token `first`, `stride` bytes from
    // one token to the next, with at least steps * step_columns readable bytes in each.
    void (*compute)(const Int8Weights&, const Int8Call&, const uint8_t* x, size_t stride, int64_t first, int64_t last,
                    int64_t begin, int64_t end);
    bool adds_bytes;  // `compute` applies the limits of Int8Call and adds its 8-bit tensor
    // A layout without splits for weights of few columns whose rows share no patterns; null if there is none.
    Int8Layout (*narrow_layout)(int kept);
    int x_offset = 0;  // is subtracted from every activation before it is multiplied
};

}  // namespace mpcompile
