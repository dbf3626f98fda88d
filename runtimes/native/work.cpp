#include "work.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>

namespace mpcompile {
namespace {

// The memory of a thread: the packed tile, and the sums of a chunk. Neighbouring items share their tile, so it is
// packed again only where the tile or the call is another one.
struct Scratch {
    float* floats = nullptr;
    int64_t size = 0;
    uint64_t work = 0;
    int64_t tile = -1;

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
};

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
      parts_(weights.chunks()) {
    if (!strips) return;
    tiles_ = 1;
    parts_ = (strips->strips + PART_STRIPS - 1) / PART_STRIPS;
}

Tile Work::tile(int64_t index) const {
    const int64_t begin = steps_ * index / tiles_ * step_, end = steps_ * (index + 1) / tiles_ * step_;
    const int64_t left = activations_.tokens - begin, width = end - begin;
    const int vectors = int((width + lanes_ - 1) / lanes_);
    return {begin, left < width ? left : width, lanes_, vectors, width < int64_t(vectors) * lanes_};
}

bool Work::run(int64_t index) const {
    const int64_t at = index / parts_, part = index % parts_;
    const Tile mine = strips_ ? few_tile(activations_.tokens) : tile(at);
    const int64_t packed = strips_ ? strips_->packed_floats(mine) : packed_floats(weights_, mine);
    if (!scratch.reserve(packed + (strips_ ? 0 : sums_floats(weights_, mine)))) return false;
    if (scratch.work != id_ || scratch.tile != at) {
        strips_ ? pack_strips(*strips_, activations_, mine, scratch.floats)
                : kernel_.pack(weights_, activations_, mine, scratch.floats);
        scratch.work = id_;
        scratch.tile = at;
    }
    if (strips_) {
        const int64_t begin = part * PART_STRIPS, end = std::min(begin + PART_STRIPS, strips_->strips);
        kernel_.few->compute(*strips_, weights_.bias, activations_, mine, begin, end, scratch.floats);
    } else {
        kernel_.compute(weights_, activations_, mine, part, scratch.floats, scratch.floats + packed);
    }
    return true;
}

}  // namespace mpcompile
