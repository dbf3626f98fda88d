// Times the inner loops of the int8 kernels: prints cycles per product for each "KERNEL KEPT SHARED ROWS TOKENS" of the
// command line. ROWS and TOKENS are those of one tile, whose data lie in the L1 cache. The loop's time is the
// difference of two numbers of columns, which leaves out the stores. Cycles are those of a chain of additions,
// timed in turn with it. Each time is the first decile of ROUNDS.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "int8_kernels.h"
#include "int8_packing.h"

using namespace mpcompile;

namespace {

constexpr int CALLS = 200, ROUNDS = 401, CHAIN = 80000;
volatile float sink;

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cycle_time() {
    uint64_t value = 1;
    const double start = seconds();
    for (int i = 0; i < CHAIN; i += 8)
        __asm__ volatile("add $1, %0\nadd $1, %0\nadd $1, %0\nadd $1, %0\n"
                         "add $1, %0\nadd $1, %0\nadd $1, %0\nadd $1, %0"
                         : "+r"(value));
    return (seconds() - start) / CHAIN;
}

// What a tenth of the values is below: others are disturbed by what else runs on the core.
double decile(std::vector<double>& values) {
    const auto at = values.begin() + long(values.size()) / 10;
    std::nth_element(values.begin(), at, values.end());
    return *at;
}

std::vector<int8_t> weight(int64_t rows, int64_t columns, int kept, int shared) {
    std::vector<int8_t> made(size_t(rows * columns), 0);
    uint32_t random = 1;
    for (int64_t row = 0; row < rows; row += shared)
        for (int64_t block = 0; block < columns; block += 16) {
            bool chosen[16] = {};
            for (int left = kept; left;) {
                random = random * 1664525u + 1013904223u;
                if (!std::exchange(chosen[random >> 28], true)) left--;
            }
            for (int64_t r = row; r < row + shared; r++)
                for (int i = 0; i < 16; i++) made[size_t(r * columns + block + i)] = chosen[i] ? 1 + i % 7 : 0;
        }
    return made;
}

struct Loop {
    std::unique_ptr<PackedInt8> packed;
    std::vector<uint8_t> x;
    std::vector<float> y;
    int64_t columns, rows, tokens;

    Loop(const Int8Kernel& kernel, int kept, int shared, int64_t rows, int64_t tokens, int64_t columns)
        : columns(columns), rows(rows), tokens(tokens) {
        const std::vector<float> ones(size_t(rows), 1.0f);
        packed = pack_int8(kernel, int8_baseline.gemm, weight(rows, columns, kept, kept == 16 ? 1 : shared), rows,
                           columns, ones.data(), ones.data(), 1, 0);
        const Int8Weights& w = packed->weights;
        if (!w.stream || w.kept != kept || w.shared != shared || w.wide) std::abort();
        x.assign(size_t(tokens * columns), 3);
        y.assign(size_t(tokens * rows), 0);
    }
    double time() {
        Int8Call call{};
        call.x = x.data(), call.floats = y.data(), call.tokens = tokens;
        const double start = seconds();
        for (int i = 0; i < CALLS; i++)
            packed->kernel->compute(packed->weights, call, x.data(), size_t(columns), 0, tokens, 0, 1);
        sink = y[0];
        return (seconds() - start) / CALLS;
    }
};

}  // namespace

int main(int count, char** arguments) {
    const Int8Kernels* kernels[4];
    const int found = supported_int8_kernels(kernels);
    for (int i = 1; i + 4 < count; i += 5)
        for (int k = 0; k < found; k++) {
            if (std::string("int8_") + arguments[i] != kernels[k]->name) continue;
            const int kept = std::atoi(arguments[i + 1]), shared = std::atoi(arguments[i + 2]);
            const int64_t rows = std::atoi(arguments[i + 3]), tokens = std::atoi(arguments[i + 4]);
            const int64_t columns = rows < 32 ? 512 : 128;
            Loop loop(kernels[k]->gemm, kept, shared, rows, tokens, columns);
            Loop thrice(kernels[k]->gemm, kept, shared, rows, tokens, 3 * columns);
            std::vector<double> shorter, longer;  // in cycles
            for (int round = 0; round < ROUNDS; round++) {
                const double cycle = cycle_time();
                shorter.push_back(loop.time() / cycle);
                longer.push_back(thrice.time() / cycle);
            }
            std::printf("%s %d %d %.6f\n", arguments[i], kept, shared,
                        (decile(longer) - decile(shorter)) / double(rows * tokens * columns * kept / 8));
        }
}
