#include "skinny_packing.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

namespace mpcompile {
namespace {

constexpr int64_t SAMPLED_PANELS = 8;

// Reconstructs rows of the dense weight from the streams, one row panel at a time.
class Dense {
  public:
    Dense(const Weights& w, int lanes)
        : w_(w), at_(size_t(w.blocks * w.rows), 0), floats_(size_t(w.columns * lanes)), lanes_(lanes) {
        for (int64_t block = 0; block < w.blocks; block++)
            for (int64_t i = 0; i < w.row_groups * w.group_rows(); i++) {
                const int64_t row = w.order[block * w.row_groups * w.group_rows() + i];
                if (row < w.rows) at_[size_t(block * w.rows + row)] = int32_t(i);
            }
    }

    // The panel as [lanes][columns]; rows beyond the last are zero.
    const float* panel(int64_t panel) {
        std::fill(floats_.begin(), floats_.end(), 0.0f);
        const int64_t group_rows = w_.group_rows(), indices = w_.group_indices();
        for (int64_t lane = 0; lane < lanes_ && panel * lanes_ + lane < w_.rows; lane++) {
            const int64_t row = panel * lanes_ + lane;
            for (int64_t block = 0; block < w_.blocks; block++) {
                const int64_t at = at_[size_t(block * w_.rows + row)], group = at / group_rows, r = at % group_rows;
                const int64_t base = (block * w_.row_groups + group) * w_.nonzeros;
                for (int64_t step = 0; step < w_.nonzeros; step++) {
                    const int64_t index = w_.indices[(base + step) * indices + (indices == 2 ? r : 0)];
                    const int64_t column = block * w_.block + index;
                    const float value = w_.values[(base + step) * group_rows + r];
                    if (index < w_.block && column < w_.columns) floats_[size_t(lane * w_.columns + column)] += value;
                }
            }
        }
        return floats_.data();
    }

  private:
    const Weights& w_;
    std::vector<int32_t> at_;  // [blocks][rows]: the position of each row in the order of a block
    std::vector<float> floats_;
    int64_t lanes_;
};

int bits_of(int64_t values) {
    int bits = 0;
    while ((int64_t(1) << bits) < values) bits++;
    return bits;
}

// The nonzero counts of one block of one panel.
NonzeroCounts nonzero_counts(const float* dense, const RowPanels& p, int64_t block) {
    const int64_t begin = block * p.width, end = std::min(begin + p.width, p.columns);
    int64_t most = 0, least = p.width;
    for (int64_t lane = 0; lane < p.lanes; lane++) {
        int64_t kept = 0;
        for (int64_t k = begin; k < end; k++) kept += dense[lane * p.columns + k] != 0.0f;
        most = std::max(most, kept);
        least = std::min(least, kept);
    }
    return {uint16_t(most), uint16_t(least)};
}

int64_t vectors_of(const RowPanels& p, NonzeroCounts count) {
    return count.most + (count.most + p.nonzeros_per_word() - 1) / p.nonzeros_per_word();
}

void set_width(RowPanels& p, int64_t width) {
    p.width = width;
    p.blocks = (p.columns + width - 1) / width;
    p.table_registers = width <= p.lanes ? 1 : 2;
    p.bits = bits_of(p.packed_width());
}

// The cost of one block in operations: loads of weights and activations, masked nonzeros, and second-register lookups.
// If M divides the width, all rows have equally many nonzeros. Otherwise rows are padded to the longest; a nonzero that
// some rows lack is masked and hard to predict, and was measured to take three times as long.
int64_t cost_of(const RowPanels& p, NonzeroCounts count, const Permutes& permutes) {
    const int64_t masked = count.most - count.least;
    return vectors_of(p, count) + p.table_registers + 2 * masked +
           (p.table_registers - 1) * permutes.second_register * count.most;
}

// Chooses the block width of the lowest cost on a sample of panels.
void choose_width(RowPanels& p, Dense& dense, const Permutes& permutes) {
    const int64_t sampled = std::min(p.panels, SAMPLED_PANELS), widest = int64_t(permutes.table_registers) * p.lanes;
    std::vector<int64_t> cost(size_t(widest + 1), 0);
    for (int64_t i = 0; i < sampled; i++) {
        const float* rows = dense.panel(p.panels * i / sampled);
        for (int64_t width = 4; width <= widest; width += 4) {
            set_width(p, width);
            for (int64_t block = 0; block < p.blocks; block++)
                cost[size_t(width)] += cost_of(p, nonzero_counts(rows, p, block), permutes);
        }
    }
    int64_t best = 4;
    for (int64_t width = 4; width <= widest; width += 4)
        if (cost[size_t(width)] < cost[size_t(best)]) best = width;
    set_width(p, best);
}

// Writes one block of one panel; returns the end of what it wrote.
float* write_block(const float* dense, const RowPanels& p, int64_t block, NonzeroCounts count, float* to) {
    const int64_t begin = block * p.width, end = std::min(begin + p.width, p.columns), word = p.nonzeros_per_word();
    const int64_t vectors = vectors_of(p, count);
    memset(to, 0, size_t(vectors * p.lanes) * sizeof(float));
    for (int64_t lane = 0; lane < p.lanes; lane++) {
        int64_t step = 0;
        for (int64_t k = begin; k < end; k++) {
            const float value = dense[lane * p.columns + k];
            if (value == 0.0f) continue;
            float* indices = to + step / word * (word + 1) * p.lanes + lane;
            uint32_t packed;
            memcpy(&packed, indices, sizeof packed);
            packed |= uint32_t(k - begin) << (step % word * p.bits);
            memcpy(indices, &packed, sizeof packed);
            indices[(step % word + 1) * p.lanes] = value;
            step++;
        }
    }
    return to + vectors * p.lanes;
}

bool build(RowPanels& p, const Weights& w, const Permutes& permutes) {
    Dense dense(w, p.lanes);
    choose_width(p, dense, permutes);
    p.starts = new int64_t[size_t(p.panels)];
    p.counts = new NonzeroCounts[size_t(p.panels * p.blocks)];
    for (int64_t panel = 0; panel < p.panels; panel++) {
        p.starts[panel] = p.vectors;
        const float* rows = dense.panel(panel);
        for (int64_t block = 0; block < p.blocks; block++) {
            const NonzeroCounts count = p.counts[panel * p.blocks + block] = nonzero_counts(rows, p, block);
            p.vectors += vectors_of(p, count);
        }
    }
    void* stream = nullptr;
    if (posix_memalign(&stream, 64, size_t(std::max<int64_t>(p.vectors, 1) * p.lanes) * sizeof(float))) return false;
    p.stream = static_cast<float*>(stream);
    float* to = p.stream;
    for (int64_t panel = 0; panel < p.panels; panel++) {
        const float* rows = dense.panel(panel);
        for (int64_t block = 0; block < p.blocks; block++)
            to = write_block(rows, p, block, p.counts[panel * p.blocks + block], to);
    }
    return true;
}

}  // namespace

RowPanels* make_row_panels(const Weights& w, const Permutes& permutes) {
    RowPanels* made = new (std::nothrow) RowPanels{};
    if (!made) return nullptr;
    made->rows = w.rows;
    made->columns = w.columns;
    made->lanes = permutes.lanes;
    made->panels = (w.rows + made->lanes - 1) / made->lanes;
    try {
        if (build(*made, w, permutes)) return made;
    } catch (const std::bad_alloc&) {
    }
    free_row_panels(made);
    return nullptr;
}

void free_row_panels(RowPanels* panels) {
    if (!panels) return;
    free(panels->stream);
    delete[] panels->starts;
    delete[] panels->counts;
    delete panels;
}

void pack_skinny(const RowPanels& p, const Activations& a, const Tile& tile, float* packed) {
    const int64_t wide = p.packed_width(), group = tile.lanes, pixels = a.pixels ? a.pixels : 1;
    for (int64_t t = 0; t < tile.width(); t++) {
        const float* from = a.x + t / pixels * p.columns * pixels + t % pixels;
        for (int64_t block = 0; block < p.blocks; block++) {
            const int64_t begin = block * p.width, left = p.columns - begin;
            const int64_t count = t >= tile.count ? 0 : left < p.width ? left : p.width;
            float* to = packed + ((t / group * p.blocks + block) * group + t % group) * wide;
            for (int64_t k = 0; k < count; k++) to[k] = from[(begin + k) * pixels];
            for (int64_t k = count; k < wide; k++) to[k] = 0.0f;
        }
    }
}

}  // namespace mpcompile
