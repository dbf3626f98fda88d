#include "tile_scheduler.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>

namespace mpcompile {
namespace {

// The memory of a thread: the packed tiles of a panel, and the sums of a chunk. Neighbouring items share their panel,
// so it is packed again only where the panel or the call is another one.
struct Scratch {
    float* floats = nullptr;
    int64_t size = 0;
    uint64_t work = 0;
    int64_t panel = -1;

    ~Scratch() { free(floats); }

    bool reserve(int64_t wanted) {
        if (wanted <= size) return true;
        free(floats);
        floats = nullptr;
        size = work = 0;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, size_t(wanted) * sizeof(float))) return false;
        floats = static_cast<float*>(fresh);
        size = wanted;
        return true;
    }

    // Whether the panel has to be packed, which it is taken to be from here on.
    bool turn_to(uint64_t call, int64_t wanted) {
        const bool fresh = work != call || panel != wanted;
        work = call;
        panel = wanted;
        return fresh;
    }
};

// Tiles are taken together, so that a chunk of weights is read from memory once for all of them, as long as their
// packed activations stay in the L2 cache and so many items are left for threads.
constexpr int64_t PANEL_FLOATS = 768 * 1024 / sizeof(float), PANEL_ITEMS = 16;
constexpr int64_t PART_STRIPS = 8;  // 128 rows of AVX-512, as a chunk has: enough parts for a few threads

thread_local Scratch scratch;
std::atomic<uint64_t> last_id{0};  // tells calls apart, nothing else

int lanes_for(const Kernel& kernel, int64_t tokens) {
    const int wanted = tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16;
    return wanted < kernel.lanes ? wanted : kernel.lanes;
}

// Tokens of the widest tile.
int64_t widest(const Kernel& kernel, const Weights& weights) {
    return int64_t(kernel.widest[weights.share]) * kernel.lanes;
}

}  // namespace

Work::Work(const Kernel& kernel, const Weights& weights, const Activations& activations, const Strips* strips)
    : kernel_(kernel),
      weights_(weights),
      activations_(activations),
      strips_(strips),
      id_(++last_id),
      lanes_(lanes_for(kernel, activations.tokens)),
      step_(lanes_ == 16 ? 8 : lanes_),
      steps_((activations.tokens + step_ - 1) / step_),
      tiles_((steps_ * step_ + widest(kernel, weights) - 1) / widest(kernel, weights)),
      parts_(weights.chunks()),
      panel_(1) {
    if (strips) {
        tiles_ = 1;
        parts_ = (strips->strips + PART_STRIPS - 1) / PART_STRIPS;
        packed_ = strips->packed_floats(few_tile(activations.tokens));
        return;
    }
    const Tile last = tile(tiles_ - 1);  // none is wider
    packed_ = packed_floats(weights, last);
    sums_ = sums_floats(weights, last);
    panel_ = std::max<int64_t>(std::min(PANEL_FLOATS / packed_, tiles_), 1);
    while (panel_ > 1 && items() < PANEL_ITEMS) panel_--;
}

Tile Work::tile(int64_t index) const {
    const int64_t begin = steps_ * index / tiles_ * step_, end = steps_ * (index + 1) / tiles_ * step_;
    const int64_t left = activations_.tokens - begin, width = end - begin;
    const int vectors = int((width + lanes_ - 1) / lanes_);
    return {begin, left < width ? left : width, lanes_, vectors, width < int64_t(vectors) * lanes_};
}

bool Work::run(int64_t index) const {
    return strips_ ? run_strips(index) : run_panel(index / parts_, index % parts_);
}

bool Work::run_strips(int64_t part) const {
    const Tile all = few_tile(activations_.tokens);
    if (!scratch.reserve(packed_)) return false;
    if (scratch.turn_to(id_, 0)) pack_strips(*strips_, activations_, all, scratch.floats);
    const int64_t begin = part * PART_STRIPS, end = std::min(begin + PART_STRIPS, strips_->strips);
    kernel_.few->compute(*strips_, weights_.bias, activations_, all, begin, end, scratch.floats);
    return true;
}

bool Work::run_panel(int64_t panel, int64_t part) const {
    const int64_t first = panel * panel_, end = std::min(first + panel_, tiles_);
    if (!scratch.reserve(panel_ * packed_ + sums_)) return false;
    const bool fresh = scratch.turn_to(id_, panel);
    for (int64_t at = first; at < end; at++) {
        const Tile mine = tile(at);
        float* packed = scratch.floats + (at - first) * packed_;
        if (fresh) kernel_.pack(weights_, activations_, mine, packed);
        kernel_.compute(weights_, activations_, mine, part, packed, scratch.floats + panel_ * packed_);
    }
    return true;
}

}  // namespace mpcompile
