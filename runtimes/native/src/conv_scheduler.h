// Splits one convolution into independent work items for the thread pool: (group of tiles) x (range of chunks of rows).
//
// For each block of columns, an item packs the block of each of its tiles into the L1 cache and multiplies it at once
// into the sums of all its rows, which stay in the L2 cache. So a packed tile is never in memory, however many taps and
// channels there are, and a block of weights is read once for all tiles of the item.
#pragma once
#include <stdint.h>

#include "tile_scheduler.h"

namespace mpcompile {

class ConvScheduler {
  public:
    // `threads` that will share the items, as far as it is known: results do not depend on it.
    ConvScheduler(const Kernel& kernel, const Weights& weights, const Activations& activations, int threads);

    int64_t items() const { return groups() * parts(); }

    // Computes item `index`. Its scratch memory belongs to the thread and is kept for later items and calls. Returns
    // false if memory runs out. Different items may run in different threads.
    bool run(int64_t index) const;

  private:
    int64_t groups() const { return (tiling_.tiles + tiles_per_item_ - 1) / tiles_per_item_; }
    int64_t parts() const { return (weights_.chunks() + chunks_per_item_ - 1) / chunks_per_item_; }

    const Kernel& kernel_;
    const Weights& weights_;
    const Activations& activations_;
    Tiling tiling_;
    int64_t tiles_per_item_, chunks_per_item_;
};

}  // namespace mpcompile
