// What the operator asks of a kernel: plain structs, shared by every instruction set's build of nm_gemm.cpp.
//
// The weights, in the order in which the kernel reads them (runtimes/native/packing.py writes them):
//   a block   `block` neighbouring input channels, so that a tile of activations stays in the L1 cache
//   a unit    output rows that are computed together: two rows of their own patterns (share 1), or the two or
//             four rows that share one (share 2, 4)
//   a step    one kept weight of every row of a unit
// values  [blocks][units][steps][rows of a unit]
// places  [blocks][units][steps][2 for share 1, else 1]: input channel within the block; `block` itself is the row of
//         zeros that every block of a tile ends with, for steps that a row has no weight for
// common  [blocks][units]: for share 1, in how many of its first steps both rows read the same input channel
// order   [blocks][units][rows of a unit]: which output row each is; `rows` where there is none
//
// `order` moves rows only within chunks of `chunk` rows, so that a chunk is a contiguous piece of the output. Each
// block has its own order: sums lie in memory between blocks, so other rows may be computed together in each.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mpcompile {

struct Weights {
    const float* values;
    const uint16_t* places;
    const uint16_t* common;
    const int32_t* order;
    const float* bias;  // [rows]
    int64_t columns, rows;
    int64_t share, block, blocks, units, steps, chunk;

    int64_t unit_rows() const { return share == 4 ? 4 : 2; }
    int64_t unit_places() const { return share == 1 ? 2 : 1; }
    int64_t chunks() const { return (rows + chunk - 1) / chunk; }
};

// Activations and results. Tokens outside: x[token][column], y[token][row]. Channels outside, as a 1x1 convolution
// has them: x[image][column][pixel], y[image][row][pixel], where a token is a pixel of an image.
struct Activations {
    const float* x;
    float* y;
    int64_t tokens;  // of all images
    int64_t pixels;  // of one image; 0 where tokens are outside
};

// A tile of tokens: `vectors` vectors of `lanes` floats, of which the first `count` are tokens. `half`: no more than
// half of the last vector are, and only that half is computed.
struct Tile {
    int64_t first, count;
    int lanes, vectors;
    bool half;

    int64_t width() const { return int64_t(lanes) * vectors; }
};

struct Few;

struct Kernel {
    const char* name;
    const Few* few;  // for few tokens: nm_gemm_skinny.h
    int lanes;       // floats in the widest vector
    int widest[5];   // most vectors of a tile, by share
    // Turns a tile of activations into [blocks][block + 1][width], the last row of each block zero.
    void (*pack)(const Weights&, const Activations&, const Tile&, float* packed);
    // Computes one chunk of rows for a packed tile, and writes it out; `sums` holds [chunk + 1][width].
    void (*compute)(const Weights&, const Activations&, const Tile&, int64_t chunk, const float* packed, float* sums);
};

inline int64_t packed_floats(const Weights& w, const Tile& t) { return w.blocks * (w.block + 1) * t.width(); }
inline int64_t sums_floats(const Weights& w, const Tile& t) { return (w.chunk + 1) * t.width(); }

// The builds that this processor can run, best first; at least one.
int supported_kernels(const Kernel* (&found)[4]);

}  // namespace mpcompile
