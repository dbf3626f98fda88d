// How one multiplication is divided: tiles of tokens times chunks of rows, each item computed by whoever comes.
#pragma once
#include <stdint.h>

#include "kernel.h"

namespace mpcompile {

class Work {
  public:
    Work(const Kernel& kernel, const Weights& weights, const Activations& activations);

    int64_t items() const { return tiles_ * weights_.chunks(); }

    // Computes item `index` in memory of this thread, which is kept for the next item and the next call. False where
    // there is no memory. Safe from several threads, for different items.
    bool run(int64_t index) const;

  private:
    Tile tile(int64_t index) const;

    const Kernel& kernel_;
    const Weights& weights_;
    const Activations& activations_;
    uint64_t id_;
    int lanes_;
    int64_t step_, steps_, tiles_;  // tiles begin at multiples of `step_` tokens
};

}  // namespace mpcompile
