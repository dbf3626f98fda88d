// Vectors of bytes and floats for the int8 kernels, in the intrinsics of AVX2, of AVX-512 with VNNI, or of NEON.
#pragma once
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of GCC 12 in its own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__aarch64__)
#define NM_NEON 1
#else
#define NM_NEON 0
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NM_INLINE static inline __attribute__((always_inline))
#define NM_UNROLL _Pragma("GCC unroll 32")

#if NM_NEON
#include "int8_simd_neon.h"
#elif defined(__AVX512VNNI__)
#define NM_VNNI 1
#define NM_SATURATES 0  // sums of products pass through 16-bit lanes
#define NM_KEEP(vector) __asm__ volatile("" : "+v"(vector))
#else
#define NM_VNNI 0
#define NM_SATURATES 1
#define NM_KEEP(vector) __asm__ volatile("" : "+x"(vector))
#endif

namespace {

#if !NM_NEON
constexpr int X_OFFSET = 0;
#endif

#if NM_VNNI

using Bytes = __m512i;
using Floats = __m512;
constexpr int LANES = 16, SPLITS = 4;

NM_INLINE Bytes zeros() { return _mm512_setzero_si512(); }
NM_INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
NM_INLINE void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
NM_INLINE Bytes all16(int16_t v) { return _mm512_set1_epi16(v); }
NM_INLINE Bytes all4(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
template <int PARTS>
NM_INLINE Bytes load_blocks(const uint8_t* p) {
    if constexpr (PARTS == 4) return load_bytes(p);
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The 32-bit lanes of four vectors in turn: lane 0 of each, then lane 1 of each, and so on.
NM_INLINE void interleave4(const Bytes* from, int32_t* to) {
    const Bytes a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const Bytes c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    // part i of rows[k] is lane 4 i + k of each vector
    const Bytes rows[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                           _mm512_unpackhi_epi64(b, d)};
    const Bytes e = _mm512_shuffle_i32x4(rows[0], rows[1], 0x44), f = _mm512_shuffle_i32x4(rows[0], rows[1], 0xee);
    const Bytes g = _mm512_shuffle_i32x4(rows[2], rows[3], 0x44), h = _mm512_shuffle_i32x4(rows[2], rows[3], 0xee);
    store_bytes(to, _mm512_shuffle_i32x4(e, g, 0x88));
    store_bytes(to + 16, _mm512_shuffle_i32x4(e, g, 0xdd));
    store_bytes(to + 32, _mm512_shuffle_i32x4(f, h, 0x88));
    store_bytes(to + 48, _mm512_shuffle_i32x4(f, h, 0xdd));
}
// Stores the sums [TOKENS][GROUPS * SHARED] of a panel, `stride` apart for each token. Rows that share a pattern are
// neighbours: row r of the group in lane l of each vector is row l * SHARED + r. With PARTS 4, each row has a sum in
// each of the four 128-bit parts, which are added.
template <int TOKENS, int GROUPS, int SHARED, int PARTS>
NM_INLINE void store_sums(const Bytes* sums, int32_t* to, int64_t stride) {
    constexpr int VECTORS = GROUPS * SHARED;
    if constexpr (PARTS == 1 && SHARED == 1) {
        NM_UNROLL for (int t = 0; t < TOKENS; t++) NM_UNROLL for (int g = 0; g < GROUPS; g++)
            store_bytes(to + t * stride + 16 * g, sums[t * GROUPS + g]);
    } else if constexpr (PARTS == 1) {
        static_assert(GROUPS == 1 && SHARED == 4, "other shapes have four parts");
        NM_UNROLL for (int t = 0; t < TOKENS; t++) interleave4(sums + t * VECTORS, to + t * stride);
    } else {
        static_assert(VECTORS == 2, "two vectors of four rows for each token");
        const Bytes in_turn = SHARED == 1 ? _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                          : _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        NM_UNROLL for (int t = 0; t < TOKENS; t += 2) {
            const auto half = [sums](int token) __attribute__((always_inline)) {
                if (token >= TOKENS) return _mm512_setzero_si512();
                const Bytes a = sums[2 * token], b = sums[2 * token + 1];
                return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
            };
            const Bytes c = half(t), d = half(t + 1);
            Bytes both = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd));
            if constexpr (SHARED == 2) both = _mm512_permutexvar_epi32(in_turn, both);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t * stride), _mm512_castsi512_si256(both));
            if (t + 1 < TOKENS)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (t + 1) * stride),
                                    _mm512_extracti64x4_epi64(both, 1));
        }
    }
}
NM_INLINE Bytes shuffled(Bytes v, Bytes control) { return _mm512_shuffle_epi8(v, control); }
NM_INLINE Bytes add32(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
NM_INLINE Floats to_floats(Bytes v) { return _mm512_cvtepi32_ps(v); }
NM_INLINE Bytes rounded(Floats v) { return _mm512_cvtps_epi32(v); }
NM_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
NM_INLINE void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
NM_INLINE Floats all(float v) { return _mm512_set1_ps(v); }
NM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
NM_INLINE Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
NM_INLINE Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
NM_INLINE float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }
NM_INLINE float largest_of(Floats v) { return _mm512_reduce_max_ps(v); }
// LANES bytes as integers.
NM_INLINE Bytes load_low_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Stores the low bytes of LANES integers between 0 and 255.
NM_INLINE void store_low_bytes(uint8_t* p, Bytes v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
// Stores the low 16 bits of LANES integers that fit into them.
NM_INLINE void store_low_words(int16_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
// The low 16 bits of the lanes of two vectors, side by side in each lane.
NM_INLINE Bytes pairs16(Bytes low, Bytes high) {
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
}
// sum += the sum of the products of two 16-bit integers in each lane.
NM_INLINE void add_products16(Bytes& sum, Bytes a, Bytes b) {
    sum = _mm512_dpwssd_epi32(sum, a, b);
    NM_KEEP(sum);
}
NM_INLINE Floats nearest_integer(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
// v * 2^n for integers n that leave it a normal number.
NM_INLINE Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

#elif !NM_NEON

using Bytes = __m256i;
using Floats = __m256;
constexpr int LANES = 8, SPLITS = 1;  // of 32 bits

NM_INLINE Bytes zeros() { return _mm256_setzero_si256(); }
NM_INLINE Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
NM_INLINE void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
NM_INLINE Bytes all16(int16_t v) { return _mm256_set1_epi16(v); }
NM_INLINE Bytes all4(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
// PARTS blocks of 16 activations, for all rows of a vector.
template <int PARTS>
NM_INLINE Bytes load_blocks(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int TOKENS, int GROUPS, int SHARED, int PARTS>
NM_INLINE void store_sums(const Bytes* sums, int32_t* to, int64_t stride) {
    static_assert(GROUPS == 1 && PARTS == 1, "AVX2 has no other shapes");
    NM_UNROLL for (int t = 0; t < TOKENS; t++, sums += SHARED, to += stride) {
        if constexpr (SHARED == 1) store_bytes(to, sums[0]);
        if constexpr (SHARED == 2) {
            const Bytes a = _mm256_unpacklo_epi32(sums[0], sums[1]), b = _mm256_unpackhi_epi32(sums[0], sums[1]);
            store_bytes(to, _mm256_permute2x128_si256(a, b, 0x20));
            store_bytes(to + 8, _mm256_permute2x128_si256(a, b, 0x31));
        }
        if constexpr (SHARED == 4) {
            const Bytes a = _mm256_unpacklo_epi32(sums[0], sums[1]), b = _mm256_unpackhi_epi32(sums[0], sums[1]);
            const Bytes c = _mm256_unpacklo_epi32(sums[2], sums[3]), d = _mm256_unpackhi_epi32(sums[2], sums[3]);
            const Bytes e = _mm256_unpacklo_epi64(a, c), f = _mm256_unpackhi_epi64(a, c);
            const Bytes g = _mm256_unpacklo_epi64(b, d), h = _mm256_unpackhi_epi64(b, d);
            store_bytes(to, _mm256_permute2x128_si256(e, f, 0x20));
            store_bytes(to + 8, _mm256_permute2x128_si256(g, h, 0x20));
            store_bytes(to + 16, _mm256_permute2x128_si256(e, f, 0x31));
            store_bytes(to + 24, _mm256_permute2x128_si256(g, h, 0x31));
        }
    }
}
NM_INLINE Bytes shuffled(Bytes v, Bytes control) { return _mm256_shuffle_epi8(v, control); }
NM_INLINE Bytes add32(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
NM_INLINE Floats to_floats(Bytes v) { return _mm256_cvtepi32_ps(v); }
NM_INLINE Bytes rounded(Floats v) { return _mm256_cvtps_epi32(v); }
NM_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
NM_INLINE void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
NM_INLINE Floats all(float v) { return _mm256_set1_ps(v); }
NM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
NM_INLINE Floats largest(Floats a, Floats b) { return _mm256_max_ps(a, b); }
NM_INLINE Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
NM_INLINE float sum_of(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
NM_INLINE float largest_of(Floats v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
NM_INLINE Bytes load_low_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
NM_INLINE void store_low_bytes(uint8_t* p, Bytes v) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(_mm_packs_epi32(low, high), low));
}
NM_INLINE void store_low_words(int16_t* p, Bytes v) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
}
NM_INLINE Bytes pairs16(Bytes low, Bytes high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa); }
NM_INLINE void add_products16(Bytes& sum, Bytes a, Bytes b) {
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
}
NM_INLINE Floats nearest_integer(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NM_INLINE Floats times_power(Floats v, Floats n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

#endif

// Quantises to u8: the nearest integer of value / scale, ties to even, plus the zero point, between 0 and 255. NaN
// gives 0: of an operand that is NaN, max returns the second one.
// `low` and `high` are limits of the integers, less the zero point.
NM_INLINE void store_quantised(uint8_t* p, Floats value, Floats inverse_scale, Floats zero, Floats low, Floats high) {
    store_low_bytes(p, add32(rounded(least(largest(value * inverse_scale, low), high)), rounded(zero)));
}
NM_INLINE void store_quantised(uint8_t* p, Floats value, Floats inverse_scale, Floats zero) {
    store_quantised(p, value, inverse_scale, zero, -zero, all(255) - zero);
}

// x times a polynomial approximation of a sigmoid: x * (1/2 + c * P(t)), where c is x limited to +-top, and t = 2 (c /
// top)^2 - 1. The coefficients are those with the least largest error of the result that reach 0 and 1 at +-top. Below
// -top, -top takes the place of x: the sigmoid's rounding error would else be multiplied by any x, even by -infinity.
// NaN stays NaN: of an operand that is NaN, max and min return the second one.
template <size_t TERMS>
NM_INLINE Floats times_sigmoid(Floats x, float top, const float (&coefficients)[TERMS]) {
    x = largest(all(-top), x);
    const Floats c = least(x, all(top));
    const Floats t = multiply_add(c * c, all(2 / (top * top)), all(-1));
    Floats p = all(coefficients[TERMS - 1]);
    NM_UNROLL for (int i = int(TERMS) - 2; i >= 0; i--) p = multiply_add(p, t, all(coefficients[i]));
    return x * multiply_add(c, p, all(0.5f));
}

// 2^x for x <= 0; the relative error is at most 4e-6, and below 2^-126 the result is 2^-126.
NM_INLINE Floats exp2_of_negative(Floats x) {
    x = largest(x, all(-126));
    const Floats n = nearest_integer(x), r = x - n;
    Floats p = multiply_add(r, all(0.0013333558f), all(0.0096181291f));
    p = multiply_add(p, r, all(0.0555041087f));
    p = multiply_add(p, r, all(0.2402265070f));
    p = multiply_add(p, r, all(0.6931471806f));
    return times_power(multiply_add(p, r, all(1)), n);
}

// GELU with the normal distribution's function; the largest error is 1.1e-5.
NM_INLINE Floats gelu(Floats x) {
    constexpr float COEFFICIENTS[] = {0.153543437f,   -0.0757557662f, 0.0541368763f,   -0.040615334f,  0.0295280072f,
                                      -0.0190192501f, 0.0109491075f,  -0.00784956254f, 0.00561934002f, -0.0018412028f};
    return times_sigmoid(x, 4.6f, COEFFICIENTS);
}

// GELU with its approximation by tanh; the largest error is 9e-6.
NM_INLINE Floats gelu_tanh(Floats x) {
    constexpr float COEFFICIENTS[] = {0.160444912f,   -0.0787240318f, 0.0552085652f,   -0.039811286f,  0.0272457065f,
                                      -0.0163976485f, 0.00891888584f, -0.00625242662f, 0.00443951347f, -0.00143582625f};
    return times_sigmoid(x, 4.4f, COEFFICIENTS);
}

}  // namespace
