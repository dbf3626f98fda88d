// The skinny GEMM microkernel: row panels (skinny_packing.h) times a few tokens. It is compiled once for each
// instruction set, with NM_SKINNY as the name of the SkinnyKernel that it defines. Without permutes of whole vectors it
// is empty.
//
// With few tokens, reading the weights limits the speed. This kernel reads each kept weight and a few bits of its
// index; a dense GEMM reads every weight. SIMD lanes hold output rows. The activations of a block sit in one or two
// table registers, and a permute gives each row the activation of its weight: y[row] += weight[row] * x[index[row]].
//
// Each sum runs over the blocks in order, whichever thread computes it.
#include "nm_gemm_skinny.h"

#include "simd.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace {

using mpcompile::Activations;
using mpcompile::NonzeroCounts;
using mpcompile::RowPanels;
using mpcompile::Tile;

#if NM_LANES == 16
constexpr mpcompile::Permutes PERMUTES = {16, 2, 0};
constexpr int WIDEST = 8;
constexpr int MOST[] = {0, 16, 12, 0, 8};
using V = f16;
typedef int I __attribute__((vector_size(64)));

// The activation at each row's index. Bits of an index beyond the table registers are ignored.
template <int TABLE_REGISTERS>
NM_INLINE V permuted(const float* x, I indices) {
    // Masked with all lanes: GCC 12 warns about the unmasked intrinsic.
    if constexpr (TABLE_REGISTERS == 1)
        return V(_mm512_maskz_permutexvar_ps(0xffff, __m512i(indices), _mm512_load_ps(x)));
    return V(_mm512_permutex2var_ps(_mm512_load_ps(x), __m512i(indices), _mm512_load_ps(x + 16)));
}
#else
constexpr mpcompile::Permutes PERMUTES = {8, 2, 1};
constexpr int WIDEST = 4;
constexpr int MOST[] = {0, 4, 4, 0, 4};
using V = f8;
typedef int I __attribute__((vector_size(32)));

template <int TABLE_REGISTERS>
NM_INLINE V permuted(const float* x, I indices) {
    const V low = V(_mm256_permutevar8x32_ps(_mm256_load_ps(x), __m256i(indices)));
    if constexpr (TABLE_REGISTERS == 1) return low;
    const V high = V(_mm256_permutevar8x32_ps(_mm256_load_ps(x + 8), __m256i(indices)));
    NM_HOLD(indices);  // GCC would merge this shift with earlier ones into a mask, which takes a register
    return V(_mm256_blendv_ps(__m256(low), __m256(high), __m256(indices << 28)));  // selects by bit 3 of the index
}
#endif

// Hardware prefetching stops at the end of each 4 KiB page. With this prefetch one page ahead, weights in main memory
// take 10 to 30 % less time, and weights in the L2 cache take no more.
NM_INLINE V load_ahead(const float* stream) {
    __builtin_prefetch(stream + 1024);
    return load<V>(stream);
}

constexpr int log2_of(int value) { return value == 1 ? 0 : 1 + log2_of(value / 2); }

template <int TOKENS, int TABLE_REGISTERS>
void multiply(const RowPanels& p, int64_t panel, const float* packed, float* sums) {
    constexpr int BITS = log2_of(NM_LANES * TABLE_REGISTERS), WORD = 32 / BITS, WIDTH = NM_LANES * TABLE_REGISTERS;
    constexpr int CHAINS = TOKENS >= 8 ? 1 : TOKENS >= 3 ? 2 : TOKENS == 2 ? 4 : 8;
    // If sums, tables and 5 other vectors exceed the registers, permutes read the tables from memory. Otherwise GCC
    // would keep the tables, and sums in memory.
    constexpr bool LOAD_TABLES = CHAINS * TOKENS + TOKENS * TABLE_REGISTERS + 5 > NM_REGISTERS;
    V acc[CHAINS][TOKENS] = {};
    const float* at = p.stream + p.starts[panel] * NM_LANES;
    const NonzeroCounts* counts = p.counts + panel * p.blocks;
    for (int64_t block = 0; block < p.blocks; block++) {
        const float* x = packed + block * TOKENS * WIDTH;
        const NonzeroCounts count = counts[block];
        int step = 0;
        for (; step + WORD <= count.least; step += WORD, at += (WORD + 1) * NM_LANES) {
            I indices = I(load<V>(at));
            NM_UNROLL for (int i = 0; i < WORD; i++) {
                const V value = load_ahead(at + (i + 1) * NM_LANES);
                if constexpr (LOAD_TABLES) NM_POINTER(x);
                NM_UNROLL for (int t = 0; t < TOKENS; t++) acc[i % CHAINS][t] +=
                    value * permuted<TABLE_REGISTERS>(x + t * WIDTH, indices);
                indices >>= BITS;
            }
        }
        for (; step < count.most; step += WORD) {
            I indices = I(load<V>(at));
            at += NM_LANES;
            NM_UNROLL for (int i = 0; i < WORD; i++) {
                if (step + i >= count.most) break;
                const V value = load_ahead(at);
                at += NM_LANES;
                if constexpr (LOAD_TABLES) NM_POINTER(x);
                const bool masked = step + i >= count.least;  // padded rows must not multiply: 0 * inf is NaN
                NM_UNROLL for (int t = 0; t < TOKENS; t++) {
                    V x_t = permuted<TABLE_REGISTERS>(x + t * WIDTH, indices);
                    if (masked) x_t = value != 0.0f ? x_t : V{};
                    acc[i % CHAINS][t] += value * x_t;
                }
                indices >>= BITS;
            }
        }
    }
    NM_UNROLL for (int t = 0; t < TOKENS; t++) {
        NM_UNROLL for (int c = 1; c < CHAINS; c++) acc[0][t] += acc[c][t];
        store<V>(sums + t * NM_LANES, acc[0][t]);
    }
}

using Multiply = void (*)(const RowPanels&, int64_t, const float*, float*);

template <int AT>
Multiply by_width(const RowPanels& p, int width) {
    constexpr int TOKENS = mpcompile::SKINNY_WIDTHS[AT];
    if constexpr (TOKENS < WIDEST)
        if (width > TOKENS) return by_width<AT + 1>(p, width);
    return p.table_registers == 1 ? multiply<TOKENS, 1> : multiply<TOKENS, 2>;
}

void compute(const RowPanels& p, const float* bias, const Activations& a, const Tile& tile, int64_t begin, int64_t end,
             const float* packed) {
    const Multiply multiply = by_width<0>(p, tile.lanes);
    const int64_t pixels = a.pixels ? a.pixels : 1, group = p.blocks * tile.lanes * p.packed_width();
    alignas(64) float sums[WIDEST * NM_LANES];
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t row = panel * NM_LANES, count = p.rows - row < NM_LANES ? p.rows - row : NM_LANES;
        for (int64_t t = 0; t < tile.count; t++) {
            const int64_t at = t % tile.lanes;
            if (at == 0) multiply(p, panel, packed + t / tile.lanes * group, sums);
            float* to = a.y + (t / pixels * p.rows + row) * pixels + t % pixels;
            for (int64_t n = 0; n < count; n++) {
                float sum = sums[at * NM_LANES + n] + bias[row + n];
                if (a.residual) sum += a.residual[to - a.y + n * pixels];
                sum = sum < a.low ? a.low : sum;
                to[n * pixels] = sum > a.high ? a.high : sum;
            }
        }
    }
}

}  // namespace

namespace mpcompile {

extern const SkinnyKernel NM_SKINNY;
const SkinnyKernel NM_SKINNY = {PERMUTES, WIDEST, {0, MOST[1], MOST[2], 0, MOST[4]}, compute};

}  // namespace mpcompile

#else

namespace mpcompile {

extern const SkinnyKernel NM_SKINNY;
const SkinnyKernel NM_SKINNY = {};

}  // namespace mpcompile

#endif
