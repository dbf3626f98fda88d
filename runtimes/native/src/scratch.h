// Memory that belongs to a thread and is kept for later calls.
#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace mpcompile {

// With packed tiles in it: neighbouring items of a call share their tile group, so tiles are packed again only for
// another group or another call.
struct Scratch {
    float* floats = nullptr;  // 64-byte aligned
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

}  // namespace mpcompile
