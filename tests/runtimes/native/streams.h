// Random N:M weights as the streams of nm_gemm.h, and the same weights dense.
#pragma once
#include <algorithm>
#include <random>
#include <vector>

#include "nm_gemm.h"

namespace mpcompile {

inline std::mt19937 rng(0);

inline float normal() { return std::normal_distribution<float>()(rng); }

struct Case {
    int64_t rows, columns, rows_per_pattern, keep, of, block, chunk, images, pixels;  // pixels 0: channels-last
};

// Random N:M weights as streams, and dense for the reference result.
struct Streams {
    std::vector<float> dense, values, bias;
    std::vector<uint16_t> indices, common;
    std::vector<int32_t> order;
    Weights weights{};

    explicit Streams(const Case& c) : dense(c.rows * c.columns) {
        Weights& w = weights;
        w.rows = c.rows, w.columns = c.columns, w.rows_per_pattern = c.rows_per_pattern;
        w.block = c.block, w.chunk = c.chunk;
        w.blocks = (c.columns + c.block - 1) / c.block;
        const int64_t unit = w.group_rows();
        w.row_groups = (c.rows + unit - 1) / unit;
        std::vector<char> kept(c.rows * c.columns);
        for (int64_t row = 0; row < c.rows; row++)
            for (int64_t group = 0; group < c.columns; group += c.of) {
                std::vector<char> mask(c.of, 0);
                std::fill(mask.begin(), mask.begin() + c.keep, 1);
                std::shuffle(mask.begin(), mask.end(), rng);
                for (int64_t k = 0; k < c.of && group + k < c.columns; k++)
                    kept[row * c.columns + group + k] =
                        row % c.rows_per_pattern
                            ? kept[(row - row % c.rows_per_pattern) * c.columns + group + k]
                            : mask[k];
            }
        for (size_t i = 0; i < dense.size(); i++) dense[i] = kept[i] ? normal() : 0.0f;
        for (int64_t row = 0; row < c.rows; row++) bias.push_back(normal());
        for (int64_t block = 0; block < w.blocks; block++) {
            for (int64_t i = 0; i < w.row_groups * unit; i++) order.push_back(int32_t(std::min(i, w.rows)));
            const auto mine = order.end() - w.row_groups * unit;
            for (int64_t chunk = 0; chunk < w.rows; chunk += w.chunk)  // any order within a chunk
                if (c.rows_per_pattern == 1) std::shuffle(mine + chunk, mine + std::min(chunk + w.chunk, w.rows), rng);
        }
        w.nonzeros = std::min(c.block, c.columns);  // far too many: the rest is padding
        values.assign(w.blocks * w.row_groups * w.nonzeros * unit, 0.0f);
        indices.assign(w.blocks * w.row_groups * w.nonzeros * w.group_indices(), uint16_t(c.block));
        common.assign(w.blocks * w.row_groups, 0);
        for (int64_t block = 0; block < w.blocks; block++)
            for (int64_t u = 0; u < w.row_groups; u++) fill(block, u, unit);
        w.values = values.data(), w.indices = indices.data(), w.common = common.data();
        w.order = order.data(), w.bias = bias.data();
    }

    float at(int64_t row, int64_t column) const {
        return row < weights.rows ? dense[row * weights.columns + column] : 0;
    }

    void fill(int64_t block, int64_t u, int64_t unit) {
        const Weights& w = weights;
        const int64_t begin = block * w.block, end = std::min(begin + w.block, w.columns);
        const int64_t base = block * w.row_groups + u;
        const int32_t* rows = &order[base * unit];
        if (w.rows_per_pattern == 1) {
            int64_t both = 0;
            for (int64_t k = begin; k < end; k++)
                if (at(rows[0], k) != 0 && at(rows[1], k) != 0) {
                    for (int r = 0; r < 2; r++) put(base, both, r, 2, rows[r], k, uint16_t(k - begin));
                    both++;
                }
            common[base] = uint16_t(both);
            for (int r = 0; r < 2; r++) {
                int64_t i = both;
                for (int64_t k = begin; k < end; k++)
                    if (at(rows[r], k) != 0 && at(rows[1 - r], k) == 0)
                        put(base, i++, r, 2, rows[r], k, uint16_t(k - begin));
            }
            return;
        }
        int64_t i = 0;
        for (int64_t k = begin; k < end; k++) {
            bool any = false;
            for (int64_t r = 0; r < unit; r++) any = any || at(rows[r], k) != 0;
            if (!any) continue;
            for (int64_t r = 0; r < unit; r++) values[(base * w.nonzeros + i) * unit + r] = at(rows[r], k);
            indices[base * w.nonzeros + i++] = uint16_t(k - begin);
        }
    }

    void put(int64_t base, int64_t i, int64_t r, int64_t unit, int64_t row, int64_t column, uint16_t index) {
        values[(base * weights.nonzeros + i) * unit + r] = at(row, column);
        indices[(base * weights.nonzeros + i) * unit + r] = index;
    }
};

}  // namespace mpcompile
