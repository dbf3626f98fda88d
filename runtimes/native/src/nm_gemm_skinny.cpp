// The kernel for few tokens: strips of rows (skinny_packing.h) times a few tokens. Compiled once for every instruction set,
// each time with NM_FEW as the name of what it defines; where there are no permutes of whole vectors that is nothing.
//
// With few tokens the weights are read for little work, and memory sets the pace: a kept weight and a few bits for its
// place are read here, where a dense product reads every weight. Outputs lie along the vectors. The activations of a
// block sit in one or two registers, and a permute gives every row the one that its weight is for:
// y[row] += weight[row] * x[place[row]].
//
// Each sum runs over the blocks in order, whichever thread computes it.
#include "nm_gemm_skinny.h"
#include "simd.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace {

using mpcompile::Activations;
using mpcompile::Head;
using mpcompile::Strips;
using mpcompile::Tile;

#if NM_LANES == 16
constexpr mpcompile::Permutes PERMUTES = {16, 2, 0};
constexpr int MOST[] = {0, 16, 12, 0, 8};
using V = f16;
typedef int I __attribute__((vector_size(64)));

// The activation that each row's place names; bits of a place beyond the tables are not looked at.
template <int TABLES>
NM_INLINE V taken(const float* x, I places) {
    // With a mask of all lanes, since GCC 12 warns of the plain form.
    if constexpr (TABLES == 1) return V(_mm512_maskz_permutexvar_ps(0xffff, __m512i(places), _mm512_load_ps(x)));
    return V(_mm512_permutex2var_ps(_mm512_load_ps(x), __m512i(places), _mm512_load_ps(x + 16)));
}
#else
constexpr mpcompile::Permutes PERMUTES = {8, 2, 1};
constexpr int MOST[] = {0, 4, 4, 0, 4};
using V = f8;
typedef int I __attribute__((vector_size(32)));

template <int TABLES>
NM_INLINE V taken(const float* x, I places) {
    const V low = V(_mm256_permutevar8x32_ps(_mm256_load_ps(x), __m256i(places)));
    if constexpr (TABLES == 1) return low;
    const V high = V(_mm256_permutevar8x32_ps(_mm256_load_ps(x + 8), __m256i(places)));
    return V(_mm256_blendv_ps(__m256(low), __m256(high), __m256(places << 28)));  // by the fourth bit of the place
}
#endif

// The processor's own prefetching stops at the end of each page of 4 KiB. Asked for a page ahead, weights that come from
// memory take 10 to 30 % less time, and those that are in the L2 cache no more than before.
NM_INLINE V load_ahead(const float* stream) {
    __builtin_prefetch(stream + 1024);
    return load<V>(stream);
}

constexpr int log2_of(int value) { return value == 1 ? 0 : 1 + log2_of(value / 2); }

template <int TOKENS, int TABLES>
void multiply(const Strips& s, int64_t strip, const float* packed, float* sums) {
    constexpr int BITS = log2_of(NM_LANES * TABLES), WORD = 32 / BITS, WIDTH = NM_LANES * TABLES;
    constexpr int CHAINS = TOKENS >= 8 ? 1 : TOKENS >= 3 ? 2 : TOKENS == 2 ? 4 : 8;
    V acc[CHAINS][TOKENS] = {};
    const float* at = s.stream + s.starts[strip] * NM_LANES;
    const Head* heads = s.heads + strip * s.blocks;
    for (int64_t block = 0; block < s.blocks; block++) {
        const float* x = packed + block * TOKENS * WIDTH;
        const Head head = heads[block];
        int step = 0;
        for (; step + WORD <= head.full; step += WORD, at += (WORD + 1) * NM_LANES) {
            I places = I(load<V>(at));
            NM_UNROLL for (int i = 0; i < WORD; i++) {
                const V value = load_ahead(at + (i + 1) * NM_LANES);
                NM_UNROLL for (int t = 0; t < TOKENS; t++)
                    acc[i % CHAINS][t] += value * taken<TABLES>(x + t * WIDTH, places);
                places >>= BITS;
            }
        }
        for (; step < head.steps; step += WORD) {
            I places = I(load<V>(at));
            at += NM_LANES;
            NM_UNROLL for (int i = 0; i < WORD; i++) {
                if (step + i >= head.steps) break;
                const V value = load_ahead(at);
                at += NM_LANES;
                const bool masked = step + i >= head.full;  // a row without a weight takes no activation
                NM_UNROLL for (int t = 0; t < TOKENS; t++) {
                    V x_t = taken<TABLES>(x + t * WIDTH, places);
                    if (masked) x_t = value != 0.0f ? x_t : V{};
                    acc[i % CHAINS][t] += value * x_t;
                }
                places >>= BITS;
            }
        }
    }
    NM_UNROLL for (int t = 0; t < TOKENS; t++) {
        NM_UNROLL for (int c = 1; c < CHAINS; c++) acc[0][t] += acc[c][t];
        store<V>(sums + t * NM_LANES, acc[0][t]);
    }
}

using Multiply = void (*)(const Strips&, int64_t, const float*, float*);

template <int AT>
Multiply by_width(const Strips& s, int width) {
    constexpr int TOKENS = mpcompile::FEW_WIDTHS[AT];
    if constexpr (TOKENS < mpcompile::FEW_WIDEST)
        if (width > TOKENS) return by_width<AT + 1>(s, width);
    return s.tables == 1 ? multiply<TOKENS, 1> : multiply<TOKENS, 2>;
}

void compute(const Strips& s, const float* bias, const Activations& a, const Tile& tile, int64_t begin, int64_t end,
             const float* packed) {
    const Multiply multiply = by_width<0>(s, tile.lanes);
    const int64_t pixels = a.pixels ? a.pixels : 1, group = s.blocks * tile.lanes * s.packed_width();
    alignas(64) float sums[mpcompile::FEW_WIDEST * NM_LANES];
    for (int64_t strip = begin; strip < end; strip++) {
        const int64_t row = strip * NM_LANES, count = s.rows - row < NM_LANES ? s.rows - row : NM_LANES;
        for (int64_t t = 0; t < tile.count; t++) {
            const int64_t at = t % tile.lanes;
            if (at == 0) multiply(s, strip, packed + t / tile.lanes * group, sums);
            float* to = a.y + (t / pixels * s.rows + row) * pixels + t % pixels;
            for (int64_t n = 0; n < count; n++) to[n * pixels] = sums[at * NM_LANES + n] + bias[row + n];
        }
    }
}

}  // namespace

namespace mpcompile {

extern const Few NM_FEW;
const Few NM_FEW = {PERMUTES, {0, MOST[1], MOST[2], 0, MOST[4]}, compute};

}  // namespace mpcompile

#else

namespace mpcompile {

extern const Few NM_FEW;
const Few NM_FEW = {};

}  // namespace mpcompile

#endif
