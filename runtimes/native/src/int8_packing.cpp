#include "int8_packing.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <utility>

namespace mpcompile {
namespace {

constexpr int BLOCK = 16, STEP = 8;
constexpr int MOST_LANE = 128;  // 255 * 128 fits into 16 bits, and 255 * 129 does not

// The weights of one row in one step, and their columns within their blocks. The first four are multiplied first. Of
// each four, two neighbours share a 16-bit lane.
struct Step {
    int8_t weight[STEP];
    uint8_t column[STEP];
};

using Order = std::array<uint8_t, STEP>;  // of the weights of a step

// Every order of a step's weights that differs in which of them share a lane. With 8 kept of one block, any four may
// share a lane; with 4 kept of each of two blocks, two of each. Dense weights stay in the order of the columns.
std::vector<Order> orders_of(int kept) {
    std::vector<Order> orders{{0, 1, 2, 3, 4, 5, 6, 7}};
    if (kept == 16) return orders;
    constexpr int PLACES[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};  // of the two lanes
    for (int chosen = 1; chosen < 256; chosen += 2) {  // the weights in the first lane; weight 0 is one of them
        const int low = __builtin_popcount(chosen & 15), high = __builtin_popcount(chosen >> 4);
        if (low + high != 4 || (kept == 4 && low != 2)) continue;
        Order order{};
        for (int i = 0, count[2] = {}; i < STEP; i++) {
            const int lane = chosen >> i & 1 ? 0 : 1;
            order[size_t(PLACES[lane][count[lane]++])] = uint8_t(i);
        }
        orders.push_back(order);
    }
    return orders;
}

Step ordered(const Step& step, const Order& order) {
    Step result{};
    for (size_t i = 0; i < STEP; i++) {
        result.weight[i] = step.weight[order[i]];
        result.column[i] = step.column[order[i]];
    }
    return result;
}

// Whether no 16-bit lane can saturate, for any activations. A lane holds the products of two weights if `wide`, and
// otherwise those of two of the first four and two of the others.
bool fits(const Step& step, bool wide) {
    int positive[4] = {}, negative[4] = {};
    for (int i = 0; i < STEP; i++) {
        const int lane = wide ? i / 2 : i / 2 % 2;
        positive[lane] += std::max<int>(step.weight[i], 0);
        negative[lane] += std::min<int>(step.weight[i], 0);
    }
    for (int lane = 0; lane < 4; lane++)
        if (positive[lane] > MOST_LANE || negative[lane] < -MOST_LANE) return false;
    return true;
}

// Orders the weights of rows with the same columns, all in the same way, so that no lane can saturate. Returns whether
// that is possible.
bool make_fit(Step* steps, int count, const std::vector<Order>& orders, bool wide) {
    for (const Order& order : orders) {
        Step tried[4];
        bool all_fit = true;
        for (int r = 0; r < count && all_fit; r++) all_fit = fits(tried[r] = ordered(steps[r], order), wide);
        if (!all_fit) continue;
        std::copy(tried, tried + count, steps);
        return true;
    }
    return false;
}

// How many weights a pattern keeps in the block of 16 columns that begins at its byte i.
int kept_in_block(const std::string& pattern, size_t i) {
    return __builtin_popcount(uint8_t(pattern[i])) +
           (i + 1 < pattern.size() ? __builtin_popcount(uint8_t(pattern[i + 1])) : 0);
}

class Matrix {
  public:
    Matrix(const int8_t* values, int64_t rows, int64_t columns) : values_(values), rows_(rows), columns_(columns) {
        patterns_.assign(size_t(rows), std::string(size_t((columns + 7) / 8), '\0'));
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < columns; i++)
                if (at(row, i)) patterns_[size_t(row)][size_t(i / 8)] |= char(1 << i % 8);
    }

    int8_t at(int64_t row, int64_t column) const { return values_[row * columns_ + column]; }
    const std::string& pattern(int64_t row) const { return patterns_[size_t(row)]; }
    int64_t rows() const { return rows_; }

    // The most weights that a row keeps in a block of 16 columns: 4, 8, or 16 for more.
    int kept() const {
        int most = 0;
        for (const std::string& pattern : patterns_)
            for (size_t i = 0; i < pattern.size(); i += 2) most = std::max(most, kept_in_block(pattern, i));
        return most <= 4 ? 4 : most <= 8 ? 8 : 16;
    }

    // The weights of a row in the columns of `pattern`, in a step whose first block begins at column `first`, and whose
    // second one begins `distance` columns later.
    Step step(int64_t row, const std::string& pattern, int64_t first, int64_t distance, int kept) const {
        Step result{};
        for (int block = 0; block < STEP / std::min(kept, STEP); block++) {
            const int64_t begin = first + block * distance,
                          end = std::min(begin + (kept == 16 ? STEP : BLOCK), columns_);
            int place = block * kept;
            for (int64_t i = begin; i < end; i++) {
                if (kept != 16 && !(pattern[size_t(i / 8)] >> i % 8 & 1)) continue;
                result.weight[place] = at(row, i);
                result.column[place++] = uint8_t(i - begin);
            }
        }
        return result;
    }

  private:
    const int8_t* values_;
    int64_t rows_, columns_;
    std::vector<std::string> patterns_;  // a bit for each column
};

// Rows that share a pattern: that of each row, or the union of the rows' patterns.
struct Group {
    std::vector<int64_t> rows;
    std::string pattern;
};

bool before(const Group& a, const Group& b) { return a.rows < b.rows; }

// Groups of `shared` rows of a chunk with the same pattern; empty if the rows cannot be grouped without rest.
std::vector<Group> groups_of_equals(const Matrix& matrix, int64_t first, int64_t last, int shared) {
    std::map<std::string, std::vector<int64_t>> same;
    for (int64_t row = first; row < last; row++) same[matrix.pattern(row)].push_back(row);
    std::vector<Group> groups;
    for (const auto& [pattern, rows] : same) {
        if (rows.size() % size_t(shared)) return {};
        for (size_t i = 0; i < rows.size(); i += size_t(shared))
            groups.push_back({{rows.begin() + long(i), rows.begin() + long(i) + shared}, pattern});
    }
    std::sort(groups.begin(), groups.end(), before);
    return groups;
}

// Adds a row's pattern to `pattern`. Returns false if a block of 16 columns then keeps more than `kept` weights.
bool join(std::string& pattern, const std::string& added, int kept) {
    for (size_t i = 0; i < pattern.size(); i++) {
        pattern[i] |= added[i];
        if (i % 2 == 1 && kept_in_block(pattern, i - 1) > kept) return false;
    }
    return pattern.size() % 2 == 0 || kept_in_block(pattern, pattern.size() - 1) <= kept;
}

// Groups of `shared` rows of a chunk whose patterns together keep at most `kept` of 16: a kept weight may be zero after
// rounding, so rows that share a mask need not have the same pattern. A row joins the latest group that can take it.
// Empty if the rows cannot be grouped without rest.
std::vector<Group> groups_of_unions(const Matrix& matrix, int64_t first, int64_t last, int shared, int kept) {
    std::vector<Group> groups;
    for (int64_t row = first; row < last; row++) {
        std::string pattern;
        const auto group = std::find_if(groups.rbegin(), groups.rend(), [&](const Group& tried) {
            pattern = tried.pattern;
            return tried.rows.size() < size_t(shared) && join(pattern, matrix.pattern(row), kept);
        });
        if (group == groups.rend()) {
            groups.push_back({{row}, matrix.pattern(row)});
        } else {
            group->rows.push_back(row);
            group->pattern = pattern;
        }
    }
    for (const Group& group : groups)
        if (group.rows.size() != size_t(shared)) return {};
    return groups;
}

std::vector<Group> groups_of(const Matrix& matrix, int64_t first, int64_t last, int shared, int kept) {
    if (shared > 1) {
        std::vector<Group> groups = groups_of_equals(matrix, first, last, shared);
        return groups.empty() ? groups_of_unions(matrix, first, last, shared, kept) : groups;
    }
    std::vector<Group> groups;
    for (int64_t row = first; row < last; row++) groups.push_back({{row}, matrix.pattern(row)});
    return groups;
}

// Vector operations for one token with a layout for rows that share no patterns: shuffles, products, the loads of
// activations where they are broadcast, and the sums of the parts of a vector. All take about as long on Zen 4.
int64_t operations(const Int8Layout& layout, const Int8Weights& w, int lanes) {
    const int64_t panel_rows = layout.groups * lanes / layout.splits;
    const int64_t steps = (w.columns + layout.step_columns - 1) / layout.step_columns;
    const int64_t of_step = layout.groups * 4 + (layout.splits > 1 ? 0 : STEP / w.kept);
    return (w.rows + panel_rows - 1) / panel_rows * (steps * of_step + (layout.splits > 1 ? 3 : 0));
}

// Whether the layout for few columns is the faster one.
bool is_narrow(const Int8Kernel& kernel, const Int8Weights& w) {
    if (!kernel.narrow_layout || w.kept == 16) return false;
    return operations(kernel.narrow_layout(w.kept), w, kernel.lanes) <
           operations(kernel.layout(w.kept, 1), w, kernel.lanes);
}

// Sets what the sums of the rows start with, on the kernel of `p`.
void set_start(PackedInt8& p, const Matrix& matrix, int32_t x_zero) {
    for (int64_t row = 0; row < p.weights.rows; row++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < p.weights.columns; i++) sum += matrix.at(row, i);
        p.start[size_t(row)] = (p.kernel->x_offset - x_zero) * sum;
    }
}

// Writes the stream of `p` with `shared` rows for each pattern. Returns false if the rows cannot be grouped like that,
// or if a 16-bit lane could saturate.
bool write_stream(PackedInt8& p, const Matrix& matrix, int shared, bool wide, bool narrow) {
    Int8Weights& w = p.weights;
    const bool dense = w.kept == 16;
    const Int8Layout layout = narrow ? p.kernel->narrow_layout(w.kept) : p.kernel->layout(w.kept, shared);
    const int vector = 4 * p.kernel->lanes, rows = p.kernel->lanes / layout.splits, controls = dense ? 0 : 2;
    const int64_t panel_rows = layout.groups * shared * rows, group_bytes = vector * (controls + 2 * shared);
    const int64_t step_bytes = layout.groups * group_bytes;
    const std::vector<Order> orders = orders_of(w.kept);
    w.step_columns = layout.step_columns;
    w.steps = (w.columns + w.step_columns - 1) / w.step_columns;
    std::vector<CacheLine> stream(size_t(w.chunks() * CHUNK / panel_rows * w.steps * step_bytes / 64 + 1));
    bool in_order = true;
    for (int64_t chunk = 0; chunk < w.chunks(); chunk++) {
        const int64_t first = chunk * CHUNK, last = std::min(first + CHUNK, w.rows);
        const auto groups = groups_of(matrix, first, last, dense ? 1 : shared, w.kept);
        if (groups.empty()) return false;
        // Dense rows have no patterns: each is placed alone, in the order of the rows.
        const int members = dense ? 1 : shared;
        for (size_t g = 0; g < groups.size(); g++) {
            // Of all vectors of the chunk in which this group has a lane, the first; rows that share a pattern are
            // neighbours in the panel.
            const int64_t row_in_chunk = int64_t(g) * members, panel = row_in_chunk / panel_rows;
            const int64_t group = row_in_chunk % panel_rows / (shared * rows),
                          in_group = row_in_chunk % (shared * rows);
            const int64_t row_of_vector = in_group / shared, first_vector = in_group % shared;
            uint8_t* to =
                stream.data()->bytes + (first / panel_rows + panel) * w.steps * step_bytes + group * group_bytes;
            for (int r = 0; r < members; r++) {
                const int64_t row = groups[g].rows[size_t(r)];
                p.position[size_t(row)] = uint8_t(row_in_chunk + r);
                in_order &= row_in_chunk + r == row - first;
            }
            for (int64_t i = 0; i < w.steps; i++, to += step_bytes)
                for (int split = 0; split < layout.splits; split++) {
                    Step steps[4];
                    for (int r = 0; r < members; r++)
                        steps[r] = matrix.step(groups[g].rows[size_t(r)], groups[g].pattern,
                                               i * w.step_columns + split * BLOCK, layout.splits * BLOCK, w.kept);
                    if (p.kernel->saturates && !make_fit(steps, members, orders, wide)) return false;
                    uint8_t* lane = to + 4 * (split * rows + row_of_vector);
                    for (int half = 0; half < 2; half++) {
                        if (controls) memcpy(lane + half * vector, steps[0].column + 4 * half, 4);
                        for (int r = 0; r < members; r++)
                            memcpy(lane + (controls + half * shared + first_vector + r) * vector,
                                   steps[r].weight + 4 * half, 4);
                    }
                }
        }
    }
    w.shared = shared;
    w.wide = wide;
    w.narrow = narrow;
    w.position = in_order ? nullptr : p.position.data();
    p.stream = std::move(stream);
    w.stream = p.stream.data()->bytes;
    return true;
}

}  // namespace

int most_kept(const int8_t* values, int64_t rows, int64_t columns) { return Matrix(values, rows, columns).kept(); }

std::unique_ptr<PackedInt8> pack_int8(const Int8Kernel& widest, const Int8Kernel& baseline, std::vector<int8_t> values,
                                      int64_t rows, int64_t columns, const float* scale, const float* bias,
                                      float x_scale, int32_t x_zero) {
    auto result = std::make_unique<PackedInt8>();
    PackedInt8& p = *result;
    p.kernel = &widest;
    p.matrix = std::move(values);
    const size_t padded = size_t((rows + CHUNK - 1) / CHUNK * CHUNK);
    p.start.assign(padded, 0);
    p.scale.assign(padded, 0.0f);
    p.bias.assign(padded, 0.0f);
    p.position.assign(padded, 0);
    const Matrix matrix(p.matrix.data(), rows, columns);
    for (int64_t row = 0; row < rows; row++) {
        p.scale[size_t(row)] = x_scale * scale[row];
        p.bias[size_t(row)] = bias[row];
    }
    p.weights = {nullptr,        p.matrix.data(),
                 p.start.data(), p.scale.data(),
                 p.bias.data(),  nullptr,
                 rows,           columns,
                 columns,        1,
                 matrix.kept(),  1,
                 false,          false};
    Int8Weights& w = p.weights;
    if (widest.lanes)
        for (const bool wide : {false, true})
            for (int shared = 4; shared >= (w.kept == 16 ? 4 : 1); shared /= 2)
                if ((!wide || widest.saturates) &&
                    write_stream(p, matrix, shared, wide, shared == 1 && is_narrow(widest, w))) {
                    set_start(p, matrix, x_zero);
                    p.matrix.clear();
                    p.matrix.shrink_to_fit();
                    w.matrix = nullptr;
                    return result;
                }
    p.kernel = &baseline;
    set_start(p, matrix, x_zero);
    w.step_columns = 1;
    w.steps = columns;
    w.position = nullptr;
    return result;
}

}  // namespace mpcompile
