// Tests the kernels without ONNX Runtime, for the sanitizers: every kernel that this processor runs, with the skinny
// ones, ragged shapes, both layouts of activations, one to eight threads. Prints each error and returns 1; returns 0 if
// there is none.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "conv_scheduler.h"
#include "streams.h"

using namespace mpcompile;

namespace {

constexpr int64_t MOST_SKINNY = 33;  // more tokens than calls give that kernel: it must be right for any number

template <typename Scheduler>
void run_items(const Scheduler& scheduler, int threads) {
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t item; (item = next++) < scheduler.items();)
            if (!scheduler.run(item)) std::abort();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(take);
    take();
    for (auto& other : others) other.join();
}

void run(const Kernel& kernel, const Weights& w, const Activations& a, const RowPanels* row_panels, int threads) {
    if (a.pixels && !row_panels)
        run_items(ConvScheduler(kernel, w, a, threads), threads);
    else
        run_items(TileScheduler(kernel, w, a, row_panels), threads);
}

int64_t place_of(const Activations& a, int64_t token, int64_t channel, int64_t channels) {
    if (!a.pixels) return token * channels + channel;
    return (token / a.pixels * channels + channel) * a.pixels + token % a.pixels;
}

// `skinny`: uses the kernel for few tokens.
bool right(const Kernel& kernel, const Case& c, bool skinny) {
    const Streams streams(c);
    const std::unique_ptr<RowPanels, void (*)(RowPanels*)> row_panels(
        skinny ? make_row_panels(streams.weights, kernel.skinny->permutes) : nullptr, free_row_panels);
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
    run(kernel, streams.weights, a, row_panels.get(), 1);
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
                std::printf("%s%s: token %ld row %ld of %ldx%ld share %ld: %g, not %g\n", kernel.name,
                            skinny ? ", skinny tokens" : "", long(token), long(row), long(c.rows), long(c.columns),
                            long(c.rows_per_pattern), double(found), sum);
                return false;
            }
        }
    a.y = again.data();
    for (int threads : {2, 3, 8}) {
        std::fill(again.begin(), again.end(), -7.0f);
        run(kernel, streams.weights, a, row_panels.get(), threads);
        if (std::memcmp(y.data(), again.data(), y.size() * sizeof(float))) {
            std::printf("%s%s: %d threads change the result\n", kernel.name, skinny ? ", skinny tokens" : "", threads);
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
    for (int64_t tokens : {2, 4, 6, 7, 9, 10, 11, 12, 14, 15}) cases.push_back({37, 60, 1, 5, 12, 24, 16, tokens, 0});
    for (int64_t share : {1, 2, 4}) {
        cases.push_back({24, 40, share, 4, 8, 40, 16, 3, 49});
        cases.push_back({20, 64, share, 31, 64, 64, 32, 2, 7});
        cases.push_back({4, 8, share, 1, 4, 8, 16, 1, 196});
        cases.push_back({300, 64, share, 16, 32, 64, 128, 5, 0});  // several parts of the rows
        cases.push_back({40, 24, share, 2, 4, 24, 16, 6, 1});
    }
    for (int i = 0; i < count; i++)
        for (const Case& c : cases) {
            const bool skinny =
                kernels[i]->skinny->permutes.lanes && c.images * std::max<int64_t>(c.pixels, 1) <= MOST_SKINNY;
            if (!right(*kernels[i], c, false) || (skinny && !right(*kernels[i], c, true))) return 1;
        }
    return 0;
}
