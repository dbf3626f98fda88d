#include "skinny_packing.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

namespace mpcompile {
namespace {

constexpr int64_t SAMPLED_STRIPS = 8;

// Rows of the dense weight, read back from the streams a strip at a time.
class Dense {
  public:
    Dense(const Weights& w, int lanes)
        : w_(w), at_(size_t(w.blocks * w.rows), 0), floats_(size_t(w.columns * lanes)), lanes_(lanes) {
        for (int64_t block = 0; block < w.blocks; block++)
            for (int64_t i = 0; i < w.units * w.unit_rows(); i++) {
                const int64_t row = w.order[block * w.units * w.unit_rows() + i];
                if (row < w.rows) at_[size_t(block * w.rows + row)] = int32_t(i);
            }
    }

    // [lanes][columns]; rows that do not exist are zero.
    const float* strip(int64_t strip) {
        std::fill(floats_.begin(), floats_.end(), 0.0f);
        const int64_t unit_rows = w_.unit_rows(), places = w_.unit_places();
        for (int64_t lane = 0; lane < lanes_ && strip * lanes_ + lane < w_.rows; lane++) {
            const int64_t row = strip * lanes_ + lane;
            for (int64_t block = 0; block < w_.blocks; block++) {
                const int64_t at = at_[size_t(block * w_.rows + row)], unit = at / unit_rows, r = at % unit_rows;
                const int64_t base = (block * w_.units + unit) * w_.steps;
                for (int64_t step = 0; step < w_.steps; step++) {
                    const int64_t place = w_.places[(base + step) * places + (places == 2 ? r : 0)];
                    const int64_t column = block * w_.block + place;
                    const float value = w_.values[(base + step) * unit_rows + r];
                    if (place < w_.block && column < w_.columns) floats_[size_t(lane * w_.columns + column)] += value;
                }
            }
        }
        return floats_.data();
    }

  private:
    const Weights& w_;
    std::vector<int32_t> at_;  // [blocks][rows]: where each row stands in the order of a block
    std::vector<float> floats_;
    int64_t lanes_;
};

int bits_of(int64_t values) {
    int bits = 0;
    while ((int64_t(1) << bits) < values) bits++;
    return bits;
}

// The steps of one block of one strip.
Head head_of(const float* dense, const Strips& s, int64_t block) {
    const int64_t begin = block * s.width, end = std::min(begin + s.width, s.columns);
    int64_t most = 0, least = s.width;
    for (int64_t lane = 0; lane < s.lanes; lane++) {
        int64_t kept = 0;
        for (int64_t k = begin; k < end; k++) kept += dense[lane * s.columns + k] != 0.0f;
        most = std::max(most, kept);
        least = std::min(least, kept);
    }
    return {uint16_t(most), uint16_t(least)};
}

int64_t vectors_of(const Strips& s, Head head) {
    return head.steps + (head.steps + s.steps_of_word() - 1) / s.steps_of_word();
}

void set_width(Strips& s, int64_t width) {
    s.width = width;
    s.blocks = (s.columns + width - 1) / width;
    s.tables = width <= s.lanes ? 1 : 2;
    s.bits = bits_of(s.packed_width());
}

// The operations of one block: its vectors and activations, and what steps cost besides. Widths that M divides have
// rows of equally many weights. In others rows are padded to the longest, and a step that some rows have no weight for
// is masked and hard to predict; it was measured to take three times as long.
int64_t cost_of(const Strips& s, Head head, const Permutes& permutes) {
    const int64_t masked = head.steps - head.full;
    return vectors_of(s, head) + s.tables + 2 * masked + (s.tables - 1) * permutes.second_table * head.steps;
}

// The cheapest width, by a sample of strips.
void choose_width(Strips& s, Dense& dense, const Permutes& permutes) {
    const int64_t sampled = std::min(s.strips, SAMPLED_STRIPS), widest = int64_t(permutes.tables) * s.lanes;
    std::vector<int64_t> cost(size_t(widest + 1), 0);
    for (int64_t i = 0; i < sampled; i++) {
        const float* rows = dense.strip(s.strips * i / sampled);
        for (int64_t width = 4; width <= widest; width += 4) {
            set_width(s, width);
            for (int64_t block = 0; block < s.blocks; block++)
                cost[size_t(width)] += cost_of(s, head_of(rows, s, block), permutes);
        }
    }
    int64_t best = 4;
    for (int64_t width = 4; width <= widest; width += 4)
        if (cost[size_t(width)] < cost[size_t(best)]) best = width;
    set_width(s, best);
}

// Writes one block of one strip, and returns where the next begins.
float* write_block(const float* dense, const Strips& s, int64_t block, Head head, float* to) {
    const int64_t begin = block * s.width, end = std::min(begin + s.width, s.columns), word = s.steps_of_word();
    const int64_t vectors = vectors_of(s, head);
    memset(to, 0, size_t(vectors * s.lanes) * sizeof(float));
    for (int64_t lane = 0; lane < s.lanes; lane++) {
        int64_t step = 0;
        for (int64_t k = begin; k < end; k++) {
            const float value = dense[lane * s.columns + k];
            if (value == 0.0f) continue;
            float* places = to + step / word * (word + 1) * s.lanes + lane;
            uint32_t packed;
            memcpy(&packed, places, sizeof packed);
            packed |= uint32_t(k - begin) << (step % word * s.bits);
            memcpy(places, &packed, sizeof packed);
            places[(step % word + 1) * s.lanes] = value;
            step++;
        }
    }
    return to + vectors * s.lanes;
}

bool fill(Strips& s, const Weights& w, const Permutes& permutes) {
    Dense dense(w, s.lanes);
    choose_width(s, dense, permutes);
    s.starts = new int64_t[size_t(s.strips)];
    s.heads = new Head[size_t(s.strips * s.blocks)];
    for (int64_t strip = 0; strip < s.strips; strip++) {
        s.starts[strip] = s.vectors;
        const float* rows = dense.strip(strip);
        for (int64_t block = 0; block < s.blocks; block++) {
            const Head head = s.heads[strip * s.blocks + block] = head_of(rows, s, block);
            s.vectors += vectors_of(s, head);
        }
    }
    void* stream = nullptr;
    if (posix_memalign(&stream, 64, size_t(std::max<int64_t>(s.vectors, 1) * s.lanes) * sizeof(float))) return false;
    s.stream = static_cast<float*>(stream);
    float* to = s.stream;
    for (int64_t strip = 0; strip < s.strips; strip++) {
        const float* rows = dense.strip(strip);
        for (int64_t block = 0; block < s.blocks; block++)
            to = write_block(rows, s, block, s.heads[strip * s.blocks + block], to);
    }
    return true;
}

}  // namespace

Strips* make_strips(const Weights& w, const Permutes& permutes) {
    Strips* made = new (std::nothrow) Strips{};
    if (!made) return nullptr;
    made->rows = w.rows;
    made->columns = w.columns;
    made->lanes = permutes.lanes;
    made->strips = (w.rows + made->lanes - 1) / made->lanes;
    try {
        if (fill(*made, w, permutes)) return made;
    } catch (const std::bad_alloc&) {
    }
    free_strips(made);
    return nullptr;
}

void free_strips(Strips* strips) {
    if (!strips) return;
    free(strips->stream);
    delete[] strips->starts;
    delete[] strips->heads;
    delete strips;
}

void pack_strips(const Strips& s, const Activations& a, const Tile& tile, float* packed) {
    const int64_t wide = s.packed_width(), group = tile.lanes, pixels = a.pixels ? a.pixels : 1;
    for (int64_t t = 0; t < tile.width(); t++) {
        const float* from = a.x + t / pixels * s.columns * pixels + t % pixels;
        for (int64_t block = 0; block < s.blocks; block++) {
            const int64_t begin = block * s.width, left = s.columns - begin;
            const int64_t count = t >= tile.count ? 0 : left < s.width ? left : s.width;
            float* to = packed + ((t / group * s.blocks + block) * group + t % group) * wide;
            for (int64_t k = 0; k < count; k++) to[k] = from[(begin + k) * pixels];
            for (int64_t k = count; k < wide; k++) to[k] = 0.0f;
        }
    }
}

}  // namespace mpcompile
