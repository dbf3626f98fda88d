// The int8 microkernel: a tile of tokens times a panel of rows. It is compiled for AVX2, AVX-512 with VNNI, and NEON
// with sdot or i8mm, with NM_INT8_GEMM as the name of the Int8Kernel that it defines.
#include "int8_gemm.h"

#include <string.h>

#include "int8_simd.h"
#if NM_NEON
#include "int8_gemm_neon.h"
#endif

namespace {

using mpcompile::Activation;
using mpcompile::CHUNK;
using mpcompile::Int8Call;
using mpcompile::Int8Layout;
using mpcompile::Int8Weights;
using mpcompile::U8Scale;

#if !NM_NEON
// The shape of a tile: `GROUPS` groups of rows, each with `SHARED` vectors of rows that share their patterns, times
// `TOKENS` tokens, as many sums as registers allow beside the operands.
// NARROW: without splits, for few columns.
template <int KEPT, int SHARED, bool NARROW>
struct Shape {
    static constexpr bool DENSE = KEPT == 16;
    static constexpr int SPLITS = DENSE || SHARED == 4 || NARROW ? 1 : ::SPLITS;
    static constexpr int ROWS = LANES / SPLITS;  // of a vector
#if NM_VNNI
    static constexpr int GROUPS = SHARED == 1 ? 2 : 1;
    static constexpr int TOKENS = SHARED == 1 ? 10 : SHARED == 2 ? 10 : 5;
    static constexpr bool HOLDS_WEIGHTS = true;
#else
    static constexpr int GROUPS = 1;
    static constexpr int TOKENS = SHARED == 1 ? 9 : SHARED == 2 ? 5 : 3;
    static constexpr bool HOLDS_WEIGHTS =
        SHARED == 1;  // otherwise no registers are left, and weights are memory operands
#endif
    static constexpr int VECTORS = GROUPS * SHARED, PANEL_ROWS = VECTORS * ROWS;
    static constexpr int CONTROLS = DENSE ? 0 : 2, BLOCK = 16 * SPLITS;
    static constexpr int COLUMNS = DENSE ? 8 : KEPT == 8 ? BLOCK : 2 * BLOCK;  // of a step
    static constexpr size_t STEP_BYTES = sizeof(Bytes) * GROUPS * (CONTROLS + 2 * SHARED);
};

// Both keep the sum in its register: left alone, GCC overlaps steps, runs out of registers and keeps sums on the stack.
#if NM_VNNI
// sum += p * w, four products in each 32-bit lane.
NM_INLINE void add_products8(Bytes& sum, Bytes p, Bytes w) {
    sum = _mm512_dpbusd_epi32(sum, p, w);
    NM_KEEP(sum);
}
NM_INLINE Bytes held_shuffle(Bytes v, Bytes control) {
    Bytes p = shuffled(v, control);
    NM_KEEP(p);
    return p;
}
template <bool>
NM_INLINE void add_products8(Bytes& sum, Bytes p, Bytes w, Bytes q, Bytes u, Bytes) {
    sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, p, w), q, u);
    NM_KEEP(sum);
}
#else
// sum += p * w + q * u. The products pass through 16-bit lanes, two in each if WIDE and otherwise four; the weights are
// packed so that no lane can saturate.
template <bool WIDE>
NM_INLINE void add_products8(Bytes& sum, Bytes p, Bytes w, Bytes q, Bytes u, Bytes ones) {
    const Bytes first = _mm256_maddubs_epi16(p, w), second = _mm256_maddubs_epi16(q, u);
    Bytes added;
    if constexpr (WIDE)
        added = _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
    else
        added = _mm256_madd_epi16(_mm256_add_epi16(first, second), ones);
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(added));
}
#endif

// The sums of T tokens and one panel: out[t * CHUNK + row of the panel]. Not inlined: GCC would run out of registers.
template <int KEPT, int SHARED, bool NARROW, bool WIDE, int T>
__attribute__((noinline)) void multiply(const uint8_t* x, size_t stride, const uint8_t* w, int64_t steps,
                                        int32_t* out) {
    using S = Shape<KEPT, SHARED, NARROW>;
    constexpr size_t V = sizeof(Bytes);
    Bytes sums[T][S::VECTORS];
    NM_UNROLL for (int t = 0; t < T; t++) NM_UNROLL for (int r = 0; r < S::VECTORS; r++) sums[t][r] = zeros();
    [[maybe_unused]] const Bytes ones = NM_VNNI ? zeros() : all16(1);
    for (int64_t step = 0; step < steps; step++, x += S::COLUMNS, w += S::STEP_BYTES) {
        const auto operand = [&w](int group, int i) __attribute__((always_inline)) {
            return load_bytes(w + V * (group * (S::CONTROLS + 2 * SHARED) + i));
        };
        [[maybe_unused]] Bytes held[S::GROUPS][S::CONTROLS + 2 * SHARED];
        if constexpr (S::HOLDS_WEIGHTS)
            NM_UNROLL for (int g = 0; g < S::GROUPS; g++) NM_UNROLL for (int i = 0; i < S::CONTROLS + 2 * SHARED; i++) {
                held[g][i] = operand(g, i);
                NM_KEEP(held[g][i]);
            }
        const auto at = [&](int group, int i) __attribute__((always_inline)) {
            return S::HOLDS_WEIGHTS ? held[group][i] : operand(group, i);
        };
        NM_UNROLL for (int t = 0; t < T; t++) {
            const uint8_t* from = x + t * stride;
            // Weights that are not held are loaded again for each token: GCC would keep them in registers of the sums.
            if constexpr (!S::HOLDS_WEIGHTS) __asm__ volatile("" : "+r"(w));
            [[maybe_unused]] Bytes first, second;
            if constexpr (!S::DENSE) {
                first = load_blocks<S::SPLITS>(from);
                NM_KEEP(first);
                if constexpr (KEPT == 4) {
                    second = load_blocks<S::SPLITS>(from + S::BLOCK);
                    NM_KEEP(second);
                }
            }
            NM_UNROLL for (int g = 0; g < S::GROUPS; g++) {
                Bytes* of_group = sums[t] + g * SHARED;
#if NM_VNNI
                if constexpr (SHARED == 1) {
                    // A shuffle and its products in turn: 4 % faster on Zen 4 than two shuffles first.
                    add_products8(of_group[0], held_shuffle(first, at(g, 0)), at(g, 2));
                    add_products8(of_group[0], held_shuffle(KEPT == 8 ? first : second, at(g, 1)), at(g, 3));
                    continue;
                }
#endif
                Bytes p = S::DENSE ? all4(from) : shuffled(first, at(g, 0));
                Bytes q = S::DENSE ? all4(from + 4) : shuffled(KEPT == 8 ? first : second, at(g, 1));
                if constexpr (SHARED > 1) {
                    NM_KEEP(p);
                    NM_KEEP(q);
                }
                NM_UNROLL for (int r = 0; r < SHARED; r++) add_products8<WIDE>(
                    of_group[r], p, at(g, S::CONTROLS + r), q, at(g, S::CONTROLS + SHARED + r), ones);
            }
        }
    }
    store_sums<T, S::GROUPS, SHARED, S::SPLITS>(sums[0], out, CHUNK);
}
#endif  // !NM_NEON

template <int KEPT, int SHARED, bool NARROW, bool WIDE, int T>
NM_INLINE void tile(int64_t tokens, const uint8_t* x, size_t stride, const uint8_t* w, int64_t steps, int32_t* out) {
    if constexpr (T > 1)
        if (tokens < T) return tile<KEPT, SHARED, NARROW, WIDE, T - 1>(tokens, x, stride, w, steps, out);
    multiply<KEPT, SHARED, NARROW, WIDE, T>(x, stride, w, steps, out);
}

// All panels of one chunk, for `tokens` tokens in tiles of nearly equal size: out[token][CHUNK].
template <int KEPT, int SHARED, bool NARROW, bool WIDE>
void multiply_chunk(const Int8Weights& w, int64_t chunk, const uint8_t* x, size_t stride, int64_t tokens,
                    int32_t* out) {
    using S = Shape<KEPT, SHARED, NARROW>;
    constexpr int PANELS = int(CHUNK) / S::PANEL_ROWS;
    const int64_t tiles = (tokens + S::TOKENS - 1) / S::TOKENS;
    for (int64_t panel = 0; panel < PANELS; panel++) {
        if (chunk * CHUNK + panel * S::PANEL_ROWS >= w.rows) return;
        const uint8_t* stream = w.stream + (chunk * PANELS + panel) * w.steps * S::STEP_BYTES;
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t begin = tokens * i / tiles, end = tokens * (i + 1) / tiles;
            tile<KEPT, SHARED, NARROW, WIDE, S::TOKENS>(end - begin, x + begin * stride, stride, stream, w.steps,
                                                out + begin * CHUNK + panel * S::PANEL_ROWS);
        }
    }
}

using MultiplyChunk = void (*)(const Int8Weights&, int64_t, const uint8_t*, size_t, int64_t, int32_t*);

template <int KEPT, bool WIDE>
MultiplyChunk by_shared(const Int8Weights& w) {
    if constexpr (SPLITS > 1)
        if (w.narrow) return multiply_chunk<KEPT, 1, true, WIDE>;
    return w.shared == 4   ? multiply_chunk<KEPT, 4, false, WIDE>
           : w.shared == 2 ? multiply_chunk<KEPT, 2, false, WIDE>
                           : multiply_chunk<KEPT, 1, false, WIDE>;
}

template <bool WIDE>
MultiplyChunk by_kept(const Int8Weights& w) {
    if (w.kept == 16) return multiply_chunk<16, 4, false, WIDE>;
    return w.kept == 8 ? by_shared<8, WIDE>(w) : by_shared<4, WIDE>(w);
}

MultiplyChunk chosen(const Int8Weights& w) {
#if NM_SATURATES
    if (w.wide) return by_kept<true>(w);
#endif
    return by_kept<false>(w);
}

// (v - zero) * scale for LANES bytes.
NM_INLINE Floats dequantised(const uint8_t* p, const U8Scale& of) {
    return (to_floats(load_low_bytes(p)) - all(of.zero)) * all(of.scale);
}

// Where the results of some tokens and the rows of one chunk go, and what is added to them; `stride` numbers apart.
struct Ends {
    const float* residual;
    const uint8_t* added;
    float* floats;
    uint8_t* bytes;
    int64_t stride;
};

// The results of some tokens and `count` rows, rounded up to LANES, from their sums in the order of the rows.
template <Activation ACTIVATION, bool ADDS>
NM_INLINE void finish(const Int8Weights& w, const Int8Call& call, int64_t row, int64_t count, int64_t tokens,
                      const int32_t* sums, const Ends& ends) {
    const Floats inverse = all(call.inverse_scale), zero = all(call.zero);
    const Floats low = all(call.low - call.zero), high = all(call.high - call.zero);
    for (int64_t i = 0; i < count; i += LANES) {
        const Bytes start = load_bytes(w.start + row + i);
        const Floats scale = load_floats(w.scale + row + i), bias = load_floats(w.bias + row + i);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = t * ends.stride + i;
            const Bytes sum = add32(load_bytes(sums + t * CHUNK + i), start);
            Floats value = multiply_add(to_floats(sum), scale, bias);
            if (ends.residual) value = value + load_floats(ends.residual + at);
            if constexpr (ACTIVATION == Activation::RELU) value = largest(value, all(0));
            if constexpr (ACTIVATION == Activation::GELU) value = gelu(value);
            if constexpr (ACTIVATION == Activation::GELU_TANH) value = gelu_tanh(value);
            if constexpr (ADDS) {
                const Floats lowest = all(-call.branch.zero), highest = all(255 - call.branch.zero);
                const Floats scaled = least(largest(value * all(1 / call.branch.scale), lowest), highest);
                value = nearest_integer(scaled) * all(call.branch.scale) +
                        dequantised(ends.added + at, call.added_scale);
            }
            if (ends.floats) store_floats(ends.floats + at, value);
            if (ends.bytes) store_quantised(ends.bytes + at, value, inverse, zero, low, high);
        }
    }
}

template <Activation ACTIVATION, bool ADDS>
void finish_chunk(const Int8Weights& w, const Int8Call& call, int64_t chunk, int64_t first, int64_t tokens,
                  int32_t* sums) {
    const int64_t row = chunk * CHUNK, left = w.rows - row < CHUNK ? w.rows - row : CHUNK;
    for (int64_t t = 0; w.position && t < tokens; t++) {
        alignas(64) int32_t stored[CHUNK];
        memcpy(stored, sums + t * CHUNK, sizeof(stored));
        for (int64_t i = 0; i < CHUNK; i++) sums[t * CHUNK + i] = stored[w.position[row + i]];
    }
    const int64_t begin = first * w.rows + row;
    if (left % LANES == 0) {
        const Ends ends = {call.residual ? call.residual + begin : nullptr, ADDS ? call.added + begin : nullptr,
                           call.floats ? call.floats + begin : nullptr, call.bytes ? call.bytes + begin : nullptr,
                           w.rows};
        return finish<ACTIVATION, ADDS>(w, call, row, left, tokens, sums, ends);
    }
    for (int64_t t = 0, at = begin; t < tokens; t++, at += w.rows) {
        float floats[CHUNK], values[CHUNK] = {};
        uint8_t bytes[CHUNK], added[CHUNK] = {};
        if (call.residual) memcpy(values, call.residual + at, left * sizeof(float));
        if (ADDS) memcpy(added, call.added + at, left);
        const Ends ends = {call.residual ? values : nullptr, added, call.floats ? floats : nullptr,
                           call.bytes ? bytes : nullptr, 0};
        finish<ACTIVATION, ADDS>(w, call, row, left, 1, sums + t * CHUNK, ends);
        if (call.floats) memcpy(call.floats + at, floats, left * sizeof(float));
        if (call.bytes) memcpy(call.bytes + at, bytes, left);
    }
}

constexpr int64_t MOST_TOKENS = 60;  // of a call of `compute`: the sums of a chunk are then 15 KiB

template <int KEPT, int SHARED, bool NARROW = false>
constexpr Int8Layout layout_of() {
    using S = Shape<KEPT, SHARED, NARROW>;
    return {S::GROUPS, S::SPLITS, S::COLUMNS, MOST_TOKENS / S::TOKENS * S::TOKENS};
}

Int8Layout layout(int kept, int shared) {
    if (kept == 16) return layout_of<16, 4>();
    if (shared == 1) return kept == 8 ? layout_of<8, 1>() : layout_of<4, 1>();
    if (shared == 2) return kept == 8 ? layout_of<8, 2>() : layout_of<4, 2>();
    return kept == 8 ? layout_of<8, 4>() : layout_of<4, 4>();
}

[[maybe_unused]] Int8Layout narrow_layout(int kept) {
    return kept == 8 ? layout_of<8, 1, true>() : layout_of<4, 1, true>();
}

void compute(const Int8Weights& w, const Int8Call& call, const uint8_t* x, size_t stride, int64_t first, int64_t last,
             int64_t begin, int64_t end) {
    alignas(64) int32_t sums[MOST_TOKENS * CHUNK];
    const MultiplyChunk multiply_chunk = chosen(w);
    const auto finish = call.added                                 ? finish_chunk<Activation::NONE, true>
                        : call.activation == Activation::RELU      ? finish_chunk<Activation::RELU, false>
                        : call.activation == Activation::GELU      ? finish_chunk<Activation::GELU, false>
                        : call.activation == Activation::GELU_TANH ? finish_chunk<Activation::GELU_TANH, false>
                                                                   : finish_chunk<Activation::NONE, false>;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        multiply_chunk(w, chunk, x, stride, last - first, sums);
        finish(w, call, chunk, first, last - first, sums);
    }
}

}  // namespace

namespace mpcompile {

extern const Int8Kernel NM_INT8_GEMM;
const Int8Kernel NM_INT8_GEMM = {
    LANES, NM_SATURATES, layout, compute, true, SPLITS > 1 ? narrow_layout : nullptr, X_OFFSET};

}  // namespace mpcompile
