// How one multiplication is divided: panels of tiles of tokens times parts of the rows, each item computed by whoever
// comes.
#pragma once
#include <stdint.h>

#include "nm_gemm_skinny.h"

namespace mpcompile {

class Work {
  public:
    // `strips`: the weights for few tokens, or null; they must be for this kernel.
    Work(const Kernel& kernel, const Weights& weights, const Activations& activations, const Strips* strips);

    int64_t items() const { return (tiles_ + panel_ - 1) / panel_ * parts_; }

    // Computes item `index` in memory of this thread, which is kept for the next item and the next call. False where
    // there is no memory. Safe from several threads, for different items.
    bool run(int64_t index) const;

  private:
    Tile tile(int64_t index) const;
    bool run_strips(int64_t part) const;
    bool run_panel(int64_t panel, int64_t part) const;

    const Kernel& kernel_;
    const Weights& weights_;
    const Activations& activations_;
    const Strips* strips_;
    uint64_t id_;
    int lanes_;
    int64_t step_, steps_, tiles_;  // tiles begin at multiples of `step_` tokens
    int64_t parts_;                 // of the rows
    int64_t panel_;                 // tiles of an item
    int64_t packed_, sums_;         // floats of a packed tile, and of the sums of a chunk
};

}  // namespace mpcompile
