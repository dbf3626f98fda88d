// The weights a second time, for few tokens: output rows lie along the vectors, so that what is read is whole vectors.
// Made from the streams of nm_gemm.h when a call of few tokens first comes.
//
//   a strip   `lanes` neighbouring output rows
//   a block   `width` neighbouring input channels, whose activations fit `tables` registers
//   a step    one kept weight of every row of a strip: a vector of values, and for each row a place within the block
//   a word    the places of up to `steps_of_word()` steps, packed into the bits of one vector
// stream  [strips][blocks][words]: a word, then the values of its steps
// heads   [strips][blocks]: how many steps there are, and in how many of the first ones every row has a weight
#pragma once
#include <stdint.h>

#include "nm_gemm.h"

namespace mpcompile {

// How an instruction set takes activations from registers: by vectors of `lanes`, of `tables` registers at most, where
// two cost `second_table` operations more than one. No lanes: not at all.
struct Permutes {
    int lanes, tables, second_table;
};

struct Head {
    uint16_t steps, full;
};

struct Strips {
    int64_t rows, columns, strips, blocks, width;
    int lanes, tables, bits;
    int64_t vectors;  // of the stream
    float* stream;    // 64-byte aligned
    int64_t* starts;  // [strips]: in vectors
    Head* heads;

    int steps_of_word() const { return 32 / bits; }
    int64_t packed_width() const { return int64_t(lanes) * tables; }
    int64_t packed_floats(const Tile& tile) const { return blocks * tile.width() * packed_width(); }
};

// The layout for a kernel with these permutes, or null where there is no memory.
Strips* make_strips(const Weights&, const Permutes&);
void free_strips(Strips*);

// Turns all activations, as few_tile has them, into [groups][blocks][tokens of a group][packed_width]; zeros where
// there is no token or channel.
void pack_strips(const Strips&, const Activations&, const Tile&, float* packed);

}  // namespace mpcompile
