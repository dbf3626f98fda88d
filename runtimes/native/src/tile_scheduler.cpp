#include "tile_scheduler.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>

namespace mpcompile {
namespace {

// The scratch memory of a thread: the packed tiles of one tile group, and the sums of one chunk. Neighbouring items
// share their tile group, so tiles are packed again only for another group or another call.
struct Scratch {
    float* floats = nullptr;
    int64_t size = 0;
    uint64_t call = 0;
    int64_t tile_group = -1;

    ~Scratch() { free(floats); }

    bool reserve(int64_t wanted) {
        if (wanted <= size) return true;
        free(floats);
        floats = nullptr;
        size = call = 0;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, size_t(wanted) * sizeof(float))) return false;
        floats = static_cast<float*>(fresh);
        size = wanted;
        return true;
    }

    // Whether the tile group must be packed first. Records it as packed.
    bool needs_packing(uint64_t id, int64_t wanted) {
        const bool fresh = call != id || tile_group != wanted;
        call = id;
        tile_group = wanted;
        return fresh;
    }
};

// Tiles are grouped, so that a chunk of weights is read from memory once for all tiles of the group. A group is bounded
// by its packed activations, which must stay in the L2 cache, and by the number of items that are left for threads.
constexpr int64_t TILE_GROUP_FLOATS = 768 * 1024 / sizeof(float), LEAST_ITEMS = 16;
constexpr int64_t PART_PANELS = 8;  // 128 rows with AVX-512, as in a chunk: enough parts for a few threads

thread_local Scratch scratch;
std::atomic<uint64_t> last_id{0};  // identifies calls

int lanes_for(const Kernel& kernel, int64_t tokens) {
    const int wanted = tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16;
    return wanted < kernel.lanes ? wanted : kernel.lanes;
}

// The number of tokens of the widest tile.
int64_t widest(const Kernel& kernel, const Weights& weights) {
    return int64_t(kernel.widest[weights.rows_per_pattern]) * kernel.lanes;
}

}  // namespace

TileScheduler::TileScheduler(const Kernel& kernel, const Weights& weights, const Activations& activations,
                             const RowPanels* row_panels)
    : kernel_(kernel),
      weights_(weights),
      activations_(activations),
      row_panels_(row_panels),
      id_(++last_id),
      lanes_(lanes_for(kernel, activations.tokens)),
      granule_(lanes_ == 16 ? 8 : lanes_),
      granules_((activations.tokens + granule_ - 1) / granule_),
      tiles_((granules_ * granule_ + widest(kernel, weights) - 1) / widest(kernel, weights)),
      parts_(weights.chunks()),
      tiles_per_item_(1) {
    if (row_panels) {
        tiles_ = 1;
        parts_ = (row_panels->panels + PART_PANELS - 1) / PART_PANELS;
        packed_ = row_panels->packed_floats(skinny_tile(*kernel.skinny, activations.tokens));
        return;
    }
    const Tile last = tile(tiles_ - 1);  // the widest of all
    packed_ = packed_floats(weights, last);
    sums_ = sums_floats(weights, last);
    tiles_per_item_ = std::max<int64_t>(std::min(TILE_GROUP_FLOATS / packed_, tiles_), 1);
    while (tiles_per_item_ > 1 && items() < LEAST_ITEMS) tiles_per_item_--;
}

Tile TileScheduler::tile(int64_t index) const {
    const int64_t begin = granules_ * index / tiles_ * granule_, end = granules_ * (index + 1) / tiles_ * granule_;
    const int64_t left = activations_.tokens - begin, width = end - begin;
    const int vectors = int((width + lanes_ - 1) / lanes_);
    return {begin, left < width ? left : width, lanes_, vectors, width < int64_t(vectors) * lanes_};
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
        const Tile mine = tile(at);
        float* packed = scratch.floats + (at - first) * packed_;
        if (fresh) kernel_.pack(weights_, activations_, mine, packed);
        kernel_.compute(weights_, activations_, mine, part, packed, scratch.floats + tiles_per_item_ * packed_);
    }
    return true;
}

}  // namespace mpcompile
