// The interface between the operator and the kernels: plain structs, shared by all builds of nm_gemm.cpp.
//
// The weights, in the order in which the kernel reads them (written by runtimes/native/packing.py):
//   block      `block` neighbouring input channels, few enough that a tile of activations stays in the L1 cache
//   row group  output rows that are computed together: two rows with their own patterns (rows_per_pattern 1), or the
//              two or four rows that share one pattern (rows_per_pattern 2, 4)
//   nonzero    one kept weight of each row of a row group
// values   [blocks][row groups][nonzeros][rows of a group]
// indices  [blocks][row groups][nonzeros][2 for rows_per_pattern 1, else 1]: the input channel within the block. Rows
//          with fewer nonzeros are padded with the index `block`: each block of a packed tile ends with a row of zeros.
// common   [blocks][row groups]: for rows_per_pattern 1, the number of leading nonzeros whose index both rows share
// order    [blocks][row groups][rows of a group]: the output row of each; `rows` for padding
//
// In the ONNX operator, `indices` is called `places`, and `rows_per_pattern` is called `share`.
//
// `order` permutes rows only within chunks of `chunk` rows, so that a chunk is a contiguous part of the output. Each
// block has its own order: sums are kept in memory between blocks, so a block may pair other rows than the one before.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "window.h"

namespace mpcompile {

struct Weights {
    const float* values;
    const uint16_t* indices;
    const uint16_t* common;
    const int32_t* order;
    const float* bias;  // [rows]
    int64_t columns, rows;
    int64_t rows_per_pattern, block, blocks, row_groups, nonzeros, chunk;

    int64_t group_rows() const { return rows_per_pattern == 4 ? 4 : 2; }
    int64_t group_indices() const { return rows_per_pattern == 1 ? 2 : 1; }
    int64_t chunks() const { return (rows + chunk - 1) / chunk; }
};

// A window over channels-first images, x[image][channel][in[0]][in[1]], padded with zeros. Column k of the weight is
// channel k % channels of tap k / channels; taps are ordered by row, then by column.
struct ConvWindow : Window {
    int64_t in[2], out[2], channels;
};

// Activations and results. Channels-last (GEMM): x[token][column], y[token][row]. Channels-first (convolution):
// y[image][row][pixel]; a token is then one pixel of one output image. Without a window, the convolution is 1x1 with
// stride 1: x[image][column][pixel].
//
// Only channels-first: `residual`, of the same layout as y, is added to the sums with their bias; the result is then
// clipped to `low` and `high`. A NaN stays NaN.
struct Activations {
    const float* x;
    float* y;
    int64_t tokens;  // of all images
    int64_t pixels;  // of one output image; 0 for channels-last
    const ConvWindow* window = nullptr;
    const float* residual = nullptr;
    float low = -__builtin_inff(), high = __builtin_inff();
};

// A tile of tokens: `vectors` vectors of `lanes` floats, of which the first `count` floats are tokens. `half`: at most
// half of the last vector are tokens, and only that half is computed.
struct Tile {
    int64_t first, count;
    int lanes, vectors;
    bool half;

    int64_t width() const { return int64_t(lanes) * vectors; }
};

struct SkinnyKernel;

// Packs and stores channels-first tiles: nm_conv.cpp.
struct ConvKernel {
    // Packs one block of a tile into [block + 1][width]; the last row is zero.
    void (*pack)(const Weights&, const Activations&, const Tile&, int64_t block, float* packed);
    // Stores `count` rows, the first being `row`, from sums[count][width].
    void (*store)(const Weights&, const Activations&, const Tile&, int64_t row, int64_t count, const float* sums);
};

struct Kernel {
    const char* name;
    const SkinnyKernel* skinny;  // for few tokens: nm_gemm_skinny.h
    const ConvKernel* conv;
    int lanes;      // floats of the widest vector
    int widest[5];  // most vectors of a tile, by rows_per_pattern
    // Packs a channels-last tile of activations into [blocks][block + 1][width]; the last row of each block is zero.
    void (*pack)(const Weights&, const Activations&, const Tile&, float* packed);
    // Computes one chunk of rows for a packed channels-last tile and stores the outputs; `sums` has room for
    // [chunk + 1][width].
    void (*compute)(const Weights&, const Activations&, const Tile&, int64_t chunk, const float* packed, float* sums);
    // Adds the products of one packed block to the sums of a chunk, [chunk + 1][width]; block 0 overwrites them.
    void (*multiply)(const Weights&, const Tile&, int64_t chunk, int64_t block, const float* packed, float* sums);
};

inline int64_t packed_floats(const Weights& w, const Tile& t) { return w.blocks * (w.block + 1) * t.width(); }
inline int64_t sums_floats(const Weights& w, const Tile& t) { return (w.chunk + 1) * t.width(); }

// The kernels that this processor can run, fastest first; returns their number, at least 1.
int supported_kernels(const Kernel* (&found)[4]);

}  // namespace mpcompile
