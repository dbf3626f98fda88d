// The kernel: one tile of tokens times one chunk of N:M rows. Compiled once for every instruction set, each time with
// NM_KERNEL as the name of what it defines.
//
// Tokens lie along the vectors, so a kept weight is one splat, and its input channel one row of the packed tile:
// y[row] += weight * x[channel]. A row of its own pattern would need one load a multiplication, and the load ports
// would bound it at about 0.78 of the peak. Two rows are therefore computed together: first the input channels that
// both keep, each loaded once for both, then the others. At 50 % that is three loads for four multiplications.
//
// Each sum runs over the steps of block 0, block 1, ... in the order of the streams; how the work is divided among
// threads changes neither tiles nor that order, and so no bit of the result.
#include "kernel.h"
#include "vectors.h"

namespace {

using mpcompile::Activations;
using mpcompile::Tile;
using mpcompile::Weights;

// How many independent sums a row is split into, so that the latency of additions does not bound narrow tiles.
constexpr int chains_of(int rows, int vectors) { return rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4; }

// One block of one unit: sums[r] += values * x. COUPLED: rows 0 and 1 have places of their own after `common` steps.
template <typename V, int ROWS, int VECTORS, bool COUPLED>
NM_INLINE void unit(const float* x, const uint16_t* places, const float* values, int64_t common, int64_t steps,
                    float* const (&sums)[ROWS], bool first) {
    constexpr int LANES = sizeof(V) / sizeof(float), CHAINS = chains_of(ROWS, VECTORS);
    constexpr size_t WIDTH = size_t(LANES) * VECTORS;
    V acc[CHAINS][ROWS][VECTORS];
    NM_UNROLL for (int c = 0; c < CHAINS; c++) NM_UNROLL for (int r = 0; r < ROWS; r++)
        NM_UNROLL for (int j = 0; j < VECTORS; j++)
            acc[c][r][j] = c || first ? V{} : load<V>(sums[r] + LANES * j);
    const auto together = [&](int64_t step, V (&into)[ROWS][VECTORS]) __attribute__((always_inline)) {
        const float* from = x + places[COUPLED ? 2 * step : step] * WIDTH;
        V weight[ROWS];
        NM_UNROLL for (int r = 0; r < ROWS; r++) weight[r] = splat<V>(values + step * ROWS + r);
        NM_UNROLL for (int j = 0; j < VECTORS; j++) {
            V loaded = load<V>(from + LANES * j);
            NM_HOLD(loaded);
            NM_UNROLL for (int r = 0; r < ROWS; r++) into[r][j] += weight[r] * loaded;
        }
    };
    const auto apart = [&](int64_t step, V (&into)[ROWS][VECTORS]) __attribute__((always_inline)) {
        NM_UNROLL for (int r = 0; r < ROWS; r++) {
            const float* from = x + places[2 * step + r] * WIDTH;
            const V weight = splat<V>(values + step * ROWS + r);
            NM_UNROLL for (int j = 0; j < VECTORS; j++) into[r][j] += weight * load<V>(from + LANES * j);
        }
    };
    const int64_t shared = COUPLED ? common : steps;
    int64_t step = 0;
    for (; step + CHAINS <= shared; step += CHAINS)
        NM_UNROLL for (int c = 0; c < CHAINS; c++) together(step + c, acc[c]);
    for (; step < shared; step++) together(step, acc[0]);
    if constexpr (COUPLED) {
        for (; step + CHAINS <= steps; step += CHAINS)
            NM_UNROLL for (int c = 0; c < CHAINS; c++) apart(step + c, acc[c]);
        for (; step < steps; step++) apart(step, acc[0]);
    }
    NM_UNROLL for (int r = 0; r < ROWS; r++) NM_UNROLL for (int j = 0; j < VECTORS; j++) {
        V sum = acc[0][r][j];
        NM_UNROLL for (int c = 1; c < CHAINS; c++) sum += acc[c][r][j];
        store<V>(sums[r] + LANES * j, sum);
    }
}

// All blocks of the units of one chunk, into sums[row within the chunk][width].
template <typename V, int ROWS, int VECTORS, bool COUPLED>
void multiply(const Weights& w, int64_t chunk, const float* packed, float* sums) {
    constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(float)) * VECTORS, PLACES = COUPLED ? 2 : 1;
    const int64_t begin = chunk * w.chunk / ROWS, end = begin + w.chunk / ROWS < w.units ? begin + w.chunk / ROWS : w.units;
    for (int64_t block = 0; block < w.blocks; block++) {
        const float* x = packed + block * (w.block + 1) * WIDTH;
        for (int64_t u = begin; u < end; u++) {
            const int64_t at = block * w.units + u;
            float* rows[ROWS];
            NM_UNROLL for (int r = 0; r < ROWS; r++) rows[r] = sums + (w.order[u * ROWS + r] - chunk * w.chunk) * WIDTH;
            unit<V, ROWS, VECTORS, COUPLED>(x, w.places + at * w.steps * PLACES, w.values + at * w.steps * ROWS,
                                            w.common[at], w.steps, rows, block == 0);
        }
    }
}

using Multiply = void (*)(const Weights&, int64_t, const float*, float*);

template <typename V, int VECTORS>
Multiply by_share(int64_t share) {
    if (share == 4) {
        if constexpr (4 * VECTORS + 5 <= NM_REGISTERS || VECTORS <= 3) return multiply<V, 4, VECTORS, false>;
        return nullptr;
    }
    return share == 2 ? multiply<V, 2, VECTORS, false> : multiply<V, 2, VECTORS, true>;
}

constexpr int WIDEST = NM_REGISTERS == 32 && NM_LANES == 4 ? 12 : 6;       // tiles of 48 to 96 tokens
constexpr int WIDEST_OF_FOUR = NM_REGISTERS == 32 ? (NM_LANES == 4 ? 6 : 5) : 3;

template <typename V, int VECTORS>
Multiply by_width(int64_t share, int vectors) {
    if (vectors == VECTORS) return by_share<V, VECTORS>(share);
    if constexpr (VECTORS < WIDEST) return by_width<V, VECTORS + 1>(share, vectors);
    return nullptr;
}

Multiply choose(int64_t share, const Tile& tile) {
#if NM_LANES > 8
    if (tile.lanes == 16) return by_width<f16, 1>(share, tile.vectors);
#endif
#if NM_LANES > 4
    if (tile.lanes == 8) return NM_LANES == 8 ? by_width<f8, 1>(share, tile.vectors) : by_share<f8, 1>(share);
#endif
    return NM_LANES == 4 ? by_width<f4, 1>(share, tile.vectors) : by_share<f4, 1>(share);
}

// Tokens of a tile that lie side by side in memory where channels are outside: those of one image.
struct Run {
    int64_t image, pixel, at, count;
};

Run run_from(const Activations& a, const Tile& tile, int64_t at) {
    const int64_t token = tile.first + at, pixel = token % a.pixels;
    const int64_t left = a.pixels - pixel, wanted = tile.count - at;
    return {token / a.pixels, pixel, at, left < wanted ? left : wanted};
}

void pack_channels(const Weights& w, const Activations& a, const Tile& tile, float* packed) {
    const int64_t width = tile.width();
    for (int64_t at = 0; at < tile.count;) {
        const Run run = run_from(a, tile, at);
        const float* from = a.x + run.image * w.columns * a.pixels + run.pixel;
        for (int64_t k = 0; k < w.columns; k++)
            memcpy(packed + (k + k / w.block) * width + at, from + k * a.pixels, run.count * sizeof(float));
        at += run.count;
    }
    if (tile.count < width)
        for (int64_t k = 0; k < w.columns; k++)
            memset(packed + (k + k / w.block) * width + tile.count, 0, (width - tile.count) * sizeof(float));
}

// Eight tokens by eight channels at a time; what is left over goes through a buffer of zeros, or one by one.
void pack_tokens(const Weights& w, const Activations& a, const Tile& tile, float* packed) {
    const int64_t width = tile.width();
    for (int64_t t = 0; t < width; t += 8) {
        const int64_t have = tile.count - t < 0 ? 0 : tile.count - t < 8 ? tile.count - t : 8;
        const int64_t lanes = width - t < 8 ? width - t : 8;
        const float* from = a.x + (tile.first + t) * w.columns;
        for (int64_t block = 0, k = 0; k < w.columns; block++) {
            const int64_t end = (block + 1) * w.block < w.columns ? (block + 1) * w.block : w.columns;
            float* to = packed + (k + block) * width + t;
            for (; lanes == 8 && k + 8 <= end; k += 8, to += 8 * width) {
                if (have == 8) {
                    transpose8(from + k, w.columns, to, width, f8{});
                    continue;
                }
                float rows[64] = {};
                for (int64_t i = 0; i < have; i++) memcpy(rows + 8 * i, from + i * w.columns + k, 8 * sizeof(float));
                transpose8(rows, 8, to, width, f8{});
            }
            for (; k < end; k++, to += width)
                for (int64_t i = 0; i < lanes; i++) to[i] = i < have ? from[i * w.columns + k] : 0.0f;
        }
    }
}

void pack(const Weights& w, const Activations& a, const Tile& tile, float* packed) {
    const int64_t width = tile.width();
    a.pixels ? pack_channels(w, a, tile, packed) : pack_tokens(w, a, tile, packed);
    for (int64_t block = 0; block < w.blocks; block++)
        memset(packed + (block * (w.block + 1) + w.block) * width, 0, width * sizeof(float));
}

void write_channels(const Weights& w, const Activations& a, const Tile& tile, int64_t row, int64_t count,
                    const float* sums) {
    for (int64_t at = 0; at < tile.count;) {
        const Run run = run_from(a, tile, at);
        for (int64_t n = 0; n < count; n++) {
            float* to = a.y + (run.image * w.rows + row + n) * a.pixels + run.pixel;
            const float* from = sums + n * tile.width() + at;
            const float bias = w.bias[row + n];
            for (int64_t i = 0; i < run.count; i++) to[i] = from[i] + bias;
        }
        at += run.count;
    }
}

void write_tokens(const Weights& w, const Activations& a, const Tile& tile, int64_t row, int64_t count,
                  const float* sums) {
    const int64_t width = tile.width();
    int64_t n = 0;
    for (; width >= 8 && n + 8 <= count; n += 8) {
        const f8 bias = load_anywhere(w.bias + row + n);
        for (int64_t t = 0; t < tile.count; t += 8) {
            float* to = a.y + (tile.first + t) * w.rows + row + n;
            const int64_t have = tile.count - t < 8 ? tile.count - t : 8;
            if (have == 8) {
                transpose8(sums + n * width + t, width, to, w.rows, bias);
                continue;
            }
            float columns[64];
            transpose8(sums + n * width + t, width, columns, 8, bias);
            for (int64_t i = 0; i < have; i++) memcpy(to + i * w.rows, columns + 8 * i, 8 * sizeof(float));
        }
    }
    for (; n < count; n++)
        for (int64_t t = 0; t < tile.count; t++)
            a.y[(tile.first + t) * w.rows + row + n] = sums[n * width + t] + w.bias[row + n];
}

void compute(const Weights& w, const Activations& a, const Tile& tile, int64_t chunk, const float* packed,
             float* sums) {
    choose(w.share, tile)(w, chunk, packed, sums);
    const int64_t row = chunk * w.chunk, count = w.rows - row < w.chunk ? w.rows - row : w.chunk;
    (a.pixels ? write_channels : write_tokens)(w, a, tile, row, count, sums);
}

#define NM_TEXT(name) NM_TEXT_OF(name)
#define NM_TEXT_OF(name) #name

}  // namespace

namespace mpcompile {

extern const Kernel NM_KERNEL;
const Kernel NM_KERNEL = {NM_TEXT(NM_KERNEL), NM_LANES, {0, WIDEST, WIDEST, 0, WIDEST_OF_FOUR}, pack, compute};

}  // namespace mpcompile
