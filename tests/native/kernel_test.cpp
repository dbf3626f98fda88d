// The kernels without ONNX Runtime, for the sanitizers: every build that this processor runs, ragged shapes, both
// layouts, one to eight threads. Prints what is wrong and returns 1, or returns 0.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "work.h"

using namespace mpcompile;

namespace {

std::mt19937 rng(0);

float normal() { return std::normal_distribution<float>()(rng); }

struct Case {
    int64_t rows, columns, share, keep, of, block, chunk, images, pixels;  // pixels 0: `images` tokens, outside
};

// Random N:M weights as streams, and dense for the reference.
struct Streams {
    std::vector<float> dense, values, bias;
    std::vector<uint16_t> places, common;
    std::vector<int32_t> order;
    Weights weights{};

    explicit Streams(const Case& c) : dense(c.rows * c.columns) {
        Weights& w = weights;
        w.rows = c.rows, w.columns = c.columns, w.share = c.share, w.block = c.block, w.chunk = c.chunk;
        w.blocks = (c.columns + c.block - 1) / c.block;
        const int64_t unit = w.unit_rows();
        w.units = (c.rows + unit - 1) / unit;
        std::vector<char> kept(c.rows * c.columns);
        for (int64_t row = 0; row < c.rows; row++)
            for (int64_t group = 0; group < c.columns; group += c.of) {
                std::vector<char> mask(c.of, 0);
                std::fill(mask.begin(), mask.begin() + c.keep, 1);
                std::shuffle(mask.begin(), mask.end(), rng);
                for (int64_t k = 0; k < c.of && group + k < c.columns; k++)
                    kept[row * c.columns + group + k] =
                        row % c.share ? kept[(row - row % c.share) * c.columns + group + k] : mask[k];
            }
        for (size_t i = 0; i < dense.size(); i++) dense[i] = kept[i] ? normal() : 0.0f;
        for (int64_t row = 0; row < c.rows; row++) bias.push_back(normal());
        for (int64_t i = 0; i < w.units * unit; i++) order.push_back(int32_t(std::min(i, w.rows)));
        for (int64_t chunk = 0; chunk < w.rows; chunk += w.chunk)  // any order within a chunk of own patterns will do
            if (c.share == 1)
                std::shuffle(order.begin() + chunk, order.begin() + std::min(chunk + w.chunk, w.rows), rng);
        w.steps = std::min(c.block, c.columns);  // far too many: the rest are steps without a weight
        values.assign(w.blocks * w.units * w.steps * unit, 0.0f);
        places.assign(w.blocks * w.units * w.steps * w.unit_places(), uint16_t(c.block));
        common.assign(w.blocks * w.units, 0);
        for (int64_t block = 0; block < w.blocks; block++)
            for (int64_t u = 0; u < w.units; u++) fill(block, u, unit);
        w.values = values.data(), w.places = places.data(), w.common = common.data();
        w.order = order.data(), w.bias = bias.data();
    }

    float at(int64_t row, int64_t column) const {
        return row < weights.rows ? dense[row * weights.columns + column] : 0;
    }

    void fill(int64_t block, int64_t u, int64_t unit) {
        const Weights& w = weights;
        const int64_t begin = block * w.block, end = std::min(begin + w.block, w.columns), base = block * w.units + u;
        const int32_t* rows = &order[u * unit];
        if (w.share == 1) {
            int64_t both = 0;
            for (int64_t k = begin; k < end; k++)
                if (at(rows[0], k) != 0 && at(rows[1], k) != 0) {
                    for (int r = 0; r < 2; r++) put(base, both, r, 2, rows[r], k, uint16_t(k - begin));
                    both++;
                }
            common[base] = uint16_t(both);
            for (int r = 0; r < 2; r++) {
                int64_t step = both;
                for (int64_t k = begin; k < end; k++)
                    if (at(rows[r], k) != 0 && at(rows[1 - r], k) == 0)
                        put(base, step++, r, 2, rows[r], k, uint16_t(k - begin));
            }
            return;
        }
        int64_t step = 0;
        for (int64_t k = begin; k < end; k++) {
            bool any = false;
            for (int64_t r = 0; r < unit; r++) any = any || at(rows[r], k) != 0;
            if (!any) continue;
            for (int64_t r = 0; r < unit; r++) values[(base * w.steps + step) * unit + r] = at(rows[r], k);
            places[base * w.steps + step++] = uint16_t(k - begin);
        }
    }

    void put(int64_t base, int64_t step, int64_t r, int64_t unit, int64_t row, int64_t column, uint16_t place) {
        values[(base * weights.steps + step) * unit + r] = at(row, column);
        places[(base * weights.steps + step) * unit + r] = place;
    }
};

void run(const Kernel& kernel, const Weights& w, const Activations& a, int threads) {
    const Work work(kernel, w, a);
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t item; (item = next++) < work.items();)
            if (!work.run(item)) std::abort();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(take);
    take();
    for (auto& other : others) other.join();
}

int64_t place_of(const Activations& a, int64_t token, int64_t channel, int64_t channels) {
    if (!a.pixels) return token * channels + channel;
    return (token / a.pixels * channels + channel) * a.pixels + token % a.pixels;
}

bool right(const Kernel& kernel, const Case& c) {
    const Streams streams(c);
    Activations a{};
    a.pixels = c.pixels;
    a.tokens = c.images * std::max<int64_t>(c.pixels, 1);
    std::vector<float> x(a.tokens * c.columns), y(a.tokens * c.rows, -7.0f), again(y);
    for (float& value : x) value = normal();
    const float odd[] = {-0.0f, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                         std::numeric_limits<float>::quiet_NaN()};
    for (size_t i = 0; i < x.size(); i += 97) x[i] = odd[i / 97 % 4];
    a.x = x.data();
    a.y = y.data();
    run(kernel, streams.weights, a, 1);
    for (int64_t token = 0; token < a.tokens; token++)
        for (int64_t row = 0; row < c.rows; row++) {
            double sum = streams.bias[row], size = std::fabs(sum);
            for (int64_t k = 0; k < c.columns; k++)
                if (const double weight = streams.at(row, k)) {
                    sum += weight * x[place_of(a, token, k, c.columns)];
                    size += std::fabs(weight * x[place_of(a, token, k, c.columns)]);
                }
            const float found = y[place_of(a, token, row, c.rows)];
            // Each of at most `columns` additions rounds by 2^-24 of at most `size`.
            const bool close = std::isfinite(sum) ? std::fabs(found - sum) <= (c.columns + 1) * 0x1p-24 * size
                                                  : std::isnan(sum) ? std::isnan(found) : found == sum;
            if (!close) {
                std::printf("%s: token %ld row %ld of %ldx%ld share %ld: %g, not %g\n", kernel.name, long(token),
                            long(row), long(c.rows), long(c.columns), long(c.share), double(found), sum);
                return false;
            }
        }
    a.y = again.data();
    for (int threads : {2, 3, 8}) {
        std::fill(again.begin(), again.end(), -7.0f);
        run(kernel, streams.weights, a, threads);
        if (std::memcmp(y.data(), again.data(), y.size() * sizeof(float))) {
            std::printf("%s: %d threads change the result\n", kernel.name, threads);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    const Kernel* kernels[4];
    const int count = supported_kernels(kernels);
    std::vector<Case> cases;
    for (int64_t tokens : {1, 3, 5, 8, 13, 16, 17, 33, 96, 97, 197})
        for (int64_t share : {1, 2, 4}) {
            const int64_t rows = share == 1 ? 37 : 36;
            cases.push_back({rows, 72, share, 2, 4, 32, 16, tokens, 0});
            cases.push_back({rows, 60, share, 5, 12, 24, 16, tokens, 0});
        }
    for (int64_t share : {1, 2, 4}) {
        cases.push_back({24, 40, share, 4, 8, 40, 16, 3, 49});
        cases.push_back({20, 64, share, 31, 64, 64, 32, 2, 7});
        cases.push_back({4, 8, share, 1, 4, 8, 16, 1, 196});
    }
    for (int i = 0; i < count; i++)
        for (const Case& c : cases)
            if (!right(*kernels[i], c)) return 1;
    return 0;
}
