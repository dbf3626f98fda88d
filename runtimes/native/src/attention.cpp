// Attention for one head of one image, compiled for AVX2 and for AVX-512 with VNNI, with NM_ATTENTION as the name of
// the AttentionKernel that it defines.
//
// q, k, v and the probabilities are rounded to 12 bits and multiplied as pairs of 16-bit integers, twice as many at a
// time as float32. A sum over 64 channels, and one over 256 keys, is exact in 32 bits; more keys are summed in parts.
// The softmax is computed in float32. If q, k or v of a head hold a value that is not finite, its results are NaN; if a
// score is NaN or infinite, or all scores of a query are -infinity, so are the results of that query.
#include "attention.h"

#include "int8_simd.h"

namespace {

using mpcompile::Attention;
using mpcompile::Heads;

constexpr int PANEL = 2 * LANES;       // lanes of a panel: keys of the first product, channels of the second
constexpr int QUERIES = 24, ROWS = 6;  // that are computed together; rows of a product's tile
constexpr int64_t MOST_KEYS = 256;     // of an exact 32-bit sum: 256 * 4095 * 2047 < 2^31
constexpr float TOP = 2047, TOP_PROBABILITY = 4095;

constexpr int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// y[m][lane] = or += scale[m] * sum over steps of the products of a pair of a[m] with a pair of each lane of the panel.
// HALVES: the vectors of the panel that are computed, 1 or 2.
template <int M, int HALVES, bool ADDS>
__attribute__((noinline)) void product(const int16_t* a, size_t a_stride, const int16_t* panel, int64_t steps, float* y,
                                       size_t y_stride, const float* scale) {
    Bytes sums[M][HALVES];
    NM_UNROLL for (int m = 0; m < M; m++) NM_UNROLL for (int half = 0; half < HALVES; half++) sums[m][half] = zeros();
    for (int64_t i = 0; i < steps; i++, a += 2, panel += 2 * PANEL) {
        Bytes lanes[HALVES];
        NM_UNROLL for (int half = 0; half < HALVES; half++) {
            lanes[half] = load_bytes(panel + half * PANEL);
            NM_KEEP(lanes[half]);
        }
        NM_UNROLL for (int m = 0; m < M; m++) {
            const Bytes pair = all4(reinterpret_cast<const uint8_t*>(a + m * a_stride));
            NM_UNROLL for (int half = 0; half < HALVES; half++) add_products16(sums[m][half], pair, lanes[half]);
        }
    }
    NM_UNROLL for (int m = 0; m < M; m++) NM_UNROLL for (int half = 0; half < HALVES; half++) {
        float* to = y + m * y_stride + half * LANES;
        const Floats scaled = to_floats(sums[m][half]) * all(scale[m]);
        store_floats(to, ADDS ? load_floats(to) + scaled : scaled);
    }
}

template <bool ADDS, int HALVES, int M = ROWS>
NM_INLINE void rows_of(int64_t rows, const int16_t* a, size_t a_stride, const int16_t* panel, int64_t steps, float* y,
                       size_t y_stride, const float* scale) {
    if constexpr (M > 1)
        if (rows < M) return rows_of<ADDS, HALVES, M - 1>(rows, a, a_stride, panel, steps, y, y_stride, scale);
    product<M, HALVES, ADDS>(a, a_stride, panel, steps, y, y_stride, scale);
}

// `rows` rows times a panel of which `lanes` lanes are used.
template <bool ADDS>
void product_of(int64_t rows, int64_t lanes, const int16_t* a, size_t a_stride, const int16_t* panel, int64_t steps,
                float* y, size_t y_stride, const float* scale) {
    for (int64_t i = 0; i < rows; i += ROWS) {
        const int16_t* from = a + i * int64_t(a_stride);
        float* to = y + i * int64_t(y_stride);
        lanes > LANES ? rows_of<ADDS, 2>(rows - i, from, a_stride, panel, steps, to, y_stride, scale + i)
                      : rows_of<ADDS, 1>(rows - i, from, a_stride, panel, steps, to, y_stride, scale + i);
    }
}

// NaN if a value is not finite.
float largest_magnitude(const Heads& from, const float* values, int64_t tokens, int64_t dim) {
    Floats most = all(0), not_finite = all(0);  // 0 or NaN
    float rest = 0;
    for (int64_t t = 0; t < tokens; t++, values += from.token_stride) {
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
            const Floats value = load_floats(values + i);
            most = largest(most, largest(value, -value));
            not_finite = multiply_add(value, all(0), not_finite);
        }
        for (; i < dim; i++) {
            const float value = values[i] < 0 ? -values[i] : values[i];
            rest = (value > rest ? value : rest) + value * 0;
        }
    }
    const float found = largest_of(most);
    return (found > rest ? found : rest) + sum_of(not_finite);
}

// The factor that brings values up to `largest` to 12 bits; 1 for values that are all nearly zero.
float factor_for(float largest) { return largest < 1e-27f ? 1.0f : TOP / largest; }

int16_t rounded16(float value) {
    const float limited = value > -TOP ? value < TOP ? value : TOP : -TOP;
    return int16_t(__builtin_lrintf(limited));
}

// Rounds `dim` values to 12 bits; the values beyond, up to `padded`, are zero.
void round16(const float* from, float factor, int64_t dim, int64_t padded, int16_t* to) {
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES)
        store_low_words(to + i, rounded(least(largest(load_floats(from + i) * all(factor), all(-TOP)), all(TOP))));
    for (; i < padded; i++) to[i] = i < dim ? rounded16(from[i] * factor) : 0;
}

// The parts of the scratch memory, each aligned to 64 bytes.
struct Scratch {
    int64_t dim, keys;       // padded to panels
    int64_t channels;        // padded to pairs
    int16_t* row;            // [max(dim, channels)] one token
    int16_t* k;              // [panels of keys][channels / 2][PANEL][2]
    int16_t* v;              // [panels of channels][keys / 2][PANEL][2]
    int16_t* q;              // [QUERIES][channels]
    int16_t* probabilities;  // [QUERIES][keys]
    float* scores;           // [QUERIES][keys]
    float* y;                // [QUERIES][dim]
    size_t bytes = 0;

    Scratch(const Attention& a, uint8_t* memory)
        : dim(rounded_up(a.dim, PANEL)), keys(rounded_up(a.keys, PANEL)), channels(rounded_up(a.dim, 2)) {
        take(row, dim, memory);
        take(k, keys * channels, memory);
        take(v, dim * keys, memory);
        take(q, QUERIES * channels, memory);
        take(probabilities, QUERIES * keys, memory);
        take(scores, QUERIES * keys, memory);
        take(y, QUERIES * dim, memory);
    }

    template <typename T>
    void take(T*& part, int64_t count, uint8_t* memory) {
        part = reinterpret_cast<T*>(memory + bytes);
        bytes += size_t(rounded_up(count * int64_t(sizeof(T)), 64));
    }
};

void pack_keys(const Attention& a, const float* k, float factor, Scratch& s) {
    const int64_t steps = s.channels / 2;
    memset(s.k, 0, size_t(s.keys * s.channels) * sizeof(int16_t));
    for (int64_t t = 0; t < a.keys; t++) {
        round16(k + t * a.k.token_stride, factor, a.dim, s.channels, s.row);
        int16_t* to = s.k + t / PANEL * steps * 2 * PANEL + t % PANEL * 2;
        for (int64_t i = 0; i < steps; i++) memcpy(to + i * 2 * PANEL, s.row + 2 * i, 2 * sizeof(int16_t));
    }
}

// Rounds a vector of values of a token to 12 bits; zeros for a token or channels that do not exist.
NM_INLINE Bytes rounded12(const float* values, int64_t count, float factor) {
    if (count <= 0) return zeros();
    float some[LANES] = {};
    if (count < LANES) {
        memcpy(some, values, size_t(count) * sizeof(float));
        values = some;
    }
    return rounded(least(largest(load_floats(values) * all(factor), all(-TOP)), all(TOP)));
}

// Each 32-bit lane holds the values of one channel of two tokens.
void pack_values(const Attention& a, const float* v, float factor, Scratch& s) {
    for (int64_t t = 0; t < s.keys; t += 2)
        for (int64_t d = 0; d < s.dim; d += LANES) {
            const float* from = v + t * a.v.token_stride + d;
            const Bytes first = rounded12(from, t < a.keys ? a.dim - d : 0, factor);
            const Bytes second = rounded12(from + a.v.token_stride, t + 1 < a.keys ? a.dim - d : 0, factor);
            store_bytes(s.v + d / PANEL * (s.keys * PANEL) + t / 2 * 2 * PANEL + d % PANEL * 2, pairs16(first, second));
        }
}

// Replaces the scores of one query by probabilities, up to a factor, and returns their sum; NaN if they have none.
float softmax(const Attention& a, const float* bias, float* scores, int16_t* probabilities) {
    constexpr float LOG2_E = 1.44269504f;
    if (bias)
        for (int64_t t = 0; t < a.keys; t++) scores[t] += bias[t];
    const int64_t keys = rounded_up(a.keys, LANES);  // the probabilities beyond are not read
    for (int64_t t = a.keys; t < keys; t++) scores[t] = -__builtin_inff();
    Floats most = load_floats(scores);
    for (int64_t t = LANES; t < keys; t += LANES) most = largest(most, load_floats(scores + t));
    const Floats top = all(largest_of(most));
    Floats sum = all(0), distances = all(0);  // NaN if a distance is
    for (int64_t t = 0; t < keys; t += LANES) {
        const Floats distance = load_floats(scores + t) - top;
        const Bytes p = rounded(exp2_of_negative(distance * all(LOG2_E)) * all(TOP_PROBABILITY));
        store_low_words(probabilities + t, p);
        sum = sum + to_floats(p);
        distances = distances + distance;
    }
    const float found = sum_of(sum), of_distances = sum_of(distances);
    return of_distances == of_distances ? found : of_distances;
}

void store_result(const Attention& a, int64_t at, const float* y) {
    if (a.floats) memcpy(a.floats + at, y, size_t(a.dim) * sizeof(float));
    if (!a.bytes) return;
    const Floats inverse = all(a.inverse_scale), zero = all(a.zero);
    uint8_t bytes[LANES];
    for (int64_t i = 0; i < a.dim; i += LANES) {
        const int64_t left = a.dim - i < LANES ? a.dim - i : LANES;
        store_quantised(bytes, load_floats(y + i), inverse, zero);
        memcpy(a.bytes + at + i, bytes, size_t(left));
    }
}

void compute(const Attention& a, int64_t image, int64_t head, uint8_t* memory) {
    Scratch s(a, memory);
    const auto start = [&](const Heads& of) { return of.values + image * of.image_stride + head * a.dim; };
    const float *q = start(a.q), *k = start(a.k), *v = start(a.v);
    const float q_factor = factor_for(largest_magnitude(a.q, q, a.queries, a.dim));
    const float k_factor = factor_for(largest_magnitude(a.k, k, a.keys, a.dim));
    const float v_factor = factor_for(largest_magnitude(a.v, v, a.keys, a.dim));
    pack_keys(a, k, k_factor, s);
    pack_values(a, v, v_factor, s);
    const float* bias = a.bias ? a.bias + image * a.bias_image_stride + head * a.bias_head_stride : nullptr;
    for (int64_t first = 0; first < a.queries; first += QUERIES) {
        const int64_t count = a.queries - first < QUERIES ? a.queries - first : QUERIES;
        float factors[QUERIES];
        for (int64_t i = 0; i < count; i++) {
            round16(q + (first + i) * a.q.token_stride, q_factor, a.dim, s.channels, s.q + i * s.channels);
            factors[i] = a.scale / (q_factor * k_factor);
        }
        for (int64_t t = 0; t < a.keys; t += PANEL)
            product_of<false>(count, a.keys - t, s.q, size_t(s.channels), s.k + t * s.channels, s.channels / 2,
                              s.scores + t, size_t(s.keys), factors);
        for (int64_t i = 0; i < count; i++)
            factors[i] = 1 / (v_factor * softmax(a, bias ? bias + (first + i) * a.bias_query_stride : nullptr,
                                                 s.scores + i * s.keys, s.probabilities + i * s.keys));
        for (int64_t part = 0; part < a.keys; part += MOST_KEYS) {
            const int64_t steps = ((a.keys - part < MOST_KEYS ? a.keys - part : MOST_KEYS) + 1) / 2;
            const auto add = part ? product_of<true> : product_of<false>;
            for (int64_t d = 0; d < a.dim; d += PANEL)
                add(count, a.dim - d, s.probabilities + part, size_t(s.keys), s.v + d * s.keys + part * PANEL, steps,
                    s.y + d, size_t(s.dim), factors);
        }
        for (int64_t i = 0; i < count; i++)
            store_result(a, ((image * a.queries + first + i) * a.heads + head) * a.dim, s.y + i * s.dim);
    }
}

size_t scratch_bytes(const Attention& a) { return Scratch(a, nullptr).bytes; }

}  // namespace

namespace mpcompile {

extern const AttentionKernel NM_ATTENTION;
const AttentionKernel NM_ATTENTION = {scratch_bytes, compute};

}  // namespace mpcompile
