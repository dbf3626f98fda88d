#include "conv_scheduler.h"

#include <algorithm>

#include "scratch.h"

namespace mpcompile {
namespace {

// The sums of an item stay in the L2 cache, beside a block of weights.
constexpr int64_t MOST_SUMS = 384 * 1024 / sizeof(float);
constexpr int64_t ITEMS_PER_THREAD = 2;
// Rows of one tile that are stored before those of the next tile: a row of the result then grows by one tile after the
// other, while the processor follows only that many rows in memory.
constexpr int64_t STORED_ROWS = 16;

thread_local Scratch scratch;

}  // namespace

ConvScheduler::ConvScheduler(const Kernel& kernel, const Weights& weights, const Activations& activations, int threads)
    : kernel_(kernel),
      weights_(weights),
      activations_(activations),
      tiling_(kernel, weights, activations.tokens),
      tiles_per_item_(1),
      chunks_per_item_(1) {
    const int64_t chunks = weights.chunks(), tiles = tiling_.tiles;
    const int64_t most = std::max<int64_t>(MOST_SUMS / (weights.chunk * tiling_.tile(tiles - 1).width()), 1);
    chunks_per_item_ = std::min(most, chunks);
    tiles_per_item_ = std::min(most / chunks_per_item_, tiles);
    if (threads < 2) return;
    // More tiles are packed again if rows are divided than if tiles are, so tiles are divided first.
    const int64_t wanted = threads * ITEMS_PER_THREAD;
    while (tiles_per_item_ > 1 && items() < wanted) tiles_per_item_--;
    while (chunks_per_item_ > 1 && items() < wanted) chunks_per_item_--;
}

bool ConvScheduler::run(int64_t index) const {
    const Weights& w = weights_;
    const int64_t first = index / parts() * tiles_per_item_, end = std::min(first + tiles_per_item_, tiling_.tiles);
    const int64_t begin = index % parts() * chunks_per_item_, beyond = std::min(begin + chunks_per_item_, w.chunks());
    const int64_t rows = std::min((beyond - begin) * w.chunk, w.rows - begin * w.chunk);
    const int64_t width = tiling_.tile(tiling_.tiles - 1).width(), block_floats = (w.block + 1) * width;
    const int64_t tile_sums = ((beyond - begin) * w.chunk + 1) * width;
    if (!scratch.reserve(block_floats + (end - first) * tile_sums)) return false;
    float* packed = scratch.floats + (end - first) * tile_sums;
    for (int64_t block = 0; block < w.blocks; block++)
        for (int64_t at = first; at < end; at++) {
            const Tile tile = tiling_.tile(at);
            kernel_.conv->pack(w, activations_, tile, block, packed);
            for (int64_t chunk = begin; chunk < beyond; chunk++)
                kernel_.multiply(w, tile, chunk, block, packed,
                                 scratch.floats + (at - first) * tile_sums + (chunk - begin) * w.chunk * tile.width());
        }
    for (int64_t row = 0; row < rows; row += STORED_ROWS)
        for (int64_t at = first; at < end; at++) {
            const Tile tile = tiling_.tile(at);
            kernel_.conv->store(w, activations_, tile, begin * w.chunk + row, std::min(STORED_ROWS, rows - row),
                                scratch.floats + (at - first) * tile_sums + row * tile.width());
        }
    return true;
}

}  // namespace mpcompile
