// The kernel: one tile of tokens times one chunk of N:M rows. Compiled once for every instruction set, each time with
// NM_KERNEL as the name of what it defines, and NM_FEW as that of what nm_gemm_skinny.cpp does.
//
// Tokens lie along the vectors, so a kept weight is one splat, and its input channel one row of the packed tile:
// y[row] += weight * x[channel]. A row of its own pattern would need one load a multiplication, and the load ports
// would bound it at about 0.78 of the peak. Two rows are therefore computed together: first the input channels that
// both keep, each loaded once for both, then the others. At 50 % that is three loads for four multiplications where
// partners are drawn by lot, and eleven for sixteen where pack.py chose them.
//
// Each sum runs over the steps of block 0, block 1, ... in the order of the streams; how the work is divided among
// threads changes neither tiles nor that order, and so no bit of the result.
#include "nm_gemm.h"
#include "simd.h"

namespace {

using mpcompile::Activations;
using mpcompile::Tile;
using mpcompile::Weights;

// How many independent sums a row is split into, so that the latency of additions does not bound narrow tiles.
constexpr int chains_of(int rows, int vectors) { return rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4; }

// The sums of one row in registers: VECTORS vectors, of which the last is half as wide where HALF.
template <typename V, int VECTORS, bool HALF>
struct Sums {
    static constexpr int LANES = sizeof(V) / sizeof(float), FULL = VECTORS - HALF;
    V full[FULL];
    f8 half;

    NM_MEMBER void clear() {
        NM_UNROLL for (int j = 0; j < FULL; j++) full[j] = V{};
        if constexpr (HALF) half = f8{};
    }
    NM_MEMBER void read(const float* from) {
        NM_UNROLL for (int j = 0; j < FULL; j++) full[j] = load<V>(from + LANES * j);
        if constexpr (HALF) half = load<f8>(from + LANES * FULL);
    }
    NM_MEMBER void write(float* to) const {
        NM_UNROLL for (int j = 0; j < FULL; j++) store<V>(to + LANES * j, full[j]);
        if constexpr (HALF) store<f8>(to + LANES * FULL, half);
    }
    NM_MEMBER void add(const Sums& other) {
        NM_UNROLL for (int j = 0; j < FULL; j++) full[j] += other.full[j];
        if constexpr (HALF) half += other.half;
    }
};

// One block of one unit: sums[r] += values * x. COUPLED: rows 0 and 1 have places of their own after `common` steps.
template <typename V, int ROWS, int VECTORS, bool HALF, bool COUPLED>
NM_INLINE void unit(const float* x, const uint16_t* places, const float* values, int64_t common, int64_t steps,
                    float* const (&sums)[ROWS], bool first) {
    using Row = Sums<V, VECTORS, HALF>;
    constexpr int LANES = Row::LANES, FULL = Row::FULL, CHAINS = chains_of(ROWS, VECTORS);
    constexpr size_t WIDTH = size_t(LANES) * VECTORS;
    Row acc[CHAINS][ROWS];
    NM_UNROLL for (int c = 0; c < CHAINS; c++) NM_UNROLL for (int r = 0; r < ROWS; r++)
        c || first ? acc[c][r].clear() : acc[c][r].read(sums[r]);
    const auto together = [&](int64_t step, Row (&into)[ROWS]) __attribute__((always_inline)) {
        const float* from = x + places[COUPLED ? 2 * step : step] * WIDTH;
        NM_POINTER(from);
        V weight[ROWS];
        NM_UNROLL for (int r = 0; r < ROWS; r++) weight[r] = splat<V>(values + step * ROWS + r);
        NM_UNROLL for (int j = 0; j < FULL; j++) {
            V loaded = load<V>(from + LANES * j);
            NM_HOLD(loaded);
            NM_UNROLL for (int r = 0; r < ROWS; r++) into[r].full[j] += weight[r] * loaded;
        }
        if constexpr (HALF) {
            f8 loaded = load<f8>(from + LANES * FULL);
            NM_HOLD(loaded);
            NM_UNROLL for (int r = 0; r < ROWS; r++) into[r].half += NM_LOW_HALF(weight[r]) * loaded;
        }
    };
    const auto apart = [&](int64_t step, Row (&into)[ROWS]) __attribute__((always_inline)) {
        NM_UNROLL for (int r = 0; r < ROWS; r++) {
            const float* from = x + places[2 * step + r] * WIDTH;
            NM_POINTER(from);
            const V weight = splat<V>(values + step * ROWS + r);
            NM_UNROLL for (int j = 0; j < FULL; j++) into[r].full[j] += weight * load<V>(from + LANES * j);
            if constexpr (HALF) into[r].half += NM_LOW_HALF(weight) * load<f8>(from + LANES * FULL);
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
    NM_UNROLL for (int r = 0; r < ROWS; r++) {
        NM_UNROLL for (int c = 1; c < CHAINS; c++) acc[0][r].add(acc[c][r]);
        acc[0][r].write(sums[r]);
    }
}

// Asks for a row of sums ahead of its unit: they are in the L2 cache, and paired rows follow no order in memory.
template <typename V, int VECTORS>
NM_INLINE void prefetch(const float* row) {
    NM_UNROLL for (int j = 0; j < VECTORS; j++) __builtin_prefetch(row + int(sizeof(V) / sizeof(float)) * j, 1);
}

// All blocks of the units of one chunk, into sums[row within the chunk][width].
template <typename V, int ROWS, int VECTORS, bool HALF, bool COUPLED>
void multiply(const Weights& w, int64_t chunk, const float* packed, float* sums) {
    constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(float)) * VECTORS, PLACES = COUPLED ? 2 : 1;
    const int64_t begin = chunk * w.chunk / ROWS, units = w.chunk / ROWS;
    const int64_t end = begin + units < w.units ? begin + units : w.units;
    for (int64_t block = 0; block < w.blocks; block++) {
        const float* x = packed + block * (w.block + 1) * WIDTH;
        for (int64_t u = begin; u < end; u++) {
            const int64_t at = block * w.units + u;
            float* rows[ROWS];
            const int32_t* order = w.order + at * ROWS;
            const auto row = [&](int r) { return sums + (order[r] - chunk * w.chunk) * WIDTH; };
            NM_UNROLL for (int r = 0; r < ROWS; r++) rows[r] = row(r);
            if (COUPLED && u + 1 < end)
                NM_UNROLL for (int r = ROWS; r < 2 * ROWS; r++) prefetch<V, VECTORS>(row(r));
            unit<V, ROWS, VECTORS, HALF, COUPLED>(x, w.places + at * w.steps * PLACES, w.values + at * w.steps * ROWS,
                                                  w.common[at], w.steps, rows, block == 0);
        }
    }
}

using Multiply = void (*)(const Weights&, int64_t, const float*, float*);

// Vectors of a tile: tiles of 24 to 112 tokens. Registers bound them, but for two rows and AVX-512, where a block has
// to stay in the L1 cache (WIDEST_BLOCK in pack.py); with seven the 197 tokens of a ViT are two tiles.
constexpr int WIDEST = NM_REGISTERS == 16 ? 6 : NM_LANES == 4 ? 12 : 7;
constexpr int WIDEST_OF_FOUR = NM_REGISTERS == 16 ? 3 : 6;

template <typename V, int VECTORS, bool HALF>
Multiply by_share(int64_t share) {
    if (share == 1) return multiply<V, 2, VECTORS, HALF, true>;
    if (share == 2) return multiply<V, 2, VECTORS, HALF, false>;
    if constexpr (VECTORS <= WIDEST_OF_FOUR) return multiply<V, 4, VECTORS, HALF, false>;
    return nullptr;
}

template <typename V, int VECTORS>
Multiply by_width(int64_t share, const Tile& tile) {
    if constexpr (VECTORS < WIDEST)
        if (tile.vectors > VECTORS) return by_width<V, VECTORS + 1>(share, tile);
    if constexpr (sizeof(V) == 64 && VECTORS > 1)
        if (tile.half) return by_share<V, VECTORS, true>(share);
    return by_share<V, VECTORS, false>(share);
}

Multiply choose(int64_t share, const Tile& tile) {
#if NM_LANES == 16
    if (tile.lanes == 16) return by_width<f16, 1>(share, tile);
    if (tile.lanes == 8) return by_share<f8, 1, false>(share);
#elif NM_LANES == 8
    if (tile.lanes == 8) return by_width<f8, 1>(share, tile);
#else
    return by_width<f4, 1>(share, tile);
#endif
    return by_share<f4, 1, false>(share);
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

// Along the rows of the output for eight tokens at a time: their lines are then written whole, also where a token's
// outputs are a power of two apart and share a cache set.
void write_tokens(const Weights& w, const Activations& a, const Tile& tile, int64_t row, int64_t count,
                  const float* sums) {
    const int64_t width = tile.width(), eights = width >= 8 ? count / 8 * 8 : 0;
    for (int64_t t = 0; t < tile.count; t += 8) {
        float* to = a.y + (tile.first + t) * w.rows + row;
        const int64_t have = tile.count - t < 8 ? tile.count - t : 8;
        for (int64_t n = 0; n < eights; n += 8) {
            const f8 bias = load_anywhere(w.bias + row + n);
            if (have == 8) {
                transpose8(sums + n * width + t, width, to + n, w.rows, bias);
                continue;
            }
            float columns[64];
            transpose8(sums + n * width + t, width, columns, 8, bias);
            for (int64_t i = 0; i < have; i++) memcpy(to + i * w.rows + n, columns + 8 * i, 8 * sizeof(float));
        }
        for (int64_t n = eights; n < count; n++)
            for (int64_t i = 0; i < have; i++) to[i * w.rows + n] = sums[n * width + t + i] + w.bias[row + n];
    }
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

extern const Few NM_FEW;
extern const Kernel NM_KERNEL;
const Kernel NM_KERNEL = {NM_TEXT(NM_KERNEL), &NM_FEW, NM_LANES, {0, WIDEST, WIDEST, 0, WIDEST_OF_FOUR}, pack, compute};

}  // namespace mpcompile
