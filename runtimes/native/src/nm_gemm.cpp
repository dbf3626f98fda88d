// The N:M GEMM microkernel: one tile of tokens times one chunk of rows. It is compiled once for each instruction set,
// with NM_KERNEL as the name of the Kernel that it defines, and NM_SKINNY and NM_CONV as those of nm_gemm_skinny.cpp
// and nm_conv.cpp.
//
// SIMD lanes hold tokens, so a kept weight is one broadcast, and its input channel is one row of the packed tile:
// y[row] += weight * x[channel]. Computing a row with its own pattern alone needs one load for each multiplication; the
// load ports would limit it to about 0.78 of the peak. So two rows are computed together: first the input channels that
// both keep, each loaded once for both rows, then the others. At 50 % density that is 3 loads for 4 multiplications if
// rows are paired at random, and 11 for 16 with the pairs that packing.py chooses.
//
// Each sum runs over the nonzeros of block 0, block 1, ... in the order of the streams. The division among threads
// changes neither tiles nor that order, so results are bit-identical for any number of threads.
#include "nm_gemm.h"

#include "simd.h"

namespace mpcompile {

extern const ConvKernel NM_CONV;

}  // namespace mpcompile

namespace {

using mpcompile::Activations;
using mpcompile::Tile;
using mpcompile::Weights;

// The number of independent partial sums of a row, so that the latency of additions does not limit narrow tiles.
constexpr int chains_of(int rows, int vectors) { return rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4; }

// The accumulators of one row in registers: VECTORS vectors; with HALF, the last one has half the width.
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

// One nonzero of every row, all on the input channel at `from`, with one weight in a register rather than all. HELD:
// the vectors of the channel stay in registers too; otherwise each row loads them again.
template <typename V, int VECTORS, bool HELD, typename Row, int ROWS>
NM_INLINE void add_products_by_weight(const float* from, const float* values, Row (&into)[ROWS]) {
    constexpr int LANES = Row::LANES;
    V held[VECTORS];
    if constexpr (HELD) NM_UNROLL for (int j = 0; j < VECTORS; j++) {
            held[j] = load<V>(from + LANES * j);
            NM_HOLD(held[j]);
        }
    NM_UNROLL for (int r = 0; r < ROWS; r++) {
        V weight = splat<V>(values + r);
        NM_HOLD(weight);
        if constexpr (!HELD) NM_POINTER(from);  // a new address to GCC, which would keep the vectors otherwise
        NM_UNROLL for (int j = 0; j < VECTORS; j++) into[r].full[j] +=
            weight * (HELD ? held[j] : load<V>(from + LANES * j));
    }
}

// One block of one row group: sums[r] += values * x. COUPLED: rows 0 and 1 have their own patterns, and share the
// column index of their first `common` nonzeros only.
template <typename V, int ROWS, int VECTORS, bool HALF, bool COUPLED>
NM_INLINE void multiply_row_group(const float* x, const uint16_t* indices, const float* values, int64_t common,
                                  int64_t nonzeros, float* const (&sums)[ROWS], bool first) {
    using Row = Sums<V, VECTORS, HALF>;
    constexpr int LANES = Row::LANES, FULL = Row::FULL, CHAINS = chains_of(ROWS, VECTORS);
    constexpr size_t WIDTH = size_t(LANES) * VECTORS;
    // If sums, weights and one loaded vector exceed the registers, one weight at a time is held, with all vectors.
    constexpr int SUMS = CHAINS * ROWS * VECTORS;
    constexpr bool ONE_WEIGHT = SUMS + ROWS + 1 > NM_REGISTERS;
    static_assert(!(ONE_WEIGHT && HALF), "add_products_by_weight has whole vectors only");
    [[maybe_unused]] constexpr bool HELD = SUMS + VECTORS + 1 + NM_PRODUCT_REGISTERS <= NM_REGISTERS;
    Row acc[CHAINS][ROWS];
    NM_UNROLL for (int c = 0; c < CHAINS; c++) NM_UNROLL for (int r = 0; r < ROWS; r++) c || first
        ? acc[c][r].clear()
        : acc[c][r].read(sums[r]);
    // One nonzero of every row of the group, all on the same input channel: one load for all rows.
    const auto shared_step = [&](int64_t i, Row(&into)[ROWS]) __attribute__((always_inline)) {
        const float* from = x + indices[COUPLED ? 2 * i : i] * WIDTH;
        NM_POINTER(from);
        if constexpr (ONE_WEIGHT) {
            add_products_by_weight<V, FULL, HELD>(from, values + i * ROWS, into);
            return;
        }
        V weight[ROWS];
        NM_UNROLL for (int r = 0; r < ROWS; r++) weight[r] = splat<V>(values + i * ROWS + r);
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
    // One nonzero of every row of the group, each on an input channel of its own.
    const auto own_step = [&](int64_t i, Row(&into)[ROWS]) __attribute__((always_inline)) {
        NM_UNROLL for (int r = 0; r < ROWS; r++) {
            const float* from = x + indices[2 * i + r] * WIDTH;
            NM_POINTER(from);
            const V weight = splat<V>(values + i * ROWS + r);
            NM_UNROLL for (int j = 0; j < FULL; j++) into[r].full[j] += weight * load<V>(from + LANES * j);
            if constexpr (HALF) into[r].half += NM_LOW_HALF(weight) * load<f8>(from + LANES * FULL);
        }
    };
    const int64_t shared = COUPLED ? common : nonzeros;
    int64_t i = 0;
    for (; i + CHAINS <= shared; i += CHAINS) NM_UNROLL for (int c = 0; c < CHAINS; c++) shared_step(i + c, acc[c]);
    for (; i < shared; i++) shared_step(i, acc[0]);
    if constexpr (COUPLED) {
        for (; i + CHAINS <= nonzeros; i += CHAINS) NM_UNROLL for (int c = 0; c < CHAINS; c++) own_step(i + c, acc[c]);
        for (; i < nonzeros; i++) own_step(i, acc[0]);
    }
    NM_UNROLL for (int r = 0; r < ROWS; r++) {
        NM_UNROLL for (int c = 1; c < CHAINS; c++) acc[0][r].add(acc[c][r]);
        acc[0][r].write(sums[r]);
    }
}

// Prefetches the sums of a row of the next row group: they lie in the L2 cache, and paired rows are not contiguous.
template <typename V, int VECTORS>
NM_INLINE void prefetch(const float* row) {
    NM_UNROLL for (int j = 0; j < VECTORS; j++) __builtin_prefetch(row + int(sizeof(V) / sizeof(float)) * j, 1);
}

// Multiplies the blocks [from, to) of the row groups of one chunk into sums[row within the chunk][width]. `packed` has
// these blocks.
template <typename V, int ROWS, int VECTORS, bool HALF, bool COUPLED>
void multiply(const Weights& w, int64_t chunk, int64_t from, int64_t to, const float* packed, float* sums) {
    constexpr int64_t WIDTH = int64_t(sizeof(V) / sizeof(float)) * VECTORS, INDICES = COUPLED ? 2 : 1;
    const int64_t begin = chunk * w.chunk / ROWS, groups = w.chunk / ROWS;
    const int64_t end = begin + groups < w.row_groups ? begin + groups : w.row_groups;
    for (int64_t block = from; block < to; block++) {
        const float* x = packed + (block - from) * (w.block + 1) * WIDTH;
        for (int64_t group = begin; group < end; group++) {
            const int64_t at = block * w.row_groups + group;
            float* rows[ROWS];
            const int32_t* order = w.order + at * ROWS;
            const auto row = [&](int r) { return sums + (order[r] - chunk * w.chunk) * WIDTH; };
            NM_UNROLL for (int r = 0; r < ROWS; r++) rows[r] = row(r);
            if (COUPLED && group + 1 < end)
                NM_UNROLL for (int r = ROWS; r < 2 * ROWS; r++) prefetch<V, VECTORS>(row(r));
            multiply_row_group<V, ROWS, VECTORS, HALF, COUPLED>(x, w.indices + at * w.nonzeros * INDICES,
                                                                w.values + at * w.nonzeros * ROWS, w.common[at],
                                                                w.nonzeros, rows, block == 0);
        }
    }
}

using Multiply = void (*)(const Weights&, int64_t, int64_t, int64_t, const float*, float*);

// The most vectors of a tile: tiles have 24 to 112 tokens. The number of registers bounds it, except for two rows with
// AVX-512: there a block must stay in the L1 cache (WIDEST_BLOCK in packing.py). With 7 vectors, the 197 tokens of a
// ViT are two tiles.
constexpr int WIDEST = NM_REGISTERS == 16 ? 6 : NM_LANES == 4 ? 12 : 7;
constexpr int WIDEST_OF_FOUR = NM_REGISTERS == 16 ? 3 : 6;

template <typename V, int VECTORS, bool HALF>
Multiply by_rows_per_pattern(int64_t rows_per_pattern) {
    if (rows_per_pattern == 1) return multiply<V, 2, VECTORS, HALF, true>;
    if (rows_per_pattern == 2) return multiply<V, 2, VECTORS, HALF, false>;
    if constexpr (VECTORS <= WIDEST_OF_FOUR) return multiply<V, 4, VECTORS, HALF, false>;
    return nullptr;
}

template <typename V, int VECTORS>
Multiply by_width(int64_t rows_per_pattern, const Tile& tile) {
    if constexpr (VECTORS < WIDEST)
        if (tile.vectors > VECTORS) return by_width<V, VECTORS + 1>(rows_per_pattern, tile);
    if constexpr (sizeof(V) == 64 && VECTORS > 1)
        if (tile.half) return by_rows_per_pattern<V, VECTORS, true>(rows_per_pattern);
    return by_rows_per_pattern<V, VECTORS, false>(rows_per_pattern);
}

Multiply choose(int64_t rows_per_pattern, const Tile& tile) {
#if NM_LANES == 16
    if (tile.lanes == 16) return by_width<f16, 1>(rows_per_pattern, tile);
    if (tile.lanes == 8) return by_rows_per_pattern<f8, 1, false>(rows_per_pattern);
#elif NM_LANES == 8
    if (tile.lanes == 8) return by_width<f8, 1>(rows_per_pattern, tile);
#else
    return by_width<f4, 1>(rows_per_pattern, tile);
#endif
    return by_rows_per_pattern<f4, 1, false>(rows_per_pattern);
}

// Transposes eight tokens by eight channels at a time. Missing tokens are zeros; the last channels are copied one by
// one.
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
    pack_tokens(w, a, tile, packed);
    for (int64_t block = 0; block < w.blocks; block++)
        memset(packed + (block * (w.block + 1) + w.block) * width, 0, width * sizeof(float));
}

// Transposes and stores eight tokens by eight rows at a time. Whole cache lines are then written, even if the outputs
// of neighbouring tokens are a power of two apart and map to the same cache set.
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
    choose(w.rows_per_pattern, tile)(w, chunk, 0, w.blocks, packed, sums);
    const int64_t row = chunk * w.chunk, count = w.rows - row < w.chunk ? w.rows - row : w.chunk;
    write_tokens(w, a, tile, row, count, sums);
}

void multiply_block(const Weights& w, const Tile& tile, int64_t chunk, int64_t block, const float* packed,
                    float* sums) {
    choose(w.rows_per_pattern, tile)(w, chunk, block, block + 1, packed, sums);
}

#define NM_TEXT(name) NM_TEXT_OF(name)
#define NM_TEXT_OF(name) #name

}  // namespace

namespace mpcompile {

extern const SkinnyKernel NM_SKINNY;
extern const Kernel NM_KERNEL;
const Kernel NM_KERNEL = {
    NM_TEXT(NM_KERNEL), &NM_SKINNY, &NM_CONV, NM_LANES, {0, WIDEST, WIDEST, 0, WIDEST_OF_FOUR}, pack, compute,
    multiply_block};

}  // namespace mpcompile
