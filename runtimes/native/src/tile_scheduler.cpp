#include "tile_scheduler.h"

#include <algorithm>
#include <atomic>

#include "scratch.h"

namespace mpcompile {
namespace {

// Tiles are grouped, so that a chunk of weights is read from memory once for all tiles of the group. A group is bounded
// by its packed activations, which must stay in the L2 cache, and by the number of items that are left for threads.
constexpr int64_t TILE_GROUP_FLOATS = 768 * 1024 / sizeof(float), LEAST_ITEMS = 16;
constexpr int64_t PART_PANELS = 8;  // 128 rows with AVX-512, as in a chunk: enough parts for a few threads

thread_local Scratch scratch;
std::atomic<uint64_t> last_id{0};  // identifies calls

}  // namespace

Tiling::Tiling(const Kernel& kernel, const Weights& weights, int64_t tokens) : tokens(tokens) {
    const int wanted = tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16;
    lanes = wanted < kernel.lanes ? wanted : kernel.lanes;
    granule = lanes == 16 ? 8 : lanes;
    granules = (tokens + granule - 1) / granule;
    const int64_t widest = int64_t(kernel.widest[weights.rows_per_pattern]) * kernel.lanes;
    tiles = (granules * granule + widest - 1) / widest;
}

Tile Tiling::tile(int64_t index) const {
    const int64_t begin = granules * index / tiles * granule, end = granules * (index + 1) / tiles * granule;
    const int64_t left = tokens - begin, width = end - begin;
    const int vectors = int((width + lanes - 1) / lanes);
    return {begin, left < width ? left : width, lanes, vectors, width < int64_t(vectors) * lanes};
}

TileScheduler::TileScheduler(const Kernel& kernel, const Weights& weights, const Activations& activations,
                             const RowPanels* row_panels)
    : kernel_(kernel),
      weights_(weights),
      activations_(activations),
      row_panels_(row_panels),
      id_(++last_id),
      tiling_(kernel, weights, activations.tokens),
      tiles_(tiling_.tiles),
      parts_(weights.chunks()),
      tiles_per_item_(1) {
    if (row_panels) {
        tiles_ = 1;
        parts_ = (row_panels->panels + PART_PANELS - 1) / PART_PANELS;
        packed_ = row_panels->packed_floats(skinny_tile(*kernel.skinny, activations.tokens));
        return;
    }
    const Tile last = tiling_.tile(tiles_ - 1);  // the widest of all
    packed_ = packed_floats(weights, last);
    sums_ = sums_floats(weights, last);
    tiles_per_item_ = std::max<int64_t>(std::min(TILE_GROUP_FLOATS / packed_, tiles_), 1);
    while (tiles_per_item_ > 1 && items() < LEAST_ITEMS) tiles_per_item_--;
}

bool TileScheduler::run(int64_t index) const {
    return row_panels_ ? run_skinny(index) : run_tiles(index / parts_, index % parts_);
}

bool TileScheduler::run_skinny(int64_t part) const {
    const Tile all = skinny_tile(*kernel_.skinny, activations_.tokens);
    if (!scratch.reserve(packed_)) return false;
    if (scratch.needs_packing(id_, 0)) pack_skinny(*row_panels_, activations_, all, scratch.floats);
    const int64_t begin = part * PART_PANELS, end = std::min(begin + PART_PANELS, row_panels_->panels);
    kernel_.skinny->compute(*row_panels_, weights_.bias, activations_, all, begin, end, scratch.floats);
    return true;
}

bool TileScheduler::run_tiles(int64_t tile_group, int64_t part) const {
    const int64_t first = tile_group * tiles_per_item_, end = std::min(first + tiles_per_item_, tiles_);
    if (!scratch.reserve(tiles_per_item_ * packed_ + sums_)) return false;
    const bool fresh = scratch.needs_packing(id_, tile_group);
    for (int64_t at = first; at < end; at++) {
        const Tile mine = tiling_.tile(at);
        float* packed = scratch.floats + (at - first) * packed_;
        if (fresh) kernel_.pack(weights_, activations_, mine, packed);
        kernel_.compute(weights_, activations_, mine, part, packed, scratch.floats + tiles_per_item_ * packed_);
    }
    return true;
}

}  // namespace mpcompile
