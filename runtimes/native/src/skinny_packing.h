// A second packed layout of the weights, for few tokens: SIMD lanes hold output rows, so that loads of weights are
// contiguous. It is made from the streams of nm_gemm.h at the first call with few tokens.
//
//   panel    `lanes` neighbouring output rows
//   block    `width` neighbouring input channels, whose activations fit into `table_registers` registers
//   nonzero  one kept weight of each row of a panel: a vector of values, and for each row an index within the block
//   word     the indices of up to `nonzeros_per_word()` nonzeros, packed into the bits of one vector
// stream  [panels][blocks][words]: a word, then the values of its nonzeros
// counts  [panels][blocks]: the most and the least nonzeros of any row; rows with fewer than the most are padded
#pragma once
#include <stdint.h>

#include "nm_gemm.h"

namespace mpcompile {

// The permutes of an instruction set: vectors of `lanes`, looked up in at most `table_registers` registers; a lookup in
// two registers costs `second_register` operations more than in one. `lanes` 0: it has no such permutes.
struct Permutes {
    int lanes, table_registers, second_register;
};

struct NonzeroCounts {
    uint16_t most, least;
};

struct RowPanels {
    int64_t rows, columns, panels, blocks, width;
    int lanes, table_registers, bits;
    int64_t vectors;  // length of the stream
    float* stream;    // 64-byte aligned
    int64_t* starts;  // [panels]: start of each panel in the stream, in vectors
    NonzeroCounts* counts;

    int nonzeros_per_word() const { return 32 / bits; }
    int64_t packed_width() const { return int64_t(lanes) * table_registers; }
    int64_t packed_floats(const Tile& tile) const { return blocks * tile.width() * packed_width(); }
};

// Makes the layout for a kernel with these permutes; null if memory runs out.
RowPanels* make_row_panels(const Weights&, const Permutes&);
void free_row_panels(RowPanels*);

// Packs the activations of a skinny_tile into [token groups][blocks][tokens of a group][packed_width], padded with
// zeros.
void pack_skinny(const RowPanels&, const Activations&, const Tile&, float* packed);

}  // namespace mpcompile
