// Splits one GEMM into independent work items for the thread pool: (group of token tiles) x (chunk of rows).
#pragma once
#include <stdint.h>

#include "nm_gemm_skinny.h"

namespace mpcompile {

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
    Tile tile(int64_t index) const;
    bool run_skinny(int64_t part) const;
    bool run_tiles(int64_t tile_group, int64_t part) const;

    const Kernel& kernel_;
    const Weights& weights_;
    const Activations& activations_;
    const RowPanels* row_panels_;
    uint64_t id_;
    int lanes_;
    int64_t granule_, granules_, tiles_;  // tiles begin at multiples of `granule_` tokens
    int64_t parts_;                       // chunks of rows, or groups of row panels
    int64_t tiles_per_item_;
    int64_t packed_, sums_;  // floats of a packed tile, and of the sums of a chunk
};

}  // namespace mpcompile
