// Splits one GEMM into independent work items for the thread pool: (group of token tiles) x (chunk of rows).
#pragma once
#include <stdint.h>

#include "nm_gemm_skinny.h"

namespace mpcompile {

// The division of tokens into tiles of nearly equal width.
struct Tiling {
    int64_t tokens, granule, granules, tiles;  // tiles begin at multiples of `granule` tokens
    int lanes;

    Tiling(const Kernel& kernel, const Weights& weights, int64_t tokens);
    Tile tile(int64_t index) const;  // the last is the widest
};

class TileScheduler {
  public:
    // `row_panels`: the layout for few tokens, made for this kernel; null to use the other layout.
    TileScheduler(const Kernel& kernel, const Weights& weights, const Activations& activations,
                  const RowPanels* row_panels);

    int64_t items() const { return (tiles_ + tiles_per_item_ - 1) / tiles_per_item_ * parts_; }

    // Computes item `index`. Its scratch memory belongs to the thread and is kept for later items and calls. Returns
    // false if memory runs out. Different items may run in different threads.
    bool run(int64_t index) const;

  private:
    bool run_skinny(int64_t part) const;
    bool run_tiles(int64_t tile_group, int64_t part) const;

    const Kernel& kernel_;
    const Weights& weights_;
    const Activations& activations_;
    const RowPanels* row_panels_;
    uint64_t id_;
    Tiling tiling_;
    int64_t tiles_;
    int64_t parts_;  // chunks of rows, or groups of row panels
    int64_t tiles_per_item_;
    int64_t packed_, sums_;  // floats of a packed tile, and of the sums of a chunk
};

}  // namespace mpcompile
